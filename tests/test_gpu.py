"""What only a GPU can show: determinism at size, offsets beyond 2**31, graphs and streams.

Without a GPU the same checks run at tiny sizes, which proves the checks.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastmim.ops import OPS, use_backend
from fastmim.ops._registry import Op
from tests import accuracy
from tests.conftest import DEVICE
from tests.operators import (
    IN_PLACE,
    assert_accurate,
    assert_class,
    inputs,
    make,
    run,
    truths,
    usable,
)

ON_GPU = DEVICE == "cuda"
REPEATS = 200 if ON_GPU else 3
IMAGES = 32  # of the repeated calls
BOUNDARY = 2**31 if ON_GPU else 2**10  # elements

BACKENDS = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in OPS.values()
    for backend in op.backends
    if backend != "reference"
]


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


def of_a_model(op: Op) -> tuple:
    """Arguments at the first size of a real model, with fewer images; tiny without a GPU."""
    if not ON_GPU:
        return make(op, "edge", DEVICE, torch.float32)
    name = next(name for name in op.shapes if not name.startswith("edge"))
    sizes = dict(op.shapes[name])
    if "b" in sizes:
        sizes["b"] = min(sizes["b"], IMAGES)
    return op.make(**sizes, device=DEVICE, dtype=torch.float32)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_many_repeats_are_equal_to_the_bit(op, backend):
    args = of_a_model(op)
    first = run(op, backend, args)
    for _ in range(REPEATS):
        for got, before in zip(run(op, backend, args), first, strict=True):
            assert torch.equal(got, before)


@pytest.mark.parametrize(("op", "backend"), [c for c in BACKENDS if c.values[0].differentiable])
def test_many_gradients_are_equal_to_the_bit(op, backend):
    args = of_a_model(op)
    usable(op, backend, args)
    variables = inputs(op, args)
    for t in variables:
        t.requires_grad_()
    with use_backend(backend):
        outputs = [o for o in tree_leaves(op(*args)) if o.requires_grad]
        seeds = [torch.randn_like(o) for o in outputs]
        first = None
        for _ in range(REPEATS):
            outputs = [o for o in tree_leaves(op(*args)) if o.requires_grad]
            grads = torch.autograd.grad(outputs, variables, seeds)
            first = first or grads
            assert all(map(torch.equal, grads, first))


# Sizes without the number of images, elements of an image's largest tensor, and how many times the
# memory of that tensor the whole call takes.
LARGE = {
    "gather_tokens": (dict(n=1024, k=64, d=512), 1024 * 512, 2),
    "scatter_tokens": (dict(n=1024, k=64, d=512), 1024 * 512, 2),
    "gather_patches": (dict(c=3, h=32, w=32, p=16, k=64), 3 * 512**2, 2),
    "restore_tokens": (dict(n=1023, k=255, d=512), 1024 * 512, 3),
    "restore_tokens_backward": (dict(n=1023, k=255, d=512), 1024 * 512, 3),
    "norm": (dict(n=1024, d=512), 1024 * 512, 5),
    "norm_backward": (dict(n=1024, d=512), 1024 * 512, 12),
    "bias_gelu": (dict(n=1024, d=512), 1024 * 512, 3),
    "bias_gelu_backward": (dict(n=1024, d=512), 1024 * 512, 4),
    "patch_loss": (
        dict(m=196, c=3, h=14, w=14, p=16, teacher=True, norm_pix=True, uint8=False),
        196 * 768,
        6,
    ),
    "feature_loss": (
        dict(m=1024, n=1024, d=512, kind="smooth_l1", normalize=True),
        1024 * 512,
        5,
    ),
    "crop_resize": (dict(c=3, h=32, w=32, height=256, width=256), 3 * 256**2, 2),
}
_TINY = {"n": 16, "k": 4, "m": 16, "d": 8, "h": 4, "w": 4, "p": 2, "height": 8, "width": 8}


def large(name: str) -> tuple[dict, int, int]:
    """Sizes, elements of an image and memory; tiny without a GPU."""
    sizes, elements, memory = LARGE[name]
    if ON_GPU:
        return sizes, elements, memory
    sizes = {key: min(value, _TINY.get(key, value)) for key, value in sizes.items()}
    return sizes, sizes.get("n", 0) * sizes.get("d", 0) or 3 * 8**2, memory


def needs(memory: int) -> None:
    """Skip if the GPU has fewer bytes to spare."""
    if ON_GPU:
        free, _ = torch.cuda.mem_get_info()
        if free < memory:
            pytest.skip(f"{memory / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free")


@pytest.mark.parametrize(("op", "backend"), [c for c in BACKENDS if c.values[0].name in LARGE])
def test_tensors_of_more_than_2_to_the_31_elements(op, backend):
    sizes, elements, memory = large(op.name)
    dtype = torch.bfloat16
    b = BOUNDARY // elements + 3
    needs(memory * b * elements * dtype.itemsize)
    args = op.make(b=b, **sizes, device=DEVICE, dtype=dtype)
    usable(op, backend, args)
    with use_backend(backend):
        results = tree_leaves(op(*args))
    crossing = BOUNDARY // elements
    images = torch.tensor([0, crossing - 1, crossing, b - 1], device=DEVICE)

    def chosen(leaf):
        return leaf[images] if batched(leaf) else leaf

    def batched(leaf) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 1 and len(leaf) == b

    plain, formula = truths(op, tree_map(chosen, args), dtype)
    # Sums over the whole batch are not those over the chosen images.
    of_images = [i for i, result in enumerate(results) if batched(result)]
    assert of_images
    for i in of_images:
        assert_class(op, chosen(results[i]), plain[i], formula[i])


@pytest.mark.parametrize(("op", "backend"), [c for c in BACKENDS if c.values[0].name in IN_PLACE])
def test_updates_of_more_than_2_to_the_31_values(op, backend):
    count = BOUNDARY + 5
    lists = 5 if op.name == "adamw_ema_" else 2
    needs((lists + 2) * 4 * count)
    args = op.make(sizes=(count,), device=DEVICE, dtype=torch.float32)
    usable(op, backend, args)
    places = torch.tensor([0, 1, BOUNDARY - 2, BOUNDARY - 1, BOUNDARY, count - 1], device=DEVICE)

    def chosen(leaf):
        return leaf[places] if isinstance(leaf, Tensor) and leaf.shape == (count,) else leaf

    before = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree_map(chosen, args)
    )
    with use_backend(backend):
        op(*args)
    changed = [a for a, s in zip(args, op.overload._schema.arguments, strict=True) if s.is_write]
    assert_accurate(op, tree_leaves(tree_map(chosen, changed)), before, torch.float32)


def replayable(call: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of the call; without a GPU the call itself."""
    if not ON_GPU:
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@pytest.mark.parametrize("backend", [b for b in OPS["adamw_ema_"].backends if b != "reference"])
def test_a_captured_update_reads_its_scalars_when_replayed(backend):
    op = OPS["adamw_ema_"]
    args = make(op, "edge", DEVICE, torch.float32)
    usable(op, backend, args)
    expected = tree_map(_cloned, args)
    names = [s.name for s in op.overload._schema.arguments]
    with use_backend(backend):
        on_the_side(lambda: op(*tree_map(_cloned, args)))  # compiles and loads before the capture
        update = replayable(lambda: op(*args))
        for lr, momentum, skip in ((1e-2, 0.9, False), (3e-3, 0.99, True), (1e-3, 0.5, False)):
            for given in (args, expected):
                for name, value in (("lr", lr), ("momentum", momentum), ("skip", skip)):
                    given[names.index(name)].fill_(value)
            update()
            op(*expected)
    for got, right in zip(tree_leaves(args), tree_leaves(expected), strict=True):
        if isinstance(got, Tensor):
            accuracy.exact(got, right)
    assert int(args[names.index("step")]) == 5  # it began at 3, and one of three was skipped


def _cloned(leaf):
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def on_the_side(call: Callable[[], object], delay: int = 0) -> object:
    """The call on a stream that is not the default one, after ``delay`` cycles of waiting there."""
    if not ON_GPU:
        return call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if delay:
            torch.cuda._sleep(delay)
        result = call()
    stream.synchronize()
    return result


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_an_operator_waits_for_the_stream_it_is_called_on(op, backend):
    args = make(op, "edge", DEVICE, torch.float32)
    expected = run(op, backend, args)
    late = tree_map(_zeros, args)

    def call():
        for to, value in zip(tree_leaves(late), tree_leaves(args), strict=True):
            if isinstance(to, Tensor):
                to.copy_(value)
        return run(op, backend, late)

    for got, right in zip(on_the_side(call, delay=10**7), expected, strict=True):
        accuracy.exact(got, right)


def _zeros(leaf):
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf
