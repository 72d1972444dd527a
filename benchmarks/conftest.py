"""Shapes from the command line, and the table at the end."""

import pytest
import torch

from benchmarks.losses import make_problem
from benchmarks.measure import machine

ON_GPU = torch.cuda.is_available()
ROWS: list[dict] = []


def pytest_addoption(parser):
    group = parser.getgroup("shapes")
    group.addoption("--tokens", type=int, default=8192 if ON_GPU else 256)
    group.addoption("--vocab-size", type=int, default=151_936 if ON_GPU else 32_768)
    group.addoption("--hidden-size", type=int, default=2048 if ON_GPU else 256)
    group.addoption("--teacher-hidden-size", type=int, default=4096 if ON_GPU else 512)
    group.addoption("--dtype", choices=["bfloat16", "float32"], default="bfloat16")


@pytest.fixture(scope="session")
def problem(request):
    option = request.config.getoption
    return make_problem(
        option("--tokens"), option("--vocab-size"), option("--hidden-size"),
        option("--teacher-hidden-size"), getattr(torch, option("--dtype")),
        "cuda" if ON_GPU else "cpu",
    )  # fmt: skip


@pytest.fixture
def table():
    return ROWS


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    option = config.getoption
    write = terminalreporter.write_line
    terminalreporter.section("time, memory and error of loss and all gradients")
    for name, fact in machine("cuda" if ON_GPU else "cpu").items():
        write(f"{name}: {fact}")
    write(
        f"{option('--tokens')} tokens, vocabulary {option('--vocab-size')}, widths "
        f"{option('--hidden-size')} and {option('--teacher-hidden-size')}, {option('--dtype')}"
    )
    write(f"{'loss':12}{'provider':10}{'median s':>10}{'peak MB':>10}{'gradient error':>16}")
    for row in ROWS:
        memory = "-" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"
        write(
            f"{row['loss']:12}{row['provider']:10}{row['median']:>10.3f}{memory:>10}"
            f"{row['error']:>16.1e}"
        )
