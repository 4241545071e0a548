"""What is shipped: the source archive, its wheel, and its wheel without a compiler."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    *("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "constraints.txt"),
    *("README.md", "CHANGELOG.md", "LICENSE", "csrc", "kernels", "fastmim", "tests"),
)
BUILD_SDIST = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"


def tool_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTMIM_", "PYTHON"))}
    env |= {"PATH": tool_path()} | variables
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def build_wheel(sdist: Path, target: Path, **variables: str) -> tuple[Path, str]:
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps")
    done = run(*command, "-w", str(target), str(sdist), cwd=target.parent, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("fastmim-*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy: a build writes into its source, and others may be using the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout) -> Path:
    # Not find_spec: looking for pip switches off setuptools' distutils for the whole process.
    installed = {d.name for d in importlib.metadata.distributions()}
    missing = sorted({"setuptools", "pybind11", "pip"} - installed)
    missing += [p for p in ("cmake", "ninja") if shutil.which(p, path=tool_path()) is None]
    if missing:
        pytest.skip(f"cannot build: {', '.join(missing)} not installed")
    done = run(sys.executable, "-c", BUILD_SDIST, cwd=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout / "dist" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    return build_wheel(sdist, target, FASTMIM_CUDA="0", FASTMIM_REQUIRE_EXTENSION="1")[0]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def files(folder: Path, pattern: str) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob(pattern) if p.is_file()}


def test_wheel_has_every_module_of_the_checkout_and_nothing_else(checkout, installed):
    expected = {f"fastmim/{f}" for f in files(checkout / "fastmim", "*.py")}
    expected |= {f"fastmim/kernels/{f}" for f in files(checkout / "kernels", "*.py")}
    assert files(installed, "*.py") == expected
    top = {p.name for p in installed.iterdir() if p.suffix != ".dist-info"}
    assert top == {"fastmim"}  # no top-level kernels, no tests


def test_wheel_has_the_data(checkout, installed):
    expected = {f"fastmim/{f}" for f in files(checkout / "fastmim", "*.npz")}
    assert files(installed, "*.npz") == expected


def test_wheel_loads_its_compiled_part(installed):
    code = (
        "import fastmim._C as c, fastmim.kernels as k, torch;"
        "torch.ops.fastmim_native.ema_update_.default;"
        "print(c.__file__, k.__file__, c.build_info()['cuda'])"
    )
    done = run(sys.executable, "-c", code, cwd=installed.parent, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    extension, kernels, cuda = done.stdout.split()
    assert Path(extension).parent == installed / "fastmim"
    assert Path(kernels).parent == installed / "fastmim" / "kernels"
    assert cuda == "None"


def test_operators_need_only_the_stable_abi(installed):
    library = installed / "fastmim" / "_ops.so"
    nm = run("nm", "-D", "--undefined-only", "--demangle", str(library), cwd=installed)
    symbols = [line.split(maxsplit=1)[1] for line in nm.stdout.splitlines()]
    assert "aoti_torch_get_numel" in symbols
    unstable = ("c10::", "at::", "torch::", "Py", "_Py", "cuda", "cudart")
    assert not [s for s in symbols if s.startswith(unstable)]
    binary = library.read_bytes()
    assert b"site-packages" not in binary
    assert str(ROOT).encode() not in binary


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(sdist, tmp_path):
    target = tmp_path / "wheel"
    target.mkdir()
    wheel, output = build_wheel(sdist, target, CXX="/nonexistent", FASTMIM_CUDA="auto")
    assert "the compiled part of fastmim was NOT built" in output
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastmim/kernels/__init__.py" in names
    assert not [n for n in names if n.endswith(".so")]
