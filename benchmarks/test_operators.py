"""Micro-benchmarks of the operators: ``pytest benchmarks/ --benchmark-only``.

The cases are those of the suite ``ops``, at the size that it takes by default; here they are timed
one by one by pytest-benchmark, which keeps and compares runs (``--benchmark-autosave``,
``--benchmark-compare``).
"""

import pytest
import torch
from measure import synchronize
from ops import DEFAULT, SHAPES, TOLERANCE, errors_of, problems, programs_of

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = SHAPES[DEFAULT[DEVICE.type][0]]
PROBLEMS = {f"{p.operator} {p.case}".strip(): p for p in problems(SIZES, DEVICE)}
CASES = [
    (case, name)
    for case, problem in PROBLEMS.items()
    for name in programs_of(problem, DEVICE, compiled=False)
]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_operator(benchmark, case, name):
    problem = PROBLEMS[case]
    program = programs_of(problem, DEVICE, compiled=False)[name]
    assert errors_of(problem, {name: program}, SIZES.dtype)[name] <= TOLERANCE[SIZES.dtype]

    def timed():
        program()
        synchronize(DEVICE)

    benchmark.group = case
    benchmark(timed)
