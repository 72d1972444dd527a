"""The evidence: its test, its correction, and the order of its runs, from one that is missing to a
verdict."""

from __future__ import annotations

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny

from benchmarks.evidence import __main__, claims, language, records, runs
from benchmarks.evidence.experiments import (
    BEYOND,
    CHOOSING,
    EXPERIMENTS,
    LANGUAGE,
    POWER,
    RATES,
    SEEDS,
    end,
)
from benchmarks.learning import arms, models, task
from benchmarks.learning.measures import Claim, Result
from tropd_kernels.trainer import TrOPDConfig

pytestmark = pytest.mark.slow  # of our own tools, not of the package


def test_sign_flip_by_hand():
    """Of the eight choices of signs of 1, 2, 3, two reach 6; of -1, 2, 3, four reach 4."""
    assert claims.sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert claims.sign_flip([-1.0, 2.0, 3.0]) == 4 / 8
    assert claims.sign_flip([0.0, 0.0]) == 1.0
    assert claims.sign_flip([0.1] * 20) == 2 / 2**20
    # 0.1 + 0.2 and 0.3 are the same sum, whatever rounding says.
    assert claims.sign_flip([0.1, 0.2, -0.3]) == 1.0
    for none in ([], [1.0] * 21):
        with pytest.raises(ValueError, match="1 to 20"):
            claims.sign_flip(none)


def test_holm_by_hand():
    """Holm's own steps: 3 · 0.01, then 2 · 0.03, and never below what came before."""
    assert claims.holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert claims.holm([0.6, 0.7]) == [1.0, 1.0]
    assert claims.verdict(0.1, 0.04) == claims.CONFIRMED
    assert claims.verdict(-0.1, 0.04) == claims.REVERSE
    assert claims.verdict(0.1, 0.05) == claims.OPEN


def test_differences_are_taken_seed_by_seed():
    records = [
        {"arm": arm, "seed": seed, "value": value}
        for arm, seed, value in (("a", 1, 3.0), ("a", 2, 5.0), ("b", 2, 1.0), ("b", 3, 9.0))
    ]
    claim = Claim("", "a", "b", lambda record: record["value"])
    assert claim.differences(records) == [4.0]
    assert replace(claim, less=None).differences(records) == [3.0, 5.0]


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_an_experiment_can_run(experiment, tmp_path):
    """Its arms are settings that the trainer takes, and its claims name them."""
    for arm in experiment.arms.values():
        TrOPDConfig(str(tmp_path), **arms.settings(arm, 1, arms.STEPS, 1e-3))
    named = {name for claim in (*experiment.claims, *experiment.looks)
             for name in (claim.more, claim.less) if name}  # fmt: skip
    assert named <= set(experiment.arms)
    assert set(experiment.mismatches) <= {*models.STUDENTS, language.STUDENT}
    assert experiment.claims or experiment.looks


def record(mismatch: str, arm: str, seed: int, rate: float, accuracy: float) -> Result:
    return {"mismatch": mismatch, "arm": arm, "seed": seed, "learning_rate": rate,
            "accuracy": [0.0] + [accuracy] * 10}  # fmt: skip


@pytest.mark.parametrize(("best", "rates"), [(1e-3, RATES), (3e-3, (*RATES, BEYOND[3e-3]))])
def test_rates_first_then_seeds(tmp_path, best, rates):
    """An arm tries one rate more where the best is at an end, then runs at its own."""
    experiment = replace(POWER, arms={"opd": arms.ARMS["opd"]}, mismatches=("near",))
    results = runs.Results(experiment, tmp_path)
    tried = []
    while (run := next(results.wanted())).seed in CHOOSING:
        tried.append(run.learning_rate)
        results.append(
            record("near", "opd", run.seed, run.learning_rate, float(run.learning_rate == best))
        )
    assert sorted(tried) == sorted(list(rates) * len(CHOOSING))
    assert results.chosen("near", "opd") == best
    ahead = list(results.wanted())
    assert [(run.seed, run.learning_rate) for run in ahead] == [
        (seed, best) for seed in range(1, SEEDS + 1)
    ]
    results.append(record("near", "opd", 1, best, 0.5))
    again = runs.Results(experiment, tmp_path)  # from the file
    assert [run.seed for run in again.wanted()] == list(range(2, SEEDS + 1))
    assert [end(found) for found in again.compared("near")] == [0.5]


def test_equally_good_rates(tmp_path):
    """As many right answers of as many: the smaller rate, whatever rounding says of their means."""
    experiment = replace(POWER, arms={"opd": arms.ARMS["opd"]}, mismatches=("near",))
    results = runs.Results(experiment, tmp_path)
    right = {3e-4: (0, 0, 0), 1e-3: (200, 223, 247), 3e-3: (223, 200, 247)}
    for rate, values in right.items():
        for seed, value in zip(CHOOSING, values):
            found = record("near", "opd", seed, rate, value / 256)
            found["accuracy"][-2:] = (value - 1) / 256, (value + 3) / 256
            results.append(found)
    assert results.chosen("near", "opd") == 1e-3
    line = {"accuracy": [n / 256 for n in range(257)]}
    assert records.rounded(line["accuracy"]) == line["accuracy"]


def test_half_a_line_is_not_a_run(tmp_path):
    results = runs.Results(POWER, tmp_path)
    results.append(record("near", "opd", 1, 1e-3, 0.5))
    before = results.path.read_text("utf-8")
    results.path.write_text(before + '{"mismatch": "ne', "utf-8")
    again = runs.Results(POWER, tmp_path)
    assert again.records == results.records
    again.append(record("near", "opd", 2, 1e-3, 0.5))
    assert len(runs.Results(POWER, tmp_path).records) == 2
    results.path.write_text('{"mismatch"', "utf-8")
    assert runs.Results(POWER, tmp_path).records == []


def test_a_run_that_fails_loses_no_other(tmp_path, monkeypatch):
    """What has ended, or is under way, is kept; then the error is raised."""

    def trained(run, arm, cache):
        if run.learning_rate == RATES[1]:
            raise RuntimeError("this run fails")
        return record(run.mismatch, run.arm, run.seed, run.learning_rate, 0.5)

    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))
    results = runs.Results(replace(POWER, record_of=trained), tmp_path)
    with pytest.raises(RuntimeError, match="this run fails"):
        runs.run_all(results, 3, tmp_path, hours=1.0)
    kept = [(found["seed"], found["learning_rate"]) for found in results.records]
    assert (CHOOSING[0], RATES[0]) in kept and (CHOOSING[0], RATES[2]) in kept
    assert runs.Results(POWER, tmp_path).records == results.records


def test_no_run_is_started_after_the_hours(tmp_path, monkeypatch):
    began = replace(POWER, record_of=lambda run, *_: pytest.fail(f"{run} began"))
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))
    results = runs.Results(began, tmp_path)
    runs.run_all(results, 1, tmp_path, hours=0.0)
    assert results.records == [] and not results.path.exists()


def test_one_command_for_all(monkeypatch):
    """The report comes last, and the hours are those of all together."""
    pytest.importorskip("matplotlib", reason="the report draws")
    from benchmarks.evidence import report

    did = []

    def run(results, workers, cache, hours):
        did.append((results.experiment.name, workers, hours))
        time.sleep(0.01)

    monkeypatch.setattr(__main__, "run_all", run)
    monkeypatch.setattr(report, "write", lambda: did.append("report"))
    assert __main__.main(["all", "--workers", "3", "--hours", "5"]) == 0
    assert [name for name, *_ in did[:-1]] == list(EXPERIMENTS) and did[-1] == "report"
    assert {workers for _, workers, _ in did[:-1]} == {3}
    left = [hours for *_, hours in did[:-1]]
    assert left == sorted(set(left), reverse=True) and 4.9 < left[-1] < left[0] <= 5


@pytest.mark.parametrize("name", models.STUDENTS)
def test_a_context_holds_the_longest_prefix_and_as_much_again(name):
    """A row whose prefix is short generates as much beside the longest prefix."""
    recipe = models.STUDENTS[name]
    longest = task.TASKS[recipe.task].longest
    positions = models.build(recipe, 1).config.max_position_embeddings
    assert positions >= len(task.prompt((1, 2))) + 2 * (longest + 1)


def test_a_student_who_is_the_teacher_already(tmp_path, monkeypatch):
    """Every seed has the one teacher, whose weights a student of the same recipe would not have."""
    small = replace(models.TEACHERS["long_tail"], width=16, steps=1, batch=2, layers=1)
    monkeypatch.setitem(models.TEACHERS, "long_tail", small)
    monkeypatch.setitem(models.STUDENTS, "long_tail_itself", small)
    teacher = models.load_teacher("long_tail", tmp_path).lm_head.weight
    for seed in (1, 2):
        student = models.load_student("long_tail_itself", seed, tmp_path)
        assert torch.equal(student.lm_head.weight, teacher)
    assert not torch.equal(models.load(small, 1, tmp_path).lm_head.weight, teacher)


def test_runs_become_records(tmp_path, monkeypatch):
    """A real run, hardly trained: what is kept of it, and that it is not wanted again."""
    tiny = replace(models.TEACHERS["short"], width=16, steps=2, batch=4, layers=1)
    monkeypatch.setitem(models.TEACHERS, "short", tiny)
    monkeypatch.setitem(models.STUDENTS, "near", replace(tiny, share=1.0))
    monkeypatch.setattr(arms, "BATCH", 4)
    run = next(runs.Results(POWER, tmp_path).wanted())
    run = replace(run, steps=10)
    found = records.record_of(run, POWER.arms[run.arm], tmp_path)
    results = runs.Results(POWER, tmp_path)
    results.append(found)
    assert json.loads(results.path.read_text("utf-8")) == found
    assert len(found["accuracy"]) == 2 and len(found["trust"]) == 2
    assert found["largest_norm"] >= found["median_norm"] > 0
    assert found["seconds"] > 0 and "torch" in found["versions"]
    others = itertools.islice(results.wanted(), 2)
    assert (run.arm, run.seed, run.learning_rate) not in [
        (other.arm, other.seed, other.learning_rate) for other in others
    ]


def test_language_runs_become_records(tmp_path, monkeypatch):
    """On a random teacher: curves of every step, and distances that the arm chooses its rate by."""
    teacher = tiny.model(num_hidden_layers=3, max_position_embeddings=128).requires_grad_(False)
    monkeypatch.setattr(language, "load_teacher", lambda cache: (teacher, tiny.tokenizer()))
    monkeypatch.setattr(language, "LAYERS", 2)
    monkeypatch.setattr(language, "EVERY", 2)
    results = runs.Results(LANGUAGE, tmp_path)
    run = replace(next(results.wanted()), steps=3)
    found = LANGUAGE.record_of(run, LANGUAGE.arms[run.arm], tmp_path)
    results.append(found)
    assert json.loads(results.path.read_text("utf-8")) == found
    assert {curve.key for curve in LANGUAGE.curves} <= set(found)
    assert len(found["held_out_kl"]) == 3 and len(found["grad_norm"]) == 3
    assert len(set(found["held_out_kl"])) == 3  # the student has moved
    others = [(other.arm, other.seed, other.learning_rate) for other in results.wanted()]
    assert (run.arm, run.seed, run.learning_rate) not in others
    assert len(others) == len(LANGUAGE.arms) * len(LANGUAGE.rates) - 1


def test_a_rate_is_chosen_by_the_smaller_distance(tmp_path):
    results = runs.Results(LANGUAGE, tmp_path)
    for rate, distance in zip(LANGUAGE.rates, (0.4, 0.3)):
        (seed,) = LANGUAGE.choosing
        results.append({"mismatch": language.STUDENT, "arm": "opd", "seed": seed,
                        "learning_rate": rate, "held_out_kl": [2.0, distance]})  # fmt: skip
    assert results.chosen(language.STUDENT, "opd") == LANGUAGE.rates[1]


def synthetic(results: runs.Results, seeds: int) -> None:
    """Every run of a small experiment, TrOPD above OPD by more than the seeds differ."""
    for arm, accuracy in (("opd", 0.3), ("tropd", 0.5)):
        for seed in CHOOSING:
            for rate in RATES:
                results.append(whole(record("near", arm, seed, rate, float(rate == 1e-3))))
        for seed in range(1, seeds + 1):
            results.append(whole(record("near", arm, seed, 1e-3, accuracy + 0.001 * seed)))


def whole(found: Result) -> Result:
    return found | {"seconds": 10.0, "hardware": "a CPU", "versions": {"torch": "2"}}


@pytest.mark.parametrize("seeds", [5, SEEDS])
def test_no_verdict_before_every_seed_has_run(tmp_path, monkeypatch, seeds):
    pytest.importorskip("matplotlib", reason="the report draws")
    from benchmarks.evidence import report

    experiment = replace(
        POWER,
        arms={arm: arms.ARMS[arm] for arm in ("opd", "tropd")},
        mismatches=("near",),
        claims=(Claim("ends above", "tropd", "opd", end), Claim("not", "opd", "tropd", end)),
        looks=(Claim("only seen", "tropd", "opd", end),),
    )
    monkeypatch.setattr(report, "EXPERIMENTS", {"power": experiment})
    synthetic(runs.Results(experiment, tmp_path), seeds)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", "utf-8")
    report.write(tmp_path, page)
    text = page.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert f"{2 * seeds} of 40 runs and 18 to choose" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "0.20 ± 0.00" in rows["ends above"] and "-0.20 ± 0.00" in rows["not"]
    if seeds == SEEDS:  # two claims: Holm doubles the smaller p, 2 / 2²⁰
        assert f"{4 / 2**20:.2g}" in rows["ends above"]
        assert claims.CONFIRMED in rows["ends above"] and claims.REVERSE in rows["not"]
    else:
        assert "5 of 20 seeds, no verdict" in rows["ends above"]
        assert claims.CONFIRMED not in text and claims.REVERSE not in text
    assert "0.20 ± 0.00" in rows["only seen"]
    assert (tmp_path / "power.png").exists()
