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


def run_on_threads(threads, unaligned):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = adamw_inputs([(100_003,), (17,), (2**14 + 1,)], unaligned=unaligned)
        adamw_ema_(inputs)
        ops.ema_update_(inputs.teachers, inputs.params, inputs.momentum)
    finally:
        torch.set_num_threads(before)
    return state(inputs)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_the_number_of_threads_or_on_alignment(threads):
    assert_same_bytes(run_on_threads(threads, unaligned=True), run_on_threads(1, unaligned=False))


DIGEST = """
import hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("test_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
digest = hashlib.sha256()
for x in module.run_on_threads(1, unaligned=False):
    digest.update(x.numpy().tobytes())
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
