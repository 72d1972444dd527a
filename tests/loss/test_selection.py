"""What a sample of ids is drawn by: probabilities from sizes, draws from a seed, and the sums over
d_logits and the head that make the sizes, in every row engine."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import relative_error

from tropd_kernels.backends import engine_for
from tropd_kernels.draws import id_uniforms, uniforms_like
from tropd_kernels.loss import sampling
from tropd_kernels.loss.sampling import GradientSampling

BACKENDS = ("torch", "native", "triton")


# --- the probabilities ---------------------------------------------------------------------------

TOLERANCES = (1e-3, 0.01, 0.1, 0.5, 0.9)
SHARES = (0.001, 0.03, 0.3, 0.49)


def sizes_of(kind: str, n: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    u = torch.rand(n, generator=draw, dtype=torch.float64)
    return {
        "alike": 1 + u / 10,
        "peaked": u**40,
        "a wide spread": 10 ** (-30 * u),
        "a softmax's": torch.softmax(12 * u.logit(1e-9) / 3, 0),
        "many the same": 0.1 ** (8 * u).floor(),
        "one large": torch.where(u == u.max(), 1.0, 1e-4 * u),
        "zeros, too": torch.where(u < u.max() / 5, 0.0, u**20),
        "tiny": 1e-100 * u**10,
    }[kind]


KINDS = (
    "alike", "peaked", "a wide spread", "a softmax's", "many the same", "one large", "zeros, too",
    "tiny",
)  # fmt: skip
vectors = given(st.sampled_from(KINDS), st.integers(1, 3000), st.integers(0, 2**31))
often = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def proportional(pi, e):
    """pi is min(1, c e) of some c, and monotone."""
    assert pi.dtype == torch.float64 and ((pi >= 0) & (pi <= 1)).all()
    sampled = (pi < 1) & (e > e.sum() * 1e-12)  # of a smaller one little is left in 1 / 2^60
    assert (pi[e == 0] == 0).all() and (pi[e > 0] > 0).all()
    if not sampled.any():
        return
    c = (pi / e)[sampled]
    torch.testing.assert_close(c, c[:1].expand_as(c), rtol=1e-5, atol=0)
    assert (e[pi == 1] * c[0] >= 1 - 1e-5).all()
    order = e.argsort()
    assert (pi[order].diff() >= 0).all()


@pytest.mark.parametrize("tolerance", TOLERANCES)
@often
@vectors
def test_a_tolerance_is_the_standard_deviation(tolerance, kind, n, seed):
    """All are kept where that takes more than DENSE of them, and only there."""
    e = sizes_of(kind, n, seed)
    pi = GradientSampling(tolerance).probabilities(e)

    def variance(pi):
        scaled = e / e.max()
        return float(((1 / pi - 1) * scaled.square())[e > 0].sum() / scaled.square().sum())

    if not (pi == 1).all():
        assert variance(pi) == pytest.approx(tolerance**2, rel=1e-6)
        assert pi.sum() <= sampling.DENSE * n
        proportional(pi, e)
        return
    # As many as it takes by bisection.
    low, high = 0.0, 1 / float(e[e > 0].min())
    for _ in range(2000):
        middle = (low + high) / 2
        enough = variance((middle * e).clamp(max=1)) <= tolerance**2
        low, high = (low, middle) if enough else (middle, high)
        if high - low < 1e-14 * high:
            break
    assert (high * e).clamp(max=1).sum() > sampling.DENSE * n * (1 - 1e-9)


@pytest.mark.parametrize("share", SHARES)
@often
@vectors
def test_a_share_is_that_of_the_ids(share, kind, n, seed):
    e = sizes_of(kind, n, seed)
    pi = GradientSampling(share=share).probabilities(e)
    assert not (pi == 1).all() or n == 1 or (e > 0).sum() <= share * n
    assert float(pi.sum()) == pytest.approx(min(share * n, int((e > 0).sum())), rel=1e-9)
    proportional(pi, e)


def test_more_tolerance_keeps_fewer():
    e = sizes_of("peaked", 1000, 0)
    found = [GradientSampling(t).probabilities(e) for t in (0.01, 0.02, 0.1, 0.3, 0.9)]
    found += [GradientSampling(share=f).probabilities(e) for f in (0.4, 0.2, 0.1, 0.01)]
    for i in (*range(4), *range(5, 8)):
        assert (found[i] >= found[i + 1]).all() and found[i].sum() > found[i + 1].sum()


@pytest.mark.parametrize("selects", [GradientSampling(0.3), GradientSampling(share=0.1)])
@pytest.mark.parametrize("factor", [1e-60, 1e60, 2.0**-500])
def test_units_of_the_sizes_do_not_matter(selects, factor):
    e = sizes_of("peaked", 1000, 0)
    pi = selects.probabilities(e)
    assert 0 < (pi == 1).sum() < 1000
    torch.testing.assert_close(selects.probabilities(e * factor), pi, rtol=1e-12, atol=0)
    order = torch.randperm(1000)
    torch.testing.assert_close(selects.probabilities(e[order]), pi[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("selects", [GradientSampling(0.3), GradientSampling(share=0.1)])
def test_sizes_that_tell_nothing_keep_all(selects):
    nan, inf = math.nan, math.inf
    for sizes in ([0.0] * 5, [nan] * 3, [inf], [0.0, inf, nan], [nan, 0.0, 0.0]):
        assert (selects.probabilities(torch.tensor(sizes)) == 1).all(), sizes
    assert selects.probabilities(torch.tensor([0.3])).numel() == 1


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_sizes_that_are_no_numbers_are_kept(odd):
    """And the others are chosen as without them."""
    e = sizes_of("peaked", 400, 1)
    pi = GradientSampling(0.2).probabilities(e)
    places = torch.arange(0, 400, 100)
    with_odd = e.clone()
    with_odd[places] = odd
    others = torch.ones(400, dtype=torch.bool)
    others[places] = False
    found = GradientSampling(0.2).probabilities(with_odd)
    assert (found[places] == 1).all()
    torch.testing.assert_close(found[others], GradientSampling(0.2).probabilities(e[others]))
    assert 0 < pi.sum() < 200
    found = GradientSampling(share=0.1).probabilities(with_odd)
    assert (found[places] == 1).all()
    assert float(found[others].sum()) == pytest.approx(0.1 * 396)


def test_fewer_ids_than_the_share():
    """Those that bring anything are kept, and no other: e.g. where the rest is masked."""
    e = torch.zeros(10, dtype=torch.float64)
    e[3] = 1.0
    for share in (0.1, 0.3, 0.45):
        assert GradientSampling(share=share).probabilities(e).tolist() == e.tolist()
    e[7] = math.nan
    assert GradientSampling(share=0.3).probabilities(e).tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]


def test_few_sizes():
    def found(selects, *sizes):
        return selects.probabilities(torch.tensor(sizes)).tolist()

    none = math.nan
    assert found(GradientSampling(share=0.25), 0.0, none, 2.0, 0.0, 1.0) == pytest.approx(
        [0.0, 1.0, 2 / 3, 0.0, 1 / 3]
    )
    alike = found(GradientSampling(share=1 / 3), *[7.0] * 9)
    assert alike == pytest.approx([1 / 3] * 9)
    # n (1 / pi - 1) = t^2 n
    alike = found(GradientSampling(0.999), *[7.0] * 9)
    assert alike == [1.0] * 9, "half of them is the most"
    one = found(GradientSampling(share=0.5), 5.0, 1e-30)
    assert one[0] == 1 and one[1] <= 1e-15


def test_probabilities_look_at_no_value():
    """A meta tensor has no values: whatever would wait for a GPU raises here."""
    sizes = torch.empty(50, device="meta")
    for selects in (GradientSampling(0.1), GradientSampling(share=0.1)):
        assert selects.probabilities(sizes).shape == (50,)


# --- the draws -----------------------------------------------------------------------------------


def test_draws_are_not_the_gates():
    seed, labels = torch.tensor(7), torch.zeros(100, 100, dtype=torch.int64)
    cpu = labels.device
    ours = torch.stack([id_uniforms(seed, token, 0, 100, cpu) for token in range(100)])
    gates = uniforms_like(labels, 7).double()
    assert ours.dtype == torch.float64 and ((ours >= 0) & (ours < 1)).all()
    pairs = torch.stack([ours.flatten(), gates.flatten()])
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.05
    for neighbour in (ours.roll(1, 0), ours.roll(1, 1)):
        pairs = torch.stack([ours.flatten(), neighbour.flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.05
    for values in (ours, gates):
        assert abs(float(values.mean()) - 0.5) < 0.02
        assert abs(float(values.var()) - 1 / 12) < 0.005
    assert not torch.equal(ours[0], id_uniforms(torch.tensor(8), 0, 0, 100, cpu))
    fine = ours * 2**24
    assert (fine != fine.floor()).any(), "more bits than the gate's float32"


def test_a_shard_draws_what_the_whole_vocabulary_would():
    seed, cpu = torch.tensor(7), torch.device("cpu")
    whole = id_uniforms(seed, 24, 0, 100, cpu)
    parts = [id_uniforms(seed, 24, low, 25, cpu) for low in range(0, 100, 25)]
    assert torch.equal(torch.cat(parts), whole)


# --- the sums that choose ------------------------------------------------------------------------


def strided(matrix):
    """The same values as a part of a wider buffer, which is NaN elsewhere."""
    n, v = matrix.shape
    buffer = torch.full((n, v + 13), math.nan).to(matrix)
    buffer[:, 5 : 5 + v] = matrix
    return buffer[:, 5 : 5 + v]


def engines():
    for backend in BACKENDS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            yield backend, dtype
        if backend != "native":  # whose chunks hold no float16
            yield backend, torch.float16


@pytest.mark.parametrize(("backend", "dtype"), list(engines()), ids=str)
@pytest.mark.parametrize(("n", "v"), [(0, 3), (1, 1), (7, 1), (131, 37), (35, 5000)], ids=str)
def test_column_sums(backend, dtype, n, v, device, monkeypatch, use_threads):
    use_threads(2)
    monkeypatch.setattr("tropd_kernels.rows.torch_rows.BLOCK_ELEMENTS", {"cpu": 2000})
    wide = torch.promote_types(dtype, torch.float32)
    d_logits = torch.randn(n, v, device=device).to(dtype)
    hidden = torch.randn(2, n, device=device, dtype=wide)
    d, (apart, along) = d_logits.double(), hidden.double()
    truth = torch.stack([d.square().sum(0), apart @ d.square(), along @ d])
    engine = engine_for(backend)
    for matrix in (d_logits, strided(d_logits)):
        for weights in (hidden, strided(hidden)):
            sums = engine.column_sums(matrix, weights)
            assert sums.shape == (3, v) and sums.dtype == wide
            for row, exact in zip(sums, truth, strict=True):
                assert relative_error(row, exact) < (1e-14 if wide == torch.float64 else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("v", [37, 300])
def test_a_column_that_is_not_finite_stays_one(backend, odd, v, device):
    """In the last of the ids, and within."""
    engine, columns = engine_for(backend), [5, 16, v - 1]
    d_logits, hidden = torch.randn(9, v, device=device), torch.rand(2, 9, device=device) + 0.1
    clean = engine.column_sums(d_logits, hidden)
    d_logits[3, columns] = odd
    sums = engine.column_sums(d_logits, hidden)
    others = torch.ones(v, dtype=torch.bool, device=device)
    others[columns] = False
    assert not sums[:, columns].isfinite().any()
    assert torch.equal(sums[:, others], clean[:, others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "h"), [(1, 1), (5, 33), (3000, 7), (3, 5000)], ids=str)
def test_row_squares(backend, dtype, n, h, device, monkeypatch):
    monkeypatch.setattr("tropd_kernels.rows.torch_rows.BLOCK_ELEMENTS", {"cpu": 4096})
    matrix = torch.randn(n, h, device=device).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    truth = matrix.double().square().sum(1)
    for each in (matrix, strided(matrix), matrix.T.contiguous().T):
        squares = engine_for(backend).row_squares(each, wide)
        assert squares.shape == (n,) and squares.dtype == wide
        torch.testing.assert_close(squares.double(), truth, rtol=3e-6, atol=0)
