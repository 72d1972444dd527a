"""Agreement with code that nobody here wrote: PyTorch, TRL and Liger, losses and gradients.

Conventions, read from the source of TRL 1.16 and Liger 0.8.5, all as here: beta 0 is the forward
KL(q || p) and 1 the reverse KL(p || q), M = beta q + (1 - beta) p; temperature divides both sides'
logits and brings no T^2; bias, then scale, soft cap, temperature. TRL gives a loss per token and
knows no mask; Liger gives the mean over the tokens whose label is not ignore_index.

TRL and Liger's Triton loss work in float32 whatever they are given; Liger's chunked loss only sums
in it.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from tropd_kernels import (
    GKD,
    SFT,
    Divergence,
    HiddenTeacher,
    LogitsTeacher,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)

BETAS = [0.0, 0.3, 0.5, 1.0]
FLOATS = [torch.float32, torch.float64]
BACKENDS = ["torch", "native", "triton", "reference"]
IGNORED = -100

backends = pytest.mark.parametrize("backend", BACKENDS)
floats = pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])


def agree(ours, theirs, dtype):
    """Norm of the difference over the norm: 64 roundings of `dtype`. Two float32 computations of
    the gradients here differ by 2 to 6 of them."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= 64 * torch.finfo(dtype).eps


class Batch:
    """Two heads of one vocabulary, and labels of which some are ignored."""

    def __init__(
        self, device, dtype, tokens=6, vocab_size=37, width=8, teacher_width=12, bias=True
    ):
        def normal(*shape, scale=1.0):
            return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)

        self.hidden = normal(tokens, width).requires_grad_()
        self.weight = normal(vocab_size, width, scale=3 / width**0.5).requires_grad_()
        self.bias = normal(vocab_size).requires_grad_() if bias else None
        self.teacher = HiddenTeacher(
            normal(tokens, teacher_width),
            normal(vocab_size, teacher_width, scale=3 / teacher_width**0.5),
            normal(vocab_size) if bias else None,
        )
        self.labels = torch.randint(vocab_size, (tokens,)).to(device)
        self.labels[1::3] = IGNORED
        self.incoming = normal(tokens)  # gradient of the per-token losses

    @property
    def counts(self):
        return self.labels != IGNORED

    @property
    def student(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def logits(self):
        """Student's and teacher's, leaves of their own."""
        z = F.linear(self.hidden, self.weight, self.bias).detach().requires_grad_()
        t = self.teacher
        return z, F.linear(t.hidden, t.weight, t.bias)

    def gradients(self, loss, incoming=None):
        return torch.autograd.grad(loss, self.student, incoming)


# --- TRL ---------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("beta", BETAS)
def test_trl_divergence(beta, backend, device):
    trl = pytest.importorskip("trl.kernels.chunked_divergence")
    batch = Batch(device, torch.float32)
    heads = {"logit_scale": 0.7, "softcap": 5.0}
    t = batch.teacher
    theirs, entropy = trl.ChunkedDivergenceFunction.apply(
        *batch.student, t.hidden, t.weight, t.bias, beta, 1.3, 0.7, 5.0, 1.4, 9.0
    )
    theirs = theirs * batch.counts
    ours = linear_distillation_loss(
        batch.hidden, batch.weight, batch.labels,
        HiddenTeacher(t.hidden, t.weight, t.bias, logit_scale=1.4, softcap=9.0), GKD(beta),
        bias=batch.bias, **heads, temperature=1.3, reduction="none", backend=backend,
    )  # fmt: skip
    agree([ours.loss], [theirs], torch.float32)
    agree([ours.stats.entropy], [entropy * batch.counts], torch.float32)
    agree(
        batch.gradients(ours.loss, batch.incoming),
        batch.gradients(theirs, batch.incoming),
        torch.float32,
    )


@backends
def test_trl_log_probs_and_entropy(backend, device):
    trl = pytest.importorskip("trl.kernels.chunked_logprob")
    batch = Batch(device, torch.float32)
    theirs, their_entropy, *_ = trl.ChunkedLogProbFunction.apply(
        *batch.student, batch.labels.clamp(0), 1.3, 16, 5.0, 0.7, ("entropy",)
    )
    theirs, their_entropy = theirs * batch.counts, their_entropy * batch.counts
    ours, entropy = linear_log_probs(
        batch.hidden, batch.weight, batch.labels, bias=batch.bias, logit_scale=0.7, softcap=5.0,
        temperature=1.3, return_entropy=True, backend=backend,
    )  # fmt: skip
    agree([ours, entropy], [theirs, their_entropy], torch.float32)
    other = batch.incoming.flip(0)
    agree(
        batch.gradients((ours * batch.incoming + entropy * other).sum()),
        batch.gradients((theirs * batch.incoming + their_entropy * other).sum()),
        torch.float32,
    )


# --- Liger -------------------------------------------------------------------------------------


@backends
@floats
@pytest.mark.parametrize("beta", BETAS)
def test_liger_chunked_jsd(beta, dtype, backend, device):
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    batch = Batch(device, dtype)
    t = batch.teacher
    theirs = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, ignore_index=IGNORED,
        temperature=1.3, compiled=False, chunk_size=2,
    )(batch.hidden, batch.weight, t.hidden, t.weight, batch.labels, batch.bias, t.bias)  # fmt: skip
    ours = linear_distillation_loss(
        batch.hidden, batch.weight, batch.labels, t, GKD(beta), bias=batch.bias, temperature=1.3,
        ignore_index=IGNORED, backend=backend,
    )  # fmt: skip
    agree([ours.loss], [theirs], torch.float32)  # theirs is a float32 sum
    # A factor, since each of them forms the gradients before it knows what comes in; one that
    # float32 has.
    agree(batch.gradients(1.75 * ours.loss), batch.gradients(1.75 * theirs), dtype)


@backends
@pytest.mark.parametrize("beta", BETAS)
def test_liger_fused_jsd(beta, backend, device):
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_jsd")
    batch = Batch(device, torch.float32, bias=False)
    t = batch.teacher
    theirs = liger.LigerFusedLinearJSDFunction.apply(
        batch.hidden, batch.weight, t.hidden, t.weight, batch.labels, beta, IGNORED, 1.3
    )
    ours = linear_distillation_loss(
        batch.hidden, batch.weight, batch.labels, t, GKD(beta), temperature=1.3, backend=backend
    )
    agree([ours.loss], [theirs], torch.float32)
    agree(batch.gradients(1.75 * ours.loss), batch.gradients(1.75 * theirs), torch.float32)


@backends
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.2, 0.05), (0.0, 0.05)])
def test_liger_fused_cross_entropy(smoothing, z_loss, backend, device):
    """Its `label_smoothing` and `lse_square_scale`."""
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    batch = Batch(device, torch.float32)
    made = liger.LigerFusedLinearCrossEntropyFunction.apply(
        batch.hidden, batch.weight, batch.labels, batch.bias, None, IGNORED, z_loss, smoothing,
        "mean",
    )  # fmt: skip
    theirs = made[0] if isinstance(made, tuple) else made
    ours = linear_distillation_loss(
        batch.hidden, batch.weight, batch.labels, None,
        SFT(label_smoothing=smoothing, z_loss=z_loss), bias=batch.bias, backend=backend,
    )  # fmt: skip
    agree([ours.loss], [theirs], torch.float32)
    agree(batch.gradients(1.75 * ours.loss), batch.gradients(1.75 * theirs), torch.float32)


# --- PyTorch -----------------------------------------------------------------------------------


@backends
@floats
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction, dtype, backend, device):
    """SFT() on a head, on its logits, and weighted by token. A mean divides by the labels that are
    not ignored, in both."""
    batch = Batch(device, dtype)
    incoming = batch.incoming if reduction == "none" else None
    logits, _ = batch.logits()
    theirs = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction=reduction)
    ours = distillation_loss(
        logits, batch.labels, None, SFT(), reduction=reduction, backend=backend
    ).loss
    agree([ours], [theirs], dtype)
    agree(
        torch.autograd.grad(ours, logits, incoming),
        torch.autograd.grad(theirs, logits, incoming),
        dtype,
    )
    theirs = F.cross_entropy(
        F.linear(batch.hidden, batch.weight, batch.bias), batch.labels, reduction=reduction
    )
    ours = linear_distillation_loss(
        batch.hidden, batch.weight, batch.labels, None, SFT(), bias=batch.bias,
        reduction=reduction, backend=backend,
    ).loss  # fmt: skip
    agree([ours], [theirs], dtype)
    agree(batch.gradients(ours, incoming), batch.gradients(theirs, incoming), dtype)


@backends
@floats
def test_weighted_cross_entropy(dtype, backend, device):
    """Weights by token on one side, by class on the other: the weight of the label's class."""
    batch = Batch(device, dtype)
    logits, _ = batch.logits()
    by_class = torch.rand(logits.shape[-1], dtype=torch.float64).to(device, dtype) + 0.5
    theirs = F.cross_entropy(logits, batch.labels, weight=by_class, reduction="none")
    ours = distillation_loss(
        logits, batch.labels, None, SFT(), token_weight=by_class[batch.labels.clamp(0)],
        reduction="none", backend=backend,
    ).loss  # fmt: skip
    agree([ours], [theirs], dtype)
    agree(
        torch.autograd.grad(ours, logits, batch.incoming),
        torch.autograd.grad(theirs, logits, batch.incoming),
        dtype,
    )


@backends
@floats
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_div(direction, dtype, backend, device):
    """F.kl_div(input, target) is KL(target || input)."""
    batch = Batch(device, dtype)
    logits, teacher_logits = batch.logits()
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    pair = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    theirs = F.kl_div(*pair, log_target=True, reduction="none").sum(-1) * batch.counts
    ours = distillation_loss(
        logits, batch.labels, LogitsTeacher(teacher_logits), Divergence(f"{direction}_kl"),
        reduction="none", backend=backend,
    ).loss  # fmt: skip
    agree([ours], [theirs], dtype)
    agree(
        torch.autograd.grad(ours, logits, batch.incoming),
        torch.autograd.grad(theirs, logits, batch.incoming),
        dtype,
    )
    rows = batch.counts.nonzero().squeeze(-1)
    batchmean = F.kl_div(*(t[rows] for t in pair), log_target=True, reduction="batchmean")
    mean = distillation_loss(
        logits, batch.labels, LogitsTeacher(teacher_logits), Divergence(f"{direction}_kl"),
        backend=backend,
    ).loss  # fmt: skip
    agree([mean], [batchmean], dtype)


@backends
@floats
def test_distributions(dtype, backend, device):
    """torch.distributions has the statistics: log-probs, entropies, both KLs."""
    batch = Batch(device, dtype)
    logits, teacher_logits = batch.logits()
    p, q = Categorical(logits=logits.detach()), Categorical(logits=teacher_logits)
    stats = distillation_loss(
        logits, batch.labels, LogitsTeacher(teacher_logits), Divergence("jeffreys"),
        backend=backend,
    ).stats  # fmt: skip
    label = batch.labels.clamp(0)
    theirs = {
        "log_probs": p.log_prob(label),
        "teacher_log_probs": q.log_prob(label),
        "entropy": p.entropy(),
        "teacher_entropy": q.entropy(),
        "forward_kl": kl_divergence(q, p),
        "reverse_kl": kl_divergence(p, q),
    }
    for name, value in theirs.items():
        agree([getattr(stats, name)], [value * batch.counts], dtype)


@backends
@floats
def test_entropy_gradient(dtype, backend, device):
    batch = Batch(device, dtype)
    theirs = Categorical(logits=F.linear(batch.hidden, batch.weight, batch.bias)).entropy()
    _, ours = linear_log_probs(
        batch.hidden, batch.weight, batch.labels, bias=batch.bias, return_entropy=True,
        backend=backend,
    )  # fmt: skip
    theirs = theirs * batch.counts
    agree([ours], [theirs], dtype)
    agree(batch.gradients(ours, batch.incoming), batch.gradients(theirs, batch.incoming), dtype)
