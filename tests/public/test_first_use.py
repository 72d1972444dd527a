"""What a first call, an import and the command line's help bring along and say."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tropd_kernels import native, public

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip


# --- imports -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["env", "--help"], ["check", "--help"], ["chekc"]]
)
def test_help_imports_no_torch(arguments):
    code = (
        "import sys; sys.modules['torch'] = None  # an import raises\n"
        f"from tropd_kernels.cli import main\nmain({arguments!r})"
    )
    done = run(code)
    assert done.returncode == (2 if "chekc" in arguments else 0), done.stderr
    assert "tropd" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_public_names_come_when_they_are_asked_for():
    code = (
        "import sys, tropd_kernels\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(tropd_kernels, '_absent') and 'torch' not in sys.modules\n"
        "assert tropd_kernels.TrOPD() == tropd_kernels.objectives.TrOPD()\n"
        "assert not hasattr(tropd_kernels, 'absent')\n"
        "from tropd_kernels import *\n"
        "assert linear_distillation_loss is tropd_kernels.functional.linear_distillation_loss\n"
        "assert set(tropd_kernels.public.__all__) <= set(dir(tropd_kernels))\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert all(hasattr(public, name) for name in public.__all__)


def test_import_brings_neither_transformers_nor_a_trainer():
    unwanted = {"transformers", "trl", "accelerate", "peft", "datasets", "verl", "liger_kernel"}
    done = run(f"import sys, tropd_kernels.public; print({unwanted!r} & sys.modules.keys())")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_a_compiled_function_may_use_a_name_first():
    code = (
        "import torch, tropd_kernels\n"
        "@torch.compile(fullgraph=True, backend='eager')\n"
        "def loss(h, w, y, t):\n"
        "    teacher = tropd_kernels.LogitsTeacher(t)\n"
        "    rule = tropd_kernels.OPD()\n"
        "    return tropd_kernels.linear_distillation_loss(h, w, y, teacher, rule).loss\n"
        "h, w, t = torch.randn(4, 8), torch.randn(9, 8), torch.randn(4, 9)\n"
        "assert loss(h, w, torch.arange(4), t).isfinite()\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_plan_for_a_gpu_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None  # an import raises\n"
        "from tropd_kernels import plan_chunks\n"
        "assert plan_chunks(64, 301, 16, device='cuda', backend='triton').rows\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_command_is_silent_about_a_numpy_that_is_not_there():
    """torch warns as it is imported."""
    code = (
        "import sys; sys.modules['numpy'] = None  # an import raises\n"
        "from tropd_kernels.cli import main\nsys.exit(main(['env']))"
    )
    done = run(code)
    assert done.returncode == 0 and done.stderr == ""


# --- without native ------------------------------------------------------------------------------

CALL = """
import torch, warnings
from tropd_kernels import LogitsTeacher, OPD, distillation_loss, linear_distillation_loss, native
native.WHY_NOT = "csrc/ is not built in this installation; to build it: COMMAND"
def call(**options):
    z, t = torch.randn(2, 2, 5)
    return distillation_loss(z, torch.arange(2), LogitsTeacher(t), OPD(), **options)
"""


def warned(code: str) -> str:
    done = run(CALL + code)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_first_call_without_native_says_how_to_build_it_once():
    said = warned("call()\ncall()\n")
    assert said.count("UserWarning") == 1 and "COMMAND" in said
    assert said.startswith("<string>:7:"), "the warning names another line than the caller's"
    module = "from tropd_kernels import DistillationLoss\nloss = DistillationLoss(OPD())\n"
    of_a_module = warned(
        module + "loss(torch.randn(2, 5), torch.arange(2), LogitsTeacher(torch.randn(2, 5)))\n"
    )
    assert of_a_module.startswith("<string>:10:")


@pytest.mark.slow
def test_nothing_is_said_to_who_chose_torch_or_while_a_graph_is_traced():
    said = warned(
        "import sys\n"
        "call(backend='torch')\n"
        "print('--- traced', file=sys.stderr, flush=True)\n"
        "torch.compile(lambda: call().loss, fullgraph=True, backend='eager')()\n"
    )
    of_torch, traced = said.split("--- traced\n")
    assert of_torch == "" and "UserWarning" not in traced


def test_the_command_that_builds_native_names_the_checkout():
    """What it said before had neither a path nor ninja."""
    command = native.build_command()
    assert "ninja" in command and "TROPD_BUILD_EXT=1" in command
    assert Path(shlex.split(command)[-1]) == ROOT


#: What pip says of where an installation came from, and what the command then builds.
ORIGINS = {
    "folder": ({"url": "file:///a%20b", "dir_info": {}}, "/a b"),
    "sdist": ({"url": "file:///a%20b/t.tar.gz", "archive_info": {}}, "/a b/t.tar.gz"),
    "sdist of a server": ({"url": "https://x/t.tar.gz", "archive_info": {}}, "https://x/t.tar.gz"),
    "repository": (
        {"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "12"}}, "git+https://x/y@12"
    ),
    "wheel": ({"url": "file:///a/t.whl", "archive_info": {}}, native.ANY_SOURCE),
    "index": (None, native.ANY_SOURCE),
}  # fmt: skip


def install(site: Path, origin: dict | None, *, built: bool) -> None:
    """An installation's folder, with a file in place of its library."""
    (site / "tropd_kernels").mkdir()
    if built:
        (site / "tropd_kernels" / "_C.abi3.so").touch()
    about = site / "tropd_kernels-9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tropd-kernels\nVersion: 9\n")
    if origin is not None:
        (about / "direct_url.json").write_text(json.dumps(origin))


@pytest.mark.parametrize(("origin", "source"), ORIGINS.values(), ids=list(ORIGINS))
def test_the_command_names_where_an_installation_came_from(origin, source, tmp_path, monkeypatch):
    """An index need not have the package, and no wheel can be built from."""
    install(tmp_path, origin, built=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "tropd_kernels" / "native.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    words = shlex.split(native.build_command())
    assert words[-1] == source and "tropd-kernels" not in words


@pytest.mark.parametrize("built", [True, False])
def test_a_source_tree_before_an_installation_with_native_says_so(built, tmp_path, monkeypatch):
    """`python -m` in a checkout imports the checkout."""
    install(tmp_path, None, built=built)
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path)])
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    said = native._load()
    assert str(ROOT) in said and "--editable" in said
    assert (str(tmp_path) in said) == built
