"""What only compiled kernels can show, on the machine of `ptx` (`make compiled`)."""

import os
import re

import pytest
import torch
from problems import OBJECTIVES

from tropd_kernels import LogitsTeacher, distillation_loss
from tropd_kernels.rows import triton_launch

pytestmark = pytest.mark.skipif("TROPD_PTX" not in os.environ, reason="needs make compiled")


@pytest.mark.parametrize("shared", [False, True], ids=["whole rows", "rows in parts"])
@pytest.mark.parametrize("name", ["tropd_renormalize_both", "gkd"])
def test_triton_barrier_left_out_is_a_race(name, shared, monkeypatch):
    """Each barrier in turn. One that no two warps need may go, but no result may change unseen."""
    from ptx import PtxError, launch

    monkeypatch.setattr(triton_launch, "PROGRAMS", 2**30 if shared else 0)
    monkeypatch.setattr(triton_launch, "TILES", 0.5)
    z, t = torch.randn(2, 2, 5000)

    kernel, known = launch.Kernel, {}

    def run(instead):
        """With another PTX for some."""

        def made(ptx, room):
            if ptx in instead:
                return kernel(instead[ptx], room)
            if ptx not in known:
                known[ptx] = kernel(ptx, room)
            return known[ptx]

        monkeypatch.setattr(launch, "_kernels", {})
        monkeypatch.setattr(launch, "Kernel", made)
        logits = z.clone().requires_grad_()
        out = distillation_loss(
            logits, torch.tensor([3, 4]), LogitsTeacher(t), OBJECTIVES[name], backend="triton",
            uniforms=torch.tensor([0.99, 0.999]),
        )  # fmt: skip
        out.loss.backward()
        return out.loss.detach(), logits.grad

    expected = run({})
    races = 0
    for text in list(known):
        for found in re.finditer(r"bar\.sync", text):
            without = f"{text[: found.start()]}//{text[found.start() :]}"
            try:
                result = run({text: without})
            except PtxError as error:
                if "a race" not in str(error):
                    raise
                races += 1
            else:
                assert all(map(torch.equal, result, expected))
    assert races >= 10
