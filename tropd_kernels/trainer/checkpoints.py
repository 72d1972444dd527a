"""Checkpoints of which transformers' `Trainer` would load a part without a word.

Weights may be saved under other names than they have in the model, as those of image models and of
mixtures of experts. The `Trainer` loads them without the renaming of `from_pretrained`, keeps what
it has where a name is missing, and goes on: from the weights in hand, with a line in the log.

A checkpoint of `save_only_model` has neither the optimizer nor the schedule: both begin anew, in
the middle of the run. Where not every step that is evaluated is saved, the best one may have no
checkpoint: the `Trainer` then keeps other weights.
"""

import warnings
from pathlib import Path
from typing import Any

from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DistillationTrainer  # type: ignore[attr-defined]


class WholeCheckpoints(DistillationTrainer):
    """`DistillationTrainer` that resumes, and loads the best checkpoint, by `from_pretrained` where
    the names differ, and warns of a checkpoint without the optimizer."""

    _loading: tuple[str, Any]  # the folder that is being loaded, and into which model

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        output = super().train(*arguments, **keywords)
        if self.is_world_process_zero():
            for warning in (self._not_evaluated(), self._best_not_saved()):
                if warning is not None:
                    warnings.warn(warning, stacklevel=3)
        return output

    def _not_evaluated(self) -> str | None:
        args, logs = self.args, self.state.log_history
        evaluated = any(key.startswith("eval_") for log in logs for key in log)
        if args.eval_strategy == "no" or not args.eval_delay or evaluated:
            return None
        unit = "steps" if args.eval_strategy == "steps" else "epochs"
        return (
            f"eval_delay: nothing was evaluated, for the run ended before {args.eval_delay:g} "
            f"{unit}: lower it"
        )

    def _best_not_saved(self) -> str | None:
        best, saved = self.state.best_global_step, self.state.best_model_checkpoint
        loaded = saved is not None and Path(saved).name == f"{PREFIX_CHECKPOINT_DIR}-{best}"
        if not self.args.load_best_model_at_end or not best or loaded:
            return None
        has = "the last step's" if saved is None else f"those of {saved}"
        return (
            f"load_best_model_at_end: step {best} was the best of those evaluated, and it was not "
            f"saved: the weights are {has}: set save_steps to eval_steps, or save_strategy to "
            "'best'"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loading = resume_from_checkpoint, self.model if model is None else model
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled:  # which has files of its own
            return
        if not Path(checkpoint, SCHEDULER_NAME).is_file() and self.is_world_process_zero():
            warnings.warn(
                f"resume_from_checkpoint: {checkpoint} has no {SCHEDULER_NAME}, as where "
                "save_only_model is set: the optimizer and the schedule of the learning rate begin "
                f"anew, at step {self.state.global_step}, and the run is not the one that was "
                "interrupted: save without save_only_model, or begin a run with that folder as "
                "model",
                stacklevel=2,
            )

    def _load_best_model(self) -> None:
        self._loading = self.state.best_model_checkpoint, self.model
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """transformers calls this with the names that were missing or unexpected."""
        if not load_result.unexpected_keys:
            super()._issue_warnings_after_load(load_result)
            return
        folder, model = self._loading
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())
