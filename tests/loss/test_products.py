"""torch's products on a CPU: what they set for the process, they set back."""

import threading

import pytest
import torch

from tropd_kernels import GKD, LogitsTeacher, linear_distillation_loss, products

MATMUL = torch.backends.mkldnn.matmul
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def _bf16(monkeypatch):
    """On any CPU; and a test that fails leaves no mode to the next one."""
    monkeypatch.setattr(products, "bf16_in_hardware", lambda: True)
    before = MATMUL.fp32_precision
    yield
    MATMUL.fp32_precision = before


@pytest.mark.parametrize("mode", ["none", "ieee"])
def test_products_that_overlap_leave_the_compute_mode_as_it_was(mode):
    """Each for itself, the second would have set back what the first had set: bfloat16, for every
    float32 product of the process from then on."""
    MATMUL.fp32_precision = mode
    first, second = (products._bf16_products(torch.bfloat16) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert MATMUL.fp32_precision == "bf16"  # the second is still in its product
    second.__exit__(None, None, None)
    assert MATMUL.fp32_precision == mode


def test_calls_in_two_threads(monkeypatch):
    """The second begins a product within the first one's, and ends it behind that."""
    began, ended = threading.Event(), threading.Event()
    tiles = products._tiles

    def in_turns(*arguments):
        if threading.current_thread() is second:
            began.set()
            ended.wait(60)
        elif not began.is_set():
            second.start()
            began.wait(60)
        return tiles(*arguments)

    monkeypatch.setattr(products, "_tiles", in_turns)
    before = MATMUL.fp32_precision

    def call():
        hidden, weight = torch.randn(2, 8, 16).bfloat16()
        linear_distillation_loss(
            hidden, weight, torch.zeros(8, dtype=torch.int64), LogitsTeacher(torch.randn(8, 8)),
            GKD(), backend="torch",
        )  # fmt: skip

    second = threading.Thread(target=call)
    call()
    ended.set()
    second.join()
    assert MATMUL.fp32_precision == before
    torch.get_float32_matmul_precision()  # an error where a mode is left
