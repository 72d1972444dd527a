"""README, docs/ and examples: each block of code runs, each link leads somewhere, each page is on
the site.

The Python blocks of a page are one script. A block that ends with a comment `# SomeError: words`
has to raise that error with these words. YAML blocks are settings of `tropd train`.
docs/migrating.md, whose blocks come in pairs, has test_migrating.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.md"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *EXAMPLES])
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "csrc/README.md", "benchmarks/learning/README.md")
#: Its blocks have a test of their own.
PAIRED = ROOT / "docs" / "migrating.md"
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (?:\$ )?(.+)$", re.MULTILINE)
RAISES = re.compile(r"^# (\w+Error): (.+)\Z", re.MULTILINE)
LINK = re.compile(r"!?\[(?:[^\]]|\](?!\())*\]\(([^)\s]+)\)")
#: A served teacher's address in the pages.
SERVER = "http://teacher:8000"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *kinds: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text("utf-8")) if kind in kinds]


def with_code(*kinds: str) -> list[Path]:
    return [page for page in PAGES if page != PAIRED and blocks(page, *kinds)]


def test_no_block_is_of_a_kind_that_nothing_runs():
    kinds = {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text("utf-8"))}
    assert kinds <= {"python", "yaml", "bibtex"}
    for page in PAGES:
        text = page.read_text("utf-8")
        assert text.count("\n```") == 2 * len(BLOCK.findall(text)), name_of(page)


# --- Python ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages run: with the models and prompts that they name."""
    pytest.importorskip("trl")
    import tiny

    here = tmp_path_factory.mktemp("pages")
    for seed, name in enumerate(("student", "teacher")):
        tiny.model(seed).save_pretrained(here / "path/to" / name)
        tiny.tokenizer().save_pretrained(here / "path/to" / name)
    lines = [json.dumps({"prompt": text}) for text in tiny.prompts()["prompt"]]
    (here / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return here


class Model(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.lm_head = nn.Linear(width, 300, bias=False)


def names(page: Path) -> dict[str, object]:
    """What README takes for granted; other pages make all that they use."""
    if page != ROOT / "README.md":
        return {}
    given = SimpleNamespace(
        student=Model(16), teacher=Model(24), step=1, teacher_hidden=torch.randn(2, 5, 24),
        hidden=torch.randn(2, 5, 16, requires_grad=True), labels=torch.randint(300, (2, 5)),
    )  # fmt: skip
    return vars(given)


@contextlib.contextmanager
def served(code: str) -> Iterator[str]:
    """The code with the address of a server that is there, if it asks one."""
    if SERVER not in code:
        yield code
        return
    import served
    import served_states
    import tiny

    kind = served_states if "vllm_hidden_states" in code else served
    with kind.serve(tiny.model(1), tiny.tokenizer()) as server:
        yield code.replace(SERVER, server.url)


@pytest.mark.parametrize("page", with_code("python"), ids=name_of)
def test_the_page_runs(page: Path, folder: Path, tmp_path: Path, monkeypatch):
    for source in folder.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = names(page)
    for code in blocks(page, "python"):
        run(code, scope, page)


def run(code: str, scope: dict[str, object], page: Path) -> None:
    expected = RAISES.search(code.rstrip())
    with served(code) as asks:
        program = compile(asks, f"{name_of(page)}: {code.strip().splitlines()[0]}", "exec")
        if expected is None:
            exec(program, scope)
            return
        with pytest.raises(Exception, match=re.escape(expected[2])) as raised:
            exec(program, scope)
    assert type(raised.value).__name__ == expected[1]


def test_the_loop_passes_all_that_scales_its_heads(folder: Path, monkeypatch):
    """In each call, or a reader's capped model trains another distribution than it samples from."""
    import tropd_kernels
    from tropd_kernels import functional, modules

    taken = {"bias", "logit_scale", "softcap"}
    missing = []

    def watched(function):
        @wraps(function)
        def call(*given, **named):
            teachers = [x for x in given if isinstance(x, tropd_kernels.HiddenTeacher)]
            missing.append(taken - named.keys())
            missing.extend({"cap of the teacher"} for x in teachers if x.softcap != 9.0)
            return function(*given, **named)

        return call

    for name in ("linear_distillation_loss", "linear_log_probs"):
        of_function = watched(getattr(functional, name))
        monkeypatch.setattr(tropd_kernels, name, of_function, raising=False)
        if hasattr(modules, name):
            monkeypatch.setattr(modules, name, of_function)
    head_of = tropd_kernels.heads.read_head
    monkeypatch.setattr(
        tropd_kernels.heads, "read_head", lambda model: replace(head_of(model), softcap=9.0)
    )
    monkeypatch.chdir(folder)
    page = ROOT / "docs" / "guides" / "loop.md"
    scope: dict[str, object] = {}
    for code in blocks(page, "python"):
        run(code, scope, page)
    assert missing and not any(missing)


def test_the_loop_samples_from_the_student_s_own_distribution(folder: Path, monkeypatch):
    """... whatever its checkpoint recommends for chatting, which `generate` would take from it."""
    monkeypatch.chdir(folder)
    page = ROOT / "docs" / "guides" / "loop.md"
    loading, writing = blocks(page, "python")[:2]
    writing = writing[: writing.index("def hidden_states")]
    written = []
    chatting = dict(temperature=0.2, top_k=2, top_p=0.1, min_p=0.9, repetition_penalty=5.0)
    for settings in ({}, chatting):
        scope: dict[str, Any] = {}
        run(loading, scope, page)
        scope["student"].generation_config.update(do_sample=True, **settings)
        run(writing, scope, page)
        torch.manual_seed(0)
        run("ids = write(['w1 w2', 'w3'])[0]", scope, page)
        written.append(scope["ids"])
    assert torch.equal(*written)


def test_a_block_that_does_not_raise_what_it_says_fails():
    with pytest.raises(pytest.fail.Exception):
        run("x = 1\n# ValueError: words", {}, PAGES[0])
    with pytest.raises(AssertionError):
        run("raise TypeError('words')\n# ValueError: words", {}, PAGES[0])


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", with_code("yaml"), ids=name_of)
def test_the_settings_are_those_of_a_run(page: Path, folder: Path, tmp_path: Path, monkeypatch):
    from tropd_kernels import cli

    monkeypatch.chdir(folder)
    file = tmp_path / "run.yaml"
    for settings in blocks(page, "yaml"):
        file.write_text(settings, "utf-8")
        flags = ["--config", str(file), "--use_cpu", "true", "--bf16", "false"]
        for key in ("model", "teacher_model", "dataset", "output_dir"):
            if not re.search(rf"^{key}:", settings, re.MULTILINE):
                flags += [f"--{key}", {"dataset": "prompts.jsonl"}.get(key, f"path/to/{key}")]
        run_of, config = cli.parse_run(flags)
        assert run_of.model and config.rules()


def test_the_first_run_asks_for_no_flag(folder: Path, monkeypatch):
    """As it stands, on any machine: transformers refuses bf16 where there is no GPU."""
    from tropd_kernels import cli

    (settings,) = blocks(ROOT / "docs" / "index.md", "yaml")
    monkeypatch.chdir(folder)
    (folder / "first.yaml").write_text(settings, "utf-8")
    assert cli.parse_run(["--config", "first.yaml"])[1].rules()


# --- commands ----------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """Those in indented blocks, without what follows a #."""
    found = []
    for line in INDENTED.findall(BLOCK.sub("", page.read_text("utf-8"))):
        with contextlib.suppress(ValueError):  # a quote in a sentence: no command
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word in ("make", "tropd", "-m")]
            found += [words[i:] for i in starts[:1] if i == 0 or words[i] == "-m"]
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_exist(page: Path):
    from tropd_kernels import cli

    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for first, *rest in commands(page):
        if first == "make":
            assert rest[0] in targets, rest
        elif first == "tropd":
            assert rest[0] in cli.__doc__ and re.search(rf"tropd {rest[0]}\b", cli.__doc__), rest
        elif rest and re.match(r"(benchmarks|examples|tropd_kernels)\b", rest[0]):
            assert find_spec(rest[0]), rest


def test_commands_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "    make demo  # makes\n    OMP=1 python -m a.b --c\n\n```python\n    make x\n```\n"
    )
    assert commands(page) == [["make", "demo"], ["-m", "a.b", "--c"]]


# --- links, and the site -----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as the site and others make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"\s+", "-", title) for title in words}


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / name for name in OTHERS)], ids=name_of)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link) or link.startswith("../../actions/"):  # the forge's own pages
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_every_page_is_on_the_site():
    """The navigation names it once."""
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))

    def leaves(part) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        else:
            for inner in part.values() if isinstance(part, dict) else part:
                yield from leaves(inner)

    docs = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    others = [*OTHERS, *map(name_of, EXAMPLES)]
    assert sorted(leaves(config["nav"])) == sorted([*docs, *others])
