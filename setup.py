"""Builds the native module `vamoh._native`; everything else about the package stands in pyproject.toml.

VAMOH_NATIVE=auto (default): without a working C++ compiler the package installs without it and runs on plain torch.
VAMOH_NATIVE=1: a failed build is an error. VAMOH_NATIVE=0: do not build.
"""

import os
import runpy
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# No -march=native: kernels for several instruction sets are in one binary. No fast-math and no contraction to fused
# multiply-add: all of them must round alike.
FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"]


class BuildNative(build_ext):
    """Says in plain words what a failed optional build means."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension; a failure is explained and passed on, setuptools ignores it if `ext.optional`."""
        try:
            super().build_extension(ext)
        except Exception:
            self.warn(
                f"{ext.name} could not be built (is there a C++17 compiler? CXX={os.environ.get('CXX', 'not set')}). "
                + ("vamoh will run on plain torch." if ext.optional else "VAMOH_NATIVE=1 makes this an error.")
            )
            raise


def native_extensions() -> list[Pybind11Extension]:
    """The extension that VAMOH_NATIVE asks for, or none."""
    mode = os.environ.get("VAMOH_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"VAMOH_NATIVE must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return []
    version = runpy.run_path(os.path.join("vamoh", "_version.py"))["__version__"]
    return [
        Pybind11Extension(
            "vamoh._native",
            sorted([*glob("csrc/bindings/*.cpp"), *glob("csrc/cpu/*.cpp")]),
            depends=sorted(["setup.py", *glob("csrc/**/*.h", recursive=True), *glob("csrc/**/*.inl", recursive=True)]),
            define_macros=[("VAMOH_VERSION", f'"{version}"'), ("VAMOH_FLAGS", '"' + " ".join(FLAGS) + '"')],
            extra_compile_args=FLAGS,
            cxx_std=17,
            extra_link_args=["-pthread"],
            optional=mode == "auto",
        )
    ]


ParallelCompile(default=0).install()
setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildNative})
