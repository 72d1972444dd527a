"""`tropd train`, `env` and `check`: flags, the file of a run, and which key an error names."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from served import serve

from tropd_kernels import check, cli, once, trainer
from tropd_kernels.trainer import TrOPDConfig
from tropd_kernels.trainer.lora_key import lora_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_core_and_cli_import_without_trl():
    """The library, and the two commands that need only torch, must not pull in the trainer."""
    code = (
        "import sys; sys.modules['trl'] = None; import tropd_kernels, tropd_kernels.cli\n"
        "assert 'transformers' not in sys.modules\n"
        "try:\n import tropd_kernels.trainer\n"
        "except ImportError as e: print(e)\n"
        "assert tropd_kernels.cli.main(['train']) == 2\n"
        "assert tropd_kernels.cli.main(['env']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'tropd-kernels[trainer]'" in done.stdout
    assert "pip install 'tropd-kernels[trainer]'" in done.stderr


def test_help_explains_every_key(capsys, monkeypatch):
    """Those of TRL had their help, this package's only their names."""
    monkeypatch.setenv("COLUMNS", "10000")  # no line is broken at a hyphen
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for owner in (cli.Run, TrOPDConfig):
        for key in owner.__annotations__:
            text = owner.__dataclass_fields__[key].metadata["help"].replace("%%", "%")
            assert f"{text} (default:" in printed, key


def test_help_lists_our_keys_first(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    keys = ["--model ", "--objective ", "--importance_gamma ", "--temperature ", "--weight_decay "]
    places = [printed.index(f"\n  {key}") for key in keys]
    assert places == sorted(places)


@pytest.mark.parametrize("missing", ["model", "teacher_model"])
@pytest.mark.parametrize("name", ["models/absent", "/models/absent", "a/b/c"])
def test_a_missing_model_is_named_before_anything_is_loaded(missing, name, tmp_path, monkeypatch):
    """What transformers says of it does not tell which of the two models it is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(trainer.loaded_teacher, "create_model_from_path", None)
    monkeypatch.setattr("trl.trainer.distillation_trainer.create_model_from_path", None)
    args = TrOPDConfig(str(tmp_path / "out"), use_cpu=True, bf16=False)
    (tmp_path / "config.json").write_text("{}")
    models = {"model": str(tmp_path), "teacher_model": str(tmp_path)} | {missing: name}
    with pytest.raises(OSError, match=f"^{missing}: there is no folder {name}"):
        trainer.TrOPDTrainer(**models, args=args)
    monkeypatch.setattr(cli, "load_data", None)
    run = cli.Run(**models, dataset="data.jsonl")
    with pytest.raises(cli.UsageError, match=f"^{missing}: there is no folder {name}"):
        cli.make_trainer(run, args)


def test_env_and_check(capsys, monkeypatch):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "backend torch" in printed and "trl" in printed
    assert cli.main(["check", "--device", "cpu"]) == 0
    assert "worst gradient error" in capsys.readouterr().out
    monkeypatch.setattr(check, "TOLERANCE", 1e-12)
    assert cli.main(["check", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.fixture
def run_file(tmp_path):
    """A run in a file: two saved models, their tokenizer, prompts."""
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.model(seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    tiny.prompts().to_json(tmp_path / "prompts.jsonl")
    lines = dict(
        model=tmp_path / "student", teacher_model=tmp_path / "teacher",
        dataset=tmp_path / "prompts.jsonl", output_dir=tmp_path / "out", use_cpu="true",
        bf16="false", report_to="none", max_steps=3, per_device_train_batch_size=4,
        max_completion_length=6, learning_rate="5e-3", save_strategy='"no"', logging_steps=1,
        objective_kwargs="{top_k: 8}",
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


@pytest.mark.parametrize("peft", [None, "true", '{"r": 2}'])
def test_train_from_a_file(run_file, peft):
    flags = ["--max_steps", "2"]
    if peft is not None:
        pytest.importorskip("peft")
        flags += ["--peft", peft]
    assert cli.main(["train", "--config", str(run_file), *flags]) == 0
    out = run_file.parent / "out"
    saved = "model.safetensors" if peft is None else "adapter_model.safetensors"
    assert (out / saved).exists() and (out / "tokenizer.json").exists()
    if peft == '{"r": 2}':
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    card = (out / "README.md").read_text()
    assert "of `student`, trained to match `teacher` on `prompts.jsonl`." in card
    assert str(run_file.parent) not in card and "Objective: TrOPD" in card


def test_no_warning_of_what_nobody_set(run_file):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cli.main(["train", "--config", str(run_file), "--max_steps", "1"]) == 0
    assert [one for one in caught if "deprecated" in str(one.message)] == []


def test_train_with_a_served_teacher(run_file, capsys):
    lines = run_file.read_text().splitlines()
    run_file.write_text("\n".join(line for line in lines if "teacher_model" not in line))
    assert cli.main(["train", "--config", str(run_file)]) == 2
    assert "missing: teacher_model" in capsys.readouterr().err
    with serve(tiny.model(1), tiny.tokenizer()) as served:
        arguments = ["train", "--config", str(run_file), "--teacher_model_server_url", served.url]
        assert cli.main(arguments) == 0
    assert sum("prompt_logprobs" in request for request in served.requests) == 1 + 12
    assert (run_file.parent / "out" / "model.safetensors").exists()


def test_flags_win_and_numbers_are_numbers(run_file):
    run, settings = cli.parse_run(["--config", str(run_file), "--objective", "opd", "--max-steps",
                                   "2", "--objective_kwargs", "{}"])  # fmt: skip
    assert run.model.endswith("student")
    assert (settings.objective, settings.max_steps, settings.learning_rate) == ("opd", 2, 5e-3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("objektive: opd", "unknown key 'objektive' (did you mean 'objective'?)"),
        ("teacher: x", "unknown key 'teacher'"),
        ("model_name_or_path: x", "unknown key 'model_name_or_path' (give model)"),
        ("use_peft: true", "unknown key 'use_peft' (give peft)"),
        ("lora_r: 8", "unknown key 'lora_r' (give the mapping peft)"),
        ("objective: opdd", "objective: unknown 'opdd' (did you mean 'opd'?)"),
        ("dataset: nowhere.jsonl", "dataset: there is no file nowhere.jsonl"),
        (
            "eval_dataset: nowhere.jsonl\neval_strategy: epoch",
            "eval_dataset: there is no file nowhere.jsonl",
        ),
        ("dataset: ./nowhere", "dataset: there is no file ./nowhere"),
        ("dataset: a/b/c.csv", "dataset: there is no file a/b/c.csv"),
        (
            "max_steps: 3\nseed: 1\nmax_steps: 4",
            "run.yaml: 'max_steps' is given twice, in lines 14 and 16: leave one",
        ),
        (
            "objective_kwargs:\n  top_k: 4\n  gate: expected\n  top_k: 8",
            "run.yaml: 'top_k' is given twice, in lines 15 and 17: leave one",
        ),
        (
            'objective_kwargs: \'{"top_k": 4, "top_k": 8}\'',
            "objective_kwargs: 'top_k' is given twice: leave one of them out",
        ),
        ('peft: \'{"r": 4, "r": 8}\'', "peft: 'r' is given twice: leave one of them out"),
        ("eval_dataset: prompts.jsonl", "eval_dataset: nothing would evaluate on it: set eval_str"),
        (
            "eval_dataset: a.json\neval_strategy: epoch\neval_split: b",
            "eval_split: a.json is a file, which has no splits",
        ),
        ("dataset_split: test", "prompts.jsonl: a file has no splits"),
        (
            "eval_dataset: b\neval_strategy: epoch\neval_split: c\ndataset_split: test",
            "dataset_split: ",
        ),
        ("do_eval: true", "do_eval: it has no effect here: eval_strategy says when"),
        ("do_predict: true", "do_predict: it has no effect here"),
        ("peft: {rank: 4}", "peft: "),
        ("model: null", "missing: model"),
        ("model: [a]", "model: expected a name or a path, got ['a']"),
        ("model: /nowhere", "model: there is no folder /nowhere"),
        ("model: .", "model: there is no model in the folder .: it has no config.json"),
        ("per_device_train_batch_size: 80", "dataset: 8 rows are fewer than one"),
        ("learning_rate: nan", "learning_rate: must be in"),
        ("objective_kwargs: '{top_k: 8}'", "objective_kwargs: '{top_k: 8}' is no JSON"),
        ("peft: {target_modules: 3}", "peft: target_modules must be "),
        ("peft: {layer_replication: [[0, 2], [1]]}", "peft: layer_replication must be "),
        ("peft: {runtime_config: {}}", "peft: runtime_config must be LoraRuntimeConfig, got {}"),
        ("peft: {use_dora: 'no'}", "peft: use_dora must be bool, got 'no'"),
        ("peft: {r: x}", "peft: r must be a whole number of at least 1, got 'x'"),
        ("peft: {r: 4.5}", "peft: r must be a whole number of at least 1, got 4.5"),
        ("peft: {r: 0}", "peft: r must be a whole number of at least 1, got 0"),
        ("peft: {lora_alpha: null}", "peft: lora_alpha must be a number, got None"),
        ("peft: {peft_type: IA3}", "peft: peft_type: expected LORA, got 'IA3'"),
        ("max_steps: [3]", "max_steps: expected a whole number, got [3]"),
        ("teacher_model_name_or_path: a/b", "teacher_model_name_or_path: 'a/b', and teacher_model"),
        ("eval_split: test", "eval_split: there is no eval_dataset: give one"),
        ("resume_from_checkpoint: nowhere", "there is no checkpoint nowhere"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint: there is no checkpoint in "),
        ("output_dir: run.yaml", "train: output_dir: run.yaml is a file: expected a folder"),
        ("output_dir: /proc/nowhere", "train: output_dir: [Errno"),
        (
            "peft: {task_type: SEQ_CLS}",
            "peft_config: task_type SEQ_CLS is of another kind",
        ),
        (
            "task_weight: 1.0\nnum_generations: 2\nreward_funcs: [3]",
            "reward_funcs: expected a function of trl.rewards, a dotted path",
        ),
        ("- a list", "expected lines of 'key: value'"),
        ("a: [", "run.yaml: while parsing"),
    ],
)
def test_bad_file(run_file, capsys, monkeypatch, line, message):
    monkeypatch.chdir(run_file.parent)
    key = line.split(":")[0]
    rest = [old for old in run_file.read_text().splitlines() if not old.startswith(key + ":")]
    run_file.write_text(line if line[0] in "-a" else "\n".join([*rest, line]))
    assert cli.main(["train", "--config", str(run_file)]) == 2
    assert message in capsys.readouterr().err


def test_values_of_types_that_no_file_has():
    """PEFT makes the configs inside its own of mappings, and takes lists for tuples."""
    peft = pytest.importorskip("peft")
    layers = [[0, 2], [1, 2]]
    config = lora_config({"layer_replication": layers, "rank_pattern": {"q_proj": 4}})
    assert config.layer_replication == layers
    if not hasattr(peft.LoraConfig, "kasa_config"):
        pytest.skip("this peft has no kasa_config")
    config = lora_config({"kasa_config": {"beta": 0, "gamma": 0}})
    assert (config.kasa_config.beta, config.kasa_config.gamma) == (0, 0)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.jsonl.gz"])
def test_a_file_of_another_kind(run_file, capsys, monkeypatch, name):
    """It was looked for on the hub, for half a minute where that cannot be reached."""
    monkeypatch.setattr("datasets.load_dataset", None)
    monkeypatch.setattr(trainer, "TrOPDTrainer", None)  # nothing is loaded
    path = run_file.parent / name
    path.write_text("w1 w2")
    run_file.write_text(
        run_file.read_text().replace(str(run_file.parent / "prompts.jsonl"), str(path))
    )
    assert cli.main(["train", "--config", str(run_file)]) == 2
    error = capsys.readouterr().err
    assert f"dataset: {path} is a file of another kind: expected the suffix .json, .jsonl" in error


def test_suffixes_in_capitals(tmp_path):
    tiny.prompts().to_json(tmp_path / "prompts.JSONL")
    assert len(cli.load_data("dataset", str(tmp_path / "prompts.JSONL"), "train")) == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "1", "--seed=2"], "seed: --seed and --seed: a key is given once"),
        (["--max-steps", "1", "--max_steps", "2"], "max_steps: --max-steps and --max_steps: a"),
        (["--config", "a.yaml"], "config: --config and --config: a key is given once"),
    ],
)
def test_a_flag_given_twice(run_file, capsys, flags, words):
    """The first was ignored; of two files every key of the first."""
    assert cli.main(["train", "--config", str(run_file), *flags]) == 2
    assert words in capsys.readouterr().err


def test_yaml_s_own_repetitions():
    """Merged mappings may be overridden, aliases repeated, one key stand in two mappings."""
    text = "a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: [*a, *a]\nd: {<<: *a, <<: *a}\n1: 2\n'1': 3\n"
    read = once.parse_yaml(text)
    assert read["b"] == {"x": 2} and read["c"] == [{"x": 1}] * 2 and read[1] == 2 and read["1"] == 3
    with pytest.raises(ValueError, match="'x' is given twice, in lines 2 and 3"):
        once.parse_yaml("a:\n- x: 1\n  x: 2\n")


def test_what_the_trainer_refuses(run_file, capsys):
    """... is no traceback, and speaks of the command line's keys."""
    tiny.tokenizer(("w1", "w0", *tiny.WORDS[2:])).save_pretrained(run_file.parent / "teacher")
    assert cli.main(["train", "--config", str(run_file)]) == 2
    assert "tropd train: teacher_model: its tokenizer is not" in capsys.readouterr().err
    tiny.prompts().rename_column("prompt", "text").to_json(run_file.parent / "prompts.jsonl")
    assert cli.main(["train", "--config", str(run_file)]) == 2
    assert "tropd train: dataset: no column 'prompt'; it has 'text'" in capsys.readouterr().err
    tiny.prompts().to_json(run_file.parent / "prompts.jsonl")
    (run_file.parent / "student" / "model.safetensors").unlink()
    assert cli.main(["train", "--config", str(run_file)]) == 2
    assert f"tropd train: model {run_file.parent / 'student'}, teacher" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ImportError, RuntimeError])
def test_what_is_not_installed(run_file, capsys, monkeypatch, kind):
    """vLLM and the loggers: TRL's and transformers' own words are clear."""

    def refuse(*_, **__):
        raise kind("vLLM is not available: pip install trl[vllm]")

    monkeypatch.setattr("tropd_kernels.trainer.TrOPDTrainer", refuse)
    assert cli.main(["train", "--config", str(run_file)]) == 2
    assert "tropd train: vLLM is not available: pip" in capsys.readouterr().err


def test_no_checkpoints_by_a_bare_no(run_file):
    run_file.write_text(run_file.read_text().replace('save_strategy: "no"', "save_strategy: no"))
    assert cli.main(["train", "--config", str(run_file), "--max_steps", "1"]) == 0
    assert not list((run_file.parent / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("line", "splits"),
    [("", ["part", "part"]), ("eval_split: test", ["part", "test"])],
)
def test_splits(run_file, monkeypatch, line, splits):
    read = []
    monkeypatch.setattr(cli, "load_data", lambda *given: read.append(given) or tiny.prompts())
    lines = run_file.read_text() + "eval_dataset: b\neval_strategy: epoch\ndataset_split: part\n"
    run_file.write_text(f"{lines}{line}\n")
    cli.make_trainer(*cli.parse_run(["--config", str(run_file), "--dataset", "a"]))
    assert read == [("dataset", "a", splits[0]), ("eval_dataset", "b", splits[1])]


def test_errors_of_training_keep_their_traceback(run_file):
    """What is wrong once a run has begun may be a defect."""
    (run_file.parent / "prompts.jsonl").write_text('{"prompt": ""}\n' * 8)
    with pytest.raises(ValueError, match="prompt: no token in ''"):
        cli.main(["train", "--config", str(run_file)])


@pytest.mark.parametrize("flag", ["--do_eval", "--do-eval=true", "--do_train=false"])
def test_flags_of_scripts(run_file, capsys, flag):
    assert cli.main(["train", "--config", str(run_file), flag]) == 2
    key = flag[2:].split("=")[0].replace("-", "_")
    assert f"tropd train: {key}: it has no effect here" in capsys.readouterr().err


def test_keys_of_scripts_that_say_what_is_done(run_file):
    run_file.write_text(f"{run_file.read_text()}do_predict: false\ndo_train: true\n")
    flags = ["--config", str(run_file), "--do_eval", "false"]
    assert not cli.parse_run(flags)[1].do_eval
    # As transformers saves them in a config that evaluates.
    data = run_file.parent / "prompts.jsonl"
    run_file.write_text(
        run_file.read_text().replace("do_train: true", "do_train: false")
        + f"do_eval: true\neval_strategy: epoch\neval_dataset: {data}\n"
    )
    assert cli.parse_run(["--config", str(run_file)])[1].do_eval


def test_an_evaluation_at_the_start_alone(run_file):
    keys = ["--eval_dataset", str(run_file.parent / "prompts.jsonl"), "--eval_on_start"]
    assert cli.parse_run(["--config", str(run_file), *keys])[1].eval_on_start


@pytest.mark.parametrize("word", ["none", "NULL"])
def test_none_in_keys_of_text(run_file, word):
    """As in those of numbers; a column of that name would be looked for in vain."""
    keys = ("prefix_column", "backend", "prefix_weight", "eval_split", "peft", "run_name")
    flags = [part for key in keys for part in (f"--{key}", word)] + ["--hub_model_id", "do_eval"]
    run, settings = cli.parse_run(["--config", str(run_file), *flags, "--report_to", "none"])
    assert [getattr(settings, key, None) for key in keys] == [None] * len(keys)
    assert (run.eval_split, run.peft, settings.report_to) == (None, None, [])
    run_file.write_text(f"{run_file.read_text()}prefix_column: {word}\n")
    assert cli.parse_run(["--config", str(run_file)])[1].prefix_column is None


@pytest.mark.parametrize("value", ["false", "None", ""])
def test_resume_from_nothing(run_file, value):
    arguments = ["train", "--config", str(run_file), "--resume_from_checkpoint", value]
    assert cli.main([*arguments, "--max_steps", "1"]) == 0


def test_resume_from_the_last(run_file, capsys):
    arguments = ["train", "--config", str(run_file), "--save_strategy", "epoch"]
    assert cli.main([*arguments, "--max_steps", "2"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "--resume_from_checkpoint", "true"]) == 0
    assert capsys.readouterr().out.count("'loss'") == 1


def test_the_output_folder_is_no_checkpoint(run_file, capsys):
    """A finished run's has a model and a log, but nothing of the optimiser."""
    arguments = ["train", "--config", str(run_file), "--max_steps", "1"]
    out = str(run_file.parent / "out")
    assert cli.main(arguments) == 0
    assert (run_file.parent / "out" / "trainer_state.json").is_file()
    assert cli.main([*arguments, "--resume_from_checkpoint", out]) == 2
    error = capsys.readouterr().err
    assert f"there is no checkpoint {out}; expected a folder, true for the last" in error


def test_what_is_missing_comes_first(capsys, run_file):
    """On a machine without a GPU the config complains of bf16, which its default is."""
    assert cli.main(["train"]) == 2
    assert "missing: model, dataset; give them" in capsys.readouterr().err
    assert cli.main(["train", str(run_file)]) == 2
    assert f"a file of keys is given by --config {run_file}" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpuu", "meta", "cuda:99"])
def test_check_without_the_device(capsys, device):
    assert cli.main(["check", "--device", device]) == 2
    assert f"tropd check: --device {device}: it cannot be used here" in capsys.readouterr().err


def test_number_in_a_file_of_the_wrong_type(run_file, capsys):
    run_file.write_text(run_file.read_text().replace("max_steps: 3", "max_steps: 2.5"))
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(run_file)])
    assert "--max_steps" in capsys.readouterr().err


def test_broken_data_file(run_file, capsys):
    (run_file.parent / "prompts.jsonl").write_text('{"prompt": "w1"\n')
    assert cli.main(["train", "--config", str(run_file)]) == 2
    error = capsys.readouterr().err
    assert "tropd train: dataset: " in error and "cannot be read: " in error


def test_bad_flags(capsys, run_file):
    assert cli.main(["train", "--config", str(run_file), "--objectve", "opd"]) == 2
    assert "unknown key 'objectve' (did you mean 'objective'?)" in capsys.readouterr().err
    assert cli.main(["train", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(run_file), "--max_steps", "many"])
    assert "max_steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["env", "--verbose"])
