"""What the compilation of a component is given: the data of its pipeline, and its passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.pipeline import Pass
from .export import ComponentArrays

ComponentForm = Literal["float", "int8"]
COMPONENT_FORMS = ("float", "int8")


@dataclass(frozen=True, eq=False)
class ComponentData:
    """Inputs of a component as the pipeline makes them, by name: batches to calibrate on, and others to measure on.

    The first batch is the example of the export, and has two rows. `words` say what the data are.
    """

    calibration: Sequence[ComponentArrays]
    held_out: Sequence[ComponentArrays]
    words: str


@dataclass(frozen=True)
class ComponentPasses:
    """The passes of a component: exact rewrites, and for int8 those behind the statistics, with layers that stay float.

    `floor_db` is the fidelity below which further layers stay in float.
    """

    exact: tuple[Pass, ...]
    quantize: Callable[[tuple[str, ...]], tuple[Pass, ...]]
    floor_db: float
