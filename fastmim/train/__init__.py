"""Training: configuration, recipes, the loop, checkpoints."""

from fastmim.train.config import Data, Efficiency, Evaluation, Output, Pretrain, Recipe
from fastmim.train.engine import Engine
from fastmim.train.presets import PRESETS
from fastmim.train.trainer import NonFiniteError, Outcome, Trainer

__all__ = [
    "PRESETS",
    "Data",
    "Efficiency",
    "Engine",
    "Evaluation",
    "NonFiniteError",
    "Outcome",
    "Output",
    "Pretrain",
    "Recipe",
    "Trainer",
]
