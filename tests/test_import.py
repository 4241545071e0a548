"""Importing the library needs no Triton, no GPU and no compiled extension, and loads none."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAIN = (
    "import torch\n"
    "model = fastmim.create_model('mae_vit_micro_patch4', embed_dim=64, depth=1)\n"
    "method = fastmim.RCMAE(model)\n"
    "method(torch.randn(2, 3, 32, 32)).total.backward()\n"
    "method.update_teacher()\n"
)


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_triton_nor_kernels_nor_extension():
    loaded = run("import sys, fastmim, fastmim.compat.models_rc; print(*sys.modules)").split()
    heavy = {"triton", "fastmim.kernels", "fastmim._C", "torch._inductor", "torch._dynamo"}
    import_of_torch = set(run("import sys, torch; print(*sys.modules)").split())
    assert not heavy & (set(loaded) - import_of_torch)


@pytest.mark.parametrize("hidden", ["triton", "fastmim._C", "fastmim.kernels"])
def test_works_without(hidden):
    run(f"import sys\nsys.modules['{hidden}'] = None\nimport fastmim\n{TRAIN}")


def test_says_that_the_extension_is_hidden():
    said = run(
        "import sys\nsys.modules['fastmim._C'] = None\nimport fastmim, torch\n"
        "print(fastmim.OPS['ema_update_'].unavailable('cpp', torch.device('cpu')))"
    )
    assert "extension" in said


def test_says_that_triton_is_missing():
    said = run(
        "import sys\nsys.modules['triton'] = None\nimport fastmim, torch\n"
        "print(fastmim.OPS['gather_tokens'].unavailable('triton', torch.device('cuda')))"
    )
    assert "triton is not installed" in said


def test_kernels_folder_refuses_its_bare_name():
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport kernels"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "ImportError: this folder is the package fastmim.kernels" in done.stderr
