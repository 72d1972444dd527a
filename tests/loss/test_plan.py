"""What `plan_chunks` chooses for a GPU, which need not be here, and what it says of the work."""

import math
import re

import pytest
import torch
from problems import OBJECTIVES, make_problem

from tropd_kernels import GKD, OPD, EntropyOPD, TokenRule, TrOPD, plan_chunks, products
from tropd_kernels.backends import engine_for
from tropd_kernels.loss import plan as chunking

QWEN = dict(tokens=8192, vocab_size=151_936, hidden_size=2048, teacher_hidden_size=4096)
WIDE = QWEN | {"hidden_size": 4096}


# --- sizes ---------------------------------------------------------------------------------------


def chunked(monkeypatch, **shape):
    """The plan with an accumulator."""
    with monkeypatch.context() as patch:
        patch.setattr(chunking, "WITHOUT_ACCUMULATOR", 0)
        return plan_chunks(**shape)


def test_one_super_chunk_where_bytes_allow_it(monkeypatch):
    """Less memory than the accumulator at a width of 4096, a fifth more at 2048, and half as much
    again at 1024, which is too much."""
    for shape, most in ((WIDE, 1.0), (QWEN, 1.25)):
        plan, other = plan_chunks(**shape), chunked(monkeypatch, **shape)
        assert plan.rounds_d_weight and plan.super_rows == 8192
        assert plan.workspace["d_weight accumulator"] == 0
        assert not other.rounds_d_weight and other.super_rows == 2048
        assert other.workspace["d_weight accumulator"] == 4 * 151_936 * shape["hidden_size"]
        assert plan.workspace_bytes < most * other.workspace_bytes
        assert plan.bytes_moved < other.bytes_moved
    narrow = QWEN | {"hidden_size": 1024}
    assert plan_chunks(**narrow) == chunked(monkeypatch, **narrow)
    # Of all tokens of a small batch there is one super-chunk anyway.
    few = plan_chunks(**narrow | {"tokens": 2000})
    assert few.rounds_d_weight and few.super_rows == 2048


@pytest.mark.parametrize(
    "more",
    [{"dtype": torch.float16}, {"dtype": torch.float32}, {"wide_weight_grad": True},
     {"weight_dtype": torch.float32}, {"needs_weight_grad": False}],
)  # fmt: skip
def test_nothing_else_is_rounded_by_a_product(more):
    plan = plan_chunks(**WIDE, **more)
    assert not plan.rounds_d_weight and plan.super_rows < 8192
    trained = more.get("needs_weight_grad", True)
    assert (plan.workspace["d_weight accumulator"] > 0) == trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("v", [1, 300, 32_000, 128_256, 151_936, 151_935, 262_144, 2_000_000])
@pytest.mark.parametrize("tokens", [0, 1, 1000, 8192, 100_000])
def test_rows_follow_their_bytes(tokens, v, dtype):
    plan = plan_chunks(**QWEN | {"vocab_size": v, "tokens": tokens}, dtype=dtype)
    size = max(dtype.itemsize, 4)
    assert plan.rows % 128 == plan.super_rows % 128 == 0
    assert 0 < plan.rows <= plan.super_rows
    for rows, name, most in (
        (plan.rows, "student logits", 4096), (plan.super_rows, "d_logits", 8192)
    ):  # fmt: skip
        if name == "d_logits" and (plan.in_place or plan.rounds_d_weight):
            continue
        stride = -(-v // 16) * 16
        each = size if name == "student logits" else dtype.itemsize
        # In multiples of 128 tokens, d_logits in whole chunks.
        assert rows <= most
        assert plan.workspace[name] == each * stride * rows
        assert each * stride * rows <= chunking.CHUNK_BYTES or rows == 128 or (
            name == "d_logits" and rows == plan.rows
        )  # fmt: skip
    if tokens == 100_000:
        assert plan.rows == 4096 or 2 * plan.workspace["student logits"] > chunking.CHUNK_BYTES or (
            v == 2_000_000
        )  # fmt: skip


def test_some_1024_rows_at_a_vocabulary_of_152k():
    assert plan_chunks(**QWEN).rows == 1024
    rows = [plan_chunks(**QWEN | {"vocab_size": v}).rows for v in (262_144, 128_256, 65_536)]
    assert rows == sorted(rows) and rows[0] < 1024 < rows[1]


def test_a_batch_is_cut_into_even_chunks():
    """1030 tokens were a chunk of 1024 and one of 6, which reads both heads for nothing."""
    assert plan_chunks(**QWEN | {"tokens": 1030}).rows == 640
    assert plan_chunks(**QWEN | {"tokens": 1024}).rows == 1024


def test_rows_of_a_cpu_are_not_padded():
    for backend in ("torch", "native"):
        plan = plan_chunks(64, 301, 16, device="cpu", backend=backend)
        made = products.products_for(engine_for(backend), torch.bfloat16, "cpu")
        assert made.row_stride(301) == 301
        assert plan.workspace["student logits"] == 4 * 301 * plan.rows


@pytest.mark.parametrize("shape", [QWEN, WIDE, QWEN | {"vocab_size": 32_000}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_budget_is_kept_and_spent_on_fewer_bytes(shape, dtype):
    shape = shape | {"dtype": dtype}
    free = plan_chunks(**shape)
    with pytest.raises(ValueError, match="too small for vocabulary") as error:
        plan_chunks(**shape, max_workspace_bytes=1)
    least = int(re.search(r"take (\d+) bytes", str(error.value)).group(1))
    with pytest.raises(ValueError, match="too small"):
        plan_chunks(**shape, max_workspace_bytes=least - 1)
    moved = []
    for share in (0, 0.1, 0.3, 0.6, 0.9, 1):
        budget = least + int(share * (free.workspace_bytes - least))
        plan = plan_chunks(**shape, max_workspace_bytes=budget)
        assert plan.workspace_bytes <= budget
        moved.append(plan.bytes_moved)
    assert moved == sorted(moved, reverse=True) and moved[0] > moved[-1]
    assert plan == free


# --- work ----------------------------------------------------------------------------------------


def test_bytes_of_a_call_by_hand():
    """Two chunks of logits, one super-chunk, whose products round."""
    n, v, h, g = 256, 151_936, 2048, 4096
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "FIXED_SIZES", (128, 256))
        plan = plan_chunks(n, v, h, g, objective=GKD())
    logits = 4 * n * v
    expected = {
        "student logits": 2 * (2 * v * h) + 2 * n * h + logits,
        "teacher logits": 2 * (2 * v * g) + 2 * n * g + logits,
        "statistics": 2 * logits,
        "sums": 2 * logits,
        "rule": 0,
        "gradient": 2 * logits + 2 * n * v,
        "d_hidden": 2 * n * v + 2 * v * h + 2 * n * h,
        "d_weight": 2 * n * v + 2 * n * h + 2 * v * h,
    }
    assert {each.name: each.bytes for each in plan.work} == expected
    assert plan.bytes_moved == sum(expected.values())
    assert [each.launches for each in plan.work] == [2, 2, 2, 2, 2, 2, 1, 1]
    assert sum(each.flop for each in plan.work) == plan.gemm_flop


def test_an_accumulator_is_read_and_written(monkeypatch):
    plan, other = plan_chunks(**WIDE), chunked(monkeypatch, **WIDE)
    head = 151_936 * 4096

    def moved(plan, name):
        return sum(each.bytes for each in plan.work if each.name == name)

    # Four products: three reads and four writes of float32 for one write of bf16.
    assert moved(other, "d_weight") - moved(plan, "d_weight") == (7 * 4 - 2) * head
    assert moved(other, "rounding of d_weight") == (4 + 2) * head
    assert moved(plan, "rounding of d_weight") == 0


@pytest.mark.parametrize("name", ["tropd", "opd", "gkd", "reverse_kl", "entropy_opd"])
def test_launches_are_the_products_and_kernels_of_a_call(name, monkeypatch):
    """Counted at the doors of both, on the interpreter, in three super-chunks."""
    pytest.importorskip("triton")
    from tropd_kernels.rows import triton_kernels

    rule, made = OBJECTIVES[name], []
    for product in ("logits_into", "d_hidden", "d_weight"):
        whole = getattr(products.TorchProducts, product)
        monkeypatch.setattr(
            products.TorchProducts, product,
            lambda *a, _f=whole, _n=product: (made.append(_n), _f(*a))[1],
        )  # fmt: skip
    for kernel in [each for each in vars(triton_kernels) if each.endswith("_kernel")]:
        monkeypatch.setattr(
            triton_kernels, kernel, Counted(getattr(triton_kernels, kernel), kernel, made)
        )
    monkeypatch.setattr(chunking, "MULTIPLE", 1)
    monkeypatch.setattr(chunking, "FIXED_SIZES", (4, 8))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = make_problem(tokens=19, vocab_size=67, device=device)
    problem.call(rule, "hidden", "triton", torch.float32)
    v = min(len(problem.weight), len(problem.teacher_weight))
    plan = plan_chunks(
        19, v, problem.weight.shape[1], problem.teacher_weight.shape[1], dtype=torch.float32,
        device=device, backend="triton", objective=rule,
    )  # fmt: skip
    assert len(made) == plan.launches, made


class Counted:
    def __init__(self, kernel, name, made):
        self.kernel, self.name, self.made = kernel, name, made

    def __getitem__(self, grid):
        self.made.append(self.name)
        return self.kernel[grid]


def test_the_lower_bound_of_time():
    plan = plan_chunks(**QWEN, objective=TrOPD())
    fast = plan.lower_bound(tb_per_s=1e6, tflop_per_s=788)
    assert fast == pytest.approx(plan.gemm_flop / 788e12, rel=1e-3)
    assert plan.lower_bound(4.3, 1e9) == pytest.approx(plan.bytes_moved / 4.3e12, rel=1e-3)
    bound = plan.lower_bound(4.3, 788)
    both = fast + plan.bytes_moved / 4.3e12
    assert fast < bound < both
    text = plan.describe(4.3, 788)
    assert text.startswith(repr(plan))
    assert f"lower bound of time at 4.3 TB/s and 788 TFLOP/s: {1e3 * bound:.2f} ms" in text
    assert f"{plan.bytes_moved / 1e9:.2f} GB in {plan.launches} launches, at least" in repr(plan)
    for each in plan.work:
        assert (f"{each.name}: " in text) == (each.bytes > 0)


@pytest.mark.parametrize("rates", [(0, 788), (4.3, -1), (4.3, float("inf")), ("fast", 788)])
def test_rates_that_no_device_has(rates):
    name = "tb_per_s" if rates[1] == 788 else "tflop_per_s"
    with pytest.raises(ValueError, match=f"{name} must be a positive, finite number, got"):
        plan_chunks(**QWEN).lower_bound(*rates)


def test_what_depends_on_the_batch_is_not_counted():
    """It would be no lower bound."""

    def moved(rule, name, **more):
        plan = plan_chunks(**QWEN, objective=rule, **more)
        return {each.name: each for each in plan.work}.get(name)

    assert moved(TrOPD(top_k=64), "sums").bytes == 0 < moved(GKD(), "sums").bytes
    d_logits = 2 * 8192 * 151_936
    assert moved(TrOPD(outlier="mask"), "gradient").bytes == d_logits
    assert moved(OPD(), "gradient").bytes == 3 * d_logits
    selected = 8192 - math.ceil(0.8 * 8191)  # with a score at or above the linear quantile at 0.8
    assert moved(EntropyOPD(), "gradient").bytes == 3 * d_logits * selected // 8192
    by_threshold = TokenRule(select_by="entropy", select_threshold=1.0)
    assert moved(by_threshold, "gradient") is None
    assert moved(GKD(), "d_hidden", samples_gradient=True) is None
    assert plan_chunks(**QWEN | {"tokens": 0}).bytes_moved == 0
