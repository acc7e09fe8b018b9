"""normalize: golden pairs."""

from __future__ import annotations

import pytest

from mezzotint.passes.normalize import Normalize
from tests.conftest import Check
from tests.helpers import golden


@pytest.mark.parametrize("case", golden.cases("normalize"))
def test_golden(check_golden: Check, case: str) -> None:
    check_golden(Normalize(), case, raw=True)
