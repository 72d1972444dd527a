"""The examples, as a user runs them, on tiny models."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

import tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `examples.train.prepare` makes it."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        tiny.model(seed, spread=2.0).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": text, "completion": "w1 w2 w3"} for text in tiny.prompts()["prompt"]]
    for name, columns in (("prompts", ("prompt",)), ("answers", ("prompt", "completion"))):
        lines = [json.dumps({key: row[key] for key in columns}) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return folder


def flags(models: Path, *names: str) -> list[str]:
    given = {"prompts": "prompts.jsonl"}
    return [word for n in names for word in (f"--{n}", str(models / given.get(n, n)))]


def parameters(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([each.detach().flatten() for each in model.parameters()])


#: What checkpoints recommend for chatting, which `generate` takes from them where it is not told.
CHATTING = dict(temperature=0.2, top_k=2, top_p=0.1, min_p=0.9, repetition_penalty=5.0)


def test_the_student_samples_from_its_own_distribution():
    from examples import lora

    written, prompts = [], list(tiny.prompts()["prompt"])
    for settings in ({}, CHATTING):
        student = tiny.model(0, spread=2.0)
        student.generation_config.update(do_sample=True, **settings)
        torch.manual_seed(0)
        written.append(lora.write(student, tiny.tokenizer(), prompts, 8)[0])
    assert torch.equal(*written)


def test_lora(models, tmp_path):
    from examples import lora

    where = flags(models, "student", "teacher", "prompts")
    sizes = ["--steps", "24", "--tokens", "8", "--batch-size", "8", "--learning-rate", "2e-2"]
    divergences = lora.main([*where, *sizes, "--out", str(tmp_path)])
    assert sum(divergences[-4:]) < 0.8 * sum(divergences[:4])
    assert (tmp_path / "adapter_config.json").exists()


def test_prompts_of_messages(tmp_path):
    from examples import lora

    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "w1"}]}) + "\n")
    assert lora.read_prompts(file, tiny.tokenizer()) == ["<s> w1 <|end|><s>"]


def test_cached_teacher(models, tmp_path):
    """The scores are the teacher's, and a student trains by them alone."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM

    from examples import cached_teacher

    scores, out = tmp_path / "scores.parquet", tmp_path / "out"
    where = ["--data", str(models / "answers.jsonl"), "--out", str(scores), "--top-k", "4"]
    cached_teacher.main(["score", *flags(models, "teacher"), *where])
    row = load_dataset("parquet", data_files=str(scores), split="train")[0]
    tokenizer, teacher = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained(models / "teacher")
    prompt = tokenizer(row["prompt"])["input_ids"]
    with torch.no_grad():
        logits = teacher(torch.tensor([prompt + row["completion_ids"]])).logits[0]
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    expected = log_probs.gather(-1, torch.tensor(row["completion_ids"])[:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(row["teacher_label_log_probs"]), expected)
    assert row["teacher_ids"] == log_probs.topk(4).indices.tolist()

    sizes = ["--top-k", "4", "--steps", "20", "--learning-rate", "1e-2", "--out", str(out)]
    log = cached_teacher.main(["train", *flags(models, "student"), "--scores", str(scores), *sizes])
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_served_teacher(models, tmp_path):
    import served

    from examples import served_teacher

    where = [*flags(models, "student", "prompts"), "--out", str(tmp_path)]
    with served.serve(tiny.model(1), tiny.tokenizer()) as server:
        sizes = ["--url", server.url, "--top-k", "4", "--steps", "2", "--tokens", "8"]
        trainer = served_teacher.main([*where, *sizes])
        assert server.requests
    assert "tropd/forward_kl_topk" in trainer.state.log_history[0]


def test_prefixes(models, tmp_path):
    from examples import prefixes

    where = [*flags(models, "student", "teacher", "prompts"), "--out", str(tmp_path)]
    lengths = prefixes.main([*where, "--steps", "4", "--tokens", "16"])
    assert lengths[0] > 0 and lengths[-1] < lengths[0] and len(lengths) == 4


COMMANDS = re.findall(
    r"^    ((?:torchrun|accelerate) .+)$",
    (ROOT / "examples/processes/README.md").read_text("utf-8"),
    re.MULTILINE,
)


@pytest.mark.slow
def test_the_lines_start_two_processes(models, tmp_path):
    """By the tokens that they count together: each process has prompts of its own."""
    assert len(COMMANDS) == 3
    train = ["-m", "tropd_kernels.cli", "train", "--config", "examples/train/run.yaml"]
    more = ["--model", str(models / "student"), "--teacher_model", str(models / "teacher"),
            "--dataset", str(models / "prompts.jsonl"), "--max_steps", "2"]  # fmt: skip
    out = str(tmp_path)
    alone, *together = (
        rows(started(command, more))
        for command in (
            [sys.executable, *train, "--output_dir", out],
            *(shlex.split(command.replace("build/processes", out)) for command in COMMANDS),
        )
    )
    assert together == [2 * alone] * 3


def started(command: list[str], more: list[str]) -> str:
    program = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
    if command[0] in program:
        skip = 2 if command[0] == "accelerate" else 1  # accelerate launch
        command = [sys.executable, "-m", program[command[0]], *command[skip:]]
    done = subprocess.run(
        [*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(output: str) -> int:
    """Rows of the step, from transformers' last log."""
    found = re.findall(r"'?train_samples_per_second'?: '?([\d.]+)", output)
    seconds = re.findall(r"'?train_runtime'?: '?([\d.]+)", output)
    return round(float(found[-1]) * float(seconds[-1]))


@pytest.mark.slow
def test_the_notebook_runs_and_teaches(monkeypatch):
    """Its cells, one after the other; what it shows goes nowhere."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    shown: list[str] = []
    stand_in = SimpleNamespace(HTML=str, display=shown.append)
    # What matplotlib looks at where IPython is imported.
    shell = SimpleNamespace(display=stand_in, get_ipython=lambda: None, version_info=(8, 24))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", stand_in)
    scope: dict = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    divergence, trust = ([float(values[i]) for values in scope["log"]] for i in (0, 1))
    assert sum(divergence[-5:]) < 0.5 * sum(divergence[:5])
    assert sum(trust[-5:]) > 1.5 * sum(trust[:5])
    assert shown[0].count("<span") == 2 * 4 * scope["LENGTH"]


NOTEBOOK = json.loads((ROOT / "examples/regions.ipynb").read_text("utf-8"))


def test_the_notebook_is_stored_with_what_it_shows():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    kinds = [kind for cell in code for shown in cell["outputs"] for kind in shown["data"]]
    assert {"image/png", "text/html"} <= set(kinds)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not re.search(r"/(tmp|home|root|work)/", json.dumps(NOTEBOOK))
