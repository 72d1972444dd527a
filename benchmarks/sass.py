"""A kernel's cubin, read by the tools that ship with Triton: registers and spills, and of its
machine code (SASS) the innermost loops, what they read, and the pipes that they issue to."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

#: Pipes of an SM, by the opcodes that issue to them. LDG and STG read and write global memory; MUFU
#: is the unit of exponentials, logarithms and reciprocals; UNIFORM computes once for a warp, as all
#: opcodes that begin with U do. The rest issue to the ALU.
PIPES = {
    "FMA": ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "IMAD", "HFMA2"),
    "FP64": ("DADD", "DMUL", "DFMA", "DSETP"),
    "MUFU": ("MUFU", "F2F", "F2I", "I2F", "POPC"),
    "LDG": ("LDG",),
    "STG": ("STG",),
    "LSU": ("LDS", "STS", "LDL", "STL", "LDC", "SHFL", "REDUX", "LDSM", "STSM"),
    "BRANCH": ("BRA", "BSSY", "BSYNC", "BREAK", "BAR", "EXIT", "CALL", "RET", "WARPSYNC", "NOP"),
    "UNIFORM": ("R2UR", "S2UR", "S2R", "LDCU"),
}


@dataclass(frozen=True)
class Loop:
    """Of one pass of a loop: its instructions, and among them those that read global memory, and by
    16 bytes; that make threads wait for each other, that pass numbers between them, and that read
    or write local memory. row_bits: what a thread reads of global memory, by 8 bytes or more at a
    time, as it reads rows. pipes: instructions by `PIPES`. ids: of rows that a thread reads."""

    instructions: int
    loads: int
    wide_loads: int
    barriers: int
    exchanges: int
    local: int
    row_bits: int
    pipes: dict[str, int]
    ids: float = 0.0


def nvidia_tool(name: str, *arguments: str) -> str:
    """What `cuobjdump` or `nvdisasm` prints."""
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def resource_usage(cubin: str) -> dict[str, int]:
    """Registers a thread, and bytes of local memory a thread, which spills take."""
    text = nvidia_tool("cuobjdump", "--dump-resource-usage", cubin)
    number = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": number["REG"], "spills": number["STACK"] + number["LOCAL"]}


def loops_of(sass: str) -> list[Loop]:
    """Each innermost loop: from a label to a branch back to it, with no other such between. Nor an
    exit: what is seldom needed lies behind that, and jumps back from there."""
    code: list[str] = []
    labels: dict[str, int] = {}
    spans = []
    last_exit = -1
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ +)?(.+?);", line):
            predicate, instruction = found.groups()
            to = re.match(r"BRA\b.*`\((\.L_x_\d+)\)", instruction)
            if to and labels.get(to[1], -1) > last_exit:
                spans.append((labels[to[1]], len(code)))
            if instruction.startswith("EXIT") and not predicate:
                last_exit = len(code)
            code.append(instruction)
    inner = [
        (low, high) for low, high in spans
        if not any(low <= a and b <= high and (a, b) != (low, high) for a, b in spans)
    ]  # fmt: skip
    return [_loop(code[low : high + 1]) for low, high in inner if high > low]


def _loop(code: list[str]) -> Loop:
    count = Counter(instruction.split()[0].split(".")[0] for instruction in code)
    pipes: Counter[str] = Counter()
    for opcode, n in count.items():
        pipes[pipe_of(opcode)] += n
    loads = (re.match(r"LDG\.E((?:\.\w+)*)", instruction) for instruction in code)
    return Loop(
        instructions=len(code),
        loads=count["LDG"],
        wide_loads=sum(re.match(r"LDG\.E\S*\.128", line) is not None for line in code),
        barriers=count["BAR"],
        exchanges=count["SHFL"] + count["REDUX"],
        local=count["LDL"] + count["STL"],
        row_bits=sum(n for n in (_ldg_bits(m[1].split(".")) for m in loads if m) if n >= 64),
        pipes=dict(pipes),
    )


def pipe_of(opcode: str) -> str:
    named = (pipe for pipe, opcodes in PIPES.items() if opcode in opcodes)
    return next(named, "UNIFORM" if opcode.startswith("U") else "ALU")


def load_bits(sass: str) -> Counter[int]:
    """Instructions that read global memory, by bits a thread."""
    modifiers = re.findall(r"\bLDG\.E((?:\.\w+)*)", sass)
    return Counter(_ldg_bits(m.split(".")) for m in modifiers)


def _ldg_bits(modifiers: list[str]) -> int:
    named = [re.fullmatch(r"[US]?(8|16|64|128|256)", m) for m in modifiers]
    return next((int(m[1]) for m in named if m), 32)


def mix_of(loop: Loop) -> str:
    """Instructions an id, by pipe."""
    order = ["FMA", "ALU", *(pipe for pipe in PIPES if pipe != "FMA")]
    shares = "  ".join(f"{p} {loop.pipes[p] / loop.ids:.1f}" for p in order if p in loop.pipes)
    return f"{loop.instructions / loop.ids:.1f} instructions an id: {shares}"
