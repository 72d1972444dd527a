"""Tiny models that see images, their processors, and prompts with an image each: offline.

One each of the ways in which a model is told which tokens are images': `token_type_ids` (Gemma 3,
whose image tokens attend to one another; PaliGemma, whose whole prompt does), `mm_token_type_ids`
(Qwen2-VL and Qwen3.5, which count positions by them), and their ids alone (Aria, with a mask of its
pixels; Idefics 2 and 3, whose pixels have an item for each row, padded to the most images of one;
LLaVA-NeXT, an item for each image, padded to the most tiles of one; DeepSeek-VL, whose processor
makes tensors unless it is told not to). torchvision is not needed.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from PIL import Image
from transformers import GenerationConfig, ProcessorMixin

#: Behind the text model's own ids: what a prompt holds of an image.
IMAGE, BEGIN, END, VIDEO = "<image>", "<|begin|>", "<|close|>", "<|video_pad|>"
IDS = {name: tiny.VOCAB + i for i, name in enumerate((IMAGE, BEGIN, END, VIDEO))}
VOCAB = tiny.VOCAB + len(IDS)
_TEMPLATE = (
    "{% for m in messages %}<s> {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ PLACE if p['type'] == 'image' else p['text'] }} {% endfor %}"
    "{% endif %} <|end|>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)
_TEXT = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.15,
)  # fmt: skip
_QWEN = dict(
    image_token_id=IDS[IMAGE], video_token_id=IDS[VIDEO], vision_start_token_id=IDS[BEGIN],
    vision_end_token_id=IDS[END],
)  # fmt: skip
_EYE = dict(depth=1, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
_GAZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
             image_size=16)  # fmt: skip
#: Sizes that LLaVA-NeXT cuts into tiles of 16 x 16.
_TILES = [[16, 32], [32, 16]]


def _gemma3():
    config = transformers.Gemma3Config(
        text_config=_TEXT | {"layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 1},
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=2, image_size=16, patch_size=4),
        mm_tokens_per_image=4, image_token_id=IDS[IMAGE], boi_token_id=IDS[BEGIN],
        eoi_token_id=IDS[END], tie_word_embeddings=False,
    )  # fmt: skip
    made = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # it begins at 0, that is blind
        made.model.multi_modal_projector.mm_input_projection_weight.normal_()
    return made


def _paligemma():
    config = transformers.PaliGemmaConfig(
        text_config=_TEXT | {"model_type": "gemma"},
        vision_config=dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48,
                           num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
                           vision_use_head=False),
        image_token_index=IDS[IMAGE], projection_dim=32, hidden_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config)


def _qwen2_vl():
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    config = transformers.Qwen2VLConfig(
        text_config=_TEXT | {"rope_parameters": rope},
        vision_config=_EYE | dict(embed_dim=16, hidden_size=32, mlp_ratio=2), **_QWEN,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen3_5():
    rope = dict(
        rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 0], partial_rotary_factor=0.25
    )
    linear = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
                  linear_num_value_heads=4)  # fmt: skip
    config = transformers.Qwen3_5Config(
        text_config=_TEXT | linear | dict(
            head_dim=16, layer_types=["linear_attention", "full_attention"], rope_parameters=rope
        ),
        vision_config=_EYE | dict(hidden_size=16, intermediate_size=32, out_hidden_size=32,
                                  num_position_embeddings=16),
        **_QWEN,
    )  # fmt: skip
    return transformers.Qwen3_5ForConditionalGeneration(config)


def _aria():
    config = transformers.AriaConfig(
        text_config=_TEXT | dict(model_type="aria_text", moe_num_experts=2, moe_topk=1,
                                 moe_num_shared_experts=1),
        vision_config=dict(model_type="idefics3_vision", hidden_size=32, intermediate_size=48,
                           num_hidden_layers=1, num_attention_heads=2, image_size=14,
                           patch_size=2),
        projector_patch_to_query_dict={49: 4}, image_token_index=IDS[IMAGE],
        tie_word_embeddings=False,
    )  # fmt: skip
    made = transformers.AriaForConditionalGeneration(config)
    made.set_experts_implementation("eager")  # the others take no float64
    return made


def _deepseek_vl():
    config = transformers.DeepseekVLConfig(
        text_config=_TEXT | {"model_type": "llama"}, image_token_id=IDS[IMAGE],
        vision_config=_GAZE | dict(model_type="siglip_vision_model", patch_size=8,
                                   vision_use_head=False),
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.DeepseekVLForConditionalGeneration(config)


def _idefics2():
    config = transformers.Idefics2Config(
        text_config=_TEXT | {"model_type": "mistral"}, image_token_id=IDS[IMAGE],
        vision_config=_GAZE | {"patch_size": 4},
        perceiver_config=dict(hidden_size=32, resampler_n_latents=4, resampler_depth=1,
                              resampler_n_heads=2, resampler_head_dim=16, num_key_value_heads=1),
    )  # fmt: skip
    return transformers.Idefics2ForConditionalGeneration(config)


def _idefics3():
    config = transformers.Idefics3Config(
        text_config=_TEXT | {"model_type": "llama"}, image_token_id=IDS[IMAGE], pad_token_id=0,
        vision_config=_GAZE | {"patch_size": 4}, scale_factor=2,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config)


def _llava_next():
    config = transformers.LlavaNextConfig(
        text_config=_TEXT | {"model_type": "llama"}, image_token_index=IDS[IMAGE],
        vision_config=_GAZE | dict(model_type="siglip_vision_model", patch_size=8,
                                   vision_use_head=False),
        image_grid_pinpoints=_TILES, vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config)


KINDS = {
    "aria": _aria, "deepseek_vl": _deepseek_vl, "gemma3": _gemma3, "idefics2": _idefics2,
    "idefics3": _idefics3, "llava_next": _llava_next, "paligemma": _paligemma,
    "qwen2_vl": _qwen2_vl, "qwen3_5": _qwen3_5,
}  # fmt: skip
#: What the types of tokens, by the field's name, give to a token that a model writes, if not 0.
WRITTEN = {"paligemma": {"token_type_ids": 1}}


def model(kind: str, seed: int, spread: float = 4.0):
    torch.manual_seed(seed)
    made = KINDS[kind]()
    with torch.no_grad():
        head = made.get_output_embeddings().weight
        head.mul_(spread / (head.std() * head.shape[1] ** 0.5))
    made.generation_config = GenerationConfig(eos_token_id=[2, 3], pad_token_id=0, bos_token_id=1)
    return made.eval()


def processor(kind: str) -> ProcessorMixin:
    tokens = tiny.tokenizer()
    tokens.add_special_tokens(
        {"additional_special_tokens": ["<s>", "<|end|>", IMAGE, BEGIN, END, VIDEO]}
    )
    if kind == "gemma3":
        module = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
        tokens._set_model_specific_special_tokens(  # which are saved with it
            {"boi_token": BEGIN, "image_token": IMAGE, "eoi_token": END}
        )
        images = module.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        template = _TEMPLATE.replace("PLACE", f"'{BEGIN}'")
        return transformers.Gemma3Processor(
            images, tokens, chat_template=template, image_seq_length=4
        )
    if kind == "aria":
        module = pytest.importorskip("transformers.models.aria.image_processing_pil_aria")

        class Thinned(module.AriaImageProcessorPil):
            """Of the smaller of the two sizes that it makes, every 35th pixel each way: 14 x 14."""

            def _preprocess(self, images, **options):
                made = super()._preprocess(images, **options | {"max_image_size": 490})
                for name in ("pixel_values", "pixel_mask"):
                    made[name] = made[name][..., ::35, ::35]
                return made

        images = Thinned()
        tokens.image_token, tokens.image_token_id = IMAGE, IDS[IMAGE]
        template = _TEMPLATE.replace("PLACE", f"'{IMAGE}'")
        return transformers.AriaProcessor(
            images, tokens, chat_template=template, size_conversion={14: 4}
        )
    if kind == "deepseek_vl":
        module = pytest.importorskip(
            "transformers.models.deepseek_vl.image_processing_pil_deepseek_vl"
        )
        images = module.DeepseekVLImageProcessorPil(size={"height": 16, "width": 16}, min_size=4)
        tokens.image_token = IMAGE
        template = _TEMPLATE.replace("PLACE", f"'{IMAGE}'")
        return transformers.DeepseekVLProcessor(
            images, tokens, chat_template=template, num_image_tokens=4
        )
    if kind == "paligemma":
        module = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
        images = module.SiglipImageProcessorPil(size={"height": 16, "width": 16})
        images.image_seq_length, tokens.bos_token = 4, "<s>"
        template = _TEMPLATE.replace("PLACE", f"'{IMAGE}'")
        return transformers.PaliGemmaProcessor(images, tokens, chat_template=template)
    if kind in ("idefics2", "idefics3"):
        module = pytest.importorskip(f"transformers.models.{kind}.image_processing_pil_{kind}")
        name = kind.capitalize()
        small = {"longest_edge": 16}
        own = {"idefics2": dict(size=small | {"shortest_edge": 8}),
               "idefics3": dict(size=small, max_image_size=small)}  # fmt: skip
        images = getattr(module, f"{name}ImageProcessorPil")(do_image_splitting=False, **own[kind])
        template = _TEMPLATE.replace("PLACE", f"'{IMAGE}'")
        made = getattr(transformers, f"{name}Processor")(
            images, tokens, image_seq_len=4, chat_template=template
        )
        made.fake_image_token, made.global_image_tag = BEGIN, END
        return made
    if kind == "llava_next":
        module = pytest.importorskip(
            "transformers.models.llava_next.image_processing_pil_llava_next"
        )
        images = module.LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=_TILES,
        )  # fmt: skip
        template = _TEMPLATE.replace("PLACE", f"'{IMAGE}'")
        return transformers.LlavaNextProcessor(
            images, tokens, patch_size=8, vision_feature_select_strategy="full",
            chat_template=template, image_token=IMAGE,
        )  # fmt: skip
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    images = module.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, min_pixels=64, max_pixels=256
    )
    template = _TEMPLATE.replace("PLACE", f"'{BEGIN}{IMAGE}{END}'")
    return _QwenOfImages(images, tokens, chat_template=template)


class _QwenOfImages(transformers.Qwen2VLProcessor):
    """Without videos, whose processor would need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.image_token_id = IMAGE, IDS[IMAGE]
        self.video_token, self.video_token_id = VIDEO, IDS[VIDEO]
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def image(number: int) -> Image.Image:
    """Another one, and of another size, for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, (8, 16)[number % 2], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def prompts(rows: int = 8, kind: str = "", **columns) -> Dataset:
    """A question of 1 to 4 words about an image each; for PaliGemma, whose processor takes only
    prompts of one length, of 1 word."""
    lengths = 1 if kind == "paligemma" else 4
    talk = [
        [{"role": "user", "content": " ".join(tiny.WORDS[7 * i : 7 * i + 1 + i % lengths])}]
        for i in range(rows)
    ]
    return Dataset.from_dict({"prompt": talk, "image": [image(i) for i in range(rows)]} | columns)
