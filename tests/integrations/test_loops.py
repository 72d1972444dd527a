"""The example loops, on tiny models: each trains, and all three train the same student."""

import json
import os
import socket
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft", reason="examples.lora, whose functions the loops share, needs it")

import tiny

from examples.loops import distiller, plain
from tropd_kernels import GKD

STEPS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        tiny.model(seed, spread=2.0).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    rows = [json.dumps({"prompt": text}) for text in tiny.prompts()["prompt"]]
    (folder / "prompts.jsonl").write_text("\n".join(rows), "utf-8")
    return folder


def flags(models, out=None, **more):
    given = dict(student=models / "student", teacher=models / "teacher",
                 prompts=models / "prompts.jsonl", learning_rate=1e-2, tokens=6) | more  # fmt: skip
    given |= {} if out is None else {"out": out}
    return [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def loop(name):
    if name == "plain":
        return plain.main
    pytest.importorskip("accelerate")
    from examples.loops import with_accelerate

    return with_accelerate.main


def lightning(rank, arguments, rule, write, file):
    """Lightning's loop in a process of its own: after it verl's FSDP takes any module for an ABC,
    and fails."""
    from examples.loops import with_lightning

    torch.set_num_threads(1)
    distiller.write = write
    torch.save(with_lightning.main(arguments, rule=rule), file)


def run(name, arguments, tmp_path, rule=None):
    if name != "lightning":
        return loop(name)(arguments, rule=rule)
    if find_spec("pytorch_lightning") is None:
        pytest.skip("needs Lightning: make engines")
    file = tmp_path / "divergences.pt"
    torch.multiprocessing.spawn(lightning, (arguments, rule, distiller.write, file), nprocs=1)
    return torch.load(file)


@pytest.mark.parametrize("name", ["plain", "accelerate", "lightning"])
def test_the_student_comes_nearer_to_the_teacher(models, name, tmp_path, capfd):
    given = flags(models, steps=16, batch_size=8, learning_rate=2e-2)
    divergences = run(name, given, tmp_path)
    assert len(divergences) == 16
    assert sum(divergences[-4:]) < 0.8 * sum(divergences[:4])
    assert "step 15: KL(student || teacher)" in capfd.readouterr().out


def write_fixed(student, tokenizer, prompts, most):
    """A student that writes the same to a prompt whatever the batch, and counts unlike numbers of
    tokens: what differs then is the loop."""
    batch = tokenizer(prompts, return_tensors="pt", padding="max_length", max_length=12)
    names = [sum(map(ord, prompt)) for prompt in prompts]
    ids = torch.tensor([[5 + (name * (i + 3)) % 80 for i in range(most)] for name in names])
    counts = (torch.arange(most) < torch.tensor([[1 + name % most] for name in names])).long()
    ids, mask = torch.cat([batch.input_ids, ids], 1), torch.cat([batch.attention_mask, counts], 1)
    return ids, mask, batch.input_ids.shape[1]


@pytest.fixture
def fixed(monkeypatch):
    monkeypatch.setattr(distiller, "write", write_fixed)


def trained(models, name, out):
    given = flags(models, out, steps=STEPS, batch_size=4)
    divergences = run(name, given, out.parent, rule=GKD())
    return divergences, parameters_of(out)


def parameters_of(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_every_loop_trains_the_same_student(models, name, fixed, tmp_path):
    """accelerate's micro-batches have unlike numbers of tokens, and give the mean over all."""
    divergences, parameters = trained(models, "plain", tmp_path / "plain")
    found = trained(models, name, tmp_path / name)
    assert found[0] == pytest.approx(divergences, rel=1e-4)
    torch.testing.assert_close(found[1], parameters, rtol=1e-3, atol=1e-4)
    assert (parameters - parameters_of(models / "student")).abs().max() > 1e-2


def process(rank, models, out, port):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    distiller.write = write_fixed
    divergences = trained(models, "accelerate", out)[0] if rank == 0 else loop("accelerate")(
        flags(models, steps=STEPS, batch_size=4), rule=GKD()
    )  # fmt: skip
    torch.save(divergences, out.parent / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_accelerate_are_one(models, fixed, tmp_path):
    pytest.importorskip("accelerate")
    divergences, parameters = trained(models, "plain", tmp_path / "plain")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (models, tmp_path / "two", port), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(divergences, rel=1e-4)
    torch.testing.assert_close(parameters_of(tmp_path / "two"), parameters, rtol=1e-3, atol=1e-4)
