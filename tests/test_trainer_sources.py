"""Models by name: weights, config and tokenizer are looked for in one place."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make

from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer

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
