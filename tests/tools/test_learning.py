"""The learning experiment: its task, its statistics, and one tiny run from training to report."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")
pytest.importorskip("matplotlib", reason="the report draws")

from benchmarks.learning import arms, intervals, measures, models, report, task
from benchmarks.learning.run import Run, train_to_file

pytestmark = pytest.mark.slow  # of our own tools, not of the package


@pytest.mark.parametrize("writing", task.TASKS.values(), ids=task.TASKS)
def test_solutions_are_right_in_the_teachers_notation_alone(writing):
    """Carries that the habit forgets are the gap between student and teacher."""
    rng = random.Random(0)
    problems = [task.draw(rng) for _ in range(200)]
    assert not set(problems) & set(task.held_out())
    for problem in problems:
        good, bad = (writing.habit(problem, rng, share) for share in (1.0, 0.0))
        assert task.is_right(problem, good) and writing.is_own_notation(good)
        assert len(good) == writing.longest and not writing.is_own_notation(bad)
        carries = any(x + y > 9 for x, y in zip(*(divmod(n, 10) for n in problem)))
        assert task.is_right(problem, bad) is not carries
    assert not task.is_right((47, 85), ["#", "1", "3", "2"])  # does not end


@pytest.mark.parametrize("writing", task.TASKS.values(), ids=task.TASKS)
def test_lessons_hold_right_labels_for_wrong_texts(writing):
    rng = random.Random(0)
    differ = 0
    for _ in range(50):
        problem = task.draw(rng)
        text, right = writing.lesson(problem, rng)
        assert len(text) == len(right) <= writing.longest
        assert task.is_right(problem, [token for token in right if token])
        differ += text != right
    assert 10 < differ < 50


def test_a_long_tail_is_zipf_s():
    """The n-th of 1000 signs has 1 / (n H) of the mass, H = 1 + 1/2 + ... + 1/1000 = 7.485: the
    first 0.134, the first 64 together 0.634."""
    rng, writing = random.Random(0), task.LONG_TAIL
    texts = [writing.habit((47, 85), rng, 1.0) for _ in range(4000)]
    signs = [int(token[1:]) for text in texts for token in text if token in writing.own]
    assert len(signs) == 4000 * 2 * 3
    # Four standard deviations of a share of 24,000 draws.
    for most, share in ((1, 0.1336), (64, 0.6337)):
        found = sum(sign < most for sign in signs) / len(signs)
        assert found == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(signs)))


def test_interval_is_students():
    """The standard example: 1 to 5 has mean 3, deviation sqrt(2.5) and t = 2.776."""
    found = intervals.interval([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert intervals.quantile(30) == pytest.approx(2.042, abs=0.01)
    assert measures.verdict(intervals.interval([1.0])) == measures.OPEN
    assert measures.verdict(intervals.interval([-1.0, -1.1])) == measures.REVERSE


def test_a_run_becomes_a_report(tmp_path, monkeypatch):
    """From nothing to the tables, with hardly trained models; a second call trains nothing."""
    tiny = replace(models.TEACHERS["short"], width=16, steps=2, batch=4, layers=1)
    monkeypatch.setitem(models.TEACHERS, "short", tiny)
    monkeypatch.setitem(models.STUDENTS, "near", replace(tiny, share=1.0))
    monkeypatch.setattr(arms, "BATCH", 4)
    monkeypatch.setattr(arms, "ARMS", {arm: arms.ARMS[arm] for arm in ("opd", "tropd")})
    for arm in ("opd", "tropd"):
        for seed in (1, 2):
            path = train_to_file(Run("near", arm, seed, steps=5), tmp_path)
    share = "gkd, 30% of the tokens"
    monkeypatch.setattr(arms, "SELECTIONS", {share: arms.SELECTIONS[share]})
    train_to_file(Run("near", share, 1, steps=5), tmp_path)
    before = path.stat().st_mtime_ns
    train_to_file(Run("near", "tropd", 2, steps=5), tmp_path)
    assert path.stat().st_mtime_ns == before
    run = json.loads(path.read_text(encoding="utf-8"))
    assert run["eval_steps"] == [0, 5]
    assert all(len(run["curves"][name]) == 5 for name in ("grad_norm", "entropy"))
    assert max(run["curves"]["grad_norm"]) > 0

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    for _ in range(2):  # the same again
        report.write(tmp_path / "runs", tmp_path / "results", readme, steps=5)
    page = readme.read_text(encoding="utf-8")
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert "| `opd` " in page and "### Claims" in page and "not run" in page
    assert f"| {share} " in page and f"`{share}`" not in page  # in a table of its own
    assert "2 seeds, 5 steps" in page and (tmp_path / "results" / "near.png").exists()
