"""The demonstration: one real model, one command, a few minutes on two CPU cores.

    python -m examples.demo

Read in this order:

* `prompts.py`: what the student is asked
* `model.py`: SmolLM2-135M-Instruct, which teaches
* `damage.py`: a copy of it after a fine-tune that went wrong, which learns
* `rollout.py`: the student writes; teacher and student read what it wrote
* `train.py`: on-policy distillation with the fused loss: the loop to copy
* `eager.py`: the same loss as one would write it in plain PyTorch
* `compare.py`: eager against fused: error against float64, time, peak memory
* `judge.py`: KL to the teacher, and what the student says, on prompts held out
* `record.py`: all that a run found
* `report.py`, `plot.py`, `page.py`: what the terminal shows, the picture, and the HTML page
* `run.py`: all of it, in order
"""


class DemoError(Exception):
    """Something that the person at the terminal can put right; they see its text, one line."""
