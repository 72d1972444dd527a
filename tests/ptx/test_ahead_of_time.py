"""Every Triton kernel, as it is launched, compiled for GPUs that are not here.

Triton's interpreter, on which the other tests run the kernels, takes what its compiler does not: a
global constant that is NaN, a branch that changes a type. And a kernel that compiles may spill its
registers, or ask for more shared memory than the chip has, which only a launch would tell.
`benchmarks.cubins` records what the package launches and compiles it, in a process of its own: the
interpreter, once chosen, stays.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

#: Bytes of shared memory that one program can have.
SHARED = {"cuda:80": 166_912, "cuda:90": 232_448, "cuda:100": 232_448, "hip:gfx942": 65_536}

#: Bytes a thread that may be spilled, where it can be told that no loop over rows does it: what is
#: kept from the kernel's start to its end, such as a gate.
OUTSIDE_LOOPS = {"cuda": 32, "hip": 0}

#: Cases that between them launch every kernel, with all the arguments that it can have.
FULLEST = ("tropd_everything", "tropd_top_k_teacher_everything", "column_sums")
#: Those of the objectives, dtypes and sizes.
ON_POLICY = (
    "tropd", "tropd_top_k_teacher", "tropd_logits", "tropd_odd_vocabulary", "tropd_one_token",
    "tropd_float32", "opd_sampled", "reopold_2", "sft", "column_sums_float32",
)  # fmt: skip
DIVERGENCES = (
    "gkd", "gkd_logits", "forward_kl_bucket", "reverse_kl", "akl", "mixed", "todi", "mopd",
    "topk_jsd", "eopd", "topk_reverse_kl_bucket", "topk_reverse_kl_both",
)  # fmt: skip
REWARDS = ("rewards", "power_opd", "log1p_opd", "tanh", "tv_opd")
#: Small enough for a slow processor to compile one in a test's time.
LOTS = {
    "sm_90": (["cuda:90"], FULLEST),
    "sm_90-on_policy-1": (["cuda:90"], ON_POLICY[:5]),
    "sm_90-on_policy-2": (["cuda:90"], ON_POLICY[5:]),
    "sm_90-rewards": (["cuda:90"], REWARDS),
    "sm_90-divergences-1": (["cuda:90"], DIVERGENCES[:5]),
    "sm_90-divergences-2": (["cuda:90"], DIVERGENCES[5:]),
    "sm_80": (["cuda:80"], FULLEST),
    "sm_100": (["cuda:100"], FULLEST),
    "gfx942": (["hip:gfx942"], FULLEST),
}
#: Of this many ids the gradient masks each tile by the vocabulary's size, and reads one by one.
NARROW = {"tropd_odd_vocabulary"}
#: Those that read every row, or every column, whole.
WALKING = {"statistics_kernel", "dense_sums_kernel", "gradient_kernel", "column_sums_kernel"}
KERNELS = {
    "statistics_kernel", "join_kernel", "dense_sums_kernel", "topk_teacher_sums_kernel",
    "rule_kernel", "gradient_kernel", "topk_teacher_grad_kernel", "column_sums_kernel",
}  # fmt: skip


def compile_for(targets, cases):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    chosen = [word for target in targets for word in ("--target", target)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cubins", "--json", *chosen, *cases],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_loops_are_read_from_the_machine_code():
    """A loop within a loop, a predicated branch, local memory; what comes back from behind the exit
    is none."""
    from benchmarks.sass import Loop, loops_of

    sass = """
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0018*/                   FFMA R4, R5, R6, R7 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;
        /*0040*/                   STL [R1], R5 ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/                   BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
        /*0078*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3) ;
    """.replace("\n    ", "\n")
    assert loops_of(sass) == [
        Loop(
            instructions=5, loads=1, wide_loads=1, barriers=0, exchanges=1, local=1, row_bits=128,
            pipes={"FMA": 1, "LDG": 1, "LSU": 2, "BRANCH": 1},
        )
    ]  # fmt: skip


def test_every_opcode_has_one_pipe():
    from benchmarks.sass import PIPES, pipe_of

    opcodes = [opcode for pipe in PIPES.values() for opcode in pipe]
    assert len(opcodes) == len(set(opcodes))
    named = {"FFMA": "FMA", "FMNMX": "ALU", "MUFU": "MUFU", "LDG": "LDG", "UIADD3": "UNIFORM"}
    assert {opcode: pipe_of(opcode) for opcode in named} == named


def faults(figures):
    """What is wrong with one compiled kernel."""
    f = figures
    if f["error"]:
        yield f["error"]
        return
    if f["spills"] > OUTSIDE_LOOPS[f["target"].split(":")[0]]:
        yield f"spills {f['spills']} bytes a thread"
    for loop in f["loops"]:
        if loop["loads"] and loop["local"]:
            yield f"spills within a loop over rows: {loop}"
    waiting = [
        loop
        for loop in f["loops"]
        if loop["wide_loads"] and (loop["barriers"] or loop["exchanges"])
    ]
    if len(waiting) > (f["kernel"] == "dense_sums_kernel"):  # whose search counts over all threads
        yield f"threads wait for each other in loops that read rows: {waiting}"
    if f["shared"] > SHARED[f["target"]]:
        yield f"{f['shared']} bytes of shared memory"
    if f["fp_fusion"] is not False:
        yield "the launch leaves enable_fp_fusion to Triton, whose default changes"
    narrow = f["kernel"] == "gradient_kernel" and NARROW.issuperset(f["cases"])
    wide_rows = f["kernel"] in WALKING and not narrow
    if f["target"].startswith("cuda") and wide_rows:
        wide = sum(int(bits) * n for bits, n in f["loads"].items() if int(bits) >= 128)
        if wide < f["tile_bits"]:
            yield f"16-byte loads bring {wide} of a tile's {f['tile_bits']} bits: {f['loads']}"


@pytest.mark.parametrize(
    ("targets", "cases"),
    [
        pytest.param(*lot, id=name, marks=[] if name == "sm_90" else pytest.mark.slow)
        for name, lot in LOTS.items()
    ],
)
def test_kernels_compile_and_fit(targets, cases):
    figures = compile_for(targets, cases)
    found = [
        f"{f['target']} {f['kernel']} of {', '.join(f['cases'])}: {fault}"
        for f in figures
        for fault in faults(f)
    ]
    assert not found, "\n".join(found)
    if targets == ["cuda:90"]:
        assert all(
            sum(loop["wide_loads"] > 0 for loop in f["loops"])
            for f in figures
            if f["kernel"] in WALKING and not NARROW.issuperset(f["cases"])
        )
    if set(FULLEST) <= set(cases):
        assert {(f["target"], f["kernel"]) for f in figures} == set(product(targets, KERNELS))


#: Instructions an id in the loop that reads a row, at most: of a case's kernel, or of all kernels
#: of a case together. Triton 3.6 comes nearest. On sm_100 one instruction adds or multiplies two
#: pairs of numbers.
BOUNDS = {
    ("tropd", "statistics_kernel"): 28,
    ("tropd", "dense_sums_kernel"): 23,
    ("tropd", "gradient_kernel"): 28,
    ("sft", "statistics_kernel"): 11,
    "gkd": 140,
}
PACKED_BOUNDS = {
    ("tropd", "statistics_kernel"): 21,
    ("tropd", "dense_sums_kernel"): 20,
    ("tropd", "gradient_kernel"): 24,
    ("sft", "statistics_kernel"): 8,
    "gkd": 120,
}


def hot_loop(figures):
    """Of whole tiles, where others with guards follow."""
    walking = [loop for loop in figures["loops"] if loop["wide_loads"]]
    return walking and walking[-2 if figures["kernel"] == "dense_sums_kernel" else 0]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100"])
def test_rows_cost_few_instructions(target):
    """tl.exp at six instructions, or a guard around each product of a sum. Nor do loops spill."""
    figures = compile_for([target], ("tropd", "gkd", "sft"))
    assert not [fault for f in figures for fault in faults(f)]
    found = {
        (case, f["kernel"]): hot["instructions"] / hot["ids"]
        for f in figures
        for case in f["cases"]
        if f["kernel"] in WALKING and (hot := hot_loop(f))
    }
    found["gkd"] = sum(n for (case, _), n in found.items() if case == "gkd")
    bounds = PACKED_BOUNDS if target == "cuda:100" else BOUNDS
    over = {key: found[key] for key, most in bounds.items() if found[key] > most}
    assert not over


def test_no_kernel_is_left_out():
    """A new kernel has to be launched by one of the cases above."""
    from tropd_kernels.rows import triton_kernels

    assert {name for name in vars(triton_kernels) if name.endswith("_kernel")} == KERNELS
