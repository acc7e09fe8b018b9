"""search_formats: the plan is that of the best configuration, its budget holds, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.bits.configurations import SearchState
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program, Site
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.pruning.compressed import InputNumbers, compressed_weights
from mezzotint.compiler.pruning.patterns import PruningPattern
from mezzotint.compiler.pruning.prunable import find_prunable
from mezzotint.compiler.pruning.weight_inputs import WeightInputs
from mezzotint.compiler.scales.weights import rounded_weight
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
    with pytest.raises(RecipeError, match="sparsities are those of uniform weights"):
        SearchFormats(sparsities=(0.5,))
    with pytest.raises(RecipeError, match="a sparsity is 1"):
        SearchFormats(formats=("uniform",), sparsities=(0.5, 1.0))
    with pytest.raises(RecipeError, match=r"the smallest configuration has 3\.000 bits a weight"):
        pipeline.run_passes(planned, [SearchFormats(mean_bits=2.5, formats=("uniform",))], context)
    plain = pipeline.run_passes(tiny_program(), [Normalize(), Observe(), ChooseScales()], context)
    with pytest.raises(StatsError, match="not measured by channel"):
        pipeline.run_passes(plain, [SearchFormats()], context)


def test_the_file_has_the_pruned_weights_that_were_measured(planned: Program, context: Context) -> None:
    search = SearchFormats(
        mean_bits=4.2, widths=(4, 8), formats=("uniform",), sparsities=(0.5, 0.75), configurations=6, rounds=2, length=2
    )
    after = pipeline.run_passes(planned, [search], context)
    assert " zeros" in after.history[-1].note
    plan, found = after.require_plan(), set()
    for layer in (
        layer for layer in layers(after.graph) if layer.weight is not None and layer.name not in plan.islands
    ):
        name, weight = name_of(layer.weight), numpy_of(layer.require_weight())
        quantizer = plan.quantizers[Site(name)]
        assert quantizer.by == search.name
        np.testing.assert_allclose(rounded_weight(weight, quantizer), weight, atol=1e-6 * float(np.abs(weight).max()))
        found.add(round(float(np.mean(weight == 0)), 1))
    assert len(found) > 1 and max(found) >= 0.5


def test_each_form_of_a_weight_has_the_error_that_its_inputs_say(planned: Program, context: Context) -> None:
    """rho by its formula, written out: tr((W - W'') H (W - W'')^T) / tr(W H W^T)."""
    islands = ("first", "last")
    forms = compressed_weights(planned, context, (4, 8), (0.0, 0.5), islands, "here")
    weights, _ = find_prunable(planned, islands, PruningPattern("unstructured"), "here")
    for weight, gathered in WeightInputs.of(planned, context, InputNumbers()).each(weights, "here"):
        every = {(form.bits, form.sparsity): form for form in forms.pop(name_of(weight.inputs.floats))}
        assert set(every) == {(4, 0.0), (8, 0.0), (4, 0.5), (8, 0.5)}
        (gram,), dense = gathered.gram(weight.inputs), weight.inputs.rows()
        power = np.trace(dense @ gram @ dense.T)
        for form in every.values():
            rows = np.moveaxis(form.values(), weight.inputs.axis, 0).reshape(dense.shape)
            error = np.trace((dense - rows) @ gram @ (dense - rows).T) / power
            assert form.share == pytest.approx(error, rel=1e-3)
        assert every[8, 0.0].share < every[4, 0.0].share and every[8, 0.0].share < every[8, 0.5].share
        plain = rounded_weight(numpy_of(weight.inputs.floats), every[4, 0.0].quantizer)
        moved = dense - np.moveaxis(plain, weight.inputs.axis, 0).reshape(dense.shape)
        assert every[4, 0.0].share <= np.trace(moved @ gram @ moved.T) / power
        assert every[8, 0.5].bits_in_file == 8 * round(dense.size / 2) + dense.size
        assert every[8, 0.0].bits_in_file == 8 * dense.size
        assert np.mean(every[4, 0.5].values() == 0) >= 0.5
    assert not forms
