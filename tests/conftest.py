"""What tests of the compiler and of the passes share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.constant_folding import infer_shapes
from tests.helpers import golden, tiers
from tests.helpers.tiny import context_in, program_of, tiny_program

# the fixtures of the front ends, the API and the command line; the browser
pytest_plugins = ["tests.helpers.models", "tests.helpers.browser", "tests.helpers.whole"]
Check = Callable[..., Program]
# The time of an example says how busy the machine is, and not whether the code is right.
settings.register_profile("mezzotint", deadline=None)
settings.load_profile("mezzotint")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/passes/golden/*/*.after.txt")
    parser.addoption("--quick", action="store_true", help="only tests that are not slow and need no torch or browser")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out, with --quick, the files that need torch or are slow."""
    if not config.getoption("--quick") or collection_path.suffix != ".py":
        return None
    return None if tiers.is_quick(collection_path.relative_to(tiers.TESTS).as_posix()) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers.mark(items)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # or one worker waits for them in the end
    if config.getoption("--quick"):
        items[:] = [item for item in items if item.get_closest_marker("pure") or item.get_closest_marker("onnxruntime")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    with tiers.check(item):
        return (yield)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    folder = tmp_path / "work"
    folder.mkdir()
    return context_in(folder)


@pytest.fixture
def tiny() -> Program:
    """The denoiser of tests/helpers/tiny.py, deployed with three DDIM steps."""
    return tiny_program()


@pytest.fixture
def check_golden(request: pytest.FixtureRequest, context: Context) -> Check:
    """`check_golden(pass, case)` runs one pass over one golden pair and returns the program after it.

    The pass runs as in a compilation: on a clone, with the structure verified and, if it is exact, the numbers; then
    onnxruntime runs the result. `prepare` turns the program of the file into what the pass needs (a plan, say);
    `raw` leaves the types and shapes of inner values unknown, as a model without normalize may have them.
    """

    def check(
        step: Pass,
        case: str,
        *,
        prepare: Callable[[Program], Program] | None = None,
        conditions: Mapping[str, npt.NDArray[Any]] | None = None,
        shape: tuple[int, ...] = (2, 4, 4),
        raw: bool = False,
    ) -> Program:
        given = dict(conditions or {})
        model = golden.before(step.name, case)
        model = model if raw else infer_shapes(model)
        program = program_of(model, shape=shape, num_train=6, steps=3, conditions=tuple(given))
        program = prepare(program) if prepare is not None else program
        after = pipeline.run_passes(program, [step], replace(context, conditions=given))
        golden.compare(step.name, case, after.model, update=bool(request.config.getoption("--update-golden")))
        x = np.zeros((2, *shape), np.float32)
        with Executor(after.model, context.folder, threads=2) as executor:
            outputs = executor.call(program.signature, x, 2, {n: rows[:2] for n, rows in given.items()})
        assert np.isfinite(outputs["epsilon"]).all()
        return after

    return check
