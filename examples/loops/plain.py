"""A distillation in a plain PyTorch loop.

python -m examples.loops.plain --student build/train/student --teacher build/train/teacher
"""

from __future__ import annotations

import torch

from tropd_kernels import TokenRule

from .distiller import answers, load, parse, tokens_of


def main(arguments: list[str] | None = None, rule: TokenRule | None = None) -> list[float]:
    """KL(student || teacher) on the student's tokens, in nats, step by step."""
    options = parse(__doc__, arguments)
    distiller, tokenizer, prompts = load(options, rule)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=options.learning_rate)
    divergences = []
    for step in range(options.steps):
        first = step * options.batch_size % len(prompts)
        some = prompts[first : first + options.batch_size]
        batch = answers(distiller.student, tokenizer, some, options.tokens, step)
        loss, divergence = distiller(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        divergences.append((divergence / tokens_of(batch)).item())
        print(f"step {step}: KL(student || teacher) {divergences[-1]:.3f} nats a token")
    if options.out is not None:
        distiller.student.save_pretrained(options.out)
    return divergences


if __name__ == "__main__":
    main()
