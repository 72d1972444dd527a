"""All that a run found, in one object: terminal, picture, page and demo.json show it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.demo.compare import Measured
from examples.demo.judge import Judgement
from examples.demo.train import Step

#: What the curves mean, wherever they are printed or drawn.
WATCH = (
    "Watch the KL, which should fall, and the trust ratio, which should rise: the loss is a "
    "surrogate, whose value says little by itself."
)


@dataclass(frozen=True)
class Record:
    """One run, as it went."""

    student: str  # what was done to the teacher to make it
    facts: dict[str, str]  # hardware and versions
    caption: str  # those in two lines
    settings: dict[str, float]
    measured: list[Measured]
    steps: list[Step]
    prompts: tuple[str, ...]  # held out
    before: Judgement
    after: Judgement
    teacher: tuple[str, ...]  # what the teacher says to the prompts

    @property
    def verdict(self) -> str:
        """The KLs before and after, and what became of them, whatever it is."""
        before, after = self.before.reverse_kl, self.after.reverse_kl
        change = f"{before / after:.1f} times less" if after < before else "no less than before"
        return (
            f"KL(student || teacher) on {len(self.prompts)} held-out prompts: "
            f"{before:.2f} nats a token before, {after:.2f} after {len(self.steps)} steps, {change}"
        )

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")
