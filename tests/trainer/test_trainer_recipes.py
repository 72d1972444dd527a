"""Recipes: what each sets, that a key which is given overrules it, and what copies keep."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import torch
from test_trainer_cli import run_file  # noqa: F401 - a fixture
from training import make, resume_and_compare, step_and_compare
from transformers import HfArgumentParser

from tropd_kernels import EOPD, OPD, REOPOLD, TokenRule, TrOPD, cli
from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer, card, recipes
from tropd_kernels.trainer.recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
HERE = dict(use_cpu=True, bf16=False, report_to="none")
#: arXiv 2606.01249, section 5.1: the run of its tables; weight_decay and max_grad_norm are those of
#: the authors' run_tropd_deepseek_1.5b.sh, as reported.
PAPER = dict(
    objective="tropd", learning_rate=5e-6, lr_scheduler_type="constant", weight_decay=0.1,
    max_grad_norm=1.0, num_generations=4, temperature=1.0, prefix_schedule="cosine",
    prefix_relative=True, prefix_length=0, prefix_weight=0.001,
)  # fmt: skip
#: tinker-cookbook, recipes/distillation: README.md and on_policy_distillation.py; `train_step` of
#: rl/train.py; what that leaves open are the defaults of tinker's AdamParams.
COOKBOOK = dict(
    objective="opd", learning_rate=5e-5, lr_scheduler_type="constant", num_generations=4,
    temperature=1.0, kl_discount_factor=0.0, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8,
    weight_decay=0.0, max_grad_norm=0.0,
)  # fmt: skip
#: arXiv 2603.07079, table 9 in appendix A.
ENTROPY_AWARE = dict(
    objective="eopd", learning_rate=3e-6, lr_scheduler_type="cosine", warmup_steps=0,
    num_generations=1, temperature=1.0, top_p=1.0,
)  # fmt: skip


def config(recipe, **settings) -> TrOPDConfig:
    return TrOPDConfig("unused", recipe=recipe, **(HERE | settings))


def differences(one, other) -> set[str]:
    names = {field.name for field in dataclasses.fields(one)} - {"run_name"}
    return {name for name in names if getattr(one, name) != getattr(other, name)}


@pytest.mark.parametrize(
    ("recipe", "settings", "rule"),
    [
        ("tropd_paper", PAPER, TrOPD.paper()),
        ("tropd_official_code", PAPER, TrOPD.official_code()),
        ("opd", COOKBOOK, OPD()),
        ("reopold", dict(objective="reopold"), REOPOLD()),
        ("eopd", ENTROPY_AWARE, EOPD()),
    ],
)
def test_what_is_set(recipe, settings, rule, capsys):
    """... and nothing else is, of which all is printed."""
    made, plain = config(recipe), TrOPDConfig("unused", **HERE)
    printed = capsys.readouterr().out
    assert made.rule() == rule
    changed = differences(made, plain) - {"recipe", "objective_kwargs"}
    assert changed <= settings.keys()
    for key, value in settings.items():
        assert getattr(made, key) == value, key
        if key in RECIPES[recipe].settings:
            assert f"`{key}={value!r}`" in printed
    assert printed.startswith(f"Recipe `{recipe}` (") and "Overruled" not in printed
    assert ("top_k=64" in printed) == recipe.startswith("tropd")
    assert "stage=" not in printed  # which the trainer switches


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_given_overrules_it(recipe, capsys):
    """One by one; also with the default's own value, which differs from the recipe's."""
    plain, whole = TrOPDConfig("unused", **HERE), config(recipe)
    for key in RECIPES[recipe].settings:
        default = getattr(plain, key)
        given = {key: default}
        if key == "prefix_relative":
            given["prefix_length"] = 8
        capsys.readouterr()
        made = config(recipe, **given)
        printed = capsys.readouterr().out
        assert getattr(made, key) == default
        others = {"prefix_relative"} if key == "prefix_schedule" else set()
        assert differences(made, whole) <= given.keys() | others
        shown = f"Overruled: `{key}={getattr(default, 'value', default)!r}`"
        assert (shown in printed) == (getattr(whole, key) != default)


@pytest.mark.parametrize(
    ("recipe", "given", "overruled"),
    [
        ("tropd_paper", {"objective_kwargs": {"top_k": 8}, "prefix_weight": 0.5},
         "`top_k=8`, `prefix_weight=0.5`"),
        ("tropd_official_code", {"objective_kwargs": {"top_k_tail": "raw"}, "weight_decay": 0.0},
         "`weight_decay=0.0`, `top_k_tail='raw'`"),
        ("eopd", {"objective_kwargs": {"clip_ratio": None}}, "`clip_ratio=None`"),
        ("reopold", {"objective_kwargs": {"stage": 2}}, "`stage=2`"),
        ("reopold", {"stage_fraction": 0.0}, None),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_user_gave_is_not_said_of_the_source(recipe, given, overruled, capsys):
    """It is under "Overruled", and before that is the recipe's own rule."""
    config(recipe)
    rule = capsys.readouterr().out.split("`")[3]
    config(recipe, **given)
    printed = capsys.readouterr().out
    assert printed.split("`")[3] == rule
    assert (printed.partition(" Overruled: ")[2].strip() or None) == (overruled and f"{overruled}.")


def test_positional_arguments_are_given(tmp_path):
    """`per_device_train_batch_size` is the second."""
    names = [field.name for field in dataclasses.fields(TrOPDConfig)]
    assert names[:2] == ["output_dir", "per_device_train_batch_size"]
    rate = names.index("learning_rate")
    plain = TrOPDConfig("unused", **HERE)
    values = [getattr(plain, name) for name in names[: rate + 1]]
    assert TrOPDConfig(*values, recipe="tropd_paper", **HERE).learning_rate == plain.learning_rate


def test_knobs_one_by_one():
    official = config("tropd_official_code", objective_kwargs={"top_k": 8})
    assert official.rule() == dataclasses.replace(TrOPD.official_code(), top_k=8)
    official = config("tropd_official_code", objective_kwargs='{"top_k_tail": "raw"}')
    assert official.rule() == dataclasses.replace(TrOPD.official_code(), top_k_tail="raw")
    for given, rule in (
        ({"outlier": "mask"}, TrOPD(outlier="mask")),
        ({"gate": "always"}, TrOPD(gate="always")),
        ({"top_k": None}, TrOPD(outlier="forward_kl_reward", top_k=None)),
    ):  # what is left of the official code has no effect beside them
        assert config("tropd_official_code", objective_kwargs=given).rule() == rule
    other = config("tropd_official_code", objective="gkd")
    assert other.objective_kwargs is None and other.learning_rate == 5e-6
    assert config("tropd_official_code", objective=TokenRule()).rule() == TokenRule()
    assert config("tropd_paper", prefix_weight=0.5).rule() == TrOPD(prefix_weight=0.5)


@pytest.mark.parametrize(
    "given",
    [
        dict(prefix_schedule="none"), dict(prefix_length=8), dict(lmbda=0.0),
        dict(precomputed_teacher=True), dict(prefix_relative=False),
    ],
    ids=str,
)  # fmt: skip
def test_what_others_leave_without_effect_is_not_set(given):
    """The user would have to take back what the recipe says besides."""
    made = config("tropd_paper", **given)
    assert not made.prefix_relative and made.learning_rate == 5e-6
    assert made.is_guided == ("prefix_length" in given or "lmbda" in given)
    assert made.num_generations == (1 if {*given} & {"precomputed_teacher", "lmbda"} else 4)


def test_copies_keep_what_was_overruled():
    made = config("tropd_paper", learning_rate=1e-6, prefix_schedule="none")
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other == made and vars(other).keys() == vars(made).keys()
    seeded = dataclasses.replace(made, seed=1)
    assert differences(seeded, made) == {"seed"}
    assert dataclasses.replace(seeded, weight_decay=0.0).weight_decay == 0.0
    saved = json.loads(json.dumps(config("tropd_paper").to_dict(), default=str))
    assert saved["recipe"] == "tropd_paper (applied)" and saved["learning_rate"] == 5e-6


@pytest.mark.parametrize(
    ("recipe", "given"),
    [
        (None, {}), ("tropd_paper", {}), ("tropd_official_code", {"learning_rate": 1e-4}),
        ("opd", {"num_generations": 1}),  # the default, and not the recipe's
        ("tropd_paper", {"prefix_schedule": "none", "objective_kwargs": {"gate": "always"}}),
        ("tropd_paper", {"objective": "eopd"}), ("opd", {"objective": TokenRule()}),
        ("reopold", {"objective_kwargs": {"stage": 2}}),
    ],
    ids=str,
)  # fmt: skip
def test_a_saved_config_makes_the_same_one(recipe, given, capsys):
    """All keys are given then, and those of the recipe may differ from it."""
    made = config(recipe, **given)
    printed = capsys.readouterr().out
    for saved in (made.to_dict(), json.loads(made.to_json_string())):
        again = TrOPDConfig(**saved)
        assert differences(again, made) == set() and again == made
        assert again.rule() == made.rule() and again.to_dict() == made.to_dict()
        assert capsys.readouterr().out == printed


def test_a_subclass_and_signatures():
    @dataclasses.dataclass
    class Mine(TrOPDConfig):
        more: int = 1

    made = Mine("unused", recipe="tropd_paper", temperature=0.7, **HERE)
    assert (made.learning_rate, made.temperature, made.more) == (5e-6, 0.7, 1)
    taken = {cls: list(inspect.signature(cls).parameters) for cls in (TrOPDConfig, Mine)}
    assert taken[TrOPDConfig][0] == "output_dir" and "recipe" in taken[TrOPDConfig]
    assert taken[Mine] == [*taken[TrOPDConfig], "more"]


def test_what_is_refused():
    with pytest.raises(
        ValueError, match=r"^recipe: unknown 'tropd' .*Known: tropd_paper, tropd_off"
    ):
        config("tropd")
    with pytest.raises(ValueError, match=r"unknown 'tropdpaper' \(did you mean 'tropd_paper'\?\)"):
        config("tropdpaper")
    with pytest.raises(ValueError, match="^recipe: expected text"):
        config(True)
    with pytest.raises(ValueError, match="^recipe: it would have no effect: all that 'reopold' s"):
        config("reopold", objective="opd")
    with pytest.raises(ValueError, match="^recipe: it would have no effect: all that 'tropd_paper"):
        dataclasses.replace(config("opd"), recipe="tropd_paper")
    with pytest.raises(ValueError, match="^recipe: unknown 'opt'"):
        config("opt (applied)")
    # It gives all keys, so that none is left. A recipe whose settings are given is one.
    with pytest.raises(ValueError, match="^recipe: it would have no .* `tropd train` gives those"):
        HfArgumentParser(TrOPDConfig).parse_args_into_dataclasses(
            ["--output_dir", "unused", "--recipe", "tropd_paper", "--use_cpu", "--bf16", "false"]
        )
    settings = RECIPES["tropd_paper"].keys
    assert config("tropd_paper", **settings) == config("tropd_paper")
    with pytest.raises(ValueError, match="^num_generations: 4 completions .* do not divide the 1 "):
        config("tropd_paper", per_device_train_batch_size=1)


def test_an_optimizer_without_betas():
    """... is not refused for the recipe's."""
    without = config("opd", optim="sgd")
    assert without.adam_beta2 == 0.999 and "adam_beta2" not in recipes.describe(without)
    assert config("opd", optim="adamw_torch").adam_beta2 == 0.95


def test_an_error_about_a_key_of_the_recipe(tmp_path):
    """The user cannot leave out what the recipe sets."""
    with pytest.raises(ValueError, match="^num_generations: .* give num_generations its default"):
        config("opd", generation_kwargs={"do_sample": False})
    with pytest.raises(ValueError, match="^learning_rate: .* beside recipe 'opd'$"):
        with_sgd(tmp_path, learning_rate=0.2)


def with_sgd(folder, scheduled=False, **settings):
    """The recipe "opd" beside an optimizer of the user's own, maybe with a scheduler."""
    student = tiny.model(0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    args = TrOPDConfig(
        str(folder), recipe="opd", max_steps=2, per_device_train_batch_size=4,
        max_completion_length=4, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, logging_steps=1, **(HERE | settings),
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if scheduled else None
    return TrOPDTrainer(
        student, tiny.model(1), args, tiny.prompts(), processing_class=tiny.tokenizer(),
        optimizers=(optimizer, scheduler),
    )  # fmt: skip


@pytest.mark.parametrize("scheduled", [False, True])
def test_an_optimizer_of_the_user_s(tmp_path, capsys, scheduled):
    """It decides, and with it a scheduler; the rest of the recipe applies, and all that is said."""
    trainer = with_sgd(tmp_path, scheduled)
    *_, line = capsys.readouterr().out.strip().splitlines()
    unused = "`learning_rate=5e-05`, " + "`lr_scheduler_type='constant'`, " * scheduled
    said = f" Not applied, as the trainer is given its optimizer: {unused}`adam_beta2=0.95`."
    assert line.startswith("Recipe `opd` (") and line.endswith(said)
    assert "`num_generations=4`" in line and line.count("learning_rate") == 1
    trainer.train()
    trainer.create_model_card()
    assert f"- {line}\n" in (tmp_path / "README.md").read_text()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == [0.1, 0.05 if scheduled else 0.1]
    with pytest.raises(ValueError, match="^weight_decay: it would have no effect: the optimizer"):
        with_sgd(tmp_path, scheduled, weight_decay=0.3)


# --- on the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "flags", "expected"),
    [
        ("recipe: tropd_paper", [], {"num_generations": 4, "temperature": 1.0}),
        ("", ["--recipe", "tropd_official_code"], {"weight_decay": 0.1, "prefix_relative": True}),
        ("recipe: opd", ["--recipe=tropd_paper"], {"objective": "tropd", "adam_beta2": 0.999}),
        ("recipe: tropd_official_code\nweight_decay: 0.0", [], {"weight_decay": 0.0}),
        ("recipe: tropd_official_code\nweight_decay: 0.5", ["--weight_decay", "0"],
         {"weight_decay": 0.0}),
        ("recipe: tropd_paper", ["--lr-scheduler-type", "linear"], {"lr_scheduler_type": "linear"}),
        ("recipe: tropd_paper\nprefix_length: 2", ["--prefix_relative", "false"],
         {"prefix_relative": False, "prefix_schedule": "cosine"}),
        ("recipe: tropd_paper", ["--num_generations", "1"], {"num_generations": 1}),
        ("recipe: tropd_paper", ["--recipe", "none"], {"recipe": None, "num_generations": 1}),
    ],
)  # fmt: skip
def test_train_keys(run_file, lines, flags, expected):  # noqa: F811
    """The file gives learning_rate 5e-3."""
    text = run_file.read_text().replace("objective_kwargs: {top_k: 8}\n", "")
    run_file.write_text(f"{text}{lines}\n")
    _, made = cli.parse_run(["--config", str(run_file), *flags])
    assert made.learning_rate == 5e-3
    for key, value in expected.items():
        assert getattr(made, key) == value, key


def test_train_and_its_card(run_file, capsys):  # noqa: F811
    run_file.write_text(run_file.read_text() + "recipe: tropd_official_code\n")
    assert cli.main(["train", "--config", str(run_file), "--max_steps", "1"]) == 0
    printed = capsys.readouterr().out
    text = (run_file.parent / "out" / "README.md").read_text()
    (line,) = [line for line in printed.splitlines() if line.startswith("Recipe `tropd_official_c")]
    assert f"- {line}\n" in text
    assert "Overruled: `learning_rate=0.005`, `top_k=8`." in line and "`weight_decay=0.1`" in line
    assert "outlier='forward_kl_reward', top_k=64" in line
    assert cli.main(["train", "--config", str(run_file), "--recipe", "paper"]) == 2
    assert "recipe: unknown 'paper'" in capsys.readouterr().err


# --- in a run ----------------------------------------------------------------------------------

#: Plain SGD, so that a step is the gradient.
_AS_SGD = dict(weight_decay=0.0, num_generations=2, prefix_weight=0.5)


def answered():
    return tiny.prompts(8, teacher_completion=[f" w{i + 20} w{i + 21} w3 w4" for i in range(8)])


@pytest.mark.parametrize("recipe", ["tropd_paper", "tropd_official_code"])
def test_a_step_is_the_loop_s(tmp_path, recipe):
    teacher = tiny.model(1, hidden_size=48)
    trainer = make(tmp_path, teacher=teacher, data=answered(), recipe=recipe, **_AS_SGD)
    step_and_compare(trainer, teacher)
    (batch,) = trainer.batches
    assert batch["prefix_lengths"].tolist() == [4] * 4
    text = card.write(card.Subject(card.Named("`a`")), trainer.args, "a")
    assert "Overruled:" in text and "`weight_decay=0.0`" in text


@pytest.mark.parametrize("recipe", ["reopold", "eopd", "opd"])
def test_a_step_of_the_others(tmp_path, recipe):
    teacher = tiny.model(1, hidden_size=48)
    step_and_compare(make(tmp_path, teacher=teacher, recipe=recipe), teacher)


def test_resume(tmp_path):
    resume_and_compare(tmp_path, 3, max_steps=5, recipe="tropd_paper", data=answered())
