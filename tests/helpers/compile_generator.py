"""Prints the intermediate code of one of Triton's generators, compiled for a GPU that is not here.

python tests/helpers/compile_generator.py todi
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tropd_kernels.rows.triton_kernels.generators import _generator


@triton.jit
def kernel(out, KIND: tl.constexpr):
    lp = tl.load(out)
    value, slope = _generator(lp, lp, lp, lp, KIND, 0.5, False)
    tl.store(out, value + slope)


if __name__ == "__main__":
    source = ASTSource(kernel, {"out": "*fp32", "KIND": "constexpr"}, {(1,): sys.argv[1]})
    print(triton.compile(source, GPUTarget("cuda", 90, 32)).asm["ttir"])
