"""Gradients from a sample of the ids: their error and the time that they save, on real text.

    python -m benchmarks.tolerance                 all; writes benchmarks/results/tolerance_cpu.json
    python -m benchmarks.tolerance table           only the table; "training": only the learning

table     A student writes completions, and one call makes the loss's gradients with each option.
          Two students of SmolLM2-135M-Instruct: "near", a copy whose matrices were moved by noise
          (late in training, or a larger model of the same family), and "far", the demonstration's
          third of its layers before any training. Sampled at two temperatures, which are the
          loss's, too. Errors are relative to the gradients of all ids, in float32, whose rounding
          is below them, and "stated" is what the call says of them without knowing. Times are
          seconds of the processor, which other processes on the machine disturb least, as ratios to
          the exact call in interleaved runs; of TrOPD only, with the teacher's hidden states and
          with its top 64, and in bfloat16 where the CPU has products of it.
training  The demonstration's student learns for some steps with each option, over several seeds.
          KL to the teacher before and after: KL(teacher || student) on the teacher's own
          completions, the same for all, and KL(student || teacher) on the student's. Seeds can be
          run apart, `training --seed 1 --seeds 1`: those that the file holds stay.

Needs the model that `examples.demo` installs. Shares depend on the text; nothing here is a bound.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.dtypes import default_dtype
from benchmarks.measure import machine
from examples.demo.__main__ import CACHE
from examples.demo.compare import Batch, make_batch
from examples.demo.model import load_teacher, make_student
from examples.demo.prompts import PROMPTS
from examples.demo.rollout import Rollout, completion_hidden, sample
from examples.demo.run import prompt_batches
from examples.demo.train import train
from tropd_kernels import (
    GKD,
    OPD,
    HiddenTeacher,
    TopKTeacher,
    TrOPD,
    linear_distillation_loss,
    native,
)
from tropd_kernels.functional import DistillationOutput
from tropd_kernels.heads import read_head
from tropd_kernels.teachers import Teacher

OUTPUT = Path(__file__).parent / "results" / "tolerance_cpu.json"
TOLERANCES = (3e-3, 1e-2, 3e-2, 1e-1)
SAMPLES = (0.2, 0.1, 0.05)
EXACT = "exact"
#: Of the teacher's 30, that the student keeps which is far from it.
STUDENT_LAYERS = 10
#: Standard deviation of the noise that makes the near student, relative to each matrix's own.
NOISE = 0.03
OBJECTIVES = {"TrOPD": TrOPD(), "OPD": OPD(), "GKD": GKD()}
TEMPERATURES = (1.0, 0.7)
#: The objective whose calls are timed: the others differ only in the passes over rows.
TIMED = "TrOPD"
TOP_K = 64
#: Options with which the student learns.
ARMS = {
    EXACT: {},
    "tolerance 0.01": {"gradient_tolerance": 0.01},
    "tolerance 0.1": {"gradient_tolerance": 0.1},
    "sampling 0.1": {"gradient_sampling": 0.1},
}

#: Seeds what the KLs are read on, which is the same for every run.
READING = 0

Model = torch.nn.Module


def choices() -> dict[str, dict]:
    """Options by name: what the table compares."""
    found: dict[str, dict] = {EXACT: {}}
    found |= {f"tolerance {t:g}": {"gradient_tolerance": t} for t in TOLERANCES}
    return found | {f"sampling {f:g}": {"gradient_sampling": f} for f in SAMPLES}


def top_k_teacher(batch: Batch, temperature: float) -> TopKTeacher:
    logits = batch.teacher_hidden.float() @ batch.teacher_weight.float().T / temperature
    log_probs = torch.log_softmax(logits, dim=-1)
    values, ids = log_probs.topk(TOP_K)
    return TopKTeacher(ids, values, log_probs.gather(1, batch.labels[:, None])[:, 0])


def loss_and_gradients(
    batch: Batch,
    objective: str,
    temperature: float,
    options: dict,
    seed: int = 0,
    teacher: Teacher | None = None,
) -> tuple[DistillationOutput, Tensor, Tensor]:
    hidden, weight = (t.detach().requires_grad_() for t in (batch.hidden, batch.weight))
    out = linear_distillation_loss(
        hidden,
        weight,
        batch.labels,
        teacher or HiddenTeacher(batch.teacher_hidden, batch.teacher_weight),
        OBJECTIVES[objective],
        temperature=temperature,
        uniforms=batch.uniforms,
        seed=seed,
        **options,
    )
    return out, *torch.autograd.grad(out.loss, (hidden, weight))


# --- the table -----------------------------------------------------------------------------------


def noisy(model: Model, seed: int) -> Model:
    """Moves every matrix of the model by noise, in place."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter += NOISE * parameter.std() * noise
    return model


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in vars(batch).items()}
    return Batch(**values | {"uniforms": batch.uniforms})


def processor_times(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of all threads, run in turn, after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for counts in [False] + [True] * repeats:
        for name, run in runs.items():
            start = time.process_time()
            run()
            if counts:
                seconds[name].append(time.process_time() - start)
    return seconds


def time_table(batch: Batch, temperature: float, repeats: int) -> dict[str, dict]:
    dtype = torch.bfloat16 if native.BF16_PRODUCTS else torch.float32
    run = partial(loss_and_gradients, in_dtype(batch, dtype), TIMED, temperature)
    teachers = {"hidden": None, "top_k": top_k_teacher(batch, temperature)}
    times = processor_times(
        {
            (name, form): partial(run, options, teacher=teacher)
            for name, options in choices().items()
            for form, teacher in teachers.items()
        },
        repeats,
    )
    exact = {form: statistics.median(times[EXACT, form]) for form in teachers}
    return {
        name: {
            "seconds": {form: times[name, form] for form in teachers},
            "time_ratio": {
                form: statistics.median(times[name, form]) / exact[form] for form in teachers
            },
            "timed_dtype": str(dtype).removeprefix("torch."),
        }
        for name in choices()
    }


def error_table(batch: Batch, objective: str, temperature: float, repeats: int) -> list[dict]:
    """One entry for each option."""
    run = partial(loss_and_gradients, batch, objective, temperature)
    exact, d_hidden, d_weight = run({})
    times = time_table(batch, temperature, repeats) if objective == TIMED else {}
    entries = []
    for name, options in choices().items():
        entry = {"option": name, **times.get(name, {})}
        if options:
            out, *gradients = run(options)
            errors = [
                float((ours - truth).norm() / truth.norm())
                for ours, truth in zip(gradients, (d_hidden, d_weight))
            ]
            entry |= {
                "share": float(out.gradient_share),
                "stated_error": float(out.gradient_error),
                "d_hidden_error": errors[0],
                "d_weight_error": errors[1],
            }
        else:
            entry["reverse_kl"] = float(exact.stats.reverse_kl.mean())
            entry["entropy"] = float(exact.stats.entropy.mean())
        entries.append(entry)
    return entries


def table(teacher: Model, tokenizer, new_tokens: int, repeats: int, seed: int) -> Iterator[dict]:
    layers = teacher.config.num_hidden_layers
    students = {
        "near": noisy(make_student(teacher, layers), seed),
        "far": make_student(teacher, STUDENT_LAYERS),
    }
    for (name, student), temperature in product(students.items(), TEMPERATURES):
        torch.manual_seed(seed)
        rollout = sample(student, tokenizer, list(PROMPTS), new_tokens, temperature)
        batch = make_batch(student, teacher, rollout, seed=seed, dtype=torch.float32)
        for objective in OBJECTIVES:
            case = {
                "student": name,
                "temperature": temperature,
                "objective": objective,
                "tokens": len(batch.labels),
                "vocab_size": len(batch.weight),
                "hidden_size": batch.weight.shape[1],
                "options": error_table(batch, objective, temperature, repeats),
            }
            print_case(case)
            yield case


def print_case(case: dict) -> None:
    exact = case["options"][0]
    print(
        f"\n{case['student']} student, temperature {case['temperature']:g}, {case['objective']}, "
        f"{case['tokens']} tokens: KL(student || teacher) {exact['reverse_kl']:.3f}, entropy "
        f"{exact['entropy']:.2f} nats"
    )
    print("  option            ids kept   stated  d_hidden  d_weight   time  time, top 64")
    for row in case["options"][1:]:
        times = row.get("time_ratio")
        print(
            f"  {row['option']:<16} {row['share']:>9.1%} {row['stated_error']:>8.1e} "
            f"{row['d_hidden_error']:>9.1e} {row['d_weight_error']:>9.1e}"
            + (f" {times['hidden']:>6.2f} {times['top_k']:>13.2f}" if times else ""),
            flush=True,
        )


# --- training ------------------------------------------------------------------------------------


@torch.no_grad()
def mean_kl(student: Model, teacher: Model, rollout: Rollout, direction: str) -> float:
    """Exact, over the vocabulary; mean over the completions' tokens."""
    student_head, teacher_head = read_head(student), read_head(teacher)
    out = linear_distillation_loss(
        completion_hidden(student_head.backbone, rollout),
        student_head.weight,
        rollout.labels,
        HiddenTeacher(completion_hidden(teacher_head.backbone, rollout), teacher_head.weight),
        OPD(),
    )
    counts = rollout.labels >= 0
    return float(getattr(out.stats, direction)[counts].mean())


def pick_training_dtype() -> torch.dtype:
    """Of the models too, whose products are torch's, not ours."""
    return default_dtype()[0] if native.BF16_PRODUCTS else torch.float32


def learn(
    student: Model, teacher: Model, tokenizer, batches: Iterator[list[str]], steps: int,
    new_tokens: int, seed: int, options: dict,
) -> float:  # fmt: skip
    """Trains by the demonstration's loop; returns the share of the head's columns that entered the
    gradient products."""
    run = train(
        student, teacher, tokenizer, batches, steps=steps, new_tokens=new_tokens, seed=1000 * seed,
        dtype=pick_training_dtype(), **options,
    )  # fmt: skip
    return statistics.mean(step.gradient_share for step in run)


def training(
    teacher: Model, tokenizer, steps: int, seeds: int, new_tokens: int, seed: int
) -> Iterator[dict]:
    torch.manual_seed(READING)
    asked = list(PROMPTS)[:8]
    text = sample(teacher, tokenizer, asked, new_tokens)
    student = make_student(teacher, STUDENT_LAYERS)
    torch.manual_seed(READING)
    before = {
        "forward_kl": mean_kl(student, teacher, text, "forward_kl"),
        "reverse_kl": mean_kl(
            student, teacher, sample(student, tokenizer, asked, new_tokens), "reverse_kl"
        ),
    }
    print(f"\nbefore: {before}", flush=True)
    for at, (name, options) in product(range(seeds), ARMS.items()):
        torch.manual_seed(seed + at)
        student = make_student(teacher, STUDENT_LAYERS)
        batches = prompt_batches(PROMPTS, 4)
        share = learn(student, teacher, tokenizer, batches, steps, new_tokens, seed + at, options)
        torch.manual_seed(READING)
        written = sample(student, tokenizer, asked, new_tokens)
        run = {
            "option": name,
            "seed": seed + at,
            "steps": steps,
            "share": share,
            "before": before,
            "forward_kl": mean_kl(student, teacher, text, "forward_kl"),
            "reverse_kl": mean_kl(student, teacher, written, "reverse_kl"),
        }
        print(run, flush=True)
        yield run


def print_learning(runs: list[dict]) -> None:
    """Mean and standard deviation over seeds, and the mean difference to the exact run of the same
    seed with its standard error."""
    exact = {run["seed"]: run for run in runs if run["option"] == EXACT}
    runs = [run for run in runs if run["seed"] in exact]
    for name, kl in product(ARMS, ("forward_kl", "reverse_kl")):
        mine = [run for run in runs if run["option"] == name]
        values = [run[kl] for run in mine]
        paired = [run[kl] - exact[run["seed"]][kl] for run in mine]
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
        print(
            f"  {name:<16} {kl}  {mine[0]['before'][kl]:.3f} -> {statistics.mean(values):.3f} "
            f"± {spread:.3f}   minus exact {statistics.mean(paired):+.3f} ± {error:.3f}"
        )


# --- both ----------------------------------------------------------------------------------------


def main() -> None:
    options = parse()
    teacher, tokenizer = load_teacher(CACHE)
    command = "python -m benchmarks.tolerance " + " ".join(options.parts)
    for part in options.parts:
        if part == "table":
            cases = table(teacher, tokenizer, options.tokens, options.repeats, options.seed)
        else:
            cases = training(
                teacher, tokenizer, options.steps, options.seeds, options.training_tokens,
                options.seed,
            )  # fmt: skip
        settings = {k: v for k, v in vars(options).items() if k not in ("output", "parts")}
        about = {"command": command, "settings": settings, "machine": machine()}
        found = []
        for case in cases:  # kept as they come: the whole takes long
            found.append(case)
            # Read now: the other part may have been written meanwhile, and other seeds' training.
            results = json.loads(options.output.read_text()) if options.output.exists() else {}
            others = results.get(part, {}).get("cases", []) if part == "training" else []
            mine = [run["seed"] for run in found] if part == "training" else []
            kept = [run for run in others if run["seed"] not in mine]
            results[part] = about | {"cases": kept + found}
            options.output.write_text(json.dumps(results, indent=1) + "\n")
        if part == "training":
            print_learning(kept + found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tolerance",
        description="Gradients from a sample of the ids, on real completions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", default=["table", "training"], metavar="table | training")
    add("--tokens", type=int, default=100, help="longest completion of the table's rollouts")
    add("--repeats", type=int, default=5, help="timed runs of each option")
    add("--steps", type=int, default=24, help="training steps")
    add("--seeds", type=int, default=3, help="training runs of each option")
    add("--training-tokens", type=int, default=24, help="longest completion in training")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if unknown := set(options.parts) - {"table", "training"}:
        parser.error(f"parts are table and training, got {' '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
