"""What sharding adds to the trainer: checkpoints, tied heads, adapters, mixed precision, and
completions of different lengths on the processes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from engines import ENGINES, on_two_processes
from test_trainer_tools import CALL, SPLIT
from test_trainer_tools import make as make_tools
from test_trainer_tools import model as tool_model
from training import Spy, by_hand, is_the_large_batch, make

from tropd_kernels.trainer.sharding import weights_are_finite

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SHARDED = ENGINES[1:]

_SAVE = """
import sys, torch
from engines import use, whole_parameters
settings = use(sys.argv[2])
from training import make
folder, resume = sys.argv[1], sys.argv[3]
trainer = make(
    folder, per_device_train_batch_size=1, max_steps=4, save_strategy="steps", save_steps=3,
    optim="adamw_torch", learning_rate=1e-3, num_iterations=2, **settings,
)
trainer.train(resume_from_checkpoint=resume or None)
trainer.save_model(f"{folder}/saved")
rank = trainer.accelerator.process_index
torch.save((trainer.losses, whole_parameters(trainer.model)), f"{folder}/{rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_checkpoints(tmp_path, engine):
    """A sharded run goes on from its checkpoint, in the middle of a generation batch, as if it had
    never stopped; and what it saves loads on one device."""
    whole = on_two_processes(_SAVE, tmp_path, engine, "")
    resumed = on_two_processes(_SAVE, tmp_path, engine, str(tmp_path / "checkpoint-3"))
    for (losses, weights), (later, again) in zip(whole, resumed, strict=True):
        assert later == losses[3:]
        for one, other in zip(weights, again, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    alone = tiny.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    start = tiny.model(0)
    for loaded, trained, old in zip(
        alone.parameters(), whole[0][1], start.parameters(), strict=True
    ):
        assert torch.equal(loaded, trained)
        assert not torch.equal(loaded, old)


_STUDENTS = """
import sys, torch, weakref
from engines import use, whole_parameters
settings = use(sys.argv[2])
from test_trainer_sharded import student
saved = {}
for kind in sys.argv[3:]:
    trainer = student(sys.argv[1], kind, per_device_train_batch_size=1, **settings)
    model = trainer.accelerator.unwrap_model(trainer.model)
    first, model = weakref.ref(model.get_output_embeddings().weight), None
    trainer.train()
    saved[kind] = dict(
        losses=torch.tensor(trainer.losses),
        parameters=whole_parameters(trainer.model),
        lengths=[batch["completion_mask"].sum().item() for batch in trainer.batches],
        stored={p.dtype for p in trainer.model.parameters()},
        computed=trainer.dtypes,
        held=first() is not None,
        logged=torch.tensor(trainer.loss_values),
    )
torch.save(saved, f"{sys.argv[1]}/{trainer.accelerator.process_index}.pt")
"""


def student(folder, kind: str, **settings):
    """Six steps of this kind of student."""
    if kind == "lora":
        from peft import LoraConfig

        settings["peft"] = LoraConfig(
            target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False
        )
    if kind == "guided":  # half of the completions are the teacher's to the end
        texts = [" w1 w2 </s>" if row % 2 else " w1 w2 w3" for row in range(8)]
        settings["data"] = tiny.prompts(8, teacher_completion=texts)
        settings |= dict(prefix_schedule="constant", prefix_length=4)
    settings |= dict(bf16=kind == "bf16", learning_rate=1e-3, max_steps=6, objective="opd")
    if kind == "bf16":  # whose roundings soon write other completions
        settings["max_steps"] = 1
    if kind == "tied":
        settings |= dict(evaluate=tiny.prompts(4), eval_strategy="steps", eval_steps=2)
    model = tiny.model(0, tie_word_embeddings=kind == "tied")
    if kind == "named":  # ZeRO-3 partitions what it loads
        model, settings["teacher"] = f"{folder}/../student", f"{folder}/../teacher"
    torch.manual_seed(0)  # the adapter's start
    return make(folder, student=model, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_students(tmp_path, engine):
    """The same losses and weights as under DDP, where nothing is sharded."""
    # For its own bf16 DeepSpeed wants a GPU.
    tiny.model(0).save_pretrained(tmp_path / "student")
    tiny.model(1, hidden_size=48).save_pretrained(tmp_path / "teacher")
    kinds = ["tied", "lora", "named", "guided", *(["bf16"] if engine == "fsdp2" else [])]
    folders = [tmp_path / name for name in ("ddp", "sharded")]
    for folder in folders:
        folder.mkdir()
    plain = on_two_processes(_STUDENTS, folders[0], "ddp", *kinds)
    sharded = on_two_processes(_STUDENTS, folders[1], engine, *kinds)
    # One process waits for the other, which still writes, or has nothing to write.
    for kind in ("lora", "guided"):
        assert plain[0][kind]["lengths"] != plain[1][kind]["lengths"]
    for theirs, ours in zip(plain, sharded):
        for kind in kinds:
            one, other = ours[kind], theirs[kind]
            assert one["held"] == (engine == "zero3")  # which keeps the object, and empties it
            assert one["stored"] == {torch.float32}  # the master weights, and their gradients
            if kind == "guided":
                # Of completions that are done, here is still drawn, and thrown away.
                assert sorted(one["lengths"])[0] == 3
                continue
            if kind == "bf16":
                # Rounded elsewhere: by FSDP2 before, not by autocast in, each product.
                assert one["computed"] == {torch.bfloat16}
                torch.testing.assert_close(one["losses"][0], other["losses"][0], rtol=1e-2, atol=0)
                assert not torch.equal(one["logged"].bfloat16().float(), one["logged"])
                start = [p.detach() for p in tiny.model(0).parameters()]
                for mine, their, old in zip(one["parameters"], other["parameters"], start):
                    assert (mine - their).norm() <= 0.1 * (their - old).norm() + 1e-7
                continue
            close = dict(rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one["losses"], other["losses"], **close)
            for mine, their in zip(one["parameters"], other["parameters"], strict=True):
                torch.testing.assert_close(mine, their, **close)


_DIVERGED = """
import sys, torch
from engines import use
settings = use(sys.argv[2])
from training import make
from tropd_kernels.trainer import generation
steps = int(sys.argv[3])
trainer = make(sys.argv[1], per_device_train_batch_size=1, max_steps=steps, **settings)
rank, looks, look = trainer.accelerator.process_index, [], generation.weights_are_finite
def spoilt(model):
    parts = [getattr(p, "ds_tensor", p).data for p in model.parameters()]
    if len(looks) == 1 and rank == 1:
        getattr(parts[-1], "_local_tensor", parts[-1]).view(-1)[-1] = float("nan")
    looks.append(look(model))
    return looks[-1]
generation.weights_are_finite = spoilt
try:
    trainer.train()
except FloatingPointError as error:
    torch.save((str(error), looks), f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("engine", SHARDED)
def test_a_spoilt_shard_stops_every_process(tmp_path, engine, steps):
    """Before the next step generates, and after the last one."""
    found = on_two_processes(_DIVERGED, tmp_path, engine, str(steps))
    for rank, (message, looks) in enumerate(found):
        assert message.startswith("the student's weights hold NaN or infinity at step 1")
        assert looks == [True, rank == 0]


@pytest.mark.parametrize(("rank", "finite"), [(0, False), (1, True)])
def test_padding_of_a_partition_is_no_weight(monkeypatch, rank, finite):
    """ZeRO-3 leaves in it what the memory held."""
    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.ds_tensor = torch.tensor([1.0, float("nan")])
    model.weight.ds_numel, model.weight.ds_process_group = 3, None
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    assert weights_are_finite(model) == finite


_REFUSED = """
import sys, torch
from engines import use
settings = use(sys.argv[2])
from training import make
try:
    make(sys.argv[1], generation_kwargs=dict.fromkeys(sys.argv[3:], 2), **settings)
except (NotImplementedError, ValueError) as error:
    torch.save(str(error), f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
"""


@pytest.mark.slow
def test_the_first_fsdp_is_refused(tmp_path):
    for message in on_two_processes(_REFUSED, tmp_path, "fsdp1"):
        assert message.startswith("FSDP: ") and "set fsdp_version to 2" in message


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_a_prompt_in_chunks_is_refused(tmp_path, engine):
    """A process with a longer prompt would wait for the others in its last chunk."""
    for message in on_two_processes(_REFUSED, tmp_path, engine, "prefill_chunk_size"):
        assert message.startswith("generation_kwargs: 'prefill_chunk_size': under FSDP and ZeRO-3")


class Once(Spy):
    """A student that calls the tool for one row, and writes what it likes once it was answered, as
    in the others."""

    def _sample_completions(self, prompt_ids, *rest):
        written = super()._sample_completions(prompt_ids, *rest)
        for place, prompt in enumerate(map(self._tokenizer.decode, prompt_ids)):
            if "Double 0." in prompt and "<tool_response>" not in prompt:
                written[place] = self._tokenizer(CALL)["input_ids"]
        return written


TOOLS = dict(kind=Once, max_completion_length=160)

_TOOLS = """
import sys, torch
from engines import use, whole_parameters
settings = use(sys.argv[2])
import test_trainer_tools
from test_trainer_sharded import TOOLS
trainer = test_trainer_tools.make(
    sys.argv[1], per_device_train_batch_size=1, **settings, **TOOLS
)
trainer.train()
rank = trainer.accelerator.process_index
parameters = whole_parameters(trainer.model)
torch.save((trainer.batches, parameters, trainer.losses), f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_a_tool_that_one_process_calls(tmp_path, engine):
    """The others take part in the turn after its answer, in which all gather the weights."""
    saved = on_two_processes(_TOOLS, tmp_path, engine)
    said = [(batches[0]["tool_mask"] == 0).any().item() for batches, *_ in saved]
    assert sorted(said) == [False, True]
    trainer = make_tools(tmp_path, **TOOLS | SPLIT)
    trainer.seen = [(batch, True) for batches, *_ in saved for batch in batches]
    twin = tool_model(0).double()
    loss = by_hand(trainer, twin, tool_model(1).double())
    is_the_large_batch(saved, tool_model(0), twin, loss.item())
