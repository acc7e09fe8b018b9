"""round_scales: every scale is an integer of few bits times a power of two, and no range is cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.errors import RecipeError
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.round_scales import RoundScales, dyadic
from tests.helpers.tiny import context_in, tiny_program


@settings(deadline=None, max_examples=60)
@given(st.floats(2.0**-30, 2.0**20, width=32), st.integers(1, 16), st.booleans())
def test_a_scale_is_an_integer_of_so_many_bits_and_a_power_of_two(value: float, bits: int, up: bool) -> None:
    scale = np.float32(value)
    found = float(dyadic(np.array([scale]), bits, up=up)[0])
    assert float(np.frexp(found)[0] * 2**bits).is_integer()
    step = 2.0 ** (np.frexp(float(scale))[1] - bits)
    assert 0 <= found - float(scale) < step if up else abs(found - float(scale)) <= step / 2


def test_a_plan_of_powers_of_two_runs(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    planned = pipeline.run_passes(tiny_program(), [Normalize(), Observe(), ChooseScales()], context)
    after = pipeline.run_passes(planned, [RoundScales(bits=1)], context)
    old, new = planned.require_plan().quantizers, after.require_plan().quantizers
    for site, quantizer in new.items():
        assert (np.frexp(quantizer.scale)[0] == 0.5).all()
        if quantizer.axis is None:
            assert old[site].scale <= quantizer.scale < 2 * old[site].scale
    written = pipeline.run_passes(after, [InsertQdq()], context)
    assert "moved by" in after.history[-1].note and written.history[-1].name == "insert_qdq"
    only = pipeline.run_passes(planned, [RoundScales(activations=False)], context).require_plan().quantizers
    assert all(only[site] is old[site] for site in only if only[site].axis is None)


def test_bits_have_ends() -> None:
    with pytest.raises(RecipeError, match="choose 1 to 16"):
        RoundScales(bits=17)
