"""Prototypes of kernels that read a row once, by a cluster of programs that keeps it in registers.

    python -m benchmarks.gpu.clusters.build build/carry/cubins     on any machine with Triton >= 3.8
    python -m benchmarks.gpu.clusters.launch build/carry/cubins    on a Hopper, by CuPy

Today a row is read twice by K1 (statistics, gradient) and by the Jensen-Shannon divergence's three
passes three times. Eight programs of a Hopper cluster hold 151,936 logits of both sides in their
registers. Triton compiles reductions across a cluster from 3.8 on, and a driver launches what it
compiled, whichever Triton is installed: so cubins are carried along.

What they leave out: infinities, soft cap, temperature, top k, and any other shape of row.
"""
