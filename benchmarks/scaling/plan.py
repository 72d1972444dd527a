"""The plan on paper: what is assumed, and the tables that follow from it by formula."""

import math
from dataclasses import dataclass
from functools import partial

from benchmarks.markdown import table
from tropd_kernels import plan_chunks

from .text import duration, gflop, percent, size

#: Of a GPU, whether or not there is one.
_plan = partial(plan_chunks, device="cuda", backend="triton")


@dataclass(frozen=True)
class Model:
    """width: of the last hidden state. parameters: all; body: those that multiply with a token,
    without embedding and head."""

    name: str
    width: int
    vocab_size: int
    layers: int
    parameters: float
    body: float


STUDENT = Model("Qwen3-32B", 5120, 151_936, 64, 32.8e9, 31.2e9)
#: 22B is what the model card calls activated; the head's share of it is not said and counts twice.
TEACHER = Model("Qwen3-235B-A22B", 4096, 151_936, 94, 235e9, 22e9)
TOP_K = 64

#: 64 GPUs: one node holds the teacher, the others train the student and generate with it.
GPUS, TEACHER_GPUS = 64, 8
STUDENT_GPUS = GPUS - TEACHER_GPUS
#: Tokens of one call on one GPU, and of all GPUs in one optimiser step.
TOKENS = 16_384
STEP_TOKENS = STUDENT_GPUS * TOKENS
#: FLOP/s of one H100 SXM (data sheet: bf16, dense), and bytes/s in one direction: of NVLink
#: (900 GB/s in both), and of one NDR InfiniBand port (400 Gbit/s) for each GPU.
PEAK = 989e12
NVLINK, INFINIBAND = 450e9, 50e9
#: Assumed: the part of the peak that each kind of work reaches.
LOSS_RATE, TRAINING_RATE, SCORING_RATE, GENERATION_RATE = 0.5, 0.4, 0.4, 0.1

#: Vocabulary-parallel heads: ranks that share a head, and the numbers a token that each sends to
#: the others, as `tropd_kernels.parallel` says: statistics, the teacher's top k, sums.
GROUP = 8
NUMBERS_PER_TOKEN = {"hidden": (11, TOP_K, 8), "top-k or sampled": (4, 8)}
#: What an exchange takes however short: assumed.
LATENCY = 20e-6
#: One log-prob with its id, rank and text in vLLM's JSON, about; `--check` counts it.
JSON_BYTES = 73


@dataclass(frozen=True)
class Form:
    """How a teacher's signal arrives: bytes a token, and whether the loss has a teacher product."""

    name: str
    token_bytes: int
    serves: str
    teacher_head: bool = False


FORMS = (
    Form("logits, float32", 4 * TEACHER.vocab_size, "every objective"),
    Form("logits, bf16", 2 * TEACHER.vocab_size, "every objective, rounded"),
    Form("hidden states, bf16", 2 * TEACHER.width, "every objective", teacher_head=True),
    Form(f"top {TOP_K}, as JSON", JSON_BYTES * (TOP_K + 1), "K1 and what lives on the top k"),
    Form(f"top {TOP_K}, int32 + float32", 8 * TOP_K + 4, "K1 and what lives on the top k"),
    Form("sampled, as JSON", JSON_BYTES, "K1"),
    Form("sampled, float32", 4, "K1"),
)


# --- the tables --------------------------------------------------------------------------------


def forms_table() -> str:
    node = TEACHER_GPUS * INFINIBAND
    rows = [
        [form.name, f"{form.token_bytes:,}", size(form.token_bytes * STEP_TOKENS),
         duration(form.token_bytes * STEP_TOKENS / node), form.serves]
        for form in FORMS
    ]  # fmt: skip
    return table(["teacher's signal", "bytes a token", "a step", "out of one node", "serves"], rows)


def workspace_table() -> str:
    rows = []
    for form, width in (("hidden", TEACHER.width), ("top-k or sampled", None)):
        for group in (1, GROUP):
            tokens, vocab_size = TOKENS * group, -(-STUDENT.vocab_size // group)
            plan = _plan(tokens, vocab_size, STUDENT.width, width)
            heads = 2 * vocab_size * (STUDENT.width + (width or 0))
            d_weight = 2 * vocab_size * STUDENT.width
            hidden = 2 * tokens * (2 * STUDENT.width + (width or 0))
            whole = heads + d_weight + hidden + plan.workspace_bytes
            rows.append(
                [form, str(group), f"{tokens:,} × {vocab_size:,}", f"{plan.gemm_flop / 1e12:.0f}",
                 size(heads), size(d_weight), size(hidden), size(plan.workspace_bytes),
                 size(whole), size(4 * tokens * vocab_size * (2 if width else 1))]
            )  # fmt: skip
    return table(
        ["teacher", "ranks a head", "tokens × ids", "TFLOP", "heads", "d_weight", "hidden",
         "workspace", "sum", "float32 logits, not made"],
        rows,
    )  # fmt: skip


def parts_table() -> str:
    plans = [
        _plan(TOKENS * group, -(-STUDENT.vocab_size // group), STUDENT.width, TEACHER.width)
        for group in (1, GROUP)
    ]
    rows = [
        [name, *(size(plan.workspace[name]) for plan in plans)]
        for name in plans[0].workspace
        if any(plan.workspace[name] for plan in plans)
    ]
    return table(["part of the workspace", "1 rank a head", f"{GROUP} ranks a head"], rows)


def loss_flop(form: str) -> float:
    """FLOP a token of the loss's products."""
    s, t = 2 * STUDENT.vocab_size * STUDENT.width, 2 * TEACHER.vocab_size * TEACHER.width
    return 3 * s + (t if form == "hidden" else 0)


def share_table() -> str:
    training, scoring, generation = 6 * STUDENT.body, 2 * TEACHER.body, 2 * STUDENT.parameters
    rows = []
    for form in ("hidden", "top-k or sampled"):
        loss = loss_flop(form)
        step = loss + training
        rows.append(
            [form, gflop(loss), gflop(training), gflop(scoring), gflop(generation),
             percent(loss / step), percent(loss / (step + scoring + generation))]
        )  # fmt: skip
    return table(
        ["teacher", "loss", "student", "teacher's pass", "generation", "loss of forward, backward",
         "loss of all"],
        rows,
    )  # fmt: skip


def step_table() -> str:
    """Seconds of one optimiser step at the assumed rates."""
    rows = []
    for what, gpus, flop, rate in (
        ("generation", STUDENT_GPUS, 2 * STUDENT.parameters, GENERATION_RATE),
        ("teacher's pass", TEACHER_GPUS, 2 * TEACHER.body, SCORING_RATE),
        ("forward and backward", STUDENT_GPUS, 6 * STUDENT.body, TRAINING_RATE),
        ("loss, teacher's hidden states", STUDENT_GPUS, loss_flop("hidden"), LOSS_RATE),
        ("loss, top-k or sampled", STUDENT_GPUS, loss_flop("top-k"), LOSS_RATE),
    ):
        seconds = STEP_TOKENS * flop / (gpus * PEAK * rate)
        rows.append([what, str(gpus), gflop(flop), f"{100 * rate:.0f} %", duration(seconds)])
    return table(["work", "GPUs", "GFLOP a token", "of peak, assumed", "a step"], rows)


def communication_table() -> str:
    shards = (STUDENT_GPUS - 1) / STUDENT_GPUS
    head = 2 * STUDENT.vocab_size * STUDENT.width * shards
    group_tokens, others = TOKENS * GROUP, (GROUP - 1) / GROUP
    hidden = others * 2 * (STUDENT.width + TEACHER.width) * group_tokens
    d_hidden = 2 * others * 4 * STUDENT.width * group_tokens
    part = _plan(group_tokens, -(-STUDENT.vocab_size // GROUP), STUDENT.width, TEACHER.width)
    chunks = math.ceil(group_tokens / part.rows)
    exchanged = {}
    for form, numbers in NUMBERS_PER_TOKEN.items():
        sent = (GROUP - 1) * 4 * sum(numbers) * group_tokens
        exchanged[form] = (sent, sent / NVLINK + len(numbers) * chunks * LATENCY)
    call = loss_flop("hidden") * TOKENS / (PEAK * LOSS_RATE)
    sharded, grouped = f"FSDP2, {STUDENT_GPUS} shards: ", f"{GROUP} ranks a head: "
    rows = [
        [what, wire, size(amount), duration(seconds), percent(seconds / call)]
        for what, wire, amount, seconds in (
            (sharded + "the head, gathered", "InfiniBand", head, head / INFINIBAND),
            (sharded + "d_weight, summed", "InfiniBand", head, head / INFINIBAND),
            *(
                (f"{grouped}{sum(numbers)} numbers a token ({form})", "NVLink", *exchanged[form])
                for form, numbers in NUMBERS_PER_TOKEN.items()
            ),
            (grouped + "hidden states, gathered", "NVLink", hidden, hidden / NVLINK),
            (grouped + "d_hidden, summed", "NVLink", d_hidden, d_hidden / NVLINK),
        )
    ]  # fmt: skip
    title = f"of the products' {duration(call)}"
    return table(["one call", "over", "bytes a rank", "time", title], rows)


def room_table() -> str:
    """Memory that does not depend on the loss. AdamW: bf16 weights and gradients, float32
    master weights and two moments."""
    state = 16 * STUDENT.parameters
    teacher = 2 * TEACHER.parameters
    rows = [
        [f"student under AdamW, {STUDENT_GPUS} GPUs", size(state), size(state / STUDENT_GPUS)],
        [f"teacher, bf16, {TEACHER_GPUS} GPUs", size(teacher), size(teacher / TEACHER_GPUS)],
    ]
    return table(["state", "all", "a GPU"], rows)
