"""The inputs of a diffusers network by its configuration alone: what is known before torch loads the weights.

`example_of` (torch_example.py) makes tensors of these sizes for the export, and `--dry-run` compares conditions with
them. The rows of the room architectures say what each class takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .architectures.registry import architecture_row
from .architectures.row import Asked, ConditionSizes, NetworkInputs, SampleSize
from .sample_shape import image_sides


def network_inputs(
    name: str,
    config: Mapping[str, Any],
    size: SampleSize | None,
    sizes: ConditionSizes,
    where: str = "the model",
    module: Any = None,
) -> NetworkInputs:
    """Return the inputs of a network of class `name`. `sizes` are those that conditions are known to have.

    `module` is the network where it is in memory. Raises ModelError for classes and configurations that are not
    supported.
    """
    row = architecture_row(name, where)
    known = {**row.defaults, **{key: value for key, value in config.items() if value is not None}}
    inputs = row.inputs(Asked(name, known, size, sizes, where, module))
    if len(inputs.grid or inputs.shape[1:]) == 2:
        image_sides(size)
    return inputs
