"""`teacher_model="self"`: the student as its own teacher, which reads the column `teacher_prompt`.

| student       | teacher_update_rate | teacher                                                   |
|---------------|---------------------|-----------------------------------------------------------|
| with adapters | None                | the student without them: no copy                         |
| without       | None                | a copy of the student as the trainer was given it         |
| without       | a                   | that copy, which moves: a student + (1 - a) teacher every |
|               |                     | `teacher_sync_steps` steps, saved in each checkpoint      |

The two settings are spelt as in TRL's SDFT and SDPO, and the moving average is the one of its
`SyncRefModelCallback`.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import ProcessorMixin
from trl import SyncRefModelCallback  # type: ignore[attr-defined]

from .data_checks import known_columns
from .effects import OF_LOADED_TEACHER, refuse
from .sides import ModelSide
from .teacher_prompts import COLUMN

SELF = "self"
#: Settings of a teacher that is the student itself.
OF_SELF = ("teacher_update_rate", "teacher_sync_steps")
_FILE = "teacher.pt"
#: PEFT's initialisations that take a part of a layer's weights into the adapter, or quantise them.
_CHANGE_WEIGHTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def is_self(teacher: Any) -> bool:
    """Whether a `teacher_model` is the student itself. A folder of that name is "./self"."""
    return isinstance(teacher, str) and teacher == SELF


def check_self(
    student: Any, teacher: Any, peft_config: Any, args: Any, train: Any, rewarded: bool = False,
    processor: Any = None,
) -> None:  # fmt: skip
    """Refuses, before a model is loaded, a student that cannot teach itself or would learn nothing,
    and the settings of one kind of teacher beside the other.

    args: a `TrOPDConfig`. train: the data set. rewarded: whether a verifier teaches, too.
    """
    itself = is_self(teacher)
    if not itself:
        refuse(args, OF_SELF, "teacher_model is not the student itself, 'self'")
        return
    refuse(args, OF_LOADED_TEACHER, "teacher_model is the student itself")
    if args.teacher_update_rate is not None and (peft_config is not None or _is_adapted(student)):
        raise NotImplementedError(
            "teacher_update_rate: with adapters the teacher is the student without them, which "
            "does not move: leave it out, or train the whole model"
        )
    _check_weights_kept(student, peft_config)
    alone = needs_prompts(student, teacher, args, rewarded)
    if alone and isinstance(processor, ProcessorMixin):
        raise NotImplementedError(
            "teacher_model: 'self' would read what the student reads, and teach it nothing, and "
            "beside images a teacher has no prompts of its own: give another teacher_model, or an "
            "adapter that has been trained"
        )
    present = known_columns(train)
    if alone and present and COLUMN not in present:
        raise ValueError(
            "teacher_model: 'self' would read what the student reads, and teach it nothing: give "
            f"the data set a column {COLUMN!r}; it has {', '.join(map(repr, present))}"
        )


def _check_weights_kept(student: Any, peft_config: Any) -> None:
    """Raises ValueError for adapters without which the student is not the one that was given."""
    known = student.peft_config.values() if _is_adapted(student) else ()
    for config in (peft_config, *known):
        init, bias = (getattr(config, key, None) for key in ("init_lora_weights", "bias"))
        remedy = (
            "choose another initialisation (PEFT's path_initial_model_for_weight_conversion "
            "converts a trained adapter)"
        )
        if isinstance(init, str) and init.lower().startswith(_CHANGE_WEIGHTS):
            option = f"init_lora_weights={init!r}"
        elif getattr(config, "kasa_config", None) is not None:
            option = "kasa_config"
        elif bias in ("all", "lora_only"):
            option, remedy = f"bias={bias!r}", "take bias='none'"
        else:
            continue
        raise ValueError(
            f"teacher_model: 'self' is the student without its adapters, whose own weights "
            f"{option} of the adapter changes: {remedy}, or give the student's name as "
            "teacher_model, which loads a frozen copy"
        )


def needs_prompts(student: Any, teacher: Any, args: Any, rewarded: bool) -> bool:
    """Whether nothing but prompts of its own can tell the teacher from the student at the start."""
    return teaches_alone(teacher, args, rewarded) and not _is_adapted(student)


def teaches_alone(teacher: Any, args: Any, rewarded: bool) -> bool:
    """Whether the student teaches itself by its log-probs alone: without texts, without rewards."""
    return is_self(teacher) and not (args.is_guided or rewarded)


def _is_adapted(student: Any) -> bool:
    return isinstance(student, torch.nn.Module) and is_peft_model(student)


def refuse_equal_sides(student: ModelSide, teacher: ModelSide) -> None:
    """Raises ValueError for adapters that change nothing, as PEFT makes them: the teacher is the
    student, and the gradient of each divergence between the two is zero."""
    pairs = [(student.hidden, teacher.hidden), (student.weight, teacher.weight)]
    if student.bias is not None and teacher.bias is not None:
        pairs.append((student.bias, teacher.bias))
    if all(torch.equal(ours, theirs) for ours, theirs in pairs):  # False where shapes differ
        raise ValueError(
            "teacher_model: 'self' reads what the student reads, and the student's adapters do "
            f"not change it yet, so that it is taught nothing: give the data set a column "
            f"{COLUMN!r}, or a student whose adapters have been trained"
        )


def refuse_average(folder: str) -> None:
    """Raises ValueError for the checkpoint of a run that `TeacherSync` taught."""
    if Path(folder, _FILE).is_file():
        raise ValueError(
            f"resume_from_checkpoint: {folder} has {_FILE}, the moving average that teaches its "
            "run: set teacher_model 'self' and the run's teacher_update_rate, or remove the file "
            "to go on with another teacher"
        )


def refuse_sharded(sharded: bool) -> None:
    if sharded:
        raise NotImplementedError(
            "teacher_model: 'self' under FSDP or ZeRO-3, which shard the student while it is read "
            "a second time: give the student's name as teacher_model, which loads a frozen copy"
        )


class TeacherSync(SyncRefModelCallback):
    """Moves the teacher towards the student after an optimizer step."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.teacher_sync_steps > state.max_steps and state.is_world_process_zero:
            warnings.warn(
                f"teacher_sync_steps: {args.teacher_sync_steps} is more than the run's "
                f"{state.max_steps} steps, so the teacher never changes: lower it, or leave "
                "teacher_update_rate out for a fixed teacher",
                stacklevel=2,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.teacher_sync_steps == 0:
            student = self.accelerator.unwrap_model(kwargs["model"])
            self.sync_target_model(student, self.ref_model, args.teacher_update_rate)

    def save(self, folder: Path) -> None:
        torch.save(self.ref_model.state_dict(), folder / _FILE)

    def load(self, folder: str) -> None:
        """Raises ValueError for a checkpoint without the teacher."""
        file = Path(folder, _FILE)
        if not file.is_file():
            raise ValueError(
                f"resume_from_checkpoint: {folder} has no {_FILE}, which holds the teacher of a "
                "run with teacher_update_rate: resume from a checkpoint of such a run"
            )
        device = self.accelerator.device.type
        self.ref_model.load_state_dict(torch.load(file, map_location=device))
