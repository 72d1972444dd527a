"""Teacher and students, trained from scratch by cross-entropy on written solutions, and cached.

    teacher   2 layers of width 96, in its own notation, until it hardly errs; it has also read
              mistakes, so that it knows how to go on after a student's
    near      2 layers of width 64, only in the teacher's notation, stopped early
    middle    the same student, longer; two fifths of its steps are in the teacher's notation, the
              others in the bad one
    far       likewise, with a tenth in the teacher's notation
    itself    the teacher: what an objective does to a student who has nothing to learn

Each seed of the experiment has a student of its own, but for the last: another initialisation,
other problems.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from . import task

_IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """How a model is made. `share`: of steps in the teacher's notation; None: `task.lesson`."""

    width: int
    share: float | None
    steps: int
    batch: int = 64
    learning_rate: float = 3e-3
    layers: int = 2
    task: str = "short"


#: One for each task.
TEACHERS = {name: Recipe(width=96, share=None, steps=1500, task=name) for name in task.TASKS}
STUDENTS = {
    "near": Recipe(width=64, share=1.0, steps=150),
    "middle": Recipe(width=64, share=0.4, steps=800),
    "far": Recipe(width=64, share=0.1, steps=800),
    "long_tail_near": Recipe(width=64, share=1.0, steps=200, task="long_tail"),
    "long_tail_far": Recipe(width=64, share=0.1, steps=800, task="long_tail"),
    "foreign": Recipe(width=64, share=0.0, steps=800, task="remarks"),
    "long_tail_itself": TEACHERS["long_tail"],
}


def load_teacher(task_name: str, folder: Path) -> LlamaForCausalLM:
    return load(TEACHERS[task_name], 0, folder)


def load_student(mismatch: str, seed: int, folder: Path) -> LlamaForCausalLM:
    """One of its own for each seed, but where the student is its teacher already."""
    recipe = STUDENTS[mismatch]
    if recipe == TEACHERS[recipe.task]:
        return load_teacher(recipe.task, folder)
    return load(recipe, seed, folder)


def load(recipe: Recipe, seed: int, folder: Path) -> LlamaForCausalLM:
    """The model of this recipe and seed, from `folder` or trained now."""
    name = "_".join(str(value) for value in vars(recipe).values())
    path = folder / f"model_{name}_seed{seed}.pt"
    model = build(recipe, seed)
    if not path.exists():
        pretrain(model, recipe, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), part)
        part.replace(path)  # a worker that is stopped leaves no half of a model
    model.load_state_dict(torch.load(path))
    return model.eval()


def build(recipe: Recipe, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(task.TASKS[recipe.task].tokens),
            hidden_size=recipe.width,
            intermediate_size=3 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            pad_token_id=task.PAD,
            bos_token_id=task.BOS,
            eos_token_id=task.EOS,
            tie_word_embeddings=False,
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=task.EOS, pad_token_id=task.PAD, bos_token_id=task.BOS
    )
    return model


def pretrain(model: LlamaForCausalLM, recipe: Recipe, seed: int) -> None:
    """AdamW, the learning rate on one cosine to 0 after a short warm-up."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    model.train()
    for _ in range(recipe.steps):
        ids, labels = _batch(rng, recipe)
        logits = model(ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _batch(rng: random.Random, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T), padded on the right, and labels (B, T), ignored on the prompts."""
    rows, labels = [], []
    writing = task.TASKS[recipe.task]
    for _ in range(recipe.batch):
        problem = task.draw(rng)
        if recipe.share is None:
            text, right = writing.lesson(problem, rng)
        else:
            text = right = writing.habit(problem, rng, recipe.share)
        asked = [writing.ids[token] for token in task.prompt(problem)]
        fill = writing.longest - len(text)
        rows.append(asked + [writing.ids[token] for token in text] + [task.PAD] * fill)
        counted = [writing.ids.get(token, _IGNORED) for token in right]
        labels.append([_IGNORED] * len(asked) + counted + [_IGNORED] * fill)
    return torch.tensor(rows), torch.tensor(labels)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, writing: task.Task = task.SHORT) -> dict[str, float]:
    """Greedy decoding of the held-out problems: shares that are right, and in the teacher's
    notation."""
    training = model.training
    model.eval()
    problems = task.held_out()
    prompts = torch.tensor([[writing.ids[t] for t in task.prompt(p)] for p in problems])
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=writing.longest,
        do_sample=False,
    )
    model.train(training)
    right = own = 0
    for problem, row in zip(problems, ids[:, prompts.shape[1] :].tolist()):
        written = [writing.tokens[i] for i in row if i != task.PAD]
        right += task.is_right(problem, written)
        own += writing.is_own_notation(written)
    return {"accuracy": right / len(problems), "notation": own / len(problems)}
