"""verl's own Megatron engine with the loss in its model's forward, against the same engine on
logits. The model is Megatron's own, on a CPU, with another decoder: its attention to packed rows
wants a GPU."""

import copy
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("verl", reason="needs verl: make engines")
pytest.importorskip("megatron.core", reason="needs megatron-core: make engines")

import verl_engine as helper
from verl.trainer.distillation import losses
from verl_engine import K, loss_function, make_batch

from tropd_kernels import Divergence
from tropd_kernels.integrations import verl as integration
from tropd_kernels.integrations import verl_fused
from tropd_kernels.integrations.verl_batch import RULES

V, H = 96, 16
NAMES = [*integration.SAMPLED, *integration.TOP_K, *integration.TOP_K_AND_LABEL]


class Decoder(torch.nn.Module):
    """Each row for itself, on this rank's part of the sequence."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(H, H)
        self.input_tensor = None

    def forward(self, hidden_states, **_):
        return torch.tanh(self.linear(hidden_states))


def make_engine(fused, sequence_parallel):
    """verl's engine of its registry, with the model that its bridge would have made."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from verl.workers.engine import EngineRegistry

    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=H, num_attention_heads=2, use_cpu_initialization=True,
        hidden_dropout=0.0, tensor_model_parallel_size=dist.get_world_size(),
        sequence_parallel=sequence_parallel, init_method_std=0.5,
    )  # fmt: skip
    nothing = TransformerBlockSubmodules(layer_specs=[ModuleSpec(module=IdentityOp)])
    model = GPTModel(
        config=config, transformer_layer_spec=nothing, vocab_size=V, max_sequence_length=64,
        position_embedding_type="none", share_embeddings_and_output_weights=False,
    )  # fmt: skip
    model.decoder = Decoder()
    kind = EngineRegistry.get_engine_cls("language_model", "megatron")
    engine = object.__new__(kind)
    engine.engine_config = SimpleNamespace(
        use_fused_kernels=fused, use_remove_padding=True, pad_to_length=False,
        dynamic_context_parallel=False, context_parallel_size=1, pad_bshd_to_minibatch_max=False,
        entropy_from_logits_with_chunking=False,
    )  # fmt: skip
    engine.model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["Qwen3ForCausalLM"]),
        tokenizer=SimpleNamespace(pad_token_id=0), mtp=SimpleNamespace(enable=False),
    )  # fmt: skip
    engine.tf_config, engine.enable_routing_replay, engine.is_value_model = config, False, False
    engine.module = [model]
    engine._maybe_enable_fused_kernels()
    return engine


def run(engine, name, *, label=False, batch=None, actor=None, unsaid=False, **settings):
    """Loss, metrics, and gradients of one micro-batch. unsaid: it leaves use_fused_kernels to the
    engine."""
    from verl.workers.engine.megatron import transformer_impl

    fused = engine.engine_config.use_fused_kernels
    form = "sampled" if name in integration.SAMPLED else "top_k"
    data = make_batch(
        form, fused, label=label, vocab=V, micro_batch_size_per_gpu=4, **(batch or {})
    )
    if unsaid:
        data.pop("use_fused_kernels")
    function = loss_function(name, dict(strategy="megatron", **(actor or {})), **settings)
    (model,) = engine.module
    model.zero_grad()
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_impl, "get_forward_backward_func", lambda: partial(step, outputs))
        engine.forward_backward_batch(data, function)
    return outputs[0] | {"gradients": {n: p.grad.clone() for n, p in model.named_parameters()}}


def step(outputs, *, forward_step_func, data_iterator, model, **_):
    """Megatron's schedule without a pipeline, which wants a GPU."""
    output, of_output = forward_step_func(data_iterator, *model)
    loss, found = of_output(output)
    loss.backward()
    outputs.append(found)
    return outputs


def assert_same(ours, theirs, metrics=True):
    """Losses, metrics, and gradients to 1e-5 of each parameter's largest."""
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-5, atol=1e-6)
    for name, gradient in theirs["gradients"].items():
        largest = gradient.abs().max().item()
        assert largest > 1e-4, name
        close = dict(rtol=1e-5, atol=1e-5 * largest)
        torch.testing.assert_close(ours["gradients"][name], gradient, **close, msg=name)
    if metrics:
        assert ours["metrics"].keys() == theirs["metrics"].keys()
        for name, metric in theirs["metrics"].items():
            found = ours["metrics"][name].aggregate()
            assert found == pytest.approx(metric.aggregate(), rel=1e-4, abs=1e-5), name


def start(patch):
    helper.use_megatron(patch)
    verl_fused.register_engines((("cpu", "any"),))
    for registry in (losses.DISTILLATION_LOSS_REGISTRY, RULES):
        patch.setitem(registry, "raw_forward_kl", None)
        patch.delitem(registry, "raw_forward_kl")  # undone at the end, and with it this one:
    raw = Divergence("forward_kl", top_k=K, top_k_tail="raw")
    integration.register("raw_forward_kl", raw, "top_k")


def compare(sequence_parallel, names):
    """These losses on hidden states and on logits, and verl's own forward KL on logits."""
    theirs, ours = (make_engine(fused, sequence_parallel) for fused in (False, True))
    for name in names:
        label = name in integration.TOP_K_AND_LABEL
        batch = dict(calculate_entropy=name == "tropd_entropy_opd")
        assert_same(*(run(e, name, label=label, batch=batch) for e in (ours, theirs)))
    own = run(theirs, "forward_kl_topk", loss_max_clamp=None)
    assert own["metrics"]["distillation/loss_min"].aggregate() > 0
    assert_same(run(ours, "raw_forward_kl"), own, metrics=False)
    settings = dict(use_task_rewards=True, distillation_loss_coef=0.5)
    rewards = dict(
        batch=dict(distillation_only=False, calculate_entropy=True, temperature=0.7),
        actor=dict(entropy_coeff=0.01), **settings,
    )  # fmt: skip
    for name in ("tropd", "tropd_mask"):
        assert_same(*(run(e, name, **rewards) for e in (ours, theirs)))


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        start(patch)
        for sequence_parallel in (True, False):
            compare(sequence_parallel, ["tropd", "tropd_opd", "tropd_eopd"])
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_split_head_gives_the_losses_of_logits(tmp_path):
    """With and without sequence parallelism, in processes that import all of this once."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)


@pytest.fixture
def here(group, monkeypatch):
    from megatron.core import parallel_state

    start(monkeypatch)
    yield
    parallel_state.destroy_model_parallel()


def test_in_one_process(here, monkeypatch):
    """The same in this process, which shows a failure where it is."""
    compare(False, NAMES)
    engine = make_engine(True, False)
    monkeypatch.setattr(engine.module[0].output_layer, "forward", None)  # no logits are formed
    run(engine, "tropd")


def test_other_padding_is_refused(here):
    engine = make_engine(True, False)
    vars(engine.engine_config).update(pad_to_length=True, pad_to_length_bucket=64)
    with pytest.raises(NotImplementedError, match="64 rows where the batch has .*pad_to_length"):
        run(engine, "tropd_opd")


def test_another_function_of_the_head_is_named(here):
    from tropd_kernels.integrations import verl_replaced

    fused = SimpleNamespace(__name__="model_forward_fused", linear_cross_entropy=lambda *_: None)
    kernel = SimpleNamespace(LinearCrossEntropy=SimpleNamespace(forward=lambda hidden: None))
    with pytest.raises(RuntimeError, match="linear_cross_entropy is .hidden., expected .ctx"):
        verl_replaced.take_over_head(fused, kernel)
    assert "tropd_kernels.integrations.verl_megatron" in sys.modules


def test_a_batch_that_does_not_say_whether_is_computed_as_the_engine_is(here):
    theirs, ours = (make_engine(fused, False) for fused in (False, True))
    assert_same(*(run(e, "tropd", unsaid=True) for e in (ours, theirs)))


def with_dynamic_parallelism(engine):
    """From its step on: the groups that verl's scheduler wants are not here."""

    def forward_step(*arguments, **named):
        engine.engine_config.dynamic_context_parallel = True
        return type(engine).forward_step(engine, *arguments, **named)

    engine.forward_step = forward_step
    return engine


@pytest.mark.parametrize(
    ("fused", "name"), [(True, "tropd"), (True, "tropd_opd"), (False, "tropd")]
)
def test_rows_that_lie_otherwise_are_refused(here, monkeypatch, fused, name):
    """Without fused kernels only a top-k teacher's: verl lays out a sampled one's itself."""
    from megatron.core import parallel_state

    engine = make_engine(fused, False)
    with monkeypatch.context() as patch:
        patch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 2)
        engine.tf_config.experimental_attention_variant = "dsv4_hybrid"
        with pytest.raises(NotImplementedError, match="'zigzag'.*'contiguous'"):
            run(engine, name)
    engine = with_dynamic_parallelism(make_engine(fused, False))
    with pytest.raises(NotImplementedError, match="no dynamic_context_parallel"):
        run(engine, name)


def test_rows_that_verl_lays_out_may_lie_otherwise(here):
    engine = with_dynamic_parallelism(make_engine(False, False))
    with pytest.raises(RuntimeError, match="Dynamic CP micro-batch is missing local_cp_size"):
        run(engine, "tropd_opd")  # verl's own check, behind ours


def test_another_megatron_engine_leaves_verl_s_and_the_others_ours(here, monkeypatch):
    from verl.workers.engine import EngineRegistry

    monkeypatch.setattr(EngineRegistry, "_engines", copy.deepcopy(EngineRegistry._engines))
    monkeypatch.delitem(sys.modules, "tropd_kernels.integrations.verl_megatron")
    monkeypatch.setattr(verl_fused.MegatronEngineWithLMHead, "forward_step", lambda self: None)
    with pytest.warns(UserWarning, match="megatron engine.*forward_step is .self., expected"):
        verl_fused.register_engines((("cpu", "another"),))
    engines = EngineRegistry._engines["language_model"]
    assert engines["fsdp"]["cpu", "another"] is verl_fused.FusedEngine
    assert ("cpu", "another") not in engines["megatron"]
