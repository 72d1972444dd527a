"""Recipes, rules, rewards, teachers and prefixes, each by itself: a run resumes to the bit, and two
processes make the step of the loop by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import test_trainer_special_tokens as special
import tiny
from engines import saved_together
from test_trainer_generations import RELATIVE, answers
from test_trainer_own_rule import RULE, switched
from test_trainer_recipes import answered
from test_trainer_self_teacher import adapter, told
from test_trainer_several_teachers import routed, teachers
from test_trainer_verifier import distinct
from training import Spy, by_hand, is_the_large_batch, make, resume_and_compare

from tropd_kernels.trainer.recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
#: Of each feature the keywords of `make`, given a folder.
FEATURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{
        recipe: lambda folder, recipe=recipe: dict(
            recipe=recipe, weight_decay=0.0, data=answered(),
            **(dict(prefix_weight=0.5) if "tropd" in recipe else {}),
        )
        for recipe in RECIPES
    },
    "rule": lambda folder: dict(objective=RULE, prefix_schedule="constant", prefix_length=3),
    "schedule": lambda folder: dict(objective=switched),
    "reward_funcs": lambda folder: dict(
        kind=partial(Spy, reward_funcs=[distinct]), objective="opd", task_weight=0.7,
        num_generations=4,
    ),
    "several teachers": lambda folder: dict(
        data=routed(), several=dict(zip(("math", "code"), teachers()))
    ),
    "teacher_prompt": lambda folder: dict(data=told()),
    "self": lambda folder: dict(teacher="self", data=told()),
    "self, averaged": lambda folder: dict(teacher="self", data=told(), teacher_update_rate=0.5),
    "self, adapters": lambda folder: dict(teacher="self", data=told(), student=adapter()),
    "special_token_map": lambda folder: dict(
        teacher=special.saved(folder / "teacher", special.teacher()), special_token_map=special.MAP
    ),
    "num_generations": lambda folder: dict(num_generations=2),
    "prefix_relative": lambda folder: dict(data=answers(), **RELATIVE),
}  # fmt: skip
#: A teacher that is the student as it was is given the same one again.
OTHERS = {"self": lambda: tiny.model(0), "self, adapters": lambda: adapter()}
#: Of those with another teacher than `make`'s, what `by_hand` reads.
TEACHERS = {
    **dict.fromkeys(("self", "self, averaged", "self, adapters"), lambda: tiny.model(0)),
    "several teachers": teachers,
    "special_token_map": lambda: special.in_the_student_s_ids(special.teacher()),
}


#: The others have a test of it beside their own.
RESUMED_HERE = {"tropd_official_code", "reopold", "eopd", "opd", "rule", "self, adapters"}


@pytest.mark.parametrize("iterations", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "name",
    [n if n in RESUMED_HERE else pytest.param(n, marks=pytest.mark.slow) for n in FEATURES],
)
def test_a_run_resumes_to_the_bit(tmp_path, name, iterations):
    """After a batch's step; or amid its steps, and a schedule's."""
    resume_and_compare(
        tmp_path, 1 + iterations, OTHERS.get(name, lambda: tiny.model(9))(), max_steps=4,
        num_iterations=iterations, **FEATURES[name](tmp_path),
    )  # fmt: skip


ONE_STEP = """
import sys, torch
from pathlib import Path
from engines import use
settings = use(sys.argv[2])
from test_trainer_features import AT_ONCE, FEATURES, SPLIT
from training import make
saved, folder = {}, Path(sys.argv[1])
# The first process writes what is loaded by name, before the first run, which waits for it.
given = {name: keywords(folder / name) for name, keywords in FEATURES.items()}
for name, keywords in given.items():
    trainer = make(folder / name, **SPLIT, **settings, **keywords, **AT_ONCE.get(name, {}))
    trainer.train()
    trained = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    saved[name] = trainer.batches, trained, trainer.losses
torch.save(saved, f"{sys.argv[1]}/{trainer.accelerator.process_index}.pt")
"""
SPLIT = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)
#: Its first stage would keep no token of these few.
AT_ONCE = {"reopold": dict(stage_fraction=0.0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_two_processes_are_the_loop_by_hand(tmp_path, tmp_path_factory, name):
    """Two micro-batches of a row on each of two processes: one step."""
    saved = [one[name] for one in saved_together("test_trainer_features", tmp_path_factory)]
    keywords = FEATURES[name](tmp_path) | AT_ONCE.get(name, {})
    student = keywords.pop("student", None) or tiny.model(0)
    trainer = make(tmp_path, student, **SPLIT | {"gradient_accumulation_steps": 4}, **keywords)
    batches = [batch for of_one, *_ in saved for batch in of_one]
    assert sorted(int(batch["sequence_ids"]) for batch in batches) == [0, 1, 2, 3]
    twin = {"self, adapters": adapter}.get(name, lambda: tiny.model(0))().double()
    read = TEACHERS.get(name, lambda: tiny.model(1, hidden_size=48))()
    read = [one.double() for one in read] if isinstance(read, list) else read.double()
    # A mean over the kept tokens is one of each micro-batch.
    parts = 4 if trainer.args.rule().normalize == "kept" else 1
    trainer.args.gradient_accumulation_steps = 4 // parts
    loss = 0.0
    for part in range(parts):
        trainer.seen = [(batch, True) for batch in batches[part::parts]]
        loss += by_hand(trainer, twin, read).item() / parts
    is_the_large_batch(saved, student, twin, loss, parts)
    true = [p for p in twin.parameters() if p.requires_grad]
    assert max(exact.grad.norm() for exact in true) > 0.1
