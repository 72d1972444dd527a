"""What a GPU has to tell, in two calls of 5.5 and 5 minutes.

    python -m benchmarks.gpu.prepare                 before, where there is a network: what travels
    python -m benchmarks.gpu --out OUT               the first call, on the machine with the GPU
    python -m benchmarks.gpu --out NEW --after OUT   the second: what the first leaves to ask
    python -m benchmarks.gpu --tiny --out OUT        every step, small, on whatever is here

Needs torch, triton and pytest. Every job is a process of its own with a box of time, for an illegal
access on a GPU ends its process, and a hang would end the call. Each step has a deadline, most
important first. OUT gets three files: `results.jsonl`, to which jobs append what they measure as
they measure it; `logs.txt`, the end of what each printed; `gpu.tar.gz`, at the end, all of it.
Tables are printed last, since of a long output often the end alone is kept.

    jobs, runner        processes, their turns, boxes and deadlines
    first, second       what the two calls do, and when
    facts               the machine, and what of it a job may miss
    warm, smoke         kernels compiled ahead; is anything wrong?
    gemms, headline, chunks, clusters, suite     what is measured, with `benchmarks.rows`
    prepare             baselines' wheels and cluster kernels, fetched and made on another machine
    tables, command     what is printed, and the options
"""
