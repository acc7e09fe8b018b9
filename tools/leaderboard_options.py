"""The options of a board: its model, its rows and its numbers; the command line of tools/leaderboard.py."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.errors import InputError
from tools.leaderboard_model import DIGITS_NAME, title_of
from tools.leaderboard_page import WIDTHS

OWN_WIDTH = frozenset({"float"})  # recipes without a width to set
NAMES = tuple(name for name in RECIPES if name not in OWN_WIDTH)
ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("images", "calibration", "batch", "steps", "threads", "iterations")


@dataclass(frozen=True)
class BoardOptions:
    """The options of a board. Raises InputError for a name that is none for a file, and for numbers below 1.

    `rows` are pairs of a recipe and a width. With `baselines` each recipe's baseline is measured at its width, too;
    where a claim needs another eta, it is in any case. `eta` is that of rows whose claims need no other. `seed` is that
    of the calibration; images have another. `reference` is the float bundle of a worker's driver.
    """

    name: str
    folder: Path
    page: Path
    model: str = DIGITS_NAME
    rows: tuple[tuple[str, str], ...] = ()
    baselines: bool = False
    scheduler: str | None = None
    size: str | None = None
    images: int = 32
    calibration: int = 32
    batch: int = 16
    sampler: str | None = None
    steps: int = 20
    eta: float = 0.0
    guidance: float = 1.0
    seed: int = 0
    conditions: Path | None = None
    unconditional: Path | None = None
    threads: int = 2
    iterations: int | None = None
    peers: bool = False
    reference: Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise InputError(f"{self.name!r} is no name for a file", hint="give a name")
        if self.name == DIGITS_NAME != self.model:
            raise InputError("the page of the digits is another one", where=self.model, hint="give another name")
        for name in NUMBERS:
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"{name} is {number}", hint="give at least 1")


def stem_of(name: str) -> str:
    """Return the name of a board's working folder and of its page."""
    return "leaderboard" if name == DIGITS_NAME else f"leaderboard-{name}"


def parsed(argv: list[str] | None, about: str | None) -> tuple[BoardOptions, argparse.Namespace]:
    """Return the options of the board, and how it is measured: `cluster`, `speed`, `again` and `write_only`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = BoardOptions("digits", Path(), Path())
    models = "`digits`, `digits-dit`, an .onnx file, or a diffusers folder"
    parser.add_argument("--model", default=usual.model, help=models)
    parser.add_argument("--scheduler", help="its scheduler_config.json, or a named schedule")
    parser.add_argument("--size", help="HEIGHTxWIDTH, where the model leaves the size open")
    parser.add_argument("--name", help="of the page and of the working folder; by default that of the model")
    parser.add_argument("--recipe", action="append", choices=NAMES, help="only this one (may be repeated)")
    parser.add_argument("--width", action="append", choices=list(WIDTHS), help="only this one (may be repeated)")
    parser.add_argument("--images", type=int, default=usual.images)
    parser.add_argument("--calibration", type=int, default=usual.calibration)
    parser.add_argument("--batch", type=int, default=usual.batch, help="images in one call")
    parser.add_argument("--sampler", help="by default the schedule's usual one")
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--eta", type=float, default=usual.eta, help="of rows whose claims need no other")
    parser.add_argument("--guidance", type=float, default=usual.guidance)
    parser.add_argument("--seed", type=int, default=usual.seed, help="of the calibration; images have another")
    parser.add_argument("--conditions", type=Path, help=".npz, or NAME=1,2,3; class labels may be left out")
    parser.add_argument("--unconditional", type=Path, help="the same of the empty prompt, for guidance")
    parser.add_argument("--threads", type=int, help=f"{usual.threads}; with --cluster 1, of each row")
    parser.add_argument("--cluster", help="measure rows on workers: local, local:WORKERS, or an address of Ray")
    parser.add_argument("--iterations", type=int, help="cut each pass that trains to so many; the row says so")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="leave that for another run")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--write-only", action="store_true", help="measure nothing")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--page", type=Path)
    found = parser.parse_args(argv)
    given = vars(found)
    how = argparse.Namespace(**{name: given.pop(name) for name in ("cluster", "speed", "again", "write_only")})
    names, widths = given.pop("recipe") or NAMES, given.pop("width") or list(WIDTHS)
    given["rows"] = tuple((name, width) for width in widths for name in names)
    if given["threads"] is None:  # with a cluster the cores are shared among the rows
        given["threads"] = usual.threads if how.cluster is None else 1
    given["name"] = given["name"] or title_of(given["model"])
    stem = stem_of(given["name"])
    given["folder"], given["page"] = (
        given["folder"] or ROOT / "out" / stem,
        given["page"] or ROOT / "docs" / f"{stem}.md",
    )
    try:
        return BoardOptions(**given), how
    except InputError as error:
        parser.error(str(error))
