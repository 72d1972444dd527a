"""Do on-policy distillation objectives teach? Small models from scratch, a task with answers.

    python -m benchmarks.learning --mismatch near far --seeds 5 --workers 2

A teacher that adds with carries written out distils, by `TrOPDTrainer`, into students that know its
notation well ("near") or hardly ("far"). `README.md` has what came out.

    task        problems, two notations, checking          measures  what is read off a run; claims
    models      teacher and students by cross-entropy      collect   runs to one file a mismatch
    arms        objectives, and what all have in common    report    tables
    run         one run                                    plot      curves
"""
