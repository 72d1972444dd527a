"""The trainer: TRL's `DistillationTrainer` with this package's losses and off-policy guidance.

| file               | content                                                               |
|--------------------|-----------------------------------------------------------------------|
| config.py          | `TrOPDConfig`: every setting, checked before a model is loaded        |
| own_rule.py        | a rule of one's own as the objective, or a schedule of rules          |
| config_checks.py   | checks of its values, and of how they go together                     |
| recipes.py         | what publications state of a run, and what overrules it               |
| effects.py         | settings without effect, which are refused                            |
| generation_keys.py | the keys of `generation_kwargs`                                       |
| credentials.py     | secrets, which no error, log or print shows                           |
| trainer.py         | `TrOPDTrainer`: the objective's loss, and what is logged              |
| guidance.py        | the teacher's words and log-probs: from a column, a server, a model   |
| adapter.py         | TRL's trainer with its teacher and its loss replaced                  |
| generation.py      | how a generation batch is written: checks, prefixes, sampling         |
| reuse.py           | the order of rows, and batches that serve several steps               |
| patching.py        | temporary changes of objects and of a model's forwards                |
| metric_logs.py     | means over tokens in each log and evaluation                          |
| hooks.py           | TRL's private methods and attributes that these five rely on          |
| sides.py           | a model's hidden states and head on one micro-batch                   |
| positions.py       | where a padded row's positions begin                                  |
| prefix.py          | the guidance prefix: its length, its ids, its mask                    |
| fields.py          | fields that a processor makes of a prompt besides ids                 |
| sampling.py        | sampling by the trainer's config only; the mass that truncation keeps |
| verifier.py        | reward functions of whole completions, GRPO's, and their advantages   |
| verifier_checks.py | what a run refuses as reward functions                                |
| rewarded.py        | when they are called, and what is logged                              |
| rewards.py         | advantages and token weights from a micro-batch's rewards             |
| router.py          | the load-balancing loss of a mixture of experts                       |
| sources.py         | where the files of a model given by name are                          |
| loaded_teacher.py  | a teacher in this process, in its checkpoint's dtype                  |
| teacher_prompts.py | a teacher that reads a prompt of its own                              |
| self_teacher.py    | the student as its own teacher: frozen, or a moving average           |
| row_teachers.py    | rows that each have a teacher of their own                            |
| special_tokens.py  | tokenizers that differ in special tokens alone                        |
| sharding.py        | models under FSDP2 and DeepSpeed's ZeRO                               |
| context.py         | how long a text a model reads                                         |
| vocabulary.py      | whether an id means the same to student, teacher and tokenizer        |
| data_checks.py     | data sets and prompts that are refused                                |
| student_checks.py  | students that cannot be trained                                       |
| stops.py           | errors that stop a run, and how it can be resumed                     |
| dropout.py         | switches off a model's dropout                                        |
| signals.py         | a teacher's log-probs from a server or from columns                   |
| log_probs.py       | whether numbers can be a teacher's log-probs                          |
| served_teacher.py  | the served teacher of a config                                        |
| server.py          | the client of a served teacher                                        |
| protocols/         | what vLLM and SGLang are asked, and how they answer                   |
| completions.py     | reads a server's answers                                              |
| deadline.py        | HTTP connections with a deadline for each attempt                     |
| metrics.py         | from per-token statistics to sums and counts over all processes       |
| regions.py         | completions with their tokens colored: trusted, outlier, prefix       |
| progress.py        | a run's progress at a terminal, and the log that it leaves            |
| card.py            | the model card: objective, paper, models, data, versions              |

Needs TRL: `pip install 'tropd-kernels[trainer]'`. The rest of the package does not.
"""

try:
    import trl as _trl  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tropd_kernels.trainer is built on TRL, which is not installed: "
        "pip install 'tropd-kernels[trainer]'"
    ) from error

from .config import TrOPDConfig
from .server import TeacherServer, TeacherServerError
from .trainer import TrOPDTrainer

__all__ = ["TeacherServer", "TeacherServerError", "TrOPDConfig", "TrOPDTrainer"]
