"""Suite ``ema``: optimizer and teacher updates, against PyTorch's own and their floor."""

import functools
from collections.abc import Callable, Iterator

import torch
from measure import interleave, speedup
from suite import CHECKS, FLOOR, TIMES, Column, Options
from torch import Tensor

from fastmim import create_model
from fastmim.ops import OPS, adamw_ema_, ema_update_, use_backend

NAME = "ema"
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("operator", "kernel_name", ""), ("program", "kernel_provider", ""),
    ("values", "x_value", ",d"), *TIMES, *FLOOR, ("vs torch", "vs_peer", ".2f"), *CHECKS,
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
_TOLERANCE = 1e-6  # relative error of each list of tensors (Euclidean norm), float32
# Least bytes per parameter, each value read or written once: AdamW reads p, g, m, v and writes
# p, m, v; the EMA reads p, t and writes t. In one pass p is not read again.
_BYTES = {"adamw_ema_": 36, "ema_update_": 12}


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

    def programs(self) -> dict[tuple[str, str], Callable[[], None]]:
        """Operator and provider to its call."""
        calls = {
            ("adamw_ema_", "torch"): self.torch_adamw_ema,
            ("ema_update_", "torch"): self.torch_ema,
        }
        device = self.params[0].device
        for name, call in (("adamw_ema_", self.adamw_ema), ("ema_update_", self.ema)):
            for backend in OPS[name].backends:
                if OPS[name].unavailable(backend, device) is None:
                    calls[name, backend] = functools.partial(call, backend)
        return calls


def describe() -> list[str]:
    return [
        "suite ema    operators adamw_ema_,ema_update_   programs torch and every backend",
        *(f"  {name:10} trained parameters of {model}" for name, model in SHAPES.items()),
    ]


def run(options: Options) -> Iterator[dict]:
    """A row for every shape, operator and backend."""
    for shape in options.shapes:
        with torch.device("meta"):
            model = create_model(SHAPES[shape])
        sizes = [p.shape for p in model.parameters() if p.requires_grad]
        count = sum(size.numel() for size in sizes)
        options.say(f"ema {shape}: correctness")
        errors = _errors(sizes, options.device)
        programs = {
            key: program
            for key, program in State(sizes, options.device).programs().items()
            if options.operators is None or key[0] in options.operators
        }
        options.say(f"ema {shape}: timing {len(programs)} programs")
        timings = interleave(programs, **options.timing(), kernels=True)
        for (name, provider), timing in timings.items():
            measured = timing.row()
            moved = count * _BYTES[name]
            floor = options.ceilings.floor(moved)
            yield dict(
                suite="ema",
                kernel_name=name,
                kernel_provider=provider,
                kernel_operation_mode="full",
                shape=shape,
                model=SHAPES[shape],
                dtype="fp32",
                x_name="parameters",
                x_value=count,
                **measured,
                **options.against_floor(measured["y_value_50"], floor, moved, 0),
                vs_peer=speedup(timing, timings[name, "torch"]),
                error=errors[name, provider],
                match=errors[name, provider] <= _TOLERANCE,
            )


def _errors(sizes: list[torch.Size], device: torch.device) -> dict[tuple[str, str], float]:
    """Largest relative error of parameters, moments and teachers after two updates by each backend.

    PyTorch's own update of the same state is the truth.
    """
    errors = {}
    expected: dict[str, State] = {}
    for name, provider in State(sizes, device).programs():  # torch comes first
        state = State(sizes, device)
        for _ in range(2):
            state.programs()[name, provider]()
        truth = expected.setdefault(name, state)
        errors[name, provider] = max(
            _distance(getattr(state, field), getattr(truth, field))
            for field in ("params", "exp_avgs", "exp_avg_sqs", "teachers")
        )
    return errors


def _distance(values: list[Tensor], truth: list[Tensor]) -> float:
    difference = torch.nn.utils.get_total_norm(torch._foreach_sub(values, truth))
    size = torch.nn.utils.get_total_norm(truth)
    return float(difference / size) if size else float(difference)
