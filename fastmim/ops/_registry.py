"""Declare an operator once; serve it from the fastest implementation that accepts the call.

Each operator has one PyTorch schema (``torch.ops.fastmim.<name>``), one shape rule and one
gradient. Behind the schema stand up to four implementations with the same signature:

* ``reference`` - plain PyTorch, any device; the specification the others are tested against;
* ``cpp``       - compiled code for CPU tensors: ``csrc/``, or a kernel that PyTorch itself ships;
* ``triton``    - a kernel in ``kernels/``; needs a GPU, or ``TRITON_INTERPRET=1``;
* ``cuda``      - a CUDA kernel in ``csrc/``, or one that PyTorch itself ships; needs a GPU.

The choice is made inside the operator, so ``torch.compile`` traces one graph whichever serves.

Called from Python on plain tensors, with nothing that listens to PyTorch's dispatcher, an operator
is run without it: the way there and back costs more than a kernel on a small batch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREFERENCE = ("cuda", "triton", "cpp", "reference")
OPS: dict[str, Op] = {}

_library = torch.library.Library("fastmim", "DEF")
_PLAIN = {Tensor, torch.nn.Parameter}
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


def _parse(backend: str | None) -> str | None:
    if backend in (None, "", "auto"):
        return None
    if backend not in PREFERENCE:
        raise ValueError(
            f"unknown backend '{backend}'; FASTMIM_BACKEND and use_backend take auto, "
            f"{', '.join(PREFERENCE)}"
        )
    return backend


_forced = _parse(os.environ.get("FASTMIM_BACKEND"))


@functools.cache
def installed(module: str) -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec(module) is not None


@functools.cache
def extension_problem() -> str | None:
    """Why the compiled extension cannot be used; None if it can. Loads it on the first call."""
    if not installed("fastmim._C"):
        return "fastmim was installed without its compiled extension; reinstall with a C++ compiler"
    try:
        importlib.import_module("fastmim._C")
    except (ImportError, OSError) as error:
        return f"the compiled extension does not load: {error}"
    return None


@dataclass(frozen=True)
class Native:
    """An implementation in ``csrc/``: the operator of that name in ``torch.ops.fastmim_native``."""

    name: str

    def load(self) -> Callable:
        return getattr(torch.ops.fastmim_native, self.name).default


@dataclass(frozen=True)
class Implementation:
    """One backend of an operator.

    Args:
        target: The callable, its address ``"module:attribute"`` (imported on first use), or a
            :class:`Native` operator.
        accepts: Returns why a call cannot be served, or None. Gets the operator's arguments.
            It reads dtypes, strides and shapes, never values.
    """

    target: Callable | str | Native
    accepts: Callable[..., str | None] | None = None

    @property
    def needs_extension(self) -> bool:
        return isinstance(self.target, Native)

    def load(self) -> Callable:
        if isinstance(self.target, str):
            return pkgutil.resolve_name(self.target)
        if isinstance(self.target, Native):
            return self.target.load()
        return self.target


class Op:
    """One operator of the library.

    Args:
        schema: PyTorch schema, no namespace: ``"gather_tokens(Tensor x, Tensor ids) -> Tensor"``.
        fake: Returns empty outputs of the right shape, dtype and device; runs no arithmetic.
        implementations: Backend name to :class:`Implementation` (or just its target).
        shapes: Named sizes; ``edge*`` are tested, the others are those of real models.
        make: Builds the arguments for one entry of ``shapes``.
        setup_context: Saves what ``backward`` needs. Omit both for an op without gradient.
        backward: Gradient formula, written with operators of this library.
        override: Returns the backend that a variable of this operator asks for and the words for
            it, or None; goes before FASTMIM_BACKEND and use_backend.
        twice_differentiable: Whether ``backward`` is itself right when differentiated; otherwise
            ``create_graph=True`` is refused.
    """

    def __init__(
        self,
        schema: str,
        *,
        fake: Callable,
        implementations: Mapping[str, Implementation | Callable | str | Native],
        shapes: Mapping[str, Mapping[str, Any]],
        make: Callable[..., tuple],
        override: Callable[[], tuple[str, str] | None] | None = None,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
        twice_differentiable: bool = False,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.shapes = shapes
        self.make = make
        self._override = override
        self.differentiable = backward is not None
        self._implementations = {
            backend: given if isinstance(given, Implementation) else Implementation(given)
            for backend, given in implementations.items()
        }
        self._loaded: dict[str, Callable] = {}
        self._candidates: dict[str, list[str]] = {}

        # Library.define costs the host half of what custom_op does on every call.
        _library.define(schema)
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastmim::{self.name}", fake, lib=_library)
        if backward is not None:
            backward = backward if twice_differentiable else self._once(backward)
            torch.library.register_autograd(
                f"fastmim::{self.name}",
                backward,
                setup_context=setup_context,
                lib=_library,
            )
        self._apply = None if backward is None else self._with_autograd(setup_context, backward)
        self.overload = getattr(torch.ops.fastmim, self.name).default
        arguments = self.overload._schema.arguments
        self.written = tuple(
            a.name for a in arguments if a.is_write
        )  # torch.compile reads no schema
        OPS[self.name] = self

    def _once(self, backward: Callable) -> Callable:
        """``backward``, refusing ``create_graph=True``: it would leave out second-order terms."""

        def guarded(ctx, *grads):
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"fastmim.{self.name} has no second derivative: its backward pass was asked "
                    "for a graph (create_graph=True)"
                )
            return backward(ctx, *grads)

        return guarded

    def _with_autograd(self, setup_context: Callable, backward: Callable) -> Callable:
        """What ``register_autograd`` makes, for calls that do not go through the dispatcher."""

        def forward(ctx, *args):
            output = self._run(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(f"fastmim_{self.name}", (torch.autograd.Function,), members)
        # Not Function's own apply: it looks for transforms, of which there are none.
        return super(torch.autograd.Function, function).apply

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _overheard():
            return self.overload(*args)
        wants_grad = _wants_grad(args)
        if wants_grad is None:
            return self.overload(*args)
        if not wants_grad or not torch.is_grad_enabled() or _below_autograd():
            return self._run(*args)
        return self.overload(*args) if self._apply is None else self._apply(*args)

    @property
    def backends(self) -> tuple[str, ...]:
        """Implementations that exist, fastest first."""
        return tuple(b for b in PREFERENCE if b in self._implementations)

    def unavailable(self, backend: str, device: torch.device) -> str | None:
        """Why ``backend`` cannot serve tensors on ``device``; None if it can."""
        if backend not in self._implementations:
            return (
                f"{self.name} has no {backend} implementation (it has {', '.join(self.backends)})"
            )
        if backend == "reference":
            return None
        if backend == "triton":
            if not installed("triton"):
                return "triton is not installed; pip install 'fastmim[triton]'"
            if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
                return f"tensors are on {device}; move them to a GPU or set TRITON_INTERPRET=1"
            return None
        needed = "cpu" if backend == "cpp" else "cuda"
        if device.type != needed:
            return f"tensors are on {device}; it needs {needed} tensors"
        if self._implementations[backend].needs_extension:
            return extension_problem() or self._missing_in_extension(needed)
        return None

    def _missing_in_extension(self, device_type: str) -> str | None:
        native = self._implementations["cpp" if device_type == "cpu" else "cuda"].target.name
        if torch._C._dispatch_has_kernel_for_dispatch_key(
            f"fastmim_native::{native}", device_type.upper()
        ):
            return None
        return f"the compiled extension was built without its {device_type} kernels"

    def choose(self, device: torch.device, args: tuple | None = None) -> str:
        """Name of the backend that serves a call on ``device``.

        Args:
            device: Where the tensors are.
            args: The operator's arguments; without them only the device decides.

        Raises:
            RuntimeError: A backend was asked for (FASTMIM_BACKEND, use_backend) and cannot serve.
        """
        forced = self.forced()
        if forced is not None:
            backend, asked = forced
            reason = self.unavailable(backend, device) or self.refuses(backend, args)
            if reason is not None:
                raise RuntimeError(
                    f"fastmim.{self.name}: backend '{backend}' was requested "
                    f"({asked}), but {reason}; use 'auto' or 'reference'"
                )
            return backend
        if device.type not in self._candidates:
            # The interpreter is a test tool and never chosen by itself.
            self._candidates[device.type] = [
                b
                for b in self.backends
                if self.unavailable(b, device) is None
                and not (b == "triton" and device.type != "cuda")
            ]
        return next(b for b in self._candidates[device.type] if self.refuses(b, args) is None)

    def forced(self) -> tuple[str, str] | None:
        """The backend asked for and how; None means auto."""
        asked = self._override() if self._override is not None else None
        if asked is None and _forced is not None:
            asked = (_forced, "FASTMIM_BACKEND or use_backend")
        return asked

    def refuses(self, backend: str, args: tuple | None) -> str | None:
        """Why ``backend`` does not serve a call with these arguments; None if it does."""
        accepts = self._implementations[backend].accepts
        return accepts(*args) if accepts is not None and args is not None else None

    def implementation(self, backend: str) -> Callable:
        if backend not in self._loaded:
            self._loaded[backend] = self._implementations[backend].load()
        return self._loaded[backend]

    def _run(self, *args: Any) -> Any:
        implementation = self.implementation(self.choose(_device(args), args))
        # Autocast has chosen the arguments' dtypes, and the gradient is the operator's own. To
        # others no result is a view: they could not change it in place.
        with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowADInplaceOrView():
            return implementation(*args)


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of the GPU, (9, 0) for sm_90; None if ``device`` is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def on_cpu(x: Tensor) -> bool:
    """For the functions that leave other devices to PyTorch, where an operator would only cost."""
    return x.device.type == "cpu"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes with on the device of ``x``; None if it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _overheard() -> bool:
    """Whether others than autograd wait for calls: modes, transforms, tracing, the profiler."""
    return bool(
        torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _below_autograd() -> bool:
    return torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD)


def _wants_grad(args: Sequence[Any]) -> bool | None:
    """Whether a tensor requires a gradient; None if the dispatcher must see to an argument.

    So it must to subclasses (DTensor, fake tensors) and whatever else has ``__torch_function__``,
    to meta tensors and to views of negated values.
    """
    wants = False
    for arg in args:
        if isinstance(arg, (list, tuple)):
            listed = _wants_grad(arg)
            if listed is None:
                return None
            wants = wants or listed
        elif type(arg) in _PLAIN:
            if arg.is_meta or arg.is_neg():
                return None
            wants = wants or arg.requires_grad
        elif hasattr(arg, "__torch_function__"):
            return None
    return wants


def _device(args: tuple) -> torch.device:
    """Device of the first tensor; an empty list has none, so the next argument is looked at."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return arg[0].device
    return torch.device("cpu")


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Serve every operator from ``backend`` inside the block; None or "auto": the best.

    Args:
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Raises:
        ValueError: At once, if there is no such backend.
        RuntimeError: At the first call of an operator that the backend cannot serve, with why.
    """
    global _forced
    previous, _forced = _forced, _parse(backend)
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> str | None:
    """The backend asked for by FASTMIM_BACKEND or :func:`use_backend`; None means auto."""
    return _forced
