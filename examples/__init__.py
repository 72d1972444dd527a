"""Programs to run, to read and to copy from; what measures is in `benchmarks`.

python -m examples.demo             a training loop on SmolLM2, the fused loss beside eager's
python -m examples.train.prepare    models and prompts for `tropd train` with train/run.yaml
"""
