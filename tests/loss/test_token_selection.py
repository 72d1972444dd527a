"""Rules that select tokens by a score: only those enter the loss, and cost a gradient."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from problems import OBJECTIVES, make_problem, relative_error

from tropd_kernels import (
    GKD,
    OPD,
    SFT,
    HiddenTeacher,
    LogitsTeacher,
    TokenRule,
    TrOPD,
    distillation_loss,
    linear_distillation_loss,
    plan_chunks,
    products,
)
from tropd_kernels.loss import plan as chunking
from tropd_kernels.objectives.rule_checks import SCORES

BACKENDS = ("torch", "native", "triton")
#: The forms of teacher that can give a score.
FORMS = {
    "entropy": ("hidden", "logits", "top_k", "sampled"),
    "teacher_entropy": ("hidden", "logits", "top_k"),
    "reverse_kl": ("hidden", "logits"),
    "disagreement": ("hidden", "logits", "top_k", "sampled"),
    "reward": ("hidden", "logits", "top_k", "sampled"),
    "scores": ("hidden", "logits", "top_k", "sampled"),
}
WHOLE = ("gkd", "akl", "mixed")
#: Sizes that hold all tokens, whose selected rows are kept where a score has read them, or a few,
#: so that they are made again.
CHUNKS = {"one chunk": None, "several": (4, 8)}
GIVEN = (None, "old_log_probs", "advantages", "token_weight")


def cases():
    """Every objective, score and form, with a reduction of each kind and, in turn, what a call may
    be given, and one chunk or several."""
    objectives = ("tropd", "opd", "gkd", "akl", "mixed", "tropd_bucket", "topk_jsd", "aopd")
    turns = itertools.count()
    for name, by in itertools.product(objectives, SCORES):
        for form in FORMS[by]:
            sparse = form in ("top_k", "sampled")
            if sparse and (name in WHOLE or (form == "sampled" and name != "opd")):
                continue
            turn = next(turns)
            for reduction, place in (("mean", turn), ("none", turn + turn // 4 + 1)):
                given = GIVEN[place % 4]
                if given == "advantages" and name in WHOLE:  # which have no reward
                    given = "token_weight"
                chunks = list(CHUNKS)[(turn + (reduction == "none")) % 2]
                yield name, by, form, given, reduction, chunks


def arguments(problem, by, given=None):
    """What the call takes besides: scores, and one of `GIVEN`, of which a weight of 0 leaves a
    token out."""
    draw = torch.Generator().manual_seed(5)
    numbers = torch.rand(2, len(problem.labels), generator=draw, dtype=torch.float64)
    scores = {"scores": numbers[0]} if by == "scores" else {}
    values = {
        "old_log_probs": -3 * numbers[1],
        "advantages": numbers[1] - 0.5,
        "token_weight": (3 * numbers[1] - 1).clamp_min(0),
    }
    return scores if given is None else scores | {given: values[given]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "by", "form", "given", "reduction", "chunks"), list(cases()))
@pytest.mark.pairs(
    more=lambda name, by, form, given, reduction, chunks, backend: (by, form, chunks)
)
def test_as_the_reference(name, by, form, given, reduction, chunks, backend, monkeypatch):
    monkeypatch.setattr(chunking, "FIXED_SIZES", CHUNKS[chunks])
    problem = make_problem(tokens=17, vocab_size=61)
    problem.labels[4] = -100
    rule = replace(OBJECTIVES[name], select_by=by, select_fraction=0.4)
    options = arguments(problem, by, given) | {"reduction": reduction}
    if reduction == "none":
        options["incoming"] = torch.linspace(-1, 2, 17, dtype=torch.float64)
    truth = problem.call(rule, form, "reference", torch.float64, **options)
    found = problem.call(rule, form, backend, torch.float64, **options)
    assert 0 < truth[2].kept.sum() < (10 if given == "token_weight" else 16)
    torch.testing.assert_close(found[0], truth[0], rtol=1e-10, atol=1e-10)
    for key, gradient in truth[1].items():
        assert relative_error(found[1][key], gradient) < 1e-10, key
    close = dict(rtol=1e-10, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(found[2].score, truth[2].score, **close)
    for key, value in vars(truth[2]).items():
        if value is not None:  # of a token that is left out only what the score is made of
            ours = getattr(found[2], key)
            known = ~ours.isnan()
            of_all = key in ("log_probs", "entropy", "teacher_log_probs", "reward", "trust")
            assert not of_all or known[truth[2].kept > 0].all(), key
            torch.testing.assert_close(ours[known], value[known], rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.pairs
@pytest.mark.parametrize("how", [{"select_fraction": 1.0}, {"select_threshold": -1e9}], ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("by", SCORES)
def test_all_tokens_are_no_selection(by, backend, how):
    """A fraction of 1, and a threshold that every score reaches, to the bit."""
    problem = make_problem(tokens=9)
    given = arguments(problem, by)
    plain = problem.call(TrOPD(top_k=5), "hidden", backend)
    rule = replace(TrOPD(top_k=5), select_by=by, **how)
    found = problem.call(rule, "hidden", backend, **given)
    assert torch.equal(found[0], plain[0])
    for key, gradient in plain[1].items():
        assert torch.equal(found[1][key], gradient), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_left_out_is_not_looked_at(reduction, backend):
    """Its hidden states, and its teacher's, may hold anything where the scores are the caller's."""
    problem = make_problem(tokens=8)
    scores = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])
    rule = replace(GKD(), select_by="scores", select_threshold=4.0)
    options = {"scores": scores, "reduction": reduction}
    if reduction == "none":
        options["incoming"] = torch.ones(8)
    whole = problem.call(rule, "hidden", backend, **options)
    left = scores < 4
    problem.hidden[left] = problem.teacher_hidden[left] = math.nan
    found = problem.call(rule, "hidden", backend, **options)
    assert torch.equal(found[0], whole[0])
    assert found[1]["hidden"].isfinite().all() and not found[1]["hidden"][left].any()
    assert torch.equal(found[1]["weight"], whole[1]["weight"])


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("by", SCORES)
@pytest.mark.parametrize("form", ["hidden", "sampled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_products_are_those_of_the_plan(reduction, by, form, chunks, monkeypatch):
    if form not in FORMS[by]:
        pytest.skip("this teacher cannot give the score")
    monkeypatch.setattr(chunking, "FIXED_SIZES", CHUNKS[chunks])
    rows = {"student": 0, "teacher": 0}
    into = products.TorchProducts.logits_into

    def counting(self, out, hidden, weight):
        rows["student" if hidden.shape[1] == 16 else "teacher"] += len(hidden)
        return into(self, out, hidden, weight)

    monkeypatch.setattr(products.TorchProducts, "logits_into", counting)
    problem = make_problem(tokens=40)
    rule = replace(OPD(), select_by=by, select_fraction=0.25)
    incoming = torch.ones(40) if reduction == "none" else None
    given = arguments(problem, by) | {"reduction": reduction, "incoming": incoming}
    problem.call(rule, form, "torch", **given)
    teacher = 24 if form == "hidden" else None
    plan = plan_chunks(
        40, 37, 16, teacher, dtype=torch.float32, device="cpu", backend="torch", objective=rule,
        reduction=reduction,
    )  # fmt: skip
    gradients = 2 * 10  # of the ten tokens that are selected
    assert rows["student"] + gradients == 40 * plan.student_gemms
    assert rows["teacher"] == 40 * plan.teacher_gemms
    of_all = 40 * (by not in ("scores", "teacher_entropy"))
    once, again = rows["student"] == of_all, rows["student"] == of_all + 10
    if plan.selection == "kept" and of_all:
        assert once if reduction == "mean" else again
    assert plan.selection == ("given" if by == "scores" else "again" if CHUNKS[chunks] else "kept")


def test_rows_are_kept_where_one_chunk_holds_all_and_the_workspace_a_copy():
    shape = dict(vocab_size=151_936, hidden_size=1024, teacher_hidden_size=2048, device="cpu")

    def road(tokens=256, by="reverse_kl", fraction=0.5, **more):
        rule = replace(GKD(), select_by=by, select_fraction=fraction)
        plan = plan_chunks(tokens, objective=rule, **shape | {"backend": "torch"} | more)
        assert plan.selection in repr(plan) or plan.selection == "given"
        return plan.selection

    assert road() == "kept"
    assert road(tokens=257) == "again"
    assert road(tokens=0) == "again"
    # Without an accumulator or d_logits of their own, only what the teacher's logits leave.
    assert road(dtype=torch.float32, needs_weight_grad=False) == "again"
    assert road(dtype=torch.float32, needs_weight_grad=False, by="entropy") == "kept"
    assert road(by="scores") == "given"
    assert road(by="entropy", max_workspace_bytes=9 * 10**8) == "again"
    assert plan_chunks(256, **shape).selection is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_selected_tokens_take_no_more_memory_than_all(reduction, monkeypatch):
    """By themselves they would be given more here: one product without an accumulator."""
    plans = []
    whole = chunking.plan_chunks

    def as_on_a_gpu(*args, **options):
        plans.append(whole(*args, **options | {"device": "cuda"}))
        return replace(plans[-1], rounds_d_weight=False)  # which no product of a CPU does

    monkeypatch.setattr("tropd_kernels.loss.loop.plan_chunks", as_on_a_gpu)
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 2**17)
    problem = make_problem(tokens=700, vocab_size=61, width=64, teacher_width=48)
    rule = replace(GKD(), select_by="entropy", select_fraction=0.7)
    incoming = torch.ones(700) if reduction == "none" else None
    problem.call(rule, "hidden", "torch", torch.bfloat16, reduction=reduction, incoming=incoming)
    assert [plan.tokens for plan in plans] == [700, 490] * (2 if reduction == "none" else 1)
    for of_all, selected in zip(plans[::2], plans[1::2]):
        alone = whole(490, 61, 64, 48, objective=rule.of_all(), backend="torch")
        # What the plan of all says of the work is what came.
        assert of_all.work[-len(selected.work) :] == selected.work
        assert selected.workspace_bytes <= of_all.workspace_bytes < alone.workspace_bytes


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("scores", [[2.0] * 6, [0.0], [1, 5, 0, 5, 5, 2.0]], ids=str)
def test_equal_scores_are_all_selected(scores, backend):
    """All tokens, a batch of one, and the highest, where a tenth of six tokens is one."""
    scores = torch.tensor(scores)
    rule = replace(SFT(), select_by="scores", select_fraction=0.1)
    problem = make_problem(tokens=len(scores))
    _, _, stats = problem.call(rule, "hidden", backend, scores=scores)
    assert torch.equal(stats.kept > 0, scores == scores.max())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_prefixes_and_ignored_tokens_are_not_ranked(backend):
    problem = make_problem(tokens=8)
    problem.labels[0] = -100
    prefix = torch.tensor([0, 1, 1, 0, 0, 0, 0, 0]).bool()
    scores = torch.tensor([9.0, 8, -8, 1, 2, 3, 4, 5])
    rule = replace(TrOPD(top_k=5), select_by="scores", select_fraction=0.5)
    _, _, stats = problem.call(rule, "hidden", backend, scores=scores, teacher_prefix=prefix)
    assert stats.kept.tolist() == [0, 1, 1, 0, 0, 1, 1, 1]
    ranked = replace(rule, prefix_weight=None)
    _, _, stats = problem.call(ranked, "hidden", backend, scores=scores, teacher_prefix=prefix)
    assert stats.kept.tolist() == [0, 1, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_scores_and_the_threshold_are_returned(backend):
    """The threshold selects the same tokens once more. Only tokens that are ranked have a score."""
    problem = make_problem(tokens=8)
    problem.labels[0] = -100
    prefix = torch.tensor([0, 1, 1, 0, 0, 0, 0, 0]).bool()
    scores = torch.tensor([9.0, 8, -8, 1, 7, 3, 2, 5])
    rule = replace(TrOPD(outlier="mask"), select_by="scores", select_fraction=0.5)
    given = dict(scores=scores, teacher_prefix=prefix)
    _, gradients, stats = problem.call(rule, "hidden", backend, **given)
    unranked = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool()
    expected = scores.masked_fill(unranked, math.nan)
    torch.testing.assert_close(stats.score, expected, rtol=0, atol=0, equal_nan=True)
    assert stats.threshold == 3  # of 7 5 3 2 1, the three at or above the median
    known = replace(rule, select_fraction=None, select_threshold=float(stats.threshold))
    _, again, _ = problem.call(known, "hidden", backend, **given)
    assert torch.equal(again["weight"], gradients["weight"])
    none = replace(known, select_threshold=7.5)
    assert problem.call(none, "hidden", backend, **given)[2].threshold == math.inf
    _, _, stats = problem.call(TrOPD(top_k=5), "hidden", backend)
    assert stats.score is None and stats.threshold is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["teacher_entropy", "reverse_kl", "disagreement"])
@pytest.mark.parametrize("student_power", [0.0, 0.3])
def test_scores_are_of_the_target_that_stands_in_for_the_teacher(student_power, by, backend):
    powers = dict(teacher_power=1.4, student_power=student_power)
    rule = replace(GKD(), select_by=by, select_fraction=0.3, **powers)
    problem = make_problem(tokens=11)
    truth = problem.call(rule, "hidden", "reference", torch.float64)
    found = problem.call(rule, "hidden", backend, torch.float64)
    assert torch.equal(found[2].kept, truth[2].kept)
    assert relative_error(found[1]["weight"], truth[1]["weight"]) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["entropy", "teacher_entropy", "reverse_kl", "scores"])
@pytest.mark.parametrize("ids", ["student", "given"])
def test_sums_on_other_ids_than_the_teacher_s(ids, by, backend):
    top_k = 5 if ids == "student" else None
    rule = TokenRule(
        policy_gradient=0.0, divergence="topk_reverse_kl", top_k=top_k, top_k_tail="bucket",
        top_k_ids=ids, select_by=by, select_fraction=0.3,
    )  # fmt: skip
    problem = make_problem(tokens=11)
    given = arguments(problem, by)
    if ids == "given":
        given["ids"] = torch.arange(44).reshape(11, 4) % 37
    truth = problem.call(rule, "hidden", "reference", torch.float64, **given)
    share = torch.full((11,), 1 / 11, dtype=torch.float64)
    for options in ({}, {"reduction": "none", "incoming": share}):
        found = problem.call(rule, "hidden", backend, torch.float64, **options, **given)
        assert torch.equal(found[2].kept, truth[2].kept)
        assert relative_error(found[1]["weight"], truth[1]["weight"]) < 1e-10


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_infinite_scores(backend):
    """Two tokens whose teacher excludes an id: an infinite reverse KL is the highest score."""
    torch.manual_seed(0)
    z, t = torch.randn(2, 6, 20)
    t[[1, 4], 3] = -math.inf
    labels = torch.tensor([1, 2, 0, 5, 6, 7])
    for fraction, kept in ((0.01, 2), (0.3, 2), (0.5, 3)):
        rule = replace(OPD(), select_by="reverse_kl", select_fraction=fraction)
        stats = distillation_loss(z, labels, LogitsTeacher(t), rule, backend=backend).stats
        assert stats.kept.sum() == kept and stats.kept[[1, 4]].all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("how", [{"select_fraction": 0.2}, {"select_threshold": 9e9}], ids=str)
def test_a_score_of_nan_shows(how, backend):
    problem = make_problem(tokens=6)
    problem.hidden[2] = math.nan
    rule = replace(OPD(), select_by="entropy", **how)
    loss, _, _ = problem.call(rule, "hidden", backend)
    assert loss.isnan()


def test_the_mean_is_over_all_tokens_or_over_the_selected():
    problem = make_problem(tokens=8)
    rule = replace(GKD(), select_by="entropy", select_fraction=0.25)
    total = problem.call(rule, "hidden", "torch", reduction="sum")[0]
    assert torch.isclose(problem.call(rule, "hidden", "torch")[0], total / 8)
    kept = replace(rule, normalize="kept")
    assert torch.isclose(problem.call(kept, "hidden", "torch")[0], total / 2)


def test_entropy_top_fraction_is_a_selection_by_entropy():
    problem = make_problem(tokens=12)
    short = problem.call(TokenRule(entropy_top_fraction=0.3), "hidden", "torch")
    long = problem.call(TokenRule(select_by="entropy", select_fraction=0.3), "hidden", "torch")
    assert torch.equal(short[0], long[0])
    assert torch.equal(short[1]["weight"], long[1]["weight"])


def test_compiled():
    problem = make_problem(tokens=12)
    rule = replace(TrOPD(top_k=5), select_by="scores", select_fraction=0.3)
    tensors = [problem.hidden.float(), problem.weight.float(), problem.labels]
    teacher = [problem.teacher_hidden.float(), problem.teacher_weight.float()]

    def loss(hidden, weight, labels, t, head, scores):
        out = linear_distillation_loss(
            hidden, weight, labels, HiddenTeacher(t, head), rule, scores=scores, seed=1,
            backend="torch",
        )  # fmt: skip
        return out.loss, out.stats.score, out.stats.threshold

    inputs = [*tensors, *teacher, torch.arange(12.0)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*inputs), loss(*inputs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_target_that_only_the_score_reads(backend):
    rule = replace(SFT(), select_by="reverse_kl", select_fraction=0.4, teacher_power=1.3)
    problem = make_problem(tokens=9)
    loss, gradients, stats = problem.call(rule, "hidden", backend, torch.float64)
    truth = problem.call(rule, "hidden", "reference", torch.float64)
    assert 0 < stats.kept.sum() < 9
    assert torch.isclose(loss, truth[0])
    assert relative_error(gradients["weight"], truth[1]["weight"]) < 1e-10


# --- bad input -----------------------------------------------------------------------------------

RULES = {
    "a fraction of 0": (dict(select_by="entropy", select_fraction=0.0), "above 0"),
    "a fraction above 1": (dict(select_by="entropy", select_fraction=1.5), "[0, 1], got 1.5"),
    "no number": (dict(select_by="entropy", select_threshold=math.nan), "select_threshold", "nan"),
    "both": (
        dict(select_by="entropy", select_fraction=0.5, select_threshold=1.0), "select_by='entropy'",
        "either a select_fraction or a select_threshold", "0.5 and 1.0",
    ),
    "neither": (dict(select_by="entropy"), "either a select_fraction or a select_threshold"),
    "no score": (dict(select_fraction=0.5), "select_by", "'reverse_kl'"),
    "another score": (dict(select_by="loss", select_fraction=0.5), "select_by", "'loss'"),
    "twice": (
        dict(select_by="reward", select_fraction=0.5, entropy_top_fraction=0.5),
        "entropy_top_fraction", "leave select_by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules_that_select_nothing_sensible(case):
    fields, *words = RULES[case]
    with pytest.raises(ValueError) as error:
        TokenRule(**fields)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_scores_that_do_not_fit(backend):
    problem = make_problem(tokens=5)
    rule = replace(SFT(), select_by="scores", select_fraction=0.5)

    def fails(rule, *words, **given):
        with pytest.raises((ValueError, TypeError)) as error:
            problem.call(rule, "hidden", backend, **given)
        assert all(word in str(error.value) for word in words), error.value

    fails(rule, "pass scores=", "select_by")
    fails(SFT(), "scores has no effect", "select_by='scores'", scores=torch.zeros(5))
    fails(rule, "scores", "(5,)", "(4,)", scores=torch.zeros(4))
    for value in (math.nan, math.inf):
        fails(rule, "scores", "not finite", scores=torch.tensor([0.0, 1, value, 3, 4]))


@pytest.mark.parametrize(("by", "form", "words"), [
    ("reverse_kl", "sampled", ("whole distribution", "HiddenTeacher or LogitsTeacher")),
    ("reverse_kl", "top_k", ("whole distribution", "HiddenTeacher or LogitsTeacher")),
    ("teacher_entropy", "sampled", ("select_by='teacher_entropy'", "TopKTeacher")),
    ("reward", None, ("select_by='reward'", "pass a teacher", "'entropy' or 'scores'")),
])  # fmt: skip
def test_a_score_that_the_teacher_cannot_give(by, form, words):
    problem = make_problem(tokens=4)
    teacher = None if form is None else problem.teacher(form, torch.float32)
    rule = replace(SFT(), select_by=by, select_fraction=0.5)
    with pytest.raises(ValueError) as error:
        distillation_loss(torch.randn(4, 37), problem.labels, teacher, rule)
    assert all(word in str(error.value) for word in words), error.value
