"""The same in accelerate, on any number of processes, with gradient accumulation.

torchrun --nproc_per_node 2 -m examples.loops.with_accelerate --accumulate 2

The loss is one mean over the tokens of all processes and micro-batches: each call divides by that
number over the number of processes, since gradients are averaged over these.
"""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator

from tropd_kernels import TokenRule

from .distiller import answers, load, parse, tokens_of


def main(arguments: list[str] | None = None, rule: TokenRule | None = None) -> list[float]:
    """KL(student || teacher) on the student's tokens of all processes, in nats, step by step."""
    options = parse(__doc__, arguments, accumulate=2)
    # Without the flag accelerate takes processes without GPUs for strangers.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    here, ranks = accelerator.process_index, accelerator.num_processes
    distiller, tokenizer, prompts = load(options, rule)
    torch.manual_seed(options.seed + here)  # each process writes something else
    wrapped, optimizer = accelerator.prepare(
        distiller, torch.optim.AdamW(distiller.parameters(), lr=options.learning_rate)
    )
    accumulate = options.accumulate
    each = options.batch_size // (accumulate * ranks)
    if not each:
        raise SystemExit(
            f"--batch-size {options.batch_size}: expected at least {accumulate * ranks}, for "
            f"{ranks} processes of {accumulate} micro-batches"
        )
    divergences = []
    for step in range(options.steps):
        batches = []
        for i in range(accumulate):
            number = (step * accumulate + i) * ranks + here  # of all micro-batches so far
            first = number * each % len(prompts)
            some = prompts[first : first + each]
            batches.append(answers(distiller.student, tokenizer, some, options.tokens, number))
        tokens = accelerator.reduce(sum(map(tokens_of, batches)))
        total = torch.zeros(())
        for i, batch in enumerate(batches):
            last = i == accumulate - 1
            # Gradients are exchanged once, at the last.
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                loss, divergence = wrapped(batch, normalizer=tokens / ranks)
                accelerator.backward(loss)
            total += divergence.detach()
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        divergences.append((accelerator.reduce(total) / tokens).item())
        accelerator.print(f"step {step}: KL(student || teacher) {divergences[-1]:.3f} nats a token")
    if options.out is not None and accelerator.is_main_process:
        distiller.student.save_pretrained(options.out)
    return divergences


if __name__ == "__main__":
    main()
