"""One optimizer step of any method: masks, forward, backward, guarded update. Writes no files."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastmim.methods import Clock, Method
from fastmim.nn.layers import Block
from fastmim.ops import Masks, ema_update_, num_keep, sample_masks, sample_uniforms
from fastmim.train.config import Recipe
from fastmim.train.distributed import World
from fastmim.train.optim import AdamWEMA, lr_at, param_groups

# Learning in bf16 was compared with fp32 at width 384 (benchmarks/bf16_curve.py); narrower models
# than this gain as well, but have to ask for it.
_NARROWEST_BF16_CPU = 256
# Graphs of one function. Ten blocks of RC-MAE differ to the compiler (first, middle and last of
# encoder and decoder, student and teacher), and dBOT has others in each stage.
_MOST_COMPILED = 256


class MicroBatch(Protocol):
    """Images of one forward pass; :class:`fastmim.data.Batch` is one."""

    imgs: Tensor
    sample_ids: Tensor
    epoch: int


class Votes(NamedTuple):
    """What a process wants of all; in a :class:`StepResult`, whether any does.

    Attributes:
        stop: To end after this step.
        save: To write a checkpoint.
        tell: To tell the others of images it could not read.
    """

    stop: bool = False
    save: bool = False
    tell: bool = False


class StepResult(NamedTuple):
    """What one optimizer step did; the same in all processes.

    Attributes:
        losses: Name to value, means over all micro-batches of all processes; "loss" is the total.
        lr: Learning rate used.
        momentum: Of the teacher, None without one that moves.
        grad_norm: Global L2 norm of the gradient before clipping.
        skipped: True if a loss or gradient was not finite and nothing was changed.
        votes: What any process wanted while the step was done.
    """

    losses: dict[str, float]
    lr: float
    momentum: float | None
    grad_norm: float
    skipped: bool
    votes: Votes = Votes()


def resolve_device(device: str, local_rank: int | None = None) -> torch.device:
    """The device meant by ``auto``, or the one named.

    Args:
        device: auto, cpu, cuda or cuda:N.
        local_rank: Of several processes, which takes the GPU of that number; None: one process.

    Raises:
        ValueError: If the name is no device, or a GPU is asked for that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name, _, number = device.partition(":")
    if name not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise ValueError(f"efficiency.device: expected auto, cpu, cuda or cuda:N, got '{device}'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"efficiency.device: '{device}' was asked for, but torch {torch.__version__} sees no "
            "GPU; use auto or cpu, or install a CUDA build of torch and its driver"
        )
    if name == "cuda" and local_rank is not None:
        return _device_of(local_rank, device)
    if name == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"efficiency.device: '{device}' was asked for, but there are "
            f"{torch.cuda.device_count()} GPUs, counted from 0"
        )
    return torch.device(device)


def _device_of(local_rank: int, device: str) -> torch.device:
    """The GPU of one of several processes."""
    if device != "cuda":
        raise ValueError(
            f"efficiency.device: '{device}' names one GPU for several processes; use auto or cuda, "
            "each takes its own; CUDA_VISIBLE_DEVICES chooses among them"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"efficiency.device: process {local_rank} of this machine, counted from 0, has no GPU "
            f"of its own, there are {count}; start torchrun with --nproc-per-node={count}"
        )
    return torch.device("cuda", local_rank)


def check_options(method: Method, recipe: Recipe, teacher_once: bool) -> None:
    """Refuse options that the method cannot serve.

    Raises:
        ValueError: Says which.
    """
    if teacher_once and method.teacher_follows == "micro_step":
        raise ValueError(
            "efficiency.teacher_once: this teacher moves after every micro-batch, so it cannot "
            "see all of them at once; use recipe.momentum_schedule cosine"
        )
    method.check_stages(len(recipe.stages))


def check_compiler(device: torch.device) -> None:
    """Refuse ``efficiency.compile`` where torch.compile does not work.

    Raises:
        ValueError: Says what it lacks.
    """
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        problem = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        needs = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler (g++)"
        raise ValueError(
            f"efficiency.compile: torch.compile does not work here ({problem.strip()}); it "
            f"needs {needs}; install it, or leave the option out"
        ) from error


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
        teacher_precision: fp32 or bf16, of what the teacher computes. Default: ``precision``.
        teacher_once: Let the teacher see all micro-batches of a step at once.
        compiled: Put networks and loss under torch.compile; of FSDP2, which gathers the weights of
            each block when it is called, the blocks.
        world: Processes that train together, all of which must construct one. Default: this one.

    Attributes:
        teacher_seconds: That the teacher has taken so far; on a GPU, of the GPU's time.
    """

    def __init__(
        self,
        method: Method,
        recipe: Recipe,
        *,
        precision: str,
        steps_per_epoch: int,
        teacher_precision: str | None = None,
        teacher_once: bool = False,
        compiled: bool = False,
        world: World | None = None,
    ) -> None:
        check_options(method, recipe, teacher_once)
        self.method = method
        self.recipe = recipe
        self.precision = precision
        self.steps_per_epoch = steps_per_epoch
        self.teacher_precision = teacher_precision or precision
        self.teacher_once = teacher_once
        self.compiled = compiled
        self.teacher_seconds = 0.0
        self._teacher_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.num_keep = num_keep(method.student.num_patches, recipe.mask_ratio)
        self.device = next(method.student.parameters()).device
        self._per_micro_step = method.teacher_follows == "micro_step"
        self.stage = 0
        self.world = World() if world is None else world
        self._begin()

    def _begin(self) -> None:
        """Spread the networks there are over the processes, and make their optimizer."""
        whole = self.world.parallel != "fsdp2"
        if self.compiled:
            for module in [self.method] if whole else self.method.modules():
                if whole or isinstance(module, Block):
                    module.compile(dynamic=False)
        self._wrapped = self.world.wrap(self.method)
        if self.compiled and whole:
            teach = torch.compile(self._wrapped.teach, dynamic=False)
            self._wrapped = self._wrapped._replace(teach=teach)
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> AdamWEMA:
        """For the student there is; the teacher's EMA is in its pass where every weight has one."""
        method, recipe = self.method, self.recipe
        pairs = method.teacher.pairs(method.student) if method.teacher_follows == "step" else {}
        groups = param_groups(method.student.named_parameters(), recipe.weight_decay)
        trained = [name for group in groups for name in group["names"]]
        fused = all(name in pairs for name in trained)
        teachers = {name: pairs[name][0] for name in trained} if fused else {}
        self._other_pairs = [pair for name, pair in pairs.items() if name not in teachers]
        return AdamWEMA(groups, betas=recipe.betas, eps=recipe.adam_eps, teachers=teachers)

    def begin_stage(self, stage: int) -> None:
        """Go through the stages up to this one, with new networks in each.

        Args:
            stage: From 0; the present one does nothing.
        """
        while self.stage < stage:
            self.stage += 1
            before = self.optimizer.state_dict()
            self.method.student = self.world.whole(self.method.student, everywhere=True)
            if self.method.teacher is not None:  # it may be that of a later stage, too
                teacher = self.method.teacher
                teacher.module = self.world.whole(teacher.module, everywhere=True)
            self.method.begin_stage(self.stage)
            self._begin()
            if self.recipe.stage_carry:
                self.optimizer.carry_over(before)

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

    def draws(self, batch: MicroBatch) -> Tensor | None:
        """Numbers for stochastic depth, a function like :meth:`masks`; None if none are needed."""
        count = self.method.student.num_draws
        if not count:
            return None
        ids = batch.sample_ids.to(self.device)
        return sample_uniforms(self.recipe.seed, batch.epoch, ids, count)

    def run_step(
        self,
        step: int,
        batches: Iterable[MicroBatch],
        count: int = 1,
        votes: Callable[[], Votes] = Votes,
    ) -> StepResult:
        """Do optimizer step number ``step``: all of it, or nothing if something is not finite.

        Args:
            step: Global step, from 0; schedules depend on nothing else.
            batches: This process's micro-batches of this step, all of one size in all processes;
                taken one at a time.
            count: How many they are.
            votes: Called once all gradients are queued.
        """
        self.begin_stage(self.recipe.stage_at(step // self.steps_per_epoch))
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        before = self._copy_teacher() if self._per_micro_step and count > 1 else None
        for i, (imgs, masks, draws, target) in zip(
            range(count), self._inputs(batches), strict=True
        ):
            with self.world.accumulating(self._wrapped.forward, i == count - 1):
                with self._computing(self.precision):
                    losses = self._wrapped.forward(imgs, masks, draws=draws, target=target)
                (losses.total / count).backward()
            for name, value in {"loss": losses.total.detach(), **losses.terms}.items():
                sums[name] = sums.get(name, 0.0) + value / count
            if self._per_micro_step and i < count - 1:
                self._follow(step, i, count)
        result = self._update(step, count, sums, votes)
        if not result.skipped:
            self._follow(step, count - 1, count)
        elif before is not None:
            self._restore_teacher(before)
        if self.method.teacher_follows == "epoch" and (step + 1) % self.steps_per_epoch == 0:
            self.method.teacher.update_(self.method.student, self.momentum_at(step, 0, 1))
        return result

    def _inputs(self, batches: Iterable[MicroBatch]) -> Iterator[tuple]:
        """Images, masks, draws and target of each micro-batch."""
        prepared = (
            (batch.imgs.to(self.device, non_blocking=True), self.masks(batch), self.draws(batch))
            for batch in batches
        )
        if not self.teacher_once or self.method.teacher is None:
            for imgs, masks, draws in prepared:
                yield imgs, masks, draws, self._teach(imgs, masks)
            return
        parts = list(prepared)
        shuffle, restore = (torch.cat([masks[i] for _, masks, _ in parts]) for i in range(2))
        imgs = torch.cat([imgs for imgs, _, _ in parts])
        target = self._teach(imgs, Masks(shuffle, restore, self.num_keep))
        for part, rows in zip(parts, target.chunk(len(parts)), strict=True):
            yield *part, rows

    def _teach(self, imgs: Tensor, masks: Masks) -> Tensor | None:
        """The teacher's part, without gradient, and how long it takes."""
        if self.method.teacher is None:
            return None
        on_gpu = self.device.type == "cuda"
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        begin = time.perf_counter()
        for event in events[:1]:
            event.record()
        with torch.no_grad(), self._computing(self.teacher_precision):
            target = self._wrapped.teach(imgs, masks)
        for event in events[1:]:
            event.record()
        if on_gpu:
            self._teacher_events.append(tuple(events))  # read when the GPU is waited for anyway
        else:
            self.teacher_seconds += time.perf_counter() - begin
        return target

    def _update(
        self, step: int, count: int, sums: dict[str, Tensor], votes: Callable[[], Votes]
    ) -> StepResult:
        """AdamW on the gradients that are there, and the teacher's EMA in the same pass."""
        recipe = self.recipe
        norm = self.world.norm(self.optimizer.grads())
        clip = 1.0
        if recipe.clip_grad is not None:
            clip = (recipe.clip_grad / (norm.double() + 1e-6)).clamp(max=1.0)
        # NaN or infinity of any process makes the mean of all not finite.
        shared = self._shared(votes(), norm, *sums.values())
        lr = self.lr_at(step)
        momentum = self.momentum_at(step, count - 1, count)
        self.optimizer.step(
            lr=lr,
            momentum=momentum if self.optimizer.teachers else 1.0,
            clip=clip,
            skip=~torch.isfinite(shared[:2]).all(),  # norm and loss
        )
        self.optimizer.zero_grad()
        # The only wait for the device, after all of the step is queued.
        grad_norm, *values = shared.tolist()
        for begin, end in self._teacher_events:
            self.teacher_seconds += begin.elapsed_time(end) / 1000
        self._teacher_events.clear()
        losses = dict(zip(sums, values, strict=False))
        skipped = not (math.isfinite(losses["loss"]) and math.isfinite(grad_norm))
        voted = Votes(*(value > 0 for value in values[len(sums) :]))
        return StepResult(losses, lr, momentum, grad_norm, skipped, voted)

    def _shared(self, votes: Votes, *values: Tensor) -> Tensor:
        """Mean over the processes of some scalars, then of the votes."""
        # Not torch.tensor: on a GPU it would wait for the copy.
        counted = [torch.full_like(values[0], float(vote)) for vote in votes]
        return self.world.mean(torch.stack([*values, *counted]))

    def lr_at(self, step: int) -> float:
        """Learning rate of an optimizer step: warm-up and cosine start anew in each stage."""
        recipe = self.recipe
        begin, end = recipe.stages[recipe.stage_at(step // self.steps_per_epoch)]
        return lr_at(
            step / self.steps_per_epoch - begin,
            lr=recipe.lr,
            min_lr=recipe.min_lr,
            warmup_epochs=recipe.warmup_epochs,
            epochs=end - begin,
        )

    def momentum_at(self, step: int, micro_step: int, count: int) -> float | None:
        """Momentum of the teacher after a micro-batch; None without a teacher that moves.

        Args:
            step: Global optimizer step.
            micro_step: Micro-batch within the step.
            count: Micro-batches in a step.
        """
        if self.method.teacher_follows == "never":
            return None
        clock = Clock(step, self.steps_per_epoch, self.recipe.epochs, micro_step, count)
        return self.method.teacher_momentum(clock)

    def _follow(self, step: int, micro_step: int, count: int) -> None:
        """Move what the optimizer's pass does not.

        That is frozen tables, a teacher without the student's decoder, and one that follows after
        every micro-batch.
        """
        if self._per_micro_step:
            self.method.teacher.update_(
                self.method.student, self.momentum_at(step, micro_step, count)
            )
        elif self._other_pairs:
            teachers, students = zip(*self._other_pairs, strict=True)
            ema_update_(teachers, students, self.momentum_at(step, micro_step, count))

    def _copy_teacher(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.method.teacher.module.state_dict().values()]

    def _restore_teacher(self, tensors: list[Tensor]) -> None:
        state = self.method.teacher.module.state_dict().values()
        for tensor, before in zip(state, tensors, strict=True):
            tensor.copy_(before)

    @contextlib.contextmanager
    def _computing(self, precision: str) -> Iterator[None]:
        """Around the networks: autocast, and an error where compiling would be given up."""
        with contextlib.ExitStack() as stack:
            if precision != "fp32":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self.compiled:
                stack.enter_context(
                    torch._dynamo.config.patch(
                        recompile_limit=_MOST_COMPILED, fail_on_recompile_limit_hit=True
                    )
                )
            yield
