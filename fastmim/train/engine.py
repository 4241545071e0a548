"""One optimizer step of any method: masks, forward, backward, guarded update. Writes no files."""

import contextlib
import math
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
        ValueError: If the name is no device, or a GPU is asked for that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, _, number = device.partition(":")
    if name not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise ValueError(f"efficiency.device: expected auto, cpu, cuda or cuda:N, got '{device}'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"efficiency.device: '{device}' was asked for, but torch {torch.__version__} sees no "
            "GPU; use auto or cpu, or install a CUDA build of torch and its driver"
        )
    if name == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"efficiency.device: '{device}' was asked for, but there are "
            f"{torch.cuda.device_count()} GPUs, counted from 0"
        )
    return torch.device(device)


def resolve_precision(precision: str, device: torch.device, width: int) -> str:
    """``fp32`` or ``bf16``: what ``auto`` means on a device, for a model of some width.

    Args:
        precision: auto, fp32 or bf16.
        device: Where the model runs.
        width: Of the encoder.

    Raises:
        ValueError: If the precision is none of these.
    """
    if precision in ("fp32", "bf16"):
        return precision
    if precision != "auto":
        raise ValueError(f"efficiency.precision: expected auto, fp32 or bf16, got '{precision}'")
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
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
        official = recipe.momentum_schedule == "official"
        self._per_step = method.teacher is not None and not official
        self._per_micro_step = method.teacher is not None and official
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
        """Do optimizer step number ``step``: all of it, or nothing if something is not finite.

        Args:
            step: Global step, from 0; schedules depend on nothing else.
            batches: The micro-batches of this step, of one size; taken one at a time.
            count: How many they are.
        """
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        before = self._copy_teacher() if self._per_micro_step and count > 1 else None
        for i, batch in zip(range(count), batches, strict=True):
            imgs = batch.imgs.to(self.device, non_blocking=True)
            with self._autocast():
                losses = self.method(imgs, self.masks(batch))
            (losses.total / count).backward()
            for name, value in {"loss": losses.total.detach(), **losses.terms}.items():
                sums[name] = sums.get(name, 0.0) + value / count
            if self._per_micro_step and i < count - 1:
                self._follow(step, i, count)
        result = self._update(step, count, sums)
        if not result.skipped:
            self._follow(step, count - 1, count)
        elif before is not None:
            self._restore_teacher(before)
        return result

    def _update(self, step: int, count: int, sums: dict[str, Tensor]) -> StepResult:
        """AdamW on the gradients that are there, and the teacher's EMA in the same pass."""
        recipe = self.recipe
        norm = torch.nn.utils.get_total_norm(self.optimizer.grads())
        clip = 1.0
        if recipe.clip_grad is not None:
            clip = (recipe.clip_grad / (norm.double() + 1e-6)).clamp(max=1.0)
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
            clip=clip,
            skip=~(torch.isfinite(sums["loss"]) & torch.isfinite(norm)),
        )
        self.optimizer.zero_grad()
        # The only wait for the device, after all of the step is queued.
        grad_norm, *values = torch.stack([norm, *sums.values()]).tolist()
        losses = dict(zip(sums, values, strict=True))
        skipped = not (math.isfinite(losses["loss"]) and math.isfinite(grad_norm))
        return StepResult(losses, lr, momentum, grad_norm, skipped)

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

    def _follow(self, step: int, micro_step: int, count: int) -> None:
        """Move what the optimizer's pass does not: frozen tables; all of the teacher if official.

        The released code updates the teacher after every micro-batch.
        """
        if self._per_micro_step:
            self.method.teacher.update_(
                self.method.student, self.momentum_at(step, micro_step, count)
            )
        elif self._frozen_pairs:
            teachers, students = zip(*self._frozen_pairs, strict=True)
            ema_update_(teachers, students, self.momentum_at(step, micro_step, count))

    def _copy_teacher(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.method.teacher.module.state_dict().values()]

    def _restore_teacher(self, tensors: list[Tensor]) -> None:
        state = self.method.teacher.module.state_dict().values()
        for tensor, before in zip(state, tensors, strict=True):
            tensor.copy_(before)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)
