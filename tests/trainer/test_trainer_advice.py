"""Of two reasons to refuse a combination, the error gives the one that nothing else mends: who
follows its advice meets no second refusal that makes the first vain."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny

from tropd_kernels.trainer import TrOPDConfig
from tropd_kernels.trainer.row_teachers import refuse_beside_several
from tropd_kernels.trainer.self_teacher import check_self
from tropd_kernels.trainer.verifier_checks import check_reward_funcs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def config(**settings):
    defaults = dict(bf16=False, use_cpu=True, report_to="none")
    return TrOPDConfig("output", **defaults | settings)


def judge(completions, **columns):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("settings", "tools", "words"),
    [
        ({"objective": "gkd"}, None, "'gkd' has no policy gradient, which .*: take one of tropd, "),
        ({"precomputed_teacher": True}, None, "with precomputed_teacher nothing is generated"),
        ({}, [judge], "keeps no messages of the tools' turns"),
        ({}, None, "set task_weight"),
    ],
)
def test_rewards_that_no_task_weight_could_let_in(settings, tools, words):
    with pytest.raises((ValueError, NotImplementedError), match=f"^reward_funcs: .*{words}"):
        check_reward_funcs(judge, None, config(**settings), tools, {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "gkd", "reward_weights": [1.0]}, "reward_weights: .*no policy gradient"),
        ({"reward_weights": [1.0]}, "reward_weights: .*set task_weight"),
        # Which of the two halves of a selection is missing does not matter.
        ({"objective": "reopold", "select_by": "entropy"}, "select_by: .*selects tokens itself"),
        ({"objective": "entropy_opd", "select_fraction": 0.5}, "select_fraction: .*itself"),
        ({"select_fraction": 0.5}, "select_fraction: .*give select_by"),
    ],
)
def test_settings_that_their_other_half_would_not_help(settings, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        config(**settings)


def test_a_student_of_images_that_would_teach_itself():
    """A prompt of the teacher's own, which is the advice for text, is refused beside images."""
    pytest.importorskip("PIL", reason="images need pillow")
    import vision

    student, processor = vision.model("qwen2_vl", 0), vision.processor("qwen2_vl")
    with pytest.raises(NotImplementedError, match="^teacher_model: 'self' .* beside images"):
        check_self(student, "self", None, config(), vision.prompts(), processor=processor)
    with pytest.raises(ValueError, match="give the data set a column 'teacher_prompt'"):
        check_self(student, "self", None, config(), tiny.prompts(), processor=tiny.tokenizer())


def test_several_teachers_of_images():
    """... are refused under DDP, too, which is the advice for text."""
    for sharded in (True, False):
        with pytest.raises(NotImplementedError, match="images of a batch are not split by teach"):
            refuse_beside_several(sharded, True)


def test_another_objective_lets_rewards_in():
    """Each of those that the error names."""
    with pytest.raises(ValueError) as error:
        check_reward_funcs(judge, None, config(objective="gkd"), None, {})
    named = str(error.value).split("take one of ")[1].split(", with task_weight")[0].split(", ")
    assert len(named) > 5
    for objective in named:
        args = config(objective=objective, task_weight=1.0, num_generations=2)
        assert check_reward_funcs(judge, None, args, None, {})
