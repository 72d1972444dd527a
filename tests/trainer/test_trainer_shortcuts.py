"""Generation in chunks, and with tokens looked up in the prompt: as without, or refused."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import torch
import transformers
from training import make

from tropd_kernels.trainer import TrOPDConfig, generation

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CHUNKS, LOOKUP = {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 2}
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"], head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip


def mamba(seed=0, **changes):
    kind, config = transformers.MambaForCausalLM, transformers.MambaConfig
    return tiny.model(seed, kind=kind, config=config, **changes)


def recurrent_gemma():
    return tiny.model(
        0, kind=transformers.RecurrentGemmaForCausalLM, config=transformers.RecurrentGemmaConfig,
        lru_width=32, num_hidden_layers=3,
    )  # fmt: skip


def xlstm():
    return tiny.model(
        0, kind=transformers.xLSTMForCausalLM, config=transformers.xLSTMConfig,
        hidden_size=64, num_heads=2, qk_dim_factor=1.0,
    )  # fmt: skip


def jamba():
    return tiny.model(
        0, kind=transformers.JambaForCausalLM, config=transformers.JambaConfig, num_experts=2,
        attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip


def qwen3_5():
    kind, config = transformers.Qwen3_5ForCausalLM, transformers.Qwen3_5TextConfig
    return tiny.model(0, kind=kind, config=config, **LINEAR)


def without_cache():
    model = tiny.model(0)
    model.generation_config.use_cache = False
    return model


def one_row(folder, student, given, **settings):
    return make(
        folder, student, tiny.model(1), per_device_train_batch_size=1, generation_kwargs=given,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made", "given", "words"),
    [
        (mamba, CHUNKS, "a MambaForCausalLM fails with it: .*get_seq_length"),
        (mamba, LOOKUP, "a MambaForCausalLM fails with it: assisted generation is not supported"),
        (recurrent_gemma, CHUNKS, "a RecurrentGemmaForCausalLM fails with it: "),
        (xlstm, CHUNKS, "a xLSTMForCausalLM fails with it: Cannot use prefill chunking without"),
        (without_cache, CHUNKS, "a LlamaForCausalLM fails with it: Cannot use prefill chunking"),
        (without_cache, LOOKUP, "a LlamaForCausalLM fails with it: Assisted decoding requires"),
        (qwen3_5, LOOKUP, "a Qwen3_5ForCausalLM fails with it: assisted generation is not suppor"),
        # Its state does not go from one chunk to the next, without a word.
        (jamba, CHUNKS, "a JambaForCausalLM writes another text with it than without: leave it o"),
    ],
)
def test_a_model_without_the_shortcut(tmp_path, made, given, words):
    (name,) = given
    with pytest.raises(ValueError, match=f"^generation_kwargs: '{name}': {words}"):
        one_row(tmp_path, made(), given)


def test_chunks_of_one_token_are_single_steps(tmp_path):
    """... in which Jamba reads its state."""
    one_row(tmp_path, jamba(), {"prefill_chunk_size": 1}).train()


@pytest.mark.parametrize("made", [tiny.model, qwen3_5])
def test_a_model_with_the_shortcut(tmp_path, made):
    """Asking it draws no number, and chunks change nothing that is written."""
    written = []
    for given in (None, CHUNKS):
        trainer = one_row(tmp_path, made(), given)
        trainer.train()
        written.append(trainer.batches[0]["completion_ids"])
    assert torch.equal(*written)


def test_a_teacher_without_the_shortcut(tmp_path):
    """... may read, and is refused where it would write."""
    for guided, refused in (({}, False), (dict(prefix_schedule="constant", prefix_length=2), True)):
        trainer = make(
            tmp_path, tiny.model(0), mamba(1), generation_kwargs=CHUNKS, **guided,
        )  # fmt: skip
        if refused:
            with pytest.raises(
                ValueError, match="^generation_kwargs: 'prefill_chunk_size': a Mamb"
            ):
                trainer.train()
        else:
            trainer.train()


@pytest.mark.parametrize("given", [CHUNKS, LOOKUP], ids=str)
def test_a_sharded_model(tmp_path, monkeypatch, given):
    """No model is asked, and processes may not take different numbers of forwards."""
    monkeypatch.setattr(generation, "is_sharded", lambda accelerator: True)
    (name,) = given
    with pytest.raises(ValueError, match=f"^generation_kwargs: '{name}': under FSDP and ZeRO-3 "):
        one_row(tmp_path, tiny.model(0), given)


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        (CHUNKS | {"use_cache": False}, {}, "use_cache"),
        (LOOKUP | {"use_cache": False}, {}, "use_cache"),
        (LOOKUP | {"cache_implementation": "static"}, {}, "cache_implementation"),
        (LOOKUP, {"cache_implementation": "static"}, "cache_implementation"),
        (LOOKUP, {"cache_implementation": "offloaded_static"}, "cache_implementation"),
    ],
    ids=str,
)
def test_caches_with_which_a_shortcut_fails(given, settings, words):
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"^generation_kwargs: '{name}' .* but {words} is "):
        TrOPDConfig(
            "unused", use_cpu=True, bf16=False, report_to="none", generation_kwargs=given,
            **settings,
        )  # fmt: skip
