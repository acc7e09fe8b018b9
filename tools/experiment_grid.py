"""Experiments of leaderboards' rows: they are measured where they are missing, and become a table and gains.

A row is one of a leaderboard at a seed of the calibration; other images go with another seed. The table has the median
PSNR of the images of all seeds. A gain is the median of the differences of images from the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.arrays import Doubles
from tools.experiment_file import Claim, Experiment, place_models
from tools.experiment_results import Interval, Panel, Results, Table, over_seeds
from tools.leaderboard_board import Board
from tools.leaderboard_options import BoardOptions, stem_of
from tools.leaderboard_page import Row
from tools.leaderboard_run import fill_boards, write_page

TABLE = ("model", "recipe", "width", "seeds", "PSNR, dB", "95 %", "SQNR of epsilon, dB")
GAINS = ("model", "recipe", "over", "width", "seeds", "gain, dB", "95 %", "gain of epsilon, dB", "verdict")


@dataclass(frozen=True)
class Cell:
    """A row of the experiment."""

    model: str
    seed: int
    row: Row


@dataclass(frozen=True)
class Line:
    """A line of the table: the median PSNR in dB of all seeds, and the mean SQNR of epsilon, or why there is none."""

    model: str
    recipe: str
    width: str
    eta: float
    seeds: int
    psnr: Interval | None = None
    sqnr: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Gain:
    """What the images of a recipe gained over those of another from the same noise, in dB, and what that shows."""

    model: str
    recipe: str
    over: str
    width: str
    eta: float
    seeds: int
    images: Interval
    sqnr: float | None
    verdict: str


def boards_of(experiment: Experiment, file: Path, folder: Path, given: dict[str, Path]) -> list[tuple[str, int, Board]]:
    """Return (model, seed, its board). The boards of a model share its folder, and with it the float model."""
    boards = []
    own = [(claim.recipe, claim.width) for claim in experiment.claims]
    own += [(claim.over, claim.width) for claim in experiment.claims]
    numbers = {name: getattr(experiment, name) for name in ("images", "calibration", "batch", "steps", "threads")}
    for model, (place, scheduler) in zip(experiment.models, place_models(experiment.models, file, given), strict=True):
        home = folder / model.title
        pages = home if experiment.pages is None else file.parent / experiment.pages
        for seed in experiment.seeds:
            options = BoardOptions(
                model.title,
                home,
                pages / f"{stem_of(model.title)}.md",
                place,
                rows=tuple(dict.fromkeys([*experiment.rows, *own])),
                baselines=True,
                scheduler=scheduler,
                size=model.size,
                guidance=model.guidance,
                seed=seed,
                iterations=experiment.iterations,
                **numbers,
            )
            boards.append((model.title, seed, Board(options)))
    return boards


def measure_grid(
    experiment: Experiment, file: Path, folder: Path, given: dict[str, Path], cluster: str | None, write_only: bool
) -> Results | None:
    """Measure the rows that are missing, and return the results; None without any row. Raises what the rows raise."""
    boards = boards_of(experiment, file, folder, given)
    if not write_only:
        titles = [f"{title}, seed {seed}" for title, seed, _ in boards]
        fill_boards([board for _, _, board in boards], cluster, titles=titles)
    cells = [Cell(title, seed, row) for title, seed, board in boards for row in board.done()]
    if not cells:
        return None
    if experiment.pages is not None:
        for _, _, board in boards:
            write_page(board)
    return results_of(experiment, cells)


def results_of(experiment: Experiment, cells: list[Cell]) -> Results:
    lines, gains = lines_of(cells), gains_of(cells, experiment.claims)
    about = f"{experiment.images} images a row, {experiment.steps} steps, {experiment.calibration} for calibration."
    if experiment.iterations is not None:
        about += f" Recipes that train for longer were cut to {experiment.iterations} iterations."
    facts = {
        "experiment": experiment.model_dump(),
        "lines": [{**asdict(line), "psnr": line.psnr and line.psnr.to_json()} for line in lines],
        "gains": [{**asdict(gain), "images": gain.images.to_json()} for gain in gains],
        "rows": [asdict(cell) for cell in cells],
    }
    tables = [Table("Images", TABLE, [_line_text(line) for line in lines])]
    if gains:
        tables.append(Table("Beside each other", GAINS, [_gain_text(gain) for gain in gains]))
    models = list(dict.fromkeys(cell.model for cell in cells))
    panels = [[_levels(model, lines), _over(model, gains)] for model in models]
    return Results(about, tables, panels, facts)


def _levels(model: str, lines: Sequence[Line]) -> Panel:
    points = [(_label(line), line.psnr) for line in lines if line.model == model and line.psnr is not None]
    return Panel(model, "PSNR, dB", points)


def _over(model: str, gains: Sequence[Gain]) -> Panel:
    points = [(f"{_label(gain)} over {gain.over}", gain.images) for gain in gains if gain.model == model]
    return Panel(f"{model}: gain of the images", "dB", points, zero=True)


def _label(of: Line | Gain) -> str:
    return f"{of.recipe} {_width(of)}"


def _width(of: Line | Gain) -> str:
    return of.width + (f", eta {of.eta:g}" if of.eta else "")


def _line_text(line: Line) -> list[str]:
    figures = [line.refused, "", ""]
    if line.psnr is not None:
        figures = [*line.psnr.text(1), "" if line.sqnr is None else f"{line.sqnr:.1f}"]
    return [line.model, line.recipe, _width(line), str(line.seeds), *figures]


def _gain_text(gain: Gain) -> list[str]:
    sqnr = "" if gain.sqnr is None else f"{gain.sqnr:+.1f}"
    names = [gain.model, gain.recipe, gain.over, _width(gain), str(gain.seeds)]
    return [*names, *gain.images.text(1, "+"), sqnr, gain.verdict]


def lines_of(cells: Sequence[Cell]) -> list[Line]:
    """Return the lines of the table, sorted."""
    groups: dict[tuple[str, str, str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, *cell.row.place), []).append(cell)
    return [_line(key, group) for key, group in sorted(groups.items())]


def _line(key: tuple[str, str, str, float], cells: Sequence[Cell]) -> Line:
    rows = [cell.row for cell in cells]
    if refused := next((row.refused for row in rows if row.refused), ""):
        return Line(*key, len(rows), refused=refused)
    sqnr = _mean([row.sqnr for row in rows])
    if all(row.images for row in rows):
        # An identical image has no decibels: it counts as better than every other.
        images = [np.array([np.inf if db is None else db for db in row.images]) for row in rows]
        return Line(*key, len(rows), over_seeds(images, np.median), sqnr)
    known = [row.psnr for row in rows if row.psnr is not None]  # rows of an old record have no images
    return Line(*key, len(rows), Interval(float(np.mean(known))) if known else None, sqnr, "" if known else "no images")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) and known else None


def gains_of(cells: Sequence[Cell], claims: Sequence[Claim]) -> list[Gain]:
    """Return the gain of each recipe over its baseline where both are there, and then those of the claims."""
    known: dict[tuple[str, str, str, float], dict[int, Row]] = {}
    for cell in cells:
        known.setdefault((cell.model, *cell.row.place), {})[cell.seed] = cell.row
    claimed = {(claim.recipe, claim.over, claim.width) for claim in claims}
    gains = []
    for (model, recipe, width, eta), rows in sorted(known.items()):
        over = RECIPES[recipe].baseline
        if over and (recipe, over, width) not in claimed:
            gains.append(_gain(model, recipe, over, width, eta, rows, known, None))
    for claim in claims:
        for (model, recipe, width, eta), rows in known.items():
            if (recipe, width) == (claim.recipe, claim.width):
                gains.append(_gain(model, recipe, claim.over, width, eta, rows, known, claim.least))
    return [gain for gain in gains if gain is not None]


def _gain(
    model: str,
    recipe: str,
    over: str,
    width: str,
    eta: float,
    rows: dict[int, Row],
    known: dict[tuple[str, str, str, float], dict[int, Row]],
    least: float | None,
) -> Gain | None:
    """Return the gain over the seeds that both have; None where there is none to compare."""
    others = known.get((model, over, width, eta), {})
    pairs = [(row, others[seed]) for seed, row in sorted(rows.items()) if seed in others]
    pairs = [(row, other) for row, other in pairs if not row.refused and not other.refused]
    if not pairs:
        return None
    differences = [_differences(row, other) for row, other in pairs]
    kept = pairs[0][0].gain if len(pairs) == 1 and over == RECIPES[recipe].baseline else None
    if all(len(each) for each in differences):
        images = over_seeds(differences, np.median)
    elif kept is not None and kept.median.value is not None:  # that of the record beside a page
        images = Interval(kept.median.value, kept.median.low, kept.median.high)
    else:
        return None
    sqnr = _mean([None if a.sqnr is None or b.sqnr is None else a.sqnr - b.sqnr for a, b in pairs])
    return Gain(model, recipe, over, width, eta, len(pairs), images, sqnr, verdict(images, least))


def _differences(row: Row, other: Row) -> Doubles:
    mine, base = row.decibels, other.decibels
    return mine - base if len(mine) == len(base) else np.zeros(0)


def verdict(gain: Interval, least: float | None) -> str:
    """Return the words for a gain: against 0, or against what a claim says is the least."""
    if gain.low is None or gain.high is None:
        return ""
    if least is None:
        return "better" if gain.low > 0 else "worse" if gain.high < 0 else "not distinguishable"
    holds = "holds" if gain.low > least else "does not hold" if gain.high < least else "not shown"
    return f"claim of at least {least:+g}: {holds}"
