"""fold_scales: golden pairs, and that a factor which was not folded would be noticed."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.passes import fold_scales
from mezzotint.passes.fold_scales import FoldScales
from tests.conftest import Check
from tests.helpers import golden

SHAPES = {"attention": (4, 4), "left_alone": (4, 4, 4)}


@pytest.mark.parametrize("case", golden.cases("fold_scales"))
def test_golden(check_golden: Check, case: str) -> None:
    check_golden(FoldScales(), case, shape=SHAPES[case])


def test_a_factor_that_is_one_percent_off_is_refused(check_golden: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline compares the graphs before and after: the tolerance is not wide enough for this."""
    true = numpy_of
    monkeypatch.setattr(fold_scales, "numpy_of", lambda value: np.asarray(true(value) * 1.01, np.float32))
    with pytest.raises(PassError):
        check_golden(FoldScales(), "attention", shape=SHAPES["attention"])
