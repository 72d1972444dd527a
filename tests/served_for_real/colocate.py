"""TRL's `use_vllm` with `vllm_mode="colocate"`: vLLM writes rollouts from the current weights.

Runs in vLLM's environment. Sampling is greedy: each id that was written must be the likeliest of
the student as it is when its loss is taken, and, once steps have moved it, not always that of the
first student.
"""

import functools
import os
import sys

import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main(student: str, teacher: str, output: str) -> int:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl.generation import vllm_generation
    from vllm.model_executor.layers import utils

    from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer

    # On a CPU vLLM packs a copy of each layer's weights at first, and computes with that for good.
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
        layer, "cpu_linear", torch.nn.functional.linear
    )
    # TRL leaves the dtype to vLLM, which takes a float32 model in bfloat16.
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32")
    first = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    shares: list[tuple[float, float]] = []

    @torch.no_grad()
    def share(model, inputs) -> float:
        """Of the completion's ids, those that are a model's likeliest."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].shape[1]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=places).logits[:, -length - 1 : -1]
        same = logits.argmax(-1) == inputs["completion_ids"]
        return same[inputs["completion_mask"].bool()].float().mean().item()

    class Watched(TrOPDTrainer):
        def after_loss(self, loss, stats, inputs):
            super().after_loss(loss, stats, inputs)
            shares.append((share(self.model, inputs), share(first, inputs)))

    args = TrOPDConfig(
        f"{output}/colocate", use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128,
        objective="tropd", objective_kwargs={"top_k": 16}, top_k=1, max_steps=4,
        per_device_train_batch_size=4, max_completion_length=16, learning_rate=0.05, optim="sgd",
        lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, logging_strategy="no",
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    texts = ["The capital of France is", "Water boils at", "A prime number is", "Two plus two is"]
    trainer = Watched(
        student, teacher, args=args, train_dataset=Dataset.from_dict({"prompt": texts * 4}),
        processing_class=AutoTokenizer.from_pretrained(student),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for step, (current, initial) in enumerate(shares, 1):
        print(f"        step {step}: {current:.1%} of the ids are the current student's likeliest, "
              f"{initial:.1%} the first one's")  # fmt: skip
    moved = min(initial for _, initial in shares) < 0.9
    return 0 if moved and min(current for current, _ in shares) > 0.98 else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
