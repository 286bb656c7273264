"""Compiles the native kernels into the wheel, if there is a compiler; everything else stands in pyproject.toml.

The library is loaded with ctypes, so one wheel serves every Python. Without a compiler, or where it fails, the wheel is
pure, and the kernels are built at first use (specdec/kernels/native/build.py).
"""

import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = "specdec/kernels/native"
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")


class BuildWithKernels(build_py):
    library: Path | None = None

    def run(self) -> None:
        super().run()
        for earlier in Path(self.build_lib, NATIVE).glob("kernels-*"):
            earlier.unlink()
        if not self.editable_mode and sys.platform != "win32" and platform.machine().lower() in MACHINES:
            self.library = self._compile()

    def _compile(self) -> Path | None:
        compiling = runpy.run_path(f"{NATIVE}/compiling.py")
        built = Path(self.build_lib, NATIVE, compiling["packaged_name"]())
        for compiler in filter(None, map(shutil.which, compiling["COMPILERS"])):
            try:
                compiling["compile_library"](compiler, built)
                return built
            except (OSError, subprocess.SubprocessError) as error:
                self.announce(f"no native kernels: {error}", level=4)
        return None


class PlatformWheel(bdist_wheel):
    """For any Python 3, and for one platform where it holds the library."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = self._library is None
        self.distribution.has_ext_modules = lambda: not self.root_is_pure  # decides where files are installed
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self._library is None else ("py3", "none", _platform(tag[2], self._library))

    @property
    def _library(self) -> Path | None:
        return self.get_finalized_command("build_py").library


def _platform(tag: str, library: Path) -> str:
    """manylinux_2_N, N being the newest version of glibc that the library asks for; other platforms as they are."""
    versions = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", library.read_bytes())]
    return re.sub("^linux", f"manylinux_2_{max(versions)}", tag) if versions else tag


commands: dict[str, Any] = {"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel}
setup(cmdclass=commands)
