"""What a run shows at a terminal, and what it leaves of its log.

TRL's rich panel replaces each log by the next and shows numbers with three decimals. `Progress`
keeps the panel, and prints one line a log above it: the line that transformers prints elsewhere.
The log of a run that ended is `trainer_state.json` in its output_dir, beside the trained model; a
checkpoint is a folder that has more.
"""

import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import RichProgressCallback  # type: ignore[attr-defined]

STATE = "trainer_state.json"


class Progress(RichProgressCallback):
    """TRL's rich panel with one line a log above it, and numbers in 4 significant digits."""

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
        """Takes the panel off, and shows the cursor again, where an error left training."""
        if self.rich_group is not None:
            self.rich_group.stop()

    def _print(self, line: str) -> None:
        if self.rich_group is None:
            print(line)
        else:  # unbroken, whatever the width of the terminal
            self.rich_group.console.print(line, soft_wrap=True, markup=False, highlight=False)


def _digits(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def close(callbacks: list[TrainerCallback]) -> None:
    """Takes off the panels that are still up."""
    for callback in callbacks:
        if isinstance(callback, Progress):
            callback.close()


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a run can go on from this folder. The output_dir of a run that ended has a model and
    a `trainer_state.json` too, but neither the name of a checkpoint nor the generators' states."""
    folder = Path(folder)
    named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.resolve().name)
    whole = named or any(folder.glob("rng_state*.pth"))  # without them: save_only_model
    return (folder / STATE).is_file() and bool(whole)
