"""Teachers that would see a prompt's images otherwise than the student does: refused by name."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")
pytest.importorskip("PIL", reason="images need pillow")

import tiny
import transformers
import vision
from training import SGD, Spy

from tropd_kernels.trainer import TrOPDConfig, sources

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
#: Qwen3.5's config says the same of images as Qwen2-VL's, in these models: see below.
FAMILIES = sorted(vision.KINDS.keys() - {"qwen3_5"})


def train(folder, kind, teacher):
    args = TrOPDConfig(
        str(folder / "out"), max_steps=1, per_device_train_batch_size=2, max_completion_length=4,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, **SGD,
    )  # fmt: skip
    student, processor = vision.model(kind, 0), vision.processor(kind)
    Spy(student, teacher, args, vision.prompts(2, kind), processing_class=processor).train()


def changed(kind, **entries):
    """A teacher of this family, with other entries in its config, of vision where it has those."""
    made = vision.model(kind, 1)
    for name, value in entries.items():
        holder = made.config.vision_config if hasattr(made.config.vision_config, name) else None
        setattr(holder or made.config, name, value)
    return made


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_teacher_of_another_family(tmp_path, kind):
    other = FAMILIES[FAMILIES.index(kind) - 1]
    teacher = vision.model(other, 1)
    kinds = f"({teacher.config.model_type} and {vision.model(kind, 0).config.model_type})"
    words = f"teacher_model: it sees images otherwise than the student {kinds}: "
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        train(tmp_path, kind, teacher)


def test_a_family_with_the_same_images(tmp_path):
    """... is no reason to refuse a teacher, as Qwen2.5-VL for Qwen2-VL."""
    train(tmp_path, "qwen2_vl", vision.model("qwen3_5", 1))


@pytest.mark.parametrize(
    ("kind", "entries", "words"),
    [
        ("gemma3", {"image_token_id": vision.IDS[vision.VIDEO]},
         f"image_token_id is {vision.IDS[vision.IMAGE]} for the student and "
         f"{vision.IDS[vision.VIDEO]} for the teacher"),
        ("llava_next", {"image_token_index": 7}, "image_token_id is "),
        ("qwen2_vl", {"patch_size": 2}, "patch_size is 4 for the student and 2 for the teacher"),
        ("qwen3_5", {"spatial_merge_size": 1}, "spatial_merge_size is 2 for the student and 1 f"),
        ("idefics3", {"scale_factor": 4}, "scale_factor is 2 for the student and 4 for the teach"),
        ("gemma3", {"mm_tokens_per_image": 16}, "mm_tokens_per_image is 4 for the student and 16"),
        ("paligemma", {"image_size": 32}, "image_size is 16 for the student and 32 for the teach"),
    ],
)  # fmt: skip
def test_a_teacher_with_other_tokens_of_images(tmp_path, kind, entries, words):
    with pytest.raises(ValueError, match=f"^teacher_model: it sees .*: {words}"):
        train(tmp_path, kind, changed(kind, **entries))


def saved(folder, kind, **changes):
    """A teacher's folder, with an image processor that differs from the student's in these."""
    vision.model(kind, 1).save_pretrained(folder)
    processor = vision.processor(kind)
    for name, value in changes.items():
        setattr(processor.image_processor, name, value)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_mean": [0.1, 0.2, 0.3]},
         r"the student's processor makes pixels of .* of an image, the teacher's of "),
        ({"rescale_factor": 1.0}, "the student's processor makes pixels of "),
        ({"size": {"height": 32, "width": 32}}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_teacher_s_own_image_processor(tmp_path, changes, words):
    """Two models with one config may have been trained on other pixels; of which size a run's
    images are, is its own choice."""
    teacher = saved(tmp_path / "teacher", "gemma3", **changes)
    try:
        transformers.AutoImageProcessor.from_pretrained(teacher)
    except ImportError:
        pytest.skip("this transformers needs torchvision for it")
    if words is None:
        train(tmp_path, "gemma3", teacher)
        return
    with pytest.raises(ValueError, match=f"^teacher_model: it sees .*: {words}"):
        train(tmp_path, "gemma3", teacher)


def test_an_image_processor_without_torchvision(tmp_path, monkeypatch):
    """... which those of some versions of transformers want, cannot be compared."""

    class Wants:
        def from_pretrained(*_, **__):
            raise ImportError("torchvision")

    teacher = saved(tmp_path / "teacher", "gemma3")
    monkeypatch.setattr(sources, "AutoImageProcessor", Wants)
    with pytest.warns(UserWarning, match="^teacher_model: its image processor was not compared"):
        train(tmp_path, "gemma3", teacher)


def test_a_teacher_of_text_alone(tmp_path):
    """... has no part in this: it is refused where there are images."""
    with pytest.raises(NotImplementedError, match="^images: a LlamaForCausalLM does not see them"):
        train(tmp_path, "gemma3", tiny.model(1, vocab_size=vision.VOCAB))
