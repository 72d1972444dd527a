"""verl's own FSDP 2 engine with the loss in its model's forward, against the same engine on logits
that exist: losses, metrics and the gradients of a whole model, in float32 on a CPU."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make engines")
pytest.importorskip("tensordict")

import verl_engine as helper
from verl_engine import K, V, gradients, loss_function, make_batch

from tropd_kernels import OPD, Divergence, TrOPD
from tropd_kernels.integrations import verl as integration
from tropd_kernels.integrations import verl_fused, verl_request
from tropd_kernels.integrations.verl_batch import NEEDS_LABEL, RULES

NAMES = [*integration.SAMPLED, *integration.TOP_K, *integration.TOP_K_AND_LABEL]


def form_of(name):
    return "sampled" if name in integration.SAMPLED else "top_k"


@pytest.fixture(scope="module")
def cpu(group):
    with pytest.MonkeyPatch.context() as patch:
        helper.use_cpu(patch)
        verl_fused.register_engines((("cpu", "any"),))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return helper.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engines(cpu, folder):
    """verl's engine by its registry: on logits, and fused."""
    return tuple(helper.make_engine(folder, fused) for fused in (False, True))


def run(engine, fused, name, *, form=None, label=False, actor=None, batch=None, **settings):
    form = form or form_of(name)
    data = make_batch(form, fused, label=label, **(batch or {}))
    return gradients(engine, data, loss_function(name, actor, **settings))


def assert_same(ours, theirs, metrics=True):
    """Losses, metrics, and gradients to 1e-5 of each parameter's largest."""
    torch.testing.assert_close(ours[0]["loss"], theirs[0]["loss"], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        close = dict(rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
        torch.testing.assert_close(ours[1][name], gradient, **close)
    assert sum(g.abs().sum() for g in ours[1].values()) > 0.1
    if metrics:
        found, expected = (out[0]["metrics"] for out in (ours, theirs))
        assert found.keys() == expected.keys()
        for name, metric in expected.items():
            assert found[name].aggregate() == pytest.approx(metric.aggregate(), rel=1e-4, abs=1e-5)


def test_verl_s_registry_gives_the_fused_engine(cpu, engines):
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    assert all(type(engine) is verl_fused.FusedEngine for engine in engines)
    known = EngineRegistry._engines["language_model"]["fsdp2"]
    assert known["cuda", "nvidia"] is verl_fused.FusedEngine
    assert known["cuda"] is FSDPEngineWithLMHead  # verl's own stays


@pytest.mark.parametrize("name", NAMES)
def test_fused_losses_and_gradients_are_those_on_logits(engines, name):
    label = name in integration.TOP_K_AND_LABEL
    batch = dict(calculate_entropy=name == "tropd_entropy_opd")
    theirs, ours = (
        run(engine, fused, name, label=label, batch=batch) for fused, engine in enumerate(engines)
    )
    assert_same(ours, theirs)


def test_no_logits_are_formed(engines, monkeypatch):
    """The head is never called, and the model's output has none."""
    seen = []
    engine = engines[1]
    monkeypatch.setattr(engine.module.lm_head, "forward", lambda *_: seen.append("logits"))
    original = engine.prepare_model_outputs

    def watch(output, *arguments, **named):
        seen.append(output.logits)
        return original(output, *arguments, **named)

    monkeypatch.setattr(engine, "prepare_model_outputs", watch)
    run(engine, True, "tropd")
    assert seen == [None, None]


def own(name, rule, teacher, monkeypatch):
    """Registers a rule for one test."""
    from verl.trainer.distillation import losses

    for registry in (
        losses.DISTILLATION_LOSS_REGISTRY, losses.DISTILLATION_SETTINGS_REGISTRY, RULES
    ):  # fmt: skip
        monkeypatch.setitem(registry, name, None)
        monkeypatch.delitem(registry, name)  # undone at the end, and with it the registration
    monkeypatch.setattr("tropd_kernels.integrations.verl.NEEDS_LABEL", set(NEEDS_LABEL))
    integration.register(name, rule, teacher)


@pytest.mark.parametrize("by", ["teacher_entropy", "disagreement"])
def test_a_selection_s_metrics_are_those_on_logits(engines, by, monkeypatch):
    """One value of each micro-batch, fused and on logits."""
    own("mine", replace(TrOPD(), select_by=by, select_fraction=0.5), "top_k", monkeypatch)
    theirs, ours = (
        run(engine, fused, "mine", form="top_k") for fused, engine in enumerate(engines)
    )
    assert_same(ours, theirs)
    for name in ("select_threshold", "selected_score_share"):
        values = ours[0]["metrics"][f"distillation/{name}"].values
        assert len(values) == 2 and all(0 <= value < math.inf for value in values), name
    assert by == "disagreement" or 0 < min(values) < max(values) < 1


def test_verl_s_own_forward_kl_is_ours_on_raw_masses(engines, monkeypatch):
    """Its `forward_kl_topk`, but for its clamp at 0, which a teacher this sharp never meets."""
    rule = Divergence("forward_kl", top_k=K, top_k_tail="raw")
    own("raw_forward_kl", rule, "top_k", monkeypatch)
    theirs = run(engines[0], False, "forward_kl_topk", form="top_k")
    ours = run(engines[1], True, "raw_forward_kl", form="top_k")
    assert theirs[0]["metrics"]["distillation/loss_min"].aggregate() > 0
    assert_same(ours, theirs, metrics=False)
    for side in ("student", "teacher"):
        for kind in ("", "_min", "_max"):
            name = f"distillation/{side}_mass{kind}"
            expected = theirs[0]["metrics"][name]
            expected = sum(expected) / len(expected) if kind == "" else expected.aggregate()
            assert float(ours[0]["metrics"][name].aggregate()) == pytest.approx(
                float(expected), rel=0.05 if kind == "" else 1e-4
            )


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean",
                                  "seq-mean-token-sum-norm"])  # fmt: skip
def test_verl_s_own_policy_gradient_is_opd_with_the_current_reward(engines, mode, monkeypatch):
    """Its K1 as a reward, with old_log_probs, PPO's clip and each of its means."""
    rule = replace(OPD(clip_ratio_low=0.2, clip_ratio_high=0.2), reward_policy="current")
    own("opd_current", rule, "sampled", monkeypatch)
    data = make_batch("sampled", False, calculate_entropy=False)
    with torch.no_grad(), engines[0].eval_mode():
        output = engines[0].forward_backward_batch(data, None, forward_only=True)
    from verl.workers.utils.padding import no_padding_2_padding

    log_probs = no_padding_2_padding(output["model_output"]["log_probs"], data)
    old = log_probs + 0.4 * torch.randn(
        log_probs.shape, generator=torch.Generator().manual_seed(5)
    ).clamp(-2, 2)
    found = []
    for fused, name, settings in (
        (False, "k1", dict(use_policy_gradient=True)), (True, "opd_current", {}),
    ):  # fmt: skip
        batch = make_batch("sampled", fused)
        batch["old_log_probs"] = old
        function = loss_function(name, dict(loss_agg_mode=mode), **settings)
        found.append(gradients(engines[fused], batch, function))
    clipped = found[0][0]["metrics"]["distillation/pg_clipfrac"]
    assert 0 < sum(clipped) < len(clipped)
    assert_same(found[1], found[0], metrics=False)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", ["tropd", "tropd_mask"])
def test_beside_task_rewards_verl_s_policy_loss_has_its_gradient(engines, name, entropy):
    """Then its loss of log-probs, and of entropy, is added, with a weight."""
    batch = dict(distillation_only=False, calculate_entropy=entropy)
    settings = dict(use_task_rewards=True, distillation_loss_coef=0.5)
    actor = dict(entropy_coeff=0.01) if entropy else {}
    theirs, ours = (
        run(engine, fused, name, actor=actor, batch=batch, **settings)
        for fused, engine in enumerate(engines)
    )
    assert_same(ours, theirs)
    alone = run(engines[1], True, name)
    assert not torch.allclose(alone[1]["lm_head.weight"], ours[1]["lm_head.weight"], rtol=1e-2)


def test_the_rollout_s_temperature_is_the_student_s(engines):
    theirs, ours = (
        run(engine, fused, "tropd", batch=dict(temperature=0.6))
        for fused, engine in enumerate(engines)
    )
    assert_same(ours, theirs)
    other = run(engines[1], True, "tropd")
    assert other[0]["loss"] != ours[0]["loss"]


def test_mini_and_micro_batches_train_alike(cpu, folder):
    """Two PPO mini-batches of two micro-batches each, over verl's own iterator, with its optimizer:
    what the second is trained on depends on the first, with the same old_log_probs."""
    from verl.utils import tensordict_utils as tu

    trained = []
    for fused in (False, True):
        engine = helper.make_engine(folder, fused)
        data = make_batch("top_k", fused, global_batch_size=2)
        # verl's worker says these of each mini-batch.
        flags = dict(use_fused_kernels=fused, micro_batch_size_per_gpu=1)
        batches = tu.make_iterator(data, mini_batch_size=2, epochs=2, seed=3, dataloader_kwargs={})
        norms = []
        with engine.train_mode():
            for batch in batches:
                tu.assign_non_tensor(batch, **flags)
                output = engine.train_batch(batch, loss_function=loss_function("tropd"))
                norms.append(float(output["metrics"]["grad_norm"]))
        trained.append((norms, {n: p.full_tensor() for n, p in engine.module.named_parameters()}))
    assert len(trained[0][0]) == 4 and len(set(trained[0][0])) == 4
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-4)
    for name, parameter in trained[0][1].items():
        # Adam divides by the root of a square: a rounding of a small gradient shows.
        torch.testing.assert_close(trained[1][1][name], parameter, rtol=1e-3, atol=2e-4)


def test_a_label_s_own_log_prob_is_used_beyond_the_k(engines):
    """With it no token counts as ruled out, and TrOPD's gate sees its true ratio."""
    without = run(engines[1], True, "tropd")
    ours = run(engines[1], True, "tropd", label=True)
    assert ours[0]["metrics"]["distillation/label_in_topk"].aggregate() < 1
    trust = [out[0]["metrics"]["distillation/trust"].aggregate() for out in (without, ours)]
    assert trust[0] < trust[1] < 1
    theirs = run(engines[0], False, "tropd", label=True)
    assert_same(ours, theirs)


def test_a_rule_that_needs_the_label_says_so(cpu, folder):
    for fused in (False, True):
        with pytest.raises(RuntimeError, match="tropd_eopd.*beside its top 5"):
            run(helper.make_engine(folder, fused), fused, "tropd_eopd")


def test_a_head_with_scale_and_cap_is_read(cpu, tmp_path, monkeypatch):
    """verl's own fused path leaves them out."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
        final_logit_softcapping=2.0, initializer_range=0.3,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    theirs, ours = (
        run(helper.make_engine(tmp_path, fused), fused, "tropd") for fused in (False, True)
    )
    assert_same(ours, theirs)


def test_an_adapter_is_trained(cpu, folder):
    theirs, ours = (
        trainable(helper.make_engine(folder, fused, lora_rank=4), fused) for fused in (False, True)
    )
    assert all("lora_" in name for name in ours[1])
    assert_same(ours, theirs)


def trainable(engine, fused):
    """As `run`, of the parameters that are trained, a LoRA's B made something other than 0."""
    names = [n for n, p in engine.module.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if "lora_B" in name:
                draw = torch.Generator().manual_seed(len(name))
                values = torch.randn(parameter.to_local().shape, generator=draw)
                parameter.to_local().copy_(values)
            if "lora_A" in name:
                parameter.to_local().copy_(torch.full_like(parameter.to_local(), 0.05))
    with engine.train_mode():
        output = engine.forward_backward_batch(make_batch("top_k", fused), loss_function("tropd"))
        parameters = dict(engine.module.named_parameters())
        return output, {n: parameters[n].grad.full_tensor().clone() for n in names}


@pytest.mark.parametrize("tied", [False, True])
def test_other_losses_and_old_log_probs_stay_verl_s_own(cpu, tmp_path, tied, monkeypatch):
    """In a fused engine, too: K3 from log-probs, and a forward without a loss. Beside a tied
    embedding they are verl's own; verl fails where the head is a unit of FSDP 2 by itself."""
    folder = helper.make_model(tmp_path, tie_word_embeddings=tied)
    engines = [helper.make_engine(folder, fused) for fused in (False, True)]
    if tied:
        monkeypatch.setattr(verl_fused, "fused_forward", None)
    theirs = run(engines[0], False, "k3", form="sampled")
    ours = run(engines[1], True, "k3", form="sampled")
    assert_same(ours, theirs, metrics=False)
    found = []
    for fused, engine in enumerate(engines):
        data = make_batch("sampled", bool(fused), calculate_entropy=True)
        with torch.no_grad(), engine.eval_mode():
            output = engine.forward_backward_batch(data, None, forward_only=True)["model_output"]
        found.append(torch.cat([output["log_probs"].values(), output["entropy"].values()]))
    torch.testing.assert_close(*found)


def test_a_tied_head_is_trained(cpu, tmp_path):
    folder = helper.make_model(tmp_path, tie_word_embeddings=True)
    theirs, ours = (
        run(helper.make_engine(folder, fused), fused, "tropd") for fused in (False, True)
    )
    assert_same(ours, theirs)


@pytest.fixture
def spare(cpu, folder):
    """A fused engine for a test in which a step fails: FSDP does not go on after that."""
    return helper.make_engine(folder, True)


@pytest.mark.parametrize(
    ("setting", "value"), [("use_policy_gradient", True), ("log_prob_min_clamp", -10.0)]
)
@pytest.mark.parametrize("name", ["tropd", "tropd_opd"])
def test_settings_that_would_change_the_objective_are_refused(spare, name, setting, value):
    with pytest.raises(ValueError, match=f"distillation_loss.{setting}="):
        run(spare, True, name, **{setting: value})


def test_rows_with_padding_are_refused(spare):
    with pytest.raises(ValueError, match="use_remove_padding=true"):
        run(spare, True, "tropd", batch=dict(use_remove_padding=False))


def test_a_forward_of_verl_s_own_for_images_is_refused():
    verl_fused.check_forward(None, "verl.models.transformers.dense_common")
    verl_fused.check_forward(None, "transformers.models.qwen3.modeling_qwen3")
    with pytest.raises(NotImplementedError, match="qwen3_vl.*use_fused_kernels=false"):
        verl_fused.check_forward(None, "verl.models.transformers.qwen3_vl")


def test_in_bfloat16_the_teacher_and_the_draws_keep_their_digits(cpu, folder):
    """FSDP casts what a model's forward is given; what the loss is given is none of that."""
    seen = []

    class Watch(verl_request.Request):
        def of_head(self, hidden, weight, **head):
            seen.append((hidden.dtype, self.rows.teacher_log_probs.dtype, self.rows.uniforms.dtype))
            return super().of_head(hidden, weight, **head)

    engine = helper.make_engine(folder, True, dtype="bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl_request, "Request", Watch)
        run(engine, True, "tropd")
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}


def process(rank, folder):
    """One of two processes, each with two of the sequences, under FSDP 2."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    with pytest.MonkeyPatch.context() as patch:
        helper.use_cpu(patch)
        verl_fused.register_engines((("cpu", "any"),))
        engine = helper.make_engine(Path(folder) / "model", True)
        sharded = [p.to_local().shape != p.shape for p in engine.module.parameters()]
        for name in ("tropd", "tropd_mask", "k3"):
            form = "top_k" if name == "tropd" else "sampled"
            own = make_batch(form, True, part=slice(2 * rank, 2 * rank + 2))
            output, found = gradients(engine, own, loss_function(name))
            torch.save((sum(output["loss"]), sharded, found), f"{folder}/{name}_{rank}.pt")
            engine.optimizer_zero_grad()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_two_processes_are_one(cpu, tmp_path, tied):
    """Each has half of each parameter, and tokens of its own; also with verl's K3, whose own fused
    forward fails beside a head that is a unit by itself."""
    folder = helper.make_model(tmp_path / "model", tie_word_embeddings=tied)
    engine = helper.make_engine(folder, False)
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    for name in ("tropd", "tropd_mask", "k3"):
        form = "top_k" if name == "tropd" else "sampled"
        theirs = gradients(engine, make_batch(form, False), loss_function(name))
        engine.optimizer_zero_grad()
        saved = [torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2)]
        assert all(saved[0][1])
        ours = {"loss": (saved[0][0] + saved[1][0]) / 2}, saved[0][2]
        assert_same(ours, ({"loss": sum(theirs[0]["loss"])}, theirs[1]), metrics=False)
