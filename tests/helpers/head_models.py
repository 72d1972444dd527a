"""Tiny random causal LMs, one per way of forming logits, for the tests of `heads`.

Scales and caps are far from neutral and head weights of size one, so that a step left out shows in
the logits. Models that transformers does not have are played by `Toy`.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

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


def build(name):
    transformers = pytest.importorskip("transformers")
    prefix, options = MODELS[name][:2]
    names = (prefix, prefix + "ForCausalLM")
    found = [getattr(transformers, n) for n in names if hasattr(transformers, n)]
    if not found:
        pytest.skip(f"this transformers has no {prefix}")
    return loud(found[0](found[0].config_class(**options)))


def build_wrapper(prefix, vision, text, **options):
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, prefix + "Config")
    config = config_class(text_config=text, vision_config=dict(VISION, model_type=vision),
                          image_token_index=96, **options)  # fmt: skip
    return loud(getattr(transformers, prefix + "ForConditionalGeneration")(config))


def loud(model):
    """Head weights of size one, so that a cap is felt."""
    torch.manual_seed(0)
    for parameter in model.get_output_embeddings().parameters():
        nn.init.normal_(parameter)
    return model.eval()


def gemma3(cap):
    return build_wrapper("Gemma3", "siglip_vision_model", mm_tokens_per_image=4,
                          text=dict(CAP, model_type="gemma3_text", final_logit_softcapping=cap)
                          )  # fmt: skip


def paligemma2():
    text = dict(CAP, model_type="gemma2")
    return build_wrapper("PaliGemma", "siglip_vision_model", text, projection_dim=HIDDEN)


def llava(**text):
    return build_wrapper("Llava", "clip_vision_model", dict(BASE, **text))


class Toy(nn.Module):
    """A causal LM in the manner of Hugging Face; `path` leads from hidden states to logits."""

    def __init__(self, path=None, head=None, **config):
        super().__init__()
        torch.manual_seed(0)
        self.model = Body()
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


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Embedding(VOCAB, HIDDEN), nn.Dropout(0.5)

    def forward(self, input_ids):
        return SimpleNamespace(last_hidden_state=self.drop(self.embed(input_ids)).tanh())


def double(hidden, head):
    return 2 * head(hidden)


class Whole(Toy):
    """Its base_model is the model itself."""

    base_model = property(lambda self: self)
