"""Every setting does something: those of transformers and TRL that would not are refused."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make

from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer
from tropd_kernels.trainer.effects import (
    BELONGS_TO,
    CONDITIONS,
    WITHOUT_EFFECT,
    check_inputs,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
#: What transformers' loop, accelerate, or TRL's trainer around our loss looks at. Before a name is
#: added here, see in their source that it reaches a run of TrOPDTrainer.
_EFFECTIVE = """
output_dir per_device_train_batch_size max_steps learning_rate
lr_scheduler_type warmup_ratio optim weight_decay gradient_accumulation_steps
max_grad_norm bf16 tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing use_liger_kernel neftune_noise_alpha
torch_empty_cache_steps logging_strategy logging_first_step log_on_each_node
logging_dir log_level log_level_replica disable_tqdm report_to run_name eval_strategy
per_device_eval_batch_size eval_on_start eval_use_gather_object
save_strategy save_on_each_node save_safetensors enable_jit_checkpoint push_to_hub hub_token
hub_private_repo hub_model_id hub_revision ignore_data_skip
restore_callback_states_from_checkpoint full_determinism seed use_cpu
accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
dataloader_pin_memory dataloader_prefetch_factor remove_unused_columns
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
ddp_timeout fsdp deepspeed debug skip_memory_metrics model_init_kwargs
trust_remote_code teacher_model_name_or_path teacher_model_revision teacher_model_init_kwargs
disable_dropout max_completion_length shuffle_dataset
pad_to_multiple_of temperature chat_template_kwargs max_tool_calling_iterations log_completions
"""
EFFECTIVE = set(_EFFECTIVE.split())
#: What acts under some settings only: a value, settings under which it does nothing, and others.
GUIDED = dict(prefix_schedule="linear", prefix_length=4)
_PRECOMPUTED = dict(precomputed_teacher=True)
_URL = dict(teacher_model_server_url="http://127.0.0.1:1")
_SGD = dict(optim="sgd")
_SERVER, _AT = dict(use_vllm=True, vllm_mode="server"), dict(vllm_server_base_url="http://a")
_TRACKIO = dict(report_to=["trackio"])
_VERIFIED = dict(num_generations=2, task_weight=1.0)
SOMETIMES = {
    "top_p": (0.5, _PRECOMPUTED, {}), "top_k": (5, _PRECOMPUTED, {}),
    "min_p": (0.1, _PRECOMPUTED, {}), "repetition_penalty": (1.3, _PRECOMPUTED, {}),
    "generation_kwargs": ({"num_beams": 2}, _PRECOMPUTED, {}),
    "cache_implementation": ("static", _PRECOMPUTED, {}), "use_vllm": (True, _PRECOMPUTED, {}),
    "teacher_server_timeout": (3.0, {}, _URL), "teacher_server_retries": (1, {}, _URL),
    "teacher_server_concurrency": (1, {}, _URL), "teacher_server_protocol": ("sglang", {}, _URL),
    "prefix_weight": (0.5, {}, GUIDED),
    "prefix_column": ("answer", {}, dict(lmbda=0.5)),
    "prefix_steps": (3, GUIDED | dict(prefix_schedule="constant"), GUIDED),
    "prefix_fraction": (0.5, GUIDED | dict(prefix_steps=3), GUIDED),
    "num_generations": (2, _PRECOMPUTED, {}),
    "kl_discount_factor": (0.5, dict(lmbda=0.0), dict(lmbda=0.5)),
    "importance_gamma": (0.5, dict(lmbda=0.0), dict(lmbda=0.5)),
    "data_seed": (99, dict(shuffle_dataset=False), {}),
    "drift_tau": (1.0, dict(lmbda=0.0, num_iterations=2), dict(num_iterations=2)),
    "drift_block_size": (8, dict(num_iterations=2), dict(num_iterations=2, drift_tau=1.0)),
    "teacher_sync_steps": (2, {}, dict(teacher_update_rate=0.5)),
    "reward_weights": ([2.0], dict(num_generations=2), _VERIFIED),
    "scale_rewards": ("batch", dict(num_generations=2), _VERIFIED),
    "max_workspace_bytes": (1000, dict(backend="reference"), dict(backend="torch")),
    "adam_beta1": (0.5, _SGD, dict(optim="lion_32bit")), "adam_beta2": (0.5, _SGD, {}),
    "adam_epsilon": (1e-6, dict(optim="lion_32bit"), {}),
    "optim_args": ("momentum=0.9", dict(optim="adamw_torch"), _SGD),
    "optim_target_modules": (["attn"], {}, dict(optim="galore_adamw")),
    "warmup_steps": (3, dict(lr_scheduler_type="constant"),
                     dict(lr_scheduler_type="constant", optim="schedule_free_adamw")),
    "ds3_gather_for_generation": (False, {}, None),  # DeepSpeed would have to be there
    "logging_steps": (3, dict(logging_strategy="epoch"), dict(logging_strategy="steps")),
    "num_train_epochs": (2, dict(max_steps=3), {}),
    "dataloader_in_order": (False, {}, dict(dataloader_num_workers=1)),
    "dataloader_persistent_workers": (True, {}, dict(dataloader_num_workers=1)),
    "dataloader_multiprocessing_context": ("spawn", {}, dict(dataloader_num_workers=1)),
    "vllm_server_host": ("a", _SERVER | _AT, _SERVER),
    "vllm_server_port": (9, dict(use_vllm=True), _SERVER),
    "save_total_limit": (2, dict(save_strategy="no"), {}),
    "save_only_model": (True, dict(save_strategy="no"), {}),
    "load_best_model_at_end": (True, dict(save_strategy="no"),
                               dict(save_strategy="epoch", eval_strategy="epoch")),
    "metric_for_best_model": ("eval_loss", {}, dict(eval_strategy="epoch")),
    "greater_is_better": (False, dict(eval_strategy="epoch"),
                          dict(eval_strategy="epoch", metric_for_best_model="eval_loss")),
    "hub_strategy": ("end", {}, dict(push_to_hub=True)),
    "hub_always_push": (True, {}, dict(push_to_hub=True)),
    "log_unique_prompts": (True, dict(log_completions=True),
                           dict(log_completions=True, report_to=["wandb"])),
    "project": ("a", {}, _TRACKIO), "trackio_space_id": ("a", dict(report_to=["wandb"]), _TRACKIO),
    "trackio_bucket_id": ("a", {}, _TRACKIO), "trackio_static_space_id": ("a", {}, _TRACKIO),
    "eval_steps": (3, dict(eval_strategy="epoch"), dict(eval_strategy="steps")),
    "eval_delay": (2, {}, dict(eval_strategy="epoch")),
    "save_steps": (3, dict(save_strategy="no"), dict(save_strategy="steps")),
    "fp16": (True, {}, None), "fsdp_config": ({"version": 2}, {}, dict(fsdp=True)),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, dict(lr_scheduler_type="constant_with_warmup"),
                            dict(lr_scheduler_type="cosine_with_restarts")),
}  # fmt: skip
#: What these schedules cannot do without, at the default learning rate.
NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1}, "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 1}, "greedy": {"min_lr": 0.0},
}  # fmt: skip
#: For the script that makes the trainer, or what happens in any case.
OF_THE_SCRIPT = {
    "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank",
    "prediction_loss_only",
}  # fmt: skip
REFUSED = {"auto_find_batch_size", "torch_compile", "torch_compile_backend", "torch_compile_mode"}
VALUES = {
    "eval_accumulation_steps": 2, "bf16_full_eval": True, "fp16_full_eval": True,
    "logging_nan_inf_filter": False,
    "label_smoothing_factor": 0.1, "average_tokens_across_devices": False,
    "include_num_input_tokens_seen": "all", "use_cache": True,
    "train_sampling_strategy": "group_by_length", "length_column_name": "size",
    "label_names": ["labels"], "include_for_metrics": ["inputs"], "batch_eval_metrics": True,
    "eval_do_concat_batches": False, "liger_kernel_config": {"rope": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "num_completions_to_print": 2,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers", "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": "a", "vllm_server_base_url": "http://a",
    "vllm_server_timeout": 9.0,
    "vllm_group_port": 9, "vllm_gpu_memory_utilization": 0.5, "vllm_max_model_length": 99,
    "vllm_tensor_parallel_size": 2,
}  # fmt: skip


def config(**settings):
    defaults = dict(use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    return TrOPDConfig("unused", **(defaults | settings))


def test_no_setting_is_overlooked():
    """One that a later transformers or TRL brings stands in no list: look what it does here."""
    sometimes = {key for condition in CONDITIONS for key in condition.keys}
    assert sometimes == SOMETIMES.keys()
    ours = set(TrOPDConfig.__annotations__) - sometimes
    lists = (ours, sometimes, EFFECTIVE, OF_THE_SCRIPT, REFUSED, WITHOUT_EFFECT.keys(),
             BELONGS_TO.keys())  # fmt: skip
    known = set().union(*lists)
    assert {field.name for field in fields(TrOPDConfig)} - known == set()
    assert sum(map(len, lists)) == len(known)


@pytest.mark.parametrize("key", [*WITHOUT_EFFECT, *BELONGS_TO])
def test_settings_without_effect(key):
    with pytest.raises(ValueError, match=f"^{key}: it .* effect"):
        config(**{key: VALUES[key]})


def test_label_smoothing_is_a_knob_of_sft():
    """... as the refusal of TRL's field says."""
    with pytest.raises(ValueError, match="with objective 'sft' set label_smoothing"):
        config(objective="sft", label_smoothing_factor=0.1)
    rule = config(objective="sft", objective_kwargs={"label_smoothing": 0.1}).rule()
    assert rule.label_smoothing == 0.1


@pytest.mark.parametrize("key", SOMETIMES)
def test_settings_without_effect_beside_others(key):
    """... are refused there, accepted elsewhere, and so is their default anywhere."""
    value, idle, active = SOMETIMES[key]
    with pytest.raises(ValueError, match=f"^{key}: it would have no effect: .*leave {key} out$"):
        config(**idle, **{key: value})
    made = [] if active is None else [config(**active, **{key: value}), config(**active)]
    for args in (*made, config(**idle)):
        assert replace(args) == args
    (default,) = (field.default for field in fields(TrOPDConfig) if field.name == key)
    config(**idle, **{key: default})


@pytest.mark.parametrize("settings", [{}, GUIDED])
def test_no_condition_refuses_a_default(settings):
    """Whatever the optimizer and the schedule."""
    for name in transformers.training_args.OptimizerNames:
        config(optim=name.value, **settings)
    for name in transformers.SchedulerType:
        given = {"lr_scheduler_kwargs": NEEDED[name.value]} if name.value in NEEDED else {}
        config(lr_scheduler_type=name.value, eval_strategy="epoch", **given, **settings)


@pytest.mark.parametrize("steps", [{"prefix_fraction": 0.5}, {"prefix_steps": 3}])
@pytest.mark.parametrize("schedule", [{}, GUIDED | dict(prefix_schedule="constant")])
def test_a_prefix_that_does_not_shrink(steps, schedule):
    with pytest.raises(ValueError, match="it would have no effect: with prefix_schedule '[a-z]*' "):
        config(**steps, **schedule)


def test_optimizers_that_take_no_settings_of_adam():
    """By what transformers gives them: `SOMETIMES` under every optimizer that can be made here."""
    from transformers import Trainer

    def theirs(**settings):
        return transformers.TrainingArguments("unused", use_cpu=True, **settings)

    model = torch.nn.Linear(2, 2)
    keys = {"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-3, "optim_args": "eps=0.125"}
    seen = set()
    for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        plain = Trainer.get_optimizer_cls_and_kwargs(theirs(optim=name), model)
        for key, value in keys.items():
            args = theirs(optim=name, **{key: value})
            changes = Trainer.get_optimizer_cls_and_kwargs(args, model) != plain
            seen.add(changes)
            try:
                config(optim=name, **{key: value})
                refused = False
            except ValueError as error:
                refused = str(error).startswith(f"{key}: it would have no effect")
            assert refused != changes, (name, key)
    assert seen == {True, False}


@pytest.mark.parametrize(
    "name", ["galore_adamw", "galore_adafactor", "galore_adamw_8bit_layerwise"]
)
def test_galore_takes_no_settings_of_adam(name):
    """transformers' maker of these optimizers never looks at them."""
    target = dict(optim=name, optim_target_modules=["q_proj"])
    config(**target, optim_args="rank=4")
    for key, value in {"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-3}.items():
        with pytest.raises(ValueError, match=f"^{key}: it would have no effect: the optimizer"):
            config(**target, **{key: value})


def test_settings_of_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="^max_tool_calling_iterations: it would have no effect"):
        make(tmp_path, max_tool_calling_iterations=2)
    options = dict(chat_template_kwargs={"padding": False})
    words = "^chat_template_kwargs: it would have no effect: the prompts are text"
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **options)
    with pytest.raises(ValueError, match=words):
        make(tmp_path, evaluate={"a": tiny.prompts(2)}, **options)
    talk = tiny.Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1"}]] * 8})
    make(tmp_path, data=talk, **options)
    none = dict.fromkeys(("train_dataset", "eval_dataset"))  # until evaluate() is given one
    check_inputs(config(**options), None, none, True)
    make(tmp_path, evaluate={"a": talk}, **options)
    make(tmp_path, data=tiny.prompts().to_list(), **options)
    make(tmp_path, data=tiny.prompts(teacher_prompt=talk["prompt"]), **options)
    with pytest.raises(ValueError, match=words):
        make(tmp_path, data=tiny.prompts(teacher_prompt=["w1"] * 8), **options)
    unread = tiny.prompts(
        teacher_prompt=talk["prompt"], completion_ids=[[5]] * 8, teacher_label_log_probs=[[-1]] * 8
    )
    with pytest.raises(ValueError, match=words):
        make(tmp_path, data=unread, precomputed_teacher=True, objective="opd", **options)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("momentom=0.9", "transformers passes no 'momentom' on to SGD"),
        ("momentum=0.9, foo=1", "transformers passes no 'foo' on to SGD"),
        ("lr=3", "lr is a key of its own: set learning_rate, or leave optim_args out"),
        ("weight_decay=0.1", "weight_decay is a key of its own"),
    ],
)
def test_arguments_that_no_optimizer_sees(given, words):
    with pytest.raises(ValueError, match=f"^optim_args: it would have no effect: {words}"):
        config(optim="sgd", optim_args=given)
    with pytest.raises(ValueError, match="^optim_args: expected name=value, separated by commas"):
        config(optim="sgd", optim_args="momentum")
    config(optim="sgd", optim_args="momentum=0.9, nesterov=true")
    config(optim="galore_adamw", optim_target_modules=["attn"], optim_args="rank=4")


def test_the_alias_that_was_given_is_named():
    known = {field.name for field in fields(TrOPDConfig)}  # one of them, in some transformers
    for name in known & {"activation_checkpointing", "gradient_checkpointing"}:
        key = f"{name}_kwargs"
        with pytest.raises(ValueError, match=f"^{key}: it has an effect with {name} True alone"):
            config(**{key: {"use_reentrant": False}})
        args = config(**{name: True, key: {"use_reentrant": False}})
        assert replace(args) == args


def test_what_zero_3_gathers():
    """Of DeepSpeed's stages the third alone; of one that is not known yet it may be."""
    (condition,) = (one for one in CONDITIONS if "ds3_gather_for_generation" in one.keys)
    for stage, acts in ((2, False), (3, True)):
        args = SimpleNamespace(deepspeed=None, deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        assert condition.acts(args) == acts
    assert condition.acts(SimpleNamespace(deepspeed="zero.json", deepspeed_plugin=None))


def test_what_an_earlier_transformers_puts_into_fsdp_config():
    """... of any config, and reads where accelerate's settings alone ask for FSDP."""
    (condition,) = (one for one in CONDITIONS if "fsdp_config" in one.keys)
    filled = dict.fromkeys(["min_num_params", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"], 0)
    assert condition.acts(SimpleNamespace(fsdp=[], fsdp_config=filled))


def test_steps_that_evaluation_takes_over():
    """transformers evaluates every logging_steps where eval_steps are not given."""
    args = config(logging_strategy="epoch", eval_strategy="steps", logging_steps=3)
    assert args.eval_steps == 3 and replace(args) == args
    assert replace(config(eval_strategy="steps"), eval_strategy="no").eval_strategy == "no"


@pytest.mark.parametrize(
    ("key", "value", "settings", "reason"),
    [
        ("cache_implementation", "static", dict(use_vllm=True), "vLLM has a cache of its own"),
        ("vllm_server_port", 9, _SERVER | _AT, "vllm_server_base_url has both, 'http://a'"),
        ("vllm_server_host", "a", {}, "there is no server of vLLM's"),
        ("log_unique_prompts", True, {}, "log_completions is False"),
        ("metric_for_best_model", "loss", {}, "eval_strategy is 'no'"),
        ("num_train_epochs", 2, dict(max_steps=3), "max_steps, 3, say where training ends"),
    ],
)
def test_other_reasons_to_have_no_effect(key, value, settings, reason):
    with pytest.raises(ValueError, match=f"^{key}: it would have no effect: {reason}: "):
        config(**settings, **{key: value})


def test_a_cache_beside_vllm_that_the_teacher_has():
    """It writes by transformers' generate."""
    args = config(use_vllm=True, cache_implementation="static", **GUIDED)
    assert args.cache_implementation == "static"


def test_vllm_mode():
    with pytest.raises(ValueError, match="^vllm_mode: must be server or colocate, got 'sever'"):
        config(use_vllm=True, vllm_mode="sever")


def test_settings_with_what_they_belong_to():
    config(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    config(log_completions=True, num_completions_to_print=2)
    vllm = config(use_vllm=True, vllm_mode="server", vllm_server_port=9)
    for args in (vllm, config(eval_strategy="steps", include_num_input_tokens_seen=False)):
        assert replace(args) == args
    with pytest.raises(ValueError, match="vllm_max_model_length: .* vllm_mode 'colocate' alone"):
        config(use_vllm=True, vllm_mode="server", vllm_max_model_length=99)


@pytest.mark.parametrize(
    ("key", "value"),
    [("teacher_model_init_kwargs", {"dtype": "auto"}), ("teacher_model_revision", "main"),
     ("teacher_model_name_or_path", "a")],
)  # fmt: skip
def test_settings_of_a_teacher_that_is_not_loaded(key, value):
    without = "it would have no effect: with {} no teacher is loaded"
    with pytest.raises(ValueError, match=f"^{key}: {without.format('precomputed_teacher')}"):
        config(precomputed_teacher=True, **{key: value})
    served = dict(teacher_model_server_url="http://127.0.0.1:1")
    if key == "teacher_model_name_or_path":  # the served name
        assert config(**served, **{key: value}).teacher_model_name_or_path == value
        return
    with pytest.raises(ValueError, match=f"^{key}: {without.format('teacher_model_server_url')}"):
        config(**served, **{key: value})


def test_settings_of_a_teacher_that_is_not_given(tmp_path):
    """SFT goes without one."""
    for key, value in (("teacher_model_init_kwargs", {"dtype": "auto"}),
                       ("teacher_model_revision", "main")):  # fmt: skip
        args = config(objective="sft", **{key: value})
        with pytest.raises(ValueError, match=f"^{key}: it would have no effect: there is no teach"):
            TrOPDTrainer(tiny.model(0), None, args, tiny.prompts(),
                         processing_class=tiny.tokenizer())  # fmt: skip


def test_how_to_load_a_model_that_is_loaded(tmp_path):
    options = {"dtype": "float32"}
    with pytest.raises(ValueError, match="^model_init_kwargs: the student is already a model"):
        make(tmp_path, model_init_kwargs=options)
    with pytest.raises(ValueError, match="^teacher_model_init_kwargs: the teacher is already a mo"):
        # Said before the student, of which there is nothing here, is looked for.
        make(tmp_path, student="/no/such/student", teacher_model_init_kwargs=options)


def test_without_a_config_the_folder_is_named_after_the_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class OnACpu(TrOPDConfig):
        def __init__(self, folder):
            super().__init__(folder, use_cpu=True, report_to="none")

    monkeypatch.setattr("tropd_kernels.trainer.trainer.TrOPDConfig", OnACpu)
    for name, folder in (("", "model"), ("/models/small/", "small"), ("a/tiny-1B", "tiny-1B")):
        student = tiny.model(0)
        student.config._name_or_path = name
        trainer = TrOPDTrainer(student, tiny.model(1), processing_class=tiny.tokenizer())
        assert trainer.args.output_dir == f"{folder}-TrOPD"


def opt(p):
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=tiny.VOCAB, hidden_size=32, ffn_dim=32, num_hidden_layers=2,
            num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64,
            dropout=p, attention_dropout=p, layerdrop=p,
        )
    )  # fmt: skip


def persimmon(p):
    return tiny.model(
        0, kind=transformers.PersimmonForCausalLM, config=transformers.PersimmonConfig,
        attention_dropout=p,
    )  # fmt: skip


def gpt2(p):
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=tiny.VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64,
            bos_token_id=1, eos_token_id=2, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "made", [opt, persimmon, gpt2, lambda p: tiny.model(0, attention_dropout=p)],
    ids=["opt", "persimmon", "gpt2", "llama"],
)  # fmt: skip
def test_no_dropout_of_any_kind(tmp_path, made):
    ids = torch.randint(5, tiny.VOCAB, (2, 12))
    for off in (False, True):
        model = make(tmp_path, made(0.5), disable_dropout=off).model
        with torch.no_grad():
            expected = model.eval()(ids).logits
            drawn = [model.train()(ids).logits for _ in range(4)]
        same = [torch.allclose(logits, expected, atol=1e-6) for logits in drawn]
        assert all(same) if off else not any(same)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Lora", {"lora_dropout": 0.5, "init_lora_weights": False}),
        ("LoHa", {"r": 8, "rank_dropout": 0.5, "init_weights": False}),
        ("LoKr", {"r": 8, "module_dropout": 0.5, "init_weights": False}),
        ("BOFT", {"boft_block_size": 4, "boft_dropout": 0.5, "init_weights": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_dropout_in_an_adapter(tmp_path, kind, fields):
    peft = pytest.importorskip("peft")
    ids = torch.randint(5, tiny.VOCAB, (2, 12))
    for off in (False, True):
        config = getattr(peft, f"{kind}Config")(
            task_type="CAUSAL_LM", target_modules=["q_proj"], **fields
        )
        model = make(tmp_path, tiny.model(0), peft=config, disable_dropout=off).model
        with torch.no_grad():
            expected = model.eval()(ids).logits
            drawn = [model.train()(ids).logits for _ in range(8)]
        same = [torch.allclose(logits, expected, atol=1e-6) for logits in drawn]
        assert all(same) if off else not all(same)
