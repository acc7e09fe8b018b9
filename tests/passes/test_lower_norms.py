"""lower_norms: golden pairs."""

from __future__ import annotations

import pytest

from mezzotint.passes.lower_norms import LowerNorms
from tests import golden
from tests.conftest import Check


@pytest.mark.parametrize("case", golden.cases("lower_norms"))
def test_golden(check_golden: Check, case: str) -> None:
    check_golden(LowerNorms(), case, shape=(4, 4, 4))
