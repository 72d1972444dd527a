"""Batches of a few tokens for the adapters, and the comparison with a framework's own loss."""

from __future__ import annotations

import torch

N, V, K = 12, 31, 4
PPO_CLIP = dict(clip_ratio_low=0.2, clip_ratio_high=0.2)


def make_batch(draw):
    """Logits (2, N / 2, V) of both sides, and labels of which some do not count."""
    student = (2 * torch.randn(2, N // 2, V, generator=draw)).requires_grad_()
    teacher = 2 * torch.randn(2, N // 2, V, generator=draw)
    labels = torch.randint(V, (2, N // 2), generator=draw)
    labels[0, ::3] = -100
    return student, teacher, labels


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def assert_same(ours, theirs, leaf):
    """Losses, and gradients to 1e-5 of the largest."""
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=1e-6)
    found, expected = gradient(ours, leaf), gradient(theirs, leaf)
    largest = expected.abs().max().item()
    assert largest > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)
