"""The trainer: TRL's `DistillationTrainer` with this package's losses and off-policy guidance.

| file               | what is in it                                                            |
|--------------------|--------------------------------------------------------------------------|
| config.py          | `TrOPDConfig`: every setting, checked before a model is loaded           |
| effects.py         | settings that would change nothing, which are refused                    |
| generation_keys.py | the keys of `generation_kwargs`                                          |
| credentials.py     | secrets, which no error, log or print shows                              |
| adapter.py         | the one file that leans on TRL's private hooks                           |
| trainer.py         | `TrOPDTrainer`: what is done with hidden states, prefixes and draws      |
| prefix.py          | the guidance prefix: how long, from where, and where the student goes on |
| fields.py          | what a processor makes of a prompt besides ids: types of tokens, pixels  |
| sampling.py        | sampling by the trainer's config alone; what a truncated sampler leaves  |
| sources.py         | where the files of a model that is given by name are                     |
| loaded_teacher.py  | a teacher by name, in its checkpoint's dtype                             |
| context.py         | how long a text a model reads                                            |
| dropout.py         | every dropout of a model switched off                                    |
| router.py          | the load-balancing loss of a mixture of experts                          |
| sharding.py        | models under FSDP2 and DeepSpeed's ZeRO                                  |
| signals.py         | a teacher's log-probs that come from a server or from columns            |
| log_probs.py       | whether numbers can be a teacher's log-probs                             |
| served_teacher.py  | a config's served teacher                                                |
| server.py          | the client of a served teacher                                           |
| completions.py     | what a server answers                                                    |
| deadline.py        | HTTP connections on which an attempt ends in time                        |
| credit.py          | what credit over time makes of a micro-batch's rewards                   |
| checks.py          | inputs that are refused: tokenizers, data sets, prompts, losses          |
| metrics.py         | per-token statistics to logged means, over all processes                 |
| regions.py         | completions with their tokens coloured: trusted, outlier, prefix         |
| progress.py        | what a run shows at a terminal, and the log that it leaves               |
| card.py            | the model card: objective, paper, models, data, versions                 |

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
