"""Cases for `test_parallel`: every objective, teacher form, backend and option of a sharded head,
equal to the whole head's loss, statistics and gradients."""

import importlib.util
from dataclasses import replace
from functools import partial
from itertools import chain, product

import pytest
import torch
import torch.distributed as dist
from pairs import covering
from problems import OBJECTIVES, TEACHERS, make_problem, relative_error, serves
from sharding import arguments, bare, ends, everything, mine, shard_of

from tropd_kernels import (
    OPD,
    SFT,
    Divergence,
    TokenRule,
    TrOPD,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
    native,
    parallel,
)
from tropd_kernels.objectives import TAILS
from tropd_kernels.objectives.rewards import REWARD_FILTERS
from tropd_kernels.objectives.rule_checks import SCORES

FLOAT32 = 1e-5
BACKENDS = ("torch",) if native.WHY_NOT else ("torch", "native")


def compare(
    problem, rule, form, backend, bound=FLOAT32, dtype=torch.float32, incoming=1.0,
    cuts=None, teacher_cuts=None, trained=("hidden", "weight", "bias"), only_stats=False,
    beside=None, beside_cuts=None, **more,
):  # fmt: skip
    """Loss, statistics and gradients of the sharded call against the whole head's, on this rank."""
    rule = OBJECTIVES.get(rule, rule)
    teacher, options = arguments(problem, rule, form, dtype)
    tensors = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias}
    results = []
    for sharded in (False, True):
        leaves = {}
        for name, tensor in tensors.items():
            if tensor is not None:
                part = mine(tensor, 0, cuts) if sharded and name != "hidden" else tensor
                leaves[name] = part.to(dtype).clone().requires_grad_(name in trained)
        out = linear_distillation_loss(
            leaves["hidden"], leaves["weight"], problem.labels,
            shard_of(teacher, teacher_cuts) if sharded else teacher, rule, backend=backend,
            reference_teacher=shard_of(beside, beside_cuts) if sharded else beside,
            bias=leaves.get("bias"), process_group=dist.group.WORLD if sharded else None,
            **(options | more),
        )  # fmt: skip
        (out.loss * incoming).sum().backward()
        results.append((out, {k: leaf.grad for k, leaf in leaves.items()}))
    (whole, expected), (shard, found) = results
    for name, value in vars(whole.stats).items():
        ours = getattr(shard.stats, name)
        assert (ours is None) == (value is None), name
        if value is not None:
            bounds = dict(rtol=20 * bound, atol=20 * bound, equal_nan=True)
            torch.testing.assert_close(ours, value, msg=name, **bounds)
    alike("the statistics", torch.stack([v for v in vars(shard.stats).values() if v is not None]))
    if only_stats:
        return
    assert shard.loss.dtype == whole.loss.dtype
    # Losses of both signs cancel in the sum, whose rounding is theirs.
    losses = whole.stats.token_loss
    cancelled = max(1.0, float(losses.abs().sum() / losses.sum().abs()))
    error = relative_error(shard.loss.detach(), whole.loss.detach())
    assert error <= bound * cancelled, f"loss: {error}, cancelled {cancelled}"
    alike("the loss", shard.loss.detach())
    for name, truth in expected.items():
        assert (truth is None) == (found[name] is None) == (name not in trained), name
        if truth is None:
            continue
        # A shard's part of the head's gradient, by the norm of the whole.
        part = truth if name == "hidden" else mine(truth, 0, cuts)
        error = (found[name].double() - part.double()).norm() / truth.double().norm().clamp_min(
            1e-30
        )
        assert error <= bound, f"d_{name}: {error}"
        assert found[name].dtype == dtype
    if found["hidden"] is not None:
        alike("d_hidden", found["hidden"])


def alike(what, tensor):
    everyone = parallel.gather(dist.group.WORLD, tensor.double().nan_to_num(nan=-1e300))
    assert all(torch.equal(each, everyone[0]) for each in everyone), f"{what}: the ranks differ"


def served():
    for name in OBJECTIVES:
        for form in TEACHERS:
            if serves(form, name) and (form == "sampled" or name != "sft"):
                yield name, form


#: Numbers of ranks that `test_parallel` runs on.
RANKS = (2, 4)
_PLACES = list(product(RANKS, BACKENDS, (bare, everything)))
#: Every objective and form at every place, from another one on each, and a few of these in which
#: every two values meet.
_ALL = [
    (*of_rule, *place)
    for i, of_rule in enumerate(served())
    for place in _PLACES[i % len(_PLACES) :] + _PLACES[: i % len(_PLACES)]
]
_PAIRS = [_ALL[i] for i in covering(_ALL)]


def every_objective(ranks):
    """V is divisible by neither number of ranks, and the heads are cut at different ids."""
    yield from _cases([at for at in _PAIRS if at[2] == ranks])


def on_either_number_of_ranks(ranks):
    """Those that the pairs have on the other number of ranks alone."""
    met = {(name, form) for name, form, on, *_ in _PAIRS if on == ranks}
    left = {at[:2]: at for at in reversed(_ALL) if at[2] == ranks and at[:2] not in met}
    yield from _cases(left.values())


def _cases(places):
    for name, form, _, backend, make in places:
        case = partial(compare, make(), name, form, backend)
        yield f"{backend} {name} {form} {make.__name__}", case


def cross_entropy(ranks):
    """Without a teacher, and with a shard of which every id is excluded by its bias."""
    rule = SFT(label_smoothing=0.2, z_loss=0.05)
    for backend in BACKENDS:
        for make in (bare, everything):
            yield f"{backend} SFT {make.__name__}", partial(compare, make(), rule, None, backend)
        excluded = bare()
        excluded.bias = torch.zeros(37, dtype=torch.float64)
        excluded.bias[:3] = -torch.inf
        cuts = ragged([0, 2, 30, 33, 37], ranks)
        yield (
            f"{backend} SFT of excluded ids",
            partial(compare, excluded, rule, None, backend, cuts=cuts, only_stats=True),
        )


def every_option(ranks):
    some = ("tropd", "opd", "gkd", "akl", "entropy_opd", "gkd_selected", "tropd_bucket",
            "tropd_renormalize_both")  # fmt: skip
    for backend, name in product(BACKENDS, some):
        case = partial(compare, everything(), name, "hidden", backend)
        incoming = torch.linspace(-1, 2, 7)
        yield f"{backend} {name} none", partial(case, reduction="none", incoming=incoming)
        yield f"{backend} {name} sum", partial(case, reduction="sum", normalizer=None)
        yield f"{backend} {name} frozen head", partial(case, trained=("hidden",))
        yield f"{backend} {name} frozen body", partial(case, trained=("weight",), normalizer=3.0)
        yield f"{backend} {name} float64", partial(case, bound=1e-13, dtype=torch.float64)
        yield f"{backend} {name} bf16", partial(case, bound=2**-7, dtype=torch.bfloat16)
        yield f"{backend} {name} fp16", partial(case, bound=2**-10, dtype=torch.float16)
        # Several chunks, of which the last is shorter, by a budget in which ranks with a small
        # shard would make larger chunks if they planned for themselves.
        many = partial(
            compare, bare(700), name, "hidden", backend, cuts=ragged([0, 2, 30, 33, 37], ranks),
            max_workspace_bytes={"torch": 800_000, "native": 300_000}[backend],
        )  # fmt: skip
        yield f"{backend} {name} chunks", many
        more = dict(reduction="none", incoming=torch.linspace(-1, 2, 700))
        yield f"{backend} {name} chunks none", partial(many, **more)
    for backend, by in product(BACKENDS, SCORES):  # one threshold for all ranks
        chosen = replace(OPD(), select_by=by, select_fraction=0.4)
        more = {"scores": torch.linspace(3, 1, 7)} if by == "scores" else {}
        yield (
            f"{backend} by {by}",
            partial(compare, everything(), chosen, "hidden", backend, **more),
        )
    rule = TokenRule(gate="expected", task_weight=0.5)
    for backend, by in product(BACKENDS, REWARD_FILTERS):
        task = dict(task_advantages=torch.linspace(-1, 2, 7))
        kept = replace(rule, reward_filter=by)
        case = partial(compare, everything(), kept, "hidden", backend, **task)
        yield f"{backend} task {by}", case


def corners(ranks, backend):
    for name, form in [
        ("tropd", "hidden"),
        ("tropd", "top_k"),
        ("opd", "sampled"),
        ("akl", "logits"),
    ]:
        none = bare()
        none.labels = torch.full_like(none.labels, -100)
        yield f"{backend} {name} no token counts", partial(compare, none, name, form, backend)
        yield f"{backend} {name} no tokens", partial(compare, bare(0), name, form, backend)
        yield (
            f"{backend} {name} a seed",
            partial(compare, bare(), name, form, backend, seed=5, uniforms=None),
        )
        yield (
            f"{backend} {name} every token counts",
            partial(compare, bare(), name, form, backend, ignore_index=None),
        )
    cuts, teacher_cuts = ragged([0, 2, 30, 33, 37], ranks), ragged([0, 33, 34, 35, 41], ranks)
    for name in ("tropd_expected", "reverse_kl", "gkd"):
        yield f"{backend} {name} near agreement", partial(near_agreement, name, backend)
    for name in ("tropd_expected", "gkd"):
        yield (
            f"{backend} {name} ragged shards",
            partial(
                compare, everything(), name, "hidden", backend,
                cuts=cuts, teacher_cuts=teacher_cuts,
            ),
        )  # fmt: skip
        yield (
            f"{backend} {name} ragged logits",
            partial(
                compare, everything(), name, "logits", backend,
                cuts=cuts, teacher_cuts=teacher_cuts,
            ),
        )  # fmt: skip
        yield (
            f"{backend} {name} a lower teacher",
            partial(compare, lower_teacher(), name, "hidden", backend),
        )
    for k in (1, 20, 60):  # fewer than a shard holds, more than one holds, more than there are
        rule = TrOPD(gate="expected", top_k=k)
        yield f"{backend} top {k}", partial(compare, everything(), rule, "logits", backend)
    tied = bare()
    tied.teacher_weight[[1, 8, 17, 26, 33]] = 3 * tied.teacher_weight[0]
    yield f"{backend} ties", partial(compare, tied, "tropd_expected", "hidden", backend)
    bounds = ends(37, ranks)
    for name in (
        "tropd_expected", "gkd", "jeffreys", "akl", "mopd", "topk_reverse_kl_bucket",
        "lsm",
    ):  # fmt: skip
        cut = bare()  # the last shard has no id left, on both sides
        cut.labels = cut.labels % bounds[-2]
        cut.bias, cut.teacher_bias = (torch.zeros(n, dtype=torch.float64) for n in (37, 41))
        cut.bias[bounds[-2] :] = cut.teacher_bias[bounds[-2] :] = -torch.inf
        yield f"{backend} {name} excluded ids", partial(compare, cut, name, "hidden", backend)
    # The teacher alone excludes a shard, with two labels: KL(p||q) is infinite.
    less = bare()
    less.teacher_bias = torch.zeros(41, dtype=torch.float64)
    less.teacher_bias[bounds[1] : bounds[2]] = -torch.inf
    less.labels[:3] = torch.tensor([bounds[1] + 2, bounds[2] - 1, 3])
    for name in ("tropd_expected", "forward_kl"):
        yield (
            f"{backend} {name} excluded by the teacher",
            partial(compare, less, name, "hidden", backend, only_stats=name != "forward_kl"),
        )
    yield from ids_of_k(ranks, backend)
    yield f"{backend} a NaN shows", partial(a_nan_shows, backend)
    yield f"{backend} log-probs", partial(log_probs, backend)
    yield f"{backend} second derivative", partial(second_derivative, backend)
    for name, form, reduction in [
        ("tropd", "hidden", "mean"), ("akl", "logits", "sum"), ("opd", "sampled", "none"),
        ("tropd_expected", "top_k", "mean"), ("entropy_opd", "hidden", "none"),
    ]:  # fmt: skip
        yield (
            f"{backend} existing logits {name} {form} {reduction}",
            partial(existing_logits, name, form, backend, reduction),
        )


def ids_of_k(ranks, backend):
    """Those of the student, and given ones: each shard has some of them, or none."""
    problem = everything()
    draw = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(37, generator=draw)[:6] for _ in problem.labels])
    ids[0], ids[1, 1:], ids[2, 2:] = torch.arange(6), -1, -1
    for name, tail in product(("forward_kl", "reverse_kl"), TAILS):
        given = Divergence(name, top_k_tail=tail, top_k_ids="given")
        yield (
            f"{backend} given ids {given}",
            partial(compare, problem, given, "hidden", backend, ids=ids),
        )
        for k in (3, 20):  # more than one shard holds
            own = Divergence(name, top_k=k, top_k_tail=tail, top_k_ids="student")
            case = partial(compare, everything(), own, "logits", backend)
            incoming = torch.linspace(-1, 2, 7)
            yield f"{backend} {own} none", partial(case, reduction="none", incoming=incoming)
    tied, excluded = bare(), bare()
    tied.weight[[1, 8, 17, 26, 33]] = 3 * tied.weight[0]
    excluded.teacher_bias = torch.zeros(41, dtype=torch.float64)
    excluded.teacher_bias[ends(37, ranks)[1] :] = -torch.inf
    excluded.labels = excluded.labels % ends(37, ranks)[1]
    for tail in TAILS:
        rule = Divergence("reverse_kl", top_k=4, top_k_tail=tail, top_k_ids="student")
        yield f"{backend} tied {rule}", partial(compare, tied, rule, "hidden", backend)
        yield (
            f"{backend} excluded by the teacher {rule}",
            partial(compare, excluded, rule, "hidden", backend, only_stats=True),
        )


def ragged(cuts, ranks):
    return cuts if ranks == 4 else [cuts[0], cuts[1], cuts[4]]


def lower_teacher():
    problem = bare(teacher_vocab_size=31)
    problem.labels = problem.labels % 31
    return problem


def near_agreement(name, backend):
    """Where student and teacher nearly agree, and differences of shards' numbers cancel, gradients
    are as good as in one process."""
    problem = make_problem(tokens=32, vocab_size=611, width=64, teacher_width=64)
    noise = torch.randn(problem.hidden.shape, dtype=torch.float64)
    problem.hidden, problem.weight = (
        problem.hidden.float().double(),
        problem.weight.float().double(),
    )
    problem.teacher_hidden = (problem.hidden + 0.02 * noise).float().double()
    problem.teacher_weight = problem.weight
    _, exact, _ = problem.call(OBJECTIVES[name], "hidden", "reference", torch.float64)
    _, whole, _ = problem.call(OBJECTIVES[name], "hidden", backend)
    hidden = problem.hidden.float().requires_grad_()
    weight = mine(problem.weight).float().requires_grad_()
    teacher, options = arguments(problem, OBJECTIVES[name], "hidden", torch.float32)
    linear_distillation_loss(
        hidden, weight, problem.labels, shard_of(teacher), OBJECTIVES[name], backend=backend,
        process_group=dist.group.WORLD, **options,
    ).loss.backward()  # fmt: skip
    for key, ours in (("hidden", hidden.grad), ("weight", weight.grad)):
        part = mine if key == "weight" else lambda tensor: tensor
        floor = relative_error(part(whole[key]), part(exact[key]))
        assert relative_error(ours, part(exact[key])) <= 2 * floor + 1e-6, key


def compiled():
    """Under torch.compile the call is a graph break, and with fullgraph=True an error."""
    problem = bare()
    teacher, options = arguments(problem, OBJECTIVES["gkd"], "hidden", torch.float32)
    teacher, weight = shard_of(teacher), mine(problem.weight.float())

    def loss(hidden):
        out = linear_distillation_loss(
            2 * hidden, weight, problem.labels, teacher, OBJECTIVES["gkd"],
            process_group=dist.group.WORLD, **options,
        )  # fmt: skip
        return 3 * out.loss

    eager, broken = (problem.hidden.float().requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch.compile(loss, backend="eager")(broken).backward()
    assert torch.equal(broken.grad, eager.grad)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="eager", fullgraph=True)(broken)


def existing_logits(name, form, backend, reduction):
    """`distillation_loss` on the shards of logits."""
    problem = everything()
    problem.student_head, problem.bias = {}, None
    teacher, options = arguments(problem, OBJECTIVES[name], form, torch.float32)
    logits = (problem.hidden @ problem.weight.T).float()
    gradients, losses = [], []
    for sharded in (False, True):
        leaf = (mine(logits, -1) if sharded else logits).clone().requires_grad_()
        out = distillation_loss(
            leaf, problem.labels, shard_of(teacher) if sharded else teacher, OBJECTIVES[name],
            backend=backend, reduction=reduction, **options,
            process_group=dist.group.WORLD if sharded else None,
        )  # fmt: skip
        (out.loss * torch.linspace(-1, 2, 7)).sum().backward()
        losses.append(out.loss.detach())
        gradients.append(leaf.grad if sharded else mine(leaf.grad, -1))
    assert relative_error(losses[1], losses[0]) <= FLOAT32
    assert relative_error(gradients[1], gradients[0]) <= FLOAT32


def log_probs(backend):
    """`linear_log_probs` and the entropies, differentiable."""
    problem = everything()
    results = []
    for sharded in (False, True):
        hidden = problem.hidden.float().requires_grad_()
        weight, bias = (
            (mine(t) if sharded else t).float().requires_grad_()
            for t in (problem.weight, problem.bias)
        )
        found = linear_log_probs(
            hidden, weight, problem.labels, bias=bias, return_entropy=True, backend=backend,
            process_group=dist.group.WORLD if sharded else None, **problem.student_head,
        )  # fmt: skip
        (found[0] * torch.linspace(-1, 2, 7) + found[1] ** 2).sum().backward()
        heads = [t.grad if sharded else mine(t.grad) for t in (weight, bias)]
        results.append([found[0].detach(), found[1].detach(), hidden.grad, *heads])
    for whole, shard in zip(*results, strict=True):
        assert relative_error(shard, whole) <= FLOAT32


def second_derivative(backend):
    """Raises, as of a whole head."""
    problem = bare()
    teacher = shard_of(problem.teacher("hidden", torch.float32))
    for reduction in ("mean", "none"):
        hidden = problem.hidden.float().requires_grad_()
        loss = linear_distillation_loss(
            hidden, mine(problem.weight).float(), problem.labels, teacher, OPD(),
            reduction=reduction, backend=backend, process_group=dist.group.WORLD,
        ).loss.sum()  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(gradient.sum() + hidden.square().sum(), hidden)


def a_nan_shows(backend):
    """A shard whose logits are all NaN is not mistaken for one whose ids are all excluded."""
    problem = bare()
    problem.weight[ends(37, dist.get_world_size())[-2] :] = torch.nan
    weight = mine(problem.weight).float()
    teacher = shard_of(problem.teacher("hidden", torch.float32))
    out = linear_distillation_loss(
        problem.hidden.float(), weight, problem.labels, teacher, OPD(), backend=backend,
        process_group=dist.group.WORLD,
    )  # fmt: skip
    assert out.loss.isnan()
    assert out.stats.log_probs.isnan().all()


def agreement(ranks):
    yield from every_objective(ranks)
    # The other cases in turns: each runs on two ranks or on four.
    rest = chain(
        every_option(ranks),
        cross_entropy(ranks),
        *(corners(ranks, backend) for backend in BACKENDS),
    )
    yield from (case for i, case in enumerate(rest) if i % 2 == ranks % 4 // 2)
    if ranks == 2:
        yield "compiled", compiled
    if ranks == 2 and importlib.util.find_spec("triton"):
        for name, form in [("tropd_bucket", "hidden"), ("akl", "logits"), ("jeffreys", "hidden"),
                           ("tropd_expected", "top_k")]:  # fmt: skip
            yield f"triton {name} {form}", partial(compare, everything(), name, form, "triton")
