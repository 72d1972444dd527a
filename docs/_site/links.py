"""Links of the pages to files outside docs/, as the repository has them and as the site can.

The navigation names pages of the whole repository, and a link to one of them stays a link. A link
to any other file becomes its text, with the file's path: the site holds no source.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: Where the pages' pictures lie.
PICTURES = ("benchmarks/evidence/results", "benchmarks/learning/results", "benchmarks/results")
#: What a browser would fetch from elsewhere.
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)[^>]* src="(?:https?:)?//|<link[^>]*"(?:https?:)?//'
)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    outside = [name for name in pages(config.nav) if not (ROOT / "docs" / name).exists()]
    pictures = [
        str(file.relative_to(ROOT)) for folder in PICTURES for file in (ROOT / folder).glob("*.png")
    ]
    for name in (*outside, *pictures):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def pages(nav: Any) -> Iterator[str]:
    """Those of a navigation, whatever its depth."""
    if isinstance(nav, str):
        yield nav
    else:
        for inner in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(inner)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = str(Path(page.file.abs_src_path).relative_to(ROOT))

    def target(link: str) -> str:
        """The file's path from the repository's root."""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
        if not (ROOT / path).exists():
            raise ValueError(f"{here} links to {link}, which does not exist")
        return path

    def on_site(path: str) -> str | None:
        """Its name among the site's files, if it is one."""
        name = path.removeprefix("docs/")
        return name if files.get_file_from_path(name) else None

    def relative(name: str) -> str:
        return posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")

    def link(match: re.Match[str]) -> str:
        text, to, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", to):
            return match[0]
        path = target(to)
        if path == "README.md":
            path = "docs/index.md"
        name = on_site(path)
        if name is not None:
            return f"[{text}]({relative(name)}{anchor})"
        plain = text.strip("`")
        return f"`{path}`" if plain in path else f"{text} (`{path}`)"

    def image(match: re.Match[str]) -> str:
        name = None if ":" in match[2] else on_site(target(match[2]))
        return match[0] if name is None else f"![{match[1]}]({relative(name)})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else IMAGE.sub(image, LINK.sub(link, part)) for part in parts
    )


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    if match := FETCHED.search(output):
        raise ValueError(f"{page.file.src_uri} fetches from elsewhere: {match[0]}")
    return output
