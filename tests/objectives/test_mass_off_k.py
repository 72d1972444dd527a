"""Where a divergence on the top k alone drives a student who is sure of another of its ids."""

import math

import pytest
import torch

from tropd_kernels import MOPD, Divergence, LogitsTeacher, distillation_loss

V, K, STEPS = 2018, 64, 200


def descended(rule):
    """Mass of student and teacher on the teacher's top k, and the loss, after steps of gradient
    descent on one token's logits. Both are sure, each of another id of the top k."""
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(V, generator=draw)
    teacher[0] = teacher.logsumexp(0) + 4.6  # 0.99
    top = teacher.topk(K).indices
    student = torch.randn(V, generator=draw)
    student[top[1]] = student.logsumexp(0) + 4.0  # 0.98
    labels, known = torch.tensor([0]), LogitsTeacher(teacher[None])
    for _ in range(STEPS):
        student.requires_grad_()
        loss = distillation_loss(student[None], labels, known, rule, backend="torch").loss
        student = (student - torch.autograd.grad(loss, student)[0]).detach()
    return *(z.softmax(0)[top].sum().item() for z in (student, teacher)), loss.item()


@pytest.mark.parametrize(
    ("rule", "most"),
    [(MOPD(top_k=K), 1.0), (Divergence("reverse_kl", top_k=K), 0.05)],
    ids=["mopd", "reverse_kl"],
)
def test_a_reverse_kl_on_k_drives_the_student_off_it(rule, most):
    """Off the top k the gradient is -p times the divergence there: the worse the student does on
    it, the more it leaves. Once it has left there is little to gain: MOPD costs no more than the
    teacher's mass on the top k, 1 nat at most, the raw KL hardly anything, and at best -1/e."""
    own, theirs, loss = descended(rule)
    assert theirs > 0.98 and own < 0.05
    assert -theirs / math.e <= loss < most * 1.05


def test_a_forward_kl_on_k_draws_the_student_to_it():
    """Off the top k its gradient is p times the teacher's mass there."""
    own, theirs, _ = descended(Divergence("forward_kl", top_k=K))
    assert own > theirs > 0.98


def test_a_reverse_kl_over_the_vocabulary_brings_it_back():
    """Where the same steps of one on the top k leave it: other ids cost the student, too."""
    own, theirs, loss = descended(Divergence("reverse_kl"))
    assert min(own, theirs) > 0.95 and loss < 0.05
