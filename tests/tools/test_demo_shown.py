"""What the demo shows of a run, on a tiny model: terminal, picture, page and record."""

import io
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples/ is not installed

import tiny
from rich.console import Console

from benchmarks.measure import Times
from examples.demo import report, run
from examples.demo.compare import Errors, Measured
from examples.demo.damage import damaged
from examples.demo.judge import Judgement, judge, write
from examples.demo.model import make_student
from examples.demo.page import write_page
from examples.demo.prompts import PROMPTS as TRAINED
from examples.demo.record import WATCH
from examples.train import show

pytestmark = pytest.mark.slow  # of our own tools, not of the package

PROMPTS = ("w1 w2 w3", "w4", "w5 w6")
HOSTILE = "</td><script>alert(1)</script> [red]x $a_{$ 🍧\nnext"
JUDGED = {"new_tokens": 5, "seed": 0, "dtype": torch.float32}


@pytest.fixture(scope="module")
def teacher():
    model = tiny.model(num_hidden_layers=4).requires_grad_(False)
    model.generation_config.eos_token_id = tiny.tokenizer().eos_token_id
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def healed(teacher, tokenizer, console):
    errors = Errors(loss=1e-7, d_hidden=1e-6, d_weight=1e-6, gate=0)
    measured = [
        Measured(name, vocabulary, 100, errors, Times(1.0, 0.9, 1.2), memory)
        for vocabulary in (97, 200)
        for name, memory in (("eager", 2**30), ("fused", None))
    ]
    torch.manual_seed(0)
    return run.heal(
        make_student(teacher, 2), teacher, tokenizer, steps=3, console=console, **JUDGED,
        prompts=PROMPTS, held_out=("w7 w8", "w9"), measured=measured,
        facts={"cpu": "a CPU"}, caption="backend torch",
    )  # fmt: skip


@pytest.fixture(scope="module")
def shown(teacher, tokenizer):
    """A run's record, and what the terminal was sent."""
    console = Console(file=io.StringIO(), width=112)
    record = healed(teacher, tokenizer, console)
    console.print(report.completions_table(record))
    return record, console.file.getvalue()


class Page(HTMLParser):
    """Tags, attributes that load something, and the text outside of style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.text, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v[0] != "#"]

    def handle_data(self, data):
        self.text += [data] if self.inside != "style" else []


def test_the_terminal_says_what_to_watch_and_what_came_of_it(shown):
    record, said = shown
    flat = " ".join(said.split())
    assert WATCH in flat and record.verdict in flat
    for step in record.steps:
        assert re.search(rf"^ +{step.number} +{step.reverse_kl:.3f} ", said, re.MULTILINE)
    for word in (*record.before.completions[0].split()[:2], "before", "after", "teacher"):
        assert word in flat


def test_picture_page_and_record_are_written(shown, tmp_path):
    record, _ = shown
    run.show(record, tmp_path / "new")
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
    read = json.loads((tmp_path / "new" / "demo.json").read_text(encoding="utf-8"))
    assert read["after"]["reverse_kl"] == record.after.reverse_kl
    assert [step["reverse_kl"] for step in read["steps"]] == [s.reverse_kl for s in record.steps]
    page = Page((tmp_path / "new" / "demo.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 2
    assert not page.loads  # it opens on its own
    assert "".join(page.text).count(record.verdict) == 1


def test_what_a_model_says_is_shown_as_text(shown, tmp_path):
    """Markup of HTML, of rich and of TeX comes out of a damaged student as of any other."""
    record = replace(shown[0], before=Judgement(1.0, (HOSTILE, HOSTILE)))
    run.show(record, tmp_path)
    page = Page((tmp_path / "demo.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and HOSTILE in page.text
    console = Console(file=io.StringIO(), width=200)
    console.print(report.completions_table(record))
    assert "[red]x $a_{$" in console.file.getvalue()


def test_the_verdict_is_what_happened(shown):
    record = shown[0]
    better = replace(record, before=Judgement(3.0, ()), after=Judgement(0.5, ()))
    assert "3.00 nats a token before, 0.50 after 3 steps, 6.0 times less" in better.verdict
    for after in (3.0, 3.5, math.nan):
        worse = replace(better, after=Judgement(after, ()))
        assert worse.verdict.endswith("no less than before")


def test_the_page_is_the_same_for_the_same_run(shown, tmp_path):
    for name in ("a", "b"):
        write_page(shown[0], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_judging_does_not_change_the_run(teacher, tokenizer):
    student = make_student(teacher, 2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = judge(student, teacher, tokenizer, PROMPTS, **JUDGED)
    assert torch.equal(torch.rand(3), expected)
    assert judge(student, teacher, tokenizer, PROMPTS, **JUDGED) == first
    assert first.reverse_kl > 0 and first.completions == write(student, tokenizer, PROMPTS, 5)
    itself = judge(teacher, teacher, tokenizer, PROMPTS, **JUDGED)
    assert abs(itself.reverse_kl) < 1e-6


def test_greedy_words_are_the_likeliest(teacher, tokenizer):
    """One prompt at a time, without padding."""
    for prompt, said in zip(PROMPTS, write(teacher, tokenizer, PROMPTS, 5)):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt",
            return_dict=True,
        )["input_ids"]  # fmt: skip
        start = ids.shape[1]
        while ids.shape[1] < start + 5 and (
            ids.shape[1] == start or ids[0, -1] != tokenizer.eos_token_id
        ):
            ids = torch.cat([ids, teacher(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert said == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_the_damage_is_the_same_on_every_call_and_leaves_the_teacher(teacher):
    words = dict.fromkeys(" ".join(TRAINED).split())  # or all are one unknown id, in any order
    tokenizer = tiny.tokenizer(list(words)[: len(tiny.WORDS)])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first, second = (damaged(teacher, tokenizer).state_dict() for _ in range(2))
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]) and torch.equal(first[name], second[name])
        assert not torch.equal(value, first[name])


# --- make train ---


def finished(folder, history):
    folder.mkdir()
    text = json.dumps({"log_history": history})
    (folder / "trainer_state.json").write_text(text, encoding="utf-8")
    return str(folder)


def test_a_training_run_leaves_its_log_and_a_picture(tmp_path, capsys):
    history = [
        {"step": step, "loss": 1.0, "tropd/reverse_kl": kl, "tropd/trust_ratio": 0.5}
        for step, kl in ((4, 2.0), (8, 2.5))
    ]
    full = finished(tmp_path / "full", [*history, {"step": 8, "train_runtime": 3.0}])
    lora = finished(tmp_path / "lora", [{"step": 4, "loss": 1.0}])  # a teacher with k ids
    assert show.main([full, lora]) == 0
    lines = (tmp_path / "full" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == history
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "tropd/reverse_kl 2.000 at step 4, 2.500 at step 8" in said
    assert "1 logs, none of them with a tropd/reverse_kl" in said


def test_a_folder_without_a_log_is_named(tmp_path, capsys):
    assert show.main([str(tmp_path)]) == 2
    assert f"no trainer_state.json in {tmp_path}: train first" in capsys.readouterr().err
    assert show.main([]) == 2
