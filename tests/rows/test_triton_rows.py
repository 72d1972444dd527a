"""The Triton kernels on rows that several tiles, lanes and programs share: those of other tests fit
into one of each."""

import math
import os

import pytest
import torch
from problems import OBJECTIVES, relative_error, rows_of_several_blocks

pytest.importorskip("triton")

from tropd_kernels import (
    GKD,
    OPD,
    Divergence,
    LogitsTeacher,
    TopKTeacher,
    TrOPD,
    distillation_loss,
)
from tropd_kernels.backends import engine_for
from tropd_kernels.rows import triton_launch
from tropd_kernels.rows.layout import Coef, LogitTransform, RowBatch, RowOptions, Stat
from tropd_kernels.rows.triton_kernels import sums

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON, TORCH = engine_for("triton"), engine_for("torch")
#: Of one tile: 8 warps of 32 threads, 16 bytes each.
LANES = 1024


def found(z, t, labels, objective, backend="triton", **options):
    """Loss, gradient and statistics of each row."""
    z = z.clone().requires_grad_()
    options = {
        "reduction": "none",
        "uniforms": torch.full_like(labels, 0.5, dtype=z.dtype),
    } | options
    out = distillation_loss(z, labels, LogitsTeacher(t), objective, backend=backend, **options)
    out.loss.sum().backward()
    return out.loss.detach(), z.grad, out.stats


@pytest.fixture(params=[1, 4, 16])
def parts(request, monkeypatch):
    """Into how many programs a row of 40,000 ids goes; 16 leave some of them without a tile."""
    monkeypatch.setattr(triton_launch, "PROGRAMS", 0 if request.param == 1 else 2**30)
    monkeypatch.setattr(triton_launch, "TILES", {1: 1, 4: 2, 16: 0.5}[request.param])
    tile = triton_launch.tile_options(40_000, torch.float32, logit_size=4, unroll=4)
    assert triton_launch.parts_of_row(2, 40_000, tile["UNROLL"] * tile["LANES"]) == request.param
    return request.param


@pytest.mark.parametrize("name", ["tropd", "gkd_cross_entropy", "reverse_kl"])
def test_parts_of_a_row_make_the_whole(name, parts, device):
    z, t = torch.randn(2, 2, 40_000, device=device)
    z[1, 3] = 10.0  # of the first part alone
    labels = torch.tensor([39_999, 3], device=device)
    exact = found(z.double(), t.double(), labels, OBJECTIVES[name], "reference")
    ours = found(z, t, labels, OBJECTIVES[name])
    assert relative_error(ours[0], exact[0]) < 1e-5
    assert relative_error(ours[1], exact[1]) < 1e-5
    for name in ("log_probs", "entropy", "teacher_entropy", "forward_kl", "reverse_kl"):
        torch.testing.assert_close(
            getattr(ours[2], name), getattr(exact[2], name).float(), rtol=1e-5, atol=1e-5
        )


def test_few_rows_are_shared_and_many_are_not():
    tile = 4 * LANES
    few, many = (triton_launch.parts_of_row(n, 151_936, tile) for n in (1, 4096))
    assert many == 1
    assert few == 8
    assert triton_launch.parts_of_row(512, 151_936, tile) == 2
    assert triton_launch.parts_of_row(1, 3000, tile) == 1


def rows_of_several_tiles():
    cases = rows_of_several_blocks()
    z, t = cases["only one rises"]
    with_nan = z.clone()
    with_nan[3] = math.nan
    cases["nan"] = with_nan, z.clone()
    low = torch.zeros_like(z)
    low[5] = -88.0  # exp() of it is subnormal, and not 0
    cases["infinite by a subnormal weight"] = low, t.clone()
    cases["infinite by a subnormal weight"][1][5] = -math.inf
    return cases


@pytest.mark.parametrize("name", rows_of_several_tiles())
@pytest.mark.parametrize("launch", ["whole", "in parts", "in tiles"])
def test_statistics_do_not_depend_on_where_the_maximum_stands(name, launch, device, monkeypatch):
    """ "in tiles": all but the last one are whole, and have no guards against 0 * inf."""
    if launch == "in parts":
        monkeypatch.setattr(triton_launch, "TILES", 0.1)
    if launch == "in tiles":
        monkeypatch.setattr(triton_launch, "STATISTICS_UNROLL", 1)
    z, t = rows_of_several_tiles()[name]
    # Lanes of their own for each of the blocks, one behind the other.
    z, t = (torch.stack([row, row.flip(0)]).to(device) for row in (z, t))
    labels = torch.tensor([2500, z.shape[1] - 2501], device=device)

    def stats(backend):
        out = distillation_loss(
            z, labels, LogitsTeacher(t), Divergence("reverse_kl"), backend=backend, reduction="none"
        )
        s = out.stats
        return torch.stack([s.log_probs, s.entropy, s.teacher_entropy, s.forward_kl, s.reverse_kl])

    ours = stats("triton")
    if name == "nan":
        assert ours[[0, 1, 3, 4]].isnan().all()
        return
    torch.testing.assert_close(ours, stats("torch"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[:, 0], ours[:, 1], rtol=1e-5, atol=1e-5)


def rows_with_their_largest(where, vocab=6 * LANES):
    t = torch.randn(1, vocab).clamp(max=3.0)
    t[0, where] = 5.0 + torch.arange(len(where)) / 8
    return t


@pytest.mark.parametrize(
    ("where", "by_lanes"),
    [
        ([5, 6, 7, 8], True),
        ([5, 5 + LANES, 5 + 2 * LANES, 7], True),
        ([5 + LANES * i for i in range(4)], False),
        ([5 + LANES * i for i in range(5, 1, -1)], False),
        ([6 * LANES - 1, 0, 1, 2], True),
    ],
    ids=["in four lanes", "three in one", "all in one", "falling", "at both ends"],
)
def test_the_largest_are_found_wherever_they_stand(where, by_lanes, device, monkeypatch):
    """Four of the k largest in one lane are more than it remembers: the row is searched."""
    t = rows_with_their_largest(where).to(device)
    z = torch.randn_like(t)
    labels = torch.tensor([1], device=device)
    rule = Divergence("forward_kl", top_k=4, top_k_tail="renormalize_both")
    exact = found(z.double(), t.double(), labels, rule, "reference")
    if INTERPRETED:  # where functions are looked up by every call
        search, searched = sums._search, []
        monkeypatch.setattr(sums, "_search", lambda *a: searched.append(1) or search(*a))
    ours = found(z, t, labels, rule)
    assert relative_error(ours[0], exact[0]) < 1e-5
    assert relative_error(ours[1], exact[1]) < 1e-5
    torch.testing.assert_close(
        ours[2].teacher_topk_mass, t.softmax(-1)[:, where].sum(-1), rtol=1e-5, atol=0
    )
    if INTERPRETED:
        assert (not searched) == by_lanes


@pytest.mark.parametrize("where", [[5, 6, 7, 8], [5 + LANES * i for i in range(4)]])
def test_ties_with_the_kth_belong_to_the_set(where, device):
    t = rows_with_their_largest(where).to(device)
    t[0, where] = 5.0  # all of them tie for the second place
    t[0, 9] = 6.0
    labels = torch.tensor([1], device=device)
    rule = Divergence("forward_kl", top_k=2)
    stats = found(torch.randn_like(t), t, labels, rule)[2]
    mass = t.softmax(-1)[:, [9, *where]].sum(-1)
    torch.testing.assert_close(stats.teacher_topk_mass, mass, rtol=1e-5, atol=0)


def test_the_next_id_is_left_out_however_close(device):
    """Its log-prob lies below the k-th one, just where a search by digits would stop early."""
    first, second = -3.5, -3.750002
    rest = (1 - math.exp(first) - math.exp(second)) / 2998
    log_q = torch.full((1, 3000), math.log(rest))
    log_q[0, 11], log_q[0, 1500] = first, second
    log_q = log_q.to(device)
    rule = Divergence("forward_kl", top_k=1)
    stats = found(torch.randn_like(log_q), log_q, torch.tensor([1], device=device), rule)[2]
    torch.testing.assert_close(stats.teacher_topk_mass, log_q[:, 11].exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("excluded", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("left", [0, 2])
def test_fewer_ids_than_k_may_be_left(left, excluded, device):
    """What the teacher excludes is never in K; the lowest number is no exclusion."""
    t = torch.full((1, 3 * LANES), excluded, device=device)
    t[0, 7 : 7 + left + 1] = torch.arange(left + 1, dtype=torch.float32, device=device)
    labels = torch.tensor([7], device=device)
    rule = Divergence("forward_kl", top_k=4, top_k_tail="renormalize_both")
    z = torch.randn_like(t)
    exact = found(z.double(), t.double(), labels, rule, "reference")
    ours = found(z, t, labels, rule)
    torch.testing.assert_close(ours[2].teacher_topk_mass, torch.ones(1, device=device))
    torch.testing.assert_close(ours[2].student_topk_mass, exact[2].student_topk_mass.float())
    for i in (0, 1):
        torch.testing.assert_close(ours[i], exact[i].float(), rtol=1e-5, atol=1e-6)


def test_a_row_whose_ids_are_all_excluded(device):
    """As a shard of the vocabulary may be: its maximum is -inf, as that of the other engines."""
    z, t = torch.randn(2, 3, 50, device=device)
    z[0], t[1] = -math.inf, -math.inf
    batch = RowBatch(z, t, torch.tensor([3, 4, 5], device=device))
    whole = LogitTransform()
    options = RowOptions(Divergence("reverse_kl"), whole, whole, sharded=True)
    ours, theirs = (engine.statistics(batch, options).coefs for engine in (TRITON, TORCH))
    for coef in (Coef.STUDENT_MAX, Coef.STUDENT_LOG_SUM, Coef.TEACHER_MAX, Coef.TEACHER_LOG_SUM):
        torch.testing.assert_close(ours[coef], theirs[coef])
    assert ours[Coef.STUDENT_MAX, 0] == ours[Coef.TEACHER_MAX, 1] == -math.inf


def test_a_top_k_teacher_s_ids_at_the_edges_of_tiles(device):
    """They are left out of the student's mass off K, which is summed tile by tile."""
    tile = triton_launch.block_options(9000, torch.float32)["BLOCK"]
    assert 2 * tile < 9000
    ids = torch.tensor([[tile, tile - 1, 0, 8999, 2 * tile - 1]], device=device)
    z = torch.randn(1, 9000, device=device)
    z[0, ids[0]] += 5.0
    log_q = torch.linspace(-1.0, -3.0, 5, device=device)[None]
    rule = Divergence("forward_kl", top_k=5, top_k_tail="bucket")
    teacher = TopKTeacher(ids, log_q, log_q[:, 0])
    ours, exact = (
        distillation_loss(z.to(dtype), ids[:, 0], teacher, rule, backend=backend).loss
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference"))
    )
    assert relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize("rule", [OPD(), TrOPD(top_k=2)], ids=["without sums", "of two ids"])
def test_entropy_of_a_top_k_teacher(rule, device):
    """Of all its ids in range, also where the rule takes fewer into K, or has no sums."""
    ids = torch.tensor([[3, 4, 5], [3, 4, 50], [-1, 4, 2**40], [1, 2, 3], [6, 7, 8], [1, 2, 3]])
    q = torch.tensor(
        [[0.5, 0.25, 0.125], [0.5, 0.3, 0.2], [0.4, 0.2, 0.4], [0.75, 0.25, 0.0],
         [0.6, 0.40005, 0.0], [0.5, math.nan, 0.1]]
    )  # fmt: skip
    n = len(ids)
    batch = RowBatch(
        torch.randn(n, 50), None, torch.full((n,), 3), uniforms=torch.full((n,), 0.5), ids=ids,
        topk_log_probs=q.log(), label_log_probs=torch.full((n,), -1.0),
    )  # fmt: skip
    tensors = {k: t.to(device) for k, t in vars(batch).items() if t is not None}
    options = RowOptions(rule, LogitTransform(), LogitTransform())
    ours, theirs = (
        engine.forward(RowBatch(**({"teacher": None} | tensors)), options)[0]
        for engine in (TRITON, TORCH)
    )
    torch.testing.assert_close(
        ours[Stat.TEACHER_ENTROPY], theirs[Stat.TEACHER_ENTROPY], rtol=1e-6, atol=1e-6,
        equal_nan=True,
    )  # fmt: skip
    assert ours[Stat.TEACHER_ENTROPY].isnan().tolist() == [False] * 5 + [True]


def test_a_call_is_given_columns_of_its_matrices(device):
    """A chunk's numbers go into its columns, and nothing beside them."""
    z, t = torch.randn(2, 5, 50, device=device)
    labels = torch.arange(5, device=device)
    options = RowOptions(GKD(), LogitTransform(), LogitTransform())
    stats, coefs = TRITON.forward(RowBatch(z, t, labels), options)
    wide = [m.new_full((m.shape[0], 9), 7.0) for m in (stats, coefs)]
    wide[0][:, 3:8], wide[1][:, 3:8] = math.nan, 0.0
    TRITON.forward(RowBatch(z, t, labels), options, tuple(m[:, 3:8] for m in wide))
    for whole, part in zip(wide, (stats, coefs), strict=True):
        torch.testing.assert_close(whole[:, 3:8], part, rtol=0, atol=0, equal_nan=True)
        assert (whole[:, [0, 1, 2, 8]] == 7).all()


@pytest.mark.slow
@pytest.mark.parametrize("excluded", ["none", "by the student", "by the teacher"])
def test_entropies_are_the_same_bits_with_and_without_a_teacher(excluded, device):
    """A row whose teacher excludes an id is read a second time, for its KLs alone. (Beside a
    teacher of another dtype the compiler may spread the lanes over other threads, and a last bit
    may differ.)"""
    z, t = 6 * torch.randn(2, 48, 20_000, device=device)  # of few ids, entropies show every bit
    if excluded != "none":
        (z if excluded == "by the student" else t)[::2, 77] = -math.inf
    options = RowOptions(Divergence("reverse_kl"), LogitTransform(), LogitTransform())
    labels = torch.zeros(48, dtype=torch.int64, device=device)
    alone = TRITON.statistics(RowBatch(z, None, labels), options).stats[Stat.ENTROPY]
    beside = TRITON.statistics(RowBatch(z, t, labels), options).stats[Stat.ENTROPY]
    assert torch.equal(alone, beside)


@pytest.mark.parametrize(
    "name",
    ["tropd", "tropd_bucket", "tropd_renormalize_both", "gkd", "skew_reverse", "akl", "todi"],
)
def test_excluded_ids_in_whole_tiles(name, device):
    """Sums of whole tiles have no guards against 0 * inf, and a row that needs them is read again:
    so is one whose KL is infinite by a probability that the quick exponential takes for 0."""
    z, t = 3 * torch.randn(2, 5, 3000, dtype=torch.float64, device=device)
    both, teachers, students = 20, 21, 22
    z[0, both] = t[0, both] = -math.inf
    t[1, teachers] = -math.inf
    z[2, students], t[2, students] = -math.inf, -3.0
    z[3, students], t[3, students] = -math.inf, 20.0  # on K
    t[4], t[4, 5], t[4, 9] = -200.0, 0.0, -95.0  # q of id 9 is subnormal in float32
    z[4, 9] = -math.inf
    labels = torch.full((5,), 40, device=device)
    uniforms = torch.full((5,), 0.9999, device=device)
    exact = found(z, t, labels, OBJECTIVES[name], "reference", uniforms=uniforms.double())
    ours = found(z.float(), t.float(), labels, OBJECTIVES[name], uniforms=uniforms)
    torch.testing.assert_close(ours[0], exact[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], exact[1].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["tropd", "gkd"])
def test_a_row_without_weight_has_no_gradient(name, device):
    """... beside infinite terms, and in the buffer that held its logits."""
    z, t = torch.randn(2, 2, 3000, device=device)
    z[0, 7] = t[0, 8] = -math.inf
    weight, uniforms = torch.tensor([[0.0, 1.0], [0.01, 0.01]], device=device)
    labels = torch.tensor([1, 2], device=device)
    batch = RowBatch(z, t, labels, token_weight=weight, uniforms=uniforms)
    options = RowOptions(OBJECTIVES[name], LogitTransform(), LogitTransform())
    _, coefs = TRITON.forward(batch, options)
    TRITON.gradient(batch, coefs, options, out=z)
    assert not z[0].any()
    assert z[1].isfinite().all() and z[1].any()
