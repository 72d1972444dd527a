"""The model card: what it says of objective, models, data and versions, and what it must not."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import torch
import transformers
import trl
from huggingface_hub import ModelCard
from served import serve
from training import make

import tropd_kernels
from tropd_kernels.objectives import registry
from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer, card

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FORWARD_KL = {"objective_kwargs": {"top_k": 4}}


def made(trainer) -> tuple[ModelCard, str]:
    """The card of a trainer, and all that is in its file."""
    trainer.create_model_card()
    path = Path(trainer.args.output_dir, "README.md")
    text = path.read_text(encoding="utf-8")
    assert "None" not in text and "/tmp" not in text and trainer.args.output_dir not in text
    for name, module in (("tropd-kernels", tropd_kernels), ("TRL", trl),
                         ("Transformers", transformers), ("PyTorch", torch)):  # fmt: skip
        assert f"- {name}: {module.__version__}\n" in text
    return ModelCard.load(path), text


@pytest.mark.parametrize(
    ("settings", "words", "papers"),
    [
        ({"objective": "gkd", "beta": 0.3}, "Objective: GKD (", ["2306.13649"]),
        (
            {"objective": "tropd"},
            "accepts the token, else the forward KL on the teacher's top-64.",
            ["2606.01249"],
        ),
        (
            {"objective": "tropd", "objective_kwargs": {"gate": "always"}},
            "): K1 (the sampled reverse KL) on every token, which is OPD.",
            ["2606.01249"],
        ),
        (
            {"objective": "tropd", "objective_kwargs": {"outlier": "clip"}},
            "accepts the token, else K1 floored at a static threshold.",
            ["2606.01249"],
        ),
        ({"objective": "reverse_kl"}, "Objective: Reverse KL: KL(student || teacher)", []),
        (
            {"objective": "forward_kl", "objective_kwargs": {"top_k": 4}},
            "KL(teacher || student) on the teacher's top-4, on every token.",
            [],
        ),
        (
            {"objective": "reverse_kl", "objective_kwargs": {"top_k": 4, "top_k_ids": "student"}},
            "KL(student || teacher) on the student's top-4, on every token.",
            [],
        ),
        ({"objective": "reopold"}, "Objective: REOPOLD (", ["2603.11137"]),
        ({"objective": "lsm"}, "Objective: Local support matching (LSM) (", ["2603.25562"]),
        ({"objective": "opd"}, "Objective: OPD ([On-Policy Distillation](https://think", []),
    ],
    ids=lambda given: given.get("objective") if isinstance(given, dict) else "",
)
def test_the_objective_is_the_run_s(tmp_path, settings, words, papers):
    """... and so is the paper: another objective's is a false claim."""
    data, text = made(make(tmp_path / "run", **settings))
    assert words in text
    assert sorted(set(re.findall(r"\d{4}\.\d{5}", text))) == papers
    cited = re.findall(r"^@\w+\{", text, re.MULTILINE)
    assert len(cited) == (1 if settings["objective"] in ("forward_kl", "reverse_kl") else 2)
    assert "@software{vonwerra2020trl," in text
    assert settings["objective"] in data.data.tags and {"trl", "tropd-kernels"} < {*data.data.tags}
    assert ("tropd" in data.data.tags) == (settings["objective"] == "tropd")
    assert ("`beta=0.3`" in text) == ("beta" in settings)


def test_every_objective_has_its_words():
    assert card.OBJECTIVES.keys() == registry.OBJECTIVES.keys()
    for name, words, source in card.OBJECTIVES.values():
        assert name and words
        assert source is None or bool(source.id) != bool(source.url)
        assert source is None or source.bibtex.count("{") == source.bibtex.count("}")


def test_models_by_name_and_by_object(tmp_path):
    """A folder by its last part; a model that was built here by its class."""
    for name, seed in (("small", 0), ("large", 1)):
        tiny.model(seed).save_pretrained(tmp_path / name)
    data, text = made(make(tmp_path / "run", str(tmp_path / "small"), str(tmp_path / "large")))
    assert "fine-tuned version of `small`, trained to match `large`." in text
    assert data.data.base_model is None and data.data.model_name == "run"
    assert 'model="run"' in text
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    _, text = made(make(tmp_path / "run", teacher=loaded))
    assert "of a `LlamaForCausalLM` without a name, trained to match `large`." in text
    _, text = made(make(tmp_path / "run"))
    assert "trained to match a `LlamaForCausalLM` without a name." in text


def test_models_and_data_on_the_hub(tmp_path):
    student, teacher = tiny.model(0), tiny.model(1)
    student.config._name_or_path, teacher.config._name_or_path = "some/small", "some/large"
    trainer = make(tmp_path / "run", student, teacher)
    trainer.dataset_name = "some/prompts"
    data, text = made(trainer)
    assert data.data.base_model == "some/small" and data.data.datasets == "some/prompts"
    for link in ("[some/small](https://huggingface.co/some/small)",
                 "[some/large](https://huggingface.co/some/large)",
                 "[some/prompts](https://huggingface.co/datasets/some/prompts)"):  # fmt: skip
        assert link in text
    assert data.data.library_name == "transformers"
    trainer.dataset_name = str(tmp_path / "prompts.jsonl")
    data, text = made(trainer)
    assert "on `prompts.jsonl`." in text and data.data.datasets is None


@pytest.mark.parametrize(
    ("name", "text", "hub"),
    [
        ("gpt2", "`gpt2`", "gpt2"),
        ("org/model-1.7b", "`org/model-1.7b`", "org/model-1.7b"),
        ("/gone/home/me/model", "`model`", None),
        ("/gone/hub/models--org--small/snapshots/0123abcd", "`org/small`", "org/small"),
        ("C:\\Users\\me\\model", "`model`", None),
        ("prompts.jsonl", "`prompts.jsonl`", None),
    ],
)
def test_names_without_paths(name, text, hub):
    assert card.named(name) == card.Named(text, hub)


def test_a_served_teacher_by_its_served_name(tmp_path):
    with serve(tiny.model(1), tiny.tokenizer()) as served:
        trainer = make(tmp_path / "run", teacher_model_server_url=served.url, **FORWARD_KL)
        _, text = made(trainer)
    assert "trained to match `teacher`, behind a server." in text
    assert served.url not in text
    of_a_folder = card.subject(tiny.model(0), None, "/srv/models/teacher", trainer.args)
    assert of_a_folder.teacher == "`teacher`, behind a server"


def test_a_precomputed_teacher_and_none(tmp_path):
    columns = {
        "completion_ids": [[7, 8]] * 8, "teacher_label_log_probs": [[-1.0, -1.0]] * 8,
    }  # fmt: skip
    settings = dict(precomputed_teacher=True, objective="opd")
    _, text = made(make(tmp_path / "run", data=tiny.prompts(**columns), **settings))
    assert "trained to match a teacher whose log-probs were computed before" in text
    data = tiny.prompts(teacher_completion=["w1 w2"] * 8)
    trainer = make(
        tmp_path / "run", teacher=tiny.model(1), data=data, objective="sft", lmbda=0.0
    )  # fmt: skip
    _, text = made(trainer)
    assert "match" not in text and "Share of on-policy steps: 0;" in text


def test_the_prefix_schedule(tmp_path):
    _, text = made(make(tmp_path / "run", prefix_schedule="cosine", prefix_length=4))
    assert "Guidance prefix: `cosine` schedule, 4 tokens at first, of the teacher's text." in text
    assert "prefix" not in made(make(tmp_path / "run"))[1]


def test_a_prefix_is_credited_to_its_paper(tmp_path):
    """... by a card of another objective too; and of TrOPD's own no second time."""
    guided = dict(prefix_schedule="linear", prefix_length=4)
    _, text = made(make(tmp_path / "run", objective="gkd", **guided))
    assert text.count("@misc{") == 2 and "It is TrOPD's ([Trust Region" in text
    assert "Cite TrOPD as:" in text and text.count("2606.01249") == 2
    _, text = made(make(tmp_path / "run", objective="clip_outlier", **guided))
    assert text.count("@misc{") == 1 and "It is TrOPD's" not in text


def test_settings_that_shape_the_run(tmp_path):
    """All of those that are not at their defaults, and none that is."""
    _, text = made(
        make(
            tmp_path / "run", temperature=0.7, top_p=0.9, num_iterations=2, prefix_weight=0.01,
            prefix_schedule="linear", prefix_length=2,
            generation_kwargs={"typical_p": 0.9}, disable_dropout=True, backend="torch",
            gradient_checkpointing=True,
        )
    )  # fmt: skip
    (line,) = [line for line in text.splitlines() if line.startswith("- Other settings: ")]
    assert set(line.removeprefix("- Other settings: ").rstrip(".").split(", ")) == {
        "`temperature=0.7`", "`top_p=0.9`", "`num_iterations=2`", "`prefix_weight=0.01`",
        "`generation_kwargs={'typical_p': 0.9}`", "`disable_dropout=True`",
        "`max_completion_length=10`",
    }  # fmt: skip


def test_settings_that_do_nothing_are_in_no_card(tmp_path):
    """They are not at their defaults, and change as little."""
    trainer = make(tmp_path / "run", generation_kwargs={}, chat_template_kwargs={}, min_p=0.0)
    (line,) = [line for line in made(trainer)[1].splitlines() if line.startswith("- Other")]
    assert line == "- Other settings: `max_completion_length=10`."


def test_every_setting_is_in_a_card_or_is_said_not_to_be():
    """A new field that shapes a run and is in none of these would be left out of its card."""
    kinds = card.IN_WORDS, card.SHAPING, card.SHAPING_NOTHING
    known = [name for kind in kinds for name in kind]
    assert len(known) == len({*known})
    own = TrOPDConfig.__annotations__.keys()
    assert own <= {*known}
    assert {*known} <= own | trl.DistillationConfig.__annotations__.keys()


def test_the_quick_start_of_a_model_that_sees_images(tmp_path, monkeypatch, capsys):
    """... runs as it stands, and shows the model an image."""
    pytest.importorskip("PIL", reason="images need pillow")
    vision = importlib.import_module("vision")
    monkeypatch.chdir(tmp_path)
    args = TrOPDConfig(
        str(tmp_path / "seen"),
        per_device_train_batch_size=4,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    student, teacher = (vision.model("gemma3", seed) for seed in (0, 1))
    trainer = TrOPDTrainer(
        student, teacher, args, vision.prompts(4), processing_class=vision.processor("gemma3")
    )
    trainer.save_model()
    _, text = made(trainer)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "image-text-to-text" in code
    code = code.replace("max_new_tokens=128", "max_new_tokens=2")
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_checkpoints_have_the_same_card(tmp_path):
    """... and an adapter is one."""
    peft = pytest.importorskip("peft")
    trainer = make(
        tmp_path / "run", objective="gkd", save_strategy="steps", save_steps=1,
        peft=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )  # fmt: skip
    trainer.train()
    text = (tmp_path / "run" / "README.md").read_text()
    data, again = made(trainer)
    assert text == again and "Objective: GKD" in text
    assert data.data.library_name == "peft" and f"- PEFT: {peft.__version__}" in text
    assert "version of a `LlamaForCausalLM` without a name" in text
