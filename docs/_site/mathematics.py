"""Formulas as MathML, made while the site is built: no script and no font has to be fetched."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

#: What arithmatex makes of $...$ and $$...$$.
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL
)
#: Names of functions, which the converter sets as identifiers without space around them.
NAME = r"<mi>(?:log|exp|tanh|cos)</mi>"
BEFORE = re.compile(rf"((?:</mi>|</mn>|</mrow>|</msub>|</mfrac>))({NAME})")
AFTER = re.compile(rf"({NAME})(?!<mo[^>]*>&#x00028;)")
SPACE = '<mspace width="0.167em" />'


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def formula(match: re.Match[str]) -> str:
        inline = match[2] is not None
        latex = html.unescape(match[2] if inline else match[3]).strip()
        made = convert(latex, display="inline" if inline else "block")
        made = AFTER.sub(rf"\1{SPACE}", BEFORE.sub(rf"\1{SPACE}\2", made))
        if r"\\" not in latex and "\\" in re.sub(r"<[^>]*>", "", made):
            raise ValueError(f"{page.file.src_uri}: a formula has a command unknown here: {latex}")
        return made if inline else f'<div class="formula">{made}</div>'

    return FORMULA.sub(formula, content)


def on_post_page(output: str, **_: Any) -> str:
    if 'class="arithmatex"' in output:
        raise ValueError("a formula was left as LaTeX")
    return output
