"""Checkpoints of models whose weights are saved under other names than they have in the model.

Such are image models and mixtures of experts, which transformers saves under their original names.
Its `Trainer` loads a checkpoint without the renaming of `from_pretrained`, keeps what it has where
a name is missing, and goes on: from the weights in hand, with a line in the log.
"""

from typing import Any

from trl import DistillationTrainer  # type: ignore[attr-defined]


class RenamedCheckpoints(DistillationTrainer):
    """`DistillationTrainer` that resumes, and loads the best checkpoint, by `from_pretrained` where
    the names differ."""

    _loading: tuple[str, Any]  # the folder that is being loaded, and into which model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loading = resume_from_checkpoint, self.model if model is None else model
        super()._load_from_checkpoint(resume_from_checkpoint, model)

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
