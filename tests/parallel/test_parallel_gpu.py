"""Heads sharded over GPUs, by NCCL: compiled Triton on each rank against the whole head on its GPU.

With one GPU this is a group of one, which still runs every kernel of a shard and every collective.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from parallel_agreement import compare, served
from sharding import bare, everything, run

DEVICES = [
    pytest.param("cuda", marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ]),
    "cpu",  # the same cases, so that they are known to run
]  # fmt: skip
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no processes")


def cases(device, ranks):
    backend = "triton" if device == "cuda" else "torch"
    for name, form in served():
        for make in (bare, everything):
            yield (
                f"{name} {form} {make.__name__}",
                partial(compare, make(device=device), name, form, backend),
            )


@pytest.mark.parametrize("device", DEVICES)
def test_agreement(device, tmp_path):
    ranks = min(4, torch.cuda.device_count()) if device == "cuda" else 1
    communicates_by = "nccl" if device == "cuda" else "gloo"
    run(ranks, tmp_path, partial(cases, device), backend=communicates_by)
