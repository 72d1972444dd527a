"""Launches the cluster kernels' cubins by CuPy: errors against float64 and times, a record each.

    python -m benchmarks.gpu.clusters.launch build/carry/cubins

Beside them today's passes on as many rows, so that the gain is one of the same minute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.bench.timing import reason_of
from benchmarks.device_times import device_times
from benchmarks.gpu.clusters.build import VOCAB
from benchmarks.rows import passes

ROWS, REPEATS = 1024, 11
#: Rows whose d_logits are taken in float64 as well.
CHECKED = 64
#: Rounding d_logits to bf16 costs 1.1e-3 of their norm.
BOUND = 2e-3
#: What has to be moved for each id, and today's passes that do the same.
KINDS = {
    "k1_once": (6, ("statistics, student", "gradient, K1")),
    "jsd_once": (10, ("... and JSD", "gradient, JSD")),
}


class Inputs:
    """Logits of both sides, and where kernels write."""

    def __init__(self, device: str, rows: int = ROWS, vocab_size: int = VOCAB):
        generator = torch.Generator(device).manual_seed(0)
        self.z, self.t = (
            4 * torch.randn(rows, vocab_size, device=device, generator=generator) for _ in range(2)
        )
        self.labels = self.z.argmax(1)
        self.teacher_log_probs = torch.full((rows,), -3.0, device=device)
        self.d_logits = torch.empty(rows, vocab_size, device=device, dtype=torch.bfloat16)
        self.row_results = torch.empty(2 * rows, device=device)

    def arguments(self, kernel: str) -> list[Tensor | int]:
        """As `kernels.SIGNATURES` has them."""
        size = self.z.shape[1]
        if kernel == "k1_once":
            return [self.z, self.labels, self.teacher_log_probs, self.d_logits, self.row_results,
                    size, size, size]  # fmt: skip
        return [self.z, self.t, self.d_logits, self.row_results, size, size, size, size]

    def exact(self, kernel: str) -> Tensor:
        """d_logits of the first rows in float64."""
        n = CHECKED
        log_p, log_q = (x[:n].double().log_softmax(-1) for x in (self.z, self.t))
        p = log_p.exp()
        if kernel == "k1_once":
            labels = self.labels[:n, None]
            reward = self.teacher_log_probs[:n, None].double() - log_p.gather(1, labels)
            return (reward * p).scatter_add(1, labels, -reward)
        log_m = torch.logaddexp(log_p, log_q) - torch.log(p.new_tensor(2.0))
        ratio = p * (log_p - log_m)
        return 0.5 * (ratio - p * ratio.sum(-1, keepdim=True))


def launcher(folder: Path, one: dict, inputs: Inputs) -> Callable[[], None]:
    import cupy

    function = cupy.RawModule(path=str(folder / one["file"])).get_function(one["entry"])
    if one["programs"] > 8:
        _allow_large_cluster(function)
    arguments: list = [
        cupy.uint64(a.data_ptr()) if isinstance(a, Tensor) else cupy.int32(a)
        for a in inputs.arguments(one["kernel"])
    ]
    arguments += [cupy.uint64(0)] * (one["parameters"] - len(arguments))

    def launch() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            function(
                (len(inputs.z) * one["programs"],), (one["threads"],), tuple(arguments),
                shared_mem=one["shared"],
            )  # fmt: skip

    return launch


def _allow_large_cluster(function) -> None:
    from cuda.bindings import driver

    kernel = function.kernel if hasattr(function, "kernel") else function
    (status,) = driver.cuFuncSetAttribute(
        kernel.ptr,
        driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1,
    )  # fmt: skip
    if int(status):
        raise RuntimeError(f"a cluster of more than 8 programs is refused: {status}")


def measure(folder: Path, one: dict, inputs: Inputs) -> None:
    """Fills d_logits with NaN first: what is not written shows."""
    launch = launcher(folder, one, inputs)
    inputs.d_logits.fill_(float("nan"))
    launch()
    torch.cuda.synchronize()
    exact = inputs.exact(one["kernel"])
    error = float((inputs.d_logits[:CHECKED].double() - exact).norm() / exact.norm())
    written = bool(torch.isfinite(inputs.d_logits).all())
    times, how = device_times(launch, REPEATS, "cuda")
    moved = inputs.z.numel() * KINDS[one["kernel"]][0]
    records.emit(
        kernel=one["file"].removesuffix(".cubin"), error=error, written=written,
        ok=written and error <= BOUND, ms=1e3 * times.median, timed_by=how,
        gbs=moved / times.median / 1e9,
    )  # fmt: skip


def today(inputs: Inputs) -> None:
    made = passes("triton", *inputs.z.shape, "cuda")
    for kernel, (bytes_an_id, names) in KINDS.items():
        seconds = sum(device_times(made[name].call, REPEATS, "cuda")[0].median for name in names)
        records.emit(
            kernel=f"today, for {kernel}", ms=1e3 * seconds, error=0.0,
            gbs=inputs.z.numel() * bytes_an_id / seconds / 1e9,
        )  # fmt: skip


def main() -> int:
    folder = Path(sys.argv[1])
    listed = folder / "cubins.json"
    if not listed.exists():
        records.emit(reason=f"no {listed.name} in {folder.name}: `python -m benchmarks.gpu.prepare`"
                     " makes cubins, where there is Triton >= 3.8")  # fmt: skip
        return records.RECORDED_FAILURE
    torch.empty(1, device="cuda")
    records.wait_for_turn()
    inputs, whole = Inputs("cuda"), True
    for one in json.loads(listed.read_text("utf-8")):
        whole &= tried(one["file"].removesuffix(".cubin"), partial(measure, folder, one, inputs))
    whole &= tried("today", partial(today, inputs))
    return 0 if whole else records.RECORDED_FAILURE


def tried(name: str, call: Callable[[], None]) -> bool:
    """What fails is a record; once the context is lost, so is the rest."""
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        records.emit(kernel=name, reason=reason_of(error))
        if "illegal" in str(error) or "unspecified launch failure" in str(error):
            raise
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
