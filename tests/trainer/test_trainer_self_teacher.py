"""`teacher_model="self"`: a frozen copy, the student without its adapters, a moving average."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import datasets
import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from engines import on_two_processes, saved_together
from training import RATE, Spy, by_hand, make, share_written_by, step_and_compare, unloadable

from tropd_kernels.trainer import TrOPDConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SPLIT = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
FROZEN = dict(teacher_update_rate=None)
TOLD = [f"w{90 - i} " * (1 + (5 * i) % 8) + f"w{i}" for i in range(8)]


def told(**columns):
    return tiny.prompts(8, teacher_prompt=TOLD, **columns)


def itself(folder, student=None, data=None, **settings):
    return make(folder, student, "self", told() if data is None else data, **settings)


def adapter(seed=7, **options):
    """A student with an adapter that has learnt something already."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
    model = peft.get_peft_model(tiny.model(0), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "settings", [SPLIT, dict(objective="reverse_kl"), dict(SPLIT, objective="opd", lmbda=0.0)]
)
def test_frozen_copy_is_the_student_at_the_start(tmp_path, settings):
    trainer = itself(tmp_path, **settings)
    step_and_compare(trainer, tiny.model(0))
    assert not torch.equal(trainer.teacher_model.lm_head.weight, trainer.model.lm_head.weight)


def test_it_is_the_student_loaded_twice(tmp_path):
    """To the bit, over several steps."""
    runs = []
    for teacher in ("self", tiny.model(0)):
        runs.append(make(tmp_path, teacher=teacher, data=told(), max_steps=3, **SPLIT))
        runs[-1].train()
    assert runs[0].losses == runs[1].losses
    assert all(map(torch.equal, *(run.model.parameters() for run in runs)))


@pytest.mark.parametrize("kept", [None, ["lm_head"]])
def test_adapters_off_is_the_base(tmp_path, kept):
    """No copy; with a head that the adapter trains, too, the teacher's is the original."""
    trainer = itself(tmp_path, adapter(modules_to_save=kept), **SPLIT)
    assert trainer.teacher_model is None
    if kept is None:
        step_and_compare(trainer, tiny.model(0))
        return
    head = trainer.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.mul_(1.5)
    step_and_compare(trainer, tiny.model(0))
    assert torch.equal(trainer.model.lm_head.original_module.weight, tiny.model(0).lm_head.weight)


def initialised(name):
    """A LoRA configuration, a model for it, and what prepares that."""
    peft = pytest.importorskip("peft")
    lora, model = peft.tuners.lora, tiny.model(0)
    options = dict(init_lora_weights=name)
    known = dict(mica="MiCALinearVariant", lora_ga="LoraGAConfig", kasa="KasaConfig")
    if not any(hasattr(m, known.get(name, "LoraConfig")) for m in (lora.config, lora.variants)):
        pytest.skip(f"this peft has no {name}")
    if name == "kasa":
        options = dict(kasa_config=lora.config.KasaConfig(beta=0.0, gamma=0.0))
    elif name == "lora_ga":
        options |= dict(lora_ga_config=lora.config.LoraGAConfig())
    elif name == "loftq":
        pytest.importorskip("scipy")
        options |= dict(loftq_config=lora.config.LoftQConfig())
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, **options)
    ids = torch.tensor([[9, 8, 7, 6, 5]])

    def prepare():
        if name == "corda":  # which needs attrs
            corda = pytest.importorskip("peft.tuners.lora.corda")
            corda.preprocess_corda(model, config, run_model=lambda: model(ids))
        elif name == "lora_ga":
            step = lambda: model(ids, labels=ids).loss.backward()
            lora.loraga.preprocess_loraga(model, config, step)
        elif name == "loftq":
            pytest.importorskip("bitsandbytes")

    return model, config, prepare


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_adapters_that_train_the_base(tmp_path, bias):
    """Biases of the model's own layers move with the adapter, and stay where it is off."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], bias=bias)
    with pytest.raises(ValueError, match=f"^teacher_model: 'self' .* bias='{bias}' .*bias='none'"):
        make(tmp_path, tiny.model(0), "self", told(), peft=config)


@pytest.mark.parametrize(
    "name",
    [True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora",
     "OLoRA", "corda", "lora_ga", "loftq", "kasa"],
)  # fmt: skip
def test_adapters_that_change_the_base(tmp_path, name):
    """PEFT is asked: with the adapter off, is it still the model that was given?"""
    student, config, prepare = initialised(name)
    keeps = type(name) is bool or name in ("gaussian", "eva", "orthogonal", "mica")
    words = "^teacher_model: 'self' is the student without its adapters, whose own weights "

    def check(given, config=None):
        if keeps:
            make(tmp_path, given, "self", told(), peft=config)
            return
        with pytest.raises(ValueError, match=words):
            make(tmp_path, given, "self", told(), peft=config)

    if name not in ("eva", "lora_ga"):  # which begin from data
        check(tiny.model(0), config)
    prepare()
    wrapped = pytest.importorskip("peft").get_peft_model(student, config)
    own = dict(tiny.model(0).named_parameters())
    kept = all(
        torch.equal(parameter, own[key.replace(".base_layer", "")])
        for key, parameter in wrapped.get_base_model().named_parameters()
        if "lora_" not in key
    )
    assert kept == keeps
    check(wrapped)


def test_adapter_parameters_keep_their_flags(tmp_path):
    """PEFT trains all of an adapter after it has been switched off and on."""
    model = adapter()
    frozen = [n for n, p in model.named_parameters() if "layers.0" in n and "lora_A" in n]
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    trainer = itself(tmp_path, model, max_steps=2)
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert (name in frozen or "lora" not in name) == torch.equal(parameter, before[name]), name


def test_the_base_writes_after_its_own_prompt(tmp_path):
    """... without the adapter, which would write something else."""
    base = tiny.model(0, spread=300.0)
    trainer = itself(tmp_path, adapter_of(base), objective="opd", lmbda=0.0)
    trainer.train()
    (batch,) = trainer.batches
    assert "teacher_prompt_ids" in batch
    assert share_written_by(tiny.model(0, spread=300.0), batch) > 0.8


def adapter_of(base):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    return model


@pytest.mark.parametrize("steps", [1, 2])
def test_moving_average_by_hand(tmp_path, steps):
    """0.25 student + 0.75 teacher after each update, and the second step's loss is its."""
    trainer = itself(tmp_path, teacher_update_rate=0.25, teacher_sync_steps=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    words = "teacher_sync_steps: 2 is more than the run's 1 steps, so the teacher never changes"
    assert any(str(one.message).startswith(words) for one in caught) == (steps == 2)
    for new, old, mean in zip(
        trainer.model.parameters(), tiny.model(0).parameters(), trainer.teacher_model.parameters()
    ):
        expected = old if steps == 2 else 0.75 * old + 0.25 * new
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-7)
    trainer = itself(tmp_path, teacher_update_rate=1.0, max_steps=2)
    students = []
    trainer.distill = lambda *a, f=trainer.distill: (
        students.append(copy.deepcopy(trainer.model)), f(*a))[1]  # fmt: skip
    trainer.train()
    student = students[1].double()
    loss = by_hand(trainer, student, copy.deepcopy(student), step=1)  # rate 1: the student itself
    assert trainer.losses[1] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("settings", [{}, dict(teacher_update_rate=0.5)])
def test_resume(tmp_path, settings):
    """The average is in the checkpoint; a frozen copy is that of the student that is given."""
    settings |= dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch",
                     learning_rate=1e-2, **SPLIT)  # fmt: skip
    whole = itself(tmp_path, **settings)
    whole.train()
    student = tiny.model(9) if "teacher_update_rate" in settings else None
    resumed = itself(tmp_path, student, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.losses == whole.losses[4:]
    for one in ("model", "teacher_model"):
        pair = (getattr(run, one).parameters() for run in (whole, resumed))
        assert all(map(torch.equal, *pair))
    if "teacher_update_rate" in settings:
        for other in ("self", tiny.model(1)):
            trainer = make(tmp_path, teacher=other, data=told(), **settings | FROZEN)
            with pytest.raises(ValueError, match="^resume_from_checkpoint: .* has teacher.pt, the"):
                trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
        (tmp_path / "checkpoint-2" / "teacher.pt").unlink()
        with pytest.raises(ValueError, match="^resume_from_checkpoint: .* has no teacher.pt"):
            itself(tmp_path, **settings).train(resume_from_checkpoint=tmp_path / "checkpoint-2")


def test_card_says_who_taught(tmp_path):
    for rate, words in ((None, "itself before training"), (0.5, "a moving average of itself")):
        trainer = itself(tmp_path, teacher_update_rate=rate)
        trainer.create_model_card()
        assert f"to match {words}" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(teacher_update_rate=0.0), "teacher_update_rate: must be in"),
        (dict(teacher_update_rate=1.5), "teacher_update_rate: must be in"),
        (dict(teacher_sync_steps=0), "teacher_sync_steps: must be a whole number"),
        (dict(teacher_sync_steps=2), "teacher_sync_steps: it would have no effect"),
    ],
)
def test_bad_settings(tmp_path, settings, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        TrOPDConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)


def test_refusals_before_a_model_is_loaded(tmp_path):
    name = unloadable(tmp_path)
    for key, value in (("teacher_model_revision", "x"), ("teacher_model_init_kwargs", {"a": 1})):
        with pytest.raises(ValueError, match=f"^{key}: it would have no effect: .* itself"):
            make(tmp_path, name, "self", told(), **{key: value})
    with pytest.raises(ValueError, match="^teacher_update_rate: it would have no effect"):
        make(tmp_path, name, tiny.model(1), told(), teacher_update_rate=0.5)
    with pytest.raises(ValueError, match="^teacher_update_rate: it would have no effect"):
        make(tmp_path, name, tiny.model(1), told(), teacher_update_rate=1.0)
    with pytest.raises(ValueError, match="^teacher_model: 'self' .* give the data set a column 't"):
        make(tmp_path, name, "self", tiny.prompts())
    with pytest.raises(ValueError, match="^teacher_model: 'self' .* give the data set a column 't"):
        make(tmp_path, name, "self", tiny.prompts(), kind=partial(Spy, reward_funcs=[]))
    peft = pytest.importorskip("peft")
    with pytest.raises(NotImplementedError, match="^teacher_update_rate: with adapters"):
        make(tmp_path, name, "self", told(), peft=peft.LoraConfig(), teacher_update_rate=0.5)


def stream(data):
    """... that does not know its columns."""
    return datasets.IterableDataset.from_generator(lambda: iter(data.to_list()))


def test_streams_without_its_prompts(tmp_path):
    """They would teach nothing, and an evaluation would measure something else."""
    with pytest.raises(ValueError, match="^teacher_prompt: the row .* has none: with .* 'self'"):
        itself(tmp_path, data=stream(tiny.prompts())).train()
    itself(tmp_path, data=stream(told())).train()
    for data in (told(), stream(told())):
        trainer = make(tmp_path, data=data, evaluate=stream(tiny.prompts(4)))
        trainer.train()
        with pytest.raises(ValueError, match="^teacher_prompt: the row .* has none: the training"):
            trainer.evaluate()
    make(tmp_path, data=stream(tiny.prompts())).train()


def test_adapters_that_change_nothing(tmp_path):
    """The student without them is the student, and their gradient is zero."""
    fresh = adapter()
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    for data in (tiny.prompts(), stream(tiny.prompts())):
        with pytest.raises(ValueError, match="^teacher_model: 'self' reads .* adapters do not"):
            itself(tmp_path, fresh, data).train()
    itself(tmp_path, adapter(), tiny.prompts(), max_steps=2).train()
    itself(tmp_path, fresh, max_steps=2).train()


def test_an_error_amid_the_teacher_s_pass_keeps_the_flags(tmp_path):
    trainer = itself(tmp_path, adapter())
    frozen = [p for n, p in trainer.model.named_parameters() if "layers.0" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    with pytest.raises(MemoryError), trainer._without_adapters():
        raise MemoryError
    assert not any(parameter.requires_grad for parameter in frozen)


def test_by_the_config(tmp_path):
    trainer = make(tmp_path, teacher="self", data=told(), teacher_model_name_or_path="self")
    assert trainer.teacher_model is not None


ONE_STEP = """
import sys, torch
from engines import use
settings = use(sys.argv[2])
from test_trainer_self_teacher import adapter, itself
student = adapter() if sys.argv[3] == "adapters" else None
average = {} if student else dict(teacher_update_rate=0.5, max_steps=2)
trainer = itself(sys.argv[1], student, per_device_train_batch_size=2, **average, **settings)
trainer.train()
trained = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
teacher = [] if student else [p.detach() for p in trainer.teacher_model.parameters()]
rank = trainer.accelerator.process_index
torch.save((trainer.batches, trained, teacher, trainer.losses), f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.parametrize("kind", ["adapters", pytest.param("average", marks=pytest.mark.slow)])
def test_two_processes(tmp_path, tmp_path_factory, kind):
    """One step of two processes is that of the four rows by hand; their teachers stay the same."""
    saved = (
        saved_together("test_trainer_self_teacher", tmp_path_factory)
        if kind == "adapters"
        else on_two_processes(ONE_STEP, tmp_path, "ddp", kind)
    )
    assert all(map(torch.equal, saved[0][1], saved[1][1]))
    assert all(map(torch.equal, saved[0][2], saved[1][2]))
    student = adapter() if kind == "adapters" else tiny.model(0)
    trainer = itself(tmp_path, copy.deepcopy(student), per_device_train_batch_size=4)
    trainer.seen = [(batches[0], True) for batches, *_ in saved]
    trainer.args.gradient_accumulation_steps = 2
    twin = copy.deepcopy(student).double()
    loss = by_hand(trainer, twin, tiny.model(0).double())
    assert sum(losses[0] for *_, losses in saved) / 2 == pytest.approx(loss.item(), rel=1e-5)
    if kind == "adapters":
        trained = [p for p in twin.parameters() if p.requires_grad]
        for new, true in zip(saved[0][1], trained, strict=True):
            expected = true.detach() - RATE * true.grad
            torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-6)
