"""d_weight of several super-chunks in bfloat16: the last product rounds it, to the bits that a
rounding of the whole accumulator gives."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from flat import BOTH, flat_problem
from fuzz_native import same_bits
from problems import OBJECTIVES, make_problem, relative_error
from test_native_products import multiplier  # noqa: F401
from watching import Made

from tropd_kernels import buffers, native, plan_chunks
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss.eager import reference_loss
from tropd_kernels.loss.loop import backward, forward
from tropd_kernels.loss.problem import NO_GRADIENTS, GradNeeds, Problem, Side
from tropd_kernels.loss.sampling import ColumnSampler, GradientSampling
from tropd_kernels.parallel import Shard

pytestmark = [
    pytest.mark.skipif(not native.BF16_PRODUCTS, reason="this CPU's products are torch's"),
    pytest.mark.usefixtures("small_chunks", "multiplier"),
]

CHUNK = 16  # tokens of a super-chunk
#: tokens, ids of the student and of the teacher, width: more than 2 H tokens, in several chunks
SHAPES = [(37, 301, 301, 7), (64, 320, 320, 16), (33, 1, 1, 1), (91, 97, 64, 33), (40, 64, 97, 2)]
ONE = torch.ones(())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Small chunks, in an arena; what no product has written is NaN."""
    monkeypatch.setattr(chunking, "MULTIPLE", CHUNK // 2)
    monkeypatch.setattr(chunking, "CPU_ROWS", CHUNK // 2)
    monkeypatch.setattr(chunking, "CPU_SUPER_ROWS", CHUNK)
    monkeypatch.setattr(buffers, "SMALLEST", 1)
    buffers.release()
    torch.use_deterministic_algorithms(True)  # fills new tensors
    yield
    torch.use_deterministic_algorithms(False)
    buffers.release()


def flat(tokens=64, ids=320, teacher_ids=320, width=16, **more) -> Problem:
    made = make_problem(tokens, ids, teacher_ids, width)
    student, weight, teacher, teacher_weight = (
        getattr(made, name).bfloat16()
        for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")
    )
    labels = made.labels % min(ids, teacher_ids)
    sides = Side(student, weight), Side(teacher, teacher_weight)
    problem = flat_problem(*sides, labels, OBJECTIVES["reverse_kl"], "native")
    return replace(problem, **more)


def d_weight(problem: Problem, wide: bool = False) -> torch.Tensor:
    """With `wide` the accumulator itself."""
    return forward(replace(problem, forward_grads=BOTH._replace(fp32_weight=wide))).d_weight


def rounded_after(problem: Problem) -> torch.Tensor:
    return d_weight(problem, wide=True).bfloat16()


def sampled(problem: Problem, **more) -> Problem:
    """With a sample of the ids."""
    sampling = GradientSampling(**(more or {"share": 0.2}), seed=torch.tensor(4))
    return replace(problem, options=replace(problem.options, sampling=sampling))


@pytest.fixture
def kept(monkeypatch):
    """A function that says what super-chunks of a sample keep: all ids, some or none."""
    choose, words = ColumnSampler.choose, {}

    def chosen(self, d_logits, hidden, start):
        word = words["kept"][start // CHUNK]
        if word == "some":
            return choose(self, d_logits, hidden, start)
        return None if word == "all" else []

    monkeypatch.setattr(ColumnSampler, "choose", chosen)
    return lambda text: words.update(kept=text.split())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_last_product_rounds_to_the_accumulator_s_bits(shape):
    problem = flat(*shape)
    found = d_weight(problem)
    assert found.dtype == torch.bfloat16
    assert same_bits(found, rounded_after(problem))
    shared = min(shape[1:3])
    assert (found[shared:] == 0).all()
    weight = problem.student.weight.double().requires_grad_()
    exact = replace(
        problem, student=Side(problem.student.source.double(), weight),
        teacher=Side(problem.teacher.source.double(), problem.teacher.weight.double()),
    )  # fmt: skip
    reference_loss(replace(exact, loss_scale=ONE.double()))[0].backward()
    truth = weight.grad
    assert truth.norm() > 0 or shared == 1
    assert relative_error(found, truth) < 2**-7


def test_it_makes_one_tensor_of_the_head_s_size():
    problem = flat(91)
    with Made(problem.student.weight.shape) as made:
        found = d_weight(problem)
    whole = [name for name in made.operators if name.split(".")[1] not in ("slice", "view")]
    assert whole == ["aten.new_empty.default"]
    (block,) = buffers._kept
    block.fill_(3)
    assert same_bits(found, rounded_after(problem))


def test_the_plan_counts_an_accumulator_that_a_product_rounds(monkeypatch):
    shape = dict(vocab_size=1000, hidden_size=16, device="cpu", backend="native")
    # Where d_logits overwrite the logits, a chunk of these is all that one product takes.
    in_place = plan_chunks(tokens=1, **shape).in_place
    most = chunking.CPU_ROWS if in_place else 32
    plans = {n: plan_chunks(tokens=n, **shape) for n in (most, most + 1)}
    assert [plan.workspace["d_weight accumulator"] for plan in plans.values()] == [0, 4 * 16_000]
    assert all(plan.rounds_d_weight for plan in plans.values())
    assert not plan_chunks(tokens=33, **shape, needs_weight_grad=False).rounds_d_weight
    assert not plan_chunks(tokens=33, **shape | {"backend": "torch"}).rounds_d_weight


def test_smaller_chunks_of_a_budget(monkeypatch):
    monkeypatch.setattr(chunking, "CPU_ROWS", CHUNK)
    problem = flat(91)
    shape = dict(
        tokens=91, vocab_size=320, hidden_size=16, teacher_hidden_size=24, device="cpu",
        backend="native",
    )  # fmt: skip
    budget = plan_chunks(**shape).workspace_bytes - 1
    assert plan_chunks(**shape, max_workspace_bytes=budget).super_rows == CHUNK // 2
    options = replace(problem.options, max_workspace_bytes=budget)
    problem = replace(problem, options=options)
    assert same_bits(d_weight(problem), rounded_after(problem))


@pytest.mark.parametrize(
    "words",
    [
        "some some some some", "some some some none", "none some some none", "none some none none",
        "none none none some", "all some none all", "some all all some", "none all some none",
        "none none none all",
    ],
)  # fmt: skip
def test_super_chunks_of_which_all_some_or_no_ids_are_kept(words, kept):
    """The last one too, and all but the last."""
    kept(words)
    problem = sampled(flat(60))
    found = d_weight(problem)
    assert found.dtype == torch.bfloat16 and found.norm() > 0
    assert same_bits(found, rounded_after(problem))


@pytest.mark.parametrize("tokens", [0, 20, 60])
def test_no_id_at_all_gives_zeros(tokens, kept):
    kept("none none none none")
    for problem in (
        sampled(flat(tokens)),
        replace(flat(tokens), labels=torch.full((tokens,), -100)),
    ):
        for wide in (False, True):
            assert (d_weight(problem, wide) == 0).all()


@pytest.mark.parametrize("tokens", [14, 91])
@pytest.mark.parametrize("selects", [{"tolerance": 0.5}, {"share": 0.2}])
def test_a_sample(selects, tokens):
    """Of one super-chunk, whose rows go straight into the gradient, and of several."""
    problem = sampled(flat(tokens), **selects)
    result = forward(problem)
    assert 0 < result.report[0] < 1
    assert same_bits(result.d_weight, rounded_after(problem))


def test_a_backward_that_recomputes():
    problem = flat(91)
    coefs = forward(replace(problem, forward_grads=NO_GRADIENTS)).coefs
    found, wide = (
        backward(problem, coefs, GradNeeds(weight=True, fp32_weight=wide)).d_weight
        for wide in (False, True)
    )
    assert found.dtype == torch.bfloat16 and same_bits(found, wide.bfloat16())
    assert same_bits(found, d_weight(problem))


def test_the_next_calls_work_in_the_same_block():
    """Of other sizes, one of them without an accumulator; each gives the bits of a fresh block."""
    problems = [flat(91), flat(60), flat(20), sampled(flat(91)), sampled(flat(20)), flat(91)]
    expected = []
    for problem in problems:
        buffers.release()
        expected.append(d_weight(problem))
    buffers.release()
    for problem, fresh in zip(problems, expected, strict=True):
        assert same_bits(d_weight(problem), fresh)
        (block,) = buffers._kept
        block.fill_(255)  # NaN, whatever it is read as


def test_any_number_of_threads(use_threads):
    found = []
    for threads in (1, 1, 2, 3):
        use_threads(threads)
        found.append(d_weight(flat(91)))
    assert all(same_bits(found[0], each) for each in found)


def test_a_shard_of_the_vocabulary(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/it", rank=0, world_size=1)
    try:
        problem = flat(91, 320, 301)
        shard = Shard(dist.group.WORLD, (0, 301), (0, 301), 301)
        for each in (problem, sampled(problem)):
            sharded = replace(each, shard=shard)
            found = d_weight(sharded)
            assert same_bits(found, rounded_after(sharded)) and (found[301:] == 0).all()
    finally:
        dist.destroy_process_group()


def test_other_products_round_at_the_end(monkeypatch):
    monkeypatch.setattr(native, "BF16_PRODUCTS", [])
    problem = flat(91)
    assert same_bits(d_weight(problem), rounded_after(problem))
    assert math.isfinite(d_weight(problem).float().norm())
