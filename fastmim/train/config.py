"""Everything a run can be told. A recipe changes the result; efficiency must not."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: two runs of one recipe, seed and data set give one result.

    Args:
        model: Name for fastmim.create_model, such as rc_vit_base_patch16.
        img_size: Height and width of the training crops in pixels, or one number. Default: that
            of the model.
        norm_pix: Normalise the pixels of each target patch.
        mask_ratio: Fraction of patches removed, in (0, 1).
        epochs: Passes over the data set.
        warmup_epochs: Linear warm-up of the learning rate.
        batch_size: Images per optimizer step, over all micro-batches.
        base_lr: Learning rate per 256 images: lr = base_lr * batch_size / 256.
        min_lr: Where the cosine ends.
        weight_decay: Decoupled decay of matrices; biases and norms have none.
        betas: AdamW's coefficients.
        adam_eps: AdamW's epsilon.
        clip_grad: Largest global gradient norm; none: no clipping.
        crop_scale: Area of the random crop as a fraction of the image, from and to.
        crop_ratio: Aspect ratio of the random crop, from and to.
        hflip: Probability of a horizontal flip.
        gamma: Weight of the teacher's consistency term (RC-MAE).
        momentum: Of the EMA teacher at the start of the run (RC-MAE).
        momentum_schedule: cosine: to 1 over the run, after every optimizer step. official: what
            the released code does, restarted every epoch and applied after every micro-batch.
        seed: Of initial weights, order, crops and masks.
    """

    model: str = "rc_vit_base_patch16"
    img_size: int | tuple[int, int] | None = None
    norm_pix: bool = True
    mask_ratio: float = 0.75
    epochs: int = 800
    warmup_epochs: float = 40
    batch_size: int = 4096
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    clip_grad: float | None = None
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    gamma: float = 1.0
    momentum: float = 0.996
    momentum_schedule: Literal["cosine", "official"] = "cosine"
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "recipe.epochs", "at least 1", self.epochs)
        _require(self.batch_size >= 1, "recipe.batch_size", "at least 1", self.batch_size)
        _require(
            0 <= self.warmup_epochs <= self.epochs,
            "recipe.warmup_epochs",
            f"between 0 and recipe.epochs = {self.epochs}",
            self.warmup_epochs,
        )
        _require(self.base_lr > 0, "recipe.base_lr", "positive", self.base_lr)
        _require(
            self.min_lr <= self.lr, "recipe.min_lr", f"at most the lr of {self.lr}", self.min_lr
        )
        _require(0 < self.mask_ratio < 1, "recipe.mask_ratio", "between 0 and 1", self.mask_ratio)
        _require(0 <= self.momentum <= 1, "recipe.momentum", "in [0, 1]", self.momentum)
        _require(
            self.clip_grad is None or self.clip_grad > 0,
            "recipe.clip_grad",
            "positive or none",
            self.clip_grad,
        )

    @property
    def lr(self) -> float:
        """Peak learning rate: ``base_lr * batch_size / 256``."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class Efficiency:
    """How fast and in how much memory. Changes rounding at most.

    Args:
        micro_batch: Images per forward pass; must divide recipe.batch_size. Default: all at once.
        precision: Of matrix products. bf16: autocast, with float32 weights, teacher, residual
            stream and losses. auto: bf16 where the processor computes it natively and the model is
            wide enough to gain, else fp32.
        workers: Processes that load images; 0: the training process does.
        threads: CPU threads of the training process. Default: torch's.
        device: auto: a GPU if there is one, else the CPU.
    """

    micro_batch: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = 0
    threads: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Data:
    """Where the images are.

    Args:
        path: A folder of images (searched recursively), a parquet file or folder in Hugging Face's
            layout, or "digits", the embedded data set.
        max_bad_fraction: Fraction of unreadable images above which the run stops.
    """

    path: str = "digits"
    max_bad_fraction: float = 1e-3


@dataclass(frozen=True)
class Evaluation:
    """kNN accuracy of the features, the sign that pre-training works. Needs labels.

    Args:
        knn_every: Epochs between evaluations during the run; 0: none.
        knn_at_end: Compare teacher, student, the untrained network and raw pixels when the run
            ends, if there are labels.
        bank: Labelled images to search in. Default: the training images.
        queries: Labelled images to classify. Default: every bank image against all others.
        limit: Images of the bank used at most; 0: all.
        k: Neighbours.
        temperature: Of the votes.
        crop_ratio: Crop size divided by the size to which the short side is resized.
    """

    knn_every: int = 0
    knn_at_end: bool = True
    bank: str | None = None
    queries: str | None = None
    limit: int = 10000
    k: int = 20
    temperature: float = 0.07
    crop_ratio: float = 1.0


@dataclass(frozen=True)
class Output:
    """What is written, and how often.

    Args:
        folder: Runs are written to folder/name.
        name: Of the run. Default: made of preset and method.
        log_every: Optimizer steps between lines of metrics.jsonl.
        checkpoint_every: Optimizer steps between checkpoints; 0: only at the end.
        checkpoint_minutes: Minutes between checkpoints; 0: no such rule.
        keep: Checkpoints kept.
        pictures: Images in reconstruction.png; 0: no picture.
    """

    folder: Path = Path("runs")
    name: str | None = None
    log_every: int = 10
    checkpoint_every: int = 0
    checkpoint_minutes: float = 10.0
    keep: int = 2
    pictures: int = 8


@dataclass(frozen=True)
class Pretrain:
    """Pre-train a Vision Transformer by masked image modelling.

    Args:
        method: rc_mae or mae.
        preset: Named recipe that the other options start from; see fastmim presets.
        resume: auto: go on with the run folder if it holds an unfinished run. never: start anew in
            a folder of its own.
        max_bad_steps: Steps in a row with a non-finite loss or gradient after which the run stops.
        stop_after: Stop after this many optimizer steps of the run, as Ctrl-C would; none: never.
        data: Where the images are.
        recipe: What is trained and how; changes the result.
        efficiency: How fast and in how much memory; must not change the result.
        evaluation: kNN accuracy of the features.
        output: What is written, and how often.
    """

    method: str = "rc_mae"
    preset: str = "digits"
    resume: Literal["auto", "never"] = "auto"
    max_bad_steps: int = 3
    stop_after: int | None = None
    data: Data = field(default_factory=Data)
    recipe: Recipe = field(default_factory=Recipe)
    efficiency: Efficiency = field(default_factory=Efficiency)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: Output = field(default_factory=Output)


def to_dict(config) -> dict:
    """Nested plain values of a configuration, ready for JSON and YAML."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value):
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def recipe_from_dict(values: dict) -> Recipe:
    """The recipe that :func:`to_dict` was given."""
    return Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _require(condition: bool, name: str, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")
