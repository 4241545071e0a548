"""One optimizer step of any method: masks, forward, backward, guarded update. Writes no files."""

import contextlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastmim.methods import Method
from fastmim.ops import Masks, ema_update_, num_keep, sample_masks
from fastmim.train.config import Recipe
from fastmim.train.optim import AdamWEMA, lr_at, param_groups

# Narrowest model for which bf16 products gained on a CPU with AVX512-BF16: at width 128 the casts
# cost more than the products save.
_NARROWEST_BF16_CPU = 256


class MicroBatch(Protocol):
    """Images of one forward pass; :class:`fastmim.data.Batch` is one."""

    imgs: Tensor
    sample_ids: Tensor
    epoch: int


class StepResult(NamedTuple):
    """What one optimizer step did.

    Attributes:
        losses: Name to value, means over the micro-batches; "loss" is the total.
        lr: Learning rate used.
        momentum: Of the teacher, None without one.
        grad_norm: Global L2 norm of the gradient before clipping.
        skipped: True if a loss or gradient was not finite and nothing was changed.
    """

    losses: dict[str, float]
    lr: float
    momentum: float | None
    grad_norm: float
    skipped: bool


def resolve_device(device: str) -> torch.device:
    """The device meant by ``auto``, or the one named.

    Raises:
        ValueError: If the name is no device, or a GPU is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"efficiency.device: expected auto, cpu or cuda, got '{device}'"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"efficiency.device: '{device}' was asked for, but this torch sees no GPU; "
            "use auto or cpu, or install a CUDA build of torch"
        )
    return found


def resolve_precision(precision: str, device: torch.device, width: int) -> str:
    """``fp32`` or ``bf16``: what ``auto`` means on a device, for a model of some width.

    Args:
        precision: auto, fp32 or bf16.
        device: Where the model runs.
        width: Of the encoder.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    native = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16" if native and width >= _NARROWEST_BF16_CPU else "fp32"


class Engine:
    """Trains a method step by step.

    Args:
        method: Student, perhaps a teacher, and the loss; already on its device.
        recipe: Optimizer, schedules and masks.
        precision: fp32 or bf16.
        steps_per_epoch: Optimizer steps in a pass over the data.
    """

    def __init__(
        self, method: Method, recipe: Recipe, *, precision: str, steps_per_epoch: int
    ) -> None:
        self.method = method
        self.recipe = recipe
        self.precision = precision
        self.steps_per_epoch = steps_per_epoch
        self.num_keep = num_keep(method.student.num_patches, recipe.mask_ratio)
        self.device = next(method.student.parameters()).device
        self._per_step = method.teacher is not None and recipe.momentum_schedule == "cosine"
        pairs = method.teacher.pairs(method.student) if self._per_step else {}
        groups = param_groups(method.student.named_parameters(), recipe.weight_decay)
        self.optimizer = AdamWEMA(
            groups,
            betas=recipe.betas,
            eps=recipe.adam_eps,
            teachers={name: pairs[name][0] for g in groups for name in g["names"] if pairs},
        )
        trained = set(self.optimizer.names)
        self._frozen_pairs = [pair for name, pair in pairs.items() if name not in trained]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.recipe.epochs

    def masks(self, batch: MicroBatch) -> Masks:
        """Masks of a micro-batch: a function of seed, epoch and sample ids."""
        return sample_masks(
            self.recipe.seed,
            batch.epoch,
            batch.sample_ids.to(self.device),
            self.method.student.num_patches,
            self.num_keep,
        )

    def run_step(self, step: int, batches: Iterable[MicroBatch], count: int = 1) -> StepResult:
        """Do optimizer step number ``step``.

        Args:
            step: Global step, from 0; schedules depend on nothing else.
            batches: The micro-batches of this step.
            count: How many they are.
        """
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        for i, batch in enumerate(batches):
            imgs = batch.imgs.to(self.device, non_blocking=True)
            with self._autocast():
                losses = self.method(imgs, self.masks(batch))
            (losses.total / count).backward()
            for name, value in {"loss": losses.total.detach(), **losses.terms}.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / count
            if i < count - 1 and bool(torch.isfinite(losses.total.detach())):
                self._follow_micro_step(step, i, count)
        return self._update(step, count, sums)

    def _update(self, step: int, count: int, sums: dict[str, Tensor]) -> StepResult:
        recipe = self.recipe
        norm = torch.nn.utils.get_total_norm(self.optimizer.grads())
        finite = torch.isfinite(sums["loss"]) & torch.isfinite(norm)
        scale = 1.0
        if recipe.clip_grad is not None:
            scale = (recipe.clip_grad / (norm.double() + 1e-6)).clamp(max=1.0)
        lr = lr_at(
            step / self.steps_per_epoch,
            lr=recipe.lr,
            min_lr=recipe.min_lr,
            warmup_epochs=recipe.warmup_epochs,
            epochs=recipe.epochs,
        )
        momentum = self.momentum_at(step, count - 1, count)
        self.optimizer.step(
            lr=lr,
            momentum=momentum if self._per_step else 1.0,
            grad_scale=scale,
            skip=~finite,
        )
        skipped = not bool(finite)
        if not skipped and self._frozen_pairs:  # position tables, averaged like the rest
            teachers, students = zip(*self._frozen_pairs, strict=True)
            ema_update_(teachers, students, momentum)
        if not skipped:
            self._follow_micro_step(step, count - 1, count)
        self.optimizer.zero_grad()
        values = {name: float(value) for name, value in sums.items()}
        return StepResult(values, lr, momentum, float(norm), skipped)

    def momentum_at(self, step: int, micro_step: int, count: int) -> float | None:
        """Momentum of the teacher after a micro-batch; None without a teacher.

        Args:
            step: Global optimizer step.
            micro_step: Micro-batch within the step.
            count: Micro-batches in a step.
        """
        if self.method.teacher is None:
            return None
        if self.recipe.momentum_schedule == "cosine":
            return self.method.teacher_momentum(step / self.total_steps)
        # As released: the table of the whole run, read at the iteration within the epoch.
        within = (step % self.steps_per_epoch) * count + micro_step
        return self.method.teacher_momentum(within / (self.total_steps * count))

    def _follow_micro_step(self, step: int, micro_step: int, count: int) -> None:
        """The released code's update, after every micro-batch with a finite loss."""
        if self.method.teacher is not None and not self._per_step:
            momentum = self.momentum_at(step, micro_step, count)
            self.method.teacher.update_(self.method.student, momentum)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)
