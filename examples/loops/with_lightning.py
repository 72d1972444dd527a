"""The same as a LightningModule.

python -m examples.loops.with_lightning --student build/train/student --teacher build/train/teacher
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader

from tropd_kernels import TokenRule

from .distiller import Distiller, answers, load, parse, tokens_of


class Module(lightning.LightningModule):
    """A step of Lightning's: the student writes, the loss compares."""

    def __init__(self, distiller: Distiller, tokenizer: Any, options: Any):
        super().__init__()
        self.distiller, self.tokenizer, self.options = distiller, tokenizer, options
        self.divergences: list[float] = []

    def training_step(self, prompts: list[str], index: int) -> torch.Tensor:
        """The loss of a batch of prompts."""
        # A seed for each step and each process.
        seed = self.global_step * self.trainer.world_size + self.global_rank
        student = self.distiller.student
        batch = answers(student, self.tokenizer, prompts, self.options.tokens, seed)
        loss, divergence = self.distiller(batch)
        self.divergences.append((divergence / tokens_of(batch)).item())
        print(f"step {index}: KL(student || teacher) {self.divergences[-1]:.3f} nats a token")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.distiller.parameters(), lr=self.options.learning_rate)


def main(arguments: list[str] | None = None, rule: TokenRule | None = None) -> list[float]:
    """KL(student || teacher) on the student's tokens, in nats, step by step."""
    options = parse(__doc__, arguments)
    distiller, tokenizer, prompts = load(options, rule)
    module = Module(distiller, tokenizer, options)
    trainer = lightning.Trainer(
        max_steps=options.steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
    )  # fmt: skip
    repeated = prompts * (options.steps * options.batch_size // len(prompts) + 1)
    trainer.fit(module, DataLoader(repeated, batch_size=options.batch_size))
    if options.out is not None:
        distiller.student.save_pretrained(options.out)
    return module.divergences


if __name__ == "__main__":
    main()
