"""Links of the pages to files outside docs/, as the repository has them and as the site can.

A page of the repository that the site shows as well (`PAGES`, and pictures beside them) keeps its
links. A link to any other file becomes its text, with the file's path: the site holds no source.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: Pages of the repository outside docs/, and the pictures that the pages show.
PAGES = (
    "CHANGELOG.md", "CONTRIBUTING.md", "csrc/README.md", "benchmarks/learning/README.md",
    "examples/README.md", "examples/processes/README.md",
)  # fmt: skip
PICTURES = ("benchmarks/learning/results", "benchmarks/results")
#: What a browser would fetch from elsewhere.
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)[^>]* src="(?:https?:)?//|<link[^>]*"(?:https?:)?//'
)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pictures = [
        str(file.relative_to(ROOT)) for folder in PICTURES for file in (ROOT / folder).glob("*.png")
    ]
    for name in (*PAGES, *pictures):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    known = set(PAGES)
    here = page.file.src_uri if page.file.src_uri in known else f"docs/{page.file.src_uri}"

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
