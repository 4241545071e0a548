"""The device under test, fixed seeds, and the authors' recorded vectors."""

import importlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

# Without a GPU the Triton kernels run in the interpreter.
# The variable must be set before triton is first imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests import interpreter_bf16

        interpreter_bf16.install()
# A shell's background job ignores Ctrl-C, and what it starts does so too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The tensors are tiny: on a busy machine threads waiting for each other cost ten times the work.
torch.set_num_threads(1)

# The longest files, which begin first: with --dist loadfile everything waits for the last one.
_LONG = (
    "test_ops.py", "test_distributed.py", "test_benchmark_peers.py", "test_benchmarks.py",
    "test_trainer.py", "test_cli.py", "test_build.py", "test_compile.py", "test_fuzz.py",
    "test_convert.py", "test_train_engine.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist's own order is by the number of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(_LONG)))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_file():
    """Loads a file of ``tests/golden``: name to its tensors."""
    folder = Path(__file__).parent / "golden"
    return lambda name: load_file(folder / f"{name}.safetensors")


def benchmark_module(name: str) -> ModuleType:
    """A module of the folder benchmarks, which is no package."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)  # its modules import each other by name
    return importlib.import_module(name)
