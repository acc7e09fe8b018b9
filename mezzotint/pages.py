"""Self-contained HTML pages: no network, no script, readable on a phone and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #8884; padding: .25rem .6rem; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; }
pre { font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
.added { background: #2a52; } .removed { background: #c332; } .nothing { opacity: .6; }
@media print { body { max-width: none; font-size: 10pt; } tr { break-inside: avoid; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document from pieces of HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A heading and a table below it, or the word that there is nothing to tell."""
    if not rows:
        return f'<h2>{escape(title)}</h2>\n<p class="nothing">no difference</p>'
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<h2>{escape(title)} ({len(rows)})</h2>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def diff(title: str, text: str) -> str:
    """A difference as text, its lines coloured, behind a line that opens it."""
    kinds = {"+": "added", "-": "removed"}
    lines = [
        f'<span class="{kinds[line[0]]}">{escape(line)}</span>' if line[:1] in kinds else escape(line)
        for line in text.splitlines()
    ]
    return (
        f"<h2>{escape(title)}</h2>\n<details><summary>{len(lines)} lines</summary>\n<pre>"
        + "\n".join(lines)
        + "</pre></details>"
    )
