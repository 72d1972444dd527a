"""What the paper claims, tried with enough seeds to tell: stated first, then run.

    python -m benchmarks.evidence all --workers 2       what is missing, then the report
    python -m benchmarks.evidence power --workers 2     what is missing of one experiment
    python -m benchmarks.evidence report                tables, plots and the page

Task, models and training are those of `benchmarks.learning`. An experiment is data
(`experiments.py`): its arms, mismatches and claims. Each arm first chooses its own learning rate,
on seeds that are not used again.
"""
