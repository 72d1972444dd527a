"""Models by name: weights, config and tokenizer are looked for in one place."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import served_states
import tiny
from training import make

from tropd_kernels.trainer import TeacherServerError, TrOPDConfig, TrOPDTrainer
from tropd_kernels.trainer.loaded_teacher import load_teacher

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
REFUSED = "teacher_model: its tokenizer is not the student's"
#: Revisions "ours" and "other" of a model on the hub: their hidden sizes, and tokenizers.
SIZES = {"ours": 16, "other": 48}


def other_tokenizer():
    return tiny.tokenizer(("w1", "w0", *tiny.WORDS[2:]))


def save(folder, seed=1, tokenizer=None, **changes) -> str:
    tiny.model(seed, **changes).save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache, offline, with the revisions "ours" and "other" of me/model; `main` is
    "ours" until `point` says otherwise."""
    cache = tmp_path / "hub"
    repository = cache / "models--me--model"
    (repository / "refs").mkdir(parents=True)
    for name, tokenizer in (("ours", None), ("other", other_tokenizer())):
        commit = {"ours": "a", "other": "b"}[name] * 40
        save(repository / "snapshots" / commit, hidden_size=SIZES[name], tokenizer=tokenizer)
        (repository / "refs" / name).write_text(commit)
    shutil.copy(repository / "refs" / "ours", repository / "refs" / "main")
    for owner in ("huggingface_hub.constants", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{owner}.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def teacher_size(folder, name="me/model", **settings) -> int:
    return make(folder, teacher=name, **settings).teacher_model.config.hidden_size


def test_the_tokenizer_of_the_teacher_s_revision(tmp_path, hub):
    """Of the default revision, another would pass and the student's own be refused."""
    assert teacher_size(tmp_path) == SIZES["ours"]
    for key, value in (("model_revision", "other"), ("model_init_kwargs", {"revision": "other"})):
        with pytest.raises(ValueError, match=REFUSED):
            teacher_size(tmp_path, **{f"teacher_{key}": value})
    shutil.copy(hub / "refs" / "other", hub / "refs" / "main")
    for key, value in (("model_revision", "ours"), ("model_init_kwargs", {"revision": "ours"})):
        assert teacher_size(tmp_path, **{f"teacher_{key}": value}) == SIZES["ours"]


@pytest.mark.parametrize(
    "place",
    [dict(teacher_model_revision="other"), dict(teacher_model_init_kwargs={"revision": "other"})],
)
def test_the_head_of_a_served_revision(tmp_path, hub, place):
    """The states of one revision go with the head of that revision."""
    served = tiny.model(1, hidden_size=SIZES["other"])
    with served_states.serve(served, tiny.tokenizer(), root="me/model") as running:
        states = dict(teacher_server_protocol="vllm_hidden_states", objective="gkd")
        states["teacher_model_server_url"] = running.url
        trainer = make(tmp_path, teacher="me/model", **states, **place)
        assert trainer._server.head.weight.shape[1] == SIZES["other"]
        with pytest.raises(TeacherServerError, match="of width 16"):
            make(tmp_path, teacher="me/model", **states)


def test_the_tokenizer_of_the_teacher_s_cache(tmp_path, hub):
    cache = str(shutil.move(hub.parent, tmp_path / "elsewhere"))
    options = {"cache_dir": cache, "revision": "ours", "local_files_only": True}
    assert teacher_size(tmp_path, teacher_model_init_kwargs=options) == SIZES["ours"]
    with pytest.raises(ValueError, match=REFUSED):
        teacher_size(tmp_path, teacher_model_init_kwargs=options | {"revision": "other"})


@pytest.mark.parametrize("root", ["nothing", "another", "ours"])
def test_the_tokenizer_of_the_teacher_s_subfolder(tmp_path, root):
    folder = tmp_path / "teacher"
    if root != "nothing":
        save(folder, tokenizer=other_tokenizer() if root == "another" else None)
    options = dict(teacher_model_init_kwargs={"subfolder": "inner"})
    save(folder / "inner", hidden_size=16, tokenizer=other_tokenizer())
    with pytest.raises(ValueError, match=REFUSED):
        teacher_size(tmp_path, str(folder), **options)
    tiny.tokenizer().save_pretrained(folder / "inner")
    assert teacher_size(tmp_path, str(folder), **options) == 16


def with_code(folder, tokenizer) -> str:
    """A saved model whose tokenizer has code of its own."""
    name = save(folder, tokenizer=tokenizer)
    code = "from transformers import PreTrainedTokenizerFast\n"
    (folder / "own.py").write_text(f"{code}class Own(PreTrainedTokenizerFast):\n    pass\n")
    settings = folder / "tokenizer_config.json"
    given = json.loads(settings.read_text())
    given |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    settings.write_text(json.dumps(given))
    return name


def test_the_tokenizer_of_a_trusted_teacher(tmp_path):
    name = with_code(tmp_path / "teacher", other_tokenizer())
    for trust in ({"trust_remote_code": True},
                  {"teacher_model_init_kwargs": {"trust_remote_code": True}}):  # fmt: skip
        with pytest.raises(ValueError, match=REFUSED):
            make(tmp_path, teacher=name, **trust)


def by_name(folder, student, **settings):
    """A trainer that finds the student's tokenizer itself."""
    args = TrOPDConfig(
        str(folder), bf16=False, use_cpu=True, report_to="none", model_init_kwargs=settings
    )
    return TrOPDTrainer(student, tiny.model(1), args, tiny.prompts())


def test_the_student_s_tokenizer_is_that_of_its_place(tmp_path, hub):
    for revision in SIZES:
        trainer = by_name(tmp_path, "me/model", revision=revision)
        assert trainer.model.config.hidden_size == SIZES[revision]
        assert trainer.processing_class.get_vocab()["w0"] == {"ours": 5, "other": 6}[revision]
    cache = str(shutil.move(hub.parent, tmp_path / "elsewhere"))
    trainer = by_name(tmp_path, "me/model", cache_dir=cache, revision="other")
    assert trainer.processing_class.get_vocab()["w0"] == 6
    assert trainer.args.model_init_kwargs == {"cache_dir": cache, "revision": "other"}
    save(tmp_path / "holder" / "inner", hidden_size=16)
    trainer = by_name(tmp_path, str(tmp_path / "holder"), subfolder="inner")
    assert trainer.model.config.hidden_size == 16
    assert trainer.processing_class.padding_side == "left"
    name = with_code(tmp_path / "coded", other_tokenizer())
    trainer = by_name(tmp_path, name, trust_remote_code=True)
    assert type(trainer.processing_class).__name__ == "Own"


def test_two_revisions_of_the_teacher():
    here = dict(use_cpu=True, bf16=False, report_to="none", teacher_model_revision="v1")
    words = "^teacher_model_revision: 'v1', and teacher_model_init_kwargs has the revision 'v2'"
    with pytest.raises(ValueError, match=words):
        TrOPDConfig("unused", teacher_model_init_kwargs={"revision": "v2"}, **here)
    TrOPDConfig("unused", teacher_model_init_kwargs={"revision": "v1"}, **here)


def test_one_teacher(tmp_path):
    """Of two the second was dropped."""
    name, other = save(tmp_path / "a"), save(tmp_path / "b", seed=2)
    words = f"^teacher_model_name_or_path: '{other}', and teacher_model is "
    with pytest.raises(ValueError, match=f"{words}'{name}': give one of the two"):
        make(tmp_path, teacher=name, teacher_model_name_or_path=other)
    with pytest.raises(ValueError, match=f"{words}a LlamaForCausalLM: give one of the two"):
        make(tmp_path, teacher=tiny.model(1), teacher_model_name_or_path=other)
    make(tmp_path, teacher=name, teacher_model_name_or_path=name)
    loaded = make(tmp_path, teacher=name).teacher_model
    make(tmp_path, teacher=loaded, teacher_model_name_or_path=name)


def test_the_revision_of_a_teacher_that_is_a_model(tmp_path, hub):
    """Its tokenizer is another revision's than the default."""
    teacher = make(tmp_path, teacher="me/model").teacher_model
    make(tmp_path, teacher=teacher)
    with pytest.raises(ValueError, match=REFUSED):
        make(tmp_path, teacher=teacher, teacher_model_revision="other")


def test_models_by_path(tmp_path):
    """As by their folders' names."""
    for name in ("student", "teacher"):
        save(tmp_path / name)
    args = TrOPDConfig(
        str(tmp_path), bf16=False, use_cpu=True, report_to="none",
        teacher_model_name_or_path=tmp_path / "teacher",
    )  # fmt: skip
    trainer = TrOPDTrainer(tmp_path / "student", None, args, tiny.prompts())
    assert trainer.processing_class.get_vocab() == tiny.tokenizer().get_vocab()
    make(tmp_path, teacher=tmp_path / "teacher")


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter of a saved base, as a folder."""
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "base")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(tiny.model(1), settings)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_as_the_teacher(tmp_path, adapter):
    """By its folder: what PEFT itself makes of it."""
    import peft

    whole = peft.PeftModel.from_pretrained(tiny.model(1), str(adapter))
    trainer = make(tmp_path, teacher=adapter)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        found, expected, base = (
            model(ids).logits for model in (trainer.teacher_model, whole, tiny.model(1))
        )
    assert torch.equal(found, expected) and not torch.allclose(found, base, atol=0.1)
    trainer.train()
    assert all(map(math.isfinite, trainer.losses))
    # It has no tokenizer of its own.
    other_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=REFUSED):
        make(tmp_path, teacher=str(adapter))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_5"])
def test_an_adapter_of_a_teacher_that_sees_images(tmp_path, kind):
    """The base's own class is loaded: for causal language models there is none, or one that is
    blind."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("PIL", reason="images need pillow")
    import vision

    base = vision.model(kind, 1)
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=r".*language_model.*(q_proj|v_proj)", r=2,
        init_lora_weights=False,
    )  # fmt: skip
    adapted = peft.get_peft_model(type(base).from_pretrained(tmp_path / "base"), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    args = TrOPDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    teacher = load_teacher(str(tmp_path / "adapter"), args)
    assert type(teacher) is type(base)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        found, expected, bare = (model.eval()(ids).logits for model in (teacher, adapted, base))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, bare, atol=1e-3)


def test_folders_without_a_model(tmp_path, adapter):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="^model: .*adapter is an adapter: load it by PeftModel.fro"):
        make(tmp_path, str(adapter))
    for key in ("model", "teacher_model"):
        models = {"model": tiny.model(0), "teacher_model": tiny.model(1)} | {
            key: tmp_path / "empty"
        }
        with pytest.raises(OSError, match=f"^{key}: there is no model in the folder .*/empty: it"):
            make(tmp_path, *models.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"quantization_config": {"quant_method": "nonsense"}}, "Unknown quantization type"),
     ({"dtypee": "bfloat16"}, "unexpected keyword argument 'dtypee'")],
)  # fmt: skip
def test_errors_of_loading_name_the_teacher(tmp_path, options, words):
    name = save(tmp_path / "teacher")
    with pytest.raises((TypeError, ValueError), match=f"^teacher_model: {name} cannot .*{words}"):
        make(tmp_path, teacher=name, teacher_model_init_kwargs=options)


ENDS = {"eos_token_id": [2, 3, 7]}


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize(
    "given",
    [ENDS, {"generation_config": ENDS}, ENDS | {"generation_config": {"eos_token_id": 5}}],
    ids=["end", "config", "both"],
)
def test_ends_among_the_options_of_models(tmp_path, given, has_file):
    """... with or without a generation_config.json: without one transformers drops the ends, and
    a mapping, all that YAML can write, is no config for it."""
    names = [save(tmp_path / which, seed) for seed, which in enumerate(("student", "teacher"))]
    for name in names:
        file = Path(name, "generation_config.json")
        file.write_text('{"eos_token_id": [2, 3]}') if has_file else file.unlink()
    keys = "model_init_kwargs", "teacher_model_init_kwargs"
    trainer = make(tmp_path / "run", *names, lmbda=0.0, **dict.fromkeys(keys, given))
    assert list(trainer.eos_token_ids) == [2, 3, 7]
    assert trainer.teacher_model.generation_config.eos_token_id == [2, 3, 7]
    trainer.train()


@pytest.mark.parametrize("key", ["model_init_kwargs", "teacher_model_init_kwargs"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("generation_config.json", "expected a mapping, such as .*, got 'generation_config.json'"),
        ({"eos_token_ids": 2}, "it has no 'eos_token_ids' .did you mean 'eos_token_id'.*leave it"),
        ({"cache_implementation": 5}, ".*cache_implementation"),
    ],
)  # fmt: skip
def test_generation_configs_that_are_none(key, given, words):
    with pytest.raises(ValueError, match=f"^{key}: generation_config: {words}"):
        TrOPDConfig("unused", use_cpu=True, bf16=False, **{key: {"generation_config": given}})


def test_a_quantization_that_is_text(tmp_path):
    args = TrOPDConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="^quantization_config: expected a mapping with a 'quant_"):
        TrOPDTrainer(save(tmp_path / "a"), tiny.model(1), args, quantization_config="int8")
