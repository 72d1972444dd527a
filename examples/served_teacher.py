"""A teacher behind HTTP: TrOPD on the top 64 that vLLM or SGLang sends.

    vllm serve TEACHER --max-logprobs 64 --max-model-len 1024
    python -m examples.served_teacher --url http://localhost:8000

A first request, before the student is loaded, shows whether the server can do what the objective
needs. What travels is in docs/scaling.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset

from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer


def main(arguments: list[str] | None = None) -> TrOPDTrainer:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True, help="of the server, without a path")
    parser.add_argument("--student", default="build/train/student")
    parser.add_argument("--prompts", type=Path, default=Path("build/train/prompts.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("build/served_teacher"))
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    trainer = TrOPDTrainer(
        model=given.student,
        args=TrOPDConfig(
            str(given.out),
            objective="tropd",
            objective_kwargs={"top_k": given.top_k},
            teacher_model_server_url=given.url,
            max_completion_length=given.tokens,
            max_steps=given.steps,
            logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=not gpu, bf16=gpu,
        ),
        train_dataset=load_dataset("json", data_files=str(given.prompts), split="train"),
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
