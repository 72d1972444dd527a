"""The settings of `TrOPDConfig` as a list, from its source: the site is built without torch."""

from __future__ import annotations

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

TRAINER = Path(__file__).resolve().parents[2] / "tropd_kernels" / "trainer"
MARK = "<!-- settings of TrOPDConfig -->"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown.replace(MARK, "\n".join(settings())) if MARK in markdown else markdown


def settings() -> list[str]:
    """`name` (type, default): the help of each."""
    tree = ast.parse((TRAINER / "config.py").read_text("utf-8"))
    (body,) = (n.body for n in tree.body if getattr(n, "name", "") == "TrOPDConfig")
    lines = []
    for node in body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "_setting":
            default = ast.unparse(value.args[1]) if len(value.args) > 1 else "None"
            kind = ast.unparse(node.annotation)
            lines.append(f"* **`{node.target.id}`** (`{kind}`, `{default}`): {text(value.args[0])}")
    if not lines:
        raise ValueError("config.py has no settings where the site looks for them")
    return lines


def text(node: ast.expr) -> str:
    """A string or f-string, in which only names of recipes are put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return ", ".join(f'"{name}"' for name in recipes())
    return ast.literal_eval(node)


def recipes() -> list[str]:
    tree = ast.parse((TRAINER / "recipes.py").read_text("utf-8"))
    named = [
        n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "RECIPES"
    ]
    return [ast.literal_eval(key) for key in named[0].keys]
