"""Suite ``ema``: optimizer and teacher updates, against PyTorch's own and their floor."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from measure import Lost, attempt, speedup
from ops import served_by, timed, verdict
from suite import CHECKS, FLOOR, PEAK, TIMES, Column, Options
from torch import Tensor

from fastmim import create_model
from fastmim.ops import OPS, adamw_ema_, ema_update_, use_backend

NAME = "ema"
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("operator", "kernel_name", ""), ("program", "kernel_provider", ""),
    ("values", "x_value", ",d"), *TIMES, *FLOOR, ("vs torch", "vs_peer", ".2f"), PEAK,
    *CHECKS,
]
# fmt: on
WORDS = {"op": ["adamw_ema_", "ema_update_"]}
# Shape to the model whose parameters are updated; the first is in cache, the others are not.
SHAPES = {
    "tiny32": "mae_vit_micro_patch4",
    "rc_small": "rc_vit_small_patch16",
    "small224": "mae_vit_small_patch16_dec512d8b",
    "base": "mae_vit_base_patch16",
    "large": "mae_vit_large_patch16",
}
DEFAULT = {"cpu": ["tiny32", "rc_small", "small224", "base"], "cuda": ["base", "large"]}
_CONSTANTS = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
_MOMENTUM = 0.996
TOLERANCE = 1e-6  # relative error of each list of tensors (Euclidean norm), float32
# Least bytes per parameter, each value read or written once: AdamW reads p, g, m, v and writes
# p, m, v; the EMA reads p, t and writes t. In one pass p is not read again.
_BYTES = {"adamw_ema_": 36, "ema_update_": 12}
Key = tuple[str, str]  # operator, provider


class State:
    """Parameters, gradients and teachers of a model, and both ways to update them."""

    def __init__(self, sizes: list[torch.Size], device: torch.device) -> None:
        def make(seed: int) -> list[Tensor]:
            generator = torch.Generator(device).manual_seed(seed)
            return [torch.randn(s, generator=generator, device=device) for s in sizes]

        self.params, self.grads, self.teachers = make(0), make(1), make(2)
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._weight_decay = torch.full(
            (len(sizes),), _CONSTANTS["weight_decay"], dtype=torch.float64, device=device
        )
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self._optimizer = torch.optim.AdamW(
            self.params, fused=True, capturable=device.type == "cuda", **_CONSTANTS
        )
        for p, m, v in zip(self.params, self.exp_avgs, self.exp_avg_sqs, strict=True):
            # The moments are shared: every program updates the same memory.
            step = torch.zeros((), device=device)
            self._optimizer.state[p] = dict(step=step, exp_avg=m, exp_avg_sq=v)

    @torch.no_grad()
    def torch_adamw_ema(self) -> None:
        self._optimizer.step()
        torch._foreach_lerp_(self.teachers, self.params, 1 - _MOMENTUM)

    @torch.no_grad()
    def torch_ema(self) -> None:
        torch._foreach_lerp_(self.teachers, self.params, 1 - _MOMENTUM)

    def adamw_ema(self, backend: str) -> None:
        with use_backend(backend):
            adamw_ema_(
                self.params,
                self.grads,
                self.exp_avgs,
                self.exp_avg_sqs,
                self.teachers,
                step=self._step,
                lr=_CONSTANTS["lr"],
                momentum=_MOMENTUM,
                grad_scale=1.0,
                skip=False,
                weight_decay=self._weight_decay,
                beta1=_CONSTANTS["betas"][0],
                beta2=_CONSTANTS["betas"][1],
                eps=_CONSTANTS["eps"],
            )

    def ema(self, backend: str) -> None:
        with use_backend(backend):
            ema_update_(self.teachers, self.params, _MOMENTUM)

    def program(self, operator: str, provider: str) -> Callable[[], None]:
        if provider == "torch":
            return self.torch_adamw_ema if operator == "adamw_ema_" else self.torch_ema
        ours = self.adamw_ema if operator == "adamw_ema_" else self.ema
        return functools.partial(ours, provider)


def describe() -> list[str]:
    return [
        "suite ema    operators adamw_ema_,ema_update_   programs torch and every backend",
        *(f"  {name:10} trained parameters of {model}" for name, model in SHAPES.items()),
    ]


def run(options: Options) -> Iterator[dict]:
    """A row for every shape, operator and backend."""
    for shape in options.shapes:
        sizes = sizes_of(shape)
        keys = keys_on(options.device, options.operators or WORDS["op"])
        options.say(f"ema {shape}: correctness")
        errors = errors_of(keys, sizes, options.device)
        options.say(f"ema {shape}: timing {len(keys)} programs")
        state = attempt(State, sizes, options.device)
        programs = {key: state if isinstance(state, Lost) else state.program(*key) for key in keys}
        timings, peaks = timed(programs, errors, options)
        count = sum(size.numel() for size in sizes)
        for key, timing in timings.items():
            name, provider = key
            measured = timing.row()
            moved = count * _BYTES[name]
            floor = options.ceilings.floor(moved)
            yield dict(
                suite=NAME,
                kernel_name=name,
                kernel_provider=provider,
                kernel_operation_mode="full",
                shape=shape,
                model=SHAPES[shape],
                dtype="fp32",
                x_name="parameters",
                x_value=count,
                **served_by(provider),
                **measured,
                images_per_second=None,
                **options.against_floor(measured["y_value_50"], floor, moved, 0, "fp32"),
                vs_peer=speedup(timing, timings[name, "torch"]),
                **peaks[key],
                **verdict(timing, errors[key], TOLERANCE),
            )


def sizes_of(shape: str) -> list[torch.Size]:
    """Of the parameters that are updated."""
    with torch.device("meta"):
        model = create_model(SHAPES[shape])
    return [p.shape for p in model.parameters() if p.requires_grad]


def keys_on(device: torch.device, operators: Sequence[str]) -> list[Key]:
    """PyTorch and every backend that can serve, of each of these operators."""
    keys = []
    for name in filter(operators.__contains__, WORDS["op"]):
        found = [b for b in OPS[name].backends if OPS[name].unavailable(b, device) is None]
        keys += [(name, provider) for provider in ("torch", *found)]
    return keys


def errors_of(
    keys: Sequence[Key], sizes: list[torch.Size], device: torch.device
) -> dict[Key, float | Lost]:
    """Largest relative error of parameters, moments and teachers, or why there is none.

    After two updates; PyTorch's own of the same state are the truth.
    """
    errors = {}
    for name, group in itertools.groupby(keys, key=lambda key: key[0]):
        truth = attempt(_updated, (name, "torch"), sizes, device)
        errors |= {key: attempt(_error, key, truth, sizes, device) for key in group}
    return errors


def _error(
    key: Key, truth: State | Lost, sizes: list[torch.Size], device: torch.device
) -> float | Lost:
    state = _updated(key, sizes, device)  # without a truth too: whoever is timed has been called
    if isinstance(truth, Lost):
        return truth
    fields = ("params", "exp_avgs", "exp_avg_sqs", "teachers")
    ratios = [_distance(getattr(state, field), getattr(truth, field)) for field in fields]
    return float(torch.tensor(ratios).max())  # NaN stays NaN, which no tolerance admits


def _updated(key: Key, sizes: list[torch.Size], device: torch.device) -> State:
    state = State(sizes, device)
    for _ in range(2):
        state.program(*key)()
    return state


def _distance(values: list[Tensor], truth: list[Tensor]) -> float:
    difference = torch.nn.utils.get_total_norm(torch._foreach_sub(values, truth))
    size = torch.nn.utils.get_total_norm(truth)
    return float(difference / size) if size else float(difference)
