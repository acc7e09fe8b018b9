"""share_bits: equal errors of all weights, the widest width for the most outliers, and what is refused."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.graph.ops import Layer, layers
from mezzotint.compiler.rescaling.scaling import channel_axis
from mezzotint.compiler.scales.weights import rounded_weight, weight_format, weight_quantizer
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.share_bits import ShareBits, outliers
from tests.helpers.tiny import context_in, tiny_program


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_in(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def planned(context: Context) -> Program:
    steps = [Normalize(), Observe(channels="inputs"), ChooseScales()]
    return pipeline.run_passes(tiny_program(), steps, context)


def chosen(program: Program) -> list[tuple[Layer, int]]:
    """The layers that are no islands, with their bits."""
    plan = program.require_plan()
    found = []
    for layer in layers(program.graph):
        quantizer = plan.of(name_of(layer.weight), layer.name) if layer.weight is not None else None
        if quantizer is not None and layer.name not in plan.islands:
            found.append((layer, quantizer.bits))
    return found


def test_all_weights_err_equally_under_the_budget(planned: Program, context: Context) -> None:
    after = pipeline.run_passes(planned, [ShareBits(mean_bits=5.0, widths=tuple(range(2, 9)))], context)
    stats, losses, bits, sizes = planned.require_stats(), [], [], []
    for layer, width in chosen(after):
        weight = numpy_of(layer.require_weight())
        squares = stats.mean_squares(name_of(layer.activations[0]), channel_axis(layer))
        assert squares is not None
        by_channel = np.moveaxis(squares.reshape(1, -1, *[1] * (weight.ndim - 2)), 0, layer.require_weight_axis())
        eight = rounded_weight(weight, weight_quantizer(layer, weight_format(8), "mse", "here"))
        share = ((weight - eight) ** 2 * by_channel).sum() / (weight**2 * by_channel).sum()
        losses.append(float(share) * 4.0**8 / weight.size / 4.0**width)
        bits.append(width)
        sizes.append(weight.size)
    assert 4.5 < np.average(bits, weights=sizes) <= 5.0
    inner = [loss for loss, width in zip(losses, bits, strict=True) if 2 < width < 8]
    assert len(inner) > 4
    assert max(inner) / min(inner) <= 4.0 * (1 + 1e-6)  # half a bit to each side
    others = [loss for loss, width in zip(losses, bits, strict=True) if width == 8]
    assert all(loss >= max(inner) / 4.0 * (1 - 1e-6) for loss in others)  # they would take more


def test_the_most_outliers_get_the_widest_width(planned: Program, context: Context) -> None:
    after = pipeline.run_passes(planned, [ShareBits(method="outliers", widths=(2, 4, 8))], context)
    found = [(outliers(numpy_of(layer.require_weight())), layer, bits) for layer, bits in chosen(after)]
    assert {bits for _, _, bits in found} == {2, 8}
    sizes = np.array([numpy_of(layer.require_weight()).size for _, layer, _ in found])
    gains = np.array([share for share, _, _ in found]) * sizes
    wide = np.array([bits == 8 for _, _, bits in found])
    fits = np.array(list(product((0, 1), repeat=len(found)))) @ np.stack([sizes, gains], axis=1)
    best = fits[fits[:, 0] <= sizes.sum() / 3, 1].max()  # 4 bits on average: a third of the weights may have 8
    assert sizes @ wide <= sizes.sum() / 3
    assert gains @ wide == pytest.approx(best)
    assert outliers(np.array([0, 0, 0, 0, 9], np.float32)) == 0.2


def test_what_cannot_be_done_is_refused(context: Context) -> None:
    with pytest.raises(RecipeError, match="mean_bits is 1"):
        ShareBits(mean_bits=1)
    with pytest.raises(RecipeError, match="widths is"):
        ShareBits(widths=(4, 4))
    plain = pipeline.run_passes(tiny_program(), [Normalize(), Observe(), ChooseScales()], context)
    with pytest.raises(StatsError, match="not measured by channel"):
        pipeline.run_passes(plain, [ShareBits()], context)
