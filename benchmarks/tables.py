"""Markdown: tables, the generated blocks of a page, and how figures are written."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(head: Iterable[object], lines: Iterable[Iterable[object]], aligned: bool = False) -> str:
    """A Markdown table without a newline at its end; `aligned`: with columns padded to one width, for a terminal."""
    cells = [[str(x).replace("|", "\\|").replace("\n", " ") for x in line] for line in (head, *lines)]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*cells, strict=True)]
    drawn = ["| " + " | ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)) + " |" for line in cells]
    rule = "|".join("-" * (width + 2 if aligned else 3) for width in widths)
    return "\n".join([drawn[0], f"|{rule}|", *drawn[1:]])


def blocks(mark: str) -> re.Pattern[str]:
    """Matches what stands between <!-- MARK: NAME --> and <!-- /MARK -->: (opening line, name, content, closing mark)."""
    return re.compile(rf"(<!-- {mark}: ([\w-]+) -->\n)(.*?)(<!-- /{mark} -->)", re.DOTALL)


def filled(text: str, mark: str, contents: Mapping[str, str]) -> str:
    """A page whose blocks hold `contents`, by name; SystemExit where a block has none."""
    if unknown := [found[2] for found in blocks(mark).finditer(text) if found[2] not in contents]:
        raise SystemExit(f"no {mark} are called {', '.join(unknown)}; there are {', '.join(contents)}")
    return blocks(mark).sub(lambda found: found[1] + contents[found[2]] + found[4], text)


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """`median [min..max]`; None is greater than every number and stands for what was never reached."""
    known = sorted(math.inf if x is None else float(x) for x in values)
    if not known:
        return ""
    middle = number(median(known), digits)
    return middle if len(known) == 1 else f"{middle} [{number(known[0], digits)}..{number(known[-1], digits)}]"


def median(values: Iterable[float | None]) -> float:
    """The median, None being greater than every number: infinite where at least half was never reached."""
    known = [math.inf if x is None else float(x) for x in values]
    return statistics.median_high(known) if math.inf in known else statistics.median(known)


def number(x: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, with separators of thousands; `-` for what was never reached."""
    if x is None or math.isinf(x):
        return "-"
    if x == 0:
        return "0"
    return f"{x:,.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def solved(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many of the runs were solved, as `2/3`."""
    return f"{sum(row['solved_at'] is not None for row in rows)}/{len(rows)}"
