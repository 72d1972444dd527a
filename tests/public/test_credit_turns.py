"""Weights over runs of equal ids: turns, and drift gates over blocks that the caller gives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from over_time import batches, close, quick, sequences

from tropd_kernels import credit


def runs_of(ids, positions):
    """Positions in order, cut where the id changes."""
    runs = []
    for t in positions:
        if not runs or t != runs[-1][-1] + 1 or ids[t] != ids[t - 1]:
            runs.append([])
        runs[-1].append(t)
    return runs


@st.composite
def batches_with_ids(draw):
    values, mask, sequence_ids = draw(batches())
    size = mask.numel()
    ids = draw(st.lists(st.sampled_from([3, 3, 3, -1, 5]), min_size=size, max_size=size))
    return values, mask, sequence_ids, torch.tensor(ids, dtype=torch.int32).view(mask.shape)


# Turns


@quick
@given(batches_with_ids())
def test_turn_weights_are_the_loop(batch):
    _, mask, sequence_ids, ids = batch
    expected = torch.zeros(mask.shape)
    for row, run in sequences(mask, sequence_ids):
        turns = [[t for t in turn if mask[row, t]] for turn in runs_of(ids[row].tolist(), run)]
        turns = [turn for turn in turns if turn]
        tokens = sum(map(len, turns))
        for turn in turns:
            expected[row, turn] = tokens / (len(turns) * len(turn))
    actual = credit.turn_weights(ids, mask, sequence_ids=sequence_ids)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_turn_weights_by_hand():
    # Two turns of one and three tokens that count: 4 / (2 * 1) and 4 / (2 * 3). The tool's output,
    # id 7, is a run without a token that counts.
    ids = torch.tensor([[0, 7, 7, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1]])
    expected = torch.tensor([[2, 0, 0, 2 / 3, 0, 2 / 3, 2 / 3]])
    torch.testing.assert_close(credit.turn_weights(ids, mask), expected)
    # Runs of the mask as turns: one token, one token, two tokens.
    expected = torch.tensor([[4 / 3, 0, 0, 4 / 3, 0, 2 / 3, 2 / 3]])
    torch.testing.assert_close(credit.turn_weights(mask, mask), expected)


def test_turn_weights_make_the_mean_over_turns_of_the_mean_over_tokens():
    losses = torch.tensor([[1.0, 5.0, 6.0, 10.0]])
    weights = credit.turn_weights(torch.tensor([[0, 1, 1, 1]]))
    assert weights.dtype == torch.float32
    assert (losses * weights).mean().item() == pytest.approx((1.0 + 7.0) / 2, rel=1e-6)


# Blocks of drift gates


@quick
@given(batches_with_ids(), st.sampled_from([0.1, 1.0, 3.0]))
def test_gates_by_id_are_the_loop(batch, tau):
    values, mask, sequence_ids, ids = batch
    new = values.roll(1, 0) * 0.25
    gates = torch.zeros_like(values)
    for row, run in sequences(mask, sequence_ids):
        for block in runs_of(ids[row].tolist(), run):
            block = [t for t in block if mask[row, t]]
            if block:
                drift = sum((values - new)[row, t].item() for t in block) / len(block)
                gates[row, block] = math.exp(-tau * abs(drift))
    expected = gates / (gates.sum() / mask.sum()) if mask.any() else gates
    actual = credit.drift_gates(
        values, new, mask, tau=tau, block_ids=ids, sequence_ids=sequence_ids
    )
    close(actual, expected)


@pytest.mark.parametrize("block_size", [None, 1, 5, 64, 300])
def test_ids_of_fixed_blocks_give_their_gates(block_size):
    """... to the bit, and None is 64."""
    old, new = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0))
    fixed = credit.drift_gates(old, new, None, block_size)
    ids = (torch.arange(200) // (block_size or 64)).expand(3, -1)
    assert torch.equal(credit.drift_gates(old, new, block_ids=ids), fixed)


def test_lines_of_text_as_blocks():
    # drift 1, 3 | 0, 0, 0 | 4, the newline ends its line; the mean over a line is 2, 0 and 4
    is_newline = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool()
    lines = is_newline.cumsum(1) - is_newline.long()
    assert lines.tolist() == [[0, 0, 1, 1, 1, 2]]
    old = torch.tensor([[1.0, 3.0, 0.0, 0.0, 0.0, 4.0]]).double()
    gates = credit.drift_gates(old, torch.zeros_like(old), tau=math.log(2), block_ids=lines)
    raw = torch.tensor([[0.25, 0.25, 1.0, 1.0, 1.0, 0.0625]]).double()
    close(gates, raw / raw.mean())


ONES = torch.ones(2, 5)
IDS = ONES.long()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: credit.turn_weights(ONES), TypeError, "turn_ids.*float32.*one id per turn"),
        (lambda: credit.turn_weights(ONES > 0), TypeError, "turn_ids must be integers.*bool"),
        (lambda: credit.turn_weights([[0]]), TypeError, "turn_ids must be a tensor, got list"),
        (lambda: credit.turn_weights(IDS[0]), ValueError, r"turn_ids.*\(5,\).*unsqueeze"),
        (lambda: credit.turn_weights(IDS, IDS[:1]), ValueError, r"mask.*\(2, 5\).*\(1, 5\)"),
        (
            lambda: credit.turn_weights(IDS, sequence_ids=IDS[:, 1:]),
            ValueError,
            r"sequence_ids.*\(2, 4\)",
        ),
        (
            lambda: credit.drift_gates(ONES, ONES, block_size=8, block_ids=IDS),
            ValueError,
            "block_ids and block_size 8.*one of them",
        ),
        (
            lambda: credit.drift_gates(ONES, ONES, block_ids=ONES),
            TypeError,
            "block_ids.*float32.*line of text",
        ),
        (
            lambda: credit.drift_gates(ONES, ONES, block_ids=IDS[:1]),
            ValueError,
            r"block_ids.*\(1, 5\)",
        ),
    ],
)
def test_errors_say_what_was_given(call, error, words):
    with pytest.raises(error, match=words):
        call()
