"""The scenarios of TRL's own tests of its trainers, in the order of the table in docs/trainer.md.

Each is one function of a folder, or several that ask the same of one name each. It returns keywords
of `training.make`, or a trainer, to be trained; None where it has done everything itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
import vision
from datasets import Dataset, DatasetDict, IterableDatasetDict
from training import SGD, make
from trl import DistillationConfig

from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer

#: By the words of the table.
SCENARIOS: dict[str, tuple[Callable[[Path], Any], ...]] = {}
SMALL = dict(max_completion_length=3, per_device_train_batch_size=2, per_device_eval_batch_size=2)
ALONE = dict(SMALL, max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
             save_strategy="no")  # fmt: skip
TEXTS = tiny.prompts()["prompt"]
TALK = [[{"role": "user", "content": text}] for text in TEXTS]
ANSWERS = [[{"role": "assistant", "content": f"w{i} w3"}] for i in range(8)]
TOKENS = tiny.tokenizer()


def scenario(words: str) -> Callable[..., None]:
    def keep(*functions: Callable[[Path], Any]) -> None:
        assert words not in SCENARIOS, words
        SCENARIOS[words] = functions

    return keep


def with_settings(**given: dict[str, Any]) -> None:
    """Scenarios that are keywords of `make`."""
    for words, settings in given.items():
        scenario(words)(lambda folder, settings=settings: settings)


def with_columns(**given: dict[str, list]) -> None:
    with_settings(**{w: dict(data=Dataset.from_dict(columns)) for w, columns in given.items()})


def alone(folder: Path, model: Any = None, teacher: Any = None, **keywords: Any) -> TrOPDTrainer:
    """A trainer that is given no more than this."""
    args = TrOPDConfig(str(folder), **ALONE | SGD | keywords.pop("settings", {}))
    data = keywords.pop("train_dataset", tiny.prompts())
    model, teacher = (tiny.model(0) if model is None else model), teacher or tiny.model(1)
    return TrOPDTrainer(model, teacher, args, data, **keywords)


def saved(folder: Path, model: Any = None, tokens: Any = TOKENS) -> str:
    (tiny.model(0) if model is None else model).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


def each(words: str, **names: Any) -> None:
    """One scenario of several settings."""
    scenario(words)(*(lambda folder, key=key: {key: names[key]} for key in names))


# --- the constructor ---------------------------------------------------------------------------


@scenario("models by their folders, no processing class")
def _(folder):
    return alone(folder, saved(folder / "a"), saved(folder / "b", tiny.model(1)))


@scenario("`model_init_kwargs`, `teacher_model_init_kwargs`")
def _(folder):
    as_bf16 = {"dtype": "bfloat16"}
    dtypes = dict(model_init_kwargs=as_bf16, teacher_model_init_kwargs=as_bf16)
    made = alone(folder, saved(folder / "a"), saved(folder / "b", tiny.model(1)), settings=dtypes)
    assert made.model.dtype == made.teacher_model.dtype == torch.bfloat16
    return made


each(
    "... beside models that are loaded",
    model_init_kwargs={"dtype": "bfloat16"}, teacher_model_init_kwargs={"dtype": "bfloat16"},
)  # fmt: skip


@scenario("`quantization_config` beside a loaded student")
def _(folder):
    return alone(folder, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


@scenario("a student of remote code, `trust_remote_code`")
def _(folder):
    name = saved(folder / "student")
    (folder / "student" / "own.py").write_text(
        "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM):\n    pass\n"
    )
    file = folder / "student" / "config.json"
    remote = {"auto_map": {"AutoModelForCausalLM": "own.Own"}, "architectures": ["Own"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | remote))
    made = alone(folder, name, settings=dict(trust_remote_code=True))
    assert type(made.model).__name__ == "Own"
    return made


@scenario("`optimizers`")
def _(folder):
    model = tiny.model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return TrOPDTrainer(
        model, tiny.model(1), TrOPDConfig(str(folder), **ALONE), tiny.prompts(),
        optimizers=(optimizer, schedule), processing_class=TOKENS,
    )  # fmt: skip


@scenario("`callbacks`")
def _(folder):
    class Counts(transformers.TrainerCallback):
        steps = 0

        def on_step_end(self, *arguments, **keywords):
            self.steps += 1

    counts = Counts()
    alone(folder, callbacks=[counts], processing_class=TOKENS).train()
    assert counts.steps == 1


@scenario("no teacher")
def _(folder):
    return TrOPDTrainer(tiny.model(0), None, TrOPDConfig(str(folder), **ALONE), tiny.prompts())


@scenario("`DistillationConfig`")
def _(folder):
    return TrOPDTrainer(tiny.model(0), tiny.model(1), DistillationConfig(str(folder), **ALONE))


ARGUMENTS = ("compute_metrics", "data_collator", "formatting_func", "rollout_func",
             "environment_factory")  # fmt: skip
scenario(", ".join(f"`{name}`" for name in ARGUMENTS))(
    *(lambda folder, name=name: alone(folder, **{name: len}) for name in ARGUMENTS)
)
each(
    "SFT's `packing`, `padding_free`, `max_length`, `assistant_only_loss`",
    packing=True, padding_free=True, max_length=8, assistant_only_loss=True,
)  # fmt: skip
each(
    "GRPO's `loss_type`, `epsilon`, `mask_truncated_completions`, `num_generations_eval`",
    loss_type="dapo", epsilon=0.2, mask_truncated_completions=True, num_generations_eval=2,
)  # fmt: skip


@scenario("a teacher whose vocabulary is padded further")
def _(folder):
    return dict(teacher=tiny.model(1, vocab_size=tiny.VOCAB + 8))


@scenario("a teacher with another tokenizer")
def _(folder):
    other = tiny.tokenizer((*tiny.WORDS[1:], "w0"))
    teacher = saved(folder / "teacher", tiny.model(1), other)
    return alone(folder, teacher=teacher, processing_class=TOKENS)


# --- formats -----------------------------------------------------------------------------------

with_columns(**{
    "`prompt`, text": dict(prompt=TEXTS),
    "`prompt`, messages": dict(prompt=TALK),
    "several turns, with a system prompt": dict(
        prompt=[[{"role": "system", "content": "w9"}, *a, *b, *a] for a, b in zip(TALK, ANSWERS)]
    ),
    "... that end with the answer": dict(prompt=[a + b for a, b in zip(TALK, ANSWERS)]),
    "`prompt`, `completion`": dict(prompt=TALK, completion=ANSWERS),
    "`prompt`, `chosen`, `rejected`": dict(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS),
    "`text`": dict(text=TEXTS),
    "`messages`": dict(messages=[a + b for a, b in zip(TALK, ANSWERS)]),
    "`chosen`, `rejected`, without a prompt": dict(chosen=ANSWERS, rejected=ANSWERS),
    "`input_ids`": dict(input_ids=[[7, 8]] * 8),
    "messages of `from` and `value`": dict(prompt=[[{"from": "human", "value": "w7"}]] * 8),
    "messages in parts": dict(
        prompt=[[{"role": "user", "content": [{"type": "text", "text": "w7"}]}]] * 8
    ),
    "a column `audio`": dict(prompt=TALK, audio=[None] * 8),
    "a column `tools`": dict(prompt=TALK, tools=[[{"name": "f"}]] * 8),
})  # fmt: skip
with_settings(**{
    "`remove_unused_columns`": dict(
        data=tiny.prompts(8, answer=["7"] * 8), remove_unused_columns=True
    ),
    "a list of rows": dict(data=[{"prompt": text} for text in TEXTS]),
    "rows that a transform makes": dict(
        data=Dataset.from_dict({"text": TEXTS}).with_transform(lambda r: {"prompt": r["text"]})
    ),
    "a stream": dict(data=tiny.prompts().to_iterable_dataset()),
    "a stream, `dataloader_num_workers`": dict(
        data=tiny.prompts().to_iterable_dataset(), dataloader_num_workers=2
    ),
    "a stream without `max_steps`": dict(data=tiny.prompts().to_iterable_dataset(), max_steps=-1),
    "a stream, `dispatch_batches`": dict(
        data=tiny.prompts().to_iterable_dataset(), accelerator_config={"dispatch_batches": True}
    ),
    "a `DatasetDict` to train on": dict(data=DatasetDict(train=tiny.prompts())),
})  # fmt: skip
TEMPLATE = tiny.TEMPLATE + "{% if thinks %}w7{% endif %}"


@scenario("`chat_template_kwargs`")
def _(folder):
    tokens = tiny.tokenizer()
    tokens.chat_template = TEMPLATE
    made = alone(folder, processing_class=tokens, settings=dict(chat_template_kwargs={"thinks": 1}),
                 train_dataset=Dataset.from_dict({"prompt": TALK}))  # fmt: skip
    ids, _, _ = made._tokenize_prompts(TALK)
    assert {row[-1] for row in ids} == {tokens.convert_tokens_to_ids("w7")}
    return made


with_settings(**{"... beside prompts of text": dict(chat_template_kwargs={"thinks": True})})


def doubled(number: int) -> int:
    """Doubles.

    Args:
        number: Any.
    """
    return 2 * number


@scenario("`tools`, a template that calls none")
def _(folder):
    return alone(folder, tools=[doubled], processing_class=TOKENS)


# --- PEFT --------------------------------------------------------------------------------------


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**dict(r=2, target_modules=["q_proj", "v_proj"]) | options)


def adapted(seed: int = 0):
    config = lora()
    return pytest.importorskip("peft").get_peft_model(tiny.model(seed), config)


def with_peft(words: str, keywords: Callable[[], dict]) -> None:
    scenario(words)(lambda folder: keywords())


def learns_prompts(kind: str) -> dict:
    peft = pytest.importorskip("peft")
    return dict(peft=getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))


REENTRANT = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
with_peft("`peft_config`", lambda: dict(peft=lora()))
with_peft("a `PeftModel`", lambda: dict(student=adapted()))
with_peft("a `PeftModel`, and `peft_config`", lambda: dict(student=adapted(), peft=lora()))
with_peft("DoRA", lambda: dict(peft=lora(use_dora=True)))
with_peft("all linear layers", lambda: dict(peft=lora(target_modules="all-linear")))
with_peft(
    "embeddings and head in `modules_to_save`",
    lambda: dict(peft=lora(modules_to_save=["embed_tokens", "lm_head"])),
)
with_peft("an adapter on the head", lambda: dict(peft=lora(target_modules=["q_proj", "lm_head"])))
with_peft(
    "an adapter on a mixture's experts",
    lambda: dict(student=model("Qwen3Moe", **EXPERTS),
                 peft=lora(target_parameters=["mlp.experts.gate_up_proj"])),
)  # fmt: skip
with_peft(
    "an adapter, `gradient_checkpointing`", lambda: dict(peft=lora(), gradient_checkpointing=True)
)
with_peft("... reentrant", lambda: dict(peft=lora(), **REENTRANT))
with_peft("a teacher with an adapter", lambda: dict(teacher=adapted(1)))
with_peft("prompt tuning", lambda: learns_prompts("PromptTuningConfig"))
with_peft("prefix tuning", lambda: learns_prompts("PrefixTuningConfig"))


@scenario("an adapter's folder as the student")
def _(folder):
    base = saved(folder / "base")
    named = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = lora()
    pytest.importorskip("peft").get_peft_model(named, config).save_pretrained(folder / "adapter")
    return alone(folder, str(folder / "adapter"), processing_class=TOKENS)


# --- evaluation --------------------------------------------------------------------------------

EVERY_STEP = dict(eval_strategy="steps", eval_steps=1)


def held_out(kind: str) -> Any:
    part = tiny.prompts(3)
    part = part.to_iterable_dataset() if "stream" in kind else part
    if "DatasetDict" in kind:
        return (IterableDatasetDict if "stream" in kind else DatasetDict)(a=part, b=part)
    return {"a": part, "b": part} if "mapping" in kind else part


def evaluated(folder: Path, kind: str) -> None:
    """In training, and by a call."""
    trainer = make(folder, evaluate=held_out(kind), **SMALL | EVERY_STEP)
    trainer.train()
    logged = {name for log in trainer.state.log_history for name in log}
    parts = ["a_", "b_"] if held_out(kind).__class__.__name__.endswith("ict") else [""]
    for found in (logged, make(folder, **SMALL).evaluate(held_out(kind))):
        assert {f"eval_{part}loss" for part in parts} <= {*found}


for _kind in ("a data set", "a stream", "a `DatasetDict`", "a `DatasetDict` of streams",
              "a mapping of data sets", "a mapping of streams"):  # fmt: skip
    scenario(f"`eval_dataset`: {_kind}")(partial(evaluated, kind=_kind))


with_settings(**{
    "`eval_on_start`": dict(evaluate=tiny.prompts(3), eval_on_start=True, **EVERY_STEP),
    "`load_best_model_at_end`": dict(
        evaluate=tiny.prompts(3), save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_tropd/reverse_kl", **EVERY_STEP,
    ),
    "an evaluation beside `num_generations`": dict(
        evaluate=tiny.prompts(3), num_generations=2, **EVERY_STEP
    ),
    "`eval_strategy` without `eval_dataset`": EVERY_STEP,
})  # fmt: skip


@scenario("`predict()`")
def _(folder):
    assert make(folder, **SMALL).predict(tiny.prompts(3)).metrics["test_loss"]


@scenario("`evaluate()` without `train_dataset`")
def _(folder):
    assert alone(
        folder, train_dataset=None, eval_dataset=tiny.prompts(3), processing_class=TOKENS
    ).evaluate()["eval_loss"]


@scenario("`train()` without `train_dataset`")
def _(folder):
    return alone(folder, train_dataset=None, processing_class=TOKENS)


# --- steps -------------------------------------------------------------------------------------

with_settings(**{
    "`gradient_accumulation_steps`": dict(gradient_accumulation_steps=2),
    "`gradient_checkpointing`": dict(gradient_checkpointing=True),
    "`num_generations` above a micro-batch": dict(
        num_generations=4, gradient_accumulation_steps=2
    ),
    "`num_iterations`": dict(num_iterations=2, max_steps=2),
    "`dataloader_num_workers`": dict(dataloader_num_workers=1),
    "rows that do not fill the last step": dict(
        data=tiny.prompts(5), num_train_epochs=1, max_steps=-1
    ),
    "fewer rows than a step": dict(data=tiny.prompts(1)),
    "bf16": dict(bf16=True),
    "AdamW, clipped": dict(optim="adamw_torch", max_grad_norm=1.0),
    "`neftune_noise_alpha`": dict(neftune_noise_alpha=0.1),
    "`log_completions`": dict(log_completions=True),
    "`use_liger_kernel` on a CPU": dict(use_liger_kernel=True),
    "`torch_compile`": dict(torch_compile=True),
    "`auto_find_batch_size`": dict(auto_find_batch_size=True),
    "`label_smoothing_factor`": dict(label_smoothing_factor=0.1),
})  # fmt: skip

# --- padding and generation --------------------------------------------------------------------

with_settings(**{
    "`pad_to_multiple_of`": dict(pad_to_multiple_of=8),
    "`generation_kwargs`": dict(generation_kwargs={"top_k": 5, "typical_p": 0.9}),
    "... with lengths or ends": dict(generation_kwargs={"max_new_tokens": 4}),
    "`cache_implementation`": dict(cache_implementation="static"),
})  # fmt: skip


@scenario("`use_vllm` without vLLM")
def _(folder):
    if find_spec("vllm"):
        pytest.skip("vLLM is installed")
    return dict(use_vllm=True)


def padding(words: str, **changes: Any) -> None:
    @scenario(words)
    def _(folder):
        tokens = tiny.tokenizer()
        for name, value in changes.items():
            setattr(tokens, name, value)
        return alone(folder, processing_class=tokens)


padding("a tokenizer that pads with its end", pad_token="</s>")
padding("a tokenizer that pads on the right", padding_side="right")
padding("a tokenizer without padding", pad_token=None)

# --- models ------------------------------------------------------------------------------------

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8)


def model(family: str, head: str = "ForCausalLM", config: str = "Config", **changes: Any):
    kind, settings = (getattr(transformers, family + end) for end in (head, config))
    return tiny.model(0, kind=kind, config=settings, **changes)


def of(words: str, *family: str, **changes: Any) -> None:
    scenario(words)(lambda folder: dict(student=model(*family, **changes)))


of("Qwen3", "Qwen3", head_dim=8)
of("Gemma 2, capped logits", "Gemma2", head_dim=8)
of("Gemma 3's text", "Gemma3", "ForCausalLM", "TextConfig", head_dim=8)
of("GPT-2, learned positions", "GPT2", "LMHeadModel")
of("Cohere, scaled logits", "Cohere")
of("OPT", "OPT", ffn_dim=48, word_embed_proj_dim=32)
of("Phi-3", "Phi3")
of("GLM-4", "Glm4", head_dim=8)
of("Mamba, no positions", "Mamba")
of("LFM2, convolutions", "Lfm2", layer_types=["conv", "full_attention"])
of("Qwen3 MoE", "Qwen3Moe", **EXPERTS)
of("GPT-OSS", "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8)
of("DeepSeek-V3", "DeepseekV3", q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8,
   qk_nope_head_dim=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
   num_key_value_heads=4)  # fmt: skip
of("Bart's decoder", "Bart", decoder_attention_heads=4, decoder_ffn_dim=32, d_model=32)
of("RWKV's first", "Rwkv")
of("T5", "T5", "ForConditionalGeneration", d_model=32, d_ff=48, num_layers=1, d_kv=16)


@scenario("a classifier")
def _(folder):
    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    return dict(student=transformers.LlamaForSequenceClassification(config))


# --- images ------------------------------------------------------------------------------------


def sees(
    folder: Path, kind: str = "gemma3", data: Any = None, peft: Any = None, teacher: str = "",
    **settings: Any,
):  # fmt: skip
    args = TrOPDConfig(str(folder), **ALONE | SGD | settings)
    student, teacher = vision.model(kind, 0), vision.model(teacher or kind, 1)
    rows = vision.prompts(8, kind) if data is None else data
    return TrOPDTrainer(
        student, teacher, args, rows, processing_class=vision.processor(kind), peft_config=peft
    )


def with_images(words: str, **columns: Any) -> None:
    scenario(words)(lambda folder: sees(folder, data=Dataset.from_dict(columns)))


scenario("an image a row, Gemma 3")(sees)
for _words, _kind in (("Aria", "aria"), ("PaliGemma", "paligemma"), ("Qwen2-VL", "qwen2_vl"),
                      ("Qwen3.5", "qwen3_5")):  # fmt: skip
    scenario(f"... {_words}")(partial(sees, kind=_kind))
IMAGES = [[vision.image(i), vision.image(i + 1)] for i in range(8)]
with_images("several images a row", prompt=TALK, images=IMAGES)
with_images("prompts alone, a model that sees images", prompt=TALK)
scenario("images, with an adapter")(lambda folder: sees(folder, peft=lora()))
scenario("images, accumulated and padded")(
    partial(sees, gradient_accumulation_steps=2, pad_to_multiple_of=8)
)
scenario("images, `gradient_checkpointing`")(partial(sees, gradient_checkpointing=True))
with_images("rows with an image and without", prompt=TALK, images=[*IMAGES[:4], *[[]] * 4])
scenario("images, a teacher of another family")(partial(sees, teacher="idefics3"))
with_images("images beside prompts of text", prompt=TEXTS, images=IMAGES)
with_images("a column `video`", prompt=TALK, video=[None] * 8)


@scenario("images, a model of text")
def _(folder):
    return dict(data=vision.prompts())
