"""How long a text a model takes: what exceeds it is refused, and nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from packaging.version import Version

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make

from tropd_kernels.trainer import sides
from tropd_kernels.trainer.context import (
    context_of,
    padded_context_of,
    scale_changes_at,
    scale_warning,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LLAMA_3 = YARN | dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
LONG = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
    original_max_position_embeddings=16,
)  # fmt: skip
DYNAMIC = LINEAR | {"rope_type": "dynamic"}
LLAMA = (transformers.LlamaForCausalLM, transformers.LlamaConfig)
WITHOUT_ROPE = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16,
)  # fmt: skip
SMALL = dict(n_embd=32, n_layer=1, n_head=4)


def tiny_of(kind, config, **changes):
    torch.manual_seed(0)
    return kind(config(vocab_size=tiny.VOCAB, **changes)).eval()


def llama(**changes):
    return tiny.model(0, kind=LLAMA[0], config=LLAMA[1], **changes)


def gemma3(seed, rope):
    """Of one sliding layer and a full one, which alone is scaled."""
    sliding = dict(rope_type="default", rope_theta=10000.0)
    return tiny.model(
        seed, kind=transformers.Gemma3ForCausalLM, config=transformers.Gemma3TextConfig,
        layer_types=["sliding_attention", "full_attention"], head_dim=8, query_pre_attn_scalar=8,
        sliding_window=512, max_position_embeddings=64,
        rope_parameters={"sliding_attention": sliding, "full_attention": rope},
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (YARN, 256),
        (YARN | {"original_max_position_embeddings": 32}, 128),  # as Qwen3's card has it
        (YARN | {"original_max_position_embeddings": 16}, 64),  # as gpt-oss: the maximum has it
        (LINEAR, 128),
        (DYNAMIC, None),
        (LLAMA_3, 256),
        (LLAMA_3 | {"original_max_position_embeddings": 8, "factor": 32.0}, 64),  # Llama 3.2
        (LONG, 64),
        (LONG | {"original_max_position_embeddings": 64, "factor": 4.0}, 256),
        (LONG | {"original_max_position_embeddings": 64}, None),  # as in MiniCPM4's card
        (dict(rope_type="default", rope_theta=10000.0), 64),
        (LINEAR | {"rope_type": "proportional"}, 128),  # Gemma 4's: a factor divides as in linear
        (dict(rope_type="proportional", rope_theta=10000.0), 64),
    ],
)
def test_scaled_positions(rope, context):
    model = llama(rope_parameters=rope)
    assert context_of(model.config) == context
    ids = torch.randint(5, tiny.VOCAB, (1, context or 200))
    assert model(ids).logits.isfinite().all()


def test_scaling_that_nobody_knows():
    config = transformers.LlamaConfig(max_position_embeddings=64)
    config.rope_parameters = {"rope_type": "ntk-by-parts", "factor": 2.0}
    assert context_of(config) is None
    # Of a config without transformers' newer field.
    old = transformers.GPTNeoConfig(max_position_embeddings=64)
    old.rope_scaling = {"type": "yarn", "factor": 4.0}
    assert context_of(old) == 256


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_of(
            transformers.BloomForCausalLM, transformers.BloomConfig,
            hidden_size=32, n_layer=1, n_head=4,
        ),
        lambda: tiny_of(
            transformers.FalconForCausalLM, transformers.FalconConfig, hidden_size=32,
            num_hidden_layers=1, num_attention_heads=4, alibi=True, max_position_embeddings=16,
        ),
        lambda: tiny_of(
            transformers.RwkvForCausalLM, transformers.RwkvConfig,
            hidden_size=32, num_hidden_layers=2, context_length=16,
        ),
        lambda: tiny_of(
            transformers.MambaForCausalLM, transformers.MambaConfig,
            hidden_size=32, num_hidden_layers=1, max_position_embeddings=16,
        ),
        lambda: tiny_of(
            transformers.JambaForCausalLM, transformers.JambaConfig, hidden_size=32,
            intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_experts=2,
            num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4,
            max_position_embeddings=16, use_mamba_kernels=False,
        ),
        lambda: tiny_of(
            transformers.OlmoHybridForCausalLM, transformers.OlmoHybridConfig,
            rope_parameters={"rope_type": "default", "rope_theta": None}, **WITHOUT_ROPE,
            layer_types=["linear_attention", "full_attention"], linear_num_key_heads=4,
            linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        lambda: tiny_of(
            transformers.SmolLM3ForCausalLM, transformers.SmolLM3Config,
            no_rope_layers=[0, 0], pad_token_id=0, **WITHOUT_ROPE,
        ),
        lambda: tiny_of(
            transformers.GraniteSWAForCausalLM, transformers.GraniteSWAConfig,
            layer_rope_theta=[0, 0], **WITHOUT_ROPE,
        ),
    ],
    ids=["bloom", "falcon alibi", "rwkv", "mamba", "jamba", "olmo hybrid", "smollm3", "granite"],
)  # fmt: skip
def test_models_without_positions(model):
    """They run beyond the maximum that their config gives, if it gives one."""
    model = model()
    assert context_of(model.config) is None
    ids = torch.randint(5, tiny.VOCAB, (1, 40))
    logits = model(ids).logits
    assert logits.isfinite().all()
    if model.config.model_type in ("olmo_hybrid", "smollm3", "granite_swa"):
        # Rotary in general: these are switched off, for positions make no difference.
        far = model(ids, position_ids=torch.arange(40)[None].flip(1) * 7).logits
        torch.testing.assert_close(far, logits)


@pytest.mark.parametrize(
    ("kind", "config", "changes"),
    [
        (transformers.GPT2LMHeadModel, transformers.GPT2Config, SMALL | {"n_positions": 16}),
        (transformers.OPTForCausalLM, transformers.OPTConfig,
         dict(hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4,
              word_embed_proj_dim=32, max_position_embeddings=16)),
        (transformers.GPTJForCausalLM, transformers.GPTJConfig,
         SMALL | {"n_positions": 16, "rotary_dim": 4}),
        (transformers.MptForCausalLM, transformers.MptConfig,
         dict(d_model=32, n_layers=1, n_heads=4, max_seq_len=16)),
    ],
    ids=["gpt2", "opt", "gptj", "mpt"],
)  # fmt: skip
def test_models_that_end(kind, config, changes):
    """Learned positions and tables: the model itself fails one token later."""
    model = tiny_of(kind, config, **changes)
    assert context_of(model.config) == 16
    ids = torch.randint(5, tiny.VOCAB, (1, 17))
    assert model(ids[:, :16]).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)


def test_kinds_of_layers():
    """Gemma 3's sliding layers have positions of their own."""
    sliding = dict(rope_type="default", rope_theta=10000.0)
    # Its maximum has the linear factor of its cards already.
    for full, context in ((sliding, 64), (YARN, 256), (DYNAMIC, None), (LINEAR, 64)):
        config = transformers.Gemma3TextConfig(max_position_embeddings=64)
        config.rope_parameters = {"sliding_attention": sliding, "full_attention": full}
        assert context_of(config) == context


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (LONG, 16),
        (DYNAMIC, 64),
        (DYNAMIC | {"original_max_position_embeddings": 16}, 64),  # which transformers never reads
        (YARN, None),
        (LINEAR, None),
    ],
)
def test_where_the_scale_changes(rope, length):
    """One set of rotary parameters, or one for each kind of layers, as in Gemma 3."""
    flat = llama(rope_parameters=rope).config
    nested = gemma3(0, rope).config
    assert (scale_changes_at(flat), scale_changes_at(nested)) == (length, length)
    old = transformers.GPTNeoConfig(max_position_embeddings=64)
    old.rope_scaling = {"type": rope["rope_type"]} | {k: rope[k] for k in rope if k != "rope_type"}
    assert scale_changes_at(old) == length


@pytest.mark.parametrize("rope", [LONG, DYNAMIC])
def test_the_scale_of_one_kind_of_layers_changes(rope):
    """What `scale_changes_at` says is where a long row changes the logits of a short one."""
    model = gemma3(0, rope)
    limit = scale_changes_at(model.config)
    ids = torch.randint(5, tiny.VOCAB, (1, 8))
    alone = model(ids).logits
    for width, same in ((limit, True), (limit + 1, False)):
        rows = torch.randint(5, tiny.VOCAB, (2, width))
        rows[0, :8] = ids
        beside = model(rows).logits[:1, :8]
        assert torch.allclose(beside, alone, atol=1e-4) == same


def hunyuan(rope):
    return tiny.model(
        0, kind=transformers.HunYuanDenseV1ForCausalLM, config=transformers.HunYuanDenseV1Config,
        head_dim=8, rope_parameters=rope,
    ).eval()  # fmt: skip


def test_a_dynamic_scale_that_stays(monkeypatch):
    """HunYuan's checkpoints call one scale at all lengths dynamic, and transformers 5.20 is the
    first to keep it."""
    fixed = dict(rope_type="dynamic", rope_theta=10000.0, alpha=1000.0, factor=1.0)
    ids = torch.randint(5, tiny.VOCAB, (1, 80))
    stays = Version(transformers.__version__) >= Version("5.20.0")
    for rope, length in ((fixed, None if stays else 64), (DYNAMIC, 64)):
        model = hunyuan(rope)
        short = model(ids[:, :8]).logits
        assert torch.allclose(model(ids).logits[:, :8], short, atol=1e-4) == (length is None)
        assert scale_changes_at(model.config) == length
    monkeypatch.setattr("tropd_kernels.trainer.context.transformers.__version__", "5.19.0")
    assert scale_changes_at(hunyuan(fixed).config) == 64


def test_long_prompts_train_under_yarn(tmp_path):
    """As Qwen2.5's cards prescribe it; and the loaded teacher's context is as well looked at."""
    qwen = dict(kind=transformers.Qwen2ForCausalLM, config=transformers.Qwen2Config)
    data = tiny.Dataset.from_dict({"prompt": [" ".join(["w7"] * 82)] * 4})
    long = [tiny.model(seed, rope_parameters=YARN, **qwen) for seed in (0, 1)]
    trainer = make(tmp_path, *long, data=data)
    trainer.train()
    assert trainer.batches[0]["prompt_ids"].shape[1] == 82
    short = tiny.model(1, **qwen)
    trainer = make(tmp_path, tiny.model(0, rope_parameters=YARN, **qwen), short, data=data)
    with pytest.raises(ValueError, match="exceed the teacher's context of 64"):
        trainer.train()


def bart(seed):
    return tiny_of(
        transformers.BartForCausalLM, transformers.BartConfig, d_model=32, decoder_layers=1,
        decoder_attention_heads=4, decoder_ffn_dim=32, max_position_embeddings=64,
        is_decoder=True, is_encoder_decoder=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip


def deepseek_v4(seed):
    """Two layers: one looks at what is near, one at keys of four tokens each."""
    made = tiny.model(
        seed, kind=transformers.DeepseekV4ForCausalLM, config=transformers.DeepseekV4Config,
        layer_types=["sliding_attention", "compressed_sparse_attention"], n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, q_lora_rank=16, head_dim=8,
        num_key_value_heads=1, o_groups=2, o_lora_rank=16, index_n_heads=2, index_head_dim=8,
        router_aux_loss_coef=0.0,
    )  # fmt: skip
    made.set_experts_implementation("eager")
    return made


def lfm2(seed, bias=True):
    """A bias of its convolutions is added to the padding as well."""
    made = tiny.model(
        seed, kind=transformers.Lfm2ForCausalLM, config=transformers.Lfm2Config,
        layer_types=["conv", "full_attention"], conv_bias=bias,
    )  # fmt: skip
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("made", [bart, deepseek_v4])
def test_a_model_whose_positions_count_padding(tmp_path, made):
    """Behind padding it is another model; on prompts of one length it is itself."""
    same, other = (tiny.Dataset.from_dict({"prompt": texts}) for texts in (
        ["w7 w8 w9", "w1 w2 w3"], ["w7 w8 w9", "w1"]))  # fmt: skip
    model, ids = made(0).eval(), torch.tensor([[9, 8, 7, 6]])
    hidden = [model(ids).logits, model(torch.tensor([[0, 0, 9, 8, 7, 6]]), torch.tensor(
        [[0, 0, 1, 1, 1, 1]])).logits[:, 2:]]  # fmt: skip
    assert not torch.allclose(*hidden, atol=0.01)
    two = dict(per_device_train_batch_size=2)
    make(tmp_path, made(0), tiny.model(1), data=same, **two).train()
    words = f"student is a {made.__name__} model, whose positions count the pa"
    for more, data in (({}, other), ({"pad_to_multiple_of": 8}, same)):
        trainer = make(tmp_path, made(0), tiny.model(1), data=data, **two, **more)
        with pytest.raises(ValueError, match=words):
            trainer.train()


def xlstm(seed):
    options = dict(hidden_size=64, num_heads=2, qk_dim_factor=1.0)
    kind, config = transformers.xLSTMForCausalLM, transformers.xLSTMConfig
    return tiny.model(seed, kind=kind, config=config, **options)


def rwkv(seed):
    return tiny.model(seed, kind=transformers.RwkvForCausalLM, config=transformers.RwkvConfig)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("made", "words"),
    [
        (xlstm, "^a xlstm model takes no attention_mask, so that"),
        (rwkv, "^a rwkv model takes an attention_mask and does not heed it"),
        (lfm2, "^a lfm2 model takes an attention_mask and does not heed it"),
    ],
)
def test_a_model_that_takes_no_mask(tmp_path, made, words, side):
    """Prompts of one length have no padding in front, and those of others are refused."""
    models = [made(0), tiny.model(1)] if side == "student" else [tiny.model(0), made(1)]
    for texts, refused in ((["w7 w8", "w1 w2"], False), (["w7 w8", "w1"], True)):
        data = tiny.Dataset.from_dict({"prompt": texts})
        trainer = make(tmp_path, *models, data=data, per_device_train_batch_size=2,
                       max_completion_length=2)  # fmt: skip
        if refused:
            with pytest.raises(ValueError, match=words):
                trainer.train()
        else:
            trainer.train()


def test_a_model_that_is_named_nowhere(tmp_path, monkeypatch):
    """Padding that only later tokens read is found by asking, and for each model of a class."""
    monkeypatch.setattr("tropd_kernels.trainer.context._COUNT_PADDING", set())
    words = "a deepseek_v4 model takes an attention_mask and does not heed it"
    with pytest.raises(ValueError, match=words):
        make(tmp_path, deepseek_v4(0), tiny.model(1)).train()
    make(tmp_path, lfm2(0, bias=False), tiny.model(1)).train()
    with pytest.raises(ValueError, match="a lfm2 model takes an attention_mask and does not"):
        make(tmp_path, lfm2(0), tiny.model(1)).train()


def test_padding_is_told_from_rounding(tmp_path):
    """In half precision by the first token, which RWKV's state decays from."""

    def trainer(made, *lengths):
        texts = [" ".join(tiny.WORDS[:length]) for length in lengths]
        student, teacher = made(0).to(torch.bfloat16), tiny.model(1, dtype=torch.bfloat16)
        return make(
            tmp_path, student, teacher, tiny.Dataset.from_dict({"prompt": texts}),
            per_device_train_batch_size=2, max_completion_length=20,
        )  # fmt: skip

    trainer(tiny.model, 20, 9).train()
    with pytest.raises(ValueError, match="a rwkv model takes an attention_mask and does not heed"):
        trainer(rwkv, 20, 19).train()


def test_products_that_a_setting_rounds(monkeypatch):
    """`torch.set_float32_matmul_precision("medium")` lets some processors round them to bf16, of
    which small changes say nothing. Without a setting float32 is float32 everywhere."""
    cpu, model = torch.device("cpu"), tiny.model(0)
    assert sides._error_of_products(cpu) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):  # rounds as such a setting does
        assert 1e-3 < sides._error_of_products(cpu) < 1e-2
    bounds = {1e-7: sides._FLOAT32, 4e-4: sides._TF32, 2e-3: sides._LARGE}
    for error, bound in bounds.items():
        monkeypatch.setattr(sides, "_error_of_products", lambda device, error=error: error)
        assert sides._rounding_of(model, cpu) == bound


def test_rows_that_are_scaled_by_the_longest(tmp_path):
    """LongRoPE's factors are chosen by the batch: the trainer says so once."""
    models = [tiny.model(s, rope_parameters=LONG, max_position_embeddings=64) for s in (0, 1)]
    texts = ["w7 w8", " ".join(["w7"] * 30)]
    words = "student scales the positions of a whole batch by its longest row, beyond 16 tokens"
    for data, warns in ((texts, True), (texts[1:] * 2, False)):
        trainer = make(tmp_path, *models, data=tiny.Dataset.from_dict({"prompt": data * 2}),
                       max_completion_length=2, max_steps=2)  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert sum(words in str(one.message) for one in caught) == warns


@pytest.mark.parametrize(
    ("rope", "prompts", "rows", "warns"),
    [
        (LONG, [2, 30], [4, 32], True),
        (LONG, [2, 3], [4, 16], False),
        (LONG, [17, 30], [18, 40], False),
        (LONG, [10, 10], [20, 20], True),  # generated over the length, all of them
        (DYNAMIC, [2, 3], [4, 64], False),
        (DYNAMIC, [70, 80], [75, 85], True),  # each length has a scale of its own
        (DYNAMIC, [70], [75], True),  # and transformers keeps the largest so far
        (YARN, [2, 200], [4, 210], False),
        (LONG, [], [], False),
    ],
    ids=str,
)
def test_where_rows_have_another_scale_than_alone(rope, prompts, rows, warns):
    config = llama(rope_parameters=rope, max_position_embeddings=64).config
    warning = scale_warning(prompts, rows, {"student": config})
    assert (warning is not None) == warns
    assert not warns or warning.startswith("the student scales the positions of a whole batch")


def test_dynamic_scales_are_those_of_the_longest_so_far():
    """What the warning is for: a row alone, and after a longer batch."""
    model, ids = llama(rope_parameters=DYNAMIC), torch.randint(5, tiny.VOCAB, (1, 70))
    alone = model(ids).logits
    model(torch.randint(5, tiny.VOCAB, (1, 120)))
    assert not torch.allclose(model(ids).logits, alone, atol=1e-4)


LLAMA_4 = dict(
    vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    num_local_experts=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def test_a_model_without_a_backbone(tmp_path):
    """Which nothing mends: it is said before anything that a setting would."""
    with pytest.raises(
        NotImplementedError, match="a Llama4ForCausalLM has no backbone at its base"
    ):
        make(tmp_path, transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**LLAMA_4)))


def test_contexts_by_other_names():
    lengths = dict(max_position_embeddings=64, model_max_length=256)
    assert context_of(transformers.CohereConfig(**lengths)) == 256
    assert context_of(transformers.OPTConfig(**lengths)) == 64  # its table of positions ends there
    config = transformers.WhisperConfig(max_target_positions=16)
    assert context_of(config) == padded_context_of(config) == 16


def test_a_batch_that_its_padding_makes_too_wide(tmp_path):
    """MPT counts padding: each of these rows fits, the two together do not."""
    rows = [(14, 2), (2, 14)]
    data = tiny.Dataset.from_dict({
        "prompt": [" ".join(["w7"] * prompt) for prompt, _ in rows],
        "completion_ids": [[9] * (own - 1) + [2] for _, own in rows],
        "teacher_label_log_probs": [[-1.0] * own for _, own in rows],
    })  # fmt: skip
    student = tiny_of(
        transformers.MptForCausalLM, transformers.MptConfig,
        d_model=32, n_layers=1, n_heads=4, max_seq_len=16, eos_token_id=2,
    )  # fmt: skip
    more = dict(objective="opd", precomputed_teacher=True, max_completion_length=14)
    trainer = make(tmp_path, student, data=data, per_device_train_batch_size=2, **more)
    with pytest.raises(
        ValueError, match="micro-batch of 28 tokens a row.* exceeds the 16 of a mpt"
    ):
        trainer.train()
    trainer = make(tmp_path, student, data=data, per_device_train_batch_size=1, **more)
    trainer.train()


def gpt_neo(seed):
    return tiny.model(
        seed, kind=transformers.GPTNeoForCausalLM, config=transformers.GPTNeoConfig, num_heads=4,
        max_position_embeddings=20, attention_types=[[["global", "local"], 1]], window_size=4,
    )  # fmt: skip


def mpt(seed):
    return tiny.model(
        seed, kind=transformers.MptForCausalLM, config=transformers.MptConfig,
        d_model=32, n_layers=1, n_heads=4, max_seq_len=20,
    )  # fmt: skip


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("made", [gpt_neo, mpt])
def test_prompts_that_their_padding_makes_too_wide(tmp_path, made, side):
    """... for what is generated, by the student or a teacher: 16 tokens and 6, of 20."""
    models, more = [made(0), tiny.model(1)], {}
    if side == "teacher":
        models, more = [tiny.model(0), made(1)], dict(lmbda=0.0)
    for multiple, refused in ((16, True), (32, True), (4, False), (None, False)):
        trainer = make(tmp_path, *models, max_completion_length=6, pad_to_multiple_of=multiple,
                       **more)  # fmt: skip
        if refused:
            words = f"^pad_to_multiple_of: prompts of {multiple} tokens, .* and 6 new ones exceed"
            with pytest.raises(ValueError, match=words):
                trainer.train()
        else:
            trainer.train()
