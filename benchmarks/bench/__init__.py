"""Comparison with other libraries: each loss by every implementation of it, in one table.

    tropd bench                                            what suits this machine
    tropd bench --shape qwen3-1.7b --tokens 8192 --losses gkd reverse_kl
    tropd bench --losses tropd --providers native --tokens 512 1024 2048 --plot
    tropd bench --page                          docs/benchmarks.md and README's table, renewed

All get the same inputs: hidden states, heads, labels, and the teacher in the form that the loss
takes. A run computes a loss and its gradients with respect to hidden states and head. The runs of
all providers are interleaved, and so are those of the bare products of the same shapes.

    shapes, losses, problem      what is computed, and on what
    eager, baselines, providers  by whom
    timing, accuracy, run        how it is measured
    budget                       time estimates, before a row is begun
    ceilings                     peak rates of the machine, for the roofline
    results, table, plot, page   storing and showing it
    command                      the options

A row that cannot run, or would take more than the budget, stays in the table and says why. On a CPU
the budget is two minutes a row unless `--budget` says otherwise.
"""
