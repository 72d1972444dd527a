"""exp() at two instructions.

`tl.exp` of float32 compiles to `ex2.approx.f32`, which keeps subnormal results at the cost of a
comparison and two predicated multiplications. With `.ftz` a result below 1.2e-38 is 0, and the
multiplication by log2(e) and the hardware's instruction suffice. `tl.exp` stays where the result
tells whether a probability is 0.

Only NVIDIA GPUs take PTX: AMD GPUs, float64 and Triton's interpreter keep `tl.exp`.
"""

import triton
import triton.language as tl
from triton.language.target_info import current_target


@triton.constexpr_function
def _speaks_ptx():
    """Whether the kernel is compiled, and for an NVIDIA GPU."""
    target = current_target()
    return not triton.knobs.runtime.interpret and target is not None and target.backend == "cuda"


@triton.jit
def _exp(x):
    """exp(x); of float32 on an NVIDIA GPU, results that would be subnormal are 0."""
    if _speaks_ptx() and x.dtype == tl.float32:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        e = tl.exp(x)
    return e
