"""What student, teacher and tokenizer have to be for a run to mean anything, and may be."""

from __future__ import annotations

import contextlib
import json
import warnings
from types import SimpleNamespace

import datasets
import pytest
import tokenizers
import torch
import transformers

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import SGD, Spy, make, step_and_compare

from tropd_kernels.trainer import TrOPDConfig
from tropd_kernels.trainer.student_checks import check_causal

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def longer(seed: int = 0):
    """A model with one id more than the others."""
    model = tiny.model(seed)
    model.resize_token_embeddings(tiny.VOCAB + 1)
    return model


def with_tokenizer(folder, tokenizer, student=None, teacher=None, data=None, **settings):
    args = TrOPDConfig(
        str(folder), max_steps=1, per_device_train_batch_size=4, max_completion_length=8,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        **SGD, **settings,
    )  # fmt: skip
    student, teacher = student or tiny.model(0), teacher or tiny.model(1)
    return Spy(student, teacher, args, data or tiny.prompts(), processing_class=tokenizer)


def test_an_end_that_the_teacher_does_not_have(tmp_path):
    """It would be kept from writing it, and never end."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    for student, whose in ((longer(), "student and teacher"), (tiny.model(0), "the student has")):
        with pytest.raises(
            ValueError, match=rf"<\|im_end\|>' with id 96, is beyond the 96.*{whose}"
        ):
            with_tokenizer(tmp_path, tokenizer, student)


def test_a_tokenizer_without_an_end(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        with_tokenizer(tmp_path, tokenizer)


def test_padding_that_a_model_does_not_have(tmp_path):
    """The student needs it to generate, the teacher only where it writes."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(
        ValueError, match=r"\[PAD\]' has id 96, and the student only the ids below 96"
    ):
        with_tokenizer(tmp_path, tokenizer)
    losses = []
    for other in (tokenizer, tiny.tokenizer()):
        trainer = with_tokenizer(tmp_path, other, longer(), generation_kwargs={"do_sample": False})
        trainer.train()
        losses += trainer.losses
        assert (trainer.batches[0]["prompt_mask"] == 0).any()
    assert losses[0] == losses[1]
    writes = dict(prefix_schedule="constant", prefix_length=2)
    with pytest.raises(ValueError, match="and the teacher only the ids below 96"):
        with_tokenizer(tmp_path, tokenizer, longer(), **writes).train()


def test_a_prompt_with_an_unknown_token_is_told_before_it_is_looked_up(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["new"])
    data = tiny.Dataset.from_dict({"prompt": ["w1 new"] * 8})
    with pytest.raises(ValueError, match="a prompt holds id 96 .'new'."):
        with_tokenizer(tmp_path, tokenizer, data=data).train()


def test_nothing_to_train(tmp_path):
    """Gradient checkpointing, the default, would hide it."""
    student = tiny.model(0).requires_grad_(False)
    with pytest.raises(ValueError, match=r"model: none of its parameters .* is_trainable=True"):
        make(tmp_path, student, gradient_checkpointing=True).train()


def test_a_teacher_with_the_student_s_weights(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny.model(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2))
    for student in (base, adapted):
        with pytest.raises(
            ValueError, match="the student's own tensor.*: load the teacher a second"
        ):
            make(tmp_path, student, base)


def test_models_that_torch_compile_wraps(tmp_path):
    """The loss reaches below the wrapper, which would compile nothing. Layers that are compiled in
    their place are."""
    words = "torch.compile wraps it, and would compile nothing: .*compile its layers in"
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(seed):
        return torch.compile(tiny.model(seed), backend=counting)

    with pytest.raises(ValueError, match=f"^model: {words}"):
        make(tmp_path, compiled(0))
    with pytest.raises(ValueError, match=f"^teacher_model: {words}"):
        make(tmp_path, teacher=compiled(1))
    several = {"math": tiny.model(1), "code": compiled(2)}
    data = tiny.prompts(teacher_id=["math", "code"] * 4)
    with pytest.raises(ValueError, match=f"^teacher_models: 'code': {words}"):
        make(tmp_path, data=data, several=several)
    assert not graphs
    student = tiny.model(0)
    student.model.layers[0].mlp.compile(backend=counting)
    trainer = make(tmp_path, student)
    with torch._dynamo.config.patch(recompile_limit=64):
        trainer.train()
    assert graphs


def test_a_student_without_a_head(tmp_path):
    backbone = transformers.LlamaModel(tiny.model(0).config)
    with pytest.raises(TypeError, match="model: a LlamaModel writes no text: load it with Auto"):
        make(tmp_path, backbone)


def test_options_with_which_a_student_cannot_be_loaded(tmp_path):
    """transformers' own error, of an exponent (5.24) or of a key (5.17), names neither the model
    nor the options, nor what they lack."""
    tiny.model(0).save_pretrained(tmp_path)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    why = "(unsupp|'rope_type').*: rope_scaling replaces the config's own: give .*rope_theta in it"
    words = f"model: .* with these model_init_kwargs cannot be loaded: {why}"
    with pytest.raises((TypeError, KeyError), match=words):
        make(tmp_path / "run", str(tmp_path), model_init_kwargs={"rope_scaling": yarn})
    tiny.model(0).config.save_pretrained(tmp_path / "empty")
    with pytest.raises(OSError, match="^model: .* cannot be loaded: ") as caught:  # no weights
        make(tmp_path / "run", str(tmp_path / "empty"), model_init_kwargs={"rope_scaling": yarn})
    assert "rope" not in str(caught.value)
    given = {"teacher_model_init_kwargs": {"rope_scaling": yarn}}
    with pytest.raises((TypeError, KeyError), match=f"teacher_model: .* cannot be loaded: {why}"):
        make(tmp_path / "run", None, str(tmp_path), **given)
    yarn |= {"rope_theta": 10000.0, "rope_type": "yarn"}
    made = make(tmp_path / "run", str(tmp_path), model_init_kwargs={"rope_parameters": yarn})
    assert made.model.config.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_an_adapter_that_begins_from_data(tmp_path, init):
    """PEFT makes a plain one, and says nothing, where the model was not prepared for it."""
    peft = pytest.importorskip("peft")
    lora_ga = pytest.importorskip("peft.tuners.lora.loraga")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights=init,
        **{f"{init}_config": {"eva": peft.EvaConfig, "lora_ga": peft.LoraGAConfig}[init]()},
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^peft_config: init_lora_weights='{init}' would have no"):
        make(tmp_path, tiny.model(0), peft=config)
    student, ids = tiny.model(0), torch.randint(5, 60, (4, 10))
    if init == "eva":
        student = peft.get_peft_model(student, config)
        peft.initialize_lora_eva_weights(student, [{"input_ids": ids}] * 8)
        trainer = make(tmp_path, student)
    else:
        step = lambda: student(ids, labels=ids).loss.backward()
        lora_ga.preprocess_loraga(student, config, step)
        trainer = make(tmp_path, student, peft=config)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    first = layer.lora_A.default.weight.detach()
    product = first @ first.T
    assert torch.allclose(product, product[0, 0] * torch.eye(4), atol=1e-4 * float(product[0, 0]))
    trainer.train()


def test_modules_that_an_adapter_does_not_find(tmp_path, recwarn):
    """PEFT says nothing, and trains nothing there."""
    peft = pytest.importorskip("peft")

    def made(**options):
        config = peft.LoraConfig(
            **{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
        )
        recwarn.clear()
        trainer = make(tmp_path, tiny.model(0), peft=config)
        said = [str(one.message) for one in recwarn]
        return trainer, [text for text in said if text.startswith("peft_config: target_modules")]

    for name, words in (("embed_token", r" \(did you mean 'embed_tokens'\?\)"), ("wte", "")):
        words = f"^peft_config: modules_to_save: no module is called '{name}'{words}, so "
        with pytest.raises(ValueError, match=words):
            made(modules_to_save=["lm_head", name])
    trainer, said = made(modules_to_save=["lm_head", "embed_tokens"])
    trainer.train()
    assert said == []
    assert made(target_modules="all-linear")[1] == made(target_modules=r".*\.v_proj")[1] == []
    (said,) = made(target_modules=["q_proj", "query_key_value"])[1]
    assert said.startswith("peft_config: target_modules: no module is called 'query_key_value'")


def test_trained_tokens_beyond_the_embeddings(tmp_path):
    peft = pytest.importorskip("peft")
    last = tiny.VOCAB - 1
    by_lora = lambda ids: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=ids)
    by_name = lambda ids: by_lora({"embed_tokens": ids})
    alone = lambda ids: peft.TrainableTokensConfig(token_indices=ids)
    for made in (by_lora, by_name, alone):
        make(tmp_path, tiny.model(0), peft=made([0, last]))
        for token, words in (
            (last + 1, ".*no such row: .*resize_tok"),
            (-1, "expected ids of 0 or more"),
        ):
            words = f"^peft_config: (trainable_)?token_indices: {words}"
            with pytest.raises(ValueError, match=words):
                make(tmp_path, tiny.model(0), peft=made([5, token]))


@pytest.mark.parametrize("side", ["model", "teacher_model"])
def test_a_model_whose_tokens_look_ahead(tmp_path, side):
    """PaliGemma beside a tokenizer: without token types and padding each token sees all others,
    and generation's do not. Gemma's text models, if their configs say so."""
    pytest.importorskip("PIL", reason="images need pillow")
    import vision

    gemma = dict(kind=transformers.Gemma3ForCausalLM, config=transformers.Gemma3TextConfig)
    ahead = tiny.model(0, use_bidirectional_attention=True, head_dim=8, **gemma)
    all_at_once = tiny.model(0, is_causal=False)
    pali = vision.model("paligemma", 0)
    ids = torch.randint(5, 60, (2, 6))
    ids[1, :-1] = ids[0, :-1]
    sizes = {"vocab_size": vision.VOCAB}
    for made, size in ((ahead, {}), (all_at_once, {}), (pali, sizes)):
        first, second = made.base_model(ids, attention_mask=torch.ones_like(ids))[0][:, 0]
        assert not torch.allclose(first, second, atol=1e-3)
        other = tiny.model(1, **size)
        models = (made, other) if side == "model" else (other, made)
        with pytest.raises(
            ValueError, match=f"^{side}: the tokens of this .* attend to later ones"
        ):
            make(tmp_path, *models)
    make(tmp_path, tiny.model(0, head_dim=8, **gemma), tiny.model(1, head_dim=8, **gemma))
    for how, refused in (("all", True), ("vision", False)):
        text = transformers.Gemma4TextConfig(use_bidirectional_attention=how)
        with pytest.raises(ValueError, match="attend to") if refused else contextlib.nullcontext():
            check_causal(SimpleNamespace(config=text), "model", False)


@pytest.mark.parametrize("which", ["model", "teacher_model"])
def test_a_value_of_another_type_for_a_model_s_config(tmp_path, which):
    """YAML reads 1e-6 as text. The hub's own error is no ValueError, and names no model."""
    tiny.model(0).save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    models = (folder, None) if which == "model" else (None, folder)
    options = {f"{which}_init_kwargs": {"rms_norm_eps": "1e-6"}}
    with pytest.raises(ValueError, match=f"^{which}: .* cannot be loaded: .*'rms_norm_eps'.*float"):
        make(tmp_path / "run", *models, **options)


def test_a_generate_of_the_repository_s_own(tmp_path, recwarn):
    """transformers calls it in place of its own, with the trainer's settings as it likes."""
    folder = tmp_path / "model"
    tiny.model(0).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        "def generate(model, input_ids=None, **_):\n    return input_ids[:, [0, 1, 2]]\n"
    )
    for trusts in (False, True):
        recwarn.clear()
        trainer = make(tmp_path / "run", str(folder), trust_remote_code=trusts)
        said = [str(one.message) for one in recwarn if "generate of its own" in str(one.message)]
        assert len(said) == trusts == ("generate" in vars(trainer.model))


def gemma_3n(seed):
    """Four layers of two kinds, all of whose keys are their own."""
    return tiny.model(
        seed, kind=transformers.Gemma3nForCausalLM, config=transformers.Gemma3nTextConfig,
        vocab_size_per_layer_input=tiny.VOCAB, hidden_size_per_layer_input=8, head_dim=8,
        laurel_rank=4, num_kv_shared_layers=0, num_hidden_layers=4, sliding_window=16,
        layer_types=["sliding_attention"] * 3 + ["full_attention"], intermediate_size=[48] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip


def test_a_backward_of_nan(tmp_path):
    """transformers' Gemma 3n has one behind the padding of a shorter prompt, and a finite loss."""
    trainer = make(tmp_path, gemma_3n(0), gemma_3n(1), max_steps=2, objective="gkd")
    with pytest.raises(FloatingPointError, match=r"at step 1, .*Gemma 3n.* prompts of one length"):
        trainer.train()
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(8)]
    teacher = gemma_3n(1)
    trainer = make(tmp_path, gemma_3n(0), teacher, rows, objective="gkd")
    step_and_compare(trainer, teacher, tolerance=1e-4)


def test_a_student_with_a_z_loss_of_its_own(tmp_path):
    """Bamba's forward adds it to every loss; the trainer calls its backbone alone."""
    student = tiny.model(
        0, kind=transformers.BambaForCausalLM, config=transformers.BambaConfig,
        z_loss_coefficient=0.01, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16,
    )  # fmt: skip
    folder = str(tmp_path / "bamba")
    student.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    words = "^model: BambaForCausalLM has a z_loss_coefficient of 0.01"
    for given in (student, folder):
        with pytest.raises(ValueError, match=words):
            make(tmp_path, given)
    make(tmp_path, folder, model_init_kwargs={"z_loss_coefficient": 0.0})
    student.z_loss_coefficient = 0
    make(tmp_path, student).train()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, (True, 0.9, 0.6)),
        # What TRL sets is there, and transformers sets the tokenizer's end once training begins.
        (
            {"temperature": 0.9, "top_p": 0.6, "pad_token_id": 0, "eos_token_id": 7},
            (True, 0.9, 0.6),
        ),
        ({"temperature": 0.0}, (None, None, None)),
        ({"temperature": 0.6, "do_sample": False}, (False, None, None)),
    ],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_values_of_sampling_without_do_sample(tmp_path, given, kept, adapter):
    """Of published models: transformers loads them, and saves none in which anything was set."""
    folder, peft = tmp_path / "student", None
    if adapter:
        kinds = pytest.importorskip("peft")
        peft = kinds.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    tiny.model(0).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | given))
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="^model: its generation_config has values of sampling"):
        trainer = make(out, str(folder), peft=peft, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    if adapter:
        trainer.model.merge_and_unload().save_pretrained(out)
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    saved = again.generation_config
    assert (saved.do_sample, saved.temperature, saved.top_p) == kept
    again.generate(torch.tensor([[5, 6]]), max_new_tokens=2)


def test_configs_that_cannot_be_saved(tmp_path):
    """Before training: transformers says so only where it saves them."""
    student = tiny.model(0)
    student.generation_config.num_beams, student.generation_config.num_return_sequences = 2, 4
    with pytest.raises(ValueError, match="^model: its generation_config could not be saved aft"):
        make(tmp_path, student)
    assert student.generation_config.do_sample is not True
    student = tiny.model(0)
    student.config.top_p = 0.5
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    make(tmp_path, student, peft=adapter).save_model()  # of an adapter no config is saved
    student = tiny.model(0)
    student.config.top_p = 0.5
    with pytest.raises(
        ValueError, match="^model: its config could not be saved after training, mend it: Some"
    ):
        make(tmp_path, student)
    student = tiny.model(0)
    student.config.num_attention_heads = 5  # no part of 32
    with pytest.raises(ValueError, match=r"^model: its config could not be saved [\s\S]*heads"):
        make(tmp_path, student)


def words_of(trainer_of):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of()
    return [str(one.message) for one in caught if "answers end with" in str(one.message)]


def test_an_end_of_the_teacher_s_that_does_not_end_the_student(tmp_path):
    """A chat model teaches a base model of its family, whose tokenizer and model end elsewhere."""
    student, teacher, theirs = tiny.model(0), tmp_path / "teacher", tiny.tokenizer()
    student.generation_config.eos_token_id = 2
    model = tiny.model(1)
    model.generation_config.eos_token_id = [2, 4, 3]
    model.save_pretrained(teacher)
    theirs.eos_token = "<|end|>"
    theirs.save_pretrained(teacher)
    (words,) = words_of(lambda: make(tmp_path, student, str(teacher)))
    assert words.startswith("teacher_model: its answers end with '<|end|>', which does not end the")
    # As it says.
    student.generation_config.eos_token_id = [2, 3]
    assert not words_of(lambda: make(tmp_path, student, str(teacher)))
    student.generation_config.eos_token_id = 2
    assert not words_of(lambda: with_tokenizer(tmp_path, theirs, student, str(teacher)))
    # Ends that a teacher's model has beside that of an answer are no reason to warn.
    tiny.tokenizer().save_pretrained(teacher)
    assert not words_of(lambda: make(tmp_path, student, str(teacher)))


@pytest.mark.parametrize("kind", ["Qwen2", "Gemma"])
def test_a_folder_without_a_tokenizer(tmp_path, kind):
    """transformers makes a tokenizer of special tokens alone: no sign of another family in a
    teacher, and of no use to a student."""
    made, config = (getattr(transformers, kind + of) for of in ("ForCausalLM", "Config"))
    for seed, name in enumerate(("student", "teacher")):
        tiny.model(seed, kind=made, config=config, head_dim=8).save_pretrained(tmp_path / name)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher").get_vocab()
    trainer = make(tmp_path / "out", str(tmp_path / "student"), str(tmp_path / "teacher"))
    trainer.train()
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    own.chat_template = None
    with pytest.raises(ValueError, match=f"^processing_class: a {kind}Tokenizer.* alone"):
        with_tokenizer(tmp_path, own, str(tmp_path / "student"))


@pytest.mark.parametrize("column", ["prompt", "teacher_prompt"])
@pytest.mark.parametrize(
    ("adds", "text", "words"),
    [
        ("<s> $A", "w1 w2", None),
        ("<s> $A", "<s>", "starts with '<s>' twice: text that a chat template has rendered"),
        ("<s> $A", "<s> w1 w2", "starts with '<s>' twice: text that a chat template has rendered"),
        ("<s> $A", "w1 w2 </s>", "ends with '</s>': completions would begin after the end of a"),
        ("<s> $A </s>", "w1 w2", "ends with '</s>': completions would begin after the end of a"),
        ("$A", "</s>", None),
        ("$A", [{"role": "user", "content": "w1"}], None),
    ],
)
def test_tokens_that_are_added_to_prompts(tmp_path, column, adds, text, words):
    """As by Llama's tokenizer, where a template has rendered the text before; as by one with
    add_eos_token; GPT-2's end is where a text begins, too, and a template may write it last."""
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<s>"
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=adds, special_tokens=ids
    )
    tokenizer.chat_template = "{{ messages[0].content }} </s>"
    data = datasets.Dataset.from_dict({"prompt": [text] * 8} | {column: [text] * 8})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_tokenizer(tmp_path, tokenizer, data=data).train()
    found = {str(one.message) for one in caught if str(one.message).startswith(f"{column}: ")}
    assert len(found) == (words is not None), found
    assert all(one.startswith(f"{column}: {words}") for one in found)
