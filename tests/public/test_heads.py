"""heads.py against the models themselves: what `read_head` reads, and where it does not guess."""

import ast
import inspect
from types import SimpleNamespace

import pytest
import torch
from head_models import (
    BASE,
    HIDDEN,
    IDS,
    MODELS,
    VOCAB,
    Toy,
    Whole,
    build,
    double,
    gemma3,
    llava,
    loud,
    paligemma2,
)
from torch import nn

import tropd_kernels.heads as heads_module
from tropd_kernels.heads import check_head, read_head


@pytest.fixture
def llama():
    return build("llama")


def _by_hand(head):
    """The formula of the loss, and the bare product."""
    raw = head.backbone(IDS).last_hidden_state @ head.weight.T
    logits = head.logit_scale * (raw if head.bias is None else raw + head.bias)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[..., : head.vocab_size], raw[..., : head.vocab_size]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_head_reproduces_the_models_logits(name):
    model = build(name)
    head, (scale, softcap) = read_head(model), MODELS[name][2:]
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    assert head.weight is model.get_output_embeddings().weight
    assert head.vocab_size == (90 if "inkling" in name else VOCAB)
    ours, raw = _by_hand(head)
    theirs = model(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.logits(head.backbone(IDS).last_hidden_state), ours)
    if scale != 1.0 or softcap or "bias" in name:
        assert (raw - theirs).abs().max() > 0.5, "a step left out would not be noticed"
    assert check_head(model) <= 1e-4


def test_gradients_reach_the_models_own_parameters(llama):
    head = read_head(llama)
    head.logits(head.backbone(IDS).last_hidden_state).square().sum().backward()
    ours = llama.lm_head.weight.grad.clone()
    llama.zero_grad()
    llama(IDS).logits.square().sum().backward()
    torch.testing.assert_close(ours, llama.lm_head.weight.grad, rtol=1e-4, atol=1e-4)


def test_usable_vocabulary_is_the_smaller_of_head_and_config(llama):
    llama.config.vocab_size = 90  # a padded head
    head = read_head(llama, verify=True)
    assert head.vocab_size == 90 and head.weight.shape == (VOCAB, HIDDEN)
    assert head.logits(torch.randn(3, HIDDEN)).shape == (3, 90)
    llama.config.vocab_size = 200
    assert read_head(llama).vocab_size == VOCAB


@torch.no_grad()
def test_multimodal_backbone_is_the_whole_body_not_the_decoder():
    for model in (gemma3(None), llava(model_type="llama")):
        head = read_head(model)
        assert head.backbone is model.model is not model.get_decoder()
        torch.testing.assert_close(_by_hand(head)[0], model(IDS).logits)


WRAPPERS = {
    "gemma3": lambda: gemma3(5.0),
    "paligemma2": paligemma2,
    "llava granite": lambda: llava(model_type="granite", logits_scaling=4.0),
    "llava cohere": lambda: llava(model_type="cohere", logit_scale=0.25),
}


@pytest.mark.parametrize("name", WRAPPERS)
@torch.no_grad()
def test_wrapper_of_a_text_model_that_changes_its_logits_is_put_to_the_test(name):
    """Whether a wrapper does what its text model does alone differs by wrapper and by release."""
    model = WRAPPERS[name]()
    with pytest.raises(ValueError, match=r"logit.* = .* may change .*verify=True"):
        read_head(model)
    theirs = model(IDS).logits
    torch.testing.assert_close(_by_hand(read_head(model, verify=True))[0], theirs)


# ---------------------------------------------------------------- models nobody has seen


def test_minicpm_divides_the_hidden_states():
    """The original is remote code and knows only `dim_model_base`."""
    options = dict(model_type="minicpm", hidden_size=HIDDEN, dim_model_base=8)
    model = Toy(lambda hidden, head: head(hidden / 4), **options)
    assert read_head(model, verify=True).logit_scale == 0.25


MUSE = dict(output_multiplier=0.25, final_logit_softcapping=5.0)
GEMMA3N = dict(final_logit_softcapping=5.0)
INKLING_MM = dict(logits_mup_width_multiplier=4.0, unpadded_vocab_size=90)


@pytest.mark.parametrize(
    ("kind", "entries", "scale", "softcap"),
    [
        ("muse_glimmer", MUSE, 0.25, 5.0),
        ("muse_spark", MUSE, 0.25, 5.0),
        ("gemma3n", GEMMA3N, 1.0, 5.0),
        ("gemma4_unified", GEMMA3N, 1.0, 5.0),
        ("mistral_large4", GEMMA3N, 1.0, 5.0),
        ("granite4_vision", dict(logits_scaling=4.0), 0.25, None),
        ("granite_docling", dict(logits_scaling=4.0), 0.25, None),
        ("hyperclovax_vision_v2", dict(logits_scaling=4.0), 4.0, None),
        ("inkling_mm_model", INKLING_MM, 0.25, None),
    ],
)
def test_multimodal_model_with_a_path_of_its_own(kind, entries, scale, softcap):
    """Too large, or too many packages, to build: the toy does what their forward does."""

    def path(hidden, head):
        logits = scale * head(hidden)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    text = SimpleNamespace(vocab_size=VOCAB, **entries)
    for config in (dict(text_config=text), dict(get_text_config=lambda decoder: text)):
        head = read_head(Toy(path, model_type=kind, **config), verify=True)
        assert (head.logit_scale, head.softcap) == (scale, softcap)


SUSPECTS = dict(logit_multiplier=0.5, output_multiplier_scale=0.5, mup_width_multiplier=8.0,
                use_mup=True, final_softcap=30, unpadded_vocab_size=90, logits_temperature=2.0,
                lm_head_scales=[1.0, 2.0])  # fmt: skip


@pytest.mark.parametrize("name", SUSPECTS)
def test_unknown_entry_that_may_change_the_logits_is_not_ignored(name):
    entry = {name: SUSPECTS[name]}
    for config in (entry, {"text_config": SimpleNamespace(vocab_size=VOCAB, **entry)}):
        with pytest.raises(ValueError, match=f"{name} = .* may change.*verify=True"):
            read_head(Toy(**config))
        assert read_head(Toy(**config), verify=True).logit_scale == 1.0
    with pytest.raises(ValueError, match=r"differ from the model's own by up to \d"):
        read_head(Toy(double, **entry), verify=True)


def test_entries_that_change_nothing_are_no_reason_to_refuse():
    neutral = dict(logit_scale=1.0, final_logit_softcapping=None, logit_cap=0, use_mup=False)
    elsewhere = dict(attn_logit_softcapping=50.0, router_logit_softcapping=5.0, lm_head_bias=True,
                     output_router_logits=True, num_logits_to_keep=5, logit_scale_init_value=2.6
                     )  # fmt: skip
    assert read_head(Toy(**neutral, **elsewhere)).logit_scale == 1.0
    assert read_head(Toy(model_type="afmoe", mup_enabled=True)).logit_scale == 1.0


def test_known_model_that_lost_its_attribute_is_not_taken_for_neutral():
    model = Toy(double, model_type="cohere")
    with pytest.raises(ValueError, match=r"has no logit_scale.*verify=True"):
        read_head(model)
    with pytest.raises(ValueError, match="differ from the model's own"):
        read_head(model, verify=True)


def test_module_between_backbone_and_head_is_not_ignored():
    model = Toy()
    model.transform = nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match=r"module 'transform' may stand between.*verify=True"):
        read_head(model)
    read_head(model, verify=True)  # it is there, but not used
    model.path = lambda hidden, head: head(model.transform(hidden))
    with pytest.raises(ValueError, match="differ from the model's own"):
        read_head(model, verify=True)


def test_transform_of_bert_is_refused():
    transformers = pytest.importorskip("transformers")
    model = loud(transformers.BertLMHeadModel(transformers.BertConfig(**BASE, is_decoder=True)))
    for verify, message in ((False, "module 'cls' may stand between"), (True, "gives?.* differ")):
        with pytest.raises(ValueError, match=message):
            read_head(model, verify=verify)


# ---------------------------------------------------------------- PEFT


def _lora(model, **options):
    peft = pytest.importorskip("peft")
    options = dict(target_modules=["q_proj", "v_proj"], init_lora_weights=False) | options
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options)).eval()


@torch.no_grad()
def test_lora_in_the_backbone_is_at_work(llama):
    before = llama(IDS).logits
    model = _lora(llama)
    head = read_head(model, verify=True)
    torch.testing.assert_close(_by_hand(head)[0], model(IDS).logits)
    assert (_by_hand(head)[0] - before).abs().max() > 1e-3


@torch.no_grad()
def test_head_in_modules_to_save_is_the_copy_at_work(llama):
    model = _lora(llama, modules_to_save=["lm_head"])
    model.add_adapter("second", model.peft_config["default"])
    wrapper = model.get_base_model().lm_head
    for name in ("default", "second"):
        wrapper.modules_to_save[name].weight.normal_()
        model.set_adapter(name)
        assert read_head(model, verify=True).weight is wrapper.modules_to_save[name].weight
    with model.disable_adapter():
        assert read_head(model, verify=True).weight is wrapper.original_module.weight


@pytest.mark.parametrize("name", ["llama", "qwen2 tied"])
def test_adapter_on_the_head_is_refused(name):
    model = _lora(build(name), target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError, match=r"adapter layer, expected the bare.*target_modules"):
        read_head(model)


def test_trainable_tokens_on_a_tied_head_are_refused():
    """... and what the message advises works."""
    model = _lora(build("qwen2 tied"), trainable_token_indices=[1, 2])
    with pytest.raises(TypeError, match="TokensWrapper as head.*expected a plain") as error:
        read_head(model)
    assert "name the embedding and the head in modules_to_save" in str(error.value)
    saved = _lora(build("qwen2 tied"), modules_to_save=["embed_tokens", "lm_head"])
    head = read_head(saved, verify=True)
    assert head.weight.requires_grad
    read_head(model.merge_and_unload(), verify=True)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_is_refused(llama, kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"got a P\w+ adapter.*virtual tokens shift"):
        read_head(peft.get_peft_model(llama, config))


def _xlora(peft, tmp_path):
    _lora(build("llama")).save_pretrained(tmp_path)
    return peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=HIDDEN,
                            adapters={"0": str(tmp_path)})  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("LORA", lambda peft, _: peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])),
        ("ADALORA", lambda peft, _: peft.AdaLoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9)),
        ("POLY", lambda peft, _: peft.PolyConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], n_tasks=2, n_skills=2)),
        ("XLORA", _xlora),
        ("SHADOW", lambda peft, _: peft.ShadowConfig(task_type="CAUSAL_LM")),
    ],
    ids=["alora", "adalora", "poly", "xlora", "shadow"],
)  # fmt: skip
def test_adapter_that_needs_the_peft_wrapper_is_refused(llama, tmp_path, kind, config):
    peft = pytest.importorskip("peft")
    if kind == "SHADOW" and not hasattr(peft, "ShadowConfig"):
        pytest.skip("this peft has no Shadow")
    llama.config.use_cache = False  # as X-LoRA wants it
    model = peft.get_peft_model(llama, config(peft, tmp_path))
    which = f"{kind} adapter with alora_inv" if kind == "LORA" else f"{kind} adapter, expected"
    with pytest.raises(ValueError, match=f"got a {which}.* a call of the backbone skips"):
        read_head(model)


def test_adalora_that_learns_no_more(llama):
    """Its forward adds a loss and nothing else: as a teacher it is read."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9)
    config.inference_mode = True
    read_head(peft.get_peft_model(llama, config), verify=True)


def test_no_tuner_with_a_forward_of_its_own_is_overlooked():
    """What a later PEFT brings has to be looked at: does it act outside of the layers?"""
    mapping = pytest.importorskip("peft.mapping")
    known = {"AdaLoraModel", "PolyModel", "XLoraModel", "ShadowModel"}
    seen = set()
    for kind, tuner in mapping.PEFT_TYPE_TO_TUNER_MAPPING.items():
        configs = {one.__name__ for one in mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind].__mro__}
        owner = next(one.__name__ for one in tuner.__mro__ if "forward" in vars(one))
        if "PromptLearningConfig" not in configs and owner not in ("BaseTuner", "Module"):
            seen.add(owner)
    assert {"AdaLoraModel", "PolyModel", "XLoraModel"} <= seen <= known


def test_compiled_model_is_read_through_its_wrapper():
    model = Toy()
    assert read_head(torch.compile(model)).backbone is model.model


def test_base_model_that_is_the_model_itself_gives_way_to_its_only_other_child():
    model = Whole()
    assert read_head(model, verify=True).backbone is model.model


def test_module_imports_neither_transformers_nor_peft():
    tree = list(ast.walk(ast.parse(inspect.getsource(heads_module))))
    names = [node.module for node in tree if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition(".")[0] for name in names} == {
        "re", "dataclasses", "typing", "torch", "gathering", "dtypes", "summary"
    }  # fmt: skip
