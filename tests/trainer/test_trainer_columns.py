"""Columns are held to the same rules whatever the data set is: whole, a list, a stream, or made
when it is read."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from datasets import Dataset, IterableDataset
from training import Spy, make

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FORMS = {
    "data set": Dataset.from_list,
    "list": list,
    "stream": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
    "transform": lambda rows: Dataset.from_list(rows).with_transform(lambda found: found),
}
GUIDED = dict(prefix_schedule="constant", prefix_length=3)
SCORED = {"completion_ids": [7, 8, 9], "teacher_label_log_probs": [-1.0, -2.0, -3.0]}
PRECOMPUTED = dict(precomputed_teacher=True, objective="opd")
ANSWER = {"teacher_completion": " w1"}


def rows(conversational=False, **columns):
    texts = tiny.prompts(8)["prompt"]
    talks = [[{"role": "user", "content": text}] for text in texts]
    return [{"prompt": prompt} | columns for prompt in (talks if conversational else texts)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (rows(answer=" w1 w2"), dict(prefix_column="anwser", **GUIDED),
         "train_dataset: no column 'anwser'; it has 'prompt', 'answer'"),
        (rows(**SCORED, completion_mask=[1, 0, 0]), PRECOMPUTED,
         "train_dataset: the column 'completion_mask' would not be read"),
        (rows(tools=[{"type": "function"}]), {},
         "train_dataset: the column 'tools' would not be read"),
        (rows(True, chat_template_kwargs={"thinks": False}), {},
         "train_dataset: the column 'chat_template_kwargs' would not be read"),
        (rows(**ANSWER), dict(lmbda=0.0, top_p=0.5),
         "top_p: it would have no effect: with lmbda 0 completions are the texts in"),
        (rows(**ANSWER), dict(lmbda=0.0, num_generations=2), "num_generations: .*with lmbda 0"),
        (rows(teacher_completion=""), dict(prefix_schedule="linear", prefix_relative=True),
         "teacher_completion: prefix_relative takes a share of each answer"),
    ],
    ids=lambda given: "" if isinstance(given, (list, dict)) else given.split(":")[-1][:40],
)  # fmt: skip
def test_what_is_refused_of_one_form_is_of_all(tmp_path, form, data, settings, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        make(tmp_path, data=FORMS[form](data), **settings).train()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_data_of_an_evaluation(tmp_path, form, call):
    """... which the constructor has not seen."""
    trainer = make(tmp_path, data=FORMS["data set"](rows()))
    evaluate = getattr(trainer, call)
    evaluate(FORMS["data set"](rows(source="w1")))
    with pytest.raises(ValueError, match="^eval_dataset: the column 'tools' would not be read"):
        evaluate(FORMS[form](rows(tools=["look"])))


def test_another_data_set_beside_persistent_workers(tmp_path):
    """transformers keeps the workers' loader under one name, and would read its rows again."""
    settings = dict(dataloader_num_workers=1, dataloader_persistent_workers=True)
    trainer = make(tmp_path, evaluate=Dataset.from_list(rows()), **settings)
    counts, kept = [], []
    for data in (None, Dataset.from_list(rows()[:3]), None):
        trainer.seen = []
        trainer.evaluate(data)
        counts.append(sum(len(batch["prompt_ids"]) for batch, _ in trainer.seen))
        kept.append(dict(trainer._eval_dataloaders))
    assert counts == [8, 3, 8]
    assert kept[0] == kept[1] == kept[2] and kept[0]  # whose workers are not started anew


@pytest.mark.parametrize("form", ["list", "stream", "transform"])
def test_what_is_read_after_all(tmp_path, form):
    """Values that are None, a column that tools or rewards may read, an evaluation that samples."""
    make(tmp_path, data=FORMS[form](rows(tools=None))).train()
    judges = lambda *arguments, **keywords: Spy(
        *arguments, reward_funcs=[lambda completions, **_: [1.0, 0.0] * 2], **keywords
    )
    judged = dict(kind=judges, task_weight=1.0, num_generations=2)
    make(tmp_path, data=FORMS[form](rows(tools=["look"])), **judged).train()
    sampling = dict(lmbda=0.0, top_p=0.5, evaluate=Dataset.from_list(rows()))
    make(tmp_path, data=FORMS[form](rows(**ANSWER)), **sampling).train()
    trainer = make(tmp_path, data=FORMS[form](rows()), **sampling)
    trainer.evaluate(FORMS[form](rows(**ANSWER)))
    trainer.tools = [print]
    trainer.check_rows(rows(tools=["look"]))


@pytest.mark.parametrize("form", FORMS)
def test_teacher_s_prompts_in_the_training_data_alone(tmp_path, form):
    """An evaluation would read another quantity than training does, before it or after it."""
    data = FORMS[form](rows(teacher_prompt="w1 w2 w3"))

    def run():
        trainer = make(tmp_path, data=data, evaluate=FORMS[form](rows()))
        trainer.evaluate()
        trainer.train()

    with pytest.raises(ValueError, match="teacher_prompt.*(it has 'prompt'|evaluation reads what)"):
        run()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own", [None, "text", "messages"])
def test_a_template_s_keys_beside_text(tmp_path, monkeypatch, form, own):
    """Others may have messages further on: there it is a warning. A teacher may read messages."""
    columns = {"teacher_prompt": rows(own == "messages")[0]["prompt"]} if own else {}
    data, used = FORMS[form](rows(**columns)), own == "messages"
    monkeypatch.setattr(tiny, "TEMPLATE", tiny.TEMPLATE + "{% if thinks %}w1{% endif %}")

    def train():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make(tmp_path, data=data, chat_template_kwargs={"thinks": True}).train()
        return any("chat_template_kwargs: it has no effect" in str(one.message) for one in caught)

    if form == "data set" and not used:
        with pytest.raises(ValueError, match="^chat_template_kwargs: it would have no effect: the"):
            train()
    else:
        assert train() == (not used)
