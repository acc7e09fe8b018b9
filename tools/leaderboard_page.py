"""The leaderboard's rows and its page in Markdown; tools/leaderboard.py measures them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mezzotint.compiler.core.pipeline import Recipe

WIDTHS = {"w8a8": (8, 8), "w6a6": (6, 6), "w4a8": (4, 8)}  # bits of weights and activations
CHANCE = 0.1  # dB by which the SQNR of two calibrations of one recipe differ
Known = Mapping[tuple[str, str], "Row"]
Recipes = Mapping[str, Recipe]


@dataclass(frozen=True)
class Row:
    """One line of the page. Decibels are None where nothing differs; `refused` says why there are no figures."""

    recipe: str
    width: str
    key: str
    sqnr: float | None = None
    worst: float | None = None
    psnr: float | None = None
    psnr_p10: float | None = None
    speed: float | None = None
    size: float | None = None
    seconds: float | None = None
    kernels: str = ""
    islands: int | None = None
    refused: str = ""

    @staticmethod
    def load(file: Path) -> Row | None:
        """A row that was measured before; None where there is none, or one of another shape."""
        if not file.is_file():
            return None
        data = json.loads(file.read_text(encoding="utf-8"))
        return Row(**data) if set(data) == {f.name for f in fields(Row)} else None

    def save(self, file: Path) -> None:
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8", newline="\n")
        partial.replace(file)


def page(rows: Sequence[Row], about: str, recipes: Recipes) -> str:
    """One table for each width, best pictures first, and what each method gained; `about` says how it was measured."""
    lines = [
        "# Leaderboard",
        "",
        f"Written by `tools/leaderboard.py`; do not edit. The embedded digits, {about}.",
        "",
        "SQNR of epsilon on the latents of the float trajectory, all steps and the worst one; PSNR of the final "
        "pictures, median and 10th percentile (all in dB); speed against fp32 onnxruntime; the file's share of the "
        "fp32 file; seconds that the passes took; integer and float kernels; layers kept in float. PSNR depends on "
        f"chance: two calibrations of one recipe differ by 3 dB and more, its SQNR by {CHANCE} dB. So does speed, from "
        "one short measurement each: rows of one size and the same kernels have the same graph, and show how far to "
        "trust it.",
    ]
    known = {(row.recipe, row.width): row for row in rows}
    for width in WIDTHS:
        here = [row for row in rows if row.width == width]
        if not here:
            continue
        lines += ["", f"## {width.upper()}", ""]
        lines.append("| recipe | SQNR | worst | PSNR | p10 | speed | size | seconds | kernels | islands | beside |")
        lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
        lines += [_line(row, known, recipes) for row in sorted(here, key=lambda row: -(row.psnr or -1.0))]
    return "\n".join([*lines, "", *_claims(known, recipes)]) + "\n"


def _line(row: Row, known: Known, recipes: Recipes) -> str:
    if row.refused:
        return f"| `{row.recipe}` | {row.refused} " + "| " * 9 + "|"
    numbers = [_number(v, d) for v, d in ((row.sqnr, 1), (row.worst, 1), (row.psnr, 1), (row.psnr_p10, 1))]
    numbers += [_number(row.speed, 2), _number(row.size, 3), _number(row.seconds, 0), row.kernels]
    islands = "" if row.islands is None else str(row.islands)
    return f"| `{row.recipe}` | " + " | ".join([*numbers, islands, _beside(row, known, recipes)]) + " |"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _baseline(row: Row, known: Known, recipes: Recipes) -> Row | None:
    """The row of the recipe that is this one without its method."""
    recipe = recipes.get(row.recipe)
    return known.get((recipe.baseline, row.width)) if recipe is not None and recipe.baseline else None


def _beside(row: Row, known: Known, recipes: Recipes) -> str:
    """What the method gained over its baseline: SQNR and PSNR."""
    base = _baseline(row, known, recipes)
    if base is None or None in (row.sqnr, row.psnr, base.sqnr, base.psnr):
        return ""
    assert row.sqnr is not None and row.psnr is not None and base.sqnr is not None and base.psnr is not None
    return f"{row.sqnr - base.sqnr:+.1f} / {row.psnr - base.psnr:+.1f} `{base.recipe}`"


def _claims(known: Known, recipes: Recipes) -> list[str]:
    """Whether each method beats its baseline, by more than chance, at the width for which its paper claims that."""
    lines = ["## Where the papers claim it", ""]
    for recipe in recipes.values():
        row = known.get((recipe.name, recipe.claim))
        base = None if row is None else _baseline(row, known, recipes)
        if row is None or base is None or row.sqnr is None or base.sqnr is None:
            continue
        verdict = "better" if row.sqnr > base.sqnr + CHANCE else "NOT better"
        lines.append(
            f"- `{recipe.name}` at {recipe.claim.upper()}: {verdict} than `{base.recipe}` in the prediction "
            f"({row.sqnr:.2f} against {base.sqnr:.2f} dB; pictures {_number(row.psnr, 1)} against "
            f"{_number(base.psnr, 1)} dB)"
        )
    return lines if len(lines) > 2 else []
