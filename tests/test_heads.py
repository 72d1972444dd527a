"""heads.py against the models themselves: tiny random ones, one per way of forming logits.

Scales and caps are far from neutral and head weights of size one, so that a step left out shows in
the logits. Models that transformers does not have are played by `_Toy`.
"""

import ast
import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tropd_kernels.heads as heads_module
from tropd_kernels.heads import check_head, read_head

VOCAB, HIDDEN = 97, 32
IDS = torch.tensor([[5, 17, 3, 90, 41, 8], [7, 7, 30, 60, 4, 11]])

# fmt: off
BASE = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)
EIGHT = dict(BASE, head_dim=8)
MOE = dict(BASE, num_local_experts=4, num_experts_per_tok=2)
GRANITE = dict(MOE, logits_scaling=4.0, shared_intermediate_size=32)
CAP = dict(EIGHT, final_logit_softcapping=5.0)
ROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
SWA = dict(layer_types=["full_attention", "sliding_attention"], sliding_window=16)
INKLING = dict(EIGHT, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, d_rel=4,
               moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
               unpadded_vocab_size=90)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
             mamba_chunk_size=8)
GPT = dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
           eos_token_id=2)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
              image_size=28, patch_size=14)

# class (without ForCausalLM), keywords of its config, logit_scale, softcap
MODELS = {
    "llama": ("Llama", BASE, 1.0, None),
    "qwen2 tied": ("Qwen2", dict(BASE, tie_word_embeddings=True), 1.0, None),
    "qwen3": ("Qwen3", EIGHT, 1.0, None),
    "mixtral": ("Mixtral", MOE, 1.0, None),
    "smollm3": ("SmolLM3", BASE, 1.0, None),
    "gpt2 tied": ("GPT2LMHeadModel", GPT, 1.0, None),
    "gptj bias": ("GPTJ", dict(GPT, rotary_dim=4), 1.0, None),
    "phi bias": ("Phi", BASE, 1.0, None),
    "mpt": ("Mpt", dict(vocab_size=VOCAB, d_model=HIDDEN, n_layers=2, n_heads=4), 1.0, None),
    "llama4": ("Llama4", dict(EIGHT, num_local_experts=2), 1.0, None),  # base_model is the model
    "bart": ("Bart", dict(vocab_size=VOCAB, d_model=HIDDEN, decoder_layers=2, decoder_ffn_dim=64,
                          decoder_attention_heads=4), 1.0, None),  # base_model is not called
    "gemma": ("Gemma", EIGHT, 1.0, None),
    "gemma2": ("Gemma2", CAP, 1.0, 5.0),
    "gemma2 uncapped": ("Gemma2", dict(CAP, final_logit_softcapping=None), 1.0, None),
    "gemma3_text": ("Gemma3", CAP, 1.0, 5.0),
    "gemma4_text": ("Gemma4", dict(CAP, global_head_dim=8, num_kv_shared_layers=0,
                                   vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
                                   layer_types=SWA["layer_types"][::-1]), 1.0, 5.0),
    "vaultgemma": ("VaultGemma", CAP, 1.0, 5.0),
    "nanochat": ("NanoChat", CAP, 1.0, 5.0),
    "beam": ("Beam", CAP, 1.0, 5.0),
    "recurrent_gemma": ("RecurrentGemma", dict(BASE, logits_soft_cap=5.0, lru_width=32,
                                               num_hidden_layers=3), 1.0, 5.0),
    "xlstm": ("xLSTM", dict(vocab_size=VOCAB, hidden_size=64, num_heads=2, num_hidden_layers=2,
                            qk_dim_factor=1.0, output_logit_soft_cap=5.0), 1.0, 5.0),
    "cohere": ("Cohere", dict(BASE, logit_scale=0.25), 0.25, None),
    "cohere2": ("Cohere2", dict(BASE, logit_scale=0.25), 0.25, None),
    "cohere_compass": ("CohereCompass", dict(BASE, **SWA, logit_scale=0.25, rope_parameters=dict(
        full_attention=ROPE, sliding_attention=ROPE)), 0.25, None),
    "granite": ("Granite", dict(BASE, logits_scaling=4.0), 0.25, None),
    "granitemoe": ("GraniteMoe", dict(MOE, logits_scaling=4.0), 0.25, None),
    "granitemoeshared": ("GraniteMoeShared", GRANITE, 0.25, None),
    "granitemoehybrid": ("GraniteMoeHybrid", dict(GRANITE, mamba_n_heads=4,
                                                  layer_types=["attention"] * 2), 0.25, None),
    "hyperclovax": ("HyperCLOVAX", dict(BASE, logits_scaling=4.0), 4.0, None),
    "falcon_h1": ("FalconH1", dict(BASE, lm_head_multiplier=0.25, **MAMBA), 0.25, None),
    "minicpm3": ("MiniCPM3", dict(BASE, **MLA, num_key_value_heads=4, dim_model_base=8), .25, None),
    "inkling": ("Inkling", dict(INKLING, logits_mup_width_multiplier=4.0), 0.25, None),
    "inkling2": ("Inkling2", dict(INKLING, final_logit_softcapping=5.0), 1.0, 5.0),
}
# fmt: on


def _build(name):
    transformers = pytest.importorskip("transformers")
    prefix, options = MODELS[name][:2]
    names = (prefix, prefix + "ForCausalLM")
    found = [getattr(transformers, n) for n in names if hasattr(transformers, n)]
    if not found:
        pytest.skip(f"this transformers has no {prefix}")
    return _loud(found[0](found[0].config_class(**options)))


def _build_wrapper(prefix, vision, text, **options):
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, prefix + "Config")
    config = config_class(text_config=text, vision_config=dict(VISION, model_type=vision),
                          image_token_index=96, **options)  # fmt: skip
    return _loud(getattr(transformers, prefix + "ForConditionalGeneration")(config))


def _loud(model):
    """Head weights of size one, so that a cap is felt."""
    torch.manual_seed(0)
    for parameter in model.get_output_embeddings().parameters():
        nn.init.normal_(parameter)
    return model.eval()


def _gemma3(cap):
    return _build_wrapper("Gemma3", "siglip_vision_model", mm_tokens_per_image=4,
                          text=dict(CAP, model_type="gemma3_text", final_logit_softcapping=cap)
                          )  # fmt: skip


def _paligemma2():
    text = dict(CAP, model_type="gemma2")
    return _build_wrapper("PaliGemma", "siglip_vision_model", text, projection_dim=HIDDEN)


def _llava(**text):
    return _build_wrapper("Llava", "clip_vision_model", dict(BASE, **text))


@pytest.fixture
def llama():
    return _build("llama")


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
    model = _build(name)
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
    for model in (_gemma3(None), _llava(model_type="llama")):
        head = read_head(model)
        assert head.backbone is model.model is not model.get_decoder()
        torch.testing.assert_close(_by_hand(head)[0], model(IDS).logits)


WRAPPERS = {
    "gemma3": lambda: _gemma3(5.0),
    "paligemma2": _paligemma2,
    "llava granite": lambda: _llava(model_type="granite", logits_scaling=4.0),
    "llava cohere": lambda: _llava(model_type="cohere", logit_scale=0.25),
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


class _Toy(nn.Module):
    """A causal LM in the manner of Hugging Face; `path` leads from hidden states to logits."""

    def __init__(self, path=None, head=None, **config):
        super().__init__()
        torch.manual_seed(0)
        self.model = _Body()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False) if head is None else head
        self.path = path or (lambda hidden, head: head(hidden))
        config = dict(model_type="toy", vocab_size=VOCAB, eos_token_id=0) | config
        self.config = SimpleNamespace(**config)

    base_model = property(lambda self: self.model)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return SimpleNamespace(logits=self.path(hidden, self.lm_head))


class _Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Embedding(VOCAB, HIDDEN), nn.Dropout(0.5)

    def forward(self, input_ids):
        return SimpleNamespace(last_hidden_state=self.drop(self.embed(input_ids)).tanh())


def _double(hidden, head):
    return 2 * head(hidden)


def test_minicpm_divides_the_hidden_states():
    """The original is remote code and knows only `dim_model_base`."""
    options = dict(model_type="minicpm", hidden_size=HIDDEN, dim_model_base=8)
    model = _Toy(lambda hidden, head: head(hidden / 4), **options)
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
        head = read_head(_Toy(path, model_type=kind, **config), verify=True)
        assert (head.logit_scale, head.softcap) == (scale, softcap)


SUSPECTS = dict(logit_multiplier=0.5, output_multiplier_scale=0.5, mup_width_multiplier=8.0,
                use_mup=True, final_softcap=30, unpadded_vocab_size=90, logits_temperature=2.0,
                lm_head_scales=[1.0, 2.0])  # fmt: skip


@pytest.mark.parametrize("name", SUSPECTS)
def test_unknown_entry_that_may_change_the_logits_is_not_ignored(name):
    entry = {name: SUSPECTS[name]}
    for config in (entry, {"text_config": SimpleNamespace(vocab_size=VOCAB, **entry)}):
        with pytest.raises(ValueError, match=f"{name} = .* may change.*verify=True"):
            read_head(_Toy(**config))
        assert read_head(_Toy(**config), verify=True).logit_scale == 1.0
    with pytest.raises(ValueError, match=r"differ from the model's own by up to \d"):
        read_head(_Toy(_double, **entry), verify=True)


def test_entries_that_change_nothing_are_no_reason_to_refuse():
    neutral = dict(logit_scale=1.0, final_logit_softcapping=None, logit_cap=0, use_mup=False)
    elsewhere = dict(attn_logit_softcapping=50.0, router_logit_softcapping=5.0, lm_head_bias=True,
                     output_router_logits=True, num_logits_to_keep=5, logit_scale_init_value=2.6
                     )  # fmt: skip
    assert read_head(_Toy(**neutral, **elsewhere)).logit_scale == 1.0
    assert read_head(_Toy(model_type="afmoe", mup_enabled=True)).logit_scale == 1.0


def test_known_model_that_lost_its_attribute_is_not_taken_for_neutral():
    model = _Toy(_double, model_type="cohere")
    with pytest.raises(ValueError, match=r"has no logit_scale.*verify=True"):
        read_head(model)
    with pytest.raises(ValueError, match="differ from the model's own"):
        read_head(model, verify=True)


def test_module_between_backbone_and_head_is_not_ignored():
    model = _Toy()
    model.transform = nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match=r"module 'transform' may stand between.*verify=True"):
        read_head(model)
    read_head(model, verify=True)  # it is there, but not used
    model.path = lambda hidden, head: head(model.transform(hidden))
    with pytest.raises(ValueError, match="differ from the model's own"):
        read_head(model, verify=True)


def test_transform_of_bert_is_refused():
    transformers = pytest.importorskip("transformers")
    model = _loud(transformers.BertLMHeadModel(transformers.BertConfig(**BASE, is_decoder=True)))
    for verify, message in ((False, "module 'cls' may stand between"), (True, "gives?.* differ")):
        with pytest.raises(ValueError, match=message):
            read_head(model, verify=verify)


# ---------------------------------------------------------------- check_head


def test_check_sees_wrong_scale_cap_and_bias():
    model = _build("gptj bias")
    head = read_head(model)
    for wrong in ({"logit_scale": 1.01}, {"softcap": 200.0}, {"bias": None}):
        with pytest.raises(ValueError, match=r"differ .* by up to \d.* allowed.*materialise"):
            check_head(model, dataclasses.replace(head, **wrong))


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_check_sees_a_cap_with_weights_fresh_from_init(name):
    """Fresh logits are far below any cap, where it changes nothing: the check stretches them."""
    model = _build(name)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.002)
    head = read_head(model, verify=True)
    with pytest.raises(ValueError, match="differ"):
        check_head(model, dataclasses.replace(head, softcap=None if head.softcap else 30.0))


@pytest.mark.parametrize("name", ["gemma2", "minicpm3", "phi bias"])
def test_check_in_bfloat16(name):
    model = _build(name).bfloat16()
    head = read_head(model, verify=True)
    assert head.logits(head.backbone(IDS).last_hidden_state).dtype == torch.float32
    with pytest.raises(ValueError, match="differ"):
        check_head(model, dataclasses.replace(head, logit_scale=1.1 * head.logit_scale))


@pytest.mark.parametrize("path", [None, _double], ids=["passing", "failing"])
def test_check_leaves_the_model_as_it_was(path):
    model = _Toy(path)
    model.lm_head.eval()  # a mixture of modes, with dropout at work
    if path is None:
        check_head(model)
    else:
        with pytest.raises(ValueError, match="differ"):
            check_head(model)
    assert model.training and model.model.drop.training and not model.lm_head.training
    assert not model.model._forward_hooks


def test_check_tells_when_the_backbone_alone_gives_other_hidden_states():
    class Shifted(_Body):
        def forward(self, input_ids, shift=0.0):
            return SimpleNamespace(last_hidden_state=self.embed(input_ids) + shift)

    model = _Toy()
    model.model = body = Shifted()
    model.forward = lambda input_ids: SimpleNamespace(
        logits=model.lm_head(body(input_ids, shift=1.0).last_hidden_state)
    )
    with pytest.raises(ValueError, match="backbone called alone gives hidden states that differ"):
        check_head(model)


def test_check_refuses_logits_that_do_not_fit_or_tell_nothing():
    def masked(hidden, head):
        return head(hidden).index_fill(-1, torch.tensor([4]), torch.finfo(torch.float32).min)

    silent = _Toy()
    nn.init.zeros_(silent.lm_head.weight)
    for model, message in (
        (_Toy(lambda hidden, head: head(hidden)[..., :90]), r"\(1, 8, 90\).*vocab_size=97 columns"),
        (_Toy(lambda hidden, head: head(hidden)[0]), r"logits have shape \(8, 97\)"),
        (_Toy(head=nn.Linear(16, VOCAB)), r"states \(1, 8, 32\), expected \(1, 8, 16\)"),
        (silent, "largest logit of a probe is 0"),
        (_Toy(lambda hidden, head: head(hidden) / 0), "differ .* by up to inf"),
        (_Toy(lambda hidden, head: head(hidden) * float("nan")), "differ .* by up to nan"),
        (_Toy(masked), r"differ .* by up to 3.4e\+38"),
    ):
        with pytest.raises(ValueError, match=message):
            check_head(model)


def test_check_avoids_special_tokens():
    text = SimpleNamespace(model_type="toy_text", vocab_size=VOCAB, image_token_index=1)
    model, seen = _Toy(eos_token_id=[0, 3], text_config=text), []
    model.model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    check_head(model)
    assert seen[0].tolist() == [[2, 4, 5, 6, 7, 8, 9, 10]]


def test_sharded_head_is_gathered_for_the_check():
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import Shard, distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh, model = torch.distributed.init_device_mesh("cpu", (1,)), _Toy()
        whole = model.lm_head.weight.detach()
        model.lm_head.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        hidden = torch.randn(3, HIDDEN)
        torch.testing.assert_close(read_head(model).logits(hidden), hidden @ whole.T)
    finally:
        torch.distributed.destroy_process_group()


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
    model = _lora(_build(name), target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError, match=r"adapter layer, expected the bare.*target_modules"):
        read_head(model)


def test_trainable_tokens_on_a_tied_head_are_refused():
    """... and what the message advises works."""
    model = _lora(_build("qwen2 tied"), trainable_token_indices=[1, 2])
    with pytest.raises(TypeError, match="TokensWrapper as head.*expected a plain") as error:
        read_head(model)
    assert "name the embedding and the head in modules_to_save" in str(error.value)
    saved = _lora(_build("qwen2 tied"), modules_to_save=["embed_tokens", "lm_head"])
    head = read_head(saved, verify=True)
    assert head.weight.requires_grad
    read_head(model.merge_and_unload(), verify=True)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_is_refused(llama, kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"got a P\w+ adapter.*virtual tokens shift"):
        read_head(peft.get_peft_model(llama, config))


def test_adapter_that_needs_the_peft_wrapper_is_refused(llama):
    model = _lora(llama, task_type="CAUSAL_LM", alora_invocation_tokens=[5])
    with pytest.raises(ValueError, match="a call of the backbone skips"):
        read_head(model)


# ---------------------------------------------------------------- refusals


class _Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _Disguised(torch.Tensor):
    """Shows a floating dtype and holds something else, as quantised tensors do."""


class _Whole(_Toy):
    base_model = property(lambda self: self)


def _holding(weight, layer=nn.Linear, bias=None):
    """A model whose head holds this weight."""
    head = layer(HIDDEN, VOCAB, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    head.bias = None if bias is None else nn.Parameter(bias)
    return _Toy(head=head)


def _distributed():
    return nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)


def _t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_ff=64, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def _whole_with_a_tower():
    model = _Whole()
    model.tower = nn.Linear(2, 2)
    return model


WEIGHT = torch.zeros(VOCAB, HIDDEN)
QUANTISED = r"weight .*expected floating point, not quantised.*modules_to_not_convert"
CUSTOM = r"got a \w+ as head.*expected a plain nn.Linear"
# fmt: off
REFUSED = {
    "4-bit": (lambda: _holding(torch.zeros(1552, 1, dtype=torch.uint8), _Louder), ValueError,
              QUANTISED),
    "8-bit": (lambda: _holding(WEIGHT.to(torch.int8)), ValueError, QUANTISED),
    "float8": (lambda: _holding(WEIGHT.to(torch.float8_e4m3fn)), ValueError, QUANTISED),
    "subclass": (lambda: _holding(WEIGHT.as_subclass(_Disguised)), ValueError, QUANTISED),
    "own forward": (lambda: _Toy(head=_Louder(HIDDEN, VOCAB)), TypeError, CUSTOM),
    "sequential": (lambda: _Toy(head=nn.Sequential(nn.Linear(2, 2))), TypeError, CUSTOM),
    "embedding": (lambda: _Toy(head=nn.Embedding(VOCAB, HIDDEN)), TypeError, CUSTOM),
    "parametrised": (lambda: _Toy(head=nn.utils.parametrizations.weight_norm(
        nn.Linear(HIDDEN, VOCAB))), TypeError, CUSTOM),
    "ZeRO-3": (lambda: _holding(torch.empty(0)), ValueError,
               r"\(0,\).*gathered first.*GatheredParameters"),
    "0 rows": (lambda: _holding(WEIGHT[:0]), ValueError, r"\(0, 32\).*gathered first"),
    "flattened": (lambda: _holding(WEIGHT.view(-1)), ValueError,
                  r"\(3104,\).*expected \(V, H\) and \(V,\): gather"),
    "bias": (lambda: _holding(WEIGHT, bias=torch.zeros(5)), ValueError,
             r"bias \(5,\), expected \(V, H\) and \(V,\)"),
    "meta": (lambda: _holding(WEIGHT.to("meta")), ValueError, "on meta, expected .* in memory"),
    "DataParallel": (lambda: nn.DataParallel(_Toy()), TypeError,
                     "in DataParallel, expected the bare model"),
    "DistributedDataParallel": (_distributed, TypeError,
                                "in DistributedDataParallel.*pass model.module"),
    "no model": (lambda: nn.Linear(2, 2), TypeError, "got a Linear without config, base_model"),
    "no head": (lambda: _build("llama").model, ValueError,
                "LlamaModel without output head.*AutoModelForCausalLM"),
    "encoder-decoder": (_t5, ValueError, "encoder-decoder T5.*expected decoder-only.*materialise"),
    "head in base_model": (_whole_with_a_tower, ValueError,
                           r"base_model \(_Whole\) contains the output head"),
    "chameleon": (lambda: _Toy(model_type="chameleon"), ValueError, "it masks.*materialise"),
    "prophetnet": (lambda: _Toy(model_type="prophetnet"), ValueError, "streams.*materialise"),
}
# fmt: on


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_what_was_given_and_what_to_do(name, verify):
    build, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        read_head(build(), verify=verify)


def test_compiled_model_is_read_through_its_wrapper():
    model = _Toy()
    assert read_head(torch.compile(model)).backbone is model.model


def test_base_model_that_is_the_model_itself_gives_way_to_its_only_other_child():
    model = _Whole()
    assert read_head(model, verify=True).backbone is model.model


def test_module_imports_neither_transformers_nor_peft():
    tree = list(ast.walk(ast.parse(inspect.getsource(heads_module))))
    names = [node.module for node in tree if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition(".")[0] for name in names} == {
        "re", "dataclasses", "typing", "torch", "gathering", "products", "summary"
    }  # fmt: skip
