"""The chunk loop as it runs on a GPU, over products of a GPU that a CPU stands in for
(`gpu_products`): d_weight that one product rounds, and rows that are padded."""

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from flat import BOTH, flat_problem
from fuzz_native import same_bits
from gpu_products import on_gpu
from problems import OBJECTIVES, make_problem, relative_error

from tropd_kernels import available_backends, backends, plan_chunks, products
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss.eager import reference_loss
from tropd_kernels.loss.loop import backward, forward
from tropd_kernels.loss.problem import NO_GRADIENTS, Problem, Side
from tropd_kernels.loss.sampling import GradientSampling
from tropd_kernels.parallel import Shard

TOKENS, IDS, WIDTH = 64, 301, 16
ONE = torch.ones(())
MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    """What nothing has written is NaN."""
    on_gpu(monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    products.adds_to_wide_sums.cache_clear()


def flat(tokens=TOKENS, ids=IDS, dtype=torch.bfloat16, **more) -> Problem:
    made = make_problem(tokens, ids, ids, WIDTH)
    student, weight, teacher, teacher_weight = (
        getattr(made, name).to(dtype)
        for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")
    )
    rule, backend = more.pop("rule", OBJECTIVES["reverse_kl"]), more.pop("backend", "torch")
    sides = Side(student, weight), Side(teacher, teacher_weight)
    return flat_problem(*sides, made.labels, rule, backend, **more)


def gradients(problem: Problem, wide: bool = False):
    return forward(replace(problem, forward_grads=BOTH._replace(fp32_weight=wide)))


def exact_d_weight(problem: Problem) -> torch.Tensor:
    weight = problem.student.weight.double().requires_grad_()
    exact = replace(
        problem, student=Side(problem.student.source.double(), weight),
        teacher=Side(problem.teacher.source.double(), problem.teacher.weight.double()),
    )  # fmt: skip
    reference_loss(replace(exact, loss_scale=ONE.double()))[0].backward()
    return weight.grad


def calls_of(monkeypatch, name: str) -> list:
    """Arguments of the products of this name."""
    seen, whole = [], getattr(products.TorchProducts, name)
    monkeypatch.setattr(
        products.TorchProducts, name, lambda self, *a: (seen.append(a), whole(self, *a))[1]
    )
    return seen


# --- d_weight that one product rounds ------------------------------------------------------------


@pytest.mark.parametrize("tokens", [TOKENS, 13, 1])
def test_one_product_of_all_tokens_rounds_d_weight(tokens, monkeypatch):
    """To the bits of a float32 product rounded, into the gradient itself, with no accumulator."""
    problem, made = flat(tokens), calls_of(monkeypatch, "d_weight")
    found = gradients(problem).d_weight
    ((out, d_logits, _, sums),) = made
    assert sums is None and out.data_ptr() == found.data_ptr()
    assert d_logits.shape == (tokens, IDS) and found.dtype == torch.bfloat16
    monkeypatch.setattr(chunking, "FIXED_SIZES", (8, 64))
    wide = gradients(problem, wide=True).d_weight
    assert wide.dtype == torch.float32 and same_bits(found, wide.bfloat16())


def test_its_error_is_that_of_an_accumulator(monkeypatch):
    problem = flat()
    exact = exact_d_weight(problem)
    error = relative_error(gradients(problem).d_weight, exact)
    monkeypatch.setattr(chunking, "WITHOUT_ACCUMULATOR", 0)
    made = calls_of(monkeypatch, "d_weight")
    chunked = gradients(problem).d_weight
    assert len(made) == TOKENS // 16
    assert error <= 1.01 * relative_error(chunked, exact)
    assert same_bits(chunked, gradients(problem, wide=True).d_weight.bfloat16())


def test_partial_sums_of_that_product_are_not_rounded(monkeypatch):
    """By default torch lets cuBLAS round them. What the caller has set comes back, the split-K
    switch beside it too."""
    seen, whole = [], torch.mm

    def mm(a, b, **how):
        if how["out"].dtype == torch.bfloat16:
            seen.append(MATMUL.allow_bf16_reduced_precision_reduction)
        return whole(a, b, **how)

    monkeypatch.setattr(torch, "mm", mm)
    before = torch._C._get_cublas_allow_bf16_reduced_precision_reduction()
    try:
        for setting in ((True, True), (False, True), (False, False)):
            MATMUL.allow_bf16_reduced_precision_reduction = setting
            gradients(flat())
            assert torch._C._get_cublas_allow_bf16_reduced_precision_reduction() == setting
        assert seen == [False] * 2 * 3  # d_hidden and d_weight, each time
    finally:
        MATMUL.allow_bf16_reduced_precision_reduction = before


def test_no_product_rounds_what_is_returned_wide():
    """A float16 gradient waits in float32 for a loss scale, `main_grad` is float32, and a float32
    head's gradient is, too."""
    assert gradients(flat(dtype=torch.float16)).d_weight.dtype == torch.float32
    assert gradients(flat(), wide=True).d_weight.dtype == torch.float32
    problem = flat()
    student = replace(problem.student, weight=problem.student.weight.float())
    found = gradients(replace(problem, student=student)).d_weight
    assert found.dtype == torch.float32
    assert not same_bits(found, found.bfloat16().float())


@pytest.mark.parametrize("factor", [0, 3])  # never, and in spite of the sample's workspace
@pytest.mark.parametrize("selects", [{"tolerance": 0.5}, {"share": 0.2}])
def test_a_sample_of_ids(selects, factor, monkeypatch):
    monkeypatch.setattr(chunking, "WITHOUT_ACCUMULATOR", factor)
    problem = flat(sampling=GradientSampling(**selects, seed=torch.tensor(4)))
    result = gradients(problem)
    assert 0 < result.report[0] < 1 and result.d_weight.dtype == torch.bfloat16
    monkeypatch.setattr(chunking, "FIXED_SIZES", (8, 16 if factor == 0 else 64))
    assert same_bits(result.d_weight, gradients(problem, wide=True).d_weight.bfloat16())


def test_a_backward_that_recomputes():
    problem = flat()
    coefs = forward(replace(problem, forward_grads=NO_GRADIENTS)).coefs
    found = backward(problem, coefs, BOTH).d_weight
    assert same_bits(found, gradients(problem).d_weight)


def test_no_token_gives_zeros():
    found = gradients(replace(flat(), labels=torch.full((TOKENS,), -100))).d_weight
    assert found.dtype == torch.bfloat16 and (found == 0).all()


def test_a_shard_of_the_vocabulary(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/it", rank=0, world_size=1)
    try:
        shard = Shard(dist.group.WORLD, (0, IDS), (0, IDS), IDS)
        problem = flat()
        whole, sharded = (gradients(each) for each in (problem, replace(problem, shard=shard)))
        assert sharded.d_weight.dtype == torch.bfloat16
        assert relative_error(sharded.d_weight, whole.d_weight) < 2**-8
        assert relative_error(sharded.d_hidden, whole.d_hidden) < 2**-8
    finally:
        dist.destroy_process_group()


# --- sums that torch refuses to add to -----------------------------------------------------------

REFUSALS = {
    "of the device": NotImplementedError("Could not run 'aten::addmm.dtype_out'"),
    "of the version": TypeError("addmm() got an unexpected keyword argument 'out_dtype'"),
    "of the library": RuntimeError("out_dtype is only supported for mm"),
}


def refuse(monkeypatch, error) -> list:
    """`torch.addmm` with `out_dtype`; gives the shapes that it was asked for."""
    asked = []

    def addmm(sums, *_, out_dtype=None, out=None, **more):
        assert out_dtype is not None
        asked.append(tuple(sums.shape))
        raise error

    monkeypatch.setattr(torch, "addmm", addmm)
    return asked


@pytest.mark.parametrize("ids", [1, 40, 41, 301])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("why", REFUSALS)
def test_tiles_where_torch_refuses_to_add(why, dtype, ids, monkeypatch):
    """Each of some rows, and a last one of fewer."""
    monkeypatch.setattr(chunking, "WITHOUT_ACCUMULATOR", 0)
    monkeypatch.setattr(products, "TILE_ROWS", 40)
    monkeypatch.setattr(chunking, "FIXED_SIZES", (8, 16))
    problem = flat(ids=ids, dtype=dtype)
    expected = gradients(problem, wide=True).d_weight
    products.adds_to_wide_sums.cache_clear()
    asked = refuse(monkeypatch, REFUSALS[why])
    found = gradients(problem, wide=True).d_weight
    assert expected.norm() > 0 or ids == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients(problem)
    assert asked == [(16, 16)]  # of the probe, once


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
     RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
     RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")],
    ids=["memory", "cublas", "busy"],
)  # fmt: skip
def test_a_device_that_fails_is_no_refusal(error, monkeypatch):
    products.adds_to_wide_sums.cache_clear()
    asked = refuse(monkeypatch, error)
    for _ in range(2):
        with pytest.raises(type(error)):
            products.adds_to_wide_sums(torch.device("cpu"), torch.bfloat16)
    assert len(asked) == 2
    # What a report of a fault begins with says it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    whole = products.adds_to_wide_sums
    monkeypatch.setattr(
        backends, "adds_to_wide_sums", lambda _, dtype: whole(torch.device("cpu"), dtype)
    )
    first = str(error).splitlines()[0]
    assert available_backends("cuda")["torch"] == (
        f"available (a small product on this device failed: {first})"
    )


def test_backends_say_that_torch_refuses(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    asked, refused = [], [torch.float16]
    monkeypatch.setattr(
        backends, "adds_to_wide_sums",
        lambda device, dtype: asked.append(device) or dtype not in refused,
    )  # fmt: skip
    words = "available (d_weight of float16 is added up in tiles: torch"
    for name in ("triton", "torch") if find_spec("triton") else ("torch",):
        assert available_backends("cuda")[name].startswith(words)
    assert set(asked) == {torch.device("cuda", 3)}
    refused.append(torch.bfloat16)
    assert "d_weight of bfloat16 and float16 is" in available_backends()["torch"]
    refused.clear()
    assert available_backends("cuda")["torch"] == "available"
    asked.clear()
    assert available_backends("cpu")["torch"] == "available" and not asked


def test_the_plan_counts_a_tile_beside_an_accumulator():
    shape = dict(vocab_size=50_000, hidden_size=64, teacher_hidden_size=64)
    few, many = (plan_chunks(tokens, **shape) for tokens in (8, 10_000))
    assert few.workspace["temporaries"] == 0
    assert many.workspace["temporaries"] == 4 * products.TILE_ROWS * 64
    wide = plan_chunks(10_000, **shape, dtype=torch.float32)
    assert wide.workspace["temporaries"] == 0


# --- d_hidden that its product rounds ------------------------------------------------------------


@pytest.mark.parametrize("factor", [0, 3], ids=["four super-chunks", "one"])
def test_d_hidden_is_rounded_by_its_product(factor, monkeypatch):
    """To the bits of a float32 product rounded, into the gradient itself."""
    monkeypatch.setattr(chunking, "WITHOUT_ACCUMULATOR", factor)
    problem, made = flat(), calls_of(monkeypatch, "d_hidden_into")
    expected = []

    def d_hidden_into(self, out, d_logits, weight, rounded=products.TorchProducts.d_hidden_into):
        expected.append(self.d_hidden(d_logits, weight).bfloat16())
        rounded(self, out, d_logits, weight)

    monkeypatch.setattr(products.TorchProducts, "d_hidden_into", d_hidden_into)
    found = gradients(problem).d_hidden
    assert [call[0].data_ptr() for call in made] == [
        part.data_ptr() for part in found.split(TOKENS // len(made))
    ]
    assert len(made) == (1 if factor else 4) and same_bits(found, torch.cat(expected))


def test_d_hidden_that_is_not_whole_or_not_in_place_is_rounded_later(monkeypatch):
    made = calls_of(monkeypatch, "d_hidden_into")
    labels = flat().labels.clone()
    labels[::3] = -100
    sampled = GradientSampling(share=0.2, seed=torch.tensor(4))
    for problem in (
        replace(flat(), labels=labels),
        flat(sampling=sampled),
        flat(dtype=torch.float16),
    ):
        assert gradients(problem).d_hidden.norm() > 0
    assert not made


# --- rows that are padded ------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("objective", ["tropd", "gkd", "sampled"])
def test_padding_changes_nothing(backend, dtype, objective, monkeypatch):
    """Of an odd vocabulary: padded columns hold NaN, and reach neither products nor rows."""
    rule = OBJECTIVES["opd" if objective == "sampled" else objective]
    inputs = {"uniforms": make_problem(12, 131, 131, WIDTH).options["uniforms"]}
    problem = flat(12, 131, dtype, rule=rule, backend=backend, inputs=inputs)
    strides = [call[0].stride() for call in calls_and(problem, monkeypatch, "logits_into")]
    assert set(strides) == {(144, 1)}
    padded = gradients(problem)
    if dtype == torch.bfloat16:
        d_logits = [call[1] for call in calls_and(problem, monkeypatch, "d_hidden_into")]
    else:
        d_logits = [call[0] for call in calls_and(problem, monkeypatch, "d_hidden")]
    assert d_logits
    assert {(g.stride(), g.shape[1]) for g in d_logits} == {((144, 1), 131)}
    monkeypatch.setattr(products, "ROW_MULTIPLE", 1)
    plain = gradients(problem)
    for name in ("stats", "coefs", "d_hidden", "d_weight"):
        found, expected = getattr(padded, name), getattr(plain, name)
        if backend == "torch" or os.environ.get("TRITON_INTERPRET") == "1":
            assert same_bits(found, expected)
        else:  # aligned rows are read by other threads, which add up in another order
            assert found.isnan().equal(expected.isnan())
            few = 8 * torch.finfo(found.dtype).eps
            torch.testing.assert_close(found, expected, rtol=few, atol=few, equal_nan=True)
        assert getattr(padded, name).is_contiguous()
    assert padded.d_weight.isfinite().all() and padded.d_weight.norm() > 0


def calls_and(problem, monkeypatch, name):
    with monkeypatch.context() as patch:
        seen = calls_of(patch, name)
        gradients(problem)
    return seen


def test_the_plan_counts_the_padding():
    shape = dict(tokens=64, hidden_size=16, teacher_hidden_size=16)
    odd, even = (plan_chunks(vocab_size=v, **shape) for v in (301, 304))
    assert (odd.rows, odd.super_rows) == (even.rows, even.super_rows)
    for name in ("student logits", "teacher logits", "d_logits"):
        assert odd.workspace[name] == even.workspace[name] > 0
    assert odd.workspace["student logits"] == 4 * 304 * odd.rows
