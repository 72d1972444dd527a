"""Training on two processes, parameters replicated (DDP) or sharded (FSDP2), against one process.

Twenty steps with the same batches: the loss curves and the weights have to come out the same,
although the processes hold different numbers of tokens. Without `gathered`, or with a plain
`full_tensor()`, the head of the sharded model would learn from one process's tokens only.
"""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("transformers")

import transformers
from sharding import PATIENCE

from tropd_kernels import HiddenTeacher, TrOPD, linear_distillation_loss
from tropd_kernels.gathering import gathered

STEPS, ROWS, LENGTH, VOCAB = 20, 4, 9, 67


def model(seed: int, tied: bool = False, width: int = 16):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
        initializer_range=0.3,
    )  # fmt: skip
    # In float64: twenty steps would make float32's rounding visible in losses near 0.
    return transformers.LlamaForCausalLM(config).double()


def batches():
    """(ids, labels, uniforms) a step; completions of different lengths, some rows without any."""
    draw = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=draw)
        labels = ids.roll(-1, 1)
        for row in range(ROWS):
            labels[row, : (3 * row + step) % LENGTH] = -100
        labels[:, -1] = -100
        if step % 5 == 3:
            labels[2:] = -100  # the second process has no token that counts
        yield ids, labels, torch.rand(ROWS, LENGTH, generator=draw)


def train(student, part: slice, processes: int, forward) -> tuple[list[float], list]:
    """Losses (this process's share) of a run on these rows of each batch."""
    teacher = model(1, width=24).requires_grad_(False)
    # Adam would not notice a gradient of the wrong size.
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    for ids, labels, uniforms in batches():
        count = (labels != -100).sum().item()
        ids, labels, uniforms = ids[part], labels[part], uniforms[part]
        with torch.no_grad():
            theirs = teacher.model(ids).last_hidden_state
        loss = forward(
            student, ids, labels,
            HiddenTeacher(theirs, teacher.lm_head.weight.detach()),
            # Gradients are averaged over the processes.
            dict(uniforms=uniforms, normalizer=count / processes, max_workspace_bytes=None),
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [getattr(p, "full_tensor", lambda p=p: p)() for p in student.parameters()]


def call(student, ids, labels, teacher, options):
    hidden = student.model(ids).last_hidden_state
    weight = gathered(student.lm_head.weight)
    return linear_distillation_loss(hidden, weight, labels, teacher, TrOPD(top_k=5), **options).loss


class Whole(torch.nn.Module):
    """The loss inside the module's forward, as DDP wants it."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, *arguments):
        return call(self.student, *arguments)


def process(rank: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store_{kind}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )  # fmt: skip
    student = model(0, tied=kind == "fsdp2, tied")
    part = slice(0, 2) if rank == 0 else slice(2, 4)
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(Whole(student))
        losses, weights = train(wrapped, part, 2, lambda outer, *rest: outer(*rest))
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in student.model.layers:
            fully_shard(layer, mesh=mesh)
        if kind == "fsdp2, tied":
            # FSDP2 wants parameters that share memory in one unit: the loss is in its forward.
            whole = fully_shard(Whole(student), mesh=mesh)
            losses, weights = train(whole, part, 2, lambda outer, *rest: outer(*rest))
        else:
            fully_shard(student.model, mesh=mesh)
            fully_shard(student, mesh=mesh)
            losses, weights = train(student, part, 2, call)
    torch.save((losses, [w.detach() for w in weights]), f"{folder}/{kind}_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2, tied"])
def test_two_processes_are_one(tmp_path, kind):
    mp.spawn(process, (str(tmp_path), kind), nprocs=2)
    student = model(0, tied=kind == "fsdp2, tied")
    losses, weights = train(student, slice(None), 1, call)
    saved = [torch.load(tmp_path / f"{kind}_{rank}.pt") for rank in range(2)]
    curve = [(a + b) / 2 for a, b in zip(saved[0][0], saved[1][0])]
    assert curve == pytest.approx(losses, rel=1e-6)
    assert max(losses) - min(losses) > 0.1
    for new, whole in zip(saved[0][1], weights, strict=True):
        torch.testing.assert_close(new, whole, rtol=1e-6, atol=1e-7)


def test_plain_tensors_pass_through():
    weight = torch.randn(3, 2, requires_grad=True)
    assert gathered(weight) is weight
    with pytest.raises(TypeError, match="parameter must be a tensor, got list"):
        gathered([1.0])
