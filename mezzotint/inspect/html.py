"""Self-contained HTML pages: no network, no script, readable on a phone and on paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mezzotint.runtime.visible import visible

ASSETS = Path(__file__).parents[1] / "assets" / "inspect"
_STYLE = """main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.3rem; }
.nothing { color: var(--soft); }
pre .added, pre .removed { display: block; }
"""


def base_style() -> str:
    """Return the style that all pages share: colours for light and dark, type, tables, differences, print."""
    return (ASSETS / "base.css").read_text(encoding="utf-8")


def document(title: str, parts: Sequence[str]) -> str:
    """Return a whole document from pieces of HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(visible(title))}</title>\n<style>{base_style()}{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(visible(title))}</h1>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def fill_template(text: str, fields: Mapping[str, str]) -> str:
    """Return a template with each `{{NAME}}` replaced by the HTML of that name."""
    head, *rest = text.split("{{")
    pieces = [head]
    for piece in rest:
        name, _, after = piece.partition("}}")
        pieces += [fields[name], after]
    return "".join(pieces)


def json_for_html(data: Any) -> str:
    """Return JSON without `<`, `>` and `&`: it can neither end the element around it nor open a comment there."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table_section(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a heading with a table, or with the words `no difference` when there are no rows."""
    if not rows:
        return f'<h2>{escape(title)}</h2>\n<p class="nothing">no difference</p>'
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(visible(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<h2>{escape(title)} ({len(rows)})</h2>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def diff_section(title: str, text: str) -> str:
    """Return a heading with a diff as coloured text, folded behind a summary line."""
    kinds = {"+": "added", "-": "removed"}
    shown = [escape(visible(line, None)) for line in text.splitlines()]
    lines = [f'<span class="{kinds[line[0]]}">{line}</span>' if line[:1] in kinds else line for line in shown]
    return (
        f"<h2>{escape(title)}</h2>\n<details><summary>{len(lines)} lines</summary>\n<pre>"
        + "\n".join(lines)
        + "</pre></details>"
    )
