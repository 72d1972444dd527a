"""Keys that are given once. YAML, JSON and argparse take the last of several, and do not say so."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MERGE = "tag:yaml.org,2002:merge"  # "<<" may stand in a mapping as often as one likes


def parse_json(text: str) -> Any:
    """As json.loads; raises ValueError for a key that an object has twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is given twice: leave one of them out")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def parse_yaml(text: str) -> Any:
    """As yaml.safe_load; raises ValueError, with the lines, for a key that a mapping has twice."""
    import yaml  # comes with transformers

    for key, first, second in _repeated(yaml.compose(text, yaml.SafeLoader), set()):
        raise ValueError(
            f"{key!r} is given twice, in lines {first} and {second}: leave one of them out"
        )
    return yaml.safe_load(text)


def _repeated(node: Any, seen: set[int]) -> Iterator[tuple[str, int, int]]:
    """Keys with two of their lines, of a YAML node and those in it. seen: nodes, for aliases."""
    if node is None or id(node) in seen or isinstance(node.value, str):
        return
    seen.add(id(node))
    lines: dict[tuple[str, str], int] = {}
    for entry in node.value:
        if isinstance(entry, tuple):  # of a mapping
            key, entry = entry
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and key.tag != _MERGE:
                if (key.tag, key.value) in lines:
                    yield key.value, lines[key.tag, key.value], line
                lines[key.tag, key.value] = line
        yield from _repeated(entry, seen)


def repeated_flag(arguments: Sequence[str], options: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first two flags that set the same key, where there are any. options: argparse's actions
    by their flags, of which a key may have several."""
    given: dict[str, str] = {}
    for flag in (argument.split("=")[0] for argument in arguments):
        key = options[flag].dest if flag in options else None
        if key in given:
            return given[key], flag
        if key is not None:
            given[key] = flag
    return None
