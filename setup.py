"""Builds the core, hybridcache._core, from every C++ file in csrc/. All other metadata stands in
pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "hybridcache._core",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            cxx_std=20,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
