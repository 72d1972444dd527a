"""Tokenizers whose own code cuts texts, which no list of settings names."""

from __future__ import annotations

import logging

import pytest
import tokenizers
import transformers

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import Spy, make

from tropd_kernels.trainer import TrOPDConfig
from tropd_kernels.trainer.vocabulary import check_whole, has_words

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Cuts(transformers.PreTrainedTokenizerFast):
    """Its own code keeps the first tokens of a text."""

    most = 40

    def _encode_plus(self, *arguments, **keywords):
        return super()._encode_plus(*arguments, **keywords | dict(zip(
            ("truncation_strategy", "max_length"),
            (transformers.tokenization_utils_base.TruncationStrategy.LONGEST_FIRST, self.most),
        )))  # fmt: skip


class CutsTalk(transformers.PreTrainedTokenizerFast):
    """... of messages alone."""

    most = 40

    def apply_chat_template(self, *arguments, **keywords):
        return super().apply_chat_template(
            *arguments, **keywords | {"truncation": True, "max_length": self.most}
        )


@pytest.mark.parametrize("most", [3, 63, 64])
@pytest.mark.parametrize("kind", [Cuts, CutsTalk])
def test_a_tokenizer_that_cuts(tmp_path, kind, most):
    """Without a word: it is asked with a text as long as the student's context, 64 tokens."""

    def spy(*models, processing_class, **given):
        processing_class.__class__ = kind
        processing_class.most = most
        return Spy(*models, processing_class=processing_class, **given)

    if most >= 64:  # longer prompts are refused
        make(tmp_path, kind=spy).train()
        return
    with pytest.raises(ValueError, match=f"^processing_class: a {kind.__name__} .* {most} tokens"):
        make(tmp_path, kind=spy)


def test_arguments_with_which_a_tokenizer_cuts(tmp_path):
    """Those of its own are known to no list."""

    class Own(transformers.PreTrainedTokenizerFast):
        def _encode_plus(self, *arguments, most=None, **keywords):
            made = super()._encode_plus(*arguments, **keywords)
            made["input_ids"] = [row[:most] for row in made["input_ids"]]
            return made

    def spy(*models, processing_class, **given):
        processing_class.__class__ = Own
        return Spy(*models, processing_class=processing_class, **given)

    talk = tiny.Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1"}]] * 8})
    for most in (None, 8):
        given = {"tokenizer_kwargs": {"most": most}}
        if most is None:
            make(tmp_path, data=talk, kind=spy, chat_template_kwargs=given).train()
            continue
        with pytest.raises(ValueError, match="^processing_class: .* cuts.*chat_template_kwargs"):
            make(tmp_path, data=talk, kind=spy, chat_template_kwargs=given)


def test_a_processor_that_cuts(tmp_path):
    pytest.importorskip("PIL", reason="images need pillow")
    import vision

    processor = vision.processor("qwen2_vl")
    plain = type(processor.tokenizer)

    class Own(plain):
        def __call__(self, *arguments, **keywords):
            return super().__call__(*arguments, **keywords | {"truncation": True, "max_length": 30})

    processor.tokenizer.__class__ = Own
    args = TrOPDConfig(
        str(tmp_path), per_device_train_batch_size=4, bf16=False, use_cpu=True,
        max_completion_length=4,
    )  # fmt: skip
    models = vision.model("qwen2_vl", 0), vision.model("qwen2_vl", 1)
    with pytest.raises(ValueError, match="^processing_class: .* cuts"):
        Spy(*models, args, vision.prompts(4), processing_class=processor)
    processor.tokenizer.__class__ = plain
    Spy(*models, args, vision.prompts(4), processing_class=processor)


def test_the_probe_warns_of_nothing(tmp_path, caplog, monkeypatch):
    """A tokenizer warns once of a text longer than its models read."""

    def spy(*models, processing_class, **given):
        processing_class.model_max_length = 16
        return Spy(*models, processing_class=processing_class, **given)

    trainer = make(tmp_path, kind=spy)
    said = "longer than the specified maximum"
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert said not in caplog.text
    trainer._tokenizer("w1 " * 20)
    assert said in caplog.text


def words(*tokens, special=()):
    """A tokenizer of these words, without an unknown one."""
    vocabulary = {token: i for i, token in enumerate((*tokens, *special))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


@pytest.mark.parametrize(
    "tokenizer",
    [words(special=("a", "b", "c")), words("a", "b", "+", "=")],
    ids=["special tokens alone", "no space"],
)
def test_small_vocabularies_cut_nothing(tokenizer):
    check_whole(lambda text: tokenizer(text)["input_ids"], tokenizer, 64)
    assert has_words(tokenizer)
