"""The networks of a page: which files they have, and how their timestep input is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.compiler.graph.model_file import check_model_file
from mezzotint.compiler.graph.tensor_checks import data_file
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Timestep

if TYPE_CHECKING:
    import onnx

TIME_TYPES = ("int64", "int32", "float32", "float64")
"""Types of a timestep input that a page can make."""
MOST_NETWORK_BYTES = 1_500_000_000
"""The memory of a page has 4 GiB; the files are in it beside their session, which copies them."""


@dataclass(frozen=True)
class WebNetwork:
    """One ONNX file, its external data by the names that the graph uses, and its timestep input."""

    path: Path
    data: dict[str, Path]
    time_type: str
    time_shape: tuple[int | None, ...]
    fixed_batch: int | None

    @classmethod
    def of(cls, path: Path, denoiser: Denoiser, sample_shape: tuple[int, ...]) -> WebNetwork:
        """Return the network of a checked file. Raises InputError for one that no page can call."""
        inputs, signature = denoiser.inputs, denoiser.signature
        dtype, shape = inputs[signature.timestep]
        declared = inputs[signature.sample][1][1:]
        if any(isinstance(size, int) and size != own for size, own in zip(declared, sample_shape, strict=True)):
            raise InputError(
                f"the network takes samples {list(declared)}, the bundle samples {list(sample_shape)}", where=str(path)
            )
        if dtype.name not in TIME_TYPES:
            raise InputError(f"the timestep is {dtype.name}, which a page cannot make", where=str(path))
        network = cls(
            path,
            _external_data(path),
            dtype.name,
            tuple(size if isinstance(size, int) else None for size in shape),
            denoiser.fixed_batch,
        )
        if network.bytes > MOST_NETWORK_BYTES:
            raise InputError(
                f"the network has {network.bytes / 1e9:.1f} GB, too many for the 4 GiB of memory of a web page",
                where=str(path),
                hint=f"the limit is {MOST_NETWORK_BYTES / 1e9:g} GB",
            )
        return network

    @property
    def bytes(self) -> int:
        """The size of the file and of its data."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file and its data."""
        return (self.path, *self.data.values())

    def check_times(self, times: Sequence[Timestep]) -> None:
        """Raise InputError for a timestep between two whole ones, if the input takes whole ones only."""
        between = [t for t in times if not float(t).is_integer()]
        if between and self.time_type.startswith("int"):
            raise InputError(
                f"timestep {between[0]:g} lies between two training timesteps, and the input is {self.time_type}",
                where=str(self.path),
                hint="compile the model for this sampler, or use another one",
            )

    def to_json(self, places: Mapping[Path, str]) -> dict[str, Any]:
        """Return the facts for the page; `places` has the place of each file beside it."""
        return {
            "file": places[self.path],
            "data": [{"path": name, "file": places[file]} for name, file in self.data.items()],
            "timestep": {"type": self.time_type, "shape": list(self.time_shape)},
        }


def _external_data(path: Path) -> dict[str, Path]:
    """Return the external data files of a checked model, by the location that the graph states."""
    locations = {
        entry.value
        for tensor in _tensors(check_model_file(path).graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    found = {name: data_file(name, path) for name in sorted(locations)}
    return {name: file for name, file in found.items() if file is not None}


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the constants of a graph and of the graphs inside it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)
