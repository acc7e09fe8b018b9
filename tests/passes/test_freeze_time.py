"""freeze_time: golden pairs."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.passes.freeze_time import FreezeTime
from tests import golden
from tests.conftest import Check

CASES = golden.cases("freeze_time")


@pytest.mark.parametrize("case", CASES)
def test_golden(check_golden: Check, case: str) -> None:
    conditions = {"label": np.array([0, 2])} if case == "label" else None
    check_golden(FreezeTime(), case, conditions=conditions)
