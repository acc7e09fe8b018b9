"""The table of lowerings."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from mezzotint.compiler.core.program import Lowering, Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.lowering.lower import LOWERINGS, lower


def test_every_lowering_that_a_program_may_name_is_in_the_table() -> None:
    assert tuple(LOWERINGS) == get_args(Lowering)


def test_an_unknown_lowering_is_refused(tiny: Program) -> None:
    unknown: dict[str, object] = {"lowering": "qdp"}
    with pytest.raises(RecipeError, match=r"unknown lowering 'qdp'(.|\n)*choose one of qdq, integer, constant"):
        lower(replace(tiny, **unknown))  # type: ignore[arg-type]
