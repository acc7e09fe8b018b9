"""Makes docs/systems.md: every system that the project was planned from, what runs of it, and what it is worth here.

tools/systems.yaml lists the systems. Papers, passes and deviations come from the recipes, effects from the verdicts of
the leaderboard pages: a row of the page says nothing that these do not say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mezzotint.compiler.core.pipeline import Recipe
from mezzotint.passes.recipes.catalog import RECIPES

LIST = Path(__file__).with_name("systems.yaml")
BOARDS = {
    "digits": "leaderboard.md",
    "mnist-onnx": "leaderboard-mnist-onnx.md",
    "digits-dit": "leaderboard-digits-dit.md",
    "faces64": "leaderboard-faces64.md",
}
"""Models, and the pages below docs/ that rows of them are on."""
_CLAIM = re.compile(
    r"- `(?P<recipe>[\w-]+)` at (?P<width>\w+)(?:, eta (?P<eta>[\d.]+))?: (?P<verdict>[^`]+) `(?P<baseline>[\w-]+)`\. "
    r"Images (?P<median>\S+) \((?P<ends>[^)]+)\) dB in the median.*?; "
    r"epsilon (?P<epsilon>\S+|without error) dB(?P<rest>.*)"
)
_PAPER = re.compile(r".*?arXiv (\d{4}\.\d{4,5})", re.S)
HEADINGS = ("system", "paper", "recipe", "passes", "effect and verdict", "differs from the paper, or is missing")


@dataclass(frozen=True)
class System:
    """A row of the list: the recipes that are it, or the passes that are parts of it, or why there are none."""

    system: str
    recipes: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    missing: str = ""
    outside: str = ""

    @property
    def state(self) -> str:
        if self.outside:
            return "outside"
        return "recipe" if self.recipes else "part" if self.passes else "open"


@dataclass(frozen=True)
class Effect:
    """What a leaderboard says of a recipe where its paper claims something."""

    model: str
    width: str
    verdict: str
    words: str


def read_systems(file: Path = LIST) -> list[System]:
    """Return the rows of the list. Raise ValueError for one that says neither what runs nor what is missing."""
    rows = yaml.safe_load(file.read_text(encoding="utf-8"))
    systems = [_system(**row) for row in rows]
    for system in systems:
        if not (system.recipes or system.missing or system.outside):
            raise ValueError(f"{file.name}: {system.system} has no recipe, and does not say what is missing")
    return systems


def _system(system: str, recipes: Sequence[str] = (), passes: Sequence[str] = (), **words: str) -> System:
    return System(system, tuple(recipes), tuple(passes), **words)


def read_effects(docs: Path) -> dict[str, list[Effect]]:
    """Return the verdicts of all boards, by recipe."""
    found: dict[str, list[Effect]] = {}
    for model, page in BOARDS.items():
        for line in (docs / page).read_text(encoding="utf-8").splitlines():
            if claim := _CLAIM.match(line):
                eta = "" if claim["eta"] is None else f", eta {claim['eta']}"
                cut = ", cut short" if "iterations" in claim["rest"] else ""
                words = f"{claim['median']} dB ({claim['ends']}), epsilon {claim['epsilon']} dB{cut}"
                verdict = claim["verdict"].removesuffix(" than").removesuffix(" from")
                found.setdefault(claim["recipe"], []).append(Effect(model, claim["width"] + eta, verdict, words))
    return found


def own_passes(recipe: Recipe, recipes: Mapping[str, Recipe] = RECIPES) -> list[str]:
    """Return the names of the passes that a recipe has and its baseline has not, or has with other options."""
    base = recipes.get(recipe.baseline)
    given = Counter() if base is None else Counter((step.name, repr(step.options())) for step in base.passes)
    names = []
    for step in recipe.passes:
        key = step.name, repr(step.options())
        if given[key]:
            given[key] -= 1
        else:
            names.append(step.name)
    return list(dict.fromkeys(names))


def systems_page(docs: Path, generated: str, recipes: Mapping[str, Recipe] = RECIPES) -> str:
    """Return the page. `docs` holds the leaderboards; `generated` is the line that says who wrote it."""
    systems, effects = read_systems(), read_effects(docs)
    rows = [_line(system, name, effects, recipes) for system in systems for name in system.recipes or ("",)]
    states = Counter(system.state for system in systems)
    worked = [s for s in systems if any(_better(effects.get(name, ())) for name in s.recipes)]
    about = (
        f"{len(systems)} systems: {states['recipe']} have recipes, {states['part']} run in parts, {states['open']} are "
        f"open, {states['outside']} lie outside. The images of {len(worked)} beat those of their baselines on at least "
        "one model, at the width that the paper claims something for."
    )
    explained = (
        "An effect is the median of the paired differences of the images' PSNR from those of the baseline, with its "
        "95 % interval, and the gain of epsilon's SQNR: from the pages of the leaderboards ("
        + ", ".join(f"[{model}]({page})" for model, page in BOARDS.items())
        + "). Where a row is cut short, it trained for less than its recipe does. Passes are those that the baseline "
        "has not, or has with other options."
    )
    table = _cells(*HEADINGS) + "\n" + "|---" * len(HEADINGS)
    return f"# Systems\n\n{generated}\n{about}\n\n{explained}\n\n{table}|\n" + "\n".join(rows) + "\n"


def _better(effects: Sequence[Effect]) -> bool:
    return any(effect.verdict.startswith("better") for effect in effects)


def _line(system: System, name: str, effects: Mapping[str, Sequence[Effect]], recipes: Mapping[str, Recipe]) -> str:
    if not name:
        passes = ", ".join(f"`{each}`" for each in system.passes)
        verdict = {"part": "not measured as a system", "open": "open", "outside": "outside"}[system.state]
        return _cells(system.system, "", "", passes, verdict, system.missing or system.outside)
    recipe = recipes[name]
    found = _PAPER.match(recipe.paper)
    link = f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else ""
    deviation = recipe.paper[found.end() :].lstrip("), ") if found else recipe.paper
    if deviation.startswith("(") and deviation.endswith(")"):
        deviation = deviation[1:-1]
    said = [f"{e.model} {e.width}: {e.verdict}, {e.words}" for e in effects.get(name, ())]
    passes = ", ".join(f"`{each}`" for each in own_passes(recipe, recipes))
    return _cells(
        system.system,
        link,
        f"[`{name}`](recipes/{name}.md)",
        passes,
        "<br>".join(said) or (f"not measured at {recipe.claim.upper()}" if recipe.claim else "not on the boards"),
        "; ".join(part for part in (deviation, system.missing) if part),
    )


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
