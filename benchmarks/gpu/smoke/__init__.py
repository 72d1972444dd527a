"""Is anything wrong? Checks of seconds each, a process each, before anything is timed.

    python -m benchmarks.gpu.smoke addmm_into_itself

Only the names: the runner reads them and imports no torch.
"""

#: Objectives of which each kernel has one at least, and the losses of the headline.
KERNELS = ("opd", "reverse_kl", "tropd", "gkd", "topk_jsd")
LOSSES = ("tropd", "opd", "gkd", "tropd_given")

#: What torch refuses or gets wrong, if it does, ends the rest: that is asked first.
CHECKS = (
    "mm", "addmm", "addmm_into_itself", "products",
    *(f"loss_{name}" for name in LOSSES),
    *(f"kernels_{name}_{parity}" for name in KERNELS for parity in ("even", "odd")),
    "column_sums_even", "column_sums_odd", "no_sync", "graph",
)  # fmt: skip
#: Those that ask something that a CPU has not.
NEEDS_GPU = ("mm", "addmm", "addmm_into_itself", "no_sync", "graph")
