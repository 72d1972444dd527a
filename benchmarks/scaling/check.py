"""The small runs on a CPU that the plan's formulas are checked against, and their tables."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from benchmarks.markdown import table
from benchmarks.measure import Times, interleaved_times, machine, peak_memory
from tropd_kernels import (
    HiddenTeacher,
    SampledTeacher,
    TopKTeacher,
    TrOPD,
    linear_distillation_loss,
    plan_chunks,
)
from tropd_kernels.backends import choose_backend

from .plan import FORMS, TEACHER, TOP_K
from .text import percent, size, spread


@dataclass(frozen=True)
class Workspace:
    """Bytes of one call over inputs and returned gradients."""

    dtype: str
    teacher: str
    measured: int | None
    planned: int


@dataclass(frozen=True)
class Share:
    """Of forward and backward of a small model: predicted by FLOP, and measured in seconds."""

    vocab_size: int
    teacher: str
    body: int
    loss: Times
    step: Times
    predicted: float

    @property
    def measured(self) -> float:
        return self.loss.median / self.step.median


#: Tokens, vocabulary, student's and teacher's width of the workspace's check.
SMALL = (1024, 50_304, 256, 512)
#: Width, inner width, layers and heads of the small model; sequences and their length.
TINY, BATCH, VOCABULARIES = (512, 1536, 6, 8), (4, 128), (8_000, 32_000)
REPEATS = 5


def check() -> dict:
    return {
        "machine": machine(),
        "bytes": check_bytes(),
        "workspace": [asdict(w) for w in check_workspace()],
        "shares": [asdict(s) for s in check_shares()],
    }


def check_bytes() -> dict[str, float]:
    """Bytes a token of real tensors and of real JSON, by form."""
    tokens, v, g = 32, TEACHER.vocab_size, TEACHER.width
    logits = torch.randn(tokens, v)
    log_q = logits.log_softmax(-1)
    top = log_q.topk(TOP_K)
    label = log_q[:, 0].clone()

    def stored(*tensors: torch.Tensor) -> float:
        return sum(t.numel() * t.element_size() for t in tensors) / tokens

    def written(ids: Iterable[int], log_probs: Iterable[float]) -> int:
        """As vLLM's server writes a position's prompt_logprobs."""
        entries = {
            str(i): {"logprob": value, "rank": rank, "decoded_token": " word"}
            for rank, (i, value) in enumerate(zip(ids, log_probs), 1)
        }
        return len(json.dumps(entries, separators=(",", ":")).encode())

    one = [written([1000 + i], [label[i].item()]) for i in range(tokens)]
    many = [
        written([*top.indices[i].tolist(), v - 1], [*top.values[i].tolist(), label[i].item()])
        for i in range(tokens)
    ]
    top_k = TopKTeacher(top.indices, top.values, label)
    return {
        FORMS[0].name: stored(logits),
        FORMS[1].name: stored(logits.bfloat16()),
        FORMS[2].name: stored(torch.zeros(tokens, g, dtype=torch.bfloat16)),
        FORMS[3].name: sum(many) / tokens,
        FORMS[4].name: stored(top.indices.int(), top.values, label),
        FORMS[5].name: sum(one) / tokens,
        FORMS[6].name: stored(label),
        "TopKTeacher, int64 ids": stored(top_k.ids, top_k.log_probs, top_k.label_log_probs),
    }


def check_workspace() -> list[Workspace]:
    tokens, v, h, g = SMALL
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(tokens, h).to(dtype).requires_grad_()
        weight = torch.randn(v, h).to(dtype).requires_grad_()
        labels = torch.randint(v, (tokens,))
        ids = torch.rand(tokens, v).topk(TOP_K).indices
        log_probs = torch.full((tokens, TOP_K), -5.0)
        teachers = {
            "hidden": HiddenTeacher(torch.randn(tokens, g).to(dtype), torch.randn(v, g).to(dtype)),
            "top-k": TopKTeacher(ids, log_probs, torch.full((tokens,), -5.0)),
        }
        for name, teacher in teachers.items():

            def call(hidden=hidden, weight=weight, labels=labels, teacher=teacher) -> None:
                out = linear_distillation_loss(hidden, weight, labels, teacher, TrOPD(), seed=0)
                out.loss.backward()
                hidden.grad = weight.grad = None

            call()  # loads what a first call loads
            peak = peak_memory(call)
            returned = sum(t.numel() * t.element_size() for t in (hidden, weight))
            planned = plan_chunks(
                tokens, v, h, g if name == "hidden" else None, dtype=dtype, device="cpu",
                backend=default_backend(), objective=TrOPD(),
            ).workspace_bytes  # fmt: skip
            measured = None if peak is None else max(0, peak - returned)
            found.append(Workspace(str(dtype).removeprefix("torch."), name, measured, planned))
    return found


def default_backend() -> str:
    return choose_backend(None, torch.device("cpu"))


def check_shares() -> list[Share]:
    """Forward and backward of a small Qwen3, float32, with its loss, and the loss alone."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    h, inner, layers, heads = TINY
    found = []
    for v in VOCABULARIES:
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=v, hidden_size=h, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=heads, head_dim=h // heads,
                tie_word_embeddings=False,
            )
        )  # fmt: skip
        weight = model.lm_head.weight
        body = sum(p.numel() for p in model.parameters()) - 2 * v * h
        ids = torch.randint(v, BATCH)
        labels = torch.randint(v, BATCH)
        teachers = {
            "hidden": HiddenTeacher(torch.randn(*BATCH, h), torch.randn(v, h)),
            "sampled": SampledTeacher(torch.full(BATCH, -5.0)),
        }
        with torch.no_grad():
            last = model.model(input_ids=ids).last_hidden_state
        for name, teacher in teachers.items():
            rule = TrOPD() if name == "hidden" else TrOPD(outlier="mask")

            def loss(hidden, teacher=teacher, rule=rule, weight=weight, labels=labels) -> None:
                out = linear_distillation_loss(hidden, weight, labels, teacher, rule, seed=0)
                out.loss.backward()

            def step(model=model, loss=loss, ids=ids) -> None:
                loss(model.model(input_ids=ids).last_hidden_state)
                model.zero_grad(set_to_none=True)

            def alone(model=model, loss=loss, last=last) -> None:
                loss(last.clone().requires_grad_())
                model.zero_grad(set_to_none=True)

            times = interleaved_times({"step": step, "loss": alone}, REPEATS)
            head = 2 * v * h
            products = 4 * head if name == "hidden" else 3 * head
            predicted = products / (products + 6 * body)
            found.append(Share(v, name, body, times["loss"], times["step"], predicted))
    return found


def bytes_check_table(found: dict[str, float]) -> str:
    expected = {form.name: form.token_bytes for form in FORMS}
    rows = [
        [name, f"{expected[name]:,}" if name in expected else "-", f"{measured:,.0f}"]
        for name, measured in found.items()
    ]
    return table(["form", "formula, bytes a token", "counted"], rows)


def workspace_check_table(found: list[dict]) -> str:
    rows = []
    for w in (Workspace(**entry) for entry in found):
        known = w.measured is not None
        rows.append(
            [w.dtype, w.teacher, size(w.planned), size(w.measured) if known else "-",
             f"{w.measured / w.planned:.2f}" if known else "-"]
        )  # fmt: skip
    return table(["inputs", "teacher", "plan_chunks", "measured", "ratio"], rows)


def share_check_table(found: list[dict]) -> str:
    rows = []
    for entry in found:
        times = {name: Times(**entry[name]) for name in ("loss", "step")}
        s = Share(**entry | times)
        rows.append(
            [f"{s.vocab_size:,}", s.teacher, percent(s.predicted), percent(s.measured),
             spread(s.loss), spread(s.step)]
        )  # fmt: skip
    titles = ["vocabulary", "teacher", "predicted by FLOP", "measured", "loss", "whole"]
    return table(titles, rows)


def machine_line(facts: dict[str, str]) -> str:
    versions = ("torch", "transformers", "python")
    parts = [facts["cpu"], *(f"{name} {facts[name]}" for name in versions if name in facts)]
    return ", ".join(parts) + "."
