"""Shapes from the command line, and the table at the end."""

import pytest
import torch

from benchmarks.bench import table
from benchmarks.bench.problem import make_problem
from benchmarks.bench.shapes import DEFAULTS, SHAPES, Shape
from benchmarks.dtypes import default_dtype, dtype_name
from benchmarks.measure import machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE, TOKENS = DEFAULTS[DEVICE]
ROWS = []


def pytest_addoption(parser):
    group = parser.getgroup("shapes")
    group.addoption("--shape", choices=SHAPES, default=SHAPE)
    group.addoption("--tokens", type=int, default=TOKENS[0])
    for size in ("vocab_size", "hidden_size", "teacher_hidden_size"):
        group.addoption(f"--{size.replace('_', '-')}", type=int, help="in place of the shape's")
    dtype = dtype_name(default_dtype(DEVICE)[0])
    group.addoption("--dtype", choices=["bfloat16", "float32"], default=dtype)


@pytest.fixture(scope="session")
def problem(request):
    option = request.config.getoption
    dtype = getattr(torch, option("--dtype"))
    return make_problem(option("--tokens"), shape(option), dtype, DEVICE)


@pytest.fixture
def rows():
    return ROWS


def shape(option):
    named = vars(SHAPES[option("--shape")])
    return Shape(**{key: (key != "softcap" and option(key)) or named[key] for key in named})


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    option = config.getoption
    write = terminalreporter.write_line
    terminalreporter.section("time, memory and error of loss and all gradients")
    for name, fact in machine(DEVICE).items():
        write(f"{name}: {fact}")
    write(f"{option('--tokens')} tokens, {shape(option)}, {option('--dtype')}")
    write(table.short(ROWS))
