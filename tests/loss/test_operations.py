"""What a call launches on a GPU, of each super-chunk of tokens: its products, its kernels, and next
to nothing else. Each launch costs some microseconds of the host's time, and small tensors in
between some of the GPU's."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from flat import flat_problem
from operations import counted

from tropd_kernels import GKD, OPD, TrOPD, products
from tropd_kernels.loss import loop
from tropd_kernels.loss.problem import Side
from tropd_kernels.rows.layout import LogitTransform, RowOptions

SUPER_ROWS, VOCAB, K = 2048, 151_936, 64
#: Objective, form of teacher, and the kernels of a sub-chunk of many rows.
CASES = {
    "tropd": (TrOPD(), "hidden", ("statistics", "dense_sums", "rule", "gradient")),
    "gkd": (GKD(), "hidden", ("statistics", "dense_sums", "rule", "gradient")),
    "opd": (OPD(), "hidden", ("statistics", "rule", "gradient")),
    "opd_sampled": (OPD(), "sampled", ("statistics", "rule", "gradient")),
    "opd_top_k": (OPD(), "top_k", ("statistics", "topk_teacher_sums", "rule", "gradient")),
    "tropd_top_k": (
        TrOPD(),
        "top_k",
        ("statistics", "topk_teacher_sums", "rule", "gradient", "topk_teacher_grad"),
    ),
}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def of_a_super_chunk(rule, form: str, rows: int, dropped: bool) -> Counter:
    """Those of one more super-chunk, beside what a call does once. dropped: some tokens do not
    count."""
    products.adds_to_wide_sums(torch.device("meta"), torch.bfloat16)  # what a process does once
    two, three = (of_a_call(rule, form, rows, dropped, i * SUPER_ROWS) for i in (2, 3))
    return three - two


def of_a_call(rule, form: str, rows: int, dropped: bool, tokens: int) -> Counter:
    n = tokens + 5 if dropped else tokens
    half = torch.bfloat16
    teacher = None
    if form == "hidden":
        teacher = Side(meta(n, 4096, dtype=half), meta(VOCAB, 4096, dtype=half))
    inputs = {"uniforms": meta(n), "token_weight": meta(n)}
    if form != "hidden":
        inputs["label_log_probs"] = meta(n)
    if form == "top_k":
        inputs |= {"ids": meta(n, K, dtype=torch.int64), "topk_log_probs": meta(n, K)}
    problem = flat_problem(
        Side(meta(n, 2048, dtype=half), meta(VOCAB, 2048, dtype=half)), teacher,
        meta(n, dtype=torch.int64), rule, "triton", inputs, ignore_index=None,
    )  # fmt: skip
    plan = loop._Walk._plan

    def planned(walk):
        return replace(plan(walk), rows=rows, super_rows=SUPER_ROWS)

    counting = meta(tokens, dtype=torch.int64) if dropped else None
    with (
        mock.patch.object(loop._Walk, "_plan", planned),
        mock.patch.object(loop, "tokens_that_count", return_value=counting),
        counted() as found,
    ):
        loop.forward(problem)
    return found


@pytest.mark.parametrize("dropped", [False, True], ids=["all count", "some count"])
@pytest.mark.parametrize("rows", [512, 1024])
@pytest.mark.parametrize("case", CASES)
def test_products_and_kernels_and_next_to_nothing_else(case, rows, dropped):
    rule, form, kernels = CASES[case]
    found = of_a_super_chunk(rule, form, rows, dropped)
    chunks = SUPER_ROWS // rows
    if rows == 512:  # too few for a GPU: each is shared by programs
        kernels = (*kernels, "join")
    for kernel in kernels:
        assert found.pop(f"{kernel}_kernel") == chunks
    heads = 2 if form == "hidden" else 1
    assert found.pop("mm") + found.pop("addmm") == heads * chunks + 2
    rest = Counter()
    if dropped:  # hidden states are picked from among the others, and d_hidden put back, rounded
        rows_of_a_teacher = {"hidden": 1, "top_k": 2}.get(form, 0)
        rest = Counter(index=1 + rows_of_a_teacher * chunks, _to_copy=1, index_put_=1)
    assert found == rest


@pytest.mark.parametrize("rows", [512, 1024])
def test_a_super_chunk_of_the_default_loss(rows):
    """56 were its operations, at 512 rows, where each pass made matrices of its own, which were
    scaled and copied."""
    found = of_a_super_chunk(TrOPD(), "hidden", rows, dropped=False)
    assert sum(found.values()) <= 30


def test_what_is_counted():
    """Not views, nor memory left as it is, nor operations on nothing; all that writes, once."""
    a = meta(4, 6)
    with counted() as found:
        b = a[1:].reshape(6, 3).t().detach().expand(2, 3, 6)[0].t()
        b.new_empty(3), torch.empty_like(b), a[:0].zero_(), a[:0] + 1, b.contiguous(), b.float()
    assert not found
    with counted() as found:
        a.zero_(), a + 1, a[:, 0].fill_(2), a.bfloat16(), a.t().contiguous(), a.new_zeros(2)
        a[1:] = a[:3]
        torch.mm(a, a.t(), out=meta(4, 4))
    names = "zero_ add fill_ _to_copy clone new_zeros copy_ mm"
    assert found == Counter(names.split())


def test_kernels_are_counted_and_do_not_run(device):
    from tropd_kernels.backends import engine_for
    from tropd_kernels.rows.layout import RowBatch

    batch = RowBatch(torch.randn(3, 50, device=device), None, torch.tensor([1, 2, 3]).to(device))
    options = RowOptions(OPD(), LogitTransform(), LogitTransform())
    with counted() as found:
        stats = engine_for("triton").statistics(batch, options).stats
    assert found == {"statistics_kernel": 1, "new_full": 1, "new_zeros": 1}
    assert stats.isnan().all()
