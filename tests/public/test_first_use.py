"""What a first call, an import and the command line's help bring along and say."""

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
