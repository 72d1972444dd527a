"""The machine that runs compiled kernels, on PTX written by hand: what it computes, and what it
refuses. `make compiled` runs the kernels themselves on it."""

import numpy as np
import pytest

from ptx import PtxError
from ptx.kernel import Kernel

HEAD = """
.visible .entry probe(
    .param .u64 .ptr .global .align 1 probe_param_0,
    .param .u32 probe_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<29>;
    .reg .b64 %rd<29>;
    ld.param.b64 %rd1, [probe_param_0];
    ld.param.s32 %rd2, [probe_param_1];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd3, %r1, 8, %rd1;   // a thread's own 8 bytes
    shl.b32 %r2, %r1, 2;               // and 4 of shared memory
"""


def run(body, threads=64, out=None, given=0, grid=(1,), shared=4096):
    """What the threads leave in their 8 bytes each."""
    out = np.zeros(threads, np.uint64) if out is None else out
    text = HEAD.format(threads=threads) + body + "\nret;\n}"
    address = out.ctypes.data
    kernel = Kernel(text, shared)
    kernel.run(grid, [address, given], [(address, address + out.nbytes, "out")])
    return out


def bits(x, dtype):
    return int(np.array(x, dtype).view(f"u{np.dtype(dtype).itemsize}"))


@pytest.mark.parametrize(
    ("code", "result", "dtype"),
    [
        ("add.rn.f32 %r3, 0f3F800000, 0f40000000;", 3.0, "f4"),
        ("fma.rn.f32 %r3, 0f40000000, 0f40400000, 0fBF800000;", 5.0, "f4"),
        ("fma.rn.ftz.f32 %r3, 0f00000001, 0f3F800000, 0f00000000;", 0.0, "f4"),
        ("max.f32 %r3, 0f7FC00000, 0fBF800000;", -1.0, "f4"),
        ("min.f32 %r3, 0f40000000, 0f40400000, 0fBF800000;", -1.0, "f4"),
        ("mov.b16 %rs1, 0x3F80;\nsub.rn.f32.bf16 %r3, %rs1, 0f40400000;", -2.0, "f4"),
        ("div.full.f32 %r3, 0f40C00000, 0f40C00000;", 1.0, "f4"),
        ("ex2.approx.f32 %r3, 0fFF800000;", 0.0, "f4"),
        ("ex2.approx.f32 %r3, 0fC3000000;", 2.0**-128, "f4"),
        ("ex2.approx.ftz.f32 %r3, 0fC3000000;", 0.0, "f4"),  # subnormal
        ("mov.b32 %r4, -5;\nshr.s32 %r3, %r4, 1;", -3, "i4"),
        ("mov.b32 %r4, -5;\nshr.u32 %r3, %r4, 31;", 1, "i4"),
        ("mov.b32 %r4, 1;\nshl.b32 %r3, %r4, 40;", 0, "i4"),
        ("mov.b32 %r4, 0x8000F0;\nbfe.s32 %r3, %r4, 4, 4;", -1, "i4"),
        ("mov.b32 %r4, 0x8000F0;\nbfe.u32 %r3, %r4, 4, 4;", 15, "i4"),
        ("mov.b32 %r4, 0xF00F;\npopc.b32 %r3, %r4;", 8, "i4"),
        ("mul.lo.s32 %r3, 65537, 65537;", 131073, "i4"),
        ("mul.hi.u32 %r3, -845247145, 65536;", 52638, "u4"),
        ("mul.hi.s32 %r3, -845247145, 65536;", -12898, "i4"),
        ("cvt.rn.bf16.f32 %rs1, 0f3F808000;\ncvt.f32.bf16 %r3, %rs1;", 1.0, "f4"),  # ties to even
        ("cvt.rn.bf16x2.f32 %r3, 0f3F800000, 0f40000000;", 0x3F804000, "i4"),
        ("cvt.rn.f16x2.f32 %r3, 0f3F800000, 0f40000000;", 0x3C004000, "i4"),
        ("setp.lt.f32 %p1, 0f7FC00000, 0f3F800000;\nselp.b32 %r3, 1, 2, %p1;", 2, "i4"),
        ("setp.geu.f32 %p1, 0f7FC00000, 0f3F800000;\nselp.b32 %r3, 1, 2, %p1;", 1, "i4"),
        ("setp.ne.f32 %p1, 0f7FC00000, 0f3F800000;\nselp.b32 %r3, 1, 2, %p1;", 2, "i4"),
        ("setp.neu.f32 %p1, 0f7FC00000, 0f3F800000;\nselp.b32 %r3, 1, 2, %p1;", 1, "i4"),
        ("mov.b32 %r3, 7;\nsetp.eq.s32 %p1, %r1, 99;\n@%p1 mov.b32 %r3, 8;", 7, "i4"),
        ("mov.b64 %rd4, {0f3F800000, 0f40000000};\nadd.rn.f32x2 %rd4, %rd4, %rd4;\n"
         "{ .reg .b32 tmp; mov.b64 {tmp, %r3}, %rd4; }", 4.0, "f4"),
    ],
)  # fmt: skip
def test_instructions(code, result, dtype):
    out = run(code + "\nst.global.b32 [%rd3], %r3;")
    low = out.view("u4")[::2]
    assert set(low.tolist()) == {bits(result, dtype)}


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("mul.wide.s32 %rd4, -3, 7;", -21),
        ("cvt.s64.s32 %rd4, %rd2;", -2),
        ("mad.wide.s32 %rd4, -3, 7, %rd2;", -23),
    ],
)
def test_wide_instructions(code, result):
    out = run(code + "\nst.global.b64 [%rd3], %rd4;", given=-2)
    assert set(out.view(np.int64).tolist()) == {result}


def test_approximations_are_a_last_bit_off():
    """Some up, some down, and the same for the same operand."""
    code = "cvt.rn.f32.s32 %r3, %r1;\nmul.rn.f32 %r3, %r3, 0f3DCCCCCD;\nex2.approx.f32 %r4, %r3;\n"
    code += "st.global.v2.b32 [%rd3], {%r3, %r4};"
    out = run(code, threads=256).view("f4")
    exact = np.exp2(out[::2].astype("f8")).astype("f4").view("i4")
    assert set((out[1::2].view("i4") - exact).tolist()) == {-1, 0, 1}


def test_a_loop_of_another_length_for_each_thread():
    """Threads that leave it early wait for the others, and meet them at the exchange."""
    code = """
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
$L__BB0_1:
    add.s32 %r3, %r3, %r4;
    add.s32 %r4, %r4, 1;
    setp.le.s32 %p1, %r4, %r1;
    @%p1 bra $L__BB0_1;
    shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
    redux.sync.add.s32 %r6, %r4, -1;
    st.global.v2.b32 [%rd3], {%r5, %r6};
    """
    out = run(code).view("u4")
    thread = np.arange(64) ^ 1
    assert (out[::2] == thread * (thread + 1) // 2).all()
    assert (out[1::2].reshape(2, 32) == [[32 * 33 // 2], [32 * 32 + 32 * 33 // 2]]).all()


def test_shared_memory_turns_what_threads_hold_around():
    code = """
    st.shared.b32 [%r2], %r1;
    bar.sync 0;
    xor.b32 %r4, %r2, 252;
    ld.shared.b32 %r5, [%r4];
    st.global.b32 [%rd3], %r5;
    """
    assert run(code).tolist() == list(range(63, -1, -1))


def test_a_matrix_from_shared_memory():
    """Eight rows of 16 bytes: thread 4 r + c gets the c-th word of row r."""
    code = """
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [%r3], %r1;
    shl.b32 %r4, %r1, 4;
    and.b32 %r4, %r4, 127;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r4];
    st.global.b32 [%rd3], %r5;
    """
    assert run(code, threads=32).tolist() == list(range(32))


def test_stmatrix_is_the_reverse():
    """Thread 4 r + c gives the c-th word of row r."""
    code = """
    shl.b32 %r4, %r1, 4;
    and.b32 %r4, %r4, 127;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {%r1};
    ld.shared.b32 %r5, [%r2];
    st.global.b32 [%rd3], %r5;
    """
    assert run(code, threads=32).tolist() == list(range(32))


def test_every_program_of_a_grid_runs():
    out = np.zeros(3 * 64, np.uint64)
    code = """
    mov.u32 %r3, %ctaid.x;
    mad.wide.u32 %rd4, %r3, 512, %rd3;
    mov.u32 %r4, %nctaid.x;
    add.s32 %r5, %r3, %r4;
    st.global.b32 [%rd4], %r5;
    """
    assert run(code, out=out, grid=(3,)).reshape(3, 64)[:, 0].tolist() == [3, 4, 5]


REFUSED = {
    "past the end": ("st.global.b32 [%rd3+8], %r1;", "byte 512 of the 512 of out"),
    "before the start": ("ld.global.b32 %r3, [%rd3+-8];", "byte -8"),
    "unaligned": ("ld.global.b32 %r3, [%rd3+2];", "no multiple of 4"),
    "never written": ("ld.shared.b32 %r3, [%r2];", "before it is written"),
    "read without a barrier": (
        "st.shared.b32 [%r2], %r1;\nxor.b32 %r4, %r2, 252;\nld.shared.b32 %r3, [%r4];",
        "a race: threads read what another writes, in shared memory",
    ),
    "written without a barrier": (
        "st.shared.b32 [%r2], %r1;\nbar.sync 0;\nxor.b32 %r4, %r2, 252;\n"
        "ld.shared.b32 %r3, [%r4];\nst.shared.b32 [%r2], %r3;",
        "a race: threads write what another reads, in shared memory",
    ),
    "written by two warps": (
        "mov.b32 %r3, 0;\nst.shared.b32 [%r3], %r1;",
        "a race: threads write what another writes, in shared memory",
    ),
    "written by two programs": (
        "mov.u32 %r3, %ctaid.x;\nst.global.b32 [%rd3], %r3;",
        "a race: threads write what another writes, in out",
    ),
    "read from another program": (
        "mov.u32 %r3, %ctaid.x;\nsetp.eq.s32 %p1, %r3, 0;\n@%p1 st.global.b32 [%rd3], %r1;\n"
        "@!%p1 ld.global.b32 %r4, [%rd3];",
        "a race: threads read what another writes, in out",
    ),
    "half a warp": (
        "setp.lt.s32 %p1, %r1, 16;\n@%p1 bra $L__BB0_1;\nshfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;\n"
        "$L__BB0_1:",
        "a part of a warp",
    ),
    "two barriers": (
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L__BB0_1;\nbar.sync 0;\nbra $L__BB0_2;\n"
        "$L__BB0_1:\nbar.sync 0;\n$L__BB0_2:",
        "different barriers",
    ),
    "some of a warp": (
        "setp.lt.s32 %p1, %r1, 16;\n@%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;",
        "an exchange of some threads",
    ),
    "members": ("redux.sync.add.s32 %r3, %r1, 65535;", "an exchange of some threads"),
    **{
        code.split()[0]: (code, f"unknown instruction: {code.split()[0]}")
        for code in (
            "max.NaN.f32 %r3, %r1, %r2;", "add.sat.s32 %r3, %r1, %r2;", "add.rz.f32 %r3, %r1, %r2;",
            "add.cc.u32 %r3, %r1, %r2;", "fma.rn.relu.f32 %r3, %r1, %r2, %r1;",
            "cvt.rzi.f32.f32 %r3, %r1;", "cvt.rzi.s32.f32 %r3, %r1;", "div.s32 %r3, %r1, %r2;",
            "setp.gt.ftz.f32 %p1, %r1, %r2;", "setp.eq.and.s32 %p1, %r1, %r2, %p2;",
            "setp.eq.s32 %p1|%p2, %r1, %r2;", "shfl.sync.bfly.b32 %r3|%p1, %r1, 1, 31, -1;",
        )
    },
    "one operand too many": ("add.rn.f32 %r3, %r1, %r1, %r1;", "unknown instruction: add.rn.f32"),
    "unknown": ("lg2.approx.f32 %r3, %r1;", "unknown instruction: lg2.approx.f32 %r3, %r1"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_gpu_would_not_tell(code, words):
    with pytest.raises(PtxError, match=words.replace("[", r"\[")):
        run(code, grid=(2,))


def test_all_may_write_the_same():
    run("mov.b32 %r3, 0;\nst.shared.b32 [%r3], 5;\nst.global.b32 [%rd1], 5;", grid=(2,))
