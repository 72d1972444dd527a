"""A teacher that is given by name: in which dtype it is loaded."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make
from trl import DistillationConfig, DistillationTrainer

from tropd_kernels.trainer import TrOPDConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def saved(folder, model) -> str:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def by_trl(folder, name, **options) -> torch.dtype:
    """The dtype in which TRL's own trainer loads this teacher."""
    args = DistillationConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", teacher_model_init_kwargs=options
    )
    trainer = DistillationTrainer(
        tiny.model(0), name, args, tiny.prompts(), processing_class=tiny.tokenizer()
    )
    return trainer.teacher_model.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_teacher_keeps_the_dtype_of_its_checkpoint(tmp_path, dtype):
    """TRL's loader by itself would make float32 of it, twice the memory."""
    name = saved(tmp_path / "teacher", tiny.model(1, dtype=dtype))
    trainer = make(tmp_path, teacher=name)
    assert trainer.teacher_model.dtype == dtype == by_trl(tmp_path, name)
    trainer.train()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float16", "torch.float16", torch.float16, "auto", None])
def test_dtype_that_is_asked_for(tmp_path, key, value):
    name = saved(tmp_path / "teacher", tiny.model(1, dtype=torch.bfloat16))
    trainer = make(tmp_path, teacher=name, teacher_model_init_kwargs={key: value})
    expected = torch.bfloat16 if value in ("auto", None) else torch.float16
    assert trainer.teacher_model.dtype == expected
    if key == "dtype" and isinstance(value, str) and "." not in value:
        assert by_trl(tmp_path, name, dtype=value) == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_a_student_by_name(tmp_path, key):
    """Of the student TRL makes float32, but for what is asked."""
    name = saved(tmp_path / "student", tiny.model(0, dtype=torch.bfloat16))
    assert make(tmp_path, name).model.dtype == torch.float32
    trainer = make(tmp_path, name, model_init_kwargs={key: "bfloat16"})
    assert trainer.model.dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_no_dtype(key):
    for given, words in (
        ({"torch_dtype": "bf16"}, "torch_dtype: expected 'auto' or one of bfloat16, .* 'bf16'"),
        ({"dtype": torch.float8_e4m3fn}, "dtype: expected 'auto' or one of bfloat16"),
        ({"torch_dtype": torch.int8}, "torch_dtype: expected 'auto' or one of bfloat16"),
        ({"dtype": 16}, "dtype: expected 'auto' or one of"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype 'float16' and torch_dtype 'bf"),
    ):
        with pytest.raises(ValueError, match=f"^{key}: {words}"):
            TrOPDConfig("unused", use_cpu=True, bf16=False, **{key: given})
    both = {"dtype": "float16", "torch_dtype": torch.float16}
    args = TrOPDConfig("unused", use_cpu=True, bf16=False, **{key: both})
    assert getattr(args, key) == {"dtype": torch.float16}
