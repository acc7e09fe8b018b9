"""Text from models, files and options as it may be shown: on one line, without control characters, of bounded length.

A terminal obeys escape sequences, and bidirectional overrides change the order of what is read. Names of nodes and
files can contain both.
"""

from __future__ import annotations

import unicodedata

LONGEST = 2_000
"""Characters of one shown text. What is longer keeps its beginning and its end."""
# Cc: control, Cf: format (bidirectional overrides, joiners), Cs: half of a pair, Co and Cn: no meaning, Zl, Zp: lines.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: object, longest: int | None = LONGEST) -> str:
    """Return a text with an escape such as `\\x1b` or `\\n` for each character that is not shown as itself."""
    plain = str(text)
    if longest is not None and len(plain) > longest:
        half = longest // 2
        plain = f"{plain[:half]} ... ({len(plain) - 2 * half} characters) ... {plain[-half:]}"
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(_escape(c) if unicodedata.category(c) in _HIDDEN else c for c in plain)


def one_line(text: object, longest: int | None = LONGEST) -> str:
    """Return a message with its own line breaks as spaces. Other hidden characters are escaped."""
    return visible(" ".join(part for line in str(text).splitlines() if (part := line.strip())), longest)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
