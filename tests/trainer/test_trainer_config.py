"""Settings of the trainer: which are accepted, and which key an error names."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import inspect
import pickle
import re
from types import SimpleNamespace

import numpy
import pytest

pytest.importorskip("trl", reason="the trainer needs trl")


from tropd_kernels import (
    AOPD,
    EOPD,
    GKD,
    LSM,
    OPD,
    SFT,
    TOPD,
    Divergence,
    PowerOPD,
    TrOPD,
    TrOPD_AOPD,
    trainer,
)
from tropd_kernels.objectives.registry import OBJECTIVES, build_rule, knobs, required_knobs
from tropd_kernels.trainer import TrOPDConfig, other_keys
from tropd_kernels.trainer.value_checks import check_checkpointing

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
HERE = dict(use_cpu=True, bf16=False, report_to="none")
URL = "http://127.0.0.1:1"
SHRINKS = dict(prefix_schedule="linear", prefix_length=4)


def config(**settings) -> TrOPDConfig:
    return TrOPDConfig("unused", **(HERE | settings))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({}, TrOPD()),
        ({"objective_kwargs": {"top_k": 8, "gate": "expected"}}, TrOPD(top_k=8, gate="expected")),
        ({"objective_kwargs": '{"top_k": null}'}, TrOPD(top_k=None)),
        (
            {"objective_kwargs": {"threshold": -5.0}, "kl_discount_factor": 0.5},
            TrOPD(threshold=-5.0),
        ),
        ({"prefix_weight": 0.5, "lmbda": 0.5}, TrOPD(prefix_weight=0.5)),
        ({"prefix_weight": None}, TrOPD(prefix_weight=None)),
        ({"objective": "opd", "objective_kwargs": {"kl_penalty_coef": 0.5}},
         OPD(kl_penalty_coef=0.5)),
        ({"objective": "gkd"}, GKD(0.5)),
        ({"objective": "gkd", "beta": 0.1}, GKD(0.1)),
        ({"objective": "gkd", "beta": 1.0}, GKD(1.0)),
        ({"objective": "jsd", "beta": 0.0}, Divergence("forward_kl")),
        ({"objective": "forward_kl", "objective_kwargs": {"top_k": 4}},
         Divergence("forward_kl", top_k=4)),
        ({"objective": "reverse_kl", "objective_kwargs": {"top_k": 4, "top_k_ids": "student"}},
         Divergence("reverse_kl", top_k=4, top_k_ids="student")),
        ({"objective": "lsm"}, LSM()),
        ({"objective": "eopd"}, EOPD()),
        ({"objective": "aopd"}, AOPD()),
        ({"objective": "tropd_aopd"}, TrOPD_AOPD()),
        ({"objective": "topd"}, TOPD(alpha=0.2)),
        ({"objective": "power_opd"}, PowerOPD(alpha=5.0)),
        ({"objective": "topd", "objective_kwargs": {"alpha": 0.3}}, TOPD(alpha=0.3)),
        ({"objective": "sft"}, SFT()),
        ({"objective": "sft", "objective_kwargs": {"label_smoothing": 0.1, "z_loss": 1e-4}},
         SFT(label_smoothing=0.1, z_loss=1e-4)),
    ],
)  # fmt: skip
def test_settings_make_the_rule(settings, rule):
    assert config(**settings).rule() == rule


@pytest.mark.parametrize("name", OBJECTIVES)
def test_knobs_are_the_constructor_s(name):
    """A knob that is listed and not taken, or taken and not listed, would mislead."""
    needed = dict.fromkeys(required_knobs(name), 0.5)
    for knob in set(knobs(name)) - needed.keys():
        value = inspect.signature(OBJECTIVES[name]).parameters[knob].default
        build_rule(name, needed | ({} if value is inspect.Parameter.empty else {knob: value}))
    others = {k for other in OBJECTIVES for k in knobs(other)} - set(knobs(name))
    for knob in others:
        with pytest.raises((TypeError, ValueError)):
            build_rule(name, needed | {knob: 0.25})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "tropdd"}, "unknown 'tropdd' (did you mean 'tropd'?)"),
        ({"objective": "veto"}, "objective 'veto' needs student_power, which has no default"),
        ({"objective": "kdrl"}, "objective: 'kdrl' reads task_advantages= in every call"),
        ({"objective": "opdvr"},
         "or give reward functions and the objective {'reward_filter': 'agree_scaled'}. Known"),
        ({"objective": "TrOPD"}, "unknown 'TrOPD' (did you mean 'tropd'?)"),
        ({"objective_kwargs": "{top_k: 8}"}, "objective_kwargs: '{top_k: 8}' is no JSON: Expect"),
        ({"model_init_kwargs": "{x"}, "model_init_kwargs: '{x' is no JSON"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be a whole"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: must be a whole"),
        ({"per_device_eval_batch_size": 2.5},
         "per_device_eval_batch_size: expected a whole number, got 2.5: give that, or leave the"),
        ({"learning_rate": "1e-4"}, "learning_rate: expected a number, got '1e-4'"),
        ({"learning_rate": float("nan")}, "learning_rate: must be in"),
        ({"weight_decay": -0.1}, "weight_decay: must be in"),
        ({"adam_beta1": 1.5}, "adam_beta1: must be in"),
        ({"adam_epsilon": -1.0}, "adam_epsilon: must be in"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: must be in [0, inf]"),
        ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha: must be in"),
        ({"eval_delay": -1, "eval_strategy": "epoch"}, "eval_delay: must be in"),
        ({"seed": -1}, "seed: must be in"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers: must be a whole number"),
        ({"save_total_limit": 0}, "save_total_limit: must be at least 1 checkpoint, got 0: "),
        ({"save_steps": 0}, "save_steps: must be positive, got 0; save_strategy 'no'"),
        ({"save_steps": 0, "save_strategy": "no"}, "save_steps: it would have no effect: "),
        ({"eval_steps": 0, "eval_strategy": "steps"}, "eval_steps: must be positive"),
        ({"max_steps": 0}, "max_steps: must be at least 1, or -1 for num_train_epochs, got 0"),
        ({"num_train_epochs": 0}, "num_train_epochs: must be positive, got 0"),
        ({"log_level": "loud"}, "log_level: must be one of detail, "),
        ({"temperature": "1"}, "temperature: expected a number, got '1'"),
        ({"max_completion_length": "5"}, "max_completion_length: expected a whole number, got"),
        ({"max_steps": [3]}, "max_steps: expected a whole number, got [3]"),
        ({"num_iterations": True}, "num_iterations: expected a whole number, got True"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"max_grad_norm": None}, "max_grad_norm: expected a number, got None"),
        ({"log_regions": "no"}, "log_regions: expected true or false, got 'no'"),
        ({"objective": ["tropd"]}, "objective: expected a name, a TokenRule, a mapping of its"),
        ({"prefix_column": 3}, "prefix_column: expected text, got 3"),
        ({"eval_strategy": True}, "eval_strategy: True is not a valid IntervalStrategy"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: cosin is not a valid"),
        ({"generation_kwargs": "top_p"}, "generation_kwargs: expected a mapping, got 'top_p'"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: expected a mapping, got [1]"),
        ({"top_k": -3}, "top_k: must be a whole number of at least 0, got -3"),
        ({"top_p": 2.0}, "top_p: must be in [0, 1], got 2.0"),
        ({"min_p": 2.0}, "min_p: must be in [0, 1], got 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: must be positive, got 0"),
        ({"generation_kwargs": {"num_return_sequences": 2}},
         "generation_kwargs: 'num_return_sequences' is not taken: each prompt gets one completion"),
        ({"generation_kwargs": '{"n": 2}'}, "generation_kwargs: 'n' is not taken: each prompt"),
        ({"generation_kwargs": {"max_new_tokens": 4}},
         "generation_kwargs: 'max_new_tokens' is not taken: set max_completion_length"),
        ({"generation_kwargs": {"max_tokens": 4}}, "'max_tokens' is not taken: set max_completion"),
        ({"generation_kwargs": {"eos_token_id": [2, 7]}},
         "generation_kwargs: 'eos_token_id' is not taken: set the student's generation_config"),
        ({"generation_kwargs": {"stop_strings": ["w1"]}}, "'stop_strings' is not taken"),
        ({"generation_kwargs": {"return_dict_in_generate": True}},
         "'return_dict_in_generate' is not taken: the trainer reads the completions' ids alone"),
        ({"generation_kwargs": {"output_scores": True}}, "'output_scores' is not taken"),
        ({"generation_kwargs": {"max_length": 4}}, "'max_length' is not taken: set max_completion"),
        ({"generation_kwargs": {"disable_compile": True}}, "is not taken: generation is never"),
        # TRL has values of its own for these, which None would undo.
        ({"generation_kwargs": {"disable_compile": False}}, "is not taken: generation is never"),
        ({"generation_kwargs": {"max_new_tokens": None}}, "'max_new_tokens' is not taken: set max"),
        ({"generation_kwargs": {"eos_token_id": None}}, "'eos_token_id' is not taken: set the stu"),
        ({"generation_kwargs": {"max_tokens": None}, "use_vllm": True}, "'max_tokens' is not"),
        ({"generation_kwargs": {"stop": ["."]}, "use_vllm": True}, "'stop' is not taken: complet"),
        ({"generation_kwargs": {"repetition_penaltyy": 5.0}},
         "generation_kwargs: 'repetition_penaltyy' is no key of transformers' GenerationConfig "
         "(did you mean 'repetition_penalty'?)"),
        ({"generation_kwargs": {"custom_generate": "x"}}, "'custom_generate' is no key of trans"),
        ({"generation_kwargs": {"temperature": "1e-1"}},
         "generation_kwargs: temperature: expected a number, got '1e-1'"),
        ({"generation_kwargs": {"repetition_penalty": 0}},
         "generation_kwargs: repetition_penalty: must be positive, got 0"),
        ({"generation_kwargs": {"top_k": -1}}, "generation_kwargs: top_k: must be a whole number"),
        ({"generation_kwargs": {"num_assistant_tokens": 9}}, "is not taken: no assistant model"),
        ({"generation_kwargs": {"forced_bos_token_id": 7}}, "is not taken: it is of models with"),
        ({"generation_kwargs": {"length_penalty": 2.0}},
         "generation_kwargs: 'length_penalty' would have no effect: it belongs to a beam search"),
        ({"generation_kwargs": {"top_p": 1.5}}, "generation_kwargs: top_p: must be in [0, 1]"),
        ({"auto_find_batch_size": True},
         "auto_find_batch_size: after running out of memory"),
        ({"torch_compile": True}, "torch_compile: it would compile nothing"),
        ({"torch_compile_backend": "eager"}, "torch_compile: it would compile nothing"),
        ({"objective_kwargs": {"topk": 8}}, "objective_kwargs: no objective has a knob 'topk'"),
        ({"objective_kwargs": {"alpha": 0.1}},
         "'tropd' takes no 'alpha'; it belongs to power_opd, topd, skew_forward, skew_reverse"),
        ({"objective_kwargs": {"beta": 0.1}}, "objective_kwargs: 'beta' is a key of its own"),
        ({"objective_kwargs": {"gate": "never"}}, "objective_kwargs: tropd: gate must be one of"),
        ({"objective_kwargs": [1]}, "objective_kwargs: expected a mapping"),
        ({"objective_kwargs": "top_k=4"},
         "got 'top_k=4': as a flag it is JSON, such as --objective_kwargs '{\"top_k\": 4}'"),
        ({"beta": 0.5}, "objective 'tropd' takes no 'beta'; it belongs"),
        ({"lmbda": None}, "lmbda: expected a number, got None"),
        ({"prefix_schedule": "linear", "prefix_length": 4.5}, "prefix_length: expected a whole"),
        ({"max_workspace_bytes": -1}, "max_workspace_bytes: must be a whole number"),
        ({"gradient_tolerance": 1.0}, "gradient_tolerance: must be a number in [0, 1), got 1.0"),
        ({"gradient_tolerance": 0.1, "gradient_sampling": 2.0},
         "gradient_sampling: must be None or a number in (0, 1], got 2.0"),
        ({"gradient_sampling": 0.0}, "gradient_sampling: must be None or a number in (0, 1]"),
        ({"gradient_sampling": 0.5, "gradient_tolerance": 0.1},
         "gradient_tolerance: gradient_tolerance=0.1 and gradient_sampling=0.5 both"),
        ({"gradient_sampling": 0.5, "backend": "reference"},
         "gradient_sampling: backend='reference' takes no gradient_sampling"),
        ({"teacher_model_server_url": "localhost:9"}, "must begin with http:// or https://"),
        ({"beta": 2.0, "objective": "gkd"}, "beta"),
        ({"objective": "gkd", "prefix_weight": 0.5}, "prefix_weight: objective 'gkd' takes no"),
        ({"stage_fraction": 0.5}, "stage_fraction: objective 'tropd' takes no"),
        ({"objective": "reopold", "stage_fraction": 1.5}, "stage_fraction: must be in [0, 1]"),
        ({"objective": "reopold", "stage_fraction": 0.5, "objective_kwargs": {"stage": 2}},
         "stage_fraction: objective_kwargs holds the run at stage 2: give one of the two"),
        ({"prefix_schedule": "cosin"}, "prefix_schedule: must be one of none, cosine, linear"),
        ({"prefix_schedule": "cosine"}, "prefix_length: 0 with prefix_schedule 'cosine'"),
        ({"prefix_length": 4}, "prefix_length: 4 with prefix_schedule 'none'"),
        ({"prefix_length": -1}, "prefix_length: must be a whole number of at least 0"),
        ({"prefix_schedule": "linear", "prefix_length": 600}, "prefix_length: 600 is more than"),
        ({"prefix_fraction": 1.5}, "prefix_fraction: must be in [0, 1]"),
        ({"prefix_steps": -1}, "prefix_steps"),
        (SHRINKS | {"prefix_steps": 0}, "prefix_steps: must be a whole number of at least 1"),
        (SHRINKS | {"prefix_fraction": 0.0}, "prefix_fraction: 0.0 of the run's steps are none"),
        (SHRINKS | {"prefix_fraction": 0.05, "max_steps": 10},
         "prefix_fraction: 0.05 of the run's steps are none, of 10: "),
        ({"kl_discount_factor": 1.1}, "kl_discount_factor: must be in [0, 1]"),
        ({"kl_discount_factor": 0.9, "objective": "gkd"}, "kl_discount_factor: objective 'gkd'"),
        ({"importance_gamma": -1.0}, "importance_gamma: must be in"),
        ({"importance_gamma": 0.5, "objective": "sft"}, "importance_gamma: objective 'sft'"),
        ({"temperature": 0.0}, "temperature: must be positive"),
        ({"max_completion_length": None}, "max_completion_length: must be at least 1"),
        ({"backend": "cuda"}, "backend: backend must be None or one of"),
        ({"teacher_model_server_url": URL, "objective": "gkd"},
         "teacher_model_server_url: objective 'gkd': TokenRule"),
        ({"teacher_model_server_url": URL, "objective_kwargs": {"top_k": None}},
         "A HiddenTeacher is a teacher_model that is loaded in this process, or by "
         "teacher_server_protocol 'vllm_hidden_states' a served one"),
        ({"teacher_model_server_url": URL, "objective": "reverse_kl",
          "objective_kwargs": {"top_k": 4, "top_k_ids": "student"}},
         "which a TopKTeacher does not score"),
        ({"objective": "reverse_kl", "objective_kwargs": {"top_k_ids": "given"}},
         "which no config holds"),
        ({"teacher_model_server_url": URL, "temperature": 0.7},
         "temperature: a server of log-probs gives those at temperature 1, not 0.7: set "
         "temperature 1, or teacher_server_protocol 'vllm_hidden_states'"),
        ({"teacher_model_server_url": URL, "precomputed_teacher": True}, "give one of them"),
        ({"teacher_server_retries": -1}, "teacher_server_retries: must be a whole number"),
        ({"teacher_server_concurrency": 0}, "teacher_server_concurrency: must be"),
        ({"teacher_server_timeout": 0}, "teacher_server_timeout: must be in"),
        ({"precomputed_teacher": True, "objective": "reverse_kl"},
         "precomputed_teacher: objective 'reverse_kl'"),
        ({"precomputed_teacher": True, "prefix_schedule": "linear", "prefix_length": 4},
         "prefix_length: with precomputed_teacher"),
        ({"precomputed_teacher": True, "lmbda": 0.5}, "lmbda: with precomputed_teacher"),
        ({"lmbda": 1.5}, "lmbda: must be in [0, 1]"),
        ({"num_iterations": 0}, "num_iterations: must be a whole number of at least 1"),
        ({"drift_tau": 1.0}, "drift_tau: with num_iterations 1"),
        (
            {"objective": "eopd", "objective_kwargs": {"clip_ratio": 0.1}},
            "objective_kwargs: clip_ratio: it would have no effect: with num_iterations 1",
        ),
        (
            {"objective": "reopold", "objective_kwargs": {"stage": 1, "entropy_quantile": 0.1}},
            "objective_kwargs: entropy_quantile: it would have no effect: with stage 1",
        ),
        (
            {"objective_kwargs": {"threshold": -9.0}},
            "objective_kwargs: threshold: it would have no effect: with gate 'bernoulli'",
        ),
        ({"drift_tau": 0.0, "num_iterations": 2}, "drift_tau: must be in"),
        ({"drift_block_size": 0}, "drift_block_size: must be"),
        ({"logging_steps": -1}, "logging_steps: must be positive, got -1"),
        ({"report_to": None}, "report_to: expected 'none', 'all' or names out of azure_ml, "),
        ({"report_to": ["wandb", "tensorbord"]}, "report_to: expected 'none', 'all' or names out"),
        ({"accelerator_config": "missing.json"},
         "accelerator_config: expected a mapping or a file of one: there is no file missing.json"),
        ({"fsdp": True, "fsdp_config": "missing.json"}, "fsdp_config: expected a mapping or a"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": True},
         "gradient_checkpointing_kwargs: expected a mapping, got True"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"reentrant": False}},
         "gradient_checkpointing_kwargs: 'reentrant' is no argument of a checkpoint, which takes"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"reentrant": false}'},
         "gradient_checkpointing_kwargs: 'reentrant' is no argument of a checkpoint, which takes"),
        ({"gradient_checkpointing": True,
          "gradient_checkpointing_kwargs": {"use_reentrant": "false"}},
         "gradient_checkpointing_kwargs: use_reentrant: expected true or false, got 'false'"),
        ({"optim": "sgd", "optim_args": {"momentum": 0.9}},
         "optim_args: expected name=value, separated by commas, got {'momentum': 0.9}"),
        ({"lr_scheduler_kwargs": "num_cycles=2"}, "lr_scheduler_kwargs: expected a mapping, got"),
        ({"lr_scheduler_kwargs": {"num_cycles"}}, "lr_scheduler_kwargs: expected a mapping, got"),
        ({"report_to": {"wandb": True}}, "report_to: expected 'none', 'all' or names out"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: must be a whole number of at least 1"),
        ({"pad_to_multiple_of": -4}, "pad_to_multiple_of: must be a whole number of at least 1"),
        ({"pad_to_multiple_of": "many"}, "pad_to_multiple_of: must be a whole number of at least"),
        ({"pad_to_multiple_of": 4.5}, "pad_to_multiple_of: must be a whole number of at least 1"),
        ({"model_init_kwargs": {"quantization_config": "int8"}},
         "model_init_kwargs: quantization_config: expected a mapping with a 'quant_method'"),
        ({"teacher_model_init_kwargs": {"quantization_config": "int8"}},
         "teacher_model_init_kwargs: quantization_config: expected a mapping with a 'quant"),
    ],
)  # fmt: skip
def test_error_names_the_key(settings, message):
    with pytest.raises(ValueError) as error:
        config(**settings)
    assert message in str(error.value)


def test_what_accelerate_is_launched_to_compile(monkeypatch):
    """By its flag or file, which set this variable. An earlier transformers puts `torch_compile`
    there as well, where the next config would find it."""
    key = "ACCELERATE_DYNAMO_BACKEND"
    monkeypatch.setenv(key, "NO")
    with pytest.raises(ValueError, match="^torch_compile: it would compile nothing"):
        config(torch_compile=True)
    config()
    monkeypatch.setenv(key, "INDUCTOR")
    with pytest.raises(ValueError, match=f"^{key}: it would compile nothing.*dynamo_backend"):
        config()


def test_a_precision_that_accelerate_is_launched_with(monkeypatch):
    key = "ACCELERATE_MIXED_PRECISION"
    for taken in ("no", "bf16"):
        monkeypatch.setenv(key, taken)
        assert config().mixed_precision == taken
    monkeypatch.setenv(key, "fp16")
    with pytest.raises(ValueError, match="^fp16: it would have no effect: on a CPU"):
        config(fp16=True)
    with pytest.raises(ValueError, match=f"^{key}: fp16 would have no effect: on a CPU"):
        config()


def test_checkpointing_of_an_earlier_transformers():
    """It knows one of the two keys."""
    args = SimpleNamespace(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_checkpointing(args)
    args.gradient_checkpointing_kwargs["reentrant"] = False
    with pytest.raises(ValueError, match="^gradient_checkpointing_kwargs: 'reentrant' is no"):
        check_checkpointing(args)


def test_a_folder_that_yaml_read_as_a_date():
    with pytest.raises(ValueError, match="^output_dir: expected a folder's name, got datetime.d"):
        TrOPDConfig(datetime.date(2026, 1, 2), **HERE)


def test_a_no_that_yaml_read_as_false():
    """`save_strategy: no` is a bool by YAML 1.1, and no strategy of transformers'."""
    keys = ("eval_strategy", "logging_strategy", "save_strategy")
    read = config(**dict.fromkeys(keys, False))
    assert [getattr(read, key).value for key in keys] == ["no"] * 3


def test_whole_numbers_for_the_samplers():
    """transformers' would refuse them at the first generation, for being no float."""
    read = config(temperature=2, repetition_penalty=2)
    assert type(read.temperature) is type(read.repetition_penalty) is float


def test_numbers_of_numpy():
    assert config(learning_rate=numpy.float32(1e-3), max_steps=numpy.int64(3)).max_steps == 3


@pytest.mark.parametrize("key", ["objectiv", "learning_rat"])
def test_an_unknown_key_names_the_nearest(key, tmp_path):
    near = {"objectiv": "objective", "learning_rat": "learning_rate"}[key]
    with pytest.raises(TypeError, match=f"TrOPDConfig: unknown key {key!r} .did you mean {near!r}"):
        TrOPDConfig(str(tmp_path), **{key: "gkd"})


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("max_length", "give max_completion_length"), ("max_prompt_length", "give a data set"),
        ("torch_dtype", "give dtype in model_init_kwargs"), ("packing", "leave it out"),
        ("attn_implementation", "give attn_implementation in model_init_kwargs"),
        ("lora_r", "give peft_config to TrOPDTrainer"), ("lora_rank", "give peft_config"),
        ("teacher_model", "give teacher_model to TrOPDTrainer"), ("logging_dir", None),
        ("dataset_kwargs", None), ("eos_token", None), ("delta", None),
    ],
)  # fmt: skip
def test_a_key_of_another_config(key, instead):
    """It is answered by what it is here, and by no key that only looks like it."""
    words = f"unknown key {key!r}" + (f" .{instead}" if instead else "$")
    with pytest.raises(TypeError, match=words):
        config(**{key: 1})


def test_answers_for_other_keys_are_about_keys_that_there_are():
    known = {one.name for one in dataclasses.fields(trainer.TrOPDConfig)}
    arguments = inspect.signature(trainer.TrOPDTrainer.__init__).parameters
    assert {*other_keys.ARGUMENTS.values()} <= arguments.keys()
    for key, answer in other_keys.ANSWERS.items():
        if answer.startswith(("a ", "leave it out: ")):
            continue
        named = set(re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b|^\w+", answer)) - {key}
        of_models = {"dtype", "revision", "quantization_config", "attn_implementation"}
        assert named - of_models - {"clip_ratio_low", "clip_ratio_high"} <= known, key


def test_a_config_is_copied_and_pickled(tmp_path):
    config = TrOPDConfig(str(tmp_path), objective="gkd", use_cpu=True, bf16=False)
    assert pickle.loads(pickle.dumps(config)).objective == "gkd"
    assert copy.deepcopy(config).objective == "gkd"
    assert dataclasses.replace(config, objective="opd").objective == "opd"
    assert "objective" in inspect.signature(TrOPDConfig).parameters


def test_generation_kwargs_that_change_nothing_are_taken():
    plain = dict(
        num_return_sequences=1, return_dict_in_generate=False, output_scores=False, max_time=None,
        early_stopping=False, length_penalty=1.0, low_memory=False, num_beam_groups=1,
        diversity_penalty=0.0, stop_strings=None, forced_eos_token_id=None,
    )  # fmt: skip
    args = trainer.TrOPDConfig("unused", use_cpu=True, bf16=False, generation_kwargs=plain)
    assert args.generation_kwargs == plain
