"""Positions of multimodal models begin behind the padding, or are computed by the model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import transformers
import vision
from training import by_hand, make

from tropd_kernels.trainer.context import context_of
from tropd_kernels.trainer.positions import computes_positions, positions_after_padding

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TEXT = dict(
    vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.15,
)  # fmt: skip
PIXTRAL = dict(
    model_type="pixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, head_dim=16, image_size=16, patch_size=4,
)  # fmt: skip
#: Ministral 3 multiplies its queries by a function of their positions.
MINISTRAL = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8,
    llama_4_scaling_beta=0.1, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
)  # fmt: skip
LONG = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[3.0] * 4,
    original_max_position_embeddings=16,
)  # fmt: skip


def of_images(seed, kind, text, rope, **options):
    """A model of images around a text model with this rotary scale."""
    torch.manual_seed(seed)
    text = TEXT | dict(model_type=text, rope_parameters=rope)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=PIXTRAL, image_token_id=95, tie_word_embeddings=False,
        **options,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(4.0 / (head.std() * head.shape[1] ** 0.5))
    model.generation_config = transformers.GenerationConfig(eos_token_id=[2, 3], pad_token_id=0)
    return model.eval()


def llava(seed):
    options = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
    return of_images(seed, "Llava", "llama", LONG, **options)


def test_positions_that_scale_the_attention(tmp_path):
    """A step on prompts of different lengths is that of the rows alone."""
    models = [of_images(seed, "Mistral3", "ministral3", MINISTRAL) for seed in (0, 1)]
    texts = [" ".join(f"w{(5 * i + j) % 91}" for j in range(n)) for i, n in enumerate((2, 7, 17))]
    trainer = make(
        tmp_path, *models, data=tiny.Dataset.from_dict({"prompt": texts}),
        per_device_train_batch_size=3, max_completion_length=6,
    )  # fmt: skip
    before, twin, teacher = (copy.deepcopy(model).double() for model in (trainer.model, *models))
    trainer.train()
    loss = by_hand(trainer, twin, teacher)
    assert sum(trainer.losses) == pytest.approx(loss.item(), rel=1e-5)
    new, rate = dict(trainer.model.named_parameters()), trainer.args.learning_rate
    wanted = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    steps = {name: (p - new[name]) / rate for name, p in before.named_parameters()}
    difference = sum((steps[name] - grad).square().sum() for name, grad in wanted.items())
    norm = sum(grad.square().sum() for grad in wanted.values())
    assert len(wanted) > 10 and difference < 1e-6 * norm


def test_padding_is_beyond_no_limit(tmp_path):
    """LongRoPE's scale changes above 16: each row has 16 tokens, both together 28 columns."""
    rows = [(14, 2), (2, 14)]

    def loss(rows):
        data = tiny.Dataset.from_dict({
            "prompt": [" ".join(["w7"] * prompt) for prompt, _ in rows],
            "completion_ids": [[9 + i for i in range(own - 1)] + [2] for _, own in rows],
            "teacher_label_log_probs": [[-1.0] * own for _, own in rows],
        })  # fmt: skip
        trainer = make(
            tmp_path, llava(0), data=data, objective="opd", precomputed_teacher=True,
            max_completion_length=14, per_device_train_batch_size=len(rows),
        )  # fmt: skip
        trainer.train()
        return sum(trainer.losses)

    alone = sum(own * loss([(prompt, own)]) for prompt, own in rows) / 16
    assert loss(rows) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", sorted(vision.KINDS))
def test_who_computes_positions(kind):
    """Passed positions give each row the hidden states that it has alone; of several dimensions
    there are none to pass."""
    model = vision.model(kind, 0)
    assert computes_positions(model) == kind.startswith("qwen")
    ids = torch.tensor([[9, 8, 7, 6, 5, 11]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    positions = positions_after_padding(model, mask)
    if kind.startswith("qwen"):
        assert positions == {}
        return
    generated = model._prepare_position_ids_for_generation(padded, {"attention_mask": mask})
    first = 1 if kind == "paligemma" else 0
    assert torch.equal(positions["position_ids"][:, 3:], generated[:, 3:] + first)


def test_a_model_that_reads_no_positions():
    """Refused where a row begins with padding, for then nobody knows where it begins."""

    class Backbone:
        def forward(self, input_ids, attention_mask):
            return None

    class Wrapper(transformers.GenerationMixin):
        base_model = Backbone()
        config = SimpleNamespace(model_type="blip-2", get_text_config=lambda: None)

    positions_after_padding(Wrapper(), torch.tensor([[1, 1, 0]]))
    with pytest.raises(ValueError, match="a blip-2 model takes no position_ids, so that its posit"):
        positions_after_padding(Wrapper(), torch.tensor([[0, 1, 1]]))


@pytest.mark.parametrize("kind", ["falcon_mamba", "mamba", "mamba2"])
def test_recurrent_models_have_no_limit(kind):
    """... whatever number their configs carry along."""
    config = transformers.AutoConfig.for_model(kind, max_position_embeddings=16)
    assert context_of(config) is None
