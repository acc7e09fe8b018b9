"""The graph that OpenVINO compiles of a model for the CPU, and the types that its layers compute on.

The names of primitives differ from one processor to another (`brgconv_avx512_I8`, `brgconv_avx512_amx_I8`,
`undef_I8` where shapes are open), and `runtimePrecision` is that of the stored weights where OpenVINO keeps them
compressed beside float data. So a layer counts as integer by the element types of its first two inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.providers.openvino import CPU_PROPERTIES, load_openvino

INTEGER_TYPES = ("u8", "i8")
PRODUCT_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""The layer types of OpenVINO that multiply matrices. A `Subgraph` may hold products, too."""


@dataclass(frozen=True)
class CompiledLayer:
    """A node of the compiled graph. `inputs` are the element types of its inputs, `names` those of nodes that it runs.

    `names` begins with its own; OpenVINO appends suffixes to the names of nodes that it changes.
    """

    layer: str
    primitive: str
    inputs: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def integer(self) -> bool:
        """Return whether both of its factors are 8-bit integers."""
        return len(self.inputs) > 1 and all(kind in INTEGER_TYPES for kind in self.inputs[:2])


@dataclass(frozen=True)
class CompiledGraph:
    """The layers in the order in which they run, and the version of OpenVINO."""

    layers: tuple[CompiledLayer, ...]
    version: str


def compiled_graph(model: Path, *, threads: int | None = None) -> CompiledGraph:
    """Return what OpenVINO compiles of a model file, with the properties that bundles run with there.

    Raises EngineError where OpenVINO is not installed, InputError where it refuses the file.
    """
    openvino, version = load_openvino()
    options = {**CPU_PROPERTIES, "INFERENCE_PRECISION_HINT": "f32"}  # as a bundle runs without --precision
    options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(str(model)), "CPU", options)
        operations = compiled.get_runtime_model().get_ordered_ops()
    except RuntimeError as error:  # every error of OpenVINO
        raise InputError(f"OpenVINO cannot load the model: {_in_short(str(error))}", where=str(model)) from error
    return CompiledGraph(tuple(_layer(operation) for operation in operations), version)


def _layer(operation: Any) -> CompiledLayer:
    info = operation.get_rt_info()

    def text(key: str) -> str:
        return str(info[key].astype(str)) if key in info else ""

    types = [operation.get_input_element_type(i).get_type_name() for i in range(operation.get_input_size())]
    names = [operation.get_friendly_name(), *text("originalLayersNames").split(",")]
    return CompiledLayer(
        text("layerType"), text("primitiveType"), tuple(types), tuple(name for name in dict.fromkeys(names) if name)
    )


def _in_short(message: str) -> str:
    """Return the lines of an error that speak of the model, without those that name OpenVINO's source files."""
    lines: Sequence[str] = [line.strip() for line in message.splitlines() if line.strip()]
    relevant = [line for line in lines if "src/" not in line or "ONNX node" in line]
    return " ".join(" ".join(relevant).split())[:400] or "it says no more"
