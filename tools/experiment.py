"""Runs an experiment that one YAML file declares: models x recipes x widths x seeds, and writes its table and its plot.

    python -m tools.experiment FILE.yaml                     rows, table and plot in out/experiments/NAME
    python -m tools.experiment FILE.yaml --cluster local     rows on the workers of Ray
    python -m tools.experiment FILE.yaml --write-only        the table and the plot again, from the rows that are there

    name: rounding
    models: [{model: digits}, {model: unet.onnx, scheduler: cosine, name: mine}]
    recipes: [w8a8, gptq]
    widths: [w8a8, w4a8]
    seeds: [0, 1, 2]
    images: 32          # of each row; also calibration, batch, steps, threads, as of tools/leaderboard.py

A row is one of a leaderboard (tools/leaderboard.py), at a seed of the calibration; other images go with another seed.
Each row is a file, so an experiment that was stopped goes on where it stopped. Paths are relative to the YAML file.

The table has the median PSNR of the images of all seeds. Its interval of 95 % resamples seeds, and images within one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.cluster.connection import open_cluster
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.streams import BOOTSTRAP
from tools.leaderboard import Board
from tools.leaderboard_cluster import ROOT, save_rows
from tools.leaderboard_options import parsed
from tools.leaderboard_page import WIDTHS, Row

RESAMPLES = 1000


class ExperimentModel(BaseModel):
    """A model, with the options of tools/leaderboard.py that belong to it."""

    model_config = ConfigDict(extra="forbid")
    model: str
    name: str | None = None
    scheduler: str | None = None
    size: str | None = None
    guidance: float = 1.0


class Experiment(BaseModel):
    """The content of an experiment's file."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    models: list[ExperimentModel] = Field(min_length=1)
    recipes: list[str] = Field(min_length=1)
    widths: list[str] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    images: int = 32
    calibration: int = 32
    batch: int = 16
    steps: int = 20
    threads: int = 1


@dataclass(frozen=True)
class Cell:
    """A row of the experiment."""

    model: str
    seed: int
    row: Row


@dataclass(frozen=True)
class Line:
    """A line of the table: the median PSNR in dB of all seeds with its interval, or why there is none."""

    model: str
    recipe: str
    width: str
    seeds: int
    psnr: float | None
    low: float | None
    high: float | None
    sqnr: float | None
    refused: str


def read_experiment(file: Path) -> Experiment:
    """Return the experiment of a file. Raises InputError for another file, and for unknown recipes and widths."""
    hint = "the head of tools/experiment.py has an example"
    try:
        found = Experiment.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{place}: {first['msg']}", where=str(file), hint=hint) from error
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"the experiment cannot be read: {error}", where=str(file), hint=hint) from error
    for key, names, known in (("recipes", found.recipes, RECIPES), ("widths", found.widths, WIDTHS)):
        if unknown := [name for name in names if name not in known]:
            hint = "`mezzotint recipes` lists them" if key == "recipes" else f"choose among {', '.join(known)}"
            raise InputError(f"{key}: there is no {unknown[0]!r}", where=str(file), hint=hint)
    return found


def boards(experiment: Experiment, file: Path, folder: Path, write_only: bool) -> Iterator[tuple[str, int, Board]]:
    """Yield (model, seed, its board); a model's boards share the float model and the cache of nothing else."""
    for model in experiment.models:
        path = file.parent / model.model
        options = ["--model", str(path) if path.exists() else model.model, "--guidance", str(model.guidance)]
        for name in ("scheduler", "size"):
            if (value := getattr(model, name)) is not None:
                options += [f"--{name}", str(value)]
        for name in ("images", "calibration", "batch", "steps", "threads"):
            options += [f"--{name}", str(getattr(experiment, name))]
        options += [word for recipe in experiment.recipes for word in ("--recipe", recipe)]
        options += [word for width in experiment.widths for word in ("--width", width)]
        title = model.name or path.stem
        for seed in experiment.seeds:
            own = folder / title / f"seed-{seed}"
            where = ["--name", f"{title}-experiment", "--folder", str(own), "--page", str(own / "page.md")]
            more = ["--no-peers", "--no-speed", "--seed", str(seed), *(["--write-only"] if write_only else [])]
            yield title, seed, Board(parsed([*options, *where, *more], __doc__))


def measured(experiment: Experiment, file: Path, folder: Path, cluster: str | None, write_only: bool) -> list[Cell]:
    """Return all rows, measured where they are not there. Raises the errors of the boards, and ClusterError."""
    cells = []
    held = nullcontext() if cluster is None or write_only else open_cluster(cluster, experiment.threads, (ROOT,))
    with held:
        for title, seed, board in boards(experiment, file, folder, write_only):
            waiting = [] if write_only else [(place, piece) for place, piece, done in board.work() if not done]
            if cluster is not None and waiting:
                board.args.cluster = cluster
                save_rows(board.model, board.args, waiting)
                waiting = []
            for i, (place, piece) in enumerate(waiting):
                print(f"{title}, seed {seed}: [{i + 1}/{len(waiting)}] {place.stem}", flush=True)
                board.row(piece).save(place)
            wanted = {(recipe, width) for recipe in experiment.recipes for width in experiment.widths}
            rows = [row for _, row in board.listed() if (row.recipe, row.width) in wanted and _is_asked(board, row)]
            cells += [Cell(title, seed, row) for row in rows]
    return cells


def _is_asked(board: Board, row: Row) -> bool:
    """Whether the row is at the eta of its recipe: baselines of other recipes are measured at theirs, too."""
    return bool(row.eta == board.eta_of(row.recipe))


def lines_of(cells: list[Cell]) -> list[Line]:
    """Return the lines of the table, in the order of the cells' first rows."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.row.recipe, cell.row.width), []).append(cell)
    return [_line(key, group) for key, group in sorted(groups.items())]


def _line(key: tuple[str, str, str], cells: list[Cell]) -> Line:
    refused = next((cell.row.refused for cell in cells if cell.row.refused), "")
    # An identical image has no decibels: it counts as better than every other.
    images = [np.array([np.inf if db is None else db for db in cell.row.images]) for cell in cells if cell.row.images]
    if refused or not images:
        return Line(*key, len(cells), None, None, None, None, refused or "no images")
    rng = BOOTSTRAP.generator(0)
    draws = []
    for _ in range(RESAMPLES):
        seeds = (images[i] for i in rng.integers(len(images), size=len(images)))
        draws.append(np.median(np.concatenate([own[rng.integers(len(own), size=len(own))] for own in seeds])))
    low = float(np.quantile(draws, 0.025, method="lower"))  # draws, not between two: some may be infinite
    high = float(np.quantile(draws, 0.975, method="higher"))
    sqnr = [cell.row.sqnr for cell in cells if cell.row.sqnr is not None]
    middle = float(np.median(np.concatenate(images)))
    return Line(*key, len(cells), middle, low, high, float(np.mean(sqnr)) if sqnr else None, "")


def write_results(experiment: Experiment, folder: Path, cells: list[Cell]) -> None:
    """Write results.json, results.md and results.png."""
    lines = lines_of(cells)
    facts = {
        "experiment": experiment.model_dump(),
        "lines": [{name: _plain(value) for name, value in asdict(line).items()} for line in lines],
        "rows": [asdict(cell) for cell in cells],
    }
    (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8", newline="\n")
    (folder / "results.md").write_text(table(experiment, lines), encoding="utf-8", newline="\n")
    plot(lines, folder / "results.png")


def _plain(value: Any) -> Any:
    """Return None for what JSON has no number for: infinite decibels."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def table(experiment: Experiment, lines: list[Line]) -> str:
    """Return the page: a table with intervals, and the plot."""
    text = [f"# {experiment.name}", ""]
    text += [
        f"{experiment.images} images a row, {experiment.steps} steps, {experiment.calibration} for calibration.",
        "",
    ]
    text += [
        "| model | recipe | width | seeds | PSNR, dB | 95 % | SQNR of epsilon, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        figures = [line.refused, "", ""]
        if line.psnr is not None and line.low is not None and line.high is not None:
            sqnr = "" if line.sqnr is None else f"{line.sqnr:.1f}"
            figures = [f"{line.psnr:.1f}", f"{line.low:.1f} to {line.high:.1f}", sqnr]
        text.append("| " + " | ".join([line.model, line.recipe, line.width, str(line.seeds), *figures]) + " |")
    return "\n".join([*text, "", "![PSNR with intervals](results.png)"]) + "\n"


def plot(lines: list[Line], file: Path) -> None:
    """Draw the median PSNR of each line with its interval; models in panels."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(line.model for line in lines))
    most = max(sum(line.model == model for line in lines) for model in models)
    figure = Figure(figsize=(4.5 * len(models), 1 + 0.3 * most), layout="constrained")
    for i, model in enumerate(models):
        axes: Any = figure.add_subplot(1, len(models), i + 1)
        own = [line for line in lines if line.model == model and line.psnr is not None and np.isfinite(line.psnr)]
        for y, line in enumerate(reversed(own)):
            axes.plot([line.low, line.high], [y, y], color="0.6", linewidth=3, solid_capstyle="butt")
            axes.plot([line.psnr], [y], "o", color="black", markersize=4)
        axes.set_yticks(range(len(own)), [f"{line.recipe} {line.width}" for line in reversed(own)])
        axes.set_xlabel("PSNR, dB")
        axes.set_title(model)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--cluster", help="local, local:WORKERS, or an address of Ray")
    parser.add_argument("--folder", type=Path, help="by default out/experiments/NAME")
    parser.add_argument("--write-only", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    try:
        experiment = read_experiment(args.file)
        folder = args.folder or ROOT / "out" / "experiments" / experiment.name
        folder.mkdir(parents=True, exist_ok=True)
        cells = measured(experiment, args.file.absolute(), folder, args.cluster, args.write_only)
        if not cells:
            raise InputError("there are no rows yet", where=str(folder), hint="leave out --write-only")
        write_results(experiment, folder, cells)
    except MezzotintError as error:
        print(error, file=sys.stderr)
        return 2
    print(folder / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
