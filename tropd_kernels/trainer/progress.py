"""A run's progress at a terminal, and the log that it leaves on disk.

TRL's rich panel replaces each log by the next and shows numbers with three decimals. `Progress`
keeps the panel and prints a line for each log above it: the line that transformers prints without
rich. A finished run's log is `trainer_state.json` in its output_dir, next to the trained model; a
checkpoint folder holds more.
"""

import re
import warnings
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import RichProgressCallback  # type: ignore[attr-defined]

from ..objectives import TokenRule
from .protocols import sends_states

STATE = "trainer_state.json"


class Progress(RichProgressCallback):
    """TRL's rich panel with a line for each log above it, and numbers of 4 significant digits."""

    rich_group: Any
    evaluation_bar: Any

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: _digits(value) for name, value in (logs or {}).items()}
        shown.pop("total_flos", None)
        if state.is_world_process_zero:
            self._print(str(shown))
        super().on_log(args, state, control, logs=shown, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.evaluation_bar is None:  # an evaluation of its own: the panel is training's
            return
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.evaluation_bar is not None:
            super().on_evaluate(args, state, control, **kwargs)

    def close(self) -> None:
        """Removes the panel and shows the cursor again, if an error ended training."""
        if self.rich_group is not None:
            self.rich_group.stop()

    def _print(self, line: str) -> None:
        if self.rich_group is None:
            print(line)
        else:  # in one line at any width of the terminal
            self.rich_group.console.print(line, soft_wrap=True, markup=False, highlight=False)


def _digits(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def watch(rule: TokenRule, whole_teacher: bool) -> str | None:
    """Which metrics say whether a run goes well, if its loss does not: a policy gradient's value is
    that of a surrogate, whose gradient is meant."""
    if not rule.policy_gradient:
        return None
    trust = "" if rule.gate == "always" else ", and tropd/trust_ratio, which should rise"
    kl = what_to_watch(whole_teacher)
    return f"The loss is a surrogate, and its value says little. Watch {kl}{trust}."


def gives_whole(args: Any) -> bool:
    """Whether the teacher of a `TrOPDConfig` gives whole distributions."""
    return args.loads_teacher or sends_states(args.teacher_server_protocol)


def what_to_watch(whole_teacher: bool) -> str:
    """The metric that tells a policy gradient's progress."""
    if whole_teacher:
        return "tropd/reverse_kl, which should fall"
    return "tropd/reward_mean, minus the reverse KL, which should rise"


def prints_logs(callbacks: list[TrainerCallback]) -> bool:
    return any(isinstance(c, (PrinterCallback, ProgressCallback, Progress)) for c in callbacks)


def close(callbacks: list[TrainerCallback]) -> None:
    """Removes the panels that are still shown."""
    for callback in callbacks:
        if isinstance(callback, Progress):
            callback.close()


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a run can be resumed from this folder.

    A finished run's output_dir has a model and a `trainer_state.json` as well, but neither the name
    of a checkpoint nor the random generators' states.
    """
    folder = Path(folder)
    named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.resolve().name)
    whole = named or any(folder.glob("rng_state*.pth"))  # save_only_model leaves them out
    return (folder / STATE).is_file() and bool(whole)


def last_checkpoint(folder: str | Path) -> str | None:
    """The last of the checkpoints in this folder from which a run can be resumed, or None.

    A save that was cut off leaves a folder that is none.
    """
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdecimal() and is_checkpoint(path):
            found[int(step)] = path
    return str(found[max(found)]) if found else None


def checkpoint_to_resume(given: str | Path | bool | None, args: Any) -> str | bool | None:
    """What `train(resume_from_checkpoint=given)` is to go on from. True: the last of output_dir's.

    Raises ValueError where that is no checkpoint, and warns where only the config names one.
    """
    folder, named = args.output_dir, str(args.resume_from_checkpoint or "")
    unread = given is None and named.lower() not in ("", "false", "none")
    if unread and args.process_index == 0:
        warnings.warn(
            f"resume_from_checkpoint: the run begins anew: the config has {named!r}, which "
            "transformers leaves to scripts: call train(resume_from_checkpoint=...)",
            stacklevel=3,
        )
    if given is True:
        if (last := last_checkpoint(folder)) is None:
            raise ValueError(
                f"resume_from_checkpoint: there is no whole checkpoint in {folder}: leave it out "
                "to begin anew, or give a checkpoint's folder"
            )
        return last
    if isinstance(given, (str, Path)) and Path(given, STATE).is_file() and not is_checkpoint(given):
        raise ValueError(
            f"resume_from_checkpoint: there is no checkpoint {given}, which holds the end of a "
            "run: give one of its folders checkpoint-..., or True for the last of output_dir"
        )
    return str(given) if isinstance(given, Path) else given
