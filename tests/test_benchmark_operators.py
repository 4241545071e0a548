"""Suites ops, ema and attention: every operator has rows, every row is complete and checked."""

import gc
import re

import pytest
import torch

from fastmim.ops import OPS
from tests.conftest import benchmark_module

attention, ema, measure, ops, problems, roofline, suite = (
    benchmark_module(name)
    for name in ("attention", "ema", "measure", "ops", "problems", "roofline", "suite")
)
CPU = torch.device("cpu")
_RATES = {"fp32": 1e11, "bf16": 1e11}
# Operators that have no row of their own, with what is timed in their place.
_INSIDE = {
    "attention_backward": "attention",
    "attention_queries_backward": "attention_queries",
    "attention_varlen_backward": "attention_varlen",
    "bias_gelu_backward": "bias_gelu",
    "linear_weight_grad": "linear",
    "norm_backward": "norm",
    "restore_tokens_backward": "restore_tokens",
}


@pytest.fixture(autouse=True)
def as_where_people_measure(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gc.freeze()  # every program is measured after a collection: let there be little to look at
    yield
    gc.unfreeze()


def _run(module, *operators: str, shapes=("tiny32",), peers=None) -> list[dict]:
    options = suite.Options(
        device=CPU, shapes=shapes, methods=(), dtypes=("fp32",), models=None, batch=None,
        peers=peers, operators=operators or None, images="uint8", compiled=False, rounds=1,
        block_seconds=0.0, seconds=60.0, memory=True,
        ceilings=roofline.Ceilings(copy=1e10, matmul=_RATES), smoke=True, say=lambda text: None,
    )  # fmt: skip
    return list(module.run(options))


def _exhaust(*args, **kwargs):
    raise torch.OutOfMemoryError("planted")


def _after(calls: int, function):
    """The function, until memory is exhausted."""
    turns = iter(range(calls))
    return lambda *args: function(*args) if next(turns, None) is not None else _exhaust()


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (ops, ("tiny32",)),
        (ema, ("tiny32",)),
        (attention, ("cpu17", "cpu65_masked", "cpu_crops")),
    ],
)
def test_every_row_is_complete_and_matches(module, shapes):
    rows = _run(module, shapes=shapes)
    for row in rows:
        assert row.keys() >= suite.EVERY_ROW
        assert (row["status"], row["reason"], row["match"]) == ("ok", None, True)
        assert row["backend"] in ("torch", "cpp", "reference")
        assert row["libraries"] == {}
        assert row["percent_of_floor"] > 0
        assert (row["images_per_second"] is None) == (module is ema)
    assert {row["shape"] for row in rows} == set(shapes)


def test_every_operator_has_a_row():
    timed = {word for module in (ops, ema, attention) for word in module.WORDS["op"]}
    assert timed.isdisjoint(_INSIDE)
    assert timed >= set(_INSIDE.values())
    assert timed | set(_INSIDE) == set(OPS)
    for module in (ops, ema):
        assert {row["kernel_name"] for row in _run(module)} == set(module.WORDS["op"])


def test_where_the_reference_alone_serves_it_has_a_row():
    assert ops.serving("sample_crops", CPU) == ["reference"]
    assert "reference" not in ops.serving("norm", CPU)


@pytest.mark.parametrize("calls", [0, 1, 2, 4])  # of its check, peak, warm-up and timing
@pytest.mark.parametrize(
    ("module", "operator", "shapes"),
    [
        (ops, "norm_linear", ("tiny32",)),
        (ema, "ema_update_", ("tiny32",)),
        (attention, "attention_queries", ("cpu65_masked",)),
    ],
)
def test_a_backend_that_runs_out_of_memory_is_a_row_among_others(
    module, operator, shapes, calls, monkeypatch
):
    program = _after(calls, OPS[operator].implementation("cpp"))
    monkeypatch.setitem(OPS[operator]._loaded, "cpp", program)
    rows = _run(module, shapes=shapes)
    planted = [row for row in rows if row["kernel_name"] == operator and row["backend"] == "cpp"]
    assert [row["status"] for row in planted] == ["oom"] * len(planted) != []
    for row in planted:
        assert (row["y_value_50"], row["error"], row["match"]) == (None, None, None)
        assert "planted" in row["reason"]
        assert row.keys() >= suite.EVERY_ROW
    assert all(row["match"] for row in rows if row not in planted)
    assert len(rows) > len(planted)


@pytest.mark.parametrize(
    ("module", "operator", "shapes"),
    [
        (ops, "norm_linear", ("tiny32",)),
        (ema, "adamw_ema_", ("tiny32",)),
        (attention, "attention", ("cpu17",)),
    ],
)
def test_a_backend_that_fails_is_a_row_that_does_not_match(module, operator, shapes, monkeypatch):
    def wrong(*args):
        raise TypeError("planted")

    monkeypatch.setitem(OPS[operator]._loaded, "cpp", wrong)
    rows = _run(module, operator, shapes=shapes)
    planted = [row for row in rows if row["backend"] == "cpp"]
    assert {(row["status"], row["reason"], row["match"]) for row in planted} == {
        ("failed", "TypeError: planted", False)
    }
    assert all(row["match"] for row in rows if row not in planted)


def test_a_wrong_result_does_not_match(monkeypatch):
    def forgetful(*args):
        pass

    def crooked(qkv, scale):
        return OPS["attention"].implementation("reference")(qkv, 1.01 * scale)

    planted = {
        "scale": lambda x, factor: 1.001 * x * factor,
        "sample_masks": lambda ids, seed, epoch, n: (torch.zeros(2, n, dtype=torch.int64),) * 2,
        "ema_update_": forgetful,
        "attention": crooked,
    }
    for operator, wrong in planted.items():
        monkeypatch.setitem(OPS[operator]._loaded, "cpp", wrong)
    rows = _run(ops, "scale", "sample_masks") + _run(ema, "ema_update_")
    rows += _run(attention, shapes=("cpu17",))
    matched = {(row["kernel_name"], row["backend"]): row["match"] for row in rows}
    assert {operator for operator, by in matched if by == "cpp"} == set(planted)
    for (_, backend), match in matched.items():
        assert match is (backend != "cpp")


def test_inputs_that_do_not_fit_are_rows_of_every_program(monkeypatch):
    monkeypatch.setattr(problems.Inputs, "normal", _exhaust)
    monkeypatch.setattr(ema.State, "__init__", _exhaust)
    monkeypatch.setattr(attention.Sizes, "inputs", _exhaust)
    rows = _run(ops, "scale") + _run(ema) + _run(attention, shapes=("cpu17",))
    assert {row["kernel_provider"] for row in rows if row["suite"] == "ops"} == {"cpp", "torch"}
    assert {row["kernel_name"] for row in rows if row["suite"] == "ema"} == set(ema.WORDS["op"])
    assert {row["kernel_provider"] for row in rows if row["suite"] == "attention"} >= {
        "plain", "sdpa", "fastmim auto"
    }  # fmt: skip
    for row in rows:
        assert row.keys() >= suite.EVERY_ROW
        assert (row["status"], row["match"], row["peak_memory_gib"]) == ("oom", None, None)
        assert row["floor_ms"] > 0
    assert all(row["match"] for row in _run(ops, "sample_masks", "gather_patches"))


def test_without_a_truth_programs_are_timed_and_not_judged(monkeypatch):
    def no_float64(program, given, grad):
        return _exhaust() if grad.dtype == torch.float64 else gradients(program, given, grad)

    gradients = attention._gradients
    monkeypatch.setattr(problems.Calls, "truth", _exhaust)
    monkeypatch.setattr(attention, "_gradients", no_float64)
    rows = _run(ops, "norm", "scale") + _run(attention, shapes=("cpu17",))
    assert len({row["suite"] for row in rows}) == 2
    for row in rows:
        assert (row["status"], row["error"], row["match"]) == ("ok", None, None)
        assert row["y_value_50"] > 0
    monkeypatch.setattr(ema.State, "torch_ema", _exhaust)
    status = {row["kernel_provider"]: row["status"] for row in _run(ema, "ema_update_")}
    assert status == {"torch": "oom", "cpp": "ok", "reference": "ok"}


def test_programs_that_cannot_serve_are_named_once_with_the_reason():
    rows = _run(attention, shapes=("cpu17",))
    assert "GPU" in rows[0]["absent"]["sdpa-cudnn"]
    assert re.search("on cpu|not installed", rows[0]["absent"]["fastmim triton"])
    assert not any("absent" in row for row in rows[1:])
    (first, *_) = _run(attention, shapes=("cpu17",), peers=["plain"])
    assert "sdpa-cudnn" not in first["absent"]


def test_new_problems_agree_with_their_truth_in_float64():
    sizes = ops.SHAPES["tiny32"]._replace(batch=2, dtype=torch.float64)
    for problem in problems.problems(sizes, CPU):
        if problem.operator in ("scatter_tokens", "scale", "norm_linear", "bias_gelu_linear"):
            calls = problem.make(problems.Inputs(sizes, CPU))
            programs = {name: ops.program_of(name, calls) for name in ("reference", "torch")}
            errors = ops.errors_of(problem, programs, calls)
            assert max(errors.values()) < 1e-13


def test_crops_that_leave_the_picture_are_not_ones_that_may_be_drawn():
    sizes = ops.SHAPES["tiny32"]
    problem = next(p for p in problems.problems(sizes, CPU) if p.operator == "sample_crops")
    (boxes,) = problem.make(problems.Inputs(sizes, CPU)).plain()
    assert problem.error_of([boxes], [], ours=False) == 0
    assert problem.error_of([boxes + 30], [], ours=False) == float("inf")
    assert boxes[:, 2:4].float().prod(dim=1).mean() == pytest.approx(0.6 * 36**2, rel=0.15)


def test_pixels_count_in_grey_levels():
    levels = torch.tensor([[3, 250]], dtype=torch.uint8)
    assert problems.grey_levels([levels], [levels.flip(1)]) == 247
