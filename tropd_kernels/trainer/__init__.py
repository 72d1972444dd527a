"""The trainer: TRL's `DistillationTrainer` with this package's losses and off-policy guidance.

| file         | what is in it                                                             |
|--------------|---------------------------------------------------------------------------|
| config.py    | `TrOPDConfig`: every setting, checked before a model is loaded            |
| adapter.py   | the one file that leans on TRL's private hooks                            |
| trainer.py   | `TrOPDTrainer`: what is done with hidden states, prefixes and draws       |
| prefix.py    | the guidance prefix: how long, from where, and where the student goes on  |
| sampling.py  | sampling by the trainer's config alone; what a truncated sampler leaves   |
| generation_keys.py | the keys of `generation_kwargs`                                     |
| signals.py   | a teacher's log-probs that come from a server or from columns             |
| server.py    | the client of a served teacher                                            |
| checks.py    | inputs that are refused: tokenizers, data sets, prompts, losses           |
| regions.py   | completions with their tokens coloured: trusted, outlier, prefix          |
| progress.py  | what a run shows at a terminal, and the log that it leaves                |
| card.py      | the model card: objective, paper, models, data, versions                  |
| metrics.py   | per-token statistics to logged means, over all processes                  |

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
