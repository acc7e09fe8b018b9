"""Passes and recipes, and the pipeline that runs them.

A recipe checks the order of its passes. run_passes gives each pass a clone of the program, verifies the result, and
writes the history, dumps and, when a pass fails, a reproducer.
"""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.sampling.condition_network import call_conditions
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.targets import ONNXRUNTIME, Target

from ..errors import PassError, RecipeError
from ..graph import weight_store as store
from ..graph.nodes import model_text, text_diff
from ..moves import exchange, move_new, occupant
from ..stages import OLD, is_full, partial_folder
from . import snapshot, verify
from .context import CPU, Context
from .memory import PeakMemory
from .program import Program, Record

__all__ = ["CPU", "Context", "Dump", "GraphPass", "Pass", "Recipe", "run_passes"]

LOG = logging.getLogger("mezzotint")
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


class Pass(ABC):
    """One step of a recipe: a frozen dataclass whose fields are its options.

    Facts are names such as "stats" or "qdq". `needs` are the facts that must hold before the pass, `before` those that
    must not, `gives` those that hold after it, and `spoils` those that hold no longer. A pass with a `tolerance` is
    exact: the pipeline runs the graph before and after it, and refuses a larger difference, relative to the largest
    output.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    before: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    tolerance: ClassVar[float | None] = None

    @abstractmethod
    def run(self, program: Program, context: Context) -> Program:
        """Return the program after this pass. The graph of `program` is a clone, which the pass may edit in place."""

    @property
    def name(self) -> str:
        """Return the class name in snake case, which is the name of the pass in recipes and of its file."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:  # noqa: B027 most passes fit everywhere
        """Raise RecipeError for a recipe with these passes, or a deployment, that this pass cannot work with."""

    def for_target(self, target: Target, passes: Sequence[Pass]) -> Pass:
        """Return this pass, one of `passes`, as a target needs it. Raise RecipeError if it has no form for that."""
        return self

    def trains_on(self, device: str) -> bool:
        """Return whether this pass trains. Raise InputError if it does and the device is not there."""
        return False

    def code(self, program: Program) -> str | None:
        """Return the program's graph as the code that this pass trained it in, or None for a pass that does not."""
        return None

    def options(self) -> dict[str, Any]:
        """Return the options as plain data, in the order of the fields."""
        plain: Any = self
        names = [f.name for f in fields(plain)] if is_dataclass(plain) else []
        values = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


class GraphPass(Pass):
    """An exact rewrite of the float graph. It comes before the quantizers, and invalidates statistics and plan."""

    before = frozenset({"qdq"})
    spoils = frozenset({"stats", "plan"})


@dataclass(frozen=True)
class Recipe:
    """A named list of passes. Raises RecipeError at once for an order that cannot work.

    `baseline` is the recipe without the method of this one. `claim` is the width ("w4a8") at which, according to the
    paper, the method is better than the baseline; `claim_eta` is the eta of DDIM that this needs. tools/leaderboard.py
    measures both there. `target` is the engine that it is compiled for when no other is chosen.
    """

    name: str
    description: str
    passes: tuple[Pass, ...]
    paper: str = ""
    baseline: str = ""
    claim: str = ""
    claim_eta: float = 0.0
    target: Target = ONNXRUNTIME

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
        """Refuse different `islands` in two passes: the scales of one would be those of another model."""
        chosen = self.islands_by_pass
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
    def islands_by_pass(self) -> dict[str, tuple[str, ...]]:
        """Return the `islands` of each pass that has the option, and has a use for it: null says that it has none."""
        chosen = {p.name: p.options().get("islands") for p in self.passes}
        return {name: tuple(islands) for name, islands in chosen.items() if islands is not None}

    @property
    def islands(self) -> tuple[str, ...]:
        """Return the `islands` of all passes: the roles and node name patterns that stay in float."""
        return tuple(dict.fromkeys(island for islands in self.islands_by_pass.values() for island in islands))

    def for_target(self, target: Target) -> Recipe:
        """Return the recipe with its passes as a target needs them. Raise RecipeError if one has no form for it."""
        return replace(self, passes=tuple(step.for_target(target, self.passes) for step in self.passes), target=target)

    def check(self, deployment: Deployment) -> None:
        """Raise RecipeError for whatever the passes would refuse on any model."""
        for step in self.passes:
            step.check(self.passes, deployment)

    def check_device(self, device: str) -> None:
        """Raise InputError for a device that is not there, and RecipeError for one that no pass would use."""
        if not _DEVICE.fullmatch(device):
            raise InputError(f"the device is {device!r}", where="--device", hint="choose cpu, cuda, or cuda:N (cuda:1)")
        trains = [step.trains_on(device) for step in self.passes]
        if device != CPU and not any(trains):
            raise RecipeError(
                f"the device is {device!r}, and no pass of the recipe trains",
                where=f"recipe {self.name!r}",
                hint="leave out --device: only passes that train or take gradients use it, all else runs on the CPU",
            )

    def to_json(self) -> dict[str, Any]:
        steps = [{"pass": p.name, **({"options": p.options()} if p.options() else {})} for p in self.passes]
        claims = {key: value for key in ("baseline", "claim", "claim_eta") if (value := getattr(self, key))}
        claims |= {} if self.target == ONNXRUNTIME else {"target": self.target}
        return {"name": self.name, "description": self.description, "paper": self.paper, **claims, "passes": steps}


def _words(facts: frozenset[str] | set[str]) -> str:
    return ", ".join(repr(f) for f in sorted(facts))


@dataclass(frozen=True)
class Dump:
    """The folder for the graph after each pass: `NNN_pass.txt` and `.diff`.

    When `models` is set there is `NNN_pass.onnx` too, and behind a pass that trains `NNN_pass.py`, the torch module.
    """

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
    """Return the program after all passes, run in order, with the graph verified after each.

    When a pass fails, write the program before it and the passes that were left to the folder `reproducer`, for
    `tools/replay.py`, and raise PassError. Errors about the input, such as StatsError, are raised as they are.
    """
    checker = verify.ExactChecker(context.folder, threads=context.threads, seed=context.seed)
    before = model_text(program.model) if dump else ""
    if dump:
        _dump(dump, len(program.history), "imported", program, before, "", context)
    for i, step in enumerate(passes):
        context.progress("passes", i, len(passes))
        try:
            after_program = _run_one(program, step, context, checker)
        except Exception as error:
            _explain(error, program, step, passes[i:], reproducer)
            raise
        if dump:
            after, number = model_text(after_program.model), len(after_program.history)
            _dump(dump, number, step.name, after_program, after, text_diff(before, after, step.name), context)
            code = step.code(after_program) if dump.models else None
            if code is not None:
                path = dump.folder / f"{number:03d}_{step.name}.py"
                path.write_text(code, encoding="utf-8", newline="\n")
            before = after
        program = after_program
    context.progress("passes", len(passes), len(passes))
    return program


def _run_one(program: Program, step: Pass, context: Context, checker: verify.ExactChecker) -> Program:
    start = time.perf_counter()
    nodes = program.graph.num_nodes()
    with PeakMemory() as memory:
        clone = replace(program, model=program.model.clone(), note="")
        store.settle(clone.model, context.folder)  # statistics name a graph by the places of its weights
        after = step.run(clone, context)
        store.settle(after.model, context.folder)
        verify.structure(after, step.name, before=program)
        if step.tolerance is not None:
            rows = context.condition_rows(0, program.fixed_batch or checker.BATCH)
            fed = partial(call_conditions, context.condition_network, rows=rows)
            checker.compare(program, after, step.name, tolerance=step.tolerance, conditions=fed)
    seconds = time.perf_counter() - start
    record = Record(step.name, step.options(), nodes, after.graph.num_nodes(), seconds, memory.peak_mb, note=after.note)
    LOG.debug("%s: %.3f s, %d -> %d nodes: %s", record.name, seconds, nodes, record.nodes_after, record.note)
    return replace(after, history=(*program.history, record), note="")


def _explain(error: Exception, program: Program, step: Pass, rest: Sequence[Pass], reproducer: Path | None) -> None:
    """Write a reproducer, and raise PassError for any error that is not one of the compiler's own."""
    if isinstance(error, MezzotintError) and not isinstance(error, PassError):
        return  # the input was refused: the pass has no defect to reproduce
    history = " -> ".join([*(r.name for r in program.history), step.name])
    if isinstance(error, OSError) and is_full(error):
        return
    hint = None if reproducer is None else _reproduce(program, rest, reproducer)
    if isinstance(error, PassError):
        error.where, error.hint = f"{error.where or step.name} (history: {history})", error.hint or hint
        return
    raise PassError(f"{step.name} failed: {type(error).__name__}: {error}", where=history, hint=hint) from error


def _reproduce(program: Program, rest: Sequence[Pass], folder: Path) -> str:
    """Write the reproducer and return the hint at it. A failure here must not replace the error of the pass."""
    try:
        with partial_folder(folder.absolute()) as hidden:
            pending = [{"pass": p.name, "options": p.options()} for p in rest]
            snapshot.save_program(program, hidden / "saved", pending=pending)
            if occupant(folder) is None:
                move_new(hidden / "saved", folder)
            elif snapshot.is_saved_program(folder):
                exchange(hidden / "saved", folder, hidden / OLD)
            else:
                return f"move {folder} away, and compile again for a folder that reproduces the error"
    except Exception as error:
        return f"no folder that reproduces it could be written: {str(error).splitlines()[0]}"
    return f"run it again with: python tools/replay.py {folder}"


def _dump(dump: Dump, number: int, name: str, program: Program, text: str, difference: str, context: Context) -> None:
    dump.folder.mkdir(parents=True, exist_ok=True)
    stem = f"{number:03d}_{name}"
    (dump.folder / f"{stem}.txt").write_text(text, encoding="utf-8", newline="\n")
    (dump.folder / f"{stem}.diff").write_text(difference, encoding="utf-8", newline="\n")
    if dump.models:
        store.copy(context.folder / store.WEIGHTS, dump.folder / store.WEIGHTS)
        store.move(store.write(program.model, context.folder, stem), dump.folder)
