"""Compiles the cluster kernels for a Hopper into cubins, with what launching them takes to know.

    python -m benchmarks.gpu.clusters.build build/carry/cubins

Needs Triton >= 3.8 and no GPU: 3.6 and 3.7 fail at reductions across a cluster.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.sass import resource_usage

#: The rows that they are for, and the ids of the two parts of one.
VOCAB, A, B = 151_936, 131_072, 32_768
#: (kernel, programs of a cluster, warps of each). More than 8 programs is beyond what every Hopper
#: promises to schedule.
VARIANTS = (
    ("k1_once", 8, 16), ("k1_once", 8, 8), ("k1_once", 4, 16), ("jsd_once", 8, 32),
    ("jsd_once", 16, 16), ("jsd_once", 16, 32),
)  # fmt: skip
LEAST = (3, 8)


def why_not() -> str | None:
    """Why no cubins can be made here; None where they can."""
    try:
        import triton
    except ImportError:
        return f"triton is not installed; cluster kernels want {LEAST[0]}.{LEAST[1]} or later"
    version = tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:2])
    if version < LEAST:
        return f"Triton {triton.__version__}; cluster kernels want {LEAST[0]}.{LEAST[1]} or later"
    return None


def build(folder: Path, variants=VARIANTS) -> list[dict]:
    """Writes cubins and `cubins.json`, and returns what that says of each."""
    from triton import compile as compiled_by
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.gpu.clusters.kernels import KERNELS, SIGNATURES

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.cubin"):
        old.unlink()
    made = []
    for name, programs, warps in variants:
        runtime = SIGNATURES[name]
        source = ASTSource(
            KERNELS[name], runtime | {"A": "constexpr", "B": "constexpr"},
            constexprs={(len(runtime),): A, (len(runtime) + 1,): B},
            # Rows begin at multiples of 16 bytes, and so do their sizes.
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(runtime))},
        )  # fmt: skip
        options = {"num_ctas": programs, "num_warps": warps, "enable_fp_fusion": True}
        kernel = compiled_by(source, target=GPUTarget("cuda", 90, 32), options=options)
        file = folder / f"{name}_{programs}x{warps}.cubin"
        file.write_bytes(kernel.asm["cubin"])
        made.append({
            "file": file.name, "kernel": name, "entry": kernel.metadata.name,
            "programs": programs, "threads": 32 * warps, "shared": kernel.metadata.shared,
            "parameters": len(_parameters(kernel.asm["ptx"])),
            "fixes_cluster": ".reqnctapercluster" in kernel.asm["ptx"],
            **resource_usage(str(file)),
        })  # fmt: skip
    (folder / "cubins.json").write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    return made


def _parameters(ptx: str) -> list[str]:
    """Of the entry: those named above, and pointers of Triton's own, which stay null."""
    return re.findall(r"\.param \.(\S+)", ptx.split(".visible .entry")[1].split(")")[0])


def main() -> int:
    (folder,) = sys.argv[1:] or ["build/carry/cubins"]
    reason = why_not()
    if reason:
        print(f"cubins: none made: {reason}", file=sys.stderr)
        return 1
    for one in build(Path(folder)):
        print(f"{one['file']}: {one['registers']} registers, {one['spills']} bytes spilled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
