"""Packages recipes/ as ``sj_robust.recipes``, builds the compiled CPU kernels when there is a
compiler, and installs without them when there is none.

The library has a plain C interface and is loaded with ctypes: it depends on no Python and no torch
version, so the wheel is tagged ``py3-none-PLATFORM``. All other metadata stands in pyproject.toml.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.modified import newer_group

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


class BuildRecipes(build_py):
    """Adds recipes/ to what is built. An editable installation finds them in the clone, and without
    them its packages lie as they are imported: then a path to the clone makes it known to Python,
    editors and type checkers alike, in place of an import hook, which only Python follows.
    """

    def run(self) -> None:
        """Build the packages."""
        if not self.editable_mode:
            lab = [f"sj_robust.recipes.{name}" for name in find_packages("recipes")]
            self.packages = [*self.packages, "sj_robust.recipes", *lab]
            self.package_dir["sj_robust.recipes"] = "recipes"
        super().run()


class BuildKernels(build_ext):
    """Gives the library one name on every system, since no Python imports it; an editable
    installation takes the library that an earlier one left, unless something changed since.
    """

    def build_extension(self, ext: Extension) -> None:
        """Compile, or take what is there."""
        left = self.get_ext_filename(ext.name)
        sources = [*ext.sources, *ext.depends, __file__]
        if self.editable_mode and not newer_group(sources, left):
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(left, target)
        else:
            super().build_extension(ext)

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


setup(
    packages=find_packages(include=["sj_robust*"]),
    package_dir={"": "."},  # said aloud, for the path of an editable installation
    ext_modules=[
        Extension(
            "sj_robust.ops.dlif._kernel",
            sources=[str(_OPS / name / "kernel.cpp") for name in ("dlif", "trains")],
            depends=sorted(str(path) for path in _OPS.glob("*/*.h")),
            language="c++",
            extra_compile_args=_FLAGS,
            extra_link_args=_LINK,
            optional=True,
        )
    ],
    cmdclass={
        "build_py": BuildRecipes,
        "build_ext": BuildKernels,
        "bdist_wheel": KernelWheel,
    },
)
