"""A report as Markdown and as one HTML page that holds its pictures: sentences first, then tables, nothing from the network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from worldmodel.storage import files

STYLE = """
:root { color-scheme: light dark; --faint: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid var(--faint); padding: .25rem .75rem; text-align: left; font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
figure { margin: 1rem 0; } figcaption { opacity: .75; }
code { background: var(--faint); padding: 0 .25rem; border-radius: 3px; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Part:
    """One section of a report.

    head, lines  a table
    note         what is missing, and why
    pictures     {caption: a PNG or GIF}
    """

    title: str
    sentences: Sequence[str] = ()
    head: Sequence[str] = ()
    lines: Sequence[Sequence[str]] = ()
    note: str | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def write(
    folder: Path,
    name: str,
    content: Mapping[str, object],
    text: tuple[str, Mapping[str, object], Sequence[str], Sequence[Part]],
    log: Callable[[str], object],
) -> None:
    """A report as NAME.json, .md and .html; `text` is its title, what it is about, sentences and parts. Raises StorageError."""
    files.make_folder(folder)
    files.write(folder / f"{name}.json", json.dumps(content, indent=1, allow_nan=False).encode())
    files.write(folder / f"{name}.md", markdown(*text).encode())
    files.write(folder / f"{name}.html", page(*text).encode())
    log(f"Written: {folder / f'{name}.html'}, and .md and .json beside it.")


def markdown(title: str, about: Mapping[str, object], sentences: Sequence[str], parts: Sequence[Part]) -> str:
    """The report without its pictures."""
    text = [f"# {title}", _markdown_table(("", ""), [(name, str(value)) for name, value in about.items()]), _bullets(sentences)]
    for part in parts:
        text += [f"## {part.title}", _bullets(part.sentences)]
        text += [f"Skipped: {part.note}"] if part.note else []
        text += [_markdown_table(part.head, part.lines)] if part.lines else []
    return "\n\n".join(block for block in text if block) + "\n"


def page(title: str, about: Mapping[str, object], sentences: Sequence[str], parts: Sequence[Part]) -> str:
    """The report as one HTML page."""
    body = [
        f"<h1>{html.escape(title)}</h1>",
        _html_table((), [(name, str(value)) for name, value in about.items()]),
        _list(sentences),
    ]
    for part in parts:
        body += [f"<h2>{html.escape(part.title)}</h2>", _list(part.sentences)]
        body += [f"<p><em>Skipped: {_inline(part.note)}</em></p>"] if part.note else []
        body += [_html_table(part.head, part.lines)] if part.lines else []
        body += [_picture(caption, data) for caption, data in part.pictures.items()]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    return (
        f"<!DOCTYPE html>\n<html lang=en>\n<head>{head}<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_inline(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""


def _inline(text: str) -> str:
    """Escaped text, in which what stands between backticks is code."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _html_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table>{top}{rows}</table>"


def _picture(caption: str, data: bytes) -> str:
    kind = "gif" if data.startswith(b"GIF8") else "png"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{html.escape(caption)}" src="{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'
