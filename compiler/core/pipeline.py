"""Pass, Recipe, run_passes(): order check, clone, verify, time, dump, reproducer."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.progress import Progress, silent

from ..errors import PassError, RecipeError
from ..graph import nodes as graph
from ..graph import weight_store as store
from . import snapshot, verify
from .memory import PeakMemory
from .program import Program, Record


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the program: where to work, what to calibrate on, how many threads.

    `conditions` maps each condition to an array `[rows, ...]`; calibration goes through the rows in turn.
    `unconditional` has the rows of the other half of a guided call, `[1, ...]`. `cache` is a folder where statistics
    are kept for other compilations (compiler/calibration/stats_cache.py).
    """

    folder: Path
    seed: int = 0
    threads: int | None = None
    samples: int = 16
    batch: int = 8
    conditions: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    unconditional: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    progress: Progress = silent
    cache: Path | None = None

    def condition_rows(self, first: int, rows: int) -> dict[str, npt.NDArray[Any]]:
        """`rows` rows of each condition, starting at `first` and beginning again at the end."""
        return {n: np.take(a, np.arange(first, first + rows) % len(a), axis=0) for n, a in self.conditions.items()}


class Pass(ABC):
    """One step of a recipe: a frozen dataclass whose fields are its options.

    `needs` and `gives` name facts about the program (such as "stats" or "qdq"); `before` names facts that must not
    hold yet; `spoils` names those that no longer hold afterwards. A pass with a `tolerance` is exact: the pipeline
    runs the graph before and after it and refuses a larger difference, relative to the largest output.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    before: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    tolerance: ClassVar[float | None] = None

    @abstractmethod
    def run(self, program: Program, context: Context) -> Program:
        """The program after this pass. The graph is the pass's own clone: it may be edited in place."""

    @property
    def name(self) -> str:
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def options(self) -> dict[str, Any]:
        """The options as plain data, in the order of the fields; a class without fields has none."""
        plain: Any = self
        names = [f.name for f in fields(plain)] if is_dataclass(plain) else []
        values = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


class GraphPass(Pass):
    """An exact rewrite of the float graph: it comes before the quantizers, and measurements do not survive it."""

    before = frozenset({"qdq"})
    spoils = frozenset({"stats", "plan"})


@dataclass(frozen=True)
class Recipe:
    """A named list of passes. An order that cannot work is refused here, not after an hour of calibration.

    `baseline` names the recipe that is this one without its method, and `claim` the width ("w4a8") for which the paper
    says that the method beats it; tools/leaderboard.py measures both.
    """

    name: str
    description: str
    passes: tuple[Pass, ...]
    paper: str = ""
    baseline: str = ""
    claim: str = ""

    def __post_init__(self) -> None:
        have: set[str] = set()
        done: list[str] = []
        for step in self.passes:
            where = f"recipe {self.name!r}: {' -> '.join([*done, step.name])}"
            if missing := step.needs - have:
                raise RecipeError(
                    f"{step.name} needs {_words(missing)}, which no earlier pass gives",
                    where=where,
                    hint=f"put a pass in front of it that gives {_words(missing)}",
                )
            if late := step.before & have:
                raise RecipeError(
                    f"{step.name} must come before {_words(late)} is there", where=where, hint="move it to the front"
                )
            have = (have - step.spoils) | step.gives
            done.append(step.name)
        self._check_islands()

    def _check_islands(self) -> None:
        """Passes that keep different layers in float would each work for another model."""
        chosen = {p.name: p.options()["islands"] for p in self.passes if "islands" in p.options()}
        for name, islands in chosen.items():
            first = next(iter(chosen))
            if islands != chosen[first]:
                raise RecipeError(
                    f"{first} keeps {_words(set(chosen[first])) or 'nothing'} in float, "
                    f"and {name} {_words(set(islands)) or 'nothing'}",
                    where=f"recipe {self.name!r}",
                    hint="set the same islands for: " + ", ".join(chosen),
                )

    @property
    def islands(self) -> tuple[str, ...]:
        """What the recipe keeps in float on purpose: the `islands` of its passes (roles, patterns of node names)."""
        return tuple(dict.fromkeys(island for p in self.passes for island in p.options().get("islands", ())))

    def to_json(self) -> dict[str, Any]:
        steps = [{"pass": p.name, **({"options": p.options()} if p.options() else {})} for p in self.passes]
        claims = {key: value for key in ("baseline", "claim") if (value := getattr(self, key))}
        return {"name": self.name, "description": self.description, "paper": self.paper, **claims, "passes": steps}


def _words(facts: frozenset[str] | set[str]) -> str:
    return ", ".join(repr(f) for f in sorted(facts))


@dataclass(frozen=True)
class Dump:
    """Where the pipeline writes what each pass did: `NNN_pass.txt` and `.diff`, and `.onnx` when `models` is set."""

    folder: Path
    models: bool = False


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    *,
    dump: Dump | None = None,
    reproducer: Path | None = None,
) -> Program:
    """Run passes in order; the graph is verified after each.

    On failure the program before the failing pass is saved to `reproducer`, for `tools/replay.py`.
    """
    checker = verify.ExactChecker(context.folder, threads=context.threads, seed=context.seed)
    before = graph.model_text(program.model)
    if dump:
        _dump(dump, len(program.history), "imported", program, before, "", context)
    for i, step in enumerate(passes):
        context.progress("passes", i, len(passes))
        try:
            after_program = _run_one(program, step, context, checker)
        except Exception as error:
            _explain(error, program, step, passes[i:], reproducer)
            raise
        after = graph.model_text(after_program.model)
        if dump:
            number = len(after_program.history)
            _dump(dump, number, step.name, after_program, after, graph.text_diff(before, after, step.name), context)
        program, before = after_program, after
    context.progress("passes", len(passes), len(passes))
    return program


def _run_one(program: Program, step: Pass, context: Context, checker: verify.ExactChecker) -> Program:
    start = time.perf_counter()
    nodes = program.graph.num_nodes()
    with PeakMemory() as memory:
        clone = replace(program, model=program.model.clone(), note="")
        after = step.run(clone, context)
        verify.structure(after, step.name, before=program)
        if step.tolerance is not None:
            conditions = context.condition_rows(0, program.fixed_batch or checker.BATCH)
            checker.compare(program, after, step.name, tolerance=step.tolerance, conditions=conditions)
    seconds = time.perf_counter() - start
    record = Record(step.name, step.options(), nodes, after.graph.num_nodes(), seconds, memory.peak_mb, note=after.note)
    return replace(after, history=(*program.history, record), note="")


def _explain(error: Exception, program: Program, step: Pass, rest: Sequence[Pass], reproducer: Path | None) -> None:
    """Leave a reproducer, and turn a surprise inside a pass into one of our errors."""
    if isinstance(error, MezzotintError) and not isinstance(error, PassError):
        return  # a refused input is an answer, not a defect of the pass
    history = " -> ".join([*(r.name for r in program.history), step.name])
    hint = None
    if reproducer is not None:
        snapshot.save_program(program, reproducer, pending=[{"pass": p.name, "options": p.options()} for p in rest])
        hint = f"run it again with: python tools/replay.py {reproducer}"
    if isinstance(error, PassError):
        error.where, error.hint = f"{error.where or step.name} (history: {history})", error.hint or hint
        return
    raise PassError(f"{step.name} failed: {type(error).__name__}: {error}", where=history, hint=hint) from error


def _dump(dump: Dump, number: int, name: str, program: Program, text: str, difference: str, context: Context) -> None:
    dump.folder.mkdir(parents=True, exist_ok=True)
    stem = f"{number:03d}_{name}"
    (dump.folder / f"{stem}.txt").write_text(text, encoding="utf-8", newline="\n")
    (dump.folder / f"{stem}.diff").write_text(difference, encoding="utf-8", newline="\n")
    if dump.models:
        shared = dump.folder / store.WEIGHTS
        if not shared.exists():
            store.copy(context.folder / store.WEIGHTS, shared)
        store.move(store.write(program.model, context.folder, stem), dump.folder)
