"""Packages recipes/ as ``sj_robust.recipes``, builds the compiled CPU kernels when there is a
compiler, and installs without them when there is none.

The library has a plain C interface and is loaded with ctypes: it depends on no Python and no torch
version, so the wheel is tagged ``py3-none-PLATFORM``. All other metadata stands in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_OPS = Path("sj_robust", "ops")
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    # Spikes must equal plain torch bit for bit: no fused multiply-add, no reordering, whatever
    # CXXFLAGS ask for.
    "-ffp-contract=off",
    "-fno-fast-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=hidden",
    "-pthread",
]
_LINK = [
    "-pthread",
    *(["-ldl"] if sys.platform == "linux" else []),
]  # before glibc 2.34 dlsym is a library of its own


class BuildKernels(build_ext):
    """Gives the library one name on every system, since no Python imports it."""

    def get_ext_filename(self, ext_name: str) -> str:
        """Path of the library below the build folder."""
        return str(Path(*ext_name.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Nothing beyond what the source marks: there is no module initialisation to export."""
        return list(ext.export_symbols)


class KernelWheel(bdist_wheel):
    """Tags the wheel for the platform, not for a Python; for any platform where the kernels were
    not built.
    """

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform tag."""
        built = any(Path(self.bdist_dir).glob("**/_kernel.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


_LAB = [f"sj_robust.recipes.{name}" for name in find_packages("recipes")]

setup(
    packages=[*find_packages(include=["sj_robust*"]), "sj_robust.recipes", *_LAB],
    package_dir={"sj_robust.recipes": "recipes"},
    ext_modules=[
        Extension(
            "sj_robust.ops.dlif._kernel",
            sources=[str(_OPS / name / "kernel.cpp") for name in ("dlif", "bn_dlif", "trains")],
            depends=sorted(str(path) for path in _OPS.glob("*/*.h")),
            language="c++",
            extra_compile_args=_FLAGS,
            extra_link_args=_LINK,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": KernelWheel},
)
