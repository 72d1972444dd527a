"""Vocabulary-parallel heads: each rank of a process group holds consecutive rows of a head.

    rank r:  weight (V_r, H), ids [low_r, low_r + V_r);   hidden, labels, options as on every rank

Ids are numbered in the order of the ranks, as in Megatron-LM and in a DTensor with Shard(0). Shards
may differ in size. `Shard` holds this layout and makes the exchanges; `rows/sharded.py` combines
the shards' statistics, `loss/agreement.py` checks that the ranks make the same call, and
`loss/sharded.py` computes the loss.

The convention is that of Megatron's parallel cross-entropy after a column-parallel linear layer:
hidden is replicated over the group, and its gradient is returned complete, already summed over the
ranks, so the caller adds no all-reduce. Loss and statistics are the same on every rank. The
gradients of weight and bias are those of the shard, complete because every rank sees every token.

Student and teacher may be cut at different ids, for instance because their padding differs. If a
rank lacks rows of the teacher's head for its student's ids, the rank that has them sends them, once
per call. (Between heads of V and V + 128 R rows, evenly split over R ranks, r * 128 rows go to rank
r.) The teacher's logits are computed from the pieces, without a copy of the head.

Communication, each rank to all others, in numbers of 4 bytes (8 in float64):

    statistics   11 per token with a dense teacher, 4 without; 1 more with label_smoothing
    K            top_k per token if the rule has one and the teacher is dense; 4 top_k per search
                 for the student's own (again in a recomputing backward); 2 more for those and given
                 ids, 3 with a bucket
    AKL's head   120 per token
    sums         8 per token if the rule needs more than the statistics
    d_hidden     H per token, one all-reduce per super-chunk, if hidden requires grad
    sample       5 numbers of 8 bytes per call, with gradient_tolerance or gradient_sampling
    checks       96 numbers of 8 bytes per call

and before a selection of tokens 4 per token for a score of one side, 11 for one of both; the rest
is then per selected token. Nothing grows with V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's part of the vocabulary, and the way to the other ranks.

    bounds: (R + 1) first ids of the student's shards, and V; teacher_bounds: of the teacher's rows
    or columns, None without a dense teacher; reference_bounds: of a reference teacher's.
    vocab_size: the ids V that all sides have.
    """

    group: dist.ProcessGroup
    bounds: tuple[int, ...]
    teacher_bounds: tuple[int, ...] | None
    vocab_size: int
    reference_bounds: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return len(self.bounds) - 1

    @property
    def low(self) -> int:
        return self.bounds[self.rank]

    @property
    def width(self) -> int:
        return self.bounds[self.rank + 1] - self.low

    @property
    def largest(self) -> int:
        return max(high - low for low, high in zip(self.bounds, self.bounds[1:]))

    def describe_shards(self) -> str:
        """For errors: what the group holds."""
        heights = [high - low for low, high in zip(self.bounds, self.bounds[1:])]
        return f" (the {self.size} ranks of process_group hold {heights} of them)"

    def gather(self, tensor: Tensor) -> Tensor:
        """(R, *): every rank's tensor, which has the same shape on all."""
        return gather(self.group, tensor)

    def sum_(self, tensor: Tensor) -> None:
        """Adds up every rank's tensor, in place; the same bits on all."""
        exchange(self.group, lambda: dist.all_reduce(tensor, group=self.group))

    def reshard(self, rows: Tensor, have: tuple[int, ...]) -> tuple[Tensor, ...]:
        """A teacher's rows (T_r, *) of the student's ids [low, low + width), in order, as views of
        `rows` and pieces that other ranks sent. have: the first ids of the ranks' rows."""
        ours = self.rank

        def common(owner: int, user: int) -> range:
            low = max(have[owner], self.bounds[user])
            high = min(have[owner + 1], self.bounds[user + 1])
            return range(low, max(low, high))

        def view(ids: range) -> Tensor:
            return rows[ids.start - have[ours] : ids.stop - have[ours]]

        pieces: dict[int, Tensor] = {}
        transfers = []
        for peer in range(self.size):
            theirs, wanted = common(ours, peer), common(peer, ours)
            if peer == ours:
                if theirs:
                    pieces[peer] = view(theirs)
                continue
            to = dist.get_global_rank(self.group, peer)
            if theirs:
                sent = view(theirs).contiguous()
                transfers.append(dist.P2POp(dist.isend, sent, to, self.group))
            if wanted:
                pieces[peer] = rows.new_empty((len(wanted), *rows.shape[1:]))
                transfers.append(dist.P2POp(dist.irecv, pieces[peer], to, self.group))
        if transfers:
            exchange(
                self.group, lambda: [work.wait() for work in dist.batch_isend_irecv(transfers)]
            )
        return tuple(pieces.values())  # in the order of ranks, and so of ids


def gather(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    """(R, *): every rank's tensor."""
    result = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    parts = list(result.unbind(0))
    exchange(group, lambda: dist.all_gather(parts, tensor.contiguous(), group=group))
    return result


def exchange(group: dist.ProcessGroup, communicate: Callable[[], Any]) -> None:
    """Says whose exchange it was that failed: a rank died, or did not come within the time-out."""
    try:
        communicate()
    except RuntimeError as error:
        raise RuntimeError(
            f"{rank_label(group)}: an exchange between the ranks of process_group failed. A rank "
            "has ended, raised an error of its own, or did not make the same call within the "
            f"group's time-out: look at the other ranks' first error. {error}"
        ) from error


def rank_label(group: dist.ProcessGroup) -> str:
    return f"rank {dist.get_rank(group)} of {dist.get_world_size(group)}"


# --- groups and DTensors -------------------------------------------------------------------------


def group_of(
    process_group: dist.ProcessGroup | None, head: Tensor, name: str = "weight", dim: int = 0
) -> dist.ProcessGroup | None:
    """The group whose ranks share the head (or logits): the one given, or that of the mesh over
    which a DTensor is sharded along `dim`; None where all is on one rank."""
    if process_group is None:
        return _mesh_group(name, head, dim) if _on_mesh(head) else None
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, got {process_group!r} (on a "
            "process outside it, new_group() returns no group): call this on its ranks alone"
        )
    if dist.get_rank(process_group) < 0:
        raise ValueError(
            f"this process, global rank {dist.get_rank()}, is not in process_group, which covers "
            f"ranks {dist.get_process_group_ranks(process_group)}"
        )
    return process_group


def local_part(name: str, tensor: Tensor, group: dist.ProcessGroup | None, dim: int = 0) -> Tensor:
    """What this rank holds of a DTensor that is sharded over the group along `dim`, differentiable;
    other tensors as they are."""
    if group is None:
        check_plain({name: tensor})
    if group is None or not _on_mesh(tensor):
        return tensor
    ours = dist.get_process_group_ranks(group)
    over = dist.get_process_group_ranks(_mesh_group(name, tensor, dim))
    if over != ours:
        raise ValueError(
            f"{name} is a DTensor sharded over ranks {over}, process_group covers {ours}: pass "
            "the group of the head's mesh"
        )
    return tensor.to_local()  # type: ignore[attr-defined]


def whole_tensor(name: str, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A replicated DTensor as the tensor that every rank holds; other tensors as they are."""
    if group is None:
        check_plain({name: tensor})
    if group is None or not _on_mesh(tensor):
        return tensor
    placements = tensor.placements  # type: ignore[attr-defined]
    if not all(placement.is_replicate() for placement in placements):
        raise ValueError(
            f"{name} is a DTensor with placements {placements}: with a sharded head every rank "
            "holds all tokens; redistribute it to Replicate()"
        )
    return tensor.to_local()  # type: ignore[attr-defined]


def check_plain(tensors: dict[str, Any]) -> None:
    """Raises TypeError for a DTensor where a rank's own tensor is wanted, which torch would have
    mixed with others."""
    for name, tensor in tensors.items():
        if _on_mesh(tensor):
            raise TypeError(
                f"{name} is a DTensor with placements {tensor.placements}, where a rank's own "
                "tensor is wanted (beside a head or logits that are none): gathering.gathered() "
                "makes a sharded head whole, to_local() gives what a rank holds"
            )


def _on_mesh(tensor: Any) -> bool:
    """Is a DTensor, without importing the class, which takes longer than all of ours."""
    return getattr(tensor, "device_mesh", None) is not None


def _mesh_group(name: str, tensor: Any, dim: int) -> dist.ProcessGroup:
    """The group over which a DTensor is sharded along `dim`."""
    dim %= tensor.dim()
    split = [at for at, placement in enumerate(tensor.placements) if placement.is_shard(dim)]
    whole = [at for at, placement in enumerate(tensor.placements) if placement.is_replicate()]
    if len(split) != 1 or len(split) + len(whole) != len(tensor.placements):
        raise ValueError(
            f"{name} is a DTensor with placements {tensor.placements}: its vocabulary must be "
            f"sharded by one Shard({dim}), and replicated otherwise"
        )
    return tensor.device_mesh.get_group(split[0])


def bounds(heights: list[int], vocab_size: int) -> tuple[int, ...]:
    """First ids of shards of these heights, cut at the vocabulary's end."""
    ends = torch.tensor([0, *heights]).cumsum(0).clamp_max(vocab_size)
    return tuple(ends.tolist())
