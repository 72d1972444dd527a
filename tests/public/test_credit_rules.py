"""The rules that all functions of `credit` share: masks, packing, padding, dtypes, the host."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from over_time import batches, quick, sequences

from tropd_kernels import credit


def runs_of_the_mask(x, mask):
    return torch.ones_like(x, dtype=torch.int64) if mask is None else mask.long()


# Every function behind one signature (values, mask, sequence_ids), for the rules they share.
CALLS = {
    "return_to_go": (lambda x, m, s: credit.return_to_go(x, m, 0.9, sequence_ids=s)),
    "window": (lambda x, m, s: credit.return_to_go(x, m, 0.9, window=3, sequence_ids=s)),
    "future_mean": (lambda x, m, s: credit.reward_plus_future_mean(x, m, sequence_ids=s)),
    "advantages": (lambda x, m, s: advantages_and_targets(x, m, s)[0]),
    "value_targets": (lambda x, m, s: advantages_and_targets(x, m, s)[1]),
    "exact_kl_baseline": (lambda x, m, s: credit.exact_kl_baseline(x, x.abs(), m)),
    "delta_advantages": (
        lambda x, m, s: credit.delta_advantages(x, x.abs(), 0.3 * x, 0.7 * x.abs(), m)
    ),
    "reward_aligned_mask": (
        lambda x, m, s: credit.reward_aligned_mask(x, torch.ones_like(x), m, sequence_ids=s)
    ),
    "drift_gates": (lambda x, m, s: credit.drift_gates(x, 0.5 * x, m, 3, sequence_ids=s)),
    "drift_gates_by_id": (
        lambda x, m, s: credit.drift_gates(
            x, 0.5 * x, m, block_ids=runs_of_the_mask(x, m), sequence_ids=s
        )
    ),
    "importance_weights": (lambda x, m, s: credit.importance_weights(x, m, sequence_ids=s)),
    "turn_weights": (
        lambda x, m, s: credit.turn_weights(runs_of_the_mask(x, m), m, sequence_ids=s)
    ),
    "entropy_quantile_mask": (lambda x, m, s: credit.entropy_quantile_mask(x.abs(), m, 0.3)),
}


def advantages_and_targets(x, mask, sequence_ids):
    return credit.generalized_advantages(
        x, 0.5 * x, mask, 0.9, 0.8, bootstrap_values=-x, sequence_ids=sequence_ids
    )


WHOLE_BATCH = ("drift_gates", "drift_gates_by_id", "entropy_quantile_mask")
RANKED_OR_COUNTED = ("entropy_quantile_mask", "turn_weights")  # their results hold no input
every_function = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@every_function
@quick
@given(batches())
def test_masked_positions_are_not_read_and_return_zero(call, batch):
    values, mask, ids = batch
    poisoned = values.masked_fill(~mask, math.nan)
    result = call(values, mask, ids)
    assert not result[~mask].any()
    assert torch.equal(call(poisoned, mask, ids), result)
    assert torch.equal(call(values, mask.long(), ids), result)


@pytest.mark.parametrize("name", [n for n in CALLS if n != "entropy_quantile_mask"])
@quick
@given(batches(), st.integers(0, 9))
def test_padding_and_packing_change_nothing(name, batch, pad):
    values, mask, ids = batch
    packed = CALLS[name](values, mask, ids)
    pieces = list(sequences(mask, ids))
    if not pieces:
        return
    width = pad + max(len(run) for _, run in pieces)
    alone, counts = torch.zeros(len(pieces), width).double(), torch.zeros(len(pieces), width).bool()
    for i, (row, run) in enumerate(pieces):
        alone[i, pad : pad + len(run)] = values[row, run]
        counts[i, pad : pad + len(run)] = mask[row, run]
    result = CALLS[name](alone, counts, None)
    for i, (row, run) in enumerate(pieces):
        # The gates' mean over the batch is a sum in another order: the last bit may differ.
        torch.testing.assert_close(
            result[i, pad : pad + len(run)],
            packed[row, run],
            rtol=1e-14 if name in WHOLE_BATCH else 0,
            atol=0,
            check_dtype=False,
        )


@pytest.mark.parametrize("name", [n for n in CALLS if n not in WHOLE_BATCH])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 77])
def test_padding_and_packing_change_no_bit_in_float32(name, length):
    draw = torch.Generator().manual_seed(length)
    values, mask = (
        torch.randn(1, length, generator=draw),
        torch.rand(1, length, generator=draw) < 0.7,
    )
    alone = CALLS[name](values, mask, None)
    for before, after in [(0, 1), (3, 0), (5, 70), (130, 11)]:
        other = [torch.randn(1, n, generator=draw) for n in (before, after)]
        row = torch.cat([other[0], values, other[1]], 1)
        counted = torch.cat([other[0] > 0, mask, other[1] > 0], 1)
        ids = torch.tensor([[1] * before + [2] * length + [3] * after])
        packed = CALLS[name](row, counted, ids)
        assert torch.equal(packed[:, before : before + length], alone)


@every_function
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (2, 5)])
def test_empty_or_fully_masked_gives_zeros(call, shape):
    result = call(torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool), None)
    assert result.shape == shape and not result.any()


@pytest.mark.parametrize("name", [n for n in CALLS if n != "turn_weights"])  # float32 always
def test_results_are_detached_and_in_float32_or_float64(name):
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        values = torch.randn(2, 9).to(dtype).requires_grad_()
        result = CALLS[name](values, None, None)
        assert not result.requires_grad
        assert result.dtype in (expected, torch.bool)


@every_function
def test_inputs_are_left_alone(call):
    inputs = torch.randn(2, 9), torch.rand(2, 9) < 0.5, torch.zeros(2, 9, dtype=torch.int64)
    before = [tensor.clone() for tensor in inputs]
    call(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    "name", [n for n in CALLS if not n.endswith("_mask") and n != "turn_weights"]
)
def test_nan_that_counts_is_not_hidden(name):
    values = torch.tensor([[-1.0, math.nan, -math.inf, -2.0]])
    if name == "exact_kl_baseline":
        result = credit.exact_kl_baseline(torch.ones(1, 4), values)
    else:
        result = CALLS[name](values, None, None)
    assert result.isnan().any()


@every_function
def test_no_value_is_read_on_the_host(call):
    # A meta tensor has no values: whatever would wait for a GPU raises here.
    inputs = (
        torch.empty(2, 9, device="meta", dtype=d) for d in (torch.float32, torch.bool, torch.int64)
    )
    result = call(*inputs)
    assert result.shape == (2, 9) and result.device.type == "meta"


def test_traces_as_one_graph():
    def every(values, mask, sequence_ids):
        return [call(values, mask, sequence_ids) for call in CALLS.values()]

    inputs = (
        torch.randn(2, 5),
        torch.tensor([[0, 1, 1, 0, 1]] * 2),
        torch.tensor([[0, 0, 1, 1, 1]] * 2),
    )
    compiled = torch.compile(every, fullgraph=True, backend="eager")(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, every(*inputs), strict=True))


@pytest.mark.parametrize("name", ["window", "drift_gates"])
def test_traces_with_symbolic_lengths(name):
    """One doubling more at another length, and no number formatted on the way."""
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="eager", dynamic=True)
    for length in (5, 9):
        values, mask = torch.randn(2, length), torch.rand(2, length) < 0.7
        ids = (torch.arange(length) > 2).long().expand(2, -1)
        assert torch.equal(compiled(values, mask, ids), CALLS[name](values, mask, ids))
