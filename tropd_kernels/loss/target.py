"""The target that stands in for a dense teacher, where the rule has powers of its own.

    q'  proportional to  q^a sg(p)^b r^c        teacher q, student p, reference teacher r

or, where the call's `blending` gives each token a weight w, to q^(1 - w) (q^a sg(p)^b r^c)^w.

In logits it is a sum, a t + b z + c r, each side's logits after bias, scale and soft cap. The
temperature, which divides them all, and the normaliser are left to the row engine: it takes the sum
for raw logits of the teacher. No gradient flows through p, as none flows through a teacher.

The sum has the accumulator's dtype, float32 or float64, and is made in the teacher's buffer of the
chunk, block by block. Its error is a last bit of the largest of its terms: with ExOPD's powers 1.25
and -0.25 and logits up to 30, log q' is off by 5e-6 at most in float32 (`test_target.py`). Rounded
to bfloat16, as a caller's logits may be, it would be off by 0.1.

An id that one side excludes, by a logit of -inf, has probability 0 whatever the sign of that side's
power: nothing is known of a ratio to 0. At a weight w of 0 the other sides exclude nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rows.layout import LogitTransform
from ..rows.torch_rows import transform

#: Elements of a block: 4 MiB of float32 on a CPU, 32 MiB elsewhere.
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 23
#: The most temporaries of a block that are alive at once.
TEMPORARIES = 3


def scratch_bytes(rows: int, vocab_size: int, itemsize: int, device_type: str) -> int:
    """Upper bound on the temporaries of one call of `write_target` on so many rows."""
    return TEMPORARIES * min(rows, _block_rows(vocab_size, device_type)) * vocab_size * itemsize


def write_target(
    out: Tensor, *sides: tuple[float, Tensor, LogitTransform], blending: Tensor | None = None
) -> None:
    """out (n, V) = the sum over sides of power * transformed logits (n, V), the teacher's first.
    `out` may be the memory of the first side's logits, and no other's. blending: (n,), the weights
    w; None: 1."""
    height = _block_rows(out.shape[1], out.device.type)
    powers = _powers([power for power, _, _ in sides], blending, out)
    for low in range(0, out.shape[0], height):
        rows = slice(low, low + height)
        total = out[rows]
        for i, (power, logits, how) in enumerate(sides):
            z, each = transform(logits[rows], how, out.dtype), powers[i][rows]
            if i == 0:  # whose power is above 0
                torch.mul(z, each, out=total)
                continue
            if blending is not None:
                floor = torch.where(each == 0, 0.0, -math.inf).to(z.dtype)
                z = torch.maximum(z, floor)  # no 0 * -inf
            excluded = z == -math.inf if power < 0 else None
            total.addcmul_(z, each)
            if excluded is not None:
                total.masked_fill_(excluded, -math.inf)


def _powers(given: list[float], blending: Tensor | None, like: Tensor) -> list[Tensor]:
    """Columns (n, 1) of each side's power, the teacher's first. Those of equal weights are to the
    bit those of a rule, whose powers are rounded from float64 as well."""
    if blending is None:
        return [like.new_full((1, 1), power).expand(like.shape[0], 1) for power in given]
    w, (teacher, *others) = blending.double().unsqueeze(-1), given
    blended = [w * teacher + (1 - w), *(w * power for power in others)]
    return [power.to(like.dtype) for power in blended]


def _block_rows(vocab_size: int, device_type: str) -> int:
    elements = BLOCK_ELEMENTS.get(device_type, BLOCK_ELEMENTS_ELSEWHERE)
    return max(1, elements // vocab_size)
