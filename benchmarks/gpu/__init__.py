"""All measurements on a GPU, in two calls of 5.5 and 5 minutes.

    python -m benchmarks.gpu.prepare                 before, with a network: what goes along
    python -m benchmarks.gpu --out OUT               the first call, on the machine with the GPU
    python -m benchmarks.gpu --out NEW --after OUT   the second: what the first left open
    python -m benchmarks.gpu --tiny --out OUT        every step, small, on any machine

Needs torch, triton and pytest. Every job is a process of its own with a time limit, since an
illegal access on a GPU ends its process, and a hang would end the call. Each step has a deadline;
the most important come first. OUT gets three files: `results.jsonl`, to which the jobs append
measurements as they make them; `logs.txt`, the end of what each job printed; `gpu.tar.gz`, at the
end, all of it. Tables are printed last, since often only the end of a long output is kept.

    jobs, runner        processes, their turns, time limits and deadlines
    first, second       what the two calls do, and when
    facts               the machine, and what it lacks for a job
    warm, smoke         compiling kernels ahead; checks for correctness
    gemms, headline, chunks, clusters, suite     what is measured, with `benchmarks.rows`
    prepare             baselines' wheels and cluster kernels, fetched and made on another machine
    tables, command     what is printed, and the options
"""
