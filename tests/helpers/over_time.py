"""Batches of numbers over time, and plain double loops over them in Python floats."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

quick = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@st.composite
def batches(draw):
    """(values, mask, sequence_ids) in float64, up to 3 x 15, any mask, runs of ids at random."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(0, 15))
    size = rows * length

    def column(values):
        return draw(st.lists(values, min_size=size, max_size=size))

    values = torch.tensor(column(st.floats(-8, 8, width=32)), dtype=torch.float64)
    mask = torch.tensor(column(st.booleans()), dtype=torch.bool)
    border = torch.tensor(column(st.sampled_from([0, 0, 0, 1])), dtype=torch.int64)
    shape = (rows, length)
    return values.view(shape), mask.view(shape), border.view(shape).cumsum(1)


def sequences(mask, sequence_ids):
    """For each run of equal ids: its row and its positions, in order."""
    for row in range(mask.shape[0]):
        run = []
        for t in range(mask.shape[1]):
            if run and sequence_ids[row, t] != sequence_ids[row, t - 1]:
                yield row, run
                run = []
            run.append(t)
        if run:
            yield row, run


def loop(values, mask, sequence_ids, per_sequence):
    """Applies per_sequence(values, mask) -> values to lists, one sequence at a time."""
    result = torch.zeros_like(values)
    for row, run in sequences(mask, sequence_ids):
        one = per_sequence([values[row, t].item() for t in run], [bool(mask[row, t]) for t in run])
        for t, value in zip(run, one, strict=True):
            result[row, t] = value if mask[row, t] else 0.0
    return result


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
