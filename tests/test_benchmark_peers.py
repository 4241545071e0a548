"""Peers of the benchmark do what fastmim does; suites of memory, loaders and step costs."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import benchmark_module

_FOLDER = Path(__file__).parents[1] / "benchmarks"
peers, plain, parts, shim, steps, stepcost, memory, loader, capacity, suite, roofline = (
    benchmark_module(name)
    for name in (
        "peers", "peers.plain", "peers.parts", "peers.torchvision_shim", "steps", "stepcost",
        "memory", "loader", "capacity", "suite", "roofline",
    )
)  # fmt: skip
CPU = torch.device("cpu")
METHODS = ("mae", "rc_mae", "dbot", "sdae")
SMALL = peers.Case("mae_vit_micro_patch4", 4, "mae", "fp32", "cpu")
COMPILED = ("fastmim-compiled", "compiled", "compiled-max-autotune", "hf-compiled")


def case(method: str, dtype: str = "fp32"):
    return dataclasses.replace(SMALL, method=method, dtype=dtype)


def error(program, of) -> float:
    """Largest relative error of loss and gradients against plain PyTorch in float64."""
    truth = steps.truth_of(peers.PEERS["plain"], of)
    return steps._error(steps.loss_and_gradients(program, of), truth)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [n for n in peers.PROGRAMS if n not in COMPILED])
def test_every_program_has_the_loss_and_gradients_of_plain_pytorch(name, method):
    kind = peers.PROGRAMS[name]
    of = case(method, "bf16" if "fp32" not in kind.dtypes else "fp32")
    if kind.missing(of):
        pytest.skip(f"{name}: {kind.missing(of)}")
    program = kind(of)
    assert error(program, of) <= steps.TOLERANCE[of.dtype]
    program.student.zero_grad(set_to_none=True)
    before = {n: p.detach().clone() for n, p in program.student.named_parameters()}
    initial = of.weights(0)
    program.step(of.batches()[0])
    for parameter, value in program.student.named_parameters():
        assert torch.equal(value, before[parameter]) == (not value.requires_grad), parameter
    for parameter, value in of.weights(0).items():  # the next program starts from the same
        assert torch.equal(value, initial[parameter]), parameter


@pytest.mark.parametrize("name", ["compiled", "fastmim-compiled"])
def test_a_compiled_program_has_the_loss_and_gradients_of_plain_pytorch(name):
    program = peers.PROGRAMS[name](case("mae"))
    counters.clear()
    assert error(program, case("mae")) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_program_with_another_loss_does_not_match():
    class Wrong(plain.Plain):
        def objective(self, pred, target, imgs, ids_shuffle, ids_restore):
            self.num_keep -= 1  # one visible patch in the loss
            return super().objective(pred, target, imgs, ids_shuffle, ids_restore)

    assert error(Wrong(case("mae")), case("mae")) > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [n for n in peers.PROGRAMS if n not in COMPILED])
def test_every_program_updates_weights_and_teacher_as_adamw_and_the_ema_do(name, method):
    kind = peers.PROGRAMS[name]
    of = case(method, "bf16" if "fp32" not in kind.dtypes else "fp32")
    if kind.missing(of):
        pytest.skip(f"{name}: {kind.missing(of)}")
    program = kind(of)
    steps.loss_and_gradients(program, of)
    assert (len(program.followed()) > 0) == (method == "rc_mae")
    assert steps._update_error(program, of) <= 1


@pytest.mark.parametrize("wrong", ["decay", "teacher", "no update"])
def test_a_wrong_update_does_not_match(wrong):
    class Wrong(plain.Plain):
        def groups(self):
            return [dict(params=self._students, weight_decay=0.0 if wrong == "decay" else 0.05)]

        def move_teacher(self):
            if wrong != "teacher":
                super().move_teacher()

        def update(self):
            if wrong != "no update":
                super().update()

    of = case("rc_mae")
    found = steps.errors_of(Wrong(of), of, steps.truth_of(plain.Plain, of))
    assert found["update_error"] > 1
    assert found["error"] == float("inf")


def test_without_a_truth_that_fits_a_program_is_not_judged():
    found = steps.errors_of(plain.Plain(SMALL), SMALL, steps.Lost("oom", "too large"))
    assert found["error"] is None
    assert steps.judged(None, found["error"], 1e-5) == dict(error=None, match=None)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_the_authors_style_moves_weights_and_teacher_as_the_best_one(method):
    made = []
    order = torch.rand(4, SMALL.num_patches).argsort(dim=1)
    for name in ("official", "plain"):
        program = peers.PEERS[name](case(method, "fp64"))
        program.masks = lambda batch: order
        program.step(program.case.batches()[0])
        teacher = program.teacher.state_dict() if program.teacher is not None else {}
        made.append({**{f"teacher.{n}": v for n, v in teacher.items()},
                     **program.student.state_dict()})  # fmt: skip
    first, second = made
    for name, value in first.items():
        # No loss depends on the bias of the keys: AdamW divides rounding by rounding there.
        if not name.endswith("qkv.bias"):
            off = (value - second[name]).abs().max()
            assert off <= 1e-5 * SMALL.recipe.lr, name


@pytest.mark.parametrize(
    ("name", "method", "kind", "reason"),
    [
        ("flash-attn", "mae", "cpu", "needs a GPU"),
        ("hf", "dbot", "cpu", "trains mae, rc_mae only"),
        ("plain", "sdae", "cpu", None),
    ],
)
def test_a_program_says_why_it_cannot_do_a_case(name, method, kind, reason):
    of = dataclasses.replace(case(method), device=kind)
    assert peers.PEERS[name].missing(of) == reason


def test_an_absent_library_is_named():
    class Absent(plain.Plain):
        modules = ("no_such_library",)

    assert "no_such_library cannot be imported" in Absent.missing(SMALL)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="it is there")
def test_torchvision_is_there_for_import_statements_only():
    with shim.torchvision_for_imports():
        from torchvision.ops.misc import FrozenBatchNorm2d
        from torchvision.transforms import InterpolationMode

        assert isinstance(FrozenBatchNorm2d, type)
        assert InterpolationMode.BICUBIC != InterpolationMode.NEAREST
    assert not [name for name in sys.modules if name.startswith("torchvision")]
    with pytest.raises(ImportError):
        import torchvision.ops  # noqa: F401


def test_time_of_a_part_is_its_own_and_all_parts_are_the_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(parts.time, "perf_counter", lambda: now[0])

    class Program:
        def wait(self, seconds):
            now[0] += seconds

        def embed(self):
            self.wait(1.0)

        def encode(self):
            self.wait(2.0)
            self.embed()
            self.wait(4.0)

        def update(self):
            self.wait(32.0)

        def step(self, batch):
            self.wait(8.0)
            self.encode()
            weight = torch.ones((), requires_grad=True)
            weight.register_hook(lambda grad: self.wait(16.0))
            weight.mul(2).backward()
            self.update()

        def parts(self):
            return {
                "embed": [(self, "embed")],
                "encoder": [(self, "encode")],
                "update": [(self, "update")],
            }

    timed = parts.Parts(Program(), CPU)
    for _ in range(3):
        timed.step(None)
    row = timed.row()
    assert row["parts_ms"] == {
        "embed": 1e3, "encoder": 6e3, "backward": 16e3, "update": 32e3, "other": 8e3
    }  # fmt: skip
    assert (row["forward_ms"], row["backward_ms"], row["update_ms"]) == (15e3, 16e3, 32e3)


@pytest.mark.parametrize("name", ["fastmim", "official", "plain", "timm", "hf", "lightly"])
def test_the_parts_of_a_step_are_found_and_change_nothing(name):
    if peers.PROGRAMS[name].missing(case("rc_mae")):
        pytest.skip(f"{name}: {peers.PROGRAMS[name].missing(case('rc_mae'))}")
    program = peers.PROGRAMS[name](case("rc_mae"))
    timed = parts.Parts(program, CPU)
    timed.step(program.case.batches()[0])
    found = timed.row()["parts_ms"]
    assert found.keys() >= {
        "masks", "embed", "encoder", "decoder", "teacher", "loss", "backward", "update"
    }  # fmt: skip
    assert all(ms > 0 for part, ms in found.items())
    program.student.zero_grad(set_to_none=True)


def test_a_container_is_given_no_more_than_its_limit(tmp_path):
    assert capacity._left_to_container(tmp_path) is None
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity._left_to_container(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    assert capacity._left_to_container(tmp_path) == 3


def test_programs_that_do_not_fit_together_are_timed_apart(monkeypatch):
    monkeypatch.setattr(steps, "total_memory", lambda device, host_share: 10.0)
    taken = {name: dict(resting_memory_gib=2.0, rising_memory_gib=3.0) for name in "abcd"}
    assert steps._groups(taken, CPU) == [["a", "b", "c"], ["d"]]
    assert steps._groups({"a": {}, "b": {}}, CPU) == [["a", "b"]]


def test_views_of_step_cost_models_have_the_tokens_of_the_papers():
    base = dataclasses.replace(SMALL, model="mae_vit_base_patch16")
    assert stepcost.IBot.tokens_of(base) == (2 * 197 + 10 * 37, 2 * 197)
    assert stepcost.Msn.tokens_of(base) == (138 + 10 * 37, 197)
    assert stepcost.BootMaeStyle.tokens_of(base) == (50, 197)


@pytest.mark.parametrize("kind", stepcost.STEP_COSTS, ids=lambda kind: kind.name)
def test_a_step_cost_model_trains_all_it_has_and_its_teacher_follows(kind):
    program = kind(case("rc_mae"))
    before = {n: p.detach().clone() for n, p in program.teacher.named_parameters()}
    batch = program.case.batches()[0]
    program.loss(batch.imgs, program.masks(batch)).backward()
    trained = {n: p for n, p in program.student.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    program.update()
    for name, value in program.teacher.named_parameters():
        if value.ndim > 1:  # a step of 1e-8 from 1 is none in float32
            assert torch.equal(value, before[name]) == (name not in trained), name


@pytest.mark.parametrize("kind", stepcost.STEP_COSTS, ids=lambda kind: kind.name)
def test_a_step_cost_model_is_counted_as_its_graph_computes(kind):
    of = case("rc_mae")
    program = kind(of)
    batch = of.batches()[0]
    # The counter knows attention by its products alone.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        program.loss(batch.imgs, program.masks(batch)).backward()
    needed = kind.needed(of)
    counted = sum(part.flops for part in needed.parts("fp32"))
    # Not needed, but computed: patches that MSN drops, BootMAE's predictions of visible patches.
    assert 1 <= counter.get_total_flops() / counted < 1.02
    trained = sum(p.numel() for p in program.student.parameters() if p.requires_grad)
    assert needed.parameters == pytest.approx(trained, rel=2e-3)


@pytest.mark.parametrize("kind", stepcost.STEP_COSTS, ids=lambda kind: kind.name)
def test_a_step_cost_model_computes_in_float32_what_it_does_in_float64(kind):
    of = case("rc_mae")
    found = steps.errors_of(kind(of), of, steps.truth_of(kind, of), together=True)
    assert found["error"] <= kind.tolerance


def test_methods_with_more_tokens_keep_more():
    saved = {}
    for kind in (stepcost.IBot, plain.Plain):
        saved[kind] = steps.footprint_of(kind, case("rc_mae"))["saved_bytes_per_image"]
    assert saved[stepcost.IBot] > 5 * saved[plain.Plain]


def test_a_program_that_fails_ends_the_search_for_its_largest_batch():
    class Peaks(memory._Peaks):
        def __call__(self, batch):
            crash = steps.Lost("failed", "the process ended with exit status -11")
            return dict(peak_memory_gib=1 + 0.1 * batch) if batch <= 6 else crash

    batch, found = memory._largest(Peaks("plain", SMALL, 5.0, {}), 2)
    assert batch > 6
    assert found.status == "failed"
    fits = dict(peak_memory_gib=1.0)
    Peaks.__call__ = lambda self, batch: fits if batch <= 3 else steps.Lost("oom", "limit")
    assert memory._largest(Peaks("plain", SMALL, 5.0, {}), 2) == (3, fits)


def test_a_step_cost_model_that_does_not_fit_is_not_built_here(monkeypatch):
    killed = steps.Lost("oom", "the process was ended by signal 9")
    monkeypatch.setattr(stepcost, "in_fresh_process", lambda function, key, case: killed)
    monkeypatch.setattr(stepcost, "_checked", lambda key, case: pytest.fail("built"))
    rows = list(stepcost.run(dataclasses.replace(_short(), memory=True)))
    assert {row["status"] for row in rows} == {"oom"}
    assert all(row.keys() >= suite.EVERY_ROW and row["flops"] > 0 for row in rows)


def test_a_step_that_does_not_fit_beside_the_others_is_timed_alone(monkeypatch):
    timed = steps._timed

    def crowded(variants, truth, options):
        timings, found = timed(variants, truth, options)
        if len(variants) > 1:
            timings["plain", "fp32"].lose(steps.Lost("oom", "crowded"))
        return timings, found

    monkeypatch.setattr(steps, "_timed", crowded)
    rows = {row["kernel_provider"]: row for row in steps._compare("tiny32", SMALL, _short())}
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    assert rows["plain"]["vs_peer"] == 1


def test_a_peer_that_fails_is_a_row_that_does_not_match_and_the_others_go_on(monkeypatch, capsys):
    def broken(self, batch):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(plain.Plain, "step", broken)
    ours, other = steps._compare("tiny32", SMALL, _short())
    assert (ours["status"], ours["match"]) == ("ok", True)
    assert (other["status"], other["match"]) == ("failed", False)
    assert other["reason"] == "RuntimeError: no kernel image is available"
    assert "Traceback" in capsys.readouterr().err


def _short():
    return suite.Options(
        device=CPU, shapes=["tiny32"], methods=["mae"], dtypes=["fp32"], models=None, batch=None,
        peers=["plain"], operators=None, images="uint8", compiled=False, rounds=1,
        block_seconds=0.0, seconds=0.0, memory=False, smoke=True, say=lambda line: None,
        ceilings=roofline.Ceilings(copy=1e10, matmul=dict(fp32=1e11, bf16=1e11)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "batch", "within", "status"),
    [("fastmim", 4, 2.0, "ok"), ("plain", 4, 2.0, "ok"), ("plain", 4096, 1.0, "oom")],
)
def test_the_peak_of_a_step_is_measured_where_its_results_are_right(name, batch, within, status):
    of = case("rc_mae")
    peaks = memory._Peaks(name, of, within, memory._true_norms(of))
    of = dataclasses.replace(of, batch=batch)
    row = memory._row("tiny32", of, name, "peak", peaks(batch), within, _short())
    assert (row["status"], row["match"]) == (status, True if status == "ok" else None)
    if status == "ok":
        assert 0 < row["percent_of_floor"] < 100
        assert row["peak_memory_gib"] == row["y_value_50"] < within
        assert row["error"] < 1e-5


@pytest.mark.parametrize(
    ("most", "per_image", "limit", "found"),
    [(37, 0.1, 5.0, 36), (1234, 0.01, 12.0, 1152), (3, 0.1, 9.0, 3), (0, 0.1, 9.0, 0)],
)
def test_the_largest_batch_is_found_to_an_eighth(most, per_image, limit, found):
    def peak(batch):
        return 1 + per_image * batch if batch <= most else None

    assert memory.find_largest(peak, (2, 4), limit) == found


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_memory_beyond_the_limit_is_refused_and_below_it_given():
    script = """
import torch
from capacity import limited_memory
from fastmim.ops import bias_gelu
from measure import attempt
with limited_memory(torch.device("cpu"), 1.0):
    torch.zeros(2**26)
    assert attempt(torch.zeros, 2**30).status == "oom"
    large = torch.zeros(150_000, 1024)
    assert attempt(bias_gelu, large, torch.zeros(1024)).status == "oom"
    print("refused")
torch.empty(2**29)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=_FOLDER, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize("side", [32, 224])
def test_both_loaders_give_batches_of_the_same_pictures(side, monkeypatch):
    monkeypatch.delenv("FASTMIM_SHARED", raising=False)
    with loader._pictures("data/imagenet-sample", side) as folder:
        assert loader._same_pixels(folder)
        with loader._fastmim(folder, side, 4, 0) as batches:
            assert next(batches).imgs.shape == (4, 3, side, side)
        with loader._pillow(folder, side, 4, 0) as batches:
            made = next(batches)
    assert made.shape == (4, 3, side, side)
    assert made.dtype == torch.float32
    assert made.abs().max() < 3  # normalised


def test_boxes_of_the_pillow_loader_are_within_the_picture():
    crops = loader._PillowCrops([], 32)
    for width, height in ((500, 375), (3, 2), (1, 1), (4000, 10)):
        for _ in range(50):
            left, top, right, bottom = crops._box(width, height)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
