"""The student writes completions to the prompts; teacher and student then read them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Rollout:
    """A batch of sequences: prompts padded on the left, completions padded on the right.

    input_ids       (B, P + T)   prompt and completion
    attention_mask  (B, P + T)   0 on padding
    labels          (B, T)       the completions; -100 after a completion's end
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@torch.no_grad()
def sample(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
) -> Rollout:
    """Completions drawn from the student's own distribution, at the loss's temperature and with
    nothing cut off; `greedy` takes the likeliest token each time, to show what a model says.

    The loss takes the labels for such samples, which top-k or nucleus sampling would not give.
    """
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(student.device)
    end = tokenizer.eos_token_id
    how = {"do_sample": False}
    if not greedy:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    input_ids = student.generate(**batch, **how, max_new_tokens=new_tokens, pad_token_id=end)
    completions = input_ids[:, batch["input_ids"].shape[1] :]
    # The first end token is part of the completion; later ones are padding, which has the same id.
    is_end = (completions == end).long()
    ended_before = is_end.cumsum(-1) - is_end > 0
    return Rollout(
        input_ids=input_ids,
        attention_mask=torch.cat([batch["attention_mask"], (~ended_before).long()], dim=-1),
        labels=completions.masked_fill(ended_before, IGNORE_INDEX),
    )


def completion_hidden(backbone: torch.nn.Module, rollout: Rollout) -> Tensor:
    """Last hidden states (B, T, H), each at the place of the label that it predicts."""
    mask = rollout.attention_mask
    hidden = backbone(
        input_ids=rollout.input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # padding on the left takes no place
        use_cache=False,
    ).last_hidden_state
    # A state predicts the token after it: start one before the completion and stop one early.
    return hidden[:, -rollout.labels.shape[1] - 1 : -1]
