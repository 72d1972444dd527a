"""`python -m benchmarks.selection`: every rule and score, and the file that it writes."""

import json

from benchmarks.selection import CASES, main


def test_a_small_shape(tmp_path, capsys):
    file = tmp_path / "selection.json"
    main(
        ["--tokens", "24", "--vocab-size", "300", "--hidden-size", "8", "--dtype", "float32",
         "--teacher-hidden-size", "16", "--fraction", "0.25", "--json", str(file)]
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert len(found["entries"]) == sum(1 + len(scores) for *_, scores in CASES)
    assert len(capsys.readouterr().out.splitlines()) == len(found["entries"])
    by = {(e["objective"], e["select_by"]): e for e in found["entries"]}
    # One chunk holds all tokens: S + 6/24 (2 S) of 3 S; S + T + 6/24 (2 S) of 3 S + T; T = 2 S.
    assert by["OPD", "entropy"]["product_ratio"] == (1 + 0.5) / 3
    assert by["GKD", "reverse_kl"]["product_ratio"] == (3 + 0.5) / 5
    assert by["GKD", "scores"]["product_ratio"] == 0.25
    assert found["machine"] and found["options"]["tokens"] == 24
