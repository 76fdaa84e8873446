"""Builds the native module `vamoh._native`; everything else about the package stands in pyproject.toml.

VAMOH_NATIVE=auto (default): without a working C++ compiler the package installs without it and runs on plain torch.
VAMOH_NATIVE=1: a failed build is an error. VAMOH_NATIVE=0: do not build.
VAMOH_CUDA=auto (default): CUDA kernels are part of it where nvcc works. VAMOH_CUDA=1: a failure is an error.
VAMOH_CUDA=0: leave them out. CUDA_HOME says where the toolkit is; else PATH and /usr/local are searched.
"""

import os
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# No -march=native: kernels for several instruction sets are in one binary. No fast-math and no contraction to fused
# multiply-add: all of them must round alike.
FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"]

# Machine code for compute capability 8.x and 9.0, and PTX that newer drivers translate.
CUDA_TARGETS = ["sm_80", "sm_90", "compute_90"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden,-g0,-Wall,-Wextra"]
CUDA_BINDING = "csrc/bindings/cuda.cpp"


def choice(variable: str) -> str:
    """Value of an environment variable that must be auto, 0 or 1."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} must be auto, 0 or 1, got {value!r}")
    return value


def find_nvcc() -> str | None:
    """Path of nvcc: in CUDA_HOME alone if that is set, else in PATH or the newest toolkit in /usr/local."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    versions = sorted(glob("/usr/local/cuda-*"), key=lambda p: [int(n) for n in re.findall(r"\d+", p)], reverse=True)
    toolkits = [f"{folder}/bin" for folder in ("/usr/local/cuda", *versions)]
    return shutil.which("nvcc", path=os.pathsep.join([*os.get_exec_path(), *toolkits]))


def cuda_libraries(nvcc: str) -> list[str]:
    """Folders of the CUDA libraries; nvcc may be a script or a link to elsewhere, so it is asked."""
    result = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=True)
    lines = [line for line in result.stderr.splitlines() if "LIBRARIES=" in line]
    return re.findall(r"-L([^\"\s]+)", lines[0]) if lines else []


class BuildNative(build_ext):
    """Compiles CUDA kernels with nvcc, and says in plain words what a failed optional build means."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension; a failure is explained and passed on, setuptools ignores it if `ext.optional`."""
        try:
            self.add_cuda(ext)
            super().build_extension(ext)
        except Exception:
            self.warn(
                f"{ext.name} could not be built (is there a C++17 compiler? CXX={os.environ.get('CXX', 'not set')}). "
                + ("vamoh will run on plain torch." if ext.optional else "VAMOH_NATIVE=1 makes this an error.")
            )
            raise

    def add_cuda(self, ext: Pybind11Extension) -> None:
        """Compile csrc/cuda and add it to the extension, as VAMOH_CUDA asks."""
        mode = choice("VAMOH_CUDA")
        nvcc = None if mode == "0" else find_nvcc()
        if nvcc is None:
            if mode == "1":
                raise SystemExit("VAMOH_CUDA=1 needs nvcc, which is not in CUDA_HOME, PATH or /usr/local/cuda")
            return
        try:
            version = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))
            libraries = cuda_libraries(nvcc)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = [*pool.map(lambda source: self.compile_cuda(nvcc, source), sorted(glob("csrc/cuda/*.cu")))]
        except (OSError, subprocess.CalledProcessError) as error:
            if mode == "1":
                raise SystemExit(f"VAMOH_CUDA=1, but the CUDA kernels could not be compiled: {error}") from None
            self.warn(f"CUDA kernels could not be compiled ({error}); vamoh will have none.")
            return
        ext.sources.append(CUDA_BINDING)
        ext.extra_objects += objects
        built = f"{version[1] if version else nvcc} for {', '.join(CUDA_TARGETS)}"
        ext.define_macros.append(("VAMOH_CUDA", f'"{built}"'))
        ext.library_dirs += libraries
        ext.libraries += ["cudart_static", "dl", "rt"]
        # The runtime inside must not mix with the one that torch brings along.
        ext.extra_link_args.append("-Wl,--exclude-libs,ALL")

    def compile_cuda(self, nvcc: str, source: str) -> str:
        """Compile one file and return the object file."""
        target = Path(self.build_temp, source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        generate = [f"-gencode=arch=compute_{t.split('_')[1]},code={t}" for t in CUDA_TARGETS]
        subprocess.run([nvcc, *CUDA_FLAGS, *generate, "-c", source, "-o", str(target)], check=True)
        return str(target)


def native_extensions() -> list[Pybind11Extension]:
    """The extension that VAMOH_NATIVE asks for, or none."""
    mode = choice("VAMOH_NATIVE")
    choice("VAMOH_CUDA")
    if mode == "0":
        return []
    version = runpy.run_path(os.path.join("vamoh", "_version.py"))["__version__"]
    headers = [p for kind in ("h", "inl", "cu", "cuh") for p in glob(f"csrc/**/*.{kind}", recursive=True)]
    return [
        Pybind11Extension(
            "vamoh._native",
            sorted({*glob("csrc/bindings/*.cpp"), *glob("csrc/cpu/*.cpp")} - {CUDA_BINDING}),
            depends=sorted(["setup.py", CUDA_BINDING, *headers]),
            define_macros=[("VAMOH_VERSION", f'"{version}"'), ("VAMOH_FLAGS", '"' + " ".join(FLAGS) + '"')],
            extra_compile_args=FLAGS,
            cxx_std=17,
            extra_link_args=["-pthread"],
            optional=mode == "auto",
        )
    ]


ParallelCompile(default=0).install()
setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildNative})
