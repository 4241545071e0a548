"""Micro-benchmarks of the operators: ``pytest benchmarks/ --benchmark-only``.

The cases are those of the suite ``ops``, at the size that it takes by default, and the smallest of
the suite ``ema``; here they are timed one by one by pytest-benchmark, which keeps and compares runs
(``--benchmark-autosave``, ``--benchmark-compare``).
"""

import ema
import ops
import pytest
import torch
from measure import synchronize
from ops import errors_of, program_of, serving
from problems import Inputs, problems

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ops.SHAPES[ops.DEFAULT[DEVICE.type][0]]
PROBLEMS = {f"{p.operator} {p.case}".strip(): p for p in problems(SIZES, DEVICE)}
CASES = [
    (case, name)
    for case, problem in PROBLEMS.items()
    for name in (*serving(problem.operator, DEVICE), "torch")
]
UPDATED = ema.sizes_of("tiny32")
UPDATES = ema.keys_on(DEVICE, ema.WORDS["op"])


@pytest.mark.parametrize(("case", "name"), CASES)
def test_operator(benchmark, case, name):
    problem = PROBLEMS[case]
    calls = problem.make(Inputs(SIZES, DEVICE))
    program = program_of(name, calls)
    error = errors_of(problem, {name: program}, calls)[name]
    _time(benchmark, case, program, error, problem.tolerance or ops.TOLERANCE[SIZES.dtype])


@pytest.mark.parametrize(("operator", "provider"), UPDATES)
def test_update(benchmark, operator, provider):
    error = ema.errors_of([(operator, provider)], UPDATED, DEVICE)[operator, provider]
    program = ema.State(UPDATED, DEVICE).program(operator, provider)
    _time(benchmark, operator, program, error, ema.TOLERANCE)


def _time(benchmark, group, program, error, tolerance):
    assert isinstance(error, float), error
    assert error <= tolerance

    def timed():
        program()
        synchronize(DEVICE)

    benchmark.group = group
    benchmark(timed)
