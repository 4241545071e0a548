"""Suite ``step``: one optimizer step of MAE and RC-MAE against the peers."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from measure import in_fresh_process, interleave, peak_memory, saved_bytes, speedup
from peers import PEERS, Batch, Case, StepProgram, autocast
from suite import CHECKS, TIMES, Column, Options
from torch import Tensor

from fastmim import create_model
from fastmim.methods import METHODS
from fastmim.ops import masks_from_shuffle
from fastmim.train import Engine

NAME = "step"
# Shape to model and batch. tiny32 is bound by small operators, the others by matrix products.
SHAPES = {
    "tiny32": ("mae_vit_micro_patch4", 64),
    "small224": ("mae_vit_small_patch16_dec512d8b", 8),
    "base224": ("mae_vit_base_patch16", 256),
    "large224": ("mae_vit_large_patch16", 64),
}
DEFAULT = {"cpu": ["tiny32", "small224"], "cuda": ["base224", "large224"]}
COMPARED = ("rc_mae", "mae")  # the methods that the peers know
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("method", "method", ""), ("program", "kernel_provider", ""),
    ("dtype", "dtype", ""), ("batch", "x_value", "d"), *TIMES,
    ("img/s", "images_per_second", ".2f"), ("vs plain", "vs_peer", ".2f"),
    ("vs compiled", "vs_compiled", ".2f"), ("vs fp32", "vs_fp32", ".2f"),
    ("saved MB/img", "saved_mb_per_image", ".2f"), ("peak GiB", "peak_memory_gib", ".2f"),
    *CHECKS,
]
# fmt: on
_SMOKE_BATCH = 8
_CHECKED_IMAGES = 2
# Relative error (Euclidean norm) of the loss and of every gradient tensor against plain PyTorch in
# float64. Plain PyTorch's own largest, on the CPU at both shapes: 5e-7 in fp32, 1.1e-2 in bf16.
_TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


class FastMIM(StepProgram):
    """What a user gets: the engine with its masks, guard, schedules and gradient norm."""

    def __init__(self, case: Case) -> None:
        recipe = case.recipe
        model = create_model(case.model, norm_pix_loss=recipe.norm_pix)
        method = METHODS[case.method](model, mask_ratio=recipe.mask_ratio)
        if method.teacher is not None:
            method.teacher.module.load_state_dict(case.weights(1))
        method.student.load_state_dict(case.weights(0))
        method.to(case.device)
        self.case = case
        self.student = method.student
        self._engine = Engine(method, recipe, precision=case.dtype, steps_per_epoch=10**6)
        self._step = itertools.count()

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        masks = masks_from_shuffle(ids_shuffle, self._engine.num_keep)
        with autocast(self.case):
            return self._engine.method(imgs, masks).total

    def step(self, batch: Batch) -> None:
        if self._engine.run_step(next(self._step), [batch]).skipped:
            raise RuntimeError("the step was skipped: a loss or gradient was not finite")


PROGRAMS: dict[str, type[StepProgram]] = {"fastmim": FastMIM, **PEERS}
WORDS = {"method": list(COMPARED), "peer": list(PEERS)}


def describe() -> list[str]:
    return [
        f"suite step   methods {','.join(COMPARED)}   programs {','.join(PROGRAMS)}",
        *(f"  {name:10} {model}, batch {batch}" for name, (model, batch) in SHAPES.items()),
    ]


def run(options: Options) -> Iterator[dict]:
    """A row for every shape, method, program and dtype."""
    compiled, dtypes, say = options.compiled, options.dtypes, options.say
    rounds, device, images = options.rounds, options.device, options.images
    names = [n for n in PROGRAMS if options.wants(n) and (compiled or n != "compiled")]
    for (shape, model, batch), method in itertools.product(options.cases(SHAPES), options.methods):
        batch = _SMOKE_BATCH if options.smoke else batch
        case = Case(model, batch, method, "fp64", device.type, images)
        variants = {
            (name, dtype): dataclasses.replace(case, dtype=dtype)
            for name, dtype in itertools.product(names, dtypes)
        }
        say(f"step {shape} {method}: memory")
        footprints = {
            key: (options.memory and in_fresh_process(_footprint, key[0], variant)) or {}
            for key, variant in variants.items()
        }
        say(f"step {shape} {method}: correctness")
        truth = _loss_and_gradients(PROGRAMS["plain"](case), case)
        programs = {key: PROGRAMS[key[0]](variant) for key, variant in variants.items()}
        errors = {
            key: _error(_loss_and_gradients(program, variants[key]), truth)
            for key, program in programs.items()
        }
        say(f"step {shape} {method}: timing, {rounds} rounds of {len(programs)} programs")
        timings = interleave(
            {key: _endless(program, variants[key]) for key, program in programs.items()},
            **options.timing(),
        )
        for (name, dtype), timing in timings.items():
            measured = timing.row()
            yield dict(
                suite="step",
                kernel_name=f"{method}_step",
                kernel_provider=name,
                kernel_operation_mode="step",
                shape=shape,
                model=model,
                method=method,
                dtype=dtype,
                images=images,
                x_name="batch",
                x_value=batch,
                **measured,
                images_per_second=batch / measured["y_value_50"] * 1e3,
                vs_peer=speedup(timing, timings["plain", dtype]),
                vs_compiled=speedup(timing, timings["compiled", dtype]) if compiled else None,
                vs_fp32=speedup(timing, timings[name, "fp32"]) if "fp32" in dtypes else None,
                saved_bytes_per_image=footprints[name, dtype].get("saved_bytes_per_image"),
                peak_memory_gib=footprints[name, dtype].get("peak_memory_gib"),
                peak_reserved_gib=footprints[name, dtype].get("peak_reserved_gib"),
                error=errors[name, dtype],
                match=errors[name, dtype] <= _TOLERANCE[dtype],
            )


def _endless(program: StepProgram, case: Case) -> Callable[[], None]:
    batches = itertools.cycle(case.batches())
    return lambda: program.step(next(batches))


def _order(case: Case, count: int) -> Tensor:
    """Masks for the comparison: (B, N) patch positions in shuffle order."""
    noise = torch.rand(count, case.num_patches, generator=torch.Generator().manual_seed(0))
    return noise.argsort(dim=1).to(case.device)


def _loss_and_gradients(program: StepProgram, case: Case) -> dict[str, Tensor]:
    imgs = case.batches()[0].imgs[:_CHECKED_IMAGES]
    loss = program.loss(imgs, _order(case, len(imgs)))
    loss.backward()
    trained = {n: p for n, p in program.student.named_parameters() if p.requires_grad}
    values = {"loss": loss.detach(), **{name: p.grad for name, p in trained.items()}}
    program.student.zero_grad(set_to_none=True)
    return values


def _error(values: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest relative error of the loss and of all gradients, as Euclidean norms."""
    if values.keys() != truth.keys() or any(value is None for value in values.values()):
        return float("inf")
    ratios = [(values[n].double() - t).norm() / t.norm() for n, t in truth.items()]
    return float(torch.stack(ratios).max())  # NaN stays NaN, which no tolerance admits


def _footprint(name: str, case: Case) -> dict:
    """Memory of one program; runs in a process of its own."""
    device = torch.device(case.device)
    program = PROGRAMS[name](case)
    batches = case.batches()
    for batch in batches[:2]:  # the optimizer makes its state in the first
        program.step(batch)
    peak = peak_memory(device)
    imgs = batches[0].imgs
    ids_shuffle = _order(case, case.batch)
    total = saved_bytes(
        lambda: program.loss(imgs, ids_shuffle), [imgs, *program.student.parameters()]
    )
    return dict(saved_bytes_per_image=total / case.batch, **peak)
