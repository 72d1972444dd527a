"""What a run shows at a terminal, and the log that it leaves, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")
pytest.importorskip("rich")
pytest.importorskip("pty", reason="a system without pseudo-terminals")

import pty

import rich
import tiny
from training import Spy, make

from tropd_kernels import OPD
from tropd_kernels.trainer.progress import watch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
#: What moves a terminal's cursor, clears and colours.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@contextlib.contextmanager
def terminal(monkeypatch):
    """Standard output is a terminal of 80 columns while the block runs; yields what it was sent."""
    master, slave = pty.openpty()
    sent: list[bytes] = []

    def read():
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(master, 4096):
                sent.append(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(rich, "_console", None)  # another test's, with its own idea of the output
    with open(slave, "w") as screen, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", screen)
        yield sent
    reader.join(10)
    os.close(master)


def lines(sent: list[bytes]) -> list[str]:
    return CONTROL.sub("", b"".join(sent).decode()).replace("\r\n", "\n").split("\n")


def logs(sent: list[bytes]) -> list[dict]:
    """Those that stand on one line, whole."""
    found = [re.search(r"\{'.*\}", line) for line in lines(sent)]
    return [json.loads(match[0].replace("'", '"')) for match in found if match]


@pytest.mark.parametrize(
    "settings",
    [{"disable_tqdm": False}, {"rich_progress": True}, {"rich_progress": False}],
    ids=["terminal", "rich without tqdm", "plain"],
)
def test_every_log_is_a_line_at_a_terminal(tmp_path, monkeypatch, settings):
    """TRL's panel shows the last one alone, wrapped, with a learning rate of 0.000; transformers'
    printer beside it would print each twice."""
    with terminal(monkeypatch) as sent:
        trainer = make(tmp_path, max_steps=3, learning_rate=1e-6, **settings)
        trainer.train()
    steps = [log for log in logs(sent) if "loss" in log]
    assert len(steps) == 3 and len(logs(sent)) == 4  # and the summary
    for shown, kept in zip(steps, trainer.state.log_history):
        assert shown["learning_rate"] == "1e-06"
        assert shown["loss"] == f"{kept['loss']:.4g}" and "tropd/trust_ratio" in shown
    screen = "\n".join(lines(sent))
    assert screen.count("'loss'") == 3
    assert ("Training" in screen) == (settings.get("rich_progress") is not False)
    assert not re.search(r"learning_rate +0\.000", screen)


def test_an_evaluation_at_a_terminal(tmp_path, monkeypatch):
    """... outside training, where TRL's panel is not there to add its bar to."""
    with terminal(monkeypatch) as sent:
        trainer = make(tmp_path, evaluate=tiny.prompts(), disable_tqdm=False)
        trainer.evaluate()
    (log,) = logs(sent)
    kept = trainer.state.log_history[-1]
    assert log["eval_loss"] == f"{kept['eval_loss']:.4g}" and log.keys() >= {
        "eval_tropd/trust_ratio"
    }


class Interrupted(Spy):
    """Stops in its third step."""

    kind = KeyboardInterrupt

    def training_step(self, *arguments, **keywords):
        if self.state.global_step == 2:
            raise self.kind
        return super().training_step(*arguments, **keywords)


@pytest.mark.parametrize("kind", [None, KeyboardInterrupt, RuntimeError])
def test_the_log_is_kept_however_training_ends(tmp_path, monkeypatch, kind):
    """Without a checkpoint too; and the terminal gets its cursor back."""
    monkeypatch.setattr(Interrupted, "kind", kind)
    with terminal(monkeypatch) as sent:
        trainer = make(
            tmp_path, max_steps=3, disable_tqdm=False, kind=Spy if kind is None else Interrupted
        )
        with pytest.raises(kind) if kind else contextlib.nullcontext():
            trainer.train()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert losses == [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == state["global_step"] == (2 if kind else 3)
    assert not list(tmp_path.glob("checkpoint-*"))
    screen = b"".join(sent)
    assert screen.rfind(b"\x1b[?25h") > screen.rfind(b"\x1b[?25l") >= 0


def test_no_log_no_file(tmp_path):
    """A run that fails before its first step leaves the earlier run's log alone."""
    (tmp_path / "trainer_state.json").write_text("earlier")
    trainer = make(tmp_path, data=tiny.prompts().map(lambda row: {"prompt": ""}))
    with pytest.raises(ValueError, match="prompt: no token"):
        trainer.train()
    assert (tmp_path / "trainer_state.json").read_text() == "earlier"


def test_the_end_of_a_run_is_no_checkpoint(tmp_path):
    """It has a model and a state, but no optimiser: to go on from it would begin anew, unsaid. A
    checkpoint that was copied to another name still is one."""
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    trainer = make(tmp_path / "out", **settings)
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match="resume_from_checkpoint: there is no checkpoint .*/out"):
        make(tmp_path / "new", **settings).train(str(tmp_path / "out"))
    (tmp_path / "out" / "checkpoint-1").rename(tmp_path / "kept")
    resumed = make(tmp_path / "new", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert resumed.losses == trainer.losses[1:]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "which should fall, and tropd/trust_ratio, which should rise."),
        ({"objective": "opd"}, "which should fall."),
        ({"objective": "reverse_kl"}, None),  # its loss is the KL
    ],
    ids=["gate", "no gate", "no surrogate"],
)
def test_a_run_says_once_what_to_watch(tmp_path, capsys, settings, said):
    make(tmp_path, max_steps=2, **settings).train()
    printed = capsys.readouterr().out
    assert printed.count("Watch tropd/") == (said is not None)
    assert said is None or f"Watch tropd/reverse_kl, {said}\n" in printed


def test_what_to_watch_is_what_a_teacher_without_whole_distributions_gives():
    assert "tropd/reward_mean, minus the reverse KL, which should rise" in watch(OPD(), False)
