"""Builds csrc/ where that is possible, and nothing else: the metadata is in pyproject.toml.

TROPD_BUILD_EXT=auto  builds where csrc/ has sources, and torch and a compiler that takes them are
                      there; otherwise makes a pure wheel and says so in one line (the default)
TROPD_BUILD_EXT=0     makes a pure wheel
TROPD_BUILD_EXT=1     builds or fails, saying why
TROPD_SANITIZE=1      builds with GCC's address and undefined-behaviour sanitizers, and AMX emulated
                      (csrc/tiles.h), to be tested and never to be installed: the library loads only
                      into a process that preloads libasan (`make sanitize`)

The choice falls before the build starts, because Extension(optional=True) leaves a platform tag on
a wheel without a library in it. The GPU is never looked at. torch is found only where the build
sees it: `pip install --no-build-isolation .` ninja, where it is installed, compiles in parallel.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from importlib import metadata
from importlib.util import find_spec

from setuptools import setup

TORCH_TARGET = (2, 10)  # libtorch's stable ABI as of this version: runs with every later one
PYTHON_TARGET = "cp310"  # Python's limited API as of this version

# No -march=native: a wheel runs on machines that did not build it; kernels for AVX2 and AVX-512 are
# picked at run time. No -ffast-math: infinities and NaNs mean something here.
COMPILE_FLAGS = [
    "-std=c++17",
    "-Wall",
    "-Werror=switch",  # a divergence without a formula in csrc/row_generators.h
    "-Wno-psabi",
    "-Wno-unknown-warning-option",  # Clang does not know the next one
    "-Wno-maybe-uninitialized",
    f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000",
]
OPTIMIZED = ["-O3", "-g0"]
SANITIZED = [
    "-fsanitize=address,undefined",
    "-DTROPD_EMULATE_AMX",  # what packs and stores AMX's tiles, on CPUs without them too
    "-fno-omit-frame-pointer",
    "-fno-sanitize-recover=undefined",
    "-fno-wrapv",  # against Python's -fwrapv, with which a signed overflow is no error
    "-O1",
    # These take the time to compile down to a third: line numbers alone, checks as calls, and null
    # pointers left to the hardware.
    "-g1",
    "--param=asan-instrumentation-with-call-threshold=0",
    "-fno-sanitize=null",
]


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
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler {compiler[0]!r} (CXX chooses another)"
    return None


def compile_error(sources: list[str]) -> str | None:
    """The compiler's first complaint, from a look at the syntax alone, which takes seconds."""
    (torch_folder,) = find_spec("torch").submodule_search_locations
    command = [
        *shlex.split(os.environ.get("CXX", "c++")), *shlex.split(os.environ.get("CXXFLAGS", "")),
        "-fsyntax-only", "-w", "-DPy_LIMITED_API", *COMPILE_FLAGS,
        f"-I{torch_folder}/include",
        *sources,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return f"{command[0]} fails: {(errors or ['it says nothing'])[0]}"


def without_amx() -> list[str]:
    """What leaves AMX out where the assembler does not know it (binutils before 2.35)."""
    with tempfile.TemporaryDirectory() as folder:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        command = [*compiler, "-xc++", "-c", "-", "-o", f"{folder}/probe.o"]
        done = subprocess.run(command, input='asm("tilerelease");', capture_output=True, text=True)
    return [] if done.returncode == 0 else ["-DTROPD_NO_AMX"]


def switch(name: str, *values: str) -> str:
    """What the environment says, the first of the values where it says nothing."""
    value = os.environ.get(name, values[0])
    if value not in values:
        allowed = f"{', '.join(values[:-1])} or {values[-1]}"
        raise SystemExit(f"{name} must be {allowed}, got {value!r}")
    return value


def extension(sources: list[str], sanitize: bool) -> dict:
    """setup()'s arguments for tropd_kernels/_C.abi3.so."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # Where the environment is not activated, its ninja is not on the path.
    os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + os.path.dirname(sys.executable)
    library = CppExtension(
        "tropd_kernels._C",
        sources,
        depends=glob("csrc/*.h"),
        py_limited_api=True,
        extra_compile_args=COMPILE_FLAGS + without_amx() + (SANITIZED if sanitize else OPTIMIZED),
        extra_link_args=SANITIZED[:1] if sanitize else [],
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TARGET}},
    }


def arguments() -> dict:
    """Decides whether csrc/ is built."""
    wanted = switch("TROPD_BUILD_EXT", "auto", "0", "1")
    sanitize = switch("TROPD_SANITIZE", "0", "1") == "1"
    sources = sorted(glob("csrc/*.cpp"))
    obstacle = "TROPD_BUILD_EXT=0" if wanted == "0" else why_not(sources)
    if obstacle is None and wanted == "auto":
        obstacle = compile_error(sources)
    if obstacle is None:
        return extension(sources, sanitize)
    if wanted == "1":
        raise SystemExit(f"TROPD_BUILD_EXT=1, but csrc/ cannot be built: {obstacle}")
    print(f"tropd-kernels: pure Python, no native CPU kernels: {obstacle}", file=sys.stderr)
    return {}


setup(**arguments())
