"""Programs to run, to read and to copy from; measurements are in `benchmarks`.

python -m examples.demo             trains SmolLM2, and compares the fused loss with an eager one
python -m examples.train.prepare    models and prompts for `tropd train` with train/run.yaml
"""
