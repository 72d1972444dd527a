"""The comparison with the field: every loss by everybody who computes it, in one table.

    tropd bench                                            what suits this machine
    tropd bench --shape qwen3-1.7b --tokens 8192 --losses gkd reverse_kl
    tropd bench --losses tropd --providers native --tokens 512 1024 2048 --plot
    tropd bench --readme                                   README's figures from benchmarks/results

Inputs are the same for all: hidden states, heads, labels, and the teacher in the form that the loss
takes. A run is a loss and its gradients of hidden states and head. Providers take turns, and the
bare products of the same shapes take theirs among them.

    shapes, losses, problem      what is computed, and on what
    eager, baselines, providers  by whom
    timing, accuracy, run        how it is measured
    budget                       what a row would take, before it is begun
    ceilings                     what the machine reaches at most, for the roofline
    results, table, plot, readme what becomes of it
    command                      the options

A row that cannot run, or would take more than the budget, stays in the table and says why. On a CPU
the budget is two minutes a row unless `--budget` says otherwise.
"""
