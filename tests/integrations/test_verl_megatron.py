"""Megatron's logits, split over the vocabulary of two processes: verl's own layout and loss, over
Megatron's groups."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("verl", reason="needs verl: make engines")
pytest.importorskip("megatron.core", reason="needs megatron-core: make engines")

from verl_engine import PROMPTS, RESPONSES, K, loss_function, make_batch, use_megatron

from tropd_kernels import Divergence
from tropd_kernels.integrations import verl as integration

V = 96
LENGTHS = [p + r for p, r in zip(PROMPTS, RESPONSES)]


def losses_of(function, data, logits, data_format):
    """What verl carries from the logits to the loss, and the gradient of a weighted sum."""
    leaf = logits.clone().requires_grad_()
    found = function(student_logits=leaf, data=data, data_format=data_format)
    losses = found["distillation_losses"]
    scale = torch.linspace(0.5, 2, losses.numel()).view(losses.shape)
    (losses * scale).sum().backward()
    return found, leaf.grad


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        use_megatron(patch)
        rule = Divergence("forward_kl", top_k=K, top_k_tail="raw")
        integration.register("raw_forward_kl", rule, "top_k")
        for data_format in ("thd", "bshd"):
            compare(rank, data_format)
    dist.destroy_process_group()


def compare(rank, data_format):
    data = make_batch("top_k", False, vocab=V, label=True)
    theirs = make_batch("top_k", False, vocab=V)
    padded = [length + length % 2 for length in LENGTHS]  # to the number of ranks
    rows = {"thd": sum(padded), "bshd": len(padded) * max(padded)}[data_format]
    shape = {"thd": (1, rows), "bshd": (len(padded), max(padded))}[data_format]
    draw = torch.Generator().manual_seed(3)
    whole = torch.randn(*shape, V, generator=draw)
    part = whole[..., rank * V // 2 : (rank + 1) * V // 2].contiguous()
    # Where a row of the packed batch lies.
    if data_format == "thd":
        starts = [sum(padded[:i]) for i in range(len(padded))]
    else:
        starts = [i * max(padded) for i in range(len(padded))]
    at = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, LENGTHS)])

    def call(name, batch, logits, strategy="megatron"):
        function = loss_function(name, dict(strategy=strategy))
        return losses_of(function, batch, logits, data_format)

    ours, ours_gradient = call("raw_forward_kl", data, part)
    own, own_gradient = call("forward_kl_topk", theirs, part)
    counted = data["response_mask"].bool()
    from verl.workers.utils.padding import no_padding_2_padding

    own_rows = no_padding_2_padding(torch.arange(len(at)), data)[counted]
    rows_that_count = at[own_rows]
    for name in ("distillation_losses", "student_mass", "teacher_mass"):
        a, b = (found[name].flatten()[rows_that_count] for found in (ours, own))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    a, b = (g.flatten(0, 1)[rows_that_count] for g in (ours_gradient, own_gradient))
    assert b.abs().max() > 0.1
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())

    # TrOPD against itself on logits that are whole, where each row's draws and old log-probs count.
    ours, ours_gradient = call("tropd", data, part)
    packed = whole.flatten(0, 1)[at][None]
    truth, gradient = call("tropd", data, packed, strategy="fsdp2")
    for name, values in truth.items():
        torch.testing.assert_close(
            ours[name].flatten()[at], values.flatten(), rtol=1e-5, atol=1e-5, equal_nan=True
        )
    cut = gradient[0][:, rank * V // 2 : (rank + 1) * V // 2]
    scale = torch.linspace(0.5, 2, ours["tropd_trust"].numel())[at]
    packed_scale = torch.linspace(0.5, 2, len(at))
    expected = cut * (scale / packed_scale)[:, None]
    torch.testing.assert_close(ours_gradient.flatten(0, 1)[at], expected, rtol=1e-4, atol=1e-6)
    assert 0 < truth["tropd_trust"].flatten()[own_rows].mean() < 1  # some are outliers


@pytest.mark.slow
def test_split_logits_give_the_losses_of_whole_ones(tmp_path):
    """In both of Megatron's layouts, in processes that import all of this once."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)


def test_in_one_process(group, monkeypatch):
    """The same in this process, which shows a failure where it is; padded to two all the same."""
    from megatron.core import parallel_state

    use_megatron(monkeypatch)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    data = make_batch("top_k", False, vocab=V)
    rows = sum(length + length % 2 for length in LENGTHS)
    logits = torch.randn(1, rows, V, generator=torch.Generator().manual_seed(3))
    function = loss_function("tropd", dict(strategy="megatron"))
    found, gradient = losses_of(function, data, logits, "thd")
    assert found["distillation_losses"].shape == (1, rows)
    assert found["distillation_losses"].isfinite().all() and gradient.abs().sum() > 0
    padding = torch.cat([torch.arange(n + n % 2) >= n for n in LENGTHS])
    assert padding.any() and gradient[0][padding].abs().sum() == 0
    parallel_state.destroy_model_parallel()
