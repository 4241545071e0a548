"""The compiled operators torch.ops.fastmim_native.*, without the registry before them.

Their values are tested with those of every backend in test_ops.py; here, that nothing else decides
them: threads, instruction sets, devices, alignment, chunks.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

native = pytest.importorskip(
    "fastmim._C", reason="the compiled part is not built: python setup.py build_ext --inplace"
)
ops = torch.ops.fastmim_native

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and native.build_info()["cuda"] else [])
# Below, at and above one vector, one chunk (2**14 elements) and one kernel table (512 tensors).
SIZES = [(0,), (1,), (5,), (3, 0, 2), (16,), (7, 11), (40_000,), (3 * 2**14,)] + [(7,)] * 520
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8


def scalar(value, dtype=torch.float64, device="cpu"):
    return torch.tensor(value, dtype=dtype, device=device)


def adamw_inputs(sizes, device="cpu", *, teachers=True, skip=False, unaligned=False, step=4):
    generator = torch.Generator().manual_seed(0)

    def tensors(scale):
        made = []
        for size in sizes:
            numel = torch.Size(size).numel()
            # Not randn: its values depend on the instruction set.
            flat = torch.randint(-(2**20), 2**20, (numel + 1,), generator=generator) / 2**20
            flat = (flat * scale).to(device)
            made.append(flat[1:].view(size) if unaligned else flat[1:].clone().view(size))
        return made

    return SimpleNamespace(
        params=tensors(1.0),
        grads=tensors(8.0),
        exp_avgs=tensors(0.1),
        exp_avg_sqs=[x.square() for x in tensors(0.1)],
        teachers=tensors(1.0) if teachers else [],
        step=scalar(step, torch.int64, device),
        lr=scalar(1e-2, device=device),
        momentum=scalar(0.9, device=device),
        grad_scale=scalar(0.125, device=device),
        skip=scalar(skip, torch.bool, device),
        weight_decay=torch.arange(len(sizes), dtype=torch.float64, device=device) / 8192,
    )


def adamw_ema_(inputs):
    ops.adamw_ema_(*vars(inputs).values(), BETA1, BETA2, EPS)


def state(inputs):
    """Every byte the operator may write, on the CPU."""
    lists = (inputs.params, inputs.exp_avgs, inputs.exp_avg_sqs, inputs.teachers, [inputs.step])
    return [x.detach().cpu().clone() for xs in lists for x in xs]


def assert_same_bytes(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert torch.equal(a.view(-1).view(torch.uint8), e.view(-1).view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_empty_lists_do_nothing(device):
    inputs = adamw_inputs([], device)
    adamw_ema_(inputs)
    assert inputs.step.item() == 4
    ops.ema_update_([], [], scalar(0.5, device=device))


def in_pieces(inputs, length):
    """Views of the same memory, at most ``length`` elements each; (pieces, their decays)."""
    lists = (inputs.params, inputs.grads, inputs.exp_avgs, inputs.exp_avg_sqs, inputs.teachers)
    pieces = [[part for x in xs for part in x.view(-1).split(length)] for xs in lists]
    counts = torch.tensor([len(x.view(-1).split(length)) for x in inputs.params])
    return pieces, inputs.weight_decay.repeat_interleave(counts.to(inputs.weight_decay.device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teachers", [True, False])
def test_bits_do_not_depend_on_chunks_and_tables(device, teachers):
    whole, cut = (adamw_inputs(SIZES, device, teachers=teachers) for _ in range(2))
    adamw_ema_(whole)
    ops.ema_update_(whole.exp_avgs, whole.params, whole.momentum)
    pieces, decays = in_pieces(cut, 1000)  # none fills a chunk, and
    for i in range(0, len(decays), 100):  # no call fills a table
        params, grads, exp_avgs, exp_avg_sqs, followers = (xs[i : i + 100] for xs in pieces)
        cut.step.fill_(4)
        scalars = (cut.step, cut.lr, cut.momentum, cut.grad_scale, cut.skip, decays[i : i + 100])
        ops.adamw_ema_(params, grads, exp_avgs, exp_avg_sqs, followers, *scalars, BETA1, BETA2, EPS)
        ops.ema_update_(exp_avgs, params, cut.momentum)
    assert_same_bytes(state(cut), state(whole))


@pytest.mark.parametrize("device", DEVICES)
def test_bits_of_the_step_do_not_depend_on_the_teachers(device):
    alone, followed = (adamw_inputs(SIZES, device, teachers=t) for t in (False, True))
    for inputs in (alone, followed):
        adamw_ema_(inputs)
        inputs.teachers = []
    assert_same_bytes(state(alone), state(followed))


def values(shape, dtype=torch.float32, seed=1):
    """Sixteenths in [-8, 8); not randn, see adamw_inputs. uint8: pixels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 256, shape, generator=generator)
    return drawn.to(dtype) if dtype == torch.uint8 else (drawn / 16 - 8).to(dtype)


def orders(b, n):
    """(B, N), each row another permutation."""
    noise = torch.randint(2**40, (b, n), generator=torch.Generator().manual_seed(2))
    return noise.argsort(dim=1, stable=True)


def calls(b, rows, columns, kept, width, side, channels):
    """(operator, arguments) for every operator without state, in each pair of dtypes that differs.

    ``kept`` of the ``rows`` x ``columns`` tokens or patches of ``b`` images are visible.
    """
    n, size = rows * columns, channels * side * side
    ids = orders(b, n)
    scale, shift = (torch.arange(1, channels + 1, dtype=torch.float64) / k for k in (7, 3))
    made = [(ops.sample_masks, (torch.arange(b) * 2**33, -5, 7, n))]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        made += [
            (ops.gather_tokens, (values((b, n, width), dtype), ids[:, :kept])),
            (ops.scatter_tokens, (values((b, kept, width), dtype), ids[:, :kept], n)),
            (ops.restore_tokens_backward, (values((b, n + 1, width), dtype), ids, kept)),
        ]
        wide = dtype if dtype == torch.float64 else torch.float32
        for pos_dtype in dict.fromkeys((dtype, wide)):
            x, mask = values((b, kept + 1, width), dtype), values((1, 1, width), torch.float32, 3)
            pos = values((1, n + 1, width), pos_dtype, 4)
            made.append((ops.restore_tokens, (x, mask, ids, ids.argsort(1), pos)))
        imgs = values((b, channels, rows * side, columns * side), dtype)
        pixels = values(imgs.shape, torch.uint8)
        pred, teacher = (values((b, n - kept, size), dtype, seed) for seed in (5, 6))
        made += [
            (ops.gather_patches, (imgs, ids[:, :kept], side, None, None, dtype)),
            (ops.gather_patches, (imgs, ids[:, :kept], side, scale, shift, torch.float32)),
            (ops.gather_patches, (pixels, ids[:, :kept], side, scale, shift, dtype)),
            (ops.patch_loss, (pred, imgs, ids[:, kept:], side, False, None, 0.5, None, None)),
            (ops.patch_loss, (pred, pixels, ids[:, kept:], side, True, teacher, 0.5, scale, shift)),
        ]
    return made


# More than one thread's share of elements, no multiple of a vector, of four rows or of a group.
ODD = dict(b=5, rows=7, columns=9, kept=16, width=133, side=14, channels=3)
SMALL = dict(b=2, rows=2, columns=3, kept=1, width=3, side=1, channels=2)


def outputs(**sizes):
    results = []
    for op, args in calls(**sizes):
        out = op(*args)
        results += [out] if isinstance(out, torch.Tensor) else out
    return results


def run_on_threads(threads, unaligned):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = adamw_inputs([(100_003,), (17,), (2**14 + 1,)], unaligned=unaligned)
        adamw_ema_(inputs)
        ops.ema_update_(inputs.teachers, inputs.params, inputs.momentum)
        return state(inputs) + outputs(**ODD) + outputs(**SMALL)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_the_number_of_threads_or_on_alignment(threads):
    assert_same_bytes(run_on_threads(threads, unaligned=True), run_on_threads(1, unaligned=False))


def relaid(argument, layout):
    """The same values in other memory."""
    if not isinstance(argument, torch.Tensor) or not argument.ndim:
        return argument
    if layout == "gaps":
        return torch.stack([argument, argument], dim=-1)[..., 0]
    if layout == "channels_last":
        return (
            argument.movedim(1, -1).contiguous().movedim(-1, 1) if argument.ndim > 1 else argument
        )
    memory = torch.cat([argument.flatten()[:1], argument.flatten()])
    return memory[1:].view_as(argument)


@pytest.mark.parametrize("layout", ["gaps", "channels_last", "unaligned"])
def test_bits_do_not_depend_on_the_layout(layout):
    for op, args in calls(**ODD):
        expected, got = op(*args), op(*[relaid(a, layout) for a in args])
        if isinstance(expected, torch.Tensor):
            expected, got = [expected], [got]
        assert_same_bytes(got, expected)


@pytest.mark.parametrize("size", ["b", "kept", "width", "channels"])
def test_without_elements_there_is_nothing_to_do(size):
    for x in outputs(**{**SMALL, size: 0}):
        assert x.isfinite().all()


def test_no_tokens_at_all():
    none = torch.empty(2, 0, dtype=torch.int64)
    assert ops.sample_masks(torch.arange(2), 0, 0, 0)[0].shape == (2, 0)
    assert ops.gather_tokens(torch.empty(2, 0, 3), none).shape == (2, 0, 3)
    assert ops.scatter_tokens(torch.empty(2, 0, 3), none, 0).shape == (2, 0, 3)
    cls_token = torch.ones(2, 1, 3)
    restored = ops.restore_tokens(cls_token, torch.ones(1, 1, 3), none, none, torch.ones(1, 1, 3))
    assert (restored == 2).all()
    grad_x, grad_mask = ops.restore_tokens_backward(cls_token, none, 0)
    assert (grad_x == 1).all()
    assert (grad_mask == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 257, 3001])
def test_masks_are_permutations_and_their_inverses(n):
    shuffle, restore = ops.sample_masks(torch.arange(3), 1, 2, n)
    assert torch.equal(shuffle.sort(dim=1).values, torch.arange(n).expand(3, n))
    assert torch.equal(shuffle.gather(1, restore), torch.arange(n).expand(3, n))


@pytest.mark.parametrize("wrong", [-1, 6, 2**62])
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("gather_tokens", 1),
        ("scatter_tokens", 1),
        ("restore_tokens", 3),
        ("restore_tokens_backward", 1),
        ("gather_patches", 1),
        ("patch_loss", 2),
    ],
)
def test_a_position_out_of_range_is_named(name, position, wrong):
    x, ids, pred = torch.zeros(2, 7, 3), orders(2, 6), torch.zeros(2, 6, 4)
    imgs, row = torch.zeros(2, 1, 4, 6), torch.zeros(1, 1, 3)
    args = {
        "gather_tokens": [x[:, 1:], ids],
        "scatter_tokens": [x[:, 1:], ids, 6],
        "restore_tokens": [x[:, :3], row, ids, ids, torch.zeros(1, 7, 3)],
        "restore_tokens_backward": [x, ids, 2],
        "gather_patches": [imgs, ids, 2, None, None, torch.float32],
        "patch_loss": [pred, imgs, ids, 2, True, None, 1.0, None, None],
    }[name]
    args[position] = args[position].clone()
    args[position][1, 4] = wrong
    expected = rf"{name}: ids\w*\[1, 4\] is {wrong}, expected a value in \[0, 6\)"
    with pytest.raises(RuntimeError, match=expected):
        getattr(ops, name)(*args)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("sample_masks", (torch.zeros(2), 0, 0, 4), "sample_ids cannot be Float"),
        ("sample_masks", (orders(1, 2)[0], 0, 0, -1), r"num_patches in \[0, 2\^32\), got -1"),
        (
            "gather_tokens",
            (torch.zeros(3, 4, 5), orders(2, 4)),
            r"expected ids to be \(3, K\) of Long \(int64\), got Long \(2, 4\)",
        ),
        ("gather_tokens", (torch.zeros(3, 4), orders(3, 4)), "expected x to have 3 dimensions"),
        (
            "scatter_tokens",
            (torch.zeros(2, 4, 5), orders(2, 3), 6),
            r"expected ids to have shape \(2, 4\), got \(2, 3\)",
        ),
        (
            "restore_tokens",
            (
                torch.zeros(2, 6, 5),
                torch.zeros(1, 1, 5),
                orders(2, 4),
                orders(2, 4),
                torch.zeros(5),
            ),
            r"expected x to have from 1 to 5 tokens an image, got \(2, 6, 5\)",
        ),
        (
            "restore_tokens_backward",
            (torch.zeros(2, 5, 5), orders(2, 4), 5),
            r"num_visible in \[0, 4\], got 5",
        ),
        (
            "gather_patches",
            (torch.zeros(2, 3, 4, 4), orders(2, 4), 3, None, None, torch.float32),
            r"H and W divisible by the patch size 3, got \(2, 3, 4, 4\)",
        ),
        (
            "gather_patches",
            (torch.zeros(2, 3, 4, 4), orders(2, 4), 2, torch.ones(2), None, torch.float32),
            r"expected scale to have shape \(3,\), got \(2,\)",
        ),
        (
            "gather_patches",
            (torch.zeros(2, 3, 4, 4).int(), orders(2, 4), 2, None, None, torch.float32),
            "imgs cannot be Int",
        ),
        (
            "patch_loss",
            (values((2, 4, 5)), values((2, 3, 4, 4)), orders(2, 4), 2, True, None, 1.0, None, None),
            r"expected pred to have shape \(2, 4, 12\), got \(2, 4, 5\)",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(name, args, message):
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(ops, name)(*args)


DIGEST = """
import hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("test_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
digest = hashlib.sha256()
for x in module.run_on_threads(1, unaligned=False):
    digest.update(x.contiguous().view(-1).view(module.torch.uint8).numpy().tobytes())
print(module.native.build_info()["simd_in_use"], digest.hexdigest())
"""


def test_bits_do_not_depend_on_the_instruction_set(tmp_path):
    digests = {}
    for variant in native.build_info()["simd_variants"]:
        env = os.environ | {"ATEN_CPU_CAPABILITY": variant}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", DIGEST, __file__]
        # Not in the checkout: "python -c" would look there for fastmim before anywhere else.
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        used, digest = done.stdout.split()
        digests[used] = digest
    assert "default" in digests
    assert len(set(digests.values())) == 1, digests


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and CUDA kernels")
def test_gpu_and_cpu_give_the_same_bits():
    cpu, gpu = adamw_inputs(SIZES, "cpu"), adamw_inputs(SIZES, "cuda", unaligned=True)
    for skip in (False, True, False):
        for inputs in (cpu, gpu):
            inputs.skip.fill_(skip)
            adamw_ema_(inputs)
    assert_same_bytes(state(gpu), state(cpu))


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and CUDA kernels")
def test_a_cuda_graph_replays_with_new_scalars():
    captured, eager = adamw_inputs(SIZES, "cuda"), adamw_inputs(SIZES, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_ema_(captured)
    for lr, skip in ((1e-3, False), (2e-3, True), (3e-3, False)):
        for inputs in (captured, eager):
            inputs.lr.fill_(lr)
            inputs.skip.fill_(skip)
        graph.replay()
        adamw_ema_(eager)
    assert captured.step.item() == 6
    assert_same_bytes(state(captured), state(eager))


@pytest.mark.parametrize("name", ["ema_update_", "adamw_ema_"])
def test_kernels_are_registered_for_the_devices_they_were_built_for(name):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert registered(f"fastmim_native::{name}", "CPU")
    built_with_cuda = native.build_info()["cuda"] is not None
    assert registered(f"fastmim_native::{name}", "CUDA") == built_with_cuda


def replace(name, value):
    def change(inputs):
        setattr(inputs, name, value(getattr(inputs, name)))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("grads", lambda x: x[:1]), "adamw_ema_: grads has 1 tensors, params has 2"),
        (replace("teachers", lambda x: x[:1]), "teachers has 1 tensors, params has 2"),
        (
            replace("exp_avgs", lambda x: [x[0], x[1].view(5, 3)]),
            r"exp_avgs\[1\] has shape \(5, 3\), params\[1\] has \(3, 5\)",
        ),
        (
            replace("params", lambda x: [x[0].double(), x[1]]),
            r"expected params\[0\] to be Float \(float32\), got Double",
        ),
        (replace("exp_avg_sqs", lambda x: [x[0], x[1].bfloat16()]), r"exp_avg_sqs\[1\].*BFloat16"),
        (
            replace("grads", lambda x: [x[0], x[1].t().contiguous().t()]),
            r"grads\[1\] is not contiguous",
        ),
        (replace("lr", lambda x: x.float()), "expected lr to be a 0-d Double tensor, got Float"),
        (replace("step", lambda x: x[None]), r"step to be a 0-d Long tensor, got Long \(1,\)"),
        (replace("skip", lambda x: x.int()), "expected skip to be a 0-d Bool tensor, got Int"),
        (
            replace("weight_decay", lambda x: x[:1]),
            r"weight_decay to be a contiguous Double tensor of shape \(2,\).*got Double \(1,\)",
        ),
    ],
)
def test_adamw_ema_refuses_by_name_and_changes_nothing(change, message):
    inputs = adamw_inputs([(4,), (3, 5)])
    change(inputs)
    before = state(inputs)
    with pytest.raises(RuntimeError, match=message):
        adamw_ema_(inputs)
    assert_same_bytes(state(inputs), before)


@pytest.mark.parametrize(
    ("teachers", "students", "momentum", "message"),
    [
        ([torch.zeros(2)], [], scalar(0.9), "ema_update_: students has 0 tensors, teachers has 1"),
        ([torch.zeros(2)], [torch.zeros(3)], scalar(0.9), r"students\[0\] has shape \(3,\)"),
        ([torch.zeros(2)], [torch.zeros(2)], scalar([0.9]), "momentum to be a 0-d Double tensor"),
        ([torch.zeros(2).half()], [torch.zeros(2)], scalar(0.9), r"teachers\[0\].*got Half"),
    ],
)
def test_ema_update_refuses_by_name(teachers, students, momentum, message):
    with pytest.raises(RuntimeError, match=message):
        ops.ema_update_(teachers, students, momentum)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and CUDA kernels")
def test_tensors_on_two_devices_are_refused():
    with pytest.raises(RuntimeError, match=r"students\[0\] is on cpu, expected cuda:0"):
        ops.ema_update_(
            [torch.zeros(2, device="cuda")], [torch.zeros(2)], scalar(0.9, device="cuda")
        )


def test_build_info_says_what_was_built():
    info = native.build_info()
    assert info["torch_target"] == "2.10"
    assert info["simd_in_use"] in info["simd_variants"]
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
