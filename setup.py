"""Builds csrc/ where that is possible, and nothing else: the metadata is in pyproject.toml.

TROPD_BUILD_EXT=auto  builds where csrc/ has sources and torch and a compiler are there; otherwise
                      makes a pure wheel and says so in one line (the default)
TROPD_BUILD_EXT=0     makes a pure wheel
TROPD_BUILD_EXT=1     builds or fails, saying why

The choice falls before the build starts, because Extension(optional=True) leaves a platform tag on
a wheel without a library in it. The GPU is never looked at. torch is found only where the build
sees it: `pip install --no-build-isolation .`
"""

import os
import shlex
import shutil
import sys
from glob import glob
from importlib import metadata

from setuptools import setup

TORCH_TARGET = (2, 10)  # libtorch's stable ABI as of this version: runs with every later one
PYTHON_TARGET = "cp310"  # Python's limited API as of this version

# No -march=native: a wheel runs on machines that did not build it; kernels for AVX2 and AVX-512 are
# picked at run time. No -ffast-math: infinities and NaNs mean something here.
COMPILE_FLAGS = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # TORCH_TARGET


def why_not(sources: list[str]) -> str | None:
    """What stands in the way of building, None when nothing does."""
    if not sources:
        return "csrc/ holds no C++ sources"
    if sys.platform == "win32":
        return "csrc/ is built on Linux and macOS only"
    try:
        torch_version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "the build does not see torch (pip install --no-build-isolation lets it)"
    if tuple(int(part) for part in torch_version.split(".")[:2]) < TORCH_TARGET:
        return f"torch is {torch_version}, and {'.'.join(map(str, TORCH_TARGET))} is needed"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r} (CXX chooses another)"
    return None


def extension(sources: list[str]) -> dict:
    """setup()'s arguments for tropd_kernels/_C.abi3.so."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    library = CppExtension(
        "tropd_kernels._C", sources, py_limited_api=True, extra_compile_args=COMPILE_FLAGS
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TARGET}},
    }


def arguments() -> dict:
    """Decides whether csrc/ is built."""
    wanted = os.environ.get("TROPD_BUILD_EXT", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"TROPD_BUILD_EXT must be auto, 0 or 1, got {wanted!r}")
    sources = sorted(glob("csrc/*.cpp"))
    obstacle = "TROPD_BUILD_EXT=0" if wanted == "0" else why_not(sources)
    if obstacle is None:
        return extension(sources)
    if wanted == "1":
        raise SystemExit(f"TROPD_BUILD_EXT=1, but csrc/ cannot be built: {obstacle}")
    print(f"tropd-kernels: pure Python, no native CPU kernels: {obstacle}", file=sys.stderr)
    return {}


setup(**arguments())
