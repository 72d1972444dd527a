"""Markdown that a command generates: tables, and the block of a page that they fill."""

from collections.abc import Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up in the source."""
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = [titles, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def block(page: str, begin: str, end: str) -> str:
    """The part of the page from one mark to the other, both included.

    Raises:
        ValueError: The page does not have each mark once, in this order.
    """
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"expected the marks {begin} and {end}, once each and in this order")
    return page[page.index(begin) : page.index(end) + len(end)]
