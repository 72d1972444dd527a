"""The trainer's side of reward functions: when they are called, and what is logged.

The advantages of a generation batch become a field of it, which TRL shuffles and splits with the
completions and the loss takes as `task_advantages` of all tokens. Names and meaning of the logged
values are GRPO's:

    rewards/NAME/mean, /std     of one function, over the completions that it judges
    reward, reward_std          of the weighted sum
    frac_reward_zero_std        share of the groups whose rewards are equal, which teach nothing

A standard deviation is over a generation batch, as GRPO's: where a log covers several, it has the
mean of theirs. In an evaluation it is over all completions, whatever the batches.

An evaluation writes one completion of a prompt: its rewards are logged, its advantages are 0, and
its loss is without a `reward_filter`, which would leave nothing of it.
"""

from typing import Any

from torch import Tensor
from trl import is_conversational  # type: ignore[attr-defined]
from trl.chat_template_utils import parse_response
from trl.trainer.utils import nanstd

from . import metrics
from .generation import unpadded
from .guidance import GuidedTrainer
from .verifier import Verifier, group_advantages


class RewardedTrainer(GuidedTrainer):
    """`GuidedTrainer` whose completions a `Verifier` may judge, beside the teacher."""

    _verifier: Verifier | None = None

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._verifier is None:
            return output
        prompts, ids = (unpadded(output, part) for part in ("prompt", "completion"))
        found = self._verifier.rewards(inputs, self._answers(inputs, prompts, ids), ids)
        generations = self.args.num_generations if self.model.training else 1
        advantages, total, equal = group_advantages(
            found, self._verifier.reward_weights, generations, self.args.scale_rewards
        )
        self._log_rewards(found.double(), total, equal, len(inputs))
        first = self.accelerator.process_index * len(inputs)
        output["task_advantages"] = advantages[first : first + len(inputs)].float()
        return output

    def _answers(self, rows: list[dict], prompts: list, ids: list[list[int]]) -> list[Any]:
        """Completions as GRPO gives them to its functions: text, or a list of one message."""
        if not is_conversational(rows[0]):
            return self.processing_class.batch_decode(ids, skip_special_tokens=True)
        tokenizer = self._tokenizer
        if any(getattr(tokenizer, f"response_{kind}", None) for kind in ("template", "schema")):
            return [
                [parse_response(tokenizer, own, prefix=prompt)] for prompt, own in zip(prompts, ids)
            ]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _log_rewards(self, found: Tensor, total: Tensor, equal: Tensor, rows: int) -> None:
        assert self._verifier is not None
        if not self.model.training:
            counted = self.accelerator.gather(metrics.first_occurrences(self.accelerator, rows))
            found, total = found[counted], total[counted]
        each = zip(self._verifier.reward_func_names, found.unbind(1))
        values = [(f"rewards/{name}/mean", f"rewards/{name}/std", own) for name, own in each]
        sums, spreads = {}, {}
        for mean, std, own in [*values, ("reward", "reward_std", total)]:
            known = own[~own.isnan()]
            sums[mean] = (known.sum().item(), float(len(known)))
            spreads[std] = own
        if self.model.training:
            sums["frac_reward_zero_std"] = (equal.sum().item(), float(len(equal)))
            stds = {name: nanstd(own).item() for name, own in spreads.items()}
            self.log_values({name: std for name, std in stds.items() if std == std})
        else:
            self.log_spreads(spreads)
        self.log_sums(sums | self._verifier.metrics())
