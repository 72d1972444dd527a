"""Shapes by name: vocabulary, the student's width, the teacher's width, and the soft cap.

A name is the student's; its teacher is a larger model of the family, and `--teacher-hidden-size`
takes another. "small" is what a machine without a GPU runs when it is told nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """softcap: of both sides' logits, or None."""

    vocab_size: int
    hidden_size: int
    teacher_hidden_size: int
    softcap: float | None = None

    def __str__(self) -> str:
        cap = "" if self.softcap is None else f", soft cap {self.softcap:g}"
        return (
            f"vocabulary {self.vocab_size:,}, widths {self.hidden_size:,} (student) and "
            f"{self.teacher_hidden_size:,} (teacher){cap}"
        )


QWEN3, LLAMA3, GEMMA = 151_936, 128_256, 262_144

#: gemma: Gemma's ids with the cap of Gemma 2 and 3n. qwen3-8b-self: a teacher of the student's own
#: size. liger: the sizes of which Liger publishes times of its linear JSD, at 8192 tokens.
SHAPES = {
    "small": Shape(32_768, 256, 512),
    "qwen3-0.6b": Shape(QWEN3, 1024, 2560),
    "qwen3-1.7b": Shape(QWEN3, 2048, 4096),
    "qwen3-4b": Shape(QWEN3, 2560, 5120),
    "qwen3-8b": Shape(QWEN3, 4096, 5120),
    "llama3-1b": Shape(LLAMA3, 2048, 4096),
    "llama3-8b": Shape(LLAMA3, 4096, 8192),
    "qwen3-8b-self": Shape(QWEN3, 4096, 4096),
    "liger": Shape(LLAMA3, 4096, 4096),
    "gemma": Shape(GEMMA, 2048, 3840, softcap=30.0),
}

#: (shape, tokens) where none are given, by the type of the device.
DEFAULTS = {"cuda": ("qwen3-1.7b", (8192,)), "cpu": ("small", (256,))}
