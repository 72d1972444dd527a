"""verl's own FSDP engine on a CPU, which it has no platform for: tiny models, and batches as its
trainer makes them.

TRL is hidden from verl's patches of models, which want a class that TRL has no longer.
"""

from __future__ import annotations

import ast
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

V, K = 97, 5
PROMPTS, RESPONSES = (3, 2, 4, 2), (7, 1, 5, 6)


def use_cpu(patch: Any) -> None:
    """Makes the CPU a platform of verl's, until the MonkeyPatch `patch` is undone."""
    from verl.models.transformers import monkey_patch
    from verl.plugin.platform import platform_cuda, platform_manager
    from verl.workers.engine.fsdp import transformer_impl

    device = types.ModuleType("cpu")
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated",
                 "memory_reserved", "empty_cache", "synchronize", "current_device"):  # fmt: skip
        setattr(device, name, lambda *_: 0)
    device.mem_get_info = lambda *_: (1, 1)

    class Platform(platform_cuda.PlatformCUDA):
        device_name = property(lambda self: "cpu")
        vendor_name = property(lambda self: "any")
        device_module = property(lambda self: device)

        def current_device(self):
            return "cpu"

    patch.setattr(platform_manager, "_current_platform", Platform())
    patch.setattr(transformer_impl, "device_name", "cpu")
    patch.setattr(monkey_patch, "is_trl_available", lambda: False)


def use_megatron(patch: Any) -> None:
    """Megatron's groups on the CPU, the vocabulary split over all processes; ended by its
    `destroy_model_parallel`."""
    from megatron.core import parallel_state, tensor_parallel
    from verl.workers.engine.megatron import transformer_impl

    use_cpu(patch)
    patch.setattr(torch.cuda, "current_device", lambda: "cpu")
    patch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    random = tensor_parallel.get_cuda_rng_tracker()  # which nothing here draws from
    patch.setattr(random, "fork", lambda *_: nullcontext())
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())


def make_model(folder: Path, **settings: Any) -> Path:
    """A tiny Qwen 3, saved."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = dict(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**(shape | settings))).save_pretrained(folder)
    return folder


def make_engine(folder: Path, fused: bool, dtype: str = "fp32", **model: Any):
    """The engine that verl's registry gives here, with its model; dtype: of FSDP's parameters."""
    from transformers import Gemma2ForCausalLM, Qwen3ForCausalLM
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    settings = HFModelConfig(
        path=str(folder), load_tokenizer=False, enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager"}, use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "torch"} if fused else {}, **model,
    )  # fmt: skip
    dtypes = dict(param_dtype=dtype, reduce_dtype="fp32", buffer_dtype="fp32")
    engine = EngineRegistry.new(
        "language_model", "fsdp2",
        model_config=settings,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, mixed_precision=dtypes
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    # verl gives a fused forward to the class, and so to every later model of the process.
    forwards = {kind: kind.forward for kind in (Gemma2ForCausalLM, Qwen3ForCausalLM)}
    engine.initialize()
    for kind, forward in forwards.items():
        kind.forward = forward
    return engine


def make_batch(form: str, fused: bool, *, label: bool = False, vocab: int = V, k: int = K,
               prompts: tuple = PROMPTS, responses: tuple = RESPONSES, drawn: bool = False,
               part: slice = slice(None), **flags: Any):  # fmt: skip
    """A batch as verl's trainer gives it to the engine: padded left and right, then packed by
    verl's `left_right_2_no_padding`. form: of the teacher, "sampled" or "top_k". label: with the
    label's log-prob in one more column. drawn: the top k are drawn, without a distribution over a
    whole vocabulary. part: which of the sequences, for a process of several."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.utils.padding import left_right_2_no_padding

    draw = torch.Generator().manual_seed(0)
    p, r, rows = max(prompts), max(responses), len(prompts)
    here = torch.zeros(rows, p + r, dtype=torch.bool)
    for row, (a, b) in enumerate(zip(prompts, responses)):
        here[row, p - a : p + b] = True
    ids = torch.randint(1, vocab, (rows, p + r), generator=draw) * here
    answers = here[:, p:].clone()
    answers[0, 1:3] = False  # a tool's tokens
    if drawn:
        first = torch.randint(vocab - k, (rows, p + r, 1), generator=draw)
        first[:, ::2] = ids.roll(-1, 1)[:, ::2, None].clamp_max(vocab - k)  # the label is a hit
        log_q = torch.randn(rows, p + r, k + 1, generator=draw).log_softmax(-1)
        teacher = first + torch.arange(k), log_q[..., :k]
    else:
        log_q = torch.randn(rows, p + r, vocab, generator=draw).mul_(2).log_softmax(-1)
        ids[:, 3::2] = (log_q.roll(1, 1).topk(k).indices[..., -1] * here)[:, 3::2]
        labels = ids.roll(-1, 1)[..., None]
        own = log_q.gather(-1, labels)
        top = log_q.topk(k)
        teacher = (top.indices, top.values) if form == "top_k" else (labels, own)
        if label and form == "top_k":
            teacher = tuple(torch.cat(pair, -1) for pair in zip(teacher, (labels, own)))
    data = TensorDict(
        {
            "prompts": ids[:, :p], "responses": ids[:, p:], "input_ids": ids,
            "attention_mask": here.long(), "response_mask": answers.long(),
            "position_ids": (here.long().cumsum(-1) - 1).clamp_min(0),
            "old_log_probs": torch.randn(rows, r, generator=draw) - 3,
            "advantages": torch.randn(rows, r, generator=draw),
            "teacher_ids": teacher[0].int(), "teacher_logprobs": teacher[1],
        },
        batch_size=[rows],
    )  # fmt: skip
    data = left_right_2_no_padding(data[part])
    settings = dict(
        temperature=1.0, use_remove_padding=True, use_fused_kernels=fused, use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2, distillation_use_topk=form == "top_k",
        distillation_only=form == "top_k", calculate_entropy=False, global_batch_size=rows,
    )  # fmt: skip
    tensordict_utils.assign_non_tensor(data, **(settings | flags))
    return data


def loss_function(loss_mode: str, actor: dict | None = None, k: int = K, **settings: Any):
    """What verl's worker hands to its engine."""
    from verl.trainer.distillation import distillation_ppo_loss
    from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

    given = dict(
        use_task_rewards=False, use_policy_gradient=False, loss_max_clamp=None,
        log_prob_min_clamp=None, topk=k,
    )  # fmt: skip
    settings_of_actor = dict(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, data_loader_seed=7
    )  # fmt: skip
    config = ActorConfig(**(settings_of_actor | (actor or {})))
    loss = DistillationLossConfig(loss_mode=loss_mode, **(given | settings))
    return partial(
        distillation_ppo_loss, config=config,
        distillation_config=DistillationConfig(distillation_loss=loss),
    )  # fmt: skip


def gradients(engine: Any, data: Any, function: Any) -> tuple[dict, dict]:
    """The engine's output of one batch, and the gradient of each parameter."""
    with engine.train_mode():
        output = engine.forward_backward_batch(data, function)
        found = {
            name: parameter.grad.full_tensor().clone()
            for name, parameter in engine.module.named_parameters()
        }
    return output, found


def function_of(path: Path, name: str):
    """One function of a file of verl's that cannot be imported here, for it imports a server."""
    tree = ast.parse(path.read_text())
    node = next(n for n in ast.walk(tree) if getattr(n, "name", None) == name)
    for argument in node.args.args:
        argument.annotation = None
    module = types.ModuleType(path.stem)
    exec(compile(ast.Module([node], []), str(path), "exec"), vars(module))
    return module
