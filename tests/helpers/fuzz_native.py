"""Calls the native operators with random arguments, right and wrong, for a while.

    python tests/helpers/fuzz_native.py --seconds 20 --seed 0

Half of the tensors end or begin at a page that nobody may touch; the others lie in torch's memory,
where the sanitizers of `make sanitize` look. After each call:

* nothing has changed but what the operator returns, not a bit beside a row or in an input;
* a call that was refused has changed nothing at all;
* finite logits and sane options gave finite results; products of small integers are exact.

Every case has a random generator of its own. Where one crashes: `--verbose` names each before it
runs, and `--case N` runs that one alone.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import math
import mmap
import os
import random
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from tropd_kernels import native
from tropd_kernels.rows.layout import FIRST_WEIGHT, Coef, Stat

ops = torch.ops.tropd_native
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
#: Numbers of csrc/rows.h's generators, and parameters at which the logits drawn here stay finite.
NONE, ALPHA, CHI2, AKL, TOPK_REVERSE_KL = 0, 5, 6, 10, 11
PARAMETERS = {ALPHA: [-0.5, 0.3, 1.5], AKL: [0.0, 0.5, 0.999, 1.0]}
SUMS = 8
#: What the kernels write of stats and coefs.
KERNEL_STATS, KERNEL_COEFS = Stat.REVERSE_KL + 1, Coef.REVERSE_KL + 1


def library_under_test() -> str:
    """The path of the compiled library; exits where it is not the one that was asked for."""
    if native.WHY_NOT is not None:
        raise SystemExit(f"no native kernels: {native.WHY_NOT}")
    path = find_spec("tropd_kernels._C").origin
    code = Path(path).read_bytes()
    sanitized = b"__asan_init" in code and b"__ubsan_handle" in code
    if os.environ.get("TROPD_SANITIZE") == "1" and not sanitized:
        raise SystemExit(f"TROPD_SANITIZE=1, but {path} was built without sanitizers")
    return path


# --- memory --------------------------------------------------------------------------------------


def between_guards(count: int, dtype: torch.dtype, at_end: bool = True) -> Tensor:
    """`count` elements that end, or begin, where the process may neither read nor write."""
    page, size = mmap.PAGESIZE, count * dtype.itemsize
    body = -(-size // page) * page
    memory = mmap.mmap(-1, body + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + page + body):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) != 0:
            raise OSError("mprotect failed")
    offset = page + (body - size if at_end else 0)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.dtype == b.dtype and a.shape == b.shape
    return torch.equal(*(bits(each.contiguous().reshape(-1)) for each in (a, b)))


class Memory:
    """Where the tensors of one call lie, and what it may change there."""

    def __init__(self, draw: random.Random):
        self.draw = draw
        self.values = torch.Generator().manual_seed(draw.getrandbits(60))
        self.blocks: dict[int, Tensor] = {}  # whole, by address
        self.before: dict[int, Tensor] = {}  # their bits

    def empty(self, *shape: int, dtype: torch.dtype, dense: bool = False) -> Tensor:
        """A vector, or a matrix with some row stride; its end is its block's end."""
        rows, cols = (1, *shape)[-2:]
        stride = cols + (0 if dense else self.draw.choice([0, 0, 1, 3, 64]))
        lead = self.draw.choice([0, 0, 1, 7])
        count = lead + ((rows - 1) * stride + cols if rows else 0)
        if count == 0 or self.draw.random() < 0.5:
            block = torch.empty(count, dtype=dtype)
        else:
            block = between_guards(count, dtype, at_end=self.draw.random() < 0.7)
        bits(block).fill_(1 if dtype == torch.bool else self.draw.randrange(256))
        self.blocks[block.data_ptr()] = block
        return block.as_strided(shape, (stride, 1)[-len(shape) :], lead)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0, **how) -> Tensor:
        values = torch.randn(shape, generator=self.values).clamp(-3, 3) * scale
        return self.empty(*shape, dtype=dtype, **how).copy_(values)

    def integers(self, *shape: int, low: int, high: int, dtype=torch.int64, **how) -> Tensor:
        values = torch.randint(low, high, shape, generator=self.values)
        return self.empty(*shape, dtype=dtype, **how).copy_(values)

    def sprinkle(self, tensor: Tensor, values: list) -> None:
        """Replaces every tenth entry, about."""
        where = torch.rand(tensor.shape, generator=self.values) < 0.1
        picks = torch.randint(len(values), tensor.shape, generator=self.values)
        tensor[where] = torch.tensor(values, dtype=tensor.dtype)[picks][where]

    def remember(self) -> None:
        self.before = {where: bits(block).clone() for where, block in self.blocks.items()}

    def check(self, outputs: list[Tensor]) -> None:
        """Only `outputs` may have changed."""
        for out in outputs:
            expected = self.before[out.untyped_storage().data_ptr()].view(out.dtype)
            expected.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(out)
        for where, block in self.blocks.items():
            if not torch.equal(bits(block), self.before[where]):
                first = (bits(block) != self.before[where]).nonzero()[0].item()
                raise AssertionError(f"byte {first} of {block.numel()} {block.dtype} has changed")


# --- cases ---------------------------------------------------------------------------------------


class Case:
    """One call: `operator(**arguments)` writes `outputs`; `check` knows what it has to give."""

    def __init__(self, seed: int, number: int):
        self.draw = random.Random(f"{seed} {number}")
        self.threads = self.draw.randint(1, 3)
        torch.set_num_threads(self.threads)
        self.instruction_set = self.draw.choice(native.instruction_sets())
        ops.use_instruction_set(self.instruction_set)
        self.memory = Memory(self.draw)
        self.sane = self.draw.random() < 0.6
        kinds = [self.statistics, self.sums, self.gradient, self.gradient, self.elementary]
        kinds += [self.column_sums, self.row_squares]
        if native.BF16_PRODUCTS:
            kinds += [self.product]
            self.units = self.draw.choice(native.BF16_PRODUCTS)
            ops.use_products(self.units)
        self.draw.choice(kinds)()
        if self.draw.random() < 0.1:
            self.spoil()

    def run(self) -> bool:
        """False where the operator refused."""
        self.memory.remember()
        accepted = True
        try:
            getattr(ops, self.operator)(**self.arguments)
        except RuntimeError:
            if self.sane:
                raise
            accepted = False
        self.memory.check([self.arguments[name] for name in self.outputs] if accepted else [])
        if self.sane:
            self.check()
        return accepted

    def size(self, most: int) -> int:
        most = self.draw.choice([3, 40, most])
        return self.draw.randint(1, min(most, 3000))

    def rows(self) -> dict:
        """The arguments that the three row operators share."""
        draw, memory = self.draw, self.memory
        n, vocab = draw.choice([0, 1, self.size(70)]), self.size(3000)
        self.n, self.vocab = n, vocab
        wide = draw.random() < 0.3
        self.accumulator = FLOAT64 if wide else FLOAT32

        def logits():
            dtype = FLOAT64 if wide else draw.choice([FLOAT32, BFLOAT16])
            z = memory.normal(n, vocab, dtype=dtype, scale=3 if self.sane else 10)
            if not self.sane:
                memory.sprinkle(z, [math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0])
            return z

        def bias():
            if draw.random() < 0.5:
                return None
            return memory.normal(vocab, dtype=self.accumulator, dense=True)

        scales = [1.0, 0.0, 1.0, 0.0, 1.0]
        if draw.random() < 0.6:
            scales = [
                draw.uniform(0.5, 1.5), draw.choice([0.0, 5.0]), draw.uniform(0.5, 1.5),
                draw.choice([0.0, 30.0]), draw.uniform(0.5, 2),
            ]  # fmt: skip
        if not self.sane and draw.random() < 0.3:
            scales[draw.randrange(5)] = draw.choice([0.0, -1.0, 1e38, 1e-38, math.inf, math.nan])
        labels = memory.integers(n, low=0, high=vocab, dense=True)
        if draw.random() < 0.5:
            memory.sprinkle(labels, [-1, -100, vocab, INT64_MIN, INT64_MAX])
        return {
            "student": logits(),
            "teacher": logits(),
            "bias": bias(),
            "teacher_bias": bias(),
            "scales": scales,
            "labels": labels,
        }

    def drop_teacher(self, arguments: dict) -> None:
        if self.draw.random() < 0.3:
            arguments["teacher"] = None

    def some_coefs(self, arguments: dict) -> Tensor:
        """As the operators make them, with weights of every kind; or anything."""
        memory, n = self.memory, self.n
        coefs = memory.normal(len(Coef), n, dtype=self.accumulator)
        if self.sane or self.draw.random() < 0.5:
            stats = coefs.new_empty((len(Stat), n))
            made = torch.zeros_like(coefs).contiguous()
            scales = arguments["scales"] if self.sane else [1.0, 0.0, 1.0, 0.0, 1.0]
            ops.statistics(**arguments | {"scales": scales}, stats=stats, coefs=made)
            coefs[: Coef.THRESHOLD] = made[: Coef.THRESHOLD]
            coefs[Coef.THRESHOLD] *= 4
            weights = coefs[FIRST_WEIGHT:]
            kept = torch.rand(weights.shape, generator=memory.values) < 0.5
            weights *= kept & (torch.rand(n, generator=memory.values) < 0.8)
        if not self.sane:
            memory.sprinkle(coefs, [math.inf, -math.inf, math.nan, 1e38, 0.0])
        return coefs

    def generator(self) -> dict:
        kind = self.draw.randint(NONE, TOPK_REVERSE_KL)
        parameter = self.draw.choice(PARAMETERS.get(kind, [0.1, 0.5, 0.9]))
        if not self.sane and self.draw.random() < 0.3:
            kind = self.draw.choice([kind, -1, TOPK_REVERSE_KL + 1, INT64_MIN, INT64_MAX])
            parameter = self.draw.choice([0.0, 1.0, -3.0, math.inf, math.nan])
        return {"generator": kind, "c": parameter}

    def statistics(self) -> None:
        arguments = self.rows()
        self.drop_teacher(arguments)
        new = lambda height: self.memory.empty(height, self.n, dtype=self.accumulator)
        arguments |= {"stats": new(len(Stat)), "coefs": new(len(Coef))}
        arguments["mean_gap"] = self.draw.random() < 0.5
        self.operator, self.arguments = "statistics", arguments
        self.outputs = ["stats", "coefs"]

        def check():
            stats, coefs, labels = (arguments[name] for name in ("stats", "coefs", "labels"))
            inside = (labels >= 0) & (labels < self.vocab)
            known = [Stat.LOG_PROB, Stat.ENTROPY]
            if arguments["teacher"] is not None:
                known = list(Stat)[:KERNEL_STATS]
            for stat in known:
                expected = inside if "LOG_PROB" in stat.name else torch.ones_like(inside)
                assert torch.equal(stats[stat].isfinite(), expected), stat.name
            assert coefs[: Coef.TEACHER_MAX].isfinite().all()
            assert not arguments["mean_gap"] or coefs[Coef.MEAN_GAP].isfinite().all()

        self.check = check

    def sums(self) -> None:
        arguments = self.rows()
        coefs = self.some_coefs(arguments)
        needed = self.memory.integers(self.n, low=0, high=2, dtype=torch.bool, dense=True)
        made = self.memory.empty(SUMS, self.n, dtype=self.accumulator)
        top_k = self.draw.choice([0, 1, 2, self.vocab, self.draw.randint(1, 3000), INT64_MAX])
        if not self.sane and self.draw.random() < 0.1:
            top_k = self.draw.choice([-1, INT64_MIN])
        arguments |= {"needed": needed, "coefs": coefs, "sums": made, "top_k": top_k}
        arguments |= {"k_alone": self.draw.random() < 0.5, **self.generator()}
        arguments["on_renormalized"] = self.draw.random() < 0.5
        self.operator, self.arguments = "sums", arguments
        self.outputs = ["coefs", "sums"]

        def check():
            # An empty head has no mass, and the logarithm of none.
            finite = made[:, needed & (made[1] > 0)].isfinite()
            assert finite.all(), finite.logical_not().nonzero()[0]

        self.check = check

    def gradient(self) -> None:
        draw, memory = self.draw, self.memory
        arguments = self.rows()
        coefs = self.some_coefs(arguments)
        self.drop_teacher(arguments)
        arguments |= {"coefs": coefs, "ids": None, "added": None}
        if draw.random() < 0.4:
            k = draw.choice([0, 1, 5, self.size(200)])
            arguments["ids"] = memory.integers(self.n, k, low=0, high=self.vocab, dense=True)
            memory.sprinkle(arguments["ids"], [-1, self.vocab, INT64_MIN, INT64_MAX])
            arguments["added"] = memory.normal(self.n, k, dtype=self.accumulator, dense=True)
        arguments["out"] = out = self.gradient_out(arguments["student"])
        arguments |= {"top_k": draw.random() < 0.5, **self.generator()}
        self.operator, self.arguments, self.outputs = "gradient", arguments, ["out"]

        def check():
            assert out.isfinite().all()

        self.check = check

    def gradient_out(self, student: Tensor) -> Tensor:
        """Memory of its own, or the logits', in their dtype or in bfloat16 at twice the stride."""
        how = self.draw.random()
        if how < 0.3:
            return student
        if how < 0.5 and student.dtype == FLOAT32 and student.numel():
            whole = self.memory.blocks[student.untyped_storage().data_ptr()].view(BFLOAT16)
            stride, offset = 2 * student.stride(0), 2 * student.storage_offset()
            return whole.as_strided(student.shape, (stride, 1), offset)
        dtype = student.dtype if student.dtype == FLOAT64 else self.draw.choice([FLOAT32, BFLOAT16])
        return self.memory.empty(*student.shape, dtype=dtype)

    def elementary(self) -> None:
        n = self.draw.choice([0, self.size(3000)])
        dtype = self.draw.choice([FLOAT32, FLOAT64])
        which = self.draw.randrange(3)
        given = self.memory.normal(n, dtype=dtype, scale=25)
        if which == 1:
            given.abs_().clamp_(max=1)
        if not self.sane:
            self.memory.sprinkle(given, [math.inf, -math.inf, math.nan, -0.0, 1e30, -1e30])
            which = self.draw.choice([which, -1, 3, INT64_MAX])
        out = self.memory.empty(n, dtype=dtype)
        self.operator = "elementary"
        self.arguments, self.outputs = {"which": which, "input": given, "out": out}, ["out"]

        def check():
            function = (torch.exp, torch.log1p, torch.tanh)[which]
            torch.testing.assert_close(out, function(given), rtol=1e-6, atol=0)

        self.check = check

    def matrix(self) -> tuple[Tensor, torch.dtype]:
        """Of any element, and its accumulator."""
        dtype = self.draw.choice([FLOAT32, BFLOAT16, FLOAT64])
        shape = (self.draw.choice([0, self.size(70)]), self.draw.choice([0, self.size(3000)]))
        values = self.memory.normal(*shape, dtype=dtype)
        if not self.sane:
            self.memory.sprinkle(values, [math.inf, -math.inf, math.nan, 3e38, 1e-40])
        return values, FLOAT64 if dtype == FLOAT64 else FLOAT32

    def column_sums(self) -> None:
        d_logits, wide = self.matrix()
        n, columns = d_logits.shape
        hidden = self.memory.normal(2, n, dtype=wide, dense=True)
        out = self.memory.empty(3, columns, dtype=wide, dense=True)
        self.operator, self.outputs = "column_sums", ["out"]
        self.arguments = {"d_logits": d_logits, "hidden": hidden, "out": out}

        def check():
            d, (spread, along) = d_logits.double(), hidden.double()
            sums = torch.stack([(d * d).sum(0), spread @ (d * d), along @ d])
            torch.testing.assert_close(out.double(), sums, rtol=1e-4, atol=1e-4)

        self.check = check

    def row_squares(self) -> None:
        matrix, wide = self.matrix()
        out = self.memory.empty(len(matrix), dtype=wide, dense=True)
        self.operator, self.outputs = "row_squares", ["out"]
        self.arguments = {"matrix": matrix, "out": out}

        def check():
            squares = matrix.double().square().sum(1)
            torch.testing.assert_close(out.double(), squares, rtol=1e-5, atol=0)

        self.check = check

    def product(self) -> None:
        draw, memory = self.draw, self.memory
        self.operator = name = draw.choice(["gemm_nt", "gemm_nn", "gemm_tn"])
        m, n, k = self.size(70), self.size(300), self.size(70 if name == "gemm_tn" else 3000)
        if not self.sane:
            m, n, k = (draw.choice([0, size, size, size]) for size in (m, n, k))

        def operand(*shape):
            dtype = draw.choice([BFLOAT16, FLOAT32]) if self.units == "AVX2" else BFLOAT16
            if self.sane:
                return memory.integers(*shape, low=-8, high=9, dtype=dtype)
            a = memory.normal(*shape, dtype=dtype)
            memory.sprinkle(a, [math.inf, math.nan, 3e38, 1e-40])
            return a

        a, b = operand(*((k, m) if name == "gemm_tn" else (m, k))), None
        b = operand(*((n, k) if name == "gemm_nt" else (k, n)))
        more = {"add": draw.random() < 0.3} if name == "gemm_tn" else {}
        rounds = name == "gemm_tn" and draw.random() < (0.3 if not more["add"] else 0.0)
        out = memory.integers(m, n, low=-8, high=9, dtype=BFLOAT16 if rounds else FLOAT32)
        old = out.double() if more.get("add") else 0
        if rounds and draw.random() < 0.5:
            more["sums"] = memory.integers(m, n, low=-8, high=9, dtype=FLOAT32)
            old = more["sums"].double()
        self.arguments, self.outputs = {"a": a, "b": b, "out": out, **more}, ["out"]

        def check():
            left, right = a.double(), b.double()
            left = left.T if name == "gemm_tn" else left
            right = right.T if name == "gemm_nt" else right
            # Sums of integers below 2^24 are exact in float32, and rounded once in bfloat16.
            assert torch.equal(out, (left @ right + old).to(out.dtype))

        self.check = check

    def spoil(self) -> None:
        """Makes one tensor argument wrong. Where that changes nothing the call is a right one."""
        names = [name for name, value in self.arguments.items() if isinstance(value, Tensor)]
        name = self.draw.choice(names)
        tensor = self.arguments[name]
        wrong = {
            "meta": lambda: tensor.to("meta"),
            "dtype": lambda: tensor.to(torch.float16),
            "short": lambda: tensor[:-1],
            "narrow": lambda: tensor[..., :-1],
            "transposed": lambda: tensor.t(),
            "overlapping": lambda: tensor[:1].expand(tensor.shape),
            "spread": lambda: tensor.repeat_interleave(2, -1)[..., ::2],
            "flat": lambda: tensor.reshape(-1),
            "nothing": lambda: tensor[:0],
        }
        how = self.draw.choice(list(wrong))
        if how == "overlapping" and not tensor.numel():
            return
        spoiled = wrong[how]()
        if spoiled.shape == tensor.shape and spoiled.stride() == tensor.stride():
            if spoiled.dtype == tensor.dtype and spoiled.device == tensor.device:
                return
        self.sane = False
        self.arguments[name] = spoiled
        known = {view.untyped_storage().data_ptr() for view in self.memory.blocks.values()}
        self.outputs = [
            name
            for name in self.outputs
            if self.arguments[name].device.type == "cpu"
            and self.arguments[name].untyped_storage().data_ptr() in known
        ]

    def __str__(self):
        described = [
            f"{name}={value.dtype} {tuple(value.shape)} {value.stride()}"
            if isinstance(value, Tensor)
            else f"{name}={value}"
            for name, value in self.arguments.items()
        ]
        where = f"{self.instruction_set}, {self.threads} threads{', sane' if self.sane else ''}"
        return f"{self.operator}({', '.join(described)}) on {where}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    faulthandler.enable()
    path = library_under_test()
    counts: Counter[str] = Counter()
    deadline, number = time.monotonic() + options.seconds, options.case or 0
    while time.monotonic() < deadline:
        case = Case(options.seed, number)
        if options.verbose:
            print(f"case {number}: {case}", flush=True)
        try:
            accepted = case.run()
        except Exception as error:
            raise SystemExit(
                f"seed {options.seed}, case {number}: {case}\n{type(error).__name__}: {error}"
            ) from error
        counts[f"{case.operator} {'made' if accepted else 'refused'}"] += 1
        number += 1
        if options.case is not None:
            break
    print(f"{sum(counts.values())} calls of {path}")
    for name, count in sorted(counts.items()):
        print(f"{count:8} {name}")


if __name__ == "__main__":
    main()
