"""TROPD_CPU: what `native` and the products use of the CPU, where less is wanted than it has."""

import json
import os
import subprocess
import sys

import pytest

from tropd_kernels import native

SHOWN = """
import json
from tropd_kernels import available_backends, native, products
ops, sets = torch.ops.tropd_native, native.instruction_sets()
in_use = ops.use_instruction_set(sets[0])
multiplies = ops.use_products(native.BF16_PRODUCTS[0]) if native.BF16_PRODUCTS else None
print(json.dumps([sets, in_use, native.BF16_PRODUCTS, multiplies, products.bf16_in_hardware()]))
print(available_backends("cpu")["native"])
"""

#: A process under each cap, in this order, and one without. They import torch, which takes most of
#: a process's time, once: nothing of it is capped.
EACH = f"""
import os, sys, torch
for cap in [None, *sys.argv[1:]]:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        if cap is not None:
            os.environ["TROPD_CPU"] = cap
        exec({SHOWN!r})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, cap
"""


def run(cap: str | None, code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TROPD_CPU"}
    if cap is not None:
        environment["TROPD_CPU"] = cap
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True
    )


def shown(caps: tuple[str, ...]) -> list[tuple[list, str]]:
    """Without a cap, then under each."""
    done = run(None, EACH, *caps)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [(json.loads(facts), said) for facts, said in zip(lines[::2], lines[1::2], strict=True)]


needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason="csrc/ is not built")


@needs_native
def test_a_cap_leaves_what_does_not_exceed_it():
    ((all_sets, _, all_products, _, _), uncapped), *capped = shown(tuple(native.CAPS))
    assert "TROPD_CPU" not in uncapped
    for i, (cap, found) in enumerate(zip(native.CAPS, capped, strict=True)):
        (sets, in_use, products, multiplies, bf16), description = found
        above = ["AVX2", "AVX512", "AMX"][i:]
        kept = [
            [name for name in names if not name.replace("-", "").startswith(tuple(above))]
            for names in (all_sets, all_products)
        ]
        assert sets == kept[0] and in_use == sets[0]
        # Where AMX is left out, AVX512-BF16 may serve whose products were oneDNN's before.
        assert products == kept[1] or set(all_products) < set(products)
        assert multiplies == (products[0] if products else None)
        assert f"rows on {sets[0]}" in description
        assert (f"TROPD_CPU={cap}" in description) == (cap != "amx")
        if cap in ("portable", "avx2"):
            assert not bf16


def test_an_unknown_cap_is_refused():
    done = run("avx9", "import tropd_kernels.native")
    assert done.returncode == 1
    expected = "TROPD_CPU must be one of portable, avx2, avx512, amx, or unset; got 'avx9'"
    assert expected in done.stderr


def test_an_empty_cap_is_none():
    assert run("", "import tropd_kernels.native").returncode == 0
