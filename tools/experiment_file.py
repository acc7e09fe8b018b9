"""The YAML file of an experiment: what it may say, and which rows follow from it.

    name: rounding
    models: [{model: digits}, {model: unet.onnx, scheduler: cosine, name: mine}, {name: outside}]
    recipes: [w8a8, gptq]     # or all
    widths: [w8a8, w4a8]      # or claim: each recipe at the width of its claim
    claims: [{recipe: gptq, over: w8a8, width: w4a8, least: 1.0}]
    seeds: [0, 1, 2]
    images: 32                # of each row; also calibration, batch, steps, threads, iterations

Rows are recipes x widths, each beside its baseline, and both sides of each claim. `least` is what the images must gain,
in dB. `pages` names a folder of leaderboards: rows start from the record there, and the page is written again.

    kind: noise               # what the noise correction is worth (tools/experiment_noise.py)
    name: noise
    samplers: [{sampler: ddpm, steps: 10}, {sampler: ddim, eta: 1, steps: 5}]
    weight_bits: [8, 4]
    images: 1000

Paths are relative to the file. A model without `model` lies outside of the repository: the command line names its file
(--model-path NAME=FILE), and a file of its scheduler is looked for beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.errors import InputError
from tools.leaderboard_model import DIGITS_NAME, title_of
from tools.leaderboard_options import NAMES
from tools.leaderboard_page import WIDTHS

Count = Annotated[int, Field(ge=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
CLAIM = "claim"
HINT = "tools/experiment_file.py has examples"


def _known(key: str, names: tuple[str, ...], words: Mapping[str, tuple[str, ...]], hint: str) -> BeforeValidator:
    """Return a validator of a list of names, where a word stands for several of them."""

    def listed(value: Any) -> Any:
        value = list(words[value]) if isinstance(value, str) and value in words else value
        if isinstance(value, list) and (unknown := [name for name in value if name not in names]):
            raise InputError(f"{key}: there is no {unknown[0]!r}", hint=hint)
        return value

    return BeforeValidator(listed)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelFile(_Part):
    """A model; one without `model` is given on the command line."""

    model: str | None = None
    name: Name | None = None
    scheduler: str | None = None

    @property
    def title(self) -> str:
        return self.name or title_of(self.model or "")

    @model_validator(mode="after")
    def _has_a_name(self) -> ModelFile:
        if self.model is None and self.name is None:
            raise InputError("a model without `model` needs a name", hint=HINT)
        return self


class ExperimentModel(ModelFile):
    """A model with the options of a leaderboard that belong to it."""

    size: str | None = None
    guidance: float = 1.0


class Claim(_Part):
    """The images of `recipe` gain at least `least` dB over those of `over`, both at `width`."""

    recipe: str
    over: str
    width: str
    least: float = 0.0

    @model_validator(mode="after")
    def _is_known(self) -> Claim:
        for key, name, known in (
            ("recipe", self.recipe, NAMES),
            ("over", self.over, NAMES),
            ("width", self.width, tuple(WIDTHS)),
        ):
            if name not in known:
                raise InputError(f"claims: {key}: there is no {name!r}", hint=_hint_of(key))
        return self


def _hint_of(key: str) -> str:
    return f"choose among {', '.join(WIDTHS)}" if key == "width" else "`mezzotint recipes` lists them"


Recipes = Annotated[list[str], _known("recipes", NAMES, {"all": NAMES}, _hint_of("recipe"))]
Widths = Annotated[list[str], _known("widths", (*WIDTHS, CLAIM), {CLAIM: (CLAIM,)}, _hint_of("width"))]


class Experiment(_Part):
    """Rows of leaderboards: models x recipes x widths x seeds, and what some of them claim over others."""

    kind: Literal["grid"] = "grid"
    name: Name
    models: Annotated[list[ExperimentModel], Field(min_length=1)]
    recipes: Recipes = []
    widths: Widths = []
    claims: list[Claim] = []
    seeds: Seeds = [0]
    images: Count = 32
    calibration: Count = 32
    batch: Count = 16
    steps: Count = 20
    threads: Count = 1
    iterations: Count | None = None
    pages: str | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Experiment:
        titles = [model.title for model in self.models]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise InputError(f"models: two are called {twice[0]!r}", hint="give one of them a name")
        if DIGITS_NAME in titles and all(model.model != DIGITS_NAME for model in self.models):
            raise InputError(f"models: {DIGITS_NAME!r} is the name of the embedded digits", hint="give another name")
        if self.pages is not None and len(self.seeds) > 1:
            raise InputError("pages: the page of a leaderboard has rows of one seed", hint="leave out pages, or seeds")
        if not self.rows and not self.claims:
            raise InputError("there are no rows", hint="name recipes and widths, or claims")
        return self

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Return (recipe, width) of the grid. A recipe without a claim has no row of `claim`."""
        pairs = [
            (recipe, RECIPES[recipe].claim if width == CLAIM else width)
            for width in self.widths
            for recipe in self.recipes
        ]
        return list(dict.fromkeys(pair for pair in pairs if pair[1]))


class NoisySampler(_Part):
    """A sampler that adds noise of its own."""

    sampler: Literal["ddpm", "ddim", "euler-ancestral"]
    eta: Annotated[float, Field(ge=0)] = 0.0
    steps: Count = 10

    @model_validator(mode="after")
    def _adds_noise(self) -> NoisySampler:
        if self.sampler == "ddim" and self.eta == 0:
            raise InputError("samplers: ddim without eta adds no noise", hint="give eta: 1")
        return self


class NoiseExperiment(_Part):
    """What the noise correction is worth: samplers x bits of the weights x parts of the correction x seeds.

    `features` is an ONNX network of the images' features and classes, by default the classifier of digits.
    """

    kind: Literal["noise"]
    name: Name
    model: ModelFile = ModelFile(model=DIGITS_NAME)
    features: str | None = None
    samplers: Annotated[list[NoisySampler], Field(min_length=1)]
    weight_bits: Annotated[list[Annotated[int, Field(ge=2, le=8)]], Field(min_length=1)] = [8, 4]
    parts: Annotated[list[Literal["none", "output", "all"]], Field(min_length=1)] = ["none", "output", "all"]
    seeds: Seeds = [0]
    images: Annotated[int, Field(ge=2)] = 1000
    calibration: Count = 32
    threads: Count = 1


KINDS: dict[str, type[Experiment] | type[NoiseExperiment]] = {"grid": Experiment, "noise": NoiseExperiment}


def read_experiment(file: Path) -> Experiment | NoiseExperiment:
    """Return the experiment of a file. Raises InputError for another file, and for unknown recipes and widths."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        kind = data.get("kind", "grid") if isinstance(data, dict) else "grid"
        if kind not in KINDS:
            raise InputError(f"kind: there is no {kind!r}", hint=f"choose among {', '.join(KINDS)}")
        return KINDS[kind].model_validate(data)
    except InputError as error:
        raise InputError(error.what, where=str(file), hint=error.hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        what = "keys with values are expected" if first["type"] == "model_type" else first["msg"]
        raise InputError(f"{place}: {what}", where=str(file), hint=HINT) from error
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"the experiment cannot be read: {error}", where=str(file), hint=HINT) from error


def place_models(models: Sequence[ModelFile], file: Path, given: Mapping[str, Path]) -> list[tuple[str, str | None]]:
    """Return (model, scheduler) of each: names, and paths relative to the experiment's file made whole.

    `given` has the files of --model-path by name. Raises InputError for one that is missing, or of no model.
    """
    outside = {model.title for model in models if model.model is None}
    if unknown := sorted(set(given) - outside):
        names = ", ".join(sorted(outside)) or "every model of this experiment has its own"
        raise InputError(f"no model without a path is called {unknown[0]!r}", where="--model-path", hint=names)
    places: list[tuple[str, str | None]] = []
    for model in models:
        if model.model is None and model.title not in given:
            raise InputError(
                f"the model {model.title!r} lies outside of the repository, and its file was not named",
                where=str(file),
                hint=f"give --model-path {model.title}=FILE.onnx",
            )
        where = given[model.title] if model.model is None else file.parent / model.model
        if model.model is None and not where.exists():
            raise InputError("there is no such file", where=f"--model-path {model.title}={where}")
        home = where.absolute().parent if model.model is None else file.parent
        beside = None if model.scheduler is None else home / model.scheduler
        scheduler = str(beside) if beside is not None and beside.exists() else model.scheduler
        places.append((str(where) if where.exists() else str(model.model), scheduler))
    return places
