"""What one training step is to the benchmark: a case, its inputs, and a program that does it."""

import contextlib
import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from machine import libraries
from torch import Tensor, nn

from fastmim import create_model
from fastmim.methods import METHODS
from fastmim.models import MODELS
from fastmim.nn.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from fastmim.ops import num_keep
from fastmim.train import Recipe

_BATCHES = 4  # distinct inputs that a program goes through in turns

# Parts of a step, in its order. "forward" is that of a program whose forward pass is one piece;
# "other" is what lies between the parts.
PARTS = (
    "masks", "embed", "encoder", "decoder", "teacher", "loss", "forward", "backward", "update",
    "other",
)  # fmt: skip


class Batch(NamedTuple):
    """Images of a step, as the loader gives them.

    Attributes:
        imgs: (B, 3, H, W), uint8; or float32, normalised.
        sample_ids: (B,), int64.
        epoch: Pass over the data.
    """

    imgs: Tensor
    sample_ids: Tensor
    epoch: int


@dataclass(frozen=True)
class Case:
    """One training step to be measured.

    Args:
        model: Name for fastmim.create_model.
        batch: Images per step.
        method: mae, rc_mae, dbot or sdae.
        dtype: fp32, or bf16: autocast with float32 weights. fp64: the truth of ``match``.
        device: cpu or cuda.
        images: uint8, as the loader gives them, or float, normalised beforehand.
    """

    model: str
    batch: int
    method: str
    dtype: str
    device: str
    images: str = "uint8"

    @property
    def sizes(self) -> dict:
        """Arguments of the network but for its target."""
        sizes = {"img_size": 224, **MODELS[self.model]}
        return {name: value for name, value in sizes.items() if name != "target"}

    @property
    def target(self) -> str:
        """What the method's student predicts: pixels, features or tokens."""
        return METHODS[self.method].target

    @property
    def num_patches(self) -> int:
        return (self.sizes["img_size"] // self.sizes["patch_size"]) ** 2

    @property
    def num_keep(self) -> int:
        return num_keep(self.num_patches, self.recipe.mask_ratio)

    @property
    def recipe(self) -> Recipe:
        """MAE's recipe (arXiv:2111.06377, table 8), at the full learning rate from the start."""
        return Recipe(model=self.model, batch_size=self.batch, epochs=1, warmup_epochs=0)

    def weights(self, seed: int) -> dict[str, Tensor]:
        """Initial weights by their published names; the caller's own, to train if it likes."""
        made = _weights(self.model, self.target, seed)
        return {name: tensor.clone() for name, tensor in made.items()}

    def batches(self) -> list[Batch]:
        size = self.sizes["img_size"]
        generator = torch.Generator().manual_seed(0)
        made = []
        for i in range(_BATCHES):
            shape = (self.batch, 3, size, size)
            imgs = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            if self.images == "float":
                imgs = normalized(imgs, torch.float32)
            ids = torch.arange(self.batch) + i * self.batch
            made.append(Batch(imgs.to(self.device), ids.to(self.device), 0))
        return made


@functools.cache
def _weights(model: str, target: str, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(model, target=target).state_dict()


class StepProgram(ABC):
    """A training step: masks, forward, backward, AdamW, and the EMA of a teacher that has one.

    The student starts from ``case.weights(0)``, the teacher from ``case.weights(1)``: with equal
    weights a consistency term would be zero.

    Attributes:
        name: In tables and for ``--peer``.
        modules: Libraries it needs besides PyTorch.
        methods: What it can train.
        dtypes: Precisions it can compute in.
        needs_gpu: Whether there is nothing of it on a CPU.
        student: The network that is trained.
    """

    name: str
    modules: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("mae", "rc_mae", "dbot", "sdae")
    dtypes: tuple[str, ...] = ("fp64", "fp32", "bf16")
    needs_gpu = False
    student: nn.Module

    @abstractmethod
    def __init__(self, case: Case) -> None: ...

    @classmethod
    def missing(cls, case: Case) -> str | None:
        """Why the program cannot do this case here; None if it can."""
        if case.method not in cls.methods:
            return f"trains {', '.join(cls.methods)} only"
        if cls.needs_gpu and case.device != "cuda":
            return "needs a GPU"
        if case.dtype not in cls.dtypes:
            return f"computes in {', '.join(cls.dtypes)} only"
        return next(filter(None, map(_import_problem, cls.modules)), None)

    @abstractmethod
    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        """The loss for given masks, with its graph.

        Args:
            imgs: (B, 3, H, W).
            ids_shuffle: (B, N), int64: the first K patches of each row are visible.
        """

    @abstractmethod
    def update(self) -> None:
        """AdamW on the gradients that are there, and the teacher that follows at every step."""

    @abstractmethod
    def step(self, batch: Batch) -> None:
        """All of one optimizer step, masks included."""

    @abstractmethod
    def followed(self) -> list[tuple[Tensor, Tensor]]:
        """Trained parameters of a teacher that follows at every step, each with its student's."""

    @classmethod
    def backend(cls, case: Case) -> dict:
        """Fields of a row: what computes, and versions of the libraries."""
        return dict(backend="torch", libraries=libraries(cls.modules))

    def gradients(self) -> dict[str, Tensor | None]:
        """Gradients of the student's trained parameters by their published names."""
        return {n: p.grad for n, p in self.student.named_parameters() if p.requires_grad}

    def parts(self) -> Mapping[str, list[tuple[object, str]]]:
        """For each part of the step, the objects and methods that do it.

        Time in a method that another one calls counts for the inner one alone.
        """
        return {}


def _import_problem(module: str) -> str | None:
    try:
        load(module)
    # A library built for another PyTorch fails in any of these ways.
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        return f"{module} cannot be imported: {str(error).splitlines()[0]}"
    return None


def load(module: str) -> object:
    """Import a library; those that want torchvision get what their import statements ask for."""
    if module in ("timm", "lightly"):
        from peers.torchvision_shim import torchvision_for_imports

        with torchvision_for_imports():
            importlib.import_module("timm.models.vision_transformer")
            if module == "lightly":
                importlib.import_module("lightly.models.modules")
    return importlib.import_module(module)


def autocast(case: Case) -> contextlib.AbstractContextManager:
    return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16")


def normalized(imgs: Tensor, dtype: torch.dtype) -> Tensor:
    """ImageNet's normalisation of uint8 images; others are only converted."""
    if imgs.dtype != torch.uint8:
        return imgs.to(dtype)
    mean, std = (
        torch.tensor(v, dtype=torch.float64, device=imgs.device)[:, None, None]
        for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return imgs.to(dtype).mul_((1 / (255 * std)).to(dtype)).sub_((mean / std).to(dtype))


Attend = Callable[[Tensor], Tensor]  # (B, N, 3, H, d) to (B, N, H, d)
