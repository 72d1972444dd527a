"""The counter-based draws: the published generator, and draws that belong to a token."""

import math
import operator
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tropd_kernels import draws

# Known answers of Random123 (kat_vectors, "philox4x32 10"): counter, key, output.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return tuple(int(word, 16) for word in text.split())


def textbook_words(seed, step, sequence_id, position):
    """The same block from Python's unbounded integers, with the product taken whole."""
    word = 2**32
    sequence_id, seed = sequence_id % 2**64, seed % 2**64
    a, b, c, d = position % word, sequence_id % word, sequence_id // word, step % word
    k, m = seed % word, seed // word
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q // word ^ b ^ k, q % word, p // word ^ d ^ m, p % word
        k, m = (k + 0x9E3779B9) % word, (m + 0xBB67AE85) % word
    return a, b, c, d


def textbook_uniform(*numbers):
    return (textbook_words(*numbers)[0] // 256) / 2**24


def textbook_id_uniform(seed, token, i):
    _, second, third, _ = textbook_words(seed, 0, token, i)
    return (second // 2**5 * 2**26 + third // 2**6) / 2**53


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, answer):
    counter, key = (tuple(torch.tensor(word) for word in words(text)) for text in (counter, key))
    assert tuple(word.item() for word in draws.philox4x32(counter, key)) == words(answer)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.integers(-(2**63), 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**31), 2**32 - 1),
)
@example(2**64 - 3, 7, 2**63 - 1, 2**32 - 1)
@example(-(2**63), 2**32 - 1, -1, -1)
def test_draws_are_the_textbook_generator(seed, step, sequence_id, position):
    ids, positions = torch.tensor([sequence_id]), torch.tensor([position])
    expected = textbook_uniform(seed, step, sequence_id, position)
    assert draws.bernoulli_uniforms(seed, step, ids, positions).item() == expected
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    assert draws.bernoulli_uniforms(signed, torch.tensor(step), ids, positions).item() == expected


@pytest.mark.parametrize("seed", [0, 4, -1, 2**63 - 1])
def test_draws_of_ids_are_the_textbook_generator(seed):
    """Whatever part of the vocabulary is asked for."""
    at = torch.device("cpu")
    for token, first, count in ((0, 0, 5), (2048, 3, 4), (2**40 + 1, 150_000, 1), (7, 9, 0)):
        drawn = draws.id_uniforms(torch.tensor(seed), token, first, count, at)
        assert drawn.dtype == torch.float64
        ids = range(first, first + count)
        assert drawn.tolist() == [textbook_id_uniform(seed, token, i) for i in ids]


def test_a_token_keeps_its_draw_in_any_layout():
    ids, positions = torch.tensor([[7], [2**40 + 7], [-1]]), torch.arange(6)
    whole = draws.bernoulli_uniforms(3, 5, ids, positions)
    assert whole.shape == (3, 6) and whole.dtype == torch.float32
    packed = draws.bernoulli_uniforms(3, 5, ids.expand(3, 6).flatten(), positions.repeat(3))
    assert torch.equal(packed.view(3, 6), whole)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
    shuffled = draws.bernoulli_uniforms(
        3, 5, ids.expand(3, 6).flatten()[order], positions.repeat(3)[order]
    )
    assert torch.equal(shuffled, whole.flatten()[order])
    single = draws.bernoulli_uniforms(3, 5, torch.tensor(7), torch.tensor(4, dtype=torch.int32))
    assert single.shape == () and single == whole[0, 4]


def test_every_part_of_the_key_and_counter_matters():
    ids, positions = torch.arange(64)[:, None], torch.arange(64)
    base = draws.bernoulli_uniforms(0, 0, ids, positions)
    assert base.unique().numel() > 4090  # 4096 draws of 2^24 values: 0.5 repeats expected
    for other in (
        draws.bernoulli_uniforms(1, 0, ids, positions),
        draws.bernoulli_uniforms(2**32, 0, ids, positions),
        draws.bernoulli_uniforms(0, 1, ids, positions),
        draws.bernoulli_uniforms(0, 0, ids + 2**32, positions),
    ):
        assert (base == other).sum() <= 2
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 4 / math.sqrt(base.numel())


def test_draws_are_uniform():
    u = draws.bernoulli_uniforms(2024, 3, torch.arange(128)[:, None], torch.arange(128)).double()
    n = u.numel()
    ordered = u.flatten().sort().values
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((grid[1:] - ordered).max(), (ordered - grid[:-1]).max())
    assert distance * math.sqrt(n) < 1.63  # Kolmogorov-Smirnov at 1 %, for this one fixed sample
    for neighbour in (u.roll(1, 0), u.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([u.flatten(), neighbour.flatten()]))[0, 1]
        assert correlation.abs() < 4 / math.sqrt(n)


def test_one_is_never_drawn():
    extremes = draws._uniform(torch.tensor([0, 0xFF, 0x100, 0xFFFFFFFF]))
    assert extremes.tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]


def test_no_random_state_is_read_or_changed():
    labels = torch.zeros(2, 3)
    torch.manual_seed(0)
    random.seed(0)
    before, python_before = torch.get_rng_state(), random.getstate()
    first = draws.uniforms_like(labels, 9)
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python_before
    torch.manual_seed(1)
    assert torch.equal(draws.uniforms_like(labels, 9), first)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5), (0,), (2, 0), (0, 5)])
def test_uniforms_like_takes_the_flat_row_and_the_last_index(shape):
    labels = torch.zeros(shape, dtype=torch.int64)
    uniforms = draws.uniforms_like(labels, 11)
    assert uniforms.shape == shape and uniforms.dtype == torch.float32
    assert torch.equal(draws.uniforms_like(labels, torch.tensor(11)), uniforms)
    for flat, value in enumerate(uniforms.flatten().tolist()):
        row, position = divmod(flat, shape[-1] if shape else 1)
        assert value == textbook_uniform(11, 0, row, position)


def test_no_value_is_read_on_the_host():
    # A meta tensor has no values: whatever would wait for a GPU raises here.
    ids = torch.empty(2, 1, dtype=torch.int64, device="meta")
    scalar = torch.empty((), dtype=torch.int64, device="meta")
    assert draws.bernoulli_uniforms(scalar, scalar, ids, ids).device.type == "meta"
    assert draws.uniforms_like(ids, torch.tensor(3)).device.type == "meta"


def test_traces_as_one_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(draws.bernoulli_uniforms, fullgraph=True, backend=backend)
    ids, positions = torch.arange(2)[:, None], torch.arange(5)
    for step in (2, 3, 4):
        eager = draws.bernoulli_uniforms(-7, step, ids, positions)
        tensors = torch.tensor(-7), torch.tensor(step)
        assert torch.equal(compiled(*tensors, ids, positions), eager)
    assert len(graphs) == 1  # 0-d tensors do not recompile

    for seed, step in ((-7, 2), (11, 3), (2**40, 4)):
        eager = draws.bernoulli_uniforms(seed, step, ids, positions)
        assert torch.equal(compiled(seed, step, ids, positions), eager)
    # An int that changes becomes symbolic, and inductor miscompiles shifts and masks of those; of
    # ten rounds in one expression it does not make a kernel at all.
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "tropd_kernels.uniforms.default" in targets
    assert not targets & {str(getattr(operator, n)) for n in ("and_", "xor", "rshift", "lshift")}


def test_uniforms_like_traces_as_one_graph():
    labels = torch.zeros(2, 3, 5)
    compiled = torch.compile(draws.uniforms_like, fullgraph=True, backend="eager")
    assert torch.equal(compiled(labels, torch.tensor(4)), draws.uniforms_like(labels, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**64 - 3, 2**32 - 1), (-(2**63), 7)])
def test_the_triton_kernel_draws_the_same_bits(dtype, seed, step, device):
    kernel = pytest.importorskip("tropd_kernels.triton_draws")
    ids = torch.tensor([[7], [2**40 + 7], [-1], [2**63 - 1]])
    positions = torch.arange(700)
    positions[:3] = torch.tensor([2**32 - 1, -5, 2**31])
    narrow = ids.clamp(-(2**31), 2**31 - 1).int(), positions.clamp(max=2**31 - 1).int()
    for places in ((ids, positions), narrow):
        expected = draws._uniforms(seed, step, *places, dtype)
        there = [t.to(device) for t in places]
        words = [draws._scalar("", n, -(2**63), 2**64 - 1, there[0].device) for n in (seed, step)]
        drawn = kernel.uniforms(*words, *there, dtype)
        assert drawn.dtype == dtype and torch.equal(drawn.cpu(), expected)
        # What callers reach, with a seed of either device: on a GPU the kernel again.
        for scalars in ((seed, step), words, [word.cpu() for word in words]):
            assert torch.equal(draws._uniforms(*scalars, *there, dtype).cpu(), expected)
    assert kernel.uniforms(*words, there[0][:0], there[1], dtype).shape == (0, 700)


def test_a_gpu_draws_by_the_triton_kernel_alone(monkeypatch, device):
    pytest.importorskip("triton")
    labels = torch.zeros(3, 5, device=device)
    seed = draws.seed_tensor(4, labels.device)
    expected = [
        draws.uniforms_like(labels.cpu(), 4),
        draws.id_uniforms(seed.cpu(), 2048, 7, 300, torch.device("cpu")),
    ]
    monkeypatch.setattr(draws, "runs_triton", lambda device: True)
    compiled = torch.compile(draws.uniforms_like, fullgraph=True, backend="eager")
    assert torch.equal(compiled(labels, torch.tensor(4, device=device)).cpu(), expected[0])
    monkeypatch.setattr(draws, "philox4x32", None)
    for same in (4, torch.tensor(4)):
        assert torch.equal(draws.uniforms_like(labels, same).cpu(), expected[0])
    for same in (seed, torch.tensor(4)):
        drawn = draws.id_uniforms(same, 2048, 7, 300, labels.device)
        assert torch.equal(drawn.cpu(), expected[1])


IDS = torch.arange(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: draws.bernoulli_uniforms(0, 0, 1, IDS), TypeError, "sequence_ids.*got int"),
        (lambda: draws.bernoulli_uniforms(0, 0, IDS, IDS.float()), TypeError, "positions.*float32"),
        (
            lambda: draws.bernoulli_uniforms(0, 0, IDS, IDS.to("meta")),
            ValueError,
            "positions.*meta",
        ),
        (lambda: draws.bernoulli_uniforms(0.5, 0, IDS, IDS), TypeError, "seed.*got float"),
        (lambda: draws.bernoulli_uniforms(True, 0, IDS, IDS), TypeError, "seed.*got bool"),
        (lambda: draws.bernoulli_uniforms(2**64, 0, IDS, IDS), ValueError, f"seed.*got {2**64}"),
        (lambda: draws.bernoulli_uniforms(IDS, 0, IDS, IDS), ValueError, r"seed.*0-d.*\(3,\)"),
        (
            lambda: draws.bernoulli_uniforms(torch.tensor(0.5), 0, IDS, IDS),
            TypeError,
            "seed.*float",
        ),
        (
            lambda: draws.bernoulli_uniforms(IDS[0].to("meta"), 0, IDS, IDS),
            ValueError,
            "seed.*meta",
        ),
        (lambda: draws.bernoulli_uniforms(0, -1, IDS, IDS), ValueError, "step.*got -1"),
        (lambda: draws.bernoulli_uniforms(0, 2**32, IDS, IDS), ValueError, "step.*4294967295"),
        (lambda: draws.uniforms_like([1, 2], 0), TypeError, "labels.*got list"),
    ],
)
def test_errors_say_what_was_given(call, error, words):
    with pytest.raises(error, match=words):
        call()
