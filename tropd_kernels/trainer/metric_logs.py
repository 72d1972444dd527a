"""Which values a log reports: quotients, extremes, spreads, and exact means of an evaluation."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer  # type: ignore[attr-defined]
from trl.trainer.utils import nanstd

from . import metrics


class MetricLogs(DistillationTrainer):
    """`DistillationTrainer` whose logged means divide a sum by a count only when they are logged.

    TRL reports means of means, in which a batch of few tokens weighs as much as any other.
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._sums: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}
        self._spread_over: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        # Sum and count.
        self._eval_loss_sums = torch.zeros(2, dtype=torch.float32, device=self.accelerator.device)
        self._eval_rows_seen = 0
        self._eval_set = ""  # name of the data set under evaluation, where there are several

    @property
    def mode(self) -> str:
        """ "train" or "eval": the key of TRL's metrics."""
        return "train" if self.model.training else "eval"

    def log_values(self, values: dict[str, float]) -> None:
        """Adds values to those that TRL averages and reports at the next log."""
        for name, value in values.items():
            self._metrics[self.mode][name].append(value)

    def log_sums(self, sums: metrics.Sums) -> None:
        """Adds sums and counts, whose quotients the next log reports.

        A quotient replaces TRL's metric of the same name. A metric with count 0 is left out.
        """
        known = self._sums[self.mode]
        for name, (value, count) in sums.items():
            before = known.get(name, (0.0, 0.0))
            known[name] = before[0] + value, before[1] + count

    def log_spreads(self, values: Mapping[str, Tensor]) -> None:
        """Adds values (N,), whose standard deviation over all that were added the next log reports.

        NaNs are left out, and so is the deviation of fewer than two values.
        """
        known = self._spread_over[self.mode]
        for name, own in values.items():
            known[name] = torch.cat([known[name], own]) if name in known else own

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        reported, sums = self._metrics[self.mode], self._sums[self.mode]
        for name, extreme in metrics.EXTREMES.items():  # TRL would log their mean
            if values := reported.get(name):
                reported[name] = [extreme(values)]
        reported |= {name: [total / count] for name, (total, count) in sums.items() if count}
        spreads = {name: nanstd(own).item() for name, own in self._spread_over[self.mode].items()}
        reported |= {name: [value] for name, value in spreads.items() if not math.isnan(value)}
        for name in sums.keys() & reported.keys():  # TRL's mean over tokens of which one is unknown
            if math.isnan(sum(reported[name])):
                del reported[name]
        sums.clear()
        self._spread_over[self.mode].clear()
        if self.mode == "eval" and self._eval_set:
            # TRL gives every data set's metrics the same names: evaluate() would return the last's.
            for name in list(reported):
                reported[f"{self._eval_set}_{name}"] = reported.pop(name)
        super().log(logs, start_time)

    def get_train_dataloader(self):
        self._forget("train")
        return super().get_train_dataloader()

    def _forget(self, mode: str) -> None:
        """Drops what an earlier loop left unlogged, which an exception may have ended."""
        self._sums[mode].clear()
        self._spread_over[mode].clear()
        self._metrics[mode].clear()

    def evaluation_loop(self, *arguments, **keywords):
        self._forget("eval")
        self._eval_rows_seen = 0
        self._eval_loss_sums.zero_()
        key = keywords.get("metric_key_prefix", "")
        self._eval_set = key.removeprefix("eval_") if key.startswith("eval_") else ""
        output = super().evaluation_loop(*arguments, **keywords)
        total, count = self.accelerator.reduce(self._eval_loss_sums, reduction="sum").tolist()
        if f"{key}_loss" in output.metrics and count:
            output.metrics[f"{key}_loss"] = total / count  # over tokens; TRL's is over batches
        return output

    def predict(self, *arguments, **keywords):
        found = super().predict(*arguments, **keywords)
        self._forget("eval")  # or the next evaluation would report the mean of both
        return found
