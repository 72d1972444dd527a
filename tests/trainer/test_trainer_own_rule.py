"""A rule of one's own as the objective: its forms, schedules of rules, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from served import serve
from training import RATE, by_hand, make, resume_and_compare, step_and_compare

from tropd_kernels import GKD, LSM, OPD, SFT, TokenRule, cli
from tropd_kernels.objectives import registry
from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer, card

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
HERE = dict(use_cpu=True, bf16=False, report_to="none")
FIELDS = {"policy_gradient": 0.5, "gate": "bernoulli", "outlier": "forward_kl", "top_k": 4}
RULE = TokenRule(**FIELDS)
#: Differs from RULE in the terms, and in what it asks of a teacher.
LATER = TokenRule(policy_gradient=0, divergence="reverse_kl", prefix_weight=0.5)


def config(objective, **settings) -> TrOPDConfig:
    return TrOPDConfig("unused", objective=objective, **(HERE | settings))


def switched(progress: float) -> TokenRule:
    return RULE if progress < 0.5 else LATER


@pytest.mark.parametrize("given", [RULE, FIELDS, json.dumps(FIELDS)], ids=["rule", "dict", "JSON"])
def test_every_form_is_the_rule_and_comes_back(given):
    one = config(given)
    assert one.objective == one.rule(0.3) == RULE and one.rules() == (RULE,)
    saved = json.loads(one.to_json_string())["objective"]
    assert saved == dataclasses.asdict(RULE)
    for again in (config(saved), pickle.loads(pickle.dumps(one)), copy.deepcopy(one),
                  dataclasses.replace(one, learning_rate=0.1)):  # fmt: skip
        assert again.objective == RULE
    assert config(OPD(), select_by="entropy", select_fraction=0.5).rules() == (
        TokenRule(select_by="entropy", select_fraction=0.5, prefix_weight=OPD().prefix_weight),
    )


def test_a_file_and_a_flag_give_it(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    file = tmp_path / "run.yaml"
    keys = dict(model="m", teacher_model="t", dataset=str(tmp_path / "data.jsonl"),
                output_dir=str(tmp_path / "out"), bf16=False, use_cpu=True)  # fmt: skip
    file.write_text(
        "\n".join(f"{k}: {v}" for k, v in keys.items())
        + "\nobjective: {policy_gradient: 0.5, gate: bernoulli, outlier: forward_kl, top_k: 4}\n"
    )
    assert cli.parse_run(["--config", str(file)])[1].objective == RULE
    flag = ["--config", str(file), "--objective"]
    given = cli.parse_run([*flag, '{"nll_weight": 1}'])[1].objective
    assert given == TokenRule(nll_weight=1)
    assert cli.parse_run([*flag, "gkd"])[1].objective == "gkd"
    for text, error in (
        ('{"gates": "always"}', "objective: a TokenRule has no field 'gates' .did you mean 'gate'"),
        ('{"gate": "x", "gate": "y"}', "objective: 'gate' is given twice"),
        ('{"gate": }', "objective: .* is no JSON"),
        ("none", "objective: expected a name"),
    ):
        with pytest.raises(cli.UsageError, match=f"^{error}"):
            cli.parse_run([*flag, text])


BAD = {
    "no rule": (3, "expected a name, a TokenRule, a mapping of its fields, or a function"),
    "an unknown field": ({"tau": 1.0}, "a TokenRule has no field 'tau'"),
    "a wrong value": ({"top_k": "4"}, "top_k must be an int or None, got '4'"),
    "no term": ({"policy_gradient": 0}, "this rule has no term"),
    "a saved schedule": ({"schedule": "f"}, "the schedule 'f' is a function, which no file holds"),
    "given ids": (TokenRule(divergence="topk_reverse_kl", top_k_ids="given"),
                  "top_k_ids='given' reads ids="),
    "scores": (TokenRule(select_by="scores", select_fraction=0.5), "'scores' reads scores="),
    "mixing": (TokenRule(divergence="mixed"), "divergence='mixed' reads mixing="),
    "a reference": (TokenRule(reference_power=0.5), "=0.5 reads reference_teacher="),
    "a function of nothing": (lambda: RULE, r"lambda>\(0\) fails with TypeError"),
    "a function that fails late": (
        lambda t: TokenRule(gate="threshold", threshold=t - 0.5),
        r"\(0.51\) fails with ValueError: threshold must",
    ),
    "a constructor": (GKD, r"GKD makes a rule where it is called: GKD\(\.\.\.\)"),
    "a function that gives a name": (lambda t: "opd", r"\(0\) returns 'opd': expected a TokenRule"),
    "a function that gives ids": (
        lambda t: TokenRule(divergence="topk_reverse_kl", top_k_ids="given"), "reads ids=",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_no_run_could_use_is_refused(case):
    given, error = BAD[case]
    with pytest.raises(ValueError, match=rf"^objective: .*{error}"):
        config(given)


def test_a_schedule_that_is_no_function_of_progress_is_refused():
    seen = []

    def counting(progress):
        seen.append(progress)
        return TokenRule(gate="threshold", threshold=-1.0 * len(seen))

    with pytest.raises(ValueError, match="^objective: .*counting gives different rules .* 0: let"):
        config(counting)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"objective_kwargs": {"top_k": 4}}, "objective_kwargs: .* has its knobs as fields"),
        ({"beta": 0.5}, "beta: .* as divergence_parameter"),
        ({"prefix_weight": 0.5, "lmbda": 0.5}, "prefix_weight: .* has a prefix_weight"),
        ({"stage_fraction": 0.5}, "stage_fraction: .* a function of progress"),
        ({"precomputed_teacher": True, "objective": LATER}, "precomputed_teacher: objective Token"),
        ({"precomputed_teacher": True, "objective": switched}, "precomputed_teacher: objective Ru"),
        ({"objective": SFT(), "importance_gamma": 0.5}, "importance_gamma: objective TokenRule"),
        ({"objective": LATER, "kl_discount_factor": 0.5}, "kl_discount_factor: objective Token"),
        ({"objective": TokenRule(entropy_top_fraction=0.5), "select_by": "reward",
          "select_fraction": 0.5}, "select_by: objective TokenRule.* selects tokens itself"),
        ({"objective": TokenRule(select_by="entropy", select_fraction=1.0), "select_by": "reward",
          "select_fraction": 0.5}, "select_by: objective TokenRule.* selects tokens itself"),
    ],
    ids=lambda given: "" if isinstance(given, str) else next(iter(given)),
)  # fmt: skip
def test_settings_that_do_not_go_with_a_rule(settings, error):
    with pytest.raises(ValueError, match=f"^{error}"):
        config(**({"objective": RULE} | settings))


def test_a_step_is_that_of_the_rule(tmp_path):
    teacher = tiny.model(1, hidden_size=48)
    settings = dict(prefix_schedule="constant", prefix_length=3)
    for i, rule in enumerate((RULE, LATER)):
        trainer = make(tmp_path / str(i), teacher=teacher, objective=rule, **settings)
        step_and_compare(trainer, teacher)


def test_each_step_has_the_schedule_s_rule(tmp_path):
    """The second of two steps by the second rule, from the weights that the first has left."""
    teacher = tiny.model(1, hidden_size=48)
    first = make(tmp_path, teacher=teacher, objective=RULE)
    first.train()
    trainer = make(tmp_path, teacher=teacher, objective=switched, max_steps=2)
    trainer.train()
    assert trainer.losses[0] == first.losses[0]
    twin = copy.deepcopy(first.model).double()
    trainer.args.objective = LATER
    loss = by_hand(trainer, twin, copy.deepcopy(teacher).double(), step=1)
    assert trainer.losses[1] == pytest.approx(loss.item(), rel=1e-5)
    for new, old, true in zip(
        trainer.model.parameters(), first.model.parameters(), twin.parameters()
    ):
        step = (old - new).detach().double() / RATE
        reach = 2e-5 * max(true.grad.norm(), 1e-3) + old.norm() * 1e-7 / RATE
        assert (step - true.grad).norm() <= reach


def test_a_resumed_run_is_given_the_schedule_again(tmp_path):
    """... and then goes on to the bit; the function itself is in no checkpoint."""
    resume_and_compare(tmp_path, 2, max_steps=4, objective=lambda t: switched(t))
    saved = config(lambda t: RULE if t < 0.5 else LATER)
    loaded = pickle.loads(pickle.dumps(saved))
    assert "lambda" in loaded.to_dict()["objective"]["schedule"]
    with pytest.raises(ValueError, match="^objective: the schedule .* is not saved: give it"):
        loaded.rule()
    assert loaded.rules() == (RULE, LATER) == saved.rules()
    assert copy.deepcopy(saved) == saved and saved.rule(0.7) == LATER
    assert config(switched) == config(switched) != saved


def test_a_teacher_gives_what_any_rule_of_a_schedule_needs(tmp_path):
    """... though the first needs less: a run would stop in its middle."""

    def grows(progress):
        return SFT() if progress < 0.3 else OPD() if progress < 0.6 else LSM(top_k=4)

    assert config(grows).uses_teacher
    with pytest.raises(ValueError, match="^teacher_model: objective RuleSchedule"):
        TrOPDTrainer(tiny.model(0), args=config(grows), train_dataset=tiny.prompts())
    with pytest.raises(ValueError, match="^train_dataset: no column .*'teacher_ids'"):
        make(tmp_path, objective=grows, precomputed_teacher=True)
    with serve(tiny.model(1), tiny.tokenizer()) as served:
        trainer = make(tmp_path, objective=grows, teacher_model_server_url=served.url, max_steps=3)
        trainer.train()
    assert all(batch["teacher_ids"].shape[-1] >= 4 for batch in trainer.batches)


def test_the_card_writes_the_rule_out(tmp_path):
    for objective, words in (
        (RULE, f"Objective: a rule of one's own: `{RULE!r}`."),
        (switched, f"Objective: a schedule of rules: from `{RULE!r}` to `{LATER!r}`."),
    ):
        trainer = make(tmp_path, objective=objective)
        trainer.create_model_card()
        text = (tmp_path / "README.md").read_text()
        assert words in text and "arxiv" not in text.lower()
    assert card.OBJECTIVES.keys() == registry.OBJECTIVES.keys()
