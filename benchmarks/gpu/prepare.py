"""What travels to the machine with the GPU, made where there is a network and Triton >= 3.8.

    python -m benchmarks.gpu.prepare [build/carry]

`wheels`: the baselines in pure Python, as `tropd bench` pins them, 4 MB; imported here once, with
the stub for `datasets` that the GPU's machine will use. `cubins`: the cluster kernels, 0.6 MB. If
one of the two fails the other is made all the same, and `python -m benchmarks.gpu` runs without
them. git ignores `build/`: where only tracked files travel, name another folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu import baselines

#: Providers of `benchmarks.bench` that are pure Python, and what each imports.
BASELINES = {
    "trl": ("trl.kernels", "trl.kernels.chunked_divergence"),
    "liger": ("liger_kernel.chunked_loss", "liger_kernel.ops.fused_linear_jsd"),
    "fla": ("fla.modules.fused_kl_div",),
    "cce": ("cut_cross_entropy",),
}
#: The Python of the machine with the GPU.
PYTHON = "3.12"
#: Imports each module; without a GPU, what looks for one finds Triton's interpreter.
CHECK = """
import importlib, importlib.metadata, os, sys
os.environ.setdefault("TRITON_INTERPRET", "1")
version = importlib.metadata.version
def without_datasets(name):
    if name == "datasets":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = without_datasets
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        print(f"  {name}: ok" if "/site/" in module.__file__ else f"  {name}: not from the wheel")
    except Exception as error:
        print(f"  {name}: {type(error).__name__}: {error}")
"""


def requirements() -> list[str]:
    """With the versions that `tropd bench` names where one is not installed."""
    from benchmarks.bench.providers import PROVIDERS

    words = " ".join(PROVIDERS[name].install for name in BASELINES).split()
    return list(dict.fromkeys(word for word in words if not word.startswith("-")))


def download(folder: Path) -> str | None:
    """Why it failed, in a line; None where every wheel is there. Older ones are replaced, for two
    versions of one would be unpacked over each other."""
    with tempfile.TemporaryDirectory() as fresh:
        command = [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
            "--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation",
            "py", "--platform", "any", "--dest", fresh, *requirements(),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        if done.returncode:
            lines = [x for x in done.stderr.splitlines() if x.startswith("ERROR")]
            return (lines or done.stderr.splitlines() or ["pip said nothing"])[-1]
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in Path(fresh).glob("*.whl"):
            shutil.move(wheel, folder / wheel.name)
    return None


def imported(carried: Path) -> str:
    """What importing each baseline from its wheel says here, a line each."""
    with tempfile.TemporaryDirectory() as unpacked:
        environment = baselines.environment(carried, Path(unpacked))
        paths = [str(baselines.STUBS), environment["PYTHONPATH"]]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        names = [name for modules in BASELINES.values() for name in modules]
        done = subprocess.run(
            [sys.executable, "-c", CHECK, *names], cwd=ROOT, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
    return done.stdout or f"  no import could be tried: {done.stderr[-300:]}"


def main() -> int:
    (given,) = sys.argv[1:] or ["build/carry"]
    carried, failed = Path(given).resolve(), False
    reason = download(carried / "wheels")
    if reason:
        print(f"wheels: {reason}")
        failed = True
    print(imported(carried), end="")
    if importlib.util.find_spec("triton") is None:
        print("cubins: none made: triton is not installed")
        return 1
    command = [sys.executable, "-m", "benchmarks.gpu.clusters.build", str(carried / "cubins")]
    # The interpreter compiles nothing.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    size = sum(file.stat().st_size for file in carried.rglob("*") if file.is_file())
    print(f"{carried}: {size / 1e6:.1f} MB")
    return 1 if failed or status else 0


if __name__ == "__main__":
    sys.exit(main())
