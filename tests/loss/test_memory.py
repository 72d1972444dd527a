"""What the plan promises: no (tokens, V) tensor, its own figure of the workspace, and results that
do not depend on the chunks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from flat import BOTH, flat_problem
from problems import OBJECTIVES, make_problem, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from watching import LargestTensor, ResidentPeak

from tropd_kernels import (
    GKD,
    OPD,
    Divergence,
    EntropyOPD,
    ExOPD,
    HiddenTeacher,
    TrOPD,
    buffers,
    linear_distillation_loss,
    native,
    plan_chunks,
    products,
)
from tropd_kernels.backends import choose_backend
from tropd_kernels.loss import agreement
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss.loop import backward, forward
from tropd_kernels.loss.problem import Side
from tropd_kernels.rows.layout import Coef, LogitTransform, RowBatch, RowOptions
from tropd_kernels.rows.sharded_search import head_threshold

BACKENDS = ("torch", "native", "triton")
SELECTED = replace(GKD(), select_by="reverse_kl", select_fraction=0.5)


@pytest.mark.parametrize(
    "rule", [TrOPD(top_k=8), ExOPD(extrapolation=1.25), SELECTED],
    ids=["teacher", "target", "selected"],
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tensor_of_tokens_times_vocabulary(backend, rule, device, monkeypatch):
    rows = 4 if backend == "triton" and device == "cpu" else 16  # the interpreter is slow
    monkeypatch.setattr(chunking, "MULTIPLE", rows)
    monkeypatch.setattr(chunking, "FIXED_SIZES", (rows, 2 * rows))
    monkeypatch.setattr("tropd_kernels.rows.torch_rows.BLOCK_ELEMENTS", {"cpu": 4 * 3001})
    tokens, v = 16 * rows, 3001
    problem = make_problem(tokens, v, width=4, teacher_width=4, device=device)
    teacher = Side(problem.teacher_hidden.float(), problem.teacher_weight.float(), scale=2.0)
    flat = flat_problem(
        Side(problem.hidden.float(), problem.weight.float(), softcap=9.0), teacher, problem.labels,
        rule, backend, {"uniforms": problem.options["uniforms"]},
        reference=teacher if rule.reference_power else None,
    )  # fmt: skip
    with LargestTensor() as seen:
        result = forward(flat)
    assert result.d_weight.abs().sum() > 0
    assert seen.elements <= tokens * v / 8
    with LargestTensor() as seen:
        backward(flat, result.coefs, BOTH)
    assert seen.elements <= tokens * v / 8


def test_the_hook_sees_an_eager_loss():
    """The counter itself works: eager code does make the tensor."""
    with LargestTensor() as seen:
        (torch.randn(64, 4) @ torch.randn(4, 300)).log_softmax(-1)
    assert seen.elements >= 64 * 300


def of_the_other_device(backend):
    other = (backend == "triton") != torch.cuda.is_available()
    return pytest.mark.skip(reason="this backend is for the other device") if other else ()


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=of_the_other_device(name)) for name in BACKENDS]
)
@pytest.mark.parametrize("rule", [TrOPD(), SELECTED], ids=["all", "selected"])
@pytest.mark.parametrize(("tokens", "h"), [(1024, 64), (1152, 256)], ids=["one", "two"])
def test_workspace_is_what_the_plan_says(dtype, frozen, backend, rule, tokens, h, device):
    """Measured over inputs and returned gradients, at most the plan's own figure + 10 %; and the
    plan is not generous: at least half of it is really used, if all tokens are. In one super-chunk
    of a half-precision batch on a CPU, and in two."""
    v, g = 36_000, 64
    hidden = torch.randn(tokens, h, device=device).to(dtype).requires_grad_()

    def head(width):
        # Logits of a standard deviation of 3: the softmax of a wider spread holds subnormal
        # numbers, with which some processors multiply ten times slower.
        return torch.randn(v, width, device=device).mul_(3 / width**0.5).to(dtype)

    weight = head(h).requires_grad_(not frozen)
    teacher = HiddenTeacher(torch.randn(tokens, g, device=device).to(dtype), head(g))
    labels = torch.randint(v, (tokens,), device=device)

    def run():
        linear_distillation_loss(
            hidden, weight, labels, teacher, rule, seed=0, backend=backend
        ).loss.backward()
        hidden.grad = weight.grad = None

    run()  # libraries allocate their own buffers once
    returned = sum(t.numel() * t.element_size() for t in (hidden, weight) if t.requires_grad)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        used = torch.cuda.max_memory_allocated() - before - returned
    else:
        buffers.release()
        with ResidentPeak() as peak:
            run()
        used = peak.delta - returned
    plan = plan_chunks(
        tokens, v, h, g, dtype=dtype, device=device, backend=backend, objective=rule,
        needs_weight_grad=not frozen,
    )  # fmt: skip
    assert used <= 1.1 * plan.workspace_bytes, f"{used / 1e6:.0f} MB\n{plan}"
    least = 0.5 if rule.score is None else 0.25
    assert used >= least * plan.workspace_bytes, f"{used / 1e6:.0f} MB\n{plan}"


@pytest.mark.slow
@pytest.mark.skipif(not native.BF16_PRODUCTS, reason="this CPU's bf16 products are torch's")
def test_d_weight_is_rounded_into_the_room_of_the_logits():
    """The accumulator is there until the end, beside the gradient that is returned."""
    tokens, v, h = 1152, 50_000, 512
    hidden, weight = (torch.randn(n, h).bfloat16().requires_grad_() for n in (tokens, v))
    labels = torch.randint(v, (tokens,))
    teacher = HiddenTeacher(torch.randn(tokens, 64).bfloat16(), torch.randn(v, 64).bfloat16())

    def run():
        linear_distillation_loss(hidden, weight, labels, teacher, GKD(), backend="native")

    run()
    buffers.release()
    with ResidentPeak() as peak:
        run()
    plan = plan_chunks(tokens, v, h, 64, device="cpu", backend="native", objective=GKD())
    assert plan.rounds_d_weight and plan.super_rows < tokens
    assert peak.delta <= 1.02 * plan.workspace_bytes, f"{peak.delta / 1e6:.0f} MB\n{plan}"


@pytest.mark.parametrize("name", ["tropd", "gkd", "entropy_opd"])
@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_result_does_not_depend_on_the_chunks(name, form, device, monkeypatch):
    backend = "triton" if device == "cuda" else "torch"
    problem = make_problem(tokens=53, device=device)
    problem.labels[::5] = -100
    whole = problem.call(OBJECTIVES[name], form, backend)
    for rows, super_rows in ((1, 1), (4, 8), (7, 21)):
        monkeypatch.setattr(chunking, "MULTIPLE", rows)
        monkeypatch.setattr(chunking, "FIXED_SIZES", (rows, super_rows))
        pieces = problem.call(OBJECTIVES[name], form, backend)
        torch.testing.assert_close(pieces[0], whole[0], rtol=1e-6, atol=0)
        for key in whole[1]:
            assert relative_error(pieces[1][key], whole[1][key]) < 2e-6


def test_plan_counts_the_gemms():
    shape = dict(tokens=8192, vocab_size=151_936, hidden_size=2048)

    def work(**more):
        plan = plan_chunks(**shape, **more)
        return plan.student_gemms, plan.teacher_gemms

    assert work(teacher_hidden_size=4096) == (3, 1)
    assert work() == (3, 0)
    assert work(needs_weight_grad=False, teacher_hidden_size=4096) == (2, 1)
    assert work(teacher_hidden_size=4096, reduction="none") == (4, 2)
    # Of 8192 tokens 1639 reach the quantile at 0.8.
    assert work(objective=EntropyOPD()) == (1 + 3 * 1639 / 8192, 0)
    by_kl = replace(GKD(), select_by="reverse_kl", select_fraction=0.2)
    both = work(objective=by_kl, teacher_hidden_size=4096)
    assert both == (1 + 3 * 1639 / 8192, 1 + 1639 / 8192)
    by_scores = replace(GKD(), select_by="scores", select_fraction=0.2)
    assert work(objective=by_scores, teacher_hidden_size=4096) == (3 * 1639 / 8192, 1639 / 8192)
    assert work(objective=OPD(), needs_weight_grad=False, needs_hidden_grad=False) == (1, 0)
    plan = plan_chunks(**shape, teacher_hidden_size=4096)
    assert plan.gemm_flop == 2 * 8192 * 151_936 * (3 * 2048 + 4096)
    logits = 8 * plan.rows * 151_936
    d_logits = 2 * plan.super_rows * 151_936
    head = 0 if plan.super_rows == 8192 else 4 * 151_936 * 2048
    assert logits + d_logits + head <= plan.workspace_bytes <= 1.05 * (logits + d_logits + head)
    assert "3 S + 1 T" in str(plan)
    assert "8192 tokens" in str(plan)


def test_plan_of_the_backend_that_a_call_takes(monkeypatch):
    """On a CPU it was Triton's, which no call takes there by itself."""
    shape = dict(tokens=1024, vocab_size=151_936, hidden_size=1024, device="cpu")
    taken = choose_backend(None, torch.device("cpu"))
    assert taken != "triton"
    assert plan_chunks(**shape) == plan_chunks(**shape, backend=taken)
    # Two backends whose plans differ on every CPU, by torch's temporaries.
    monkeypatch.setattr(chunking, "choose_backend", lambda requested, device: "torch")
    assert plan_chunks(**shape) == plan_chunks(**shape, backend="torch")
    assert plan_chunks(**shape) != plan_chunks(**shape, backend="triton")


def test_plan_keeps_to_its_budget():
    shape = dict(
        tokens=8192, vocab_size=151_936, hidden_size=64, teacher_hidden_size=64,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    free = plan_chunks(**shape)
    assert (free.rows, free.super_rows) == (512, 512)
    shape["dtype"], shape["backend"] = torch.bfloat16, "native"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "BF16_PRODUCTS", ["AVX512-BF16"])
        free = plan_chunks(**shape)
        assert (free.rows, free.super_rows) == (256, 1024)
        tight = plan_chunks(**shape, max_workspace_bytes=free.workspace_bytes - 1)
        assert tight.rows == 256 and tight.super_rows < 1024  # super-chunks give way first
        tighter = plan_chunks(**shape, max_workspace_bytes=300_000_000)
    assert tighter.rows < 256 and tighter.workspace_bytes <= 300_000_000
    assert tighter.rows % 128 == 0 and tighter.super_rows % 128 == 0
    with pytest.raises(ValueError, match="max_workspace_bytes=1000 is too small"):
        plan_chunks(**shape, max_workspace_bytes=1000)


def test_a_batch_in_one_chunk_stays_so_while_that_fits_the_budget(monkeypatch):
    """Halving the super-chunk would bring the accumulator back, which is larger than what it
    saves. Where d_logits is in bf16, on whatever CPU the plan is made."""
    monkeypatch.setattr(native, "BF16_PRODUCTS", ["AVX512-BF16"])
    shape = dict(
        tokens=1024, vocab_size=151_936, hidden_size=1024, device="cpu", backend="native",
        teacher_hidden_size=2048,
    )  # fmt: skip
    free = plan_chunks(**shape)
    assert free.rounds_d_weight and free.super_rows == 1024
    tight = plan_chunks(**shape, max_workspace_bytes=500_000_000)
    assert tight.rounds_d_weight and tight.rows == 128 and tight.workspace_bytes <= 500_000_000
    long = plan_chunks(**shape | {"tokens": 4096})
    assert long.rounds_d_weight and long.workspace["d_weight accumulator"] > 0
    with pytest.raises(ValueError, match=f"128 tokens take {tight.workspace_bytes} bytes"):
        plan_chunks(**shape, max_workspace_bytes=tight.workspace_bytes - 1)


def test_gemms_that_run_are_those_of_the_plan(device, monkeypatch):
    """Counts the products at the loop's own doors."""
    backend = "triton" if device == "cuda" else "torch"
    calls = []
    for name in ("logits_into", "d_hidden", "d_weight"):
        original = getattr(products.TorchProducts, name)
        monkeypatch.setattr(
            products.TorchProducts, name,
            lambda *a, _f=original, _n=name, **k: (calls.append(_n), _f(*a, **k))[1],
        )  # fmt: skip
    problem = make_problem(tokens=8, device=device)

    def count(objective, form, **more):
        calls.clear()
        problem.call(objective, form, backend, **more)
        return {name: calls.count(name) for name in dict.fromkeys(calls)}

    assert count(GKD(), "hidden") == {"logits_into": 2, "d_hidden": 1, "d_weight": 1}
    assert count(OPD(), "sampled") == {"logits_into": 1, "d_hidden": 1, "d_weight": 1}
    assert count(EntropyOPD(), "sampled")["logits_into"] == 1  # for the score and for the loss
    one = torch.ones((), device=device)
    assert count(GKD(), "hidden", reduction="none", incoming=one) == {
        "logits_into": 4, "d_hidden": 1, "d_weight": 1,
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_are_dropped_before_the_first_gemm(backend, device, monkeypatch):
    seen = []
    original = products.TorchProducts.logits_into
    monkeypatch.setattr(
        products.TorchProducts, "logits_into",
        lambda self, o, h, w: (seen.append(h.shape[0]), original(self, o, h, w))[1],
    )  # fmt: skip
    problem = make_problem(tokens=9, device=device)
    problem.labels[:4] = -100
    weight = torch.ones(9, device=device)
    weight[5] = 0
    problem.call(GKD(), "hidden", backend, token_weight=weight)
    assert seen == [4, 4]  # student and teacher, four tokens each


class Allocated(TorchDispatchMode):
    """Bytes of the large tensors that factories make; results of arithmetic live by blocks."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.bytes = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("empty", "new_zeros", "zeros", "new_empty"):
            size = result.untyped_storage().nbytes()
            self.bytes += size if size >= self.least else 0
        return result


def test_the_plan_counts_the_search_of_a_sharded_akl():
    n, width = 128, 5000
    rule = Divergence("akl")
    shape = dict(
        tokens=n, vocab_size=width, hidden_size=64, teacher_hidden_size=64, device="cpu",
        backend="torch", objective=rule,
    )  # fmt: skip
    plans = [plan_chunks(**shape, vocab_parallel=parallel) for parallel in (False, True)]
    extra = plans[1].workspace_bytes - plans[0].workspace_bytes
    shard = SimpleNamespace(width=width, vocab_size=width, gather=lambda numbers: numbers[None])
    part = RowBatch(*torch.randn(2, n, width), labels=torch.zeros(n, dtype=torch.long))
    coefs = torch.zeros(len(Coef), n)
    coefs[Coef.TEACHER_LOG_SUM] = part.teacher.logsumexp(-1)
    with Allocated(n * width) as made:
        head_threshold(shard, part, RowOptions(rule, LogitTransform(), LogitTransform()), coefs)
    assert made.bytes <= extra <= 1.01 * made.bytes
    other = plan_chunks(**shape | {"objective": TrOPD()}, vocab_parallel=True)
    assert other.workspace["the search for the head"] == 0


class LargestInteger(TorchDispatchMode):
    """Counts the elements of the largest int64 tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.int64:
            self.elements = max(self.elements, result.numel())
        return result


def test_what_ranks_compare_is_read_in_pieces(monkeypatch):
    """Whole, a digest took thirteen times the memory of a teacher's top-k log-probs."""
    values = torch.randn(50, 8)
    whole = agreement.digest(values)
    monkeypatch.setattr(agreement, "PIECE", 64)
    with LargestInteger() as made:
        assert torch.equal(agreement.digest(values), whole)
    assert made.elements <= 64
    assert not torch.equal(agreement.digest(values.roll(64)), whole)
