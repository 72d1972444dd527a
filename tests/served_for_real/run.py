"""Trains against vLLM itself, on a CPU, with SmolLM2-135M-Instruct as the teacher: `make served`.

The test servers say what vLLM's sources say. Here the same runs meet vLLM: losses are a loaded
teacher's, texts are, and a killed server, a key, a limit and a context are what the client says of
them. Everything is float32. Prints a line for each check, and exits with 1 if one fails.
"""

import argparse
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback
from vllm_server import CONTEXT, MOST, URL, kill, vllm

from examples.demo.model import load_teacher, make_student
from tropd_kernels.trainer import TeacherServer, TeacherServerError, TrOPDConfig, TrOPDTrainer

CACHE, OUTPUT = Path("build/demo"), Path("build/served/runs")
TEACHER, STUDENT = CACHE / "SmolLM2-135M-Instruct", OUTPUT / "student"
LAYERS, TOP_K, COMPLETION, BOUND = 3, 16, 16, 1e-4
TEXTS = [
    "The capital of France is", "Water boils at", "A prime number is", "Once upon a time",
    "The sun rises in the", "To bake bread you need", "Two plus two is", "The opposite of hot is",
]  # fmt: skip
GREEDY = dict(top_k=1)  # so that a loaded teacher and a served one write the same
failures = []


def report(name: str, passed: bool, figure: object) -> None:
    print(f"{'ok    ' if passed else 'FAILED'}  {name}: {figure!s:.300}", flush=True)
    if not passed:
        failures.append(name)


class Kept(TrOPDTrainer):
    """Keeps the losses, and calls `before` with the step ahead of each of them."""

    before = staticmethod(lambda step: None)

    def after_loss(self, loss, stats, inputs):
        super().after_loss(loss, stats, inputs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        begun = inputs["prefix_lengths"] > 0
        self.__dict__.setdefault("begun", []).append(begun.float().mean().item())
        self.before(self.state.global_step + 1)


def trainer(folder: str, tokenizer, teacher=None, **settings) -> Kept:
    if settings.get("objective", "tropd") == "tropd":
        settings = dict(objective="tropd", objective_kwargs={"top_k": TOP_K}) | settings
    defaults = dict(
        max_steps=4, per_device_train_batch_size=4, max_completion_length=COMPLETION,
        learning_rate=0.01, optim="sgd", lr_scheduler_type="constant", bf16=False, use_cpu=True,
        logging_strategy="no",
        report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    if teacher is None or "teacher_server_protocol" in settings:
        defaults |= dict(teacher_model_server_url=URL, teacher_server_retries=1)
    args = TrOPDConfig(str(OUTPUT / folder), **(defaults | settings))
    data = Dataset.from_dict({"prompt": TEXTS * 2})
    made = Kept(str(STUDENT), teacher, args=args, train_dataset=data, processing_class=tokenizer)
    made.remove_callback(PrinterCallback)
    return made


def difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def check_losses(tokenizer) -> None:
    """A run with the teacher loaded, and the same run with it served, by both protocols."""
    kinds = {
        "its completions alone": {},
        "a prefix": GREEDY | dict(prefix_schedule="constant", prefix_length=4),
        "lmbda 0.2": GREEDY | dict(lmbda=0.2),
    }
    for kind, settings in kinds.items():
        here = trainer("loaded", tokenizer, str(TEACHER), **settings)
        here.train()
        for protocol in ("vllm", "vllm_generate"):
            there = trainer(protocol, tokenizer, teacher_server_protocol=protocol, **settings)
            there.train()
            far, begun = difference(there.losses, here.losses), statistics.mean(there.begun)
            passed = far < BOUND and there.begun == here.begun and (begun > 0) == bool(settings)
            figure = f"{far:.1e} apart, {begun:.0%} of the rows begun by the teacher"
            report(f"four losses, {kind}, {protocol}", passed, figure)


def check_states(tokenizer) -> None:
    """The same with its hidden states, of which the head here makes whole distributions."""
    kinds = {
        "tropd": {}, "gkd": dict(objective="gkd", beta=0.5),
        "reverse_kl at temperature 0.7": dict(objective="reverse_kl", temperature=0.7),
    }  # fmt: skip
    protocol = "vllm_hidden_states"
    for kind, settings in kinds.items():
        here = trainer("loaded", tokenizer, str(TEACHER), **settings)
        here.train()
        settings |= dict(teacher_server_protocol=protocol)
        there = trainer("states", tokenizer, str(TEACHER), **settings)
        there.train()
        far = difference(there.losses, here.losses)
        report(f"four losses, {kind}, {protocol}", far < BOUND, f"{far:.1e} apart")
    client = there._server
    states = client.score([[5]], [[6] * (CONTEXT - 1)])[0].states
    report("states that fill the context", len(states) == CONTEXT - 1, tuple(states.shape))
    refused(f"a sequence beyond the context, {protocol}", "--max-model-len",
            lambda: client.score([[5]], [[6] * CONTEXT]))  # fmt: skip
    ids = client.count_ids(2**17)
    report(f"the number of ids, {protocol}", ids == len(tokenizer), ids)
    check_speed({protocol: client})


def refused(name: str, words: str, call) -> None:
    try:
        call()
    except (TeacherServerError, ValueError) as error:
        report(name, words in str(error), error)
    else:
        report(name, False, "not refused")


def check_limits(tokenizer) -> None:
    more = {"top_k": MOST + 1}
    refused("k above the limit", f"--max-logprobs {MOST + 1}",
            lambda: trainer("k", tokenizer, objective_kwargs=more))  # fmt: skip
    longest = max(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    room = CONTEXT - longest - 1
    trainer("fits", tokenizer, max_completion_length=room, max_steps=1).train()
    report("prompts that fill the context", True, f"{longest} + {room} + 1 of {CONTEXT} tokens")
    beyond = trainer("beyond", tokenizer, max_completion_length=room + 1)
    refused("prompts beyond the context", "exceeds the context of", beyond.train)
    for protocol in ("vllm", "vllm_generate"):
        client = TeacherServer(URL, protocol=protocol)
        client.score([[5]], [[6] * (CONTEXT - 2)], TOP_K)
        refused(f"a sequence beyond the context, {protocol}", "--max-model-len",
                lambda c=client: c.score([[5]], [[6] * (CONTEXT - 1)], TOP_K))  # fmt: skip
        ids = client.count_ids(2**17)
        report(f"the number of ids, {protocol}", ids == len(tokenizer), ids)
    client = TeacherServer(URL, concurrency=1)
    refused("one bad sequence of a batch", "request 3 of 4",
            lambda: client.score([[5]] * 4, [[6], [7], [8] * CONTEXT, [9]], TOP_K))  # fmt: skip


def clients_of_log_probs() -> dict[str, TeacherServer]:
    clients = {
        "vllm, batched": TeacherServer(URL), "vllm, one a request": TeacherServer(URL),
        "vllm_generate": TeacherServer(URL, protocol="vllm_generate"),
    }  # fmt: skip
    clients["vllm, one a request"]._shares = False
    return clients


def check_speed(clients: dict[str, TeacherServer]) -> None:
    """Tokens a second of scoring, interleaved; the first round warms up."""
    draw = random.Random(0)
    texts = [[draw.randrange(1000, 40000) for _ in range(64)] for _ in range(32)]
    prompts, completions = [t[:16] for t in texts], [t[16:] for t in texts]
    rates: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(4):
        for name, client in clients.items():
            start = time.perf_counter()
            client.score(prompts, completions, TOP_K)
            rates[name].append(sum(map(len, texts)) / (time.perf_counter() - start))
    for name, measured in rates.items():
        kept = measured[1:]
        figure = f"{statistics.median(kept):.0f} ({min(kept):.0f} to {max(kept):.0f})"
        print(f"        {name}: {figure} tokens/s, {len(texts)} sequences of 64, k {TOP_K}")


def check_resume(tokenizer, server: subprocess.Popen, start_again) -> None:
    """A server killed in the third step; another one, with a key, and the run goes on."""
    settings = dict(save_strategy="steps", save_steps=2)
    whole = trainer("whole", tokenizer, **settings)
    whole.train()
    cut = trainer("cut", tokenizer, **settings)
    cut.before = lambda step: kill(server) if step == 2 else None
    checkpoint = str(OUTPUT / "cut" / "checkpoint-2")
    try:
        cut.train()
    except TeacherServerError as error:
        report("a killed server", f"go on from {checkpoint} by" in str(error), error)
    else:
        report("a killed server", False, "the run went on")
    with start_again("--api-key", "secret"):
        try:
            trainer("cut", tokenizer)
        except TeacherServerError as error:
            report("a key that is missing", "VLLM_API_KEY" in str(error), error)
        os.environ["VLLM_API_KEY"] = "secret"
        resumed = trainer("cut", tokenizer, **settings)
        resumed.train(resume_from_checkpoint=checkpoint)
        far = difference(resumed.losses, whole.losses[2:])
        report("resumed with a key on a restarted server", far < BOUND, f"{far:.1e} apart")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="the Python of vLLM's environment")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=["losses", "states", "colocate"]
    )
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    teacher, tokenizer = load_teacher(CACHE)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    make_student(teacher, LAYERS).save_pretrained(STUDENT)
    tokenizer.save_pretrained(STUDENT)
    del teacher

    def start(*flags: str) -> contextlib.AbstractContextManager[subprocess.Popen]:
        return vllm(asked.vllm, TEACHER, OUTPUT / "vllm.log", *flags)

    with start() as server:
        if "losses" not in asked.without:
            check_losses(tokenizer)
        check_limits(tokenizer)
        check_speed(clients_of_log_probs())
        check_resume(tokenizer, server, start)
    if "states" not in asked.without:
        with start("--runner", "pooling", "--pooler-config", '{"task": "token_embed"}'):
            check_states(tokenizer)
    if "colocate" not in asked.without:
        script = Path(__file__).with_name("colocate.py")
        code = subprocess.run(
            [asked.vllm, "-W", "ignore", script, STUDENT, TEACHER, OUTPUT], check=False
        ).returncode
        report("rollouts by use_vllm", code == 0, f"exit status {code}")
    print(f"{len(failures)} failed" if failures else "all passed")
    return 1 if failures else 0


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.exit(main())
