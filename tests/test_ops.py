"""Checks that every operator passes on every backend; a new operator joins by being in OPS."""

import copy
import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.gradcheck import GradcheckError
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastmim.ops import (
    OPS,
    _registry,
    adamw_ema_,
    ema_update_,
    gather_patches,
    join_storage,
    patch_loss,
    patchify,
    split_storage,
    use_backend,
)
from fastmim.ops._registry import Op
from tests import accuracy
from tests.operators import (
    IN_PLACE,
    assert_accurate,
    expanded,
    in_double,
    inputs,
    make,
    offset,
    run,
    strided,
    transposed,
    usable,
    variants,
    with_masters,
)

FULL_GRADCHECK = 150  # inputs up to which every entry of the Jacobian is compared
GUARD = 77  # a value of every dtype
M_PERTURB = -6  # of <malloc.h>: fill new memory with the complement of a byte
MARGIN = 4096  # elements around a guarded tensor: more than a tile

# Backends that take float32 in small shapes alone, tested in bfloat16 instead.
HALF = {(name, "triton") for name in OPS if name.startswith("attention")}

EDGES = [(op, shape) for op in OPS.values() for shape in op.shapes if shape.startswith("edge")]
CASES = [
    pytest.param(op, backend, shape, id=f"{op.name}-{backend}-{shape}")
    for op, shape in EDGES
    for backend in op.backends
]
TYPED_CASES = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")
    for case in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.float32 or case.values[0].name not in IN_PLACE
]
DIFFERENTIABLE_CASES = [case for case in CASES if case.values[0].differentiable]


def usual(op: Op, backend: str) -> torch.dtype:
    """The dtype for what does not depend on it."""
    return torch.bfloat16 if (op.name, backend) in HALF else torch.float32


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_operator_takes_part_in_every_check(op):
    assert "edge" in op.shapes, "the checks of this file run on the shapes named edge*"
    forward = OPS.get(op.name.removesuffix("_backward"))
    is_gradient = forward is not op and forward is not None and forward.differentiable
    bare = op.name in IN_PLACE or not inputs(op, make(op, "edge", "cpu", torch.float32))
    assert op.differentiable or is_gradient or bare, (
        "no gradient, no entry in DIFFERENTIABLE that says so, and not named <operator>_backward"
    )


@pytest.fixture
def filled_outputs():
    """New memory is no zeros: NaN by PyTorch's deterministic mode, 3e38 where C++ allocates it."""
    set_malloc = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    torch.use_deterministic_algorithms(True, warn_only=True)
    if set_malloc is not None:
        set_malloc(M_PERTURB, 0x80)
    yield
    if set_malloc is not None:
        set_malloc(M_PERTURB, 0)
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
@pytest.mark.usefixtures("filled_outputs")
def test_new_memory_is_filled():
    assert torch.empty(7).isnan().all()
    torch.use_deterministic_algorithms(False)
    assert (torch.empty(7) > 3e38).all()


@pytest.mark.usefixtures("filled_outputs")
@pytest.mark.parametrize(("op", "backend", "shape", "dtype"), TYPED_CASES)
def test_value_is_that_of_the_reference_in_double(op, backend, shape, dtype, device):
    args = make(op, shape, device, dtype)
    for given in variants(op, args):
        assert_accurate(op, run(op, backend, given), given, dtype)


MIXED = [
    ("gather_patches", "imgs", torch.float16),
    ("gather_patches", "imgs", torch.float64),
    ("restore_tokens", "x", torch.bfloat16),
    ("restore_tokens", "mask_token", torch.float64),
    ("restore_tokens", "pos_embed", torch.float64),
    ("patch_loss", "pred", torch.bfloat16),
    ("patch_loss", "imgs", torch.float64),
    ("patch_loss", "teacher_pred", torch.bfloat16),
]


@pytest.mark.parametrize(
    ("op", "backend", "argument", "dtype"),
    [
        pytest.param(op, backend, argument, dtype, id=f"{name}-{backend}-{argument}-{dtype}")
        for name, argument, dtype in MIXED
        for op in [OPS[name]]
        for backend in op.backends
    ],
)
def test_arguments_of_different_dtypes_are_promoted(op, backend, argument, dtype, device):
    names = [s.name for s in op.overload._schema.arguments]
    args = list(make(op, "edge", device, torch.float32))
    args[names.index(argument)] = args[names.index(argument)].to(dtype)
    results = (
        run(op, backend, tuple(args)),
        run(op, "reference", tuple(args)),
        run(op, "reference", in_double(tuple(args), torch.float32)),
    )
    for got, plain, formula in zip(*results, strict=True):
        if got.dtype == torch.float64:  # then plain and formula are one, and no error is allowed
            accuracy.golden(got, plain)
        else:
            accuracy.relative(got, plain, formula)


@pytest.mark.parametrize(
    ("name", "shape", "limits"),
    [
        ("restore_tokens_backward", "edge_h14", {"restore.MAX_PROGRAMS": 2}),
        ("patch_loss", "edge", {"patch_loss.MAX_PROGRAMS": 3, "patch_loss.TILE": 16}),
    ],
)
def test_few_triton_programs_walk_over_many_rows(name, shape, limits, device, monkeypatch):
    op = OPS[name]
    args = make(op, shape, device, torch.float32)
    usable(op, "triton", args)
    for limit, value in limits.items():
        monkeypatch.setattr(f"fastmim.kernels.{limit}", value)
    assert_accurate(op, run(op, "triton", args), args, torch.float32)


@pytest.mark.parametrize(("op", "backend", "shape"), CASES)
def test_repeats_to_the_bit(op, backend, shape, device):
    args = make(op, shape, device, usual(op, backend))
    for first, second in zip(run(op, backend, args), run(op, backend, args), strict=True):
        accuracy.exact(second, first)


@pytest.mark.parametrize("layout", [strided, transposed, offset, expanded])
@pytest.mark.parametrize(
    ("op", "backend", "shape"),
    [c for c in CASES if c.values[2] in ("edge", "edge_empty", "edge_split")],
)
def test_any_layout_gives_the_contiguous_result(op, backend, shape, layout, device):
    if layout is expanded and op.name in IN_PLACE:
        pytest.skip("memory that is written cannot be shared")
    if layout is expanded and op.name.startswith("attention_varlen"):
        pytest.skip("starts that are all the same cut no sequences")
    args = make(op, shape, device, usual(op, backend))
    laid_out = tree_map(lambda leaf: layout(leaf) if isinstance(leaf, Tensor) else leaf, args)
    contiguous = tree_map(
        lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, laid_out
    )
    assert_accurate(op, run(op, backend, laid_out), contiguous, usual(op, backend))


@pytest.mark.parametrize(
    ("op", "backend", "shape"),
    [c for c in CASES if c.values[2] == "edge" and c.values[0].name not in IN_PLACE],
)
def test_one_tensor_alone_may_have_gaps(op, backend, shape, device):
    args = make(op, shape, device, torch.float32)
    usable(op, backend, args)
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            given = (*args[:i], strided(arg), *args[i + 1 :])
            assert_accurate(op, run(op, backend, given), args, torch.float32)


class Guarded:
    """Tensors inside larger memory, filled with GUARD; what surrounds them must keep it."""

    def __init__(self) -> None:
        self.memories: list[Tensor] = []

    def empty(self, *shape, **options) -> Tensor:
        """In place of ``torch.empty``."""
        size = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        memory = torch.full((size.numel() + 2 * MARGIN,), GUARD, **options)
        self.memories.append(memory)
        return memory[MARGIN:-MARGIN].view(size)

    def copy(self, leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return self.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device).copy_(leaf)

    def check(self) -> None:
        for memory in self.memories:
            guard = memory.new_full((MARGIN,), GUARD)
            accuracy.exact(memory[:MARGIN], guard)
            accuracy.exact(memory[-MARGIN:], guard)


@pytest.mark.parametrize(("op", "backend", "shape"), CASES)
def test_nothing_beside_the_tensors_is_written(op, backend, shape, device, monkeypatch):
    args = make(op, shape, device, usual(op, backend))
    usable(op, backend, args)
    guarded = Guarded()
    given = tree_map(guarded.copy, args)
    with use_backend(backend), monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded.empty)
        out = op(*given)
    guarded.check()
    schema = op.overload._schema.arguments
    changed = [a for a, s in zip(with_masters(op, given), schema, strict=True) if s.is_write]
    for got, right in zip(tree_leaves(changed or out), run(op, backend, args), strict=True):
        accuracy.exact(got, right)
    for a, before, s in zip(given, args, schema, strict=True):
        if not s.is_write:
            for got, right in zip(tree_leaves(a), tree_leaves(before), strict=True):
                if isinstance(got, Tensor):
                    accuracy.exact(got, right)


@pytest.mark.parametrize("place", [-1, 6])
def test_a_write_beside_a_tensor_is_found(place):
    guarded = Guarded()
    tensor = guarded.copy(torch.zeros(2, 3))
    tensor.as_strided((), (), tensor.storage_offset() + place).fill_(0)
    with pytest.raises(AssertionError):
        guarded.check()


@pytest.mark.parametrize(("op", "backend", "shape"), DIFFERENTIABLE_CASES)
def test_gradient_is_that_of_finite_differences(op, backend, shape, device):
    args = make(op, shape, device, torch.float64)
    usable(op, backend, args)
    if not inputs(op, args):
        pytest.skip("bytes have no gradient")
    for given in variants(op, args):
        for t in inputs(op, given):
            t.requires_grad_()
        large = sum(t.numel() for t in inputs(op, given)) > FULL_GRADCHECK
        with use_backend(backend):
            assert torch.autograd.gradcheck(op, given, fast_mode=large)


@pytest.mark.parametrize(
    ("op", "backend", "shape"), [c for c in DIFFERENTIABLE_CASES if c.values[2] == "edge"]
)
def test_second_gradient_is_right_or_refused(op, backend, shape, device):
    args = make(op, shape, device, torch.float64)
    usable(op, backend, args)
    for t in inputs(op, args):
        t.requires_grad_()
    with use_backend(backend):
        try:
            assert torch.autograd.gradgradcheck(op, args, fast_mode=True)
        except GradcheckError:
            raise
        except RuntimeError as refused:
            assert "no second derivative" in str(refused)  # noqa: PT017


@pytest.mark.parametrize(("op", "backend", "shape"), CASES)
def test_schema_shape_rule_and_gradient_are_registered(op, backend, shape, device):
    args = make(op, shape, device, usual(op, backend))
    usable(op, backend, args)
    if op.differentiable:
        for t in inputs(op, args):
            t.requires_grad_()
    with use_backend(backend):
        torch.library.opcheck(op.overload, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_compiles_into_one_graph(op, compiler, device):
    if compiler == "inductor" and op.name not in ("gather_tokens", "ema_update_"):
        pytest.skip("one operator with a gradient and one in place are enough: compiling is slow")
    args = make(op, "edge", device, torch.float32)
    expected, got = (
        call_and_differentiate(op, args, compile_with) for compile_with in (None, compiler)
    )
    for eager, compiled in zip(expected, got, strict=True):
        accuracy.exact(compiled, eager)


def call_and_differentiate(op: Op, args: tuple, compiler: str | None) -> list[Tensor]:
    """Outputs, tensors changed in place and gradients of one call, perhaps compiled."""
    args = copy.deepcopy(args)
    torch.compiler.reset()  # one code object serves every operator, and its cache is small
    call = op if compiler is None else torch.compile(op, fullgraph=True, backend=compiler)
    variables = inputs(op, args) if op.differentiable else []
    for t in variables:
        t.requires_grad_()
    out = call(*args)
    results = [leaf for leaf in tree_leaves([args, out]) if isinstance(leaf, Tensor)]
    if variables:
        sum(o.square().sum() for o in results if o.grad_fn is not None).backward()
    return [r.detach() for r in results] + [t.grad for t in variables]


@pytest.mark.parametrize(("op", "backend", "shape"), DIFFERENTIABLE_CASES)
def test_a_call_past_the_dispatcher_gives_the_same(op, backend, shape, device):
    args = make(op, shape, device, usual(op, backend))
    usable(op, backend, args)
    with use_backend(backend):
        past, through = (differentiated(call, op, args) for call in (op, op.overload))
    assert len(past) == len(through)
    for got, right in zip(past, through, strict=True):
        accuracy.exact(got, right)


def differentiated(call, op: Op, args: tuple) -> list[Tensor]:
    """Outputs and gradients; that autograd knows of an output counts as well."""
    args = copy.deepcopy(args)
    variables = inputs(op, args)
    for t in variables:
        t.requires_grad_()
    out = tree_leaves(call(*args))
    differentiable = [o for o in out if o.grad_fn is not None]
    if differentiable:
        sum(o.float().square().sum() for o in differentiable).backward()
    known = torch.tensor([o.grad_fn is not None for o in out])
    return [o.detach() for o in out] + [known] + [t.grad for t in variables]


class Dispatched(TorchDispatchMode):
    """Names of the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Overridden(TorchFunctionMode):
    """Likewise of those that reach ``__torch_function__``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gather():
    """gather_tokens, its arguments and their result."""
    op = OPS["gather_tokens"]
    args = make(op, "edge", "cpu", torch.float32)
    return op, args, op(*args)


@pytest.mark.parametrize("mode", [Dispatched, Overridden])
def test_a_mode_hears_of_an_operator(gather, mode):
    op, args, expected = gather
    with mode() as heard:
        accuracy.exact(op(*args), expected)
    assert heard.names[0] == "fastmim.gather_tokens.default"


def test_the_profiler_and_tracing_hear_of_an_operator(gather):
    op, args, expected = gather
    with torch.profiler.profile() as profile:
        op(*args)
    assert "fastmim::gather_tokens" in {event.key for event in profile.key_averages()}
    traced = torch.jit.trace(lambda *args: op(*args), args)
    assert "fastmim::gather_tokens" in str(traced.graph)
    proxy = torch.fx.Graph().create_node("placeholder", "x")
    proxy = torch.fx.Proxy(proxy)
    assert isinstance(op(proxy, proxy), torch.fx.Proxy)
    accuracy.exact(torch.vmap(op)(*(a[None] for a in args)), expected[None])


def test_tensors_without_values_of_their_own_reach_the_dispatcher(gather):
    op, (x, ids), expected = gather
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) for a in (x, ids)]
    assert isinstance(op(*fakes), FakeTensor)
    meta = op(x.to("meta"), ids.to("meta"))
    assert meta.is_meta
    assert meta.shape == expected.shape
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    accuracy.exact(op(negated, ids), expected)
    assert _registry._wants_grad([[x, fakes[0]]]) is None
    assert _registry._wants_grad([[x], negated]) is None


def test_below_autograd_no_gradient_is_recorded(gather):
    op, (x, ids), expected = gather
    x.requires_grad_()
    assert op(x, ids).grad_fn is not None
    with torch._C._AutoDispatchBelowAutograd():
        out = op(x, ids)
    assert out.grad_fn is None
    accuracy.exact(out, expected)


def test_a_result_may_be_changed_in_place_as_through_the_dispatcher():
    op = OPS["linear"]
    args = make(op, "edge", "cpu", torch.float32)
    grads = []
    for call in (op, op.overload):
        given = [a.clone().requires_grad_() for a in args]
        call(*given).mul_(2).square().sum().backward()
        grads.append([a.grad for a in given])
    for got, right in zip(*grads, strict=True):
        accuracy.exact(got, right)


@pytest.mark.parametrize("name", sorted(IN_PLACE))
def test_sixteen_bit_state_is_refused(name, device):
    from fastmim import ops

    args = make(OPS[name], "edge", device, torch.bfloat16)
    keywords = [s.name for s in OPS[name].overload._schema.arguments]
    with pytest.raises(ValueError, match="small updates vanish in 16 bits"):
        getattr(ops, name)(**dict(zip(keywords, args, strict=True)))


UPDATES = [
    pytest.param(OPS[name], backend, shape, id=f"{name}-{backend}-{shape}")
    for name in sorted(IN_PLACE)
    for shape in OPS[name].shapes
    if shape.startswith("edge")
    for backend in OPS[name].backends
]


@pytest.mark.parametrize(("op", "backend", "shape"), UPDATES)
def test_skipped_update_changes_no_byte(op, backend, shape, device):
    arguments = op.overload._schema.arguments
    args = list(make(op, shape, device, torch.float32))
    names = [s.name for s in arguments]
    args[names.index("skip")] = torch.tensor(True, device=device)
    for tensor in args[1]:  # gradients or students
        tensor.fill_(float("nan"))
    usable(op, backend, tuple(args))
    before = copy.deepcopy(args)
    with use_backend(backend):
        op(*args)
    for got, kept in zip(tree_leaves(args), tree_leaves(before), strict=True):
        if isinstance(got, Tensor):
            accuracy.exact(got, kept)


def update(masters: dict[str, list[Tensor]], split: bool, steps: int) -> dict[str, list[Tensor]]:
    """Parameters and teachers after updates by the public functions, in one of the storages."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: [x.clone() for x in tensors] for name, tensors in masters.items()}
    remainders = {name: [] for name in masters}
    if split:
        for name, tensors in weights.items():
            pairs = [split_storage(x) for x in tensors]
            weights[name], remainders[name] = ([p[i] for p in pairs] for i in (0, 1))
    params, teachers = weights["params"], weights["teachers"]
    moments = [[torch.zeros(x.shape, device=x.device) for x in params] for _ in range(2)]
    device = params[0].device
    stored = dict(teacher_remainders=remainders["teachers"])
    step = torch.tensor(0, device=device)
    for _ in range(steps):
        adamw_ema_(
            params,
            [torch.randn(x.shape, generator=generator).to(device) for x in params],
            *moments,
            teachers,
            param_remainders=remainders["params"],
            step=step,
            lr=1e-3,
            momentum=0.99,
            grad_scale=0.5,
            clip=0.3,
            skip=False,
            weight_decay=torch.full((len(params),), 0.05, dtype=torch.float64, device=device),
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            **stored,
        )
        ema_update_(teachers, params, 0.9, student_remainders=remainders["params"], **stored)
    if split:
        for name, highs in weights.items():
            weights[name] = [join_storage(*p) for p in zip(highs, remainders[name], strict=True)]
    return weights


def test_a_tensor_that_would_be_changed_twice_is_refused():
    twice, other = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"teachers\[2\] is teachers\[0\] again"):
        ema_update_([twice, other, twice], [other, other, other], 0.9)
    accuracy.exact(twice, torch.zeros(3))
    ema_update_([twice, other.clone()], [other, other], 0.9)  # what is only read may come again


@pytest.mark.parametrize("backend", OPS["adamw_ema_"].backends)
def test_split_storage_keeps_the_bits_of_float32(backend, device):
    usable(OPS["adamw_ema_"], backend, make(OPS["adamw_ema_"], "edge_split", device, torch.float32))
    masters = {
        name: [torch.randn(n, device=device) for n in (5, 0, 1, 33, 2000)]
        for name in ("params", "teachers")
    }
    with use_backend(backend):
        plain, split = (update(masters, storage, steps=50) for storage in (False, True))
    for got, expected in zip(tree_leaves(split), tree_leaves(plain), strict=True):
        accuracy.exact(got.view(torch.int32), expected.view(torch.int32))


def test_split_storage_is_exact_for_every_kind_of_bits(device):
    edges = torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF])
    bits = torch.cat([edges, edges - 2**31, torch.randint(-(2**31), 2**31, (10_000,))])
    master = bits.to(device, torch.int32).view(torch.float32)
    high, remainder = split_storage(master)
    assert (high.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    accuracy.exact(join_storage(high, remainder).view(torch.int32), master.view(torch.int32))


def test_split_storage_rounds_to_nearest(device):
    master = torch.randn(10_000, device=device)  # a tie, where .bfloat16() goes to even, is rare
    tie = master.view(torch.int32) & 0xFFFF == 0x8000
    accuracy.exact(split_storage(master)[0][~tie], master.bfloat16()[~tie])


@pytest.mark.parametrize("backend", OPS["adamw_ema_"].backends)
@pytest.mark.parametrize("name", ["ema_update_", "adamw_ema_"])
def test_copies_are_the_rounded_weights(name, backend, device):
    op = OPS[name]
    args = make(op, "edge_copied" if name == "adamw_ema_" else "edge_split_student", device, None)
    usable(op, backend, args)
    with use_backend(backend):
        op(*args)
    given = dict(zip([s.name for s in op.overload._schema.arguments], args, strict=True))
    for copies in (n for n in given if n.endswith("_copies")):
        for copied, master in zip(
            given[copies], given[f"{copies.removesuffix('_copies')}s"], strict=True
        ):
            accuracy.exact(copied, master.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(teachers="split", teacher_remainders=[]), "small updates vanish in 16 bits"),
        (
            dict(param_remainders=[torch.zeros(3)]),
            "expected bfloat16 params and int16 param_remainders, got torch.float32",
        ),
        (
            dict(param_remainders=[torch.zeros(2, dtype=torch.int16)]),
            r"expected param_remainders\[0\] like params\[0\]",
        ),
        (dict(param_copies=[torch.zeros(3)]), "expected bfloat16 param_copies, got torch.float32"),
        (
            dict(teachers="split", teacher_copies=[torch.zeros(3, dtype=torch.bfloat16)]),
            "teacher_copies and teacher_remainders exclude each other",
        ),
        (dict(clip=torch.tensor(1.0)), "expected clip as a number or a scalar tensor"),
    ],
)
def test_storage_that_does_not_fit_is_refused_by_name(change, message):
    arguments = dict(
        params=[torch.zeros(3)],
        grads=[torch.zeros(3)],
        exp_avgs=[torch.zeros(3)],
        exp_avg_sqs=[torch.zeros(3)],
        teachers=[torch.zeros(3)],
        step=torch.tensor(0),
        weight_decay=torch.zeros(1, dtype=torch.float64),
    )
    if change.get("teachers") == "split":
        high, remainder = split_storage(arguments["teachers"][0])
        change = {"teacher_remainders": [remainder], **change, "teachers": [high]}
    numbers = dict(lr=0.1, momentum=0.9, grad_scale=1.0, beta1=0.9, beta2=0.95, eps=1e-8)
    call = {**arguments, **numbers, "skip": False, **change}
    with pytest.raises(ValueError, match=f"adamw_ema_: .*{message}"):
        adamw_ema_(**call)


@pytest.mark.parametrize("backend", OPS["adamw_ema_"].backends)
def test_adamw_ema_is_torch_adamw_then_ema(backend, device):
    op = OPS["adamw_ema_"]
    params, grads, _, _, teachers, *_ = make(op, "edge", device, torch.float64)
    params, grads, teachers = ([t.float() for t in ts] for ts in (params, grads, teachers))
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    outcome = {}
    for dtype in (torch.float32, torch.float64):
        theirs = [p.detach().clone().to(dtype).requires_grad_() for p in params]
        optimizer = torch.optim.AdamW(theirs, **settings)
        followers = [t.to(dtype) for t in teachers]
        for _ in range(3):
            for p, g in zip(theirs, grads, strict=True):
                p.grad = g.to(dtype)
            optimizer.step()
            for follower, p in zip(followers, theirs, strict=True):
                follower.lerp_(p.detach(), 1 - 0.9)
        outcome[dtype] = [*theirs, *followers]
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    step = torch.tensor(0, device=device)
    scalars = [torch.tensor(v, dtype=torch.float64, device=device) for v in (1e-2, 0.9, 1.0, 1.0)]
    skip = torch.tensor(False, device=device)
    decay = torch.full((len(params),), 0.05, dtype=torch.float64, device=device)
    scalars = [step, *scalars, skip, decay, 0.9, 0.95, 1e-8]
    args = params, grads, *state, teachers, [], [], [], [], *scalars
    usable(op, backend, args)
    with use_backend(backend):
        for _ in range(3):
            op(*args)
    assert int(step) == 3
    for got, plain, formula in zip([*params, *teachers], *outcome.values(), strict=True):
        accuracy.relative(got, plain.detach(), formula.detach())


@pytest.mark.parametrize(
    ("name", "backend", "reason"),
    [
        ("patch_loss", "cuda", "patch_loss has no cuda implementation"),
        ("ema_update_", "triton", "ema_update_ has no triton implementation"),
        ("sample_masks", "cuda", r"sample_masks has no cuda implementation \(it has"),
        ("ema_update_", "cuda", "tensors are on cpu; it needs cuda tensors"),
    ],
)
def test_forced_backend_says_why_it_cannot_serve(name, backend, reason):
    op = OPS[name]
    if backend in op.backends and reason.endswith("implementation"):
        pytest.skip(f"{name} has a {backend} implementation by now")
    args = make(op, "edge", "cpu", torch.float32)
    with use_backend(backend), pytest.raises(RuntimeError, match=reason):
        op(*args)


def test_forced_backend_refuses_a_dtype_it_does_not_take():
    op = OPS["ema_update_"]
    reason = op.unavailable("cpp", torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    args = make(op, "edge", "cpu", torch.float64)
    with (
        use_backend("cpp"),
        pytest.raises(RuntimeError, match=r"float32 tensors, not torch.float64"),
    ):
        op(*args)
    op(*args)  # auto goes on to the next backend


def test_misspelt_backend_is_refused_at_once():
    with pytest.raises(ValueError, match="unknown backend 'tritn'"), use_backend("tritn"):
        pass


def test_use_backend_ends_with_its_block():
    op = OPS["patch_loss"]
    args = make(op, "edge", "cpu", torch.float32)
    with use_backend("cuda"), use_backend("auto"):
        op(*args)
    op(*args)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("reference", "reference"),
        ("auto", "served"),
        ("cuda", "RuntimeError: fastmim.gather_patches: backend 'cuda' was requested"),
        ("refrence", "ValueError: unknown backend 'refrence'; FASTMIM_BACKEND"),
    ],
)
def test_environment_names_the_backend(value, said):
    program = (
        "import torch; from fastmim.ops import gather_patches, _registry\n"
        "gather_patches(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, dtype=torch.int64), 2)\n"
        "print('served', _registry.forced_backend())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FASTMIM_BACKEND": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize(("op", "backend", "shape"), CASES)
def test_autocast_leaves_the_arithmetic_of_an_operator_alone(op, backend, shape, device):
    plain = make(op, shape, device, usual(op, backend))
    usable(op, backend, plain)
    cast = copy.deepcopy(plain)
    with use_backend(backend):
        expected = op(*plain)
        with torch.autocast(device, torch.bfloat16):
            got = op(*cast)
    for a, b in zip(tree_leaves((got, cast)), tree_leaves((expected, plain)), strict=True):
        if isinstance(a, Tensor):
            accuracy.exact(a, b)


@pytest.mark.parametrize("ids", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3).int()])
def test_patch_positions_must_fit_the_images(ids):
    imgs, pred = torch.zeros(4, 3, 8, 8), torch.zeros(*ids.shape, 48)
    with pytest.raises(
        ValueError, match=r"patch_loss: expected ids \(B, K\) of int64 for 4 images"
    ):
        patch_loss(pred, imgs, ids, 4, norm_pix=True)
    with pytest.raises(ValueError, match=r"gather_patches: expected ids \(B, K\) of int64"):
        gather_patches(imgs, ids, 4)


@pytest.mark.parametrize("patch_size", [0, -2])
def test_a_patch_size_below_one_is_refused(patch_size):
    imgs, ids = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, dtype=torch.int64)
    for call in (
        lambda: gather_patches(imgs, ids, patch_size),
        lambda: patch_loss(torch.zeros(1, 1, 12), imgs, ids, patch_size, norm_pix=True),
        lambda: patchify(imgs, patch_size),
    ):
        with pytest.raises(ValueError, match=f"patch size of at least 1, got {patch_size}"):
            call()


def test_a_patch_of_one_value_is_not_normalised():
    pred, imgs = torch.zeros(1, 1, 1), torch.ones(1, 1, 2, 2)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="patch_loss: a patch of a single value"):
        patch_loss(pred, imgs, ids, 1, norm_pix=True)
    accuracy.exact(patch_loss(pred, imgs, ids, 1, norm_pix=False).total, torch.tensor(1.0))


FLOATING = [
    ("restore_tokens", "x"),
    ("restore_tokens", "mask_token"),
    ("restore_tokens", "pos_embed"),
    ("restore_tokens_backward", "grad"),
    ("gather_patches", "imgs"),
    ("gather_patches", "scale"),
    ("patch_loss", "pred"),
    ("patch_loss", "imgs"),
    ("patch_loss", "teacher_pred"),
    ("feature_loss", "pred"),
    ("scale", "x"),
]


@pytest.mark.parametrize(("name", "argument"), FLOATING)
def test_triton_leaves_eight_bit_floats_to_others(name, argument):
    op = OPS[name]
    args = list(make(op, "edge", "cpu", torch.float32))
    where = [s.name for s in op.overload._schema.arguments].index(argument)
    assert op.refuses("triton", tuple(args)) is None
    args[where] = args[where].to(torch.float8_e4m3fn)
    assert "not torch.float8_e4m3fn" in op.refuses("triton", tuple(args))


@pytest.mark.parametrize("wrong", ["weight_decay", "step", "skip"])
def test_scalars_of_another_dtype_are_refused_before_any_backend_is_asked(wrong):
    values = {
        "weight_decay": torch.zeros(1, dtype=torch.float64),
        "step": torch.tensor(0),
        "skip": torch.tensor(False),
    }
    values[wrong] = values[wrong].to(torch.float32)
    lists = [[torch.zeros(3)] for _ in range(4)]
    with pytest.raises(ValueError, match=rf"adamw_ema_: expected {wrong} .* got .*float32"):
        adamw_ema_(
            *lists,
            [],
            lr=0.1,
            momentum=0.9,
            grad_scale=1.0,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            **values,
        )
