"""Which rows each optimizer step trains on: their order, and batches that serve several steps.

As in GRPO, a generation batch has `num_generations` completions of each prompt, and may serve
`num_iterations` optimizer steps. A run that is resumed between those goes on with the same batch,
which each process saves with the checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from trl.trainer.utils import RepeatSampler, repeat_iterable_dataset

from .checkpoints import WholeCheckpoints
from .patching import replaced
from .sharding import holds_on_all


class EpochSampler(RepeatSampler):
    """TRL's sampler with a permutation that is a function of (seed, epoch).

    The seed is the config's `data_seed` if that is given. TRL's sampler draws each epoch's
    permutation from one generator, so a run resumed in its second epoch would see the first one's
    order again. The epoch follows from the optimizer step: `set_epoch` does not come through the
    wrappers that accelerate puts around the sampler of a resumed run.
    """

    trainer: Any  # whose state is another object once training has begun
    steps_per_epoch: int

    def __iter__(self):
        if self.shuffle:
            epoch = self.trainer.state.global_step // max(self.steps_per_epoch, 1)
            self.generator.manual_seed((self.seed or 0) + epoch)
        return super().__iter__()


class BatchReuse(WholeCheckpoints):
    """`DistillationTrainer` with a reproducible order of rows, and several steps per batch."""

    args: Any
    _buffered_inputs: Any

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._eval_dataloaders: dict[str, Any] = {}  # transformers' own, of persistent workers
        if self.args.num_iterations > 1 and isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                "num_iterations: TRL's loader does not repeat the rows of a streaming data set "
                "over several steps: load the data set whole, or leave num_iterations at 1"
            )

    def get_train_dataloader(self):
        # TRL counts micro-batches over all calls of train(), and one may have ended amid a step.
        self._step, self._buffered_inputs = 0, None
        self._current_train_step_time = 0.0
        data, args = self.train_dataset, self.args
        if not isinstance(data, IterableDataset):
            return super().get_train_dataloader()
        if self.shuffle_dataset:  # TRL would do so by `seed`, and would tear the repetitions apart
            data = data.shuffle(seed=args.seed if args.data_seed is None else args.data_seed)
        if args.num_generations > 1:
            data = repeat_iterable_dataset(data, args.num_generations)
        with replaced(self, train_dataset=data, shuffle_dataset=False):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        own = eval_dataset is None or isinstance(eval_dataset, str)
        if own or eval_dataset is self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        # transformers would read the run's own data again, whose persistent workers it keeps.
        with replaced(self, _eval_dataloaders={}):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        if isinstance(test_dataset, IterableDataset):  # transformers' own looks for tensors in rows
            return self.get_eval_dataloader(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _get_train_sampler(self, dataset=None):
        trls: Any = super()._get_train_sampler(dataset)
        iterations, generations = self.args.num_iterations, self.args.num_generations
        # As GRPO's: the batch counts completions. TRL's distillation has one of each prompt.
        sampler = EpochSampler(
            trls.data_source, generations, trls.batch_size // generations,
            trls.repeat_count * iterations, trls.shuffle, trls.seed,
        )  # fmt: skip
        if self.args.data_seed is not None:
            sampler.seed = self.args.data_seed
        batches = sampler.num_samples // sampler.batch_size
        sampler.trainer, sampler.steps_per_epoch = self, batches * iterations
        return sampler

    def _iteration(self) -> int:
        """Index of the next optimizer step among those on the current generation batch."""
        return self.state.global_step % self.args.num_iterations

    def _prepare_inputs(self, generation_batch):
        if self.model.training and self._iteration() and self._buffered_inputs is not None:
            return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        return super()._prepare_inputs(generation_batch)

    def batch_settings(self) -> dict[str, Any]:
        """What a generation batch depends on: a resumed run that goes on with it needs the same."""
        return {
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "per_device_train_batch_size": self._train_batch_size,
            "temperature": self.args.temperature,
        }

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self._iteration() and not self.args.save_only_model:
            output = Path(self._get_output_dir(trial=trial))
            folder = output / f"checkpoint-{self.state.global_step}"
            saved = {"batch": self._buffered_inputs, "settings": self.batch_settings()}
            torch.save(saved, _batch_file(folder, self.accelerator.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint):
        # Not where the model is loaded, which DeepSpeed does by itself.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._buffered_inputs = None
        if not self._iteration():
            return
        file = _batch_file(checkpoint, self.accelerator.process_index)
        # With more processes than before some have no file, with fewer some files have no process:
        # then all processes generate a new batch.
        beyond = _batch_file(checkpoint, self.accelerator.num_processes)
        if holds_on_all(self.accelerator, file.exists() and not beyond.exists()):
            # By type: older torch does not find the "cpu:0" of several processes.
            saved = torch.load(file, map_location=self.accelerator.device.type)
            if isinstance(saved, list):  # of an earlier revision
                saved = {"batch": saved, "settings": {}}
            batch, was, now = saved["batch"], saved["settings"], self.batch_settings()
            if not holds_on_all(self.accelerator, was.items() >= now.items()):
                raise _resume_error(was, now, checkpoint)
            known = all("task_advantages" in part for part in batch)
            if self.args.uses_task_advantages and not known:
                raise ValueError(
                    f"resume_from_checkpoint: {checkpoint} was saved without reward_funcs between "
                    "the steps on a generation batch, which num_iterations goes on with: leave "
                    "reward_funcs out, or delete generation_batch_*.pt there to have a new one "
                    "written"
                )
            self._buffered_inputs = batch


def _batch_file(folder: str | Path, process: int) -> Path:
    return Path(folder, f"generation_batch_{process}.pt")


def _resume_error(was: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str) -> ValueError:
    """For a saved batch of other settings than the run's, which would train on some of its rows and
    never on the rest, compare its tokens at another temperature, or ask others of the teachers."""
    keys = [key for key in now if was.get(key) != now[key]]
    old, new = (" and ".join(str(of.get(key, "unknown")) for key in keys) for of in (was, now))
    return ValueError(
        f"resume_from_checkpoint: {checkpoint} was saved between the steps on a generation batch "
        f"with {' and '.join(keys)} {old}; now {new}, and num_iterations goes on with that "
        "batch: set that as it was, or delete generation_batch_*.pt there to have a new one written"
    )
