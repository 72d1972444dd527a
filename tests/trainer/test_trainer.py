"""The trainer against a loop written by hand (`training.by_hand`), on tiny random models."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import transformers
from training import Spy, make, resume_and_compare, rewards_by_hand, step_and_compare
from trl import DistillationConfig, DistillationTrainer, GRPOTrainer

from tropd_kernels.objectives.registry import OBJECTIVES, required_knobs
from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer, hooks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
KINDS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True, "spread": 1.0},
    "gemma2, capped": dict(
        kind=transformers.Gemma2ForCausalLM, config=transformers.Gemma2Config, head_dim=8,
        final_logit_softcapping=5.0, tie_word_embeddings=False,
    ),
    "gpt2, learned positions": dict(
        kind=transformers.GPT2LMHeadModel, config=transformers.GPT2Config, n_inner=48,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, spread=1.0,
    ),
    "biogpt, learned positions": dict(
        kind=transformers.BioGptForCausalLM, config=transformers.BioGptConfig, layerdrop=0.0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, activation_dropout=0.0,
        spread=1.0,
    ),
    "granite, scaled": dict(
        kind=transformers.GraniteForCausalLM, config=transformers.GraniteConfig,
        logits_scaling=4.0, spread=16.0,
    ),
}  # fmt: skip


# --- TRL's private side ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "parameters"),
    [(DistillationTrainer, *hook) for hook in hooks.HOOKS]
    + [(GRPOTrainer, *hook) for hook in hooks.GRPO_HOOKS],
)
def test_hooks_exist(kind, name, parameters):
    """A TRL that renames a hook or reorders its parameters would be called wrongly, or never."""
    found = list(inspect.signature(getattr(kind, name)).parameters)
    assert found[: len(parameters.split())] == parameters.split()


def test_only_hooks_are_overridden():
    """A helper of ours with the name of one of TRL's or transformers' methods would replace it."""
    public = {"create_model_card", "evaluation_loop", "log", "predict", "train"}
    public |= {f"get_{which}_dataloader" for which in ("train", "eval", "test")}
    known = {name for name, _ in hooks.HOOKS} | public | {"_tag_names"}
    ours = [kind for kind in TrOPDTrainer.__mro__ if kind.__module__.startswith("tropd_kernels")]
    names = {name for kind in ours for name in vars(kind) if not name.startswith("__")}
    assert {name for name in names if hasattr(DistillationTrainer, name)} <= known


def test_attributes_exist(tmp_path):
    trainer = make(tmp_path)
    assert [name for name in hooks.ATTRIBUTES if not hasattr(trainer, name)] == []


def test_constructor_is_trl_s():
    ours, theirs = (
        list(inspect.signature(c.__init__).parameters) for c in (TrOPDTrainer, DistillationTrainer)
    )
    own = ["reward_funcs", "reward_processing_classes"]  # GRPO's
    own += ["teacher_models"]
    assert ours == [*theirs, *own]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_is_trl_s_own_loss(tmp_path, beta):
    """In its place for a whole epoch: the same completions, losses and weights."""
    settings = dict(
        max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_completion_length=10, logging_steps=1, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, seed=5, beta=beta,
        temperature=1.3, optim="sgd", learning_rate=0.05,
    )  # fmt: skip
    runs = []
    for kind, config, more in (
        (DistillationTrainer, DistillationConfig, {}),
        (TrOPDTrainer, TrOPDConfig, {"objective": "gkd"}),
    ):
        trainer = kind(
            tiny.model(0), tiny.model(1, hidden_size=48),
            config(str(tmp_path), **settings, **more), train_dataset=tiny.prompts(),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        runs.append((logs, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    (theirs, their_weights), (ours, our_weights) = runs
    assert len(theirs) == len(ours) == 2
    for a, b in zip(theirs, ours):
        assert a["num_tokens"] == b["num_tokens"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    before = torch.cat([p.detach().flatten() for p in tiny.model(0).parameters()])
    assert (our_weights - their_weights).norm() <= 1e-4 * (their_weights - before).norm()


class OfTRL(Spy):
    """Makes its batches in TRL's form, as a subclass or a test of TRL's would."""

    def _prepare_inputs(self, generation_batch):
        batch = super()._prepare_inputs(generation_batch)
        added = ("prefix_lengths", "sequence_ids", "loss_mask", "num_items_in_batch")
        return {name: value for name, value in batch.items() if name not in added}


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_in_trl_s_form(tmp_path, training):
    """Nobody wrote a prefix, and the rows are counted from 0: neither for `compute_loss` nor for
    `_compute_loss` has a batch to hold more than TRL's does."""
    trainer = make(tmp_path, generation_kwargs={"do_sample": False})
    trainer.model.train(training)
    batch = trainer._prepare_inputs(list(tiny.prompts(4)))
    own = batch | {"sequence_ids": torch.arange(4), "prefix_lengths": torch.zeros(4).long()}
    bare = {k: v for k, v in batch.items() if k not in ("sequence_ids", "prefix_lengths")}
    names = list(bare)
    expected = trainer.compute_loss(trainer.model, own)
    assert torch.equal(trainer.compute_loss(trainer.model, bare), expected)
    assert list(bare) == names
    loss, _, tokens = trainer._compute_loss(trainer.model, bare, None)
    assert tokens == bare["completion_mask"].sum()
    if not training:
        assert torch.equal(loss, expected)
    step = make(tmp_path, kind=OfTRL, evaluate=tiny.prompts(4))
    step.train()
    assert len(step.losses) == 1
    assert math.isfinite(step.evaluate()["eval_loss"])


# --- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_step_is_the_loop_s(tmp_path, kind):
    teacher = tiny.model(1, **KINDS[kind])
    trainer = make(tmp_path, tiny.model(0, **KINDS[kind]), teacher, temperature=1.3)
    step_and_compare(trainer, teacher)
    batch = trainer.batches[0]
    assert (batch["prompt_mask"] == 0).any()  # some prompt was padded on the left


@pytest.mark.parametrize(("backend", "prefix_weight"), [("reference", None), ("torch", 0.7)])
def test_step_with_prefix_and_credit(tmp_path, backend, prefix_weight):
    teacher = tiny.model(1, hidden_size=48)
    trainer = make(
        tmp_path, teacher=teacher, backend=backend, prefix_schedule="cosine", prefix_length=4,
        kl_discount_factor=0.9, importance_gamma=0.5, gradient_accumulation_steps=2,
        per_device_train_batch_size=2, prefix_weight=prefix_weight,
    )  # fmt: skip
    step_and_compare(trainer, teacher)
    assert all((b["prefix_lengths"] == 4).all() for b in trainer.batches)


@pytest.mark.parametrize(
    "objective", ["opd", "gkd", "eopd", "aopd", "lsm", "mopd", "reopold", "sft"]
)
def test_step_of_other_objectives(tmp_path, objective):
    """reopold's mean is over the tokens that its gate keeps."""
    teacher = tiny.model(1, spread=1.5)
    trainer = make(tmp_path, tiny.model(0, spread=1.5), teacher, objective=objective)
    step_and_compare(trainer, teacher)


def test_step_with_lora(tmp_path):
    peft = pytest.importorskip("peft")
    teacher = tiny.model(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    trainer = make(tmp_path, teacher=teacher, peft=config)
    step_and_compare(trainer, teacher)


def test_accumulation_is_the_large_batch(tmp_path):
    """The generation batch is the same; the split must change neither tokens, draws nor loss."""
    weights, losses = [], []
    for size in (4, 2, 1):
        trainer = make(
            tmp_path / str(size), per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        losses.append(sum(trainer.losses))
        assert len(trainer.batches) == 4 // size
    for other, loss in zip(weights[1:], losses[1:]):
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(losses[0], rel=1e-5)
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in tiny.model(0).parameters()]))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    weights = []
    for on in (False, True):
        trainer = make(tmp_path / str(on), gradient_checkpointing=on, max_steps=2)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-7)


def test_bf16_multiplies_in_bf16(tmp_path):
    """TRL's redirection strips accelerate's autocast off the forward; without ours, bf16=True
    would train in float32."""
    trainer = make(tmp_path, bf16=True)
    trainer.train()
    assert trainer.dtypes == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_completions_end_at_any_eos_or_at_the_limit(tmp_path):
    flat = dict(spread=0.5)  # nearly uniform: ends come often
    trainer = make(
        tmp_path, tiny.model(0, **flat), tiny.model(1, **flat), tiny.prompts(32), max_steps=4,
        per_device_train_batch_size=8, max_completion_length=24,
    )  # fmt: skip
    trainer.train()
    ends = {2: 0, 3: 0, None: 0}
    for batch in trainer.batches:
        for ids, mask in zip(batch["completion_ids"], batch["loss_mask"]):
            kept = ids[: int(mask.sum())].tolist()
            assert mask[: len(kept)].all()
            eos = [i for i, token in enumerate(kept) if token in (2, 3)]
            assert eos in ([], [len(kept) - 1])
            assert eos or len(kept) == 24
            ends[kept[-1] if eos else None] += 1
    assert min(ends.values()) > 0, ends


def test_empty_completions(tmp_path):
    """A student that ends at once still has that one token to learn from."""
    teacher = tiny.model(1, hidden_size=48)
    trainer = make(tmp_path, teacher=teacher)
    trainer.generation_config.suppress_tokens = [i for i in range(tiny.VOCAB) if i != 2]
    step_and_compare(trainer, teacher)
    assert trainer.batches[0]["completion_ids"].tolist() == [[2]] * 4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(tmp_path, objective):
    settings: dict = dict(prefix_schedule="constant", prefix_length=3)
    if needed := required_knobs(objective):
        settings["objective_kwargs"] = dict.fromkeys(needed, 0.5)
    trainer = make(tmp_path, objective=objective, **settings)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(map(math.isfinite, trainer.losses))
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_reopold_changes_its_stage():
    args = TrOPDConfig("unused", objective="reopold", stage_fraction=0.25, bf16=False, use_cpu=True)
    assert [args.rule(x).outlier for x in (0.0, 0.24, 0.25, 1.0)] == [
        "mask",
        "mask",
        "clip",
        "clip",
    ]
    assert args.rule(0.5).entropy_top_fraction == pytest.approx(0.2)


def test_gradients_from_a_sample_of_ids(tmp_path):
    """Another sample in every micro-batch; the same ones in a second run; none in an evaluation."""
    settings = dict(max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    runs, given = [], []

    class Seen(Spy):
        def _gradient_sampling(self, inputs):
            given.append(super()._gradient_sampling(inputs))
            return given[-1]

    for share in (None, 0.2, 0.2):
        trainer = make(
            tmp_path, kind=Seen, evaluate=tiny.prompts(), gradient_sampling=share, **settings
        )
        trainer.train()
        trainer.evaluate()
        runs.append(trainer)
    exact, once, again = ([log for log in t.state.log_history if "loss" in log] for t in runs)
    assert "tropd/gradient_error" not in exact[0]
    assert exact[0]["loss"] == pytest.approx(once[0]["loss"], rel=1e-6), "the loss is of all ids"
    assert exact[1]["loss"] != pytest.approx(once[1]["loss"], rel=1e-6)
    assert [log["loss"] for log in once] == [log["loss"] for log in again]
    for log in once:
        assert 0.05 < log["tropd/gradient_share"] < 0.4 and 0 < log["tropd/gradient_error"] < 1
    drawn = [options["seed"] for options in given if options]
    assert len(drawn) == 8 and len(set(drawn)) == 4 and given[-1] == {}


# --- metrics -----------------------------------------------------------------------------------


def test_metrics_are_means_over_tokens(tmp_path):
    trainer = make(tmp_path, prefix_schedule="constant", prefix_length=3)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    own, guided = rewards_by_hand(trainer.batches)
    assert log["tropd/reward_mean"] == pytest.approx(own.mean().item(), rel=1e-4)
    assert log["tropd/reward_min"] == pytest.approx(own.min().item(), rel=1e-4)
    split = make(
        tmp_path, prefix_schedule="constant", prefix_length=3, per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    split.train()
    parts = rewards_by_hand(split.batches)[0]
    logged = split.state.log_history[0]
    assert logged["tropd/reward_min"] == pytest.approx(parts.min().item(), rel=1e-4)
    assert logged["tropd/reward_mean"] == pytest.approx(parts.mean().item(), rel=1e-4)
    assert log["tropd/prefix_nll"] == pytest.approx(guided.mean().item(), rel=1e-4)
    assert log["tropd/trust_ratio"] + log["tropd/outlier_ratio"] == pytest.approx(1)
    for name in ("reverse_kl", "forward_kl", "teacher_entropy", "tokens_per_second",
                 "peak_memory_gib", "teacher_topk_mass", "student_topk_mass"):  # fmt: skip
        assert log[f"tropd/{name}"] > 0
    assert log["entropy"] > 0


def test_a_rate_is_of_all_tokens_and_seconds(tmp_path):
    """The first step, which compiles and fills caches, would weigh as much as the others."""
    trainer = make(tmp_path, max_steps=3, logging_steps=3)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    tokens = sum(int(batch["completion_mask"].sum()) for batch in trainer.batches)
    seconds = 3 * log["step_time"]  # TRL's mean
    assert log["tropd/tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-6)


@pytest.mark.parametrize(
    "settings", [{"kl_discount_factor": 0.9}, {"objective": "topk_jsd"}, {"num_iterations": 2}]
)
def test_logged_reward_is_k1_s(tmp_path, settings):
    """... whatever stands in its place in the loss: returns would grow with the completions."""
    trainer = make(tmp_path, **settings)
    trainer.train()
    own, _ = rewards_by_hand(trainer.batches)
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["tropd/reward_mean"] == pytest.approx(own.mean().item(), rel=1e-4)
    assert log["tropd/reward_min"] == pytest.approx(own.min().item(), rel=1e-4)


@pytest.mark.parametrize("rich_progress", [True, False, None])
def test_progress(tmp_path, capsys, rich_progress):
    """Not at a terminal, None stays with transformers' display."""
    pytest.importorskip("rich")
    trainer = make(tmp_path, rich_progress=rich_progress, disable_tqdm=False)
    shown = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert ("Progress" in shown) == bool(rich_progress)
    assert ("ProgressCallback" in shown) == (not rich_progress)
    trainer.train()
    assert ("Training" in capsys.readouterr().out) == bool(rich_progress)


def test_regions_are_shown(tmp_path, capsys):
    """Every token once, in its region, with markup of the text escaped."""
    trainer = make(tmp_path, log_regions=True, prefix_schedule="constant", prefix_length=3)
    trainer.train()
    (page,) = (tmp_path / "regions").glob("train_*.html")
    text = page.read_text()
    batch = trainer.batches[0]
    assert text.count('class="prefix"') - 1 == int(batch["prefix_lengths"].sum())  # 1: the legend
    spans = sum(text.count(f'class="{name}"') - 1 for name in ("prefix", "trusted", "outlier"))
    assert spans == int(batch["completion_mask"].sum())
    log = trainer.state.log_history[0]
    own = spans - int(batch["prefix_lengths"].sum())
    assert text.count('class="trusted"') - 1 == round(log["tropd/trust_ratio"] * own)
    assert "<s>" not in text and "<pad>" not in text
    assert "outlier" in capsys.readouterr().out


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 4])  # within an epoch, and at its end
def test_resumed_run_has_the_same_losses(tmp_path, stop):
    resume_and_compare(tmp_path, stop, max_steps=6, prefix_schedule="cosine", prefix_length=4)


@pytest.mark.parametrize("size", [98, 110])
def test_cross_entropy_beside_a_teacher_that_is_not_read(tmp_path, size):
    """It is over all of the student's ids, whatever the teacher has of them."""
    student = tiny.model(0, vocab_size=104)
    twin = copy.deepcopy(student).double()
    trainer = make(tmp_path, student, tiny.model(1, vocab_size=size), objective="sft")
    trainer.train()
    (batch,), total = trainer.batches, 0.0
    for i in range(4):
        prompt, labels = (batch[f"{part}_ids"][i][batch[f"{part}_mask"][i].bool()]
                          for part in ("prompt", "completion"))  # fmt: skip
        with torch.no_grad():
            logits = twin(torch.cat([prompt, labels])[None]).logits[0, len(prompt) - 1 : -1]
        total -= logits.log_softmax(-1).gather(1, labels[:, None]).sum().item()
    assert trainer.losses == pytest.approx([total / batch["completion_mask"].sum().item()])
