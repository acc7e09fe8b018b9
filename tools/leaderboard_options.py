"""The options of tools/leaderboard.py, and the folder and the page that follow from them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mezzotint.passes.recipes.catalog import RECIPES
from tools.leaderboard_model import DIGITS_NAME, title_of
from tools.leaderboard_page import WIDTHS

OWN_WIDTH = frozenset({"float"})  # recipes without a width to set
ROOT = Path(__file__).resolve().parent.parent


def parsed(argv: list[str] | None, about: str | None) -> argparse.Namespace:
    """Return the options, with the folder and the page of the model's name."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in RECIPES if name not in OWN_WIDTH]
    models = "`digits`, `digits-dit`, an .onnx file, or a diffusers folder"
    parser.add_argument("--model", default=DIGITS_NAME, help=models)
    parser.add_argument("--scheduler", help="its scheduler_config.json, or a named schedule")
    parser.add_argument("--size", help="HEIGHTxWIDTH, where the model leaves the size open")
    parser.add_argument("--name", help="of the page and of the working folder; by default that of the model")
    parser.add_argument("--recipe", action="append", choices=names, help="only this one (may be repeated)")
    parser.add_argument("--width", action="append", choices=list(WIDTHS), help="only this one (may be repeated)")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="images in one call")
    parser.add_argument("--sampler", help="by default the schedule's usual one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eta", type=float, default=0.0, help="of rows whose claims need no other")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration; images have another")
    parser.add_argument("--conditions", type=Path, help=".npz, or NAME=1,2,3; class labels may be left out")
    parser.add_argument("--unconditional", type=Path, help="the same of the empty prompt, for guidance")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cluster", help="measure rows on workers: local, local:WORKERS, or an address of Ray")
    parser.add_argument("--iterations", type=int, help="cut each pass that trains to so many; the row says so")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="leave that for another run")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--write-only", action="store_true", help="measure nothing")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args(argv)
    args.reference = None  # the float bundle of a worker's driver
    args.recipe, args.width = args.recipe or names, args.width or list(WIDTHS)
    args.name = args.name or title_of(args.model)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name):
        parser.error(f"{args.name!r} is no name for a file: give --name")
    if args.name == DIGITS_NAME != args.model:
        parser.error("the page of the digits is another one: give --name")
    if args.cluster is not None and args.threads == parser.get_default("threads"):
        args.threads = 1  # of each row: the cores are shared among the rows
    numbers = ("images", "calibration", "batch", "steps", "threads", "iterations")
    for name in numbers:
        if (number := getattr(args, name)) is not None and number < 1:
            parser.error(f"--{name} is {number}: give at least 1")
    stem = "leaderboard" if args.name == DIGITS_NAME else f"leaderboard-{args.name}"
    args.folder, args.page = args.folder or ROOT / "out" / stem, args.page or ROOT / "docs" / f"{stem}.md"
    return args
