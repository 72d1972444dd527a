"""What the Triton kernels become on GPUs that are not here: a table of registers, spills, shared
memory and load widths.

    python -m benchmarks.cubins                                 every case, for sm_90
    python -m benchmarks.cubins --target hip:gfx942 tropd gkd   two of them, for an MI300X
    python -m benchmarks.cubins --json ...                      one JSON list of `Figures`

"Loops": those that read rows by 16 bytes, as instructions / such loads in one pass, with a "!"
where they make threads wait for each other. Below each kernel, for each of these loops: its
instructions an id that a thread reads, in all and by the pipe that they issue to.

Nothing is described twice: the package's own functions run on meta tensors, which have shapes,
strides and dtypes but no memory, and take every branch that they would take on a GPU. Each launch
goes to Triton's own `JITFunction.run`, as a warm-up, under a driver that claims to be the target:
signature, constants, alignment and options are those that a GPU would be given.

The figures come from the compiled file: `cuobjdump` and `nvdisasm` ship with Triton, and AMD's
assembly states its own. With TRITON_INTERPRET=1 there is nothing to compile: it must not be set.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from unittest import mock

import torch
import torch.fx.experimental._config
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.sass import Loop, load_bits, loops_of, mix_of, nvidia_tool, resource_usage
from tropd_kernels import (
    EOPD,
    GKD,
    MOPD,
    OPD,
    REOPOLD,
    SFT,
    TVOPD,
    Divergence,
    HiddenTeacher,
    Log1pOPD,
    LogitsTeacher,
    PowerOPD,
    SampledTeacher,
    TokenRule,
    TopKJSD,
    TopKTeacher,
    TrOPD,
    distillation_loss,
    linear_distillation_loss,
)
from tropd_kernels.backends import engine_for
from tropd_kernels.loss import dispatch, prepare
from tropd_kernels.loss import loop as chunk_loop
from tropd_kernels.loss.problem import GradNeeds
from tropd_kernels.rows import triton_launch
from tropd_kernels.rows.layout import Stat

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}

#: Operands of which a kernel that walks rows reads a tile at a time.
WALKED = ("student", "teacher", "student_bias", "teacher_bias", "d_logits")

VOCAB = 151_936  # Qwen's: a multiple of 16, so that rows of it are aligned
ODD_VOCAB = 50_257  # GPT-2's: its rows are padded
TOKENS = 512


@dataclass(frozen=True)
class Figures:
    """One compiled kernel.

    cases: that launch it. constants: what it was specialised on, None arguments included.
    tile_bits: what a thread reads of one tile of the rows, of all operands together; 0 where no row
    is walked. fp_fusion: as the launch asked. seconds: of CPU, for compiling; next to nothing where
    Triton's cache had it. registers: a thread. spills: bytes of local memory a thread. shared:
    bytes. loads: instructions that read global memory, by bits a thread, of kernels that walk rows.
    loops: of these, too, on NVIDIA's GPUs, the innermost ones.
    """

    kernel: str
    target: str
    cases: list[str]
    constants: dict[str, object]
    tile_bits: int
    warps: int
    fp_fusion: bool | None
    seconds: float
    registers: int = 0
    spills: int = 0
    shared: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)
    error: str | None = None


# --- calls --------------------------------------------------------------------------------------


def _floats(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _teacher(form: str | None, n: int, vocab_size: int, dtype: torch.dtype, bias: bool):
    if form == "hidden":
        head = _floats(vocab_size, 128, dtype=dtype)
        more = dict(bias=_floats(vocab_size, dtype=dtype), softcap=50.0) if bias else {}
        return HiddenTeacher(_floats(n, 128, dtype=dtype), head, **more)
    if form == "logits":
        return LogitsTeacher(_floats(n, vocab_size, dtype=dtype))
    if form == "top_k":
        ids = torch.empty(n, 64, dtype=torch.int64, device="meta")
        return TopKTeacher(ids, _floats(n, 64), _floats(n))
    return None if form is None else SampledTeacher(_floats(n))


def _call(
    objective, teacher: str | None = "hidden", *, logits: bool = False, n: int = TOKENS,
    vocab_size: int = VOCAB, dtype: torch.dtype = torch.bfloat16, bias: bool = False,
    everything: bool = False, **options,
) -> Callable[[], object]:  # fmt: skip
    """A call of the public functions, with a head (float32 logits) or on logits of `dtype`."""

    def call():
        labels = torch.empty(n, dtype=torch.int64, device="meta")
        given = dict(options)
        if objective.gate == "bernoulli":
            given["uniforms"] = _floats(n)
        if everything:
            given |= dict(
                old_log_probs=_floats(n), token_weight=_floats(n),
                teacher_prefix=torch.empty(n, dtype=torch.bool, device="meta"),
            )  # fmt: skip
        signal = _teacher(teacher, n, vocab_size, dtype, bias)
        given |= dict(ignore_index=None, backend="triton")
        if logits:
            student = _floats(n, vocab_size, dtype=dtype, grad=True)
            return distillation_loss(student, labels, signal, objective, **given)
        head = dict(bias=_floats(vocab_size, dtype=dtype), softcap=30.0) if bias else {}
        return linear_distillation_loss(
            _floats(n, 64, dtype=dtype, grad=True), _floats(vocab_size, 64, dtype=dtype, grad=True),
            labels, signal, objective, **head, **given,
        )  # fmt: skip

    return call


def _column_sums(dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """What a sampled gradient asks of d_logits."""
    rows = engine_for("triton")
    return lambda: rows.column_sums(_floats(TOKENS, VOCAB, dtype=dtype), _floats(2, TOKENS))


_CROSS_ENTROPY = dict(nll_weight=0.1, label_smoothing=0.1, z_loss=1e-4)
#: Calls whose launches are compiled, by name. Launches that come out the same are compiled once.
CASES = {
    "tropd": _call(TrOPD()),
    "tropd_top_k_teacher": _call(TrOPD(), "top_k"),
    "tropd_everything": _call(
        replace(
            TrOPD(gate="expected", top_k_tail="bucket", clip_ratio_low=0.2, clip_ratio_high=0.3,
                  entropy_coef=0.01),
            **_CROSS_ENTROPY,
        ),
        bias=True, everything=True, temperature=0.7,
    ),
    "tropd_top_k_teacher_everything": _call(
        replace(
            TrOPD(gate="expected", top_k_tail="renormalize_both", entropy_coef=0.01),
            **_CROSS_ENTROPY,
        ),
        "top_k", bias=True, everything=True,
    ),
    "tropd_logits": _call(TrOPD(), "logits", logits=True),
    "tropd_odd_vocabulary": _call(TrOPD(), vocab_size=ODD_VOCAB, n=509),
    "tropd_one_token": _call(TrOPD(), n=1),
    "tropd_float32": _call(TrOPD(), dtype=torch.float32),
    "rewards": _call(
        TokenRule(
            reward="proximal", reward_parameter=0.5, reward_policy="current", clip_reward_low=-1.0,
            clip_reward_high=1.0, gate="threshold", outlier="clip", task_weight=0.5,
            reward_filter="positive",
        ),
        "sampled", everything=True, task_advantages=_floats(TOKENS),
    ),
    "power_opd": _call(PowerOPD(), "sampled"),
    "log1p_opd": _call(Log1pOPD(), "sampled"),
    "tanh": _call(TokenRule(reward="tanh"), "sampled"),
    "tv_opd": _call(TVOPD(scale=1.0), "sampled"),
    "opd_sampled": _call(OPD(), "sampled", everything=True),
    "gkd": _call(GKD()),
    "gkd_logits": _call(GKD(), "logits", logits=True),
    "forward_kl_bucket": _call(Divergence("forward_kl", top_k=64, top_k_tail="bucket")),
    "reverse_kl": _call(Divergence("reverse_kl")),
    "akl": _call(Divergence("akl")),
    "mixed": _call(Divergence("mixed"), mixing=_floats(TOKENS)),
    "todi": _call(Divergence("todi")),
    "mopd": _call(MOPD()),
    "topk_jsd": _call(TopKJSD(), "top_k"),
    "topk_reverse_kl_bucket": _call(
        Divergence("reverse_kl", top_k=64, top_k_tail="bucket"), "top_k"
    ),
    "topk_reverse_kl_both": _call(
        Divergence("reverse_kl", top_k=64, top_k_tail="renormalize_both")
    ),
    "eopd": _call(EOPD()),
    "reopold_2": _call(REOPOLD(stage=2)),
    "sft": _call(SFT(), None),
    "column_sums": _column_sums(),
    "column_sums_float32": _column_sums(torch.float32),
}  # fmt: skip


# --- recording ----------------------------------------------------------------------------------


class FakeDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: str(target)  # the JIT keeps one cache a device
        self.get_current_stream = lambda device: 0


@contextmanager
def _compiling_for(target: GPUTarget, seen: Callable) -> Iterator[None]:
    """Within, launches on meta tensors compile for `target` instead; `seen(function, arguments,
    compiled, seconds)` is told of each."""
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        start = sum(os.times()[:4])
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            compiled = error
        arguments = dict(zip(self.arg_names, args)) | kwargs
        seen(self, arguments, compiled, sum(os.times()[:4]) - start)

    @torch.no_grad()
    def distill(problem):
        # The body of the custom op: on meta tensors the op itself would stop at its fake.
        result = chunk_loop.forward(problem)
        if not problem.forward_grads.any:
            chunk_loop.backward(problem, result.coefs, GradNeeds(hidden=True))
        loss = result.stats[Stat.TOKEN_LOSS]
        return loss.sum(), loss, result.stats, None

    driver.set_active(FakeDriver(target))  # for good: asking for the one before would want a GPU
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(triton_launch, "WARP", target.warp_size),
        mock.patch.object(prepare, "choose_backend", lambda name, device: name),
        mock.patch.object(dispatch, "differentiable_distill", distill),
    ):
        yield


def compile_cases(cases: Iterable[str], target_name: str) -> list[Figures]:
    """The figures of every distinct kernel that these cases launch."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    target = TARGETS[target_name]
    found: dict[str, Figures] = {}
    case = ""

    def seen(function, arguments, compiled, seconds):
        failed = isinstance(compiled, Exception)
        key = f"{function.__name__} {compiled!r}" if failed else compiled.hash
        if key not in found:
            found[key] = _figures(function, arguments, compiled, target_name, seconds)
        if case not in found[key].cases:
            found[key].cases.append(case)

    # A selection of tokens takes all of a call without values.
    every = torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)
    with _compiling_for(target, seen), every:
        for case in cases:
            CASES[case]()
    return list(found.values())


def _figures(function, arguments, compiled, target_name, seconds) -> Figures:
    runtime = {p.name for p in function.params if not p.is_constexpr}
    constants = {
        name: _plain(value)
        for name, value in arguments.items()
        if name in function.arg_names and (name not in runtime or value is None)
    }
    warps = arguments.get("num_warps", 4)
    tile_bits = 0
    id_bits = {}
    if "vocab_size" in function.arg_names:
        elements = _tile(arguments) // (warps * TARGETS[target_name].warp_size)
        operands = {name: arguments.get(name) for name in WALKED}
        id_bits = {n: 8 * t.element_size() for n, t in operands.items() if t is not None}
        tile_bits = elements * sum(id_bits.values())
    figures = Figures(
        kernel=function.__name__, target=target_name, cases=[], constants=constants,
        tile_bits=tile_bits, warps=warps, fp_fusion=arguments.get("enable_fp_fusion"),
        seconds=seconds,
    )  # fmt: skip
    if isinstance(compiled, Exception):
        return replace(figures, error=f"{type(compiled).__name__}: {compiled}")
    read = _read_amdgcn if "amdgcn" in compiled.asm else _read_cubin
    found = read(compiled, with_loads=tile_bits > 0)
    if "loops" in found:
        found["loops"] = _with_ids(found["loops"], function.__name__, id_bits)
    return replace(figures, shared=compiled.metadata.shared, **found)


def _with_ids(loops: list[Loop], kernel: str, id_bits: dict[str, int]) -> list[Loop]:
    """Each loop with the ids that it reads. The sums are the last two, of whole tiles and with
    guards; the loops before them search the top k, and read the teacher's rows only."""
    walking = [i for i, loop in enumerate(loops) if loop.loads]
    every = sum(id_bits.values())
    teacher = sum(bits for name, bits in id_bits.items() if name.startswith("teacher"))
    searches = walking[:-2] if kernel == "dense_sums_kernel" else []
    return [
        replace(loop, ids=loop.row_bits / (teacher if i in searches else every))
        if i in walking
        else loop
        for i, loop in enumerate(loops)
    ]


def _tile(arguments: dict) -> int:
    """Logits that a program reads at once."""
    if "BLOCK" in arguments:
        return arguments["BLOCK"] * arguments.get("ROWS", 1)
    return arguments["UNROLL"] * arguments["LANES"]


def _plain(value):
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# --- reading what was compiled ------------------------------------------------------------------


def _read_cubin(compiled, with_loads: bool) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = resource_usage(file.name)
        sass = nvidia_tool("nvdisasm", "-ndf", "-c", file.name) if with_loads else ""
    return dict(**usage, loads=dict(load_bits(sass)), loops=loops_of(sass))


def _read_amdgcn(compiled, with_loads: bool) -> dict:
    text = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    words = re.findall(r"\b(?:global|buffer)_load_(dword(?:x\d)?|[us]byte|[us]short)", text)
    loads = Counter(_dword_bits(word) for word in words if with_loads)
    spills = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
    return dict(registers=number("vgpr_count"), spills=spills, loads=dict(loads))


def _dword_bits(word: str) -> int:
    if "dword" not in word:
        return 8 if "byte" in word else 16
    return 32 * int(word[6:] or 1)


# --- the table ----------------------------------------------------------------------------------


def walks(f: Figures) -> list[Loop]:
    """The loops that read rows."""
    return [loop for loop in f.loops if loop.wide_loads]


def _line(f: Figures) -> str:
    if f.error:
        return f"{f.target:<11} {f.kernel:<18} {' '.join(f.cases)}: {f.error}"
    loads = " ".join(f"{bits}:{f.loads[bits]}" for bits in sorted(f.loads, reverse=True))
    loops = " ".join(
        f"{loop.instructions}/{loop.wide_loads}{'!' if loop.barriers else ''}" for loop in walks(f)
    )
    return (
        f"{f.target:<11} {f.kernel:<18} {f.warps:>5} {f.registers:>9} {f.spills:>6} {f.shared:>6}  "
        f"{loads:<24} {loops:<20} {f.seconds:>7.1f} s  {' '.join(f.cases)}"
        + "".join(f"\n{'':<12}{mix_of(loop)}" for loop in walks(f))
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cubins", description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--target", choices=TARGETS, action="append", help="may be repeated")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # Line numbers change no instruction, but cost time to write and to read.
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    targets = arguments.target or ["cuda:90"]
    figures = [f for target in targets for f in compile_cases(arguments.cases, target)]
    if arguments.json:
        json.dump([asdict(f) for f in figures], sys.stdout)
        return
    print(f"triton {triton.__version__}; loads: instructions by bits a thread; CPU time")
    names = f"{'target':<11} {'kernel':<18} warps registers spills shared  {'loads':<24}"
    names += f" {'loops':<20}"
    print(names, "compiling  cases")
    for f in sorted(figures, key=lambda f: (f.target, f.kernel)):
        print(_line(f))


if __name__ == "__main__":
    main()
