"""docs/trainer.md: of each scenario of TRL's own tests, whether it trains or is refused, and by
which words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")
pytest.importorskip("PIL", reason="images need pillow")

import reward_scenarios  # noqa: F401  which adds to them
from scenarios import SCENARIOS, SMALL
from training import make

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*completions are not sampled:UserWarning"),
]
PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
ROWS = {
    words: (outcome, remark)
    for words, outcome, remark in re.findall(
        r"^\| (.+?) +\| (trains|evaluates|refused) +\| (.*?) *\|$", PAGE.read_text(), re.MULTILINE
    )
}


def run(scenario, folder) -> None:
    made = scenario(folder)
    if isinstance(made, Mapping):
        made = make(folder, **SMALL | made)
    if made is None:
        return
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    made.train()
    (loss,) = (log["train_loss"] for log in made.state.log_history if "train_loss" in log)
    assert 0 < abs(loss) < 1e3
    moved = 0
    for old, new in zip(before, made.model.parameters(), strict=True):
        assert new.isfinite().all()
        assert new.requires_grad or torch.equal(old, new)
        moved += not torch.equal(old, new)
    assert moved


def test_the_table_has_every_scenario():
    assert [*ROWS] == [*SCENARIOS]


REFUSALS = ValueError, TypeError, NotImplementedError, ImportError, OSError


@pytest.mark.parametrize("words", SCENARIOS)
def test_what_the_table_says_happens(tmp_path, words):
    outcome, remark = ROWS[words]
    for scenario in SCENARIOS[words]:
        if outcome != "refused":
            run(scenario, tmp_path)
            continue
        with pytest.raises(REFUSALS) as error:
            run(scenario, tmp_path)
        begins = re.match('"(.+?)"', remark)
        assert begins and begins[1] in str(error.value)
