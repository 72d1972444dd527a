"""Reward functions of whole completions, as GRPO has them, and the advantages made of them.

    r = sum over functions of reward_weights * reward
    A = (r - mean of the group) / (its standard deviation + 1e-4)        scale_rewards "group"

A group is the `num_generations` completions of a prompt. The functions, and what they are called
with, are those of TRL's `GRPOTrainer`, whose method calls them.
"""

import atexit
import contextlib
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import GRPOTrainer  # type: ignore[attr-defined]
from trl.trainer.utils import (
    get_config_model_id,
    is_async_callable,
    nanstd,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

from .chat_templates import check_contents
from .metrics import is_own
from .sharding import holds_on_all, prepare_frozen, reshard
from .sources import named_errors
from .stops import how_to_resume

#: GRPO's, beside the standard deviation.
_EPSILON = 1e-4


def group_advantages(
    rewards: Tensor,  # (N, F), the completions of a prompt beside each other; NaN: not judged
    weights: Tensor,  # (F,)
    generations: int,
    scale: str,  # "group", "batch" or "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's advantages (N), rewards (N), and which groups have equal rewards (N / generations).

    A completion that no function judges has the advantage 0, and is left out of means and standard
    deviations. So has one of a group of equal rewards, to the bit: the sign of a rounding error
    would pass a `reward_filter`. In float64.
    """
    rewards = rewards.double()
    total = (rewards * weights.to(rewards)).nansum(1).masked_fill(rewards.isnan().all(1), math.nan)
    groups = total.view(-1, generations)
    spread = nanstd(groups, dim=1, keepdim=True)
    missing = groups.isnan()
    high = groups.masked_fill(missing, -math.inf).amax(1, keepdim=True)
    low = groups.masked_fill(missing, math.inf).amin(1, keepdim=True)
    # Also where fewer than two are judged. The rounding of a mean of large sums is not in it.
    equal = ~(high - low > (1e-12 * high.abs()).clamp(min=1e-8))
    advantages = groups - groups.nanmean(1, keepdim=True)
    if scale != "none":
        advantages = advantages / ((nanstd(total) if scale == "batch" else spread) + _EPSILON)
    advantages = advantages.masked_fill(equal | missing, 0.0)
    return advantages.flatten(), total, equal.flatten()


class Verifier(GRPOTrainer):
    """Reward functions, called by GRPO's method on the state of another trainer.

    It is never initialized as a trainer: what it does not have is looked up in that one.
    """

    args: Any
    reward_funcs: Any

    def __init__(self, trainer: Any, functions: Mapping[str, Any], tokenizers: Any):
        self._trainer, self.environments = trainer, None
        self._failures: list[tuple[str, Exception]] = []
        self._pending_metrics: Any = defaultdict(list)
        given = tokenizers if isinstance(tokenizers, (list, tuple)) else [tokenizers]
        self.reward_processing_classes = [*given] if given != [None] else [None] * len(functions)
        self.reward_funcs, self.reward_func_names = [*functions.values()], [*functions]
        for place, (name, function) in enumerate(functions.items()):
            if isinstance(function, (str, nn.Module)):
                self._prepare_model(place, name, function)
            else:
                self.reward_funcs[place] = self._guarded(name, function)
        self._own_metrics = {
            f"rewards/{name}/{what}" for name in self.reward_func_names for what in ("mean", "std")
        }
        weights = trainer.args.reward_weights or [1.0] * len(functions)
        self.reward_weights = torch.tensor(weights, dtype=torch.float64)
        if any(map(is_async_callable, self.reward_funcs)):
            thread, self.async_loop, ready = start_event_loop_in_daemon("reward functions")
            ready.wait()
            atexit.register(shutdown_event_loop_in_daemon, thread, self.async_loop)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_trainer"], name)

    def rewards(self, rows: list[dict], completions: list, ids: list[list[int]]) -> Tensor:
        """Rewards (N, F) of the completions of all processes, in their order. A collective.

        Raises ValueError, on every process, if a function, model or tokenizer fails on any, or
        returns no rewards, or one that is no finite number in float32, in which GRPO gathers them.
        """
        prompts = [row["prompt"] for row in rows]
        try:
            self._check_contents(prompts, completions)
            found = self._calculate_rewards(rows, prompts, completions, ids)
        except Exception as error:  # before its only collective, in which the others wait
            where = "in a reward model's tokenizer or a row's columns"
            self._failures.append((f"{where}: {type(error).__name__}: {error}", error))
            nothing = torch.zeros(len(rows), len(self.reward_funcs), dtype=torch.float32)
            found = self.accelerator.gather(nothing.to(self.accelerator.device))
        for function in self.reward_funcs:
            if isinstance(function, _GuardedModel):
                reshard(function.model)
        failures, self._failures = self._failures, []
        if not holds_on_all(self.accelerator, not failures):
            text, cause = failures[0] if failures else ("one on another process failed", None)
            raise ValueError(f"reward_funcs: {text}{self._how_to_resume()}") from cause
        self._check_finite(found)
        return found

    def _check_contents(self, prompts: list, completions: list) -> None:
        """Raises ValueError for messages that a reward model's chat template does not read."""
        if isinstance(prompts[0], list):
            whole = [prompt + own for prompt, own in zip(prompts, completions)]
            for judge, tokenizer in zip(self.reward_funcs, self.reward_processing_classes):
                if isinstance(judge, nn.Module):
                    check_contents(whole, tokenizer, **self._trainer.chat_template_kwargs)

    def _check_finite(self, found: Tensor) -> None:
        """Of gathered rewards, which all processes have, so that all raise."""
        judges = zip(self.reward_func_names, self.reward_funcs, found.unbind(1))
        for name, function, own in judges:
            # NaN stands for a function's None; a model has none.
            bad = ~own.isfinite() if isinstance(function, nn.Module) else own.isinf()
            if bad.any():
                place = int(bad.nonzero()[0])
                raise ValueError(
                    f"reward_funcs: {name}: its reward of completion {place} of all processes is "
                    f"{own[place].item()} in float32: expected a finite number"
                    f"{self._how_to_resume()}"
                )

    def _how_to_resume(self) -> str:
        return f"; then {how_to_resume(self.args.output_dir)}" if self.is_in_train else ""

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Sums and counts of what the functions gave to `log_metric`. A collective."""
        sums = {}
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.pop(name, [])
            local = torch.tensor([sum(values), float(len(values))], dtype=torch.float32)
            local = local.to(self.accelerator.device)
            total, count = self.accelerator.reduce(local, reduction="sum").tolist()
            sums[name] = total, count
        return sums

    def _log_metric(self, name: str, value: Any) -> None:
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(number, Real):
            raise TypeError(f"log_metric: {name!r}: expected a number, got {value!r:.80}")
        if is_own(name) or name in self._own_metrics:
            raise ValueError(
                f"log_metric: {name!r} is logged by the trainer itself: give the metric another "
                "name"
            )
        super()._log_metric(name, number)  # type: ignore[arg-type]

    def _log_completion_extra(self, column: str, values: list) -> None:
        """Of `log_extra`: the table of completions of TRL's distillation has no further columns."""
        warnings.warn(
            f"reward_funcs: log_extra: the column {column!r} is not kept: the table of completions "
            "has only prompts and completions; log_metric keeps numbers",
            stacklevel=3,
        )

    def _prepare_model(self, place: int, name: str, model: Any) -> None:
        """Loads and prepares a reward model, and its tokenizer, as GRPO does."""
        options = {"trust_remote_code": self.args.trust_remote_code}
        if isinstance(model, str):
            with named_errors(f"reward_funcs: {model}"):
                model = AutoModelForSequenceClassification.from_pretrained(
                    model, num_labels=1, **options
                )
        tokenizer = self.reward_processing_classes[place]
        if tokenizer is None:
            source = get_config_model_id(model.config)
            with named_errors(f"reward_funcs: the tokenizer of {source}"):
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The reward is read at the last token that is no padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.reward_processing_classes[place] = tokenizer
        prepared = prepare_frozen(model.eval(), self.accelerator)
        self.reward_funcs[place] = _GuardedModel(prepared, partial(self._keeping_failure, name))

    @contextlib.contextmanager
    def _keeping_failure(self, name: str) -> Iterator[None]:
        """Inside, an error is kept for `rewards`: the other processes wait in a gather."""
        try:
            yield
        except Exception as error:
            self._failures.append((f"{name}: {type(error).__name__}: {error}", error))

    def _guarded(self, name: str, function: Callable) -> Callable:
        """The function, with rewards of 0 where it fails."""

        def call(**given: Any) -> list:
            answer: list = [0.0] * len(given["completions"])
            with self._keeping_failure(name):
                answer = _checked(function(**given), len(answer))
            return answer

        async def call_async(**given: Any) -> list:
            answer: list = [0.0] * len(given["completions"])
            with self._keeping_failure(name):
                answer = _checked(await function(**given), len(answer))
            return answer

        return call_async if is_async_callable(function) else call


class _GuardedModel(nn.Module):
    """A reward model, with rewards of 0 where it fails."""

    def __init__(self, model: Any, keeping_failure: Callable[[], Any]):
        super().__init__()
        self.model, self._keeping_failure = model, keeping_failure

    def forward(self, **inputs: Any) -> Any:
        zeros = torch.zeros(len(inputs["input_ids"]), 1)
        answer: Any = SequenceClassifierOutput(logits=zeros)  # type: ignore[arg-type]
        with self._keeping_failure():
            answer = self.model(**inputs)
        return answer


def _checked(answer: Any, count: int) -> list[float | None]:
    """Rewards as numbers; None where the function does not judge a completion."""
    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
        raise TypeError(
            f"it returned {answer!r:.80}: expected a list of {count} numbers, one a completion"
        )
    values = [value.item() if hasattr(value, "item") else value for value in answer]
    if len(values) != count:
        raise ValueError(f"it returned {len(values)} rewards for {count} completions")
    for place, value in enumerate(values):
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise ValueError(
                f"its reward of completion {place} is {value!r:.80}: expected a finite number, or "
                "None where it does not judge the completion"
            )
    return values
