"""One distillation in three loops: plain PyTorch, accelerate, Lightning.

    python -m examples.loops.plain
    torchrun --nproc_per_node 2 -m examples.loops.with_accelerate
    python -m examples.loops.with_lightning

`distiller` is what they share: a module that holds the student and computes the loss, so that
whatever wraps a module (DDP, FSDP, accelerate, Lightning) wraps the right one.
"""
