"""Keys of `generation_kwargs` that do nothing, or another thing than their names say."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import torch
import transformers
from training import make
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from tropd_kernels.trainer import TrOPDConfig, generation_keys, sampling

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PREFIX = dict(prefix_schedule="constant", prefix_length=3)
STATIC, QUANTIZED = dict(cache_implementation="static"), dict(cache_implementation="quantized")


def config(given, **settings):
    defaults = dict(use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    return TrOPDConfig("unused", **(defaults | settings), generation_kwargs=given)


def test_no_key_is_overlooked():
    """One that a later transformers brings: look what it does to a completion."""
    acts = {"bad_words_ids", "sequence_bias", "suppress_tokens", "watermarking_config"}
    conditions = {name for names, *_ in generation_keys._CONDITIONS for name in names}
    known = vars(transformers.GenerationConfig()).keys() - generation_keys._OF_NO_SAMPLER
    assert known <= (
        acts | conditions | generation_keys._NOT_TAKEN.keys() | sampling.WHOLE.keys()
        | sampling._HARMLESS | set(generation_keys._FROM_THE_FIRST_TOKEN)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"penalty_alpha": 0.6}, "code from the hub"),
        ({"penalty_alpha": 0.6, "do_sample": False, "top_k": 4}, "code from the hub"),
        ({"dola_layers": "high"}, "code from the hub"),
        ({"force_words_ids": [[9]], "num_beams": 2}, "code from the hub"),
        ({"num_beam_groups": 2, "num_beams": 2}, "code from the hub"),
        ({"diversity_penalty": 0.5}, "code from the hub"),
        ({"low_memory": True, "num_beams": 2}, "takes it no more"),
        ({"token_healing": True}, "would not be the data set's"),
        ({"continuous_batching_config": {}}, "in one batch"),
        ({"min_length": 8}, "set min_new_tokens"),
        ({"encoder_repetition_penalty": 1.5}, "it favours the padding before a prompt"),
        ({"pad_token_id": -1}, "padded by the tokenizer's token"),
        ({"pad_token_id": 5000}, "padded by the tokenizer's token"),
        ({"bos_token_id": 5}, "prompts come as ids"),
    ],
    ids=str,
)
def test_keys_that_are_not_taken(given, remedy):
    """They change nothing, or fail when the first prompt is generated from."""
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"^generation_kwargs: '{name}' is not taken: .*{remedy}"):
        config(given)
    config({name: None})


@pytest.mark.parametrize(
    ("key", "idle", "active"),
    [
        ({"length_penalty": 2.0}, {}, {"num_beams": 2}),
        ({"early_stopping": True}, {}, {"num_beams": 2}),
        ({"renormalize_logits": True}, {}, {"num_beams": 2}),
        ({"prompt_lookup_num_tokens": 3}, {"num_beams": 2}, {}),
        ({"max_matching_ngram_size": 2}, {}, {"prompt_lookup_num_tokens": 3}),
        ({"max_cache_len": 2048}, {}, STATIC),
        ({"max_cache_len": 2048}, QUANTIZED, STATIC),
        ({"cache_config": {"backend": "quanto"}}, STATIC, QUANTIZED),
        (STATIC, {"use_cache": False}, {}),
        ({"temperature": 0.3}, {"do_sample": False}, {}),
        ({"top_p": 0.3}, {"do_sample": None}, {"do_sample": True}),
        ({"typical_p": 0.3}, {"do_sample": False, "num_beams": 2}, {"num_beams": 2}),
        ({"top_h": 0.3}, {"do_sample": False}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_act_beside_others(key, idle, active):
    (name,) = key
    with pytest.raises(
        ValueError, match=f"^generation_kwargs: '{name}' would have no effect: .*, or leave it out$"
    ):
        config(key | idle)
    assert config(key | active).generation_kwargs == key | active


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_new_tokens": 50}, "'min_new_tokens': with 50 no completion would end within max_c"),
        (
            {"exponential_decay_length_penalty": [10, 1.5]},
            "'exp.*' would have no effect: it begins",
        ),
        (
            {"exponential_decay_length_penalty": ["a", 1.1]},
            "'exponential_decay_length_penalty': expected a start in tokens and a factor",
        ),
        (
            {"exponential_decay_length_penalty": [3]},
            "'exp.*': expected a start in tokens and a fac",
        ),
        ({"watermarking_config": {"foo": 2}}, "transformers refuses them: Watermarking.* 'foo'"),
        ({"watermarking_config": {"greenlist_ratio": 2}}, "transformers refuses them: .*greenlist"),
        ({"early_stopping": "soon", "num_beams": 2}, "transformers refuses them: `early_stopping`"),
        ({"guidance_scale": "a"}, "guidance_scale: expected a number, got 'a'"),
        (STATIC | {"max_cache_len": 10}, "'max_cache_len' would have no effect: a static cache"),
    ],
    ids=str,
)
def test_values_that_fail_later_or_reach_no_completion(given, words):
    with pytest.raises(ValueError, match=f"^generation_kwargs: {words}"):
        config(given, max_completion_length=10)
    for taken in (
        {"min_new_tokens": 10}, {"exponential_decay_length_penalty": [9, 1.5]},
        STATIC | {"max_cache_len": 11},
    ):  # fmt: skip
        config(taken, max_completion_length=10)


@pytest.mark.parametrize(
    ("given", "setting", "words"),
    [
        ({"do_sample": False}, {"top_p": 0.5}, "^top_p: it would have no effect: with do_sample F"),
        ({"do_sample": False}, {"top_k": 5}, "^top_k: it would have no effect: with do_sample Fal"),
        ({"use_cache": False}, STATIC, "^cache_implementation: it would have no effect: with use_"),
        (None, {"cache_implementation": "paged"}, "^cache_implementation: 'paged' would have no e"),
        ({"cache_implementation": "paged"}, {}, "^cache_implementation: 'paged' would have no ef"),
    ],
)
def test_settings_that_generation_kwargs_leave_without_effect(given, setting, words):
    with pytest.raises(ValueError, match=words):
        config(given, **setting)
    if setting.get("cache_implementation") != "paged":
        config(None, **setting)


@pytest.mark.parametrize(
    ("given", "neutral"),
    [
        ({"min_new_tokens": 6}, 0),
        ({"begin_suppress_tokens": [2]}, []),
        ({"exponential_decay_length_penalty": [6, 3.0]}, None),
        ({"guidance_scale": 1.5}, 1.0),
        ({"encoder_no_repeat_ngram_size": 2}, 0),
    ],
    ids=str,
)
def test_keys_that_count_from_where_the_student_begins(given, neutral):
    """Behind a teacher's prefix that is not the completion's beginning."""
    (name,) = given
    with pytest.raises(
        ValueError, match=f"^generation_kwargs: '{name}' goes by where .*: set prefix_schedule 'no"
    ):
        config(given, **PREFIX)
    for taken, settings in ((given, {}), ({name: neutral}, PREFIX), (given, {"lmbda": 0.5})):
        assert config(taken, **settings).generation_kwargs == taken


def test_the_same_of_vllm():
    for name in ("min_tokens", "presence_penalty", "frequency_penalty", "thinking_token_budget"):
        with pytest.raises(ValueError, match=f"^generation_kwargs: '{name}' goes by where"):
            config({name: 1}, use_vllm=True, **PREFIX)
        config({name: 1}, use_vllm=True)
    regex = dict(use_vllm=True, vllm_structured_outputs_regex="a+")
    with pytest.raises(ValueError, match=r"^vllm_structured_outputs_regex: goes by where"):
        config(None, **regex, **PREFIX)
    config(None, **regex)


def test_prompt_lookup(tmp_path):
    """One prompt at a time; tokens are drawn as without, and nothing is warned of."""
    lookup = {"generation_kwargs": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}}
    one = dict(per_device_train_batch_size=1, per_device_eval_batch_size=1)
    words = "^generation_kwargs: 'prompt_lookup_num_tokens' goes with one prompt at a time, not w"
    for settings, rows in (
        (dict(per_device_train_batch_size=2), "2: set per_device_train"),
        (one | dict(gradient_accumulation_steps=3), "3: set per_device_train_batch_size and grad"),
        (one | dict(per_device_eval_batch_size=8, evaluate=tiny.prompts(2)), "8: set per_device_e"),
    ):
        with pytest.raises(ValueError, match=f"{words}ith {rows}"):
            make(tmp_path, **lookup, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = make(tmp_path, evaluate=tiny.prompts(2), **lookup, **one)
        trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"typical_p": 1.5}, "must be in"), ({"typical_p": -1.0}, "must be in"),
        ({"top_h": 2.0}, "must be in"), ({"epsilon_cutoff": 2.0}, "must be in"),
        ({"eta_cutoff": -1}, "must be in"), ({"no_repeat_ngram_size": -2}, "must be in"),
        ({"no_repeat_ngram_size": 1.5}, "expected a whole number, got 1.5"),
        ({"num_beams": 0}, "must be in"), ({"min_new_tokens": -3}, "must be in"),
        ({"min_new_tokens": 2.5}, "expected a whole number"),
        ({"encoder_no_repeat_ngram_size": -1}, "must be in"),
        ({"prefill_chunk_size": 0}, "must be in"), ({"prompt_lookup_num_tokens": 0}, "must be in"),
        ({"do_sample": "no"}, "expected true or false, got 'no'"), ({"use_cache": 3}, "expected t"),
        ({"suppress_tokens": 5}, "expected a list of ids, got 5"),
        ({"begin_suppress_tokens": "5"}, "expected a list of ids, got '5'"),
        ({"num_beams": 2, "length_penalty": "a"}, "expected a number, got 'a'"),
    ],
    ids=str,
)  # fmt: skip
def test_values_beyond_their_bounds(given, words):
    """They change nothing, or fail when the first prompt is generated from."""
    name = list(given)[-1]
    with pytest.raises(ValueError, match=f"^generation_kwargs: {name}: {words}"):
        config(given)
    config({key: None if key == name else value for key, value in given.items()})


@pytest.mark.parametrize(
    ("setting", "given", "words"),
    [
        ({"top_p": 0.8}, {"top_p": 0.5}, "^top_p: it is 0.8, and 0.5 in generation_kwargs"),
        ({"top_k": 5}, {"top_k": 7}, "^top_k: it is 5, and 7 in generation_kwargs"),
        ({"top_k": 5}, {"top_k": None}, "^top_k: it is 5, and 0 in generation_kwargs"),
        ({"min_p": 0.1}, {"min_p": None}, "^min_p: it is 0.1, and None in"),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.0}, "it is 1.2, and 1.0 in"),
        (STATIC, QUANTIZED, "^cache_implementation: it is 'static', and 'quantized' in"),
        ({"use_vllm": True, "top_p": 0.8}, {"top_p": 0.5}, "^top_p: it is 0.8, and 0.5 in"),
        ({"use_vllm": True, "vllm_structured_outputs_regex": "a+"}, {"structured_outputs": None},
         "^vllm_structured_outputs_regex: it is 'a\\+', and generation_kwargs have structured_ou"),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_with_two_values(setting, given, words):
    """transformers and vLLM take that of generation_kwargs, or, of the regex, either."""
    with pytest.raises(ValueError, match=words):
        config(given, **setting)


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ({"top_p": 0.8}, {"top_p": 0.8}),
        ({"top_p": 1.0}, {"top_p": 0.8}),  # its default
        ({"top_k": 5}, {"top_k": 5}),
        ({"min_p": 0.0}, {"min_p": None}),
        (STATIC, STATIC),
        # A server that writes for the teacher is sent the config's.
        (dict(teacher_model_server_url="http://127.0.0.1:1", top_p=0.8) | PREFIX, {"top_p": 0.5}),
    ],
    ids=str,
)
def test_a_setting_given_twice_that_is_no_conflict(setting, given):
    assert config(given, **setting).generation_kwargs == given


@pytest.mark.parametrize(
    "given",
    [
        {"sequence_bias": {}}, {"bad_words_ids": []}, {"bad_words_ids": [5]},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_which_no_sampler_is_made(tmp_path, given):
    with pytest.raises(ValueError, match="^generation_kwargs: transformers refuses them: "):
        make(tmp_path, objective="gkd", generation_kwargs=given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bad_words_ids": [[2]]}, r"\[2\] would have no effect: 2 ends a completion"),
        ({"bad_words_ids": [[9], [3]]}, r"\[3\] would have no effect: .*: use 'suppress_tokens'"),
        ({"bad_words_ids": [[9, 96]]}, "96 is none of the student's ids, 0 to 95"),
        ({"suppress_tokens": [5, 96]}, "96 is none of the student's ids"),
        ({"suppress_tokens": (-1,)}, "-1 is none of the student's ids"),
        ({"suppress_tokens": [5.5]}, "5.5 is none of the student's ids"),
        ({"begin_suppress_tokens": [96]}, "96 is none of the student's ids"),
        ({"sequence_bias": {(5, 96): 1.0}}, "96 is none of the student's ids"),
        ({"sequence_bias": [[[96], 1.0]]}, "96 is none of the student's ids"),
        ({"sequence_bias": [[[], 1.0]]}, "an entry without ids has no effect"),
        ({"sequence_bias": [[[5], 1.0], [[5], 2.0]]}, r"\[5\] has two biases, 1.0 and 2.0"),
        ({"sequence_bias": {(5,): 0.0}}, r"\[5\] has the bias 0, which has no effect"),
    ],
    ids=str,
)
def test_ids_that_transformers_drops(tmp_path, given, words):
    """Or, of a bias, refuses when the first prompt is generated from."""
    (name,) = given
    with pytest.raises(ValueError, match=f"^generation_kwargs: '{name}': {words}"):
        make(tmp_path, generation_kwargs=given)


def test_ends_that_are_not_written(tmp_path):
    """By the key that the refusal of bad_words_ids names, and by words that end in an end."""
    for given in (
        {"suppress_tokens": [2, 3], "begin_suppress_tokens": [0]},
        {"sequence_bias": [[[2], -1e9], [[3], -1e9]], "bad_words_ids": [[5, 2], [95]]},
    ):
        trainer = make(tmp_path, objective="gkd", generation_kwargs=given)
        trainer.train()
        for batch in trainer.batches:
            assert batch["completion_mask"].bool().all()  # none ended early
            assert not torch.isin(batch["completion_ids"], torch.tensor([2, 3])).any()


def test_values_of_which_a_sampler_is_made(tmp_path):
    """Each key that acts, together, so that the check refuses none of them."""
    given = {
        "sequence_bias": {(5,): 1.0}, "bad_words_ids": [[5, 6]], "suppress_tokens": [7],
        "exponential_decay_length_penalty": (2, 1.1), "guidance_scale": 1.5, "min_new_tokens": 2,
        "no_repeat_ngram_size": 3, "num_beams": 2,
        "begin_suppress_tokens": [8], "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01,
        "encoder_no_repeat_ngram_size": 3, "renormalize_logits": True, "watermarking_config": {},
        "top_h": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "remove_invalid_values": True,
    }  # fmt: skip
    make(tmp_path, objective="gkd", generation_kwargs=given)


def test_a_cache_that_cannot_be_made(tmp_path):
    """Said before the first step; one that can be is used."""
    student = tiny.model(0, kind=transformers.RwkvForCausalLM, config=transformers.RwkvConfig)
    with pytest.raises(
        ValueError, match="^cache_implementation: 'static' would have no effect: a R"
    ):
        make(tmp_path, student, **STATIC)
    for kind in [kind for kind in ALL_CACHE_IMPLEMENTATIONS if "offloaded" in kind]:
        with pytest.raises(ValueError, match=f"^cache_implementation: '{kind}' .* on a CPU"):
            make(tmp_path, cache_implementation=kind)
    for given, words in (
        ({"backend": "of tomorrow"}, "of tomorrow"),
        ({"backend": "fp8", "bits": 3}, "bits"),
    ):
        settings = dict(generation_kwargs={"cache_config": given}, objective="gkd", **QUANTIZED)
        with pytest.raises(ValueError, match=f"^cache_implementation: 'quantized' .*{words}"):
            make(tmp_path, **settings)
    if not transformers.utils.is_optimum_quanto_available():
        with pytest.raises(
            ValueError, match="^cache_implementation: 'quantized' .* optimum-quanto"
        ):
            make(tmp_path, objective="gkd", **QUANTIZED)


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.3},
        {"generation_kwargs": {"no_repeat_ngram_size": 1}},
        {"generation_kwargs": {"encoder_no_repeat_ngram_size": 1}},
    ],
    ids=str,
)
def test_padding_that_is_an_end_is_not_counted_as_written(tmp_path, given, monkeypatch):
    """Padded rows once ended later than the same rows alone."""
    make(tmp_path, objective="gkd", **given)
    end = tiny.tokenizer()
    end.pad_token = end.eos_token
    monkeypatch.setattr(tiny, "tokenizer", lambda: end)
    words = r"_(penalty|ngram_size): .* give the tokenizer a pad_token"
    with pytest.raises(ValueError, match=words):
        make(tmp_path, objective="gkd", **given)
    make(tmp_path, objective="gkd", repetition_penalty=1.0)


def test_a_cache_beside_a_model_that_wants_none(tmp_path):
    student = tiny.model(0)
    student.generation_config.use_cache = False
    with pytest.raises(ValueError, match="^cache_implementation: 'static' .*set use_cache true"):
        make(tmp_path, student, objective="gkd", **STATIC)
    make(tmp_path, student, objective="gkd", **STATIC, generation_kwargs={"use_cache": True})


def test_two_temperatures(tmp_path):
    """One of the loss, another of the sampler: both act, which is said."""
    words = "temperature: 2 is the loss's alone, for .* have completions sampled at 0.5"
    two = dict(objective="gkd", temperature=2.0)
    for given in ({"temperature": 0.5}, {"temperature": 0.5, "top_k": 3}):
        with pytest.warns(UserWarning, match=words):
            make(tmp_path, **two, generation_kwargs=given)
    for settings in (
        two, two | {"generation_kwargs": {"temperature": 2.0}},
        dict(objective="gkd", generation_kwargs={"temperature": 0.5}),
        two | {"generation_kwargs": {"do_sample": False}},
    ):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            make(tmp_path, **settings)
