"""Finds the packages and hands the compiled part to CMake (CMakeLists.txt names its variables)."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
REQUIRED = any(os.environ.get(v) == "1" for v in ("FASTMIM_CUDA", "FASTMIM_REQUIRE_EXTENSION"))
# cmake and ninja may stand beside a Python that was called by its path.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
ENVIRONMENT = {**os.environ, "PATH": SEARCH_PATH}


class CMakeBuild(build_ext):
    """Builds fastmim._C and _ops.so; without a compiler the install goes on as pure Python."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_ops"):  # no Python module: serves every Python, so no ABI tag
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        for extension in self.extensions:  # an earlier build's must not stand in for a failed one
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        try:
            self._cmake()
        except (OSError, subprocess.CalledProcessError) as error:
            if REQUIRED:
                raise
            self.extensions = []  # nothing to copy or to record
            self.warn(
                f"the compiled part of fastmim was NOT built; installing pure Python, which is "
                f"slower. Reason: {error}; see the output above. "
                "FASTMIM_REQUIRE_EXTENSION=1 makes this an error."
            )

    def _cmake(self) -> None:
        build = os.path.abspath(self.build_temp)
        target = os.path.abspath(Path(self.get_ext_fullpath("fastmim._C")).parent)
        jobs = os.environ.get("MAX_JOBS")
        # --fresh: an isolated build leaves paths in the cache that the next build does not have.
        configure = ["--fresh", "-S", str(ROOT), "-B", build, "-G", "Ninja"]
        for arguments in (
            [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
            ["--build", build, *(["--parallel", jobs] if jobs else [])],
            ["--install", build, "--prefix", target],
        ):
            subprocess.run(["cmake", *arguments], check=True, env=ENVIRONMENT)


setup(
    packages=[*find_packages(include=["fastmim", "fastmim.*"]), "fastmim.kernels"],
    # Not a top-level `kernels`: that name belongs to Hugging Face's package.
    package_dir={"fastmim": "fastmim", "fastmim.kernels": "kernels"},
    ext_modules=[Extension("fastmim._C", []), Extension("fastmim._ops", [])],
    cmdclass={"build_ext": CMakeBuild},
)
