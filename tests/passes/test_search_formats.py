"""search_formats: the plan is that of the best configuration, its budget holds, and what is refused."""

from __future__ import annotations

import pytest

from mezzotint.compiler.bits.configurations import SearchState
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program, Site
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.search_formats import SearchFormats
from tests.helpers.tiny import context_in, tiny_program


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_in(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def planned(context: Context) -> Program:
    return pipeline.run_passes(tiny_program(), [Normalize(), Observe(channels="inputs"), ChooseScales()], context)


def test_the_best_measured_configuration_becomes_the_plan(
    planned: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[SearchState] = []
    learn = SearchState.learn

    def kept(self: SearchState) -> None:
        states.append(self)
        learn(self)

    monkeypatch.setattr(SearchState, "learn", kept)
    search = SearchFormats(mean_bits=5, formats=("uniform", "kmeans", "float"), configurations=9, rounds=3, length=2)
    after = pipeline.run_passes(planned, [search], context)
    (state,) = set(states)
    assert len(state.found) == 9 and len({*state.found.values()}) > 6
    best, _ = min(state.found.items(), key=lambda pair: pair[1])
    size = state.limit / 5
    bits = sum(row[c] for row, c in zip(state.costs, best, strict=True)) / size
    assert f": {bits:.3f} bits a weight" in after.history[-1].note and bits <= 5
    kinds = [(b, book) for b in (3, 4, 8) for book in (False, True, True) if b < 8 or not book]
    wanted = [kinds[k] for k in best]
    plan = after.require_plan()
    every = [layer for layer in layers(after.graph) if layer.weight is not None and layer.name not in plan.islands]
    found = [plan.quantizers[Site(name_of(layer.weight))] for layer in every]
    chosen = [(quantizer.bits, quantizer.levels is not None) for quantizer in found]
    assert chosen == wanted
    weights = [q for site, q in after.require_plan().quantizers.items() if q.axis is not None]
    assert {q.by for q in weights if q.levels is not None} == {"search_formats"}
    assert len({(q.bits, q.levels is None) for q in weights}) > 1
    written = pipeline.run_passes(after, [InsertQdq()], context)
    assert written.history[-1].name == "insert_qdq"


def test_what_cannot_be_done_is_refused(planned: Program, context: Context) -> None:
    with pytest.raises(RecipeError, match="no width has any of the formats"):
        SearchFormats(widths=(8,), formats=("kmeans",))
    with pytest.raises(RecipeError, match="formats is"):
        SearchFormats(formats=("posit",))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"the smallest configuration has 3\.000 bits a weight"):
        pipeline.run_passes(planned, [SearchFormats(mean_bits=2.5, formats=("uniform",))], context)
    plain = pipeline.run_passes(tiny_program(), [Normalize(), Observe(), ChooseScales()], context)
    with pytest.raises(StatsError, match="not measured by channel"):
        pipeline.run_passes(plain, [SearchFormats()], context)
