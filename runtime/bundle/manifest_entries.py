"""The parts of a bundle's manifest. Each class has the keys of one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .field_values import declared_sizes, dtype_name, format_name, number_and_size, scale_or_range
from .json_fields import Fields
from .lora_entry import LoraEntry


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: SHA-256 in hexadecimal, and its size."""

    sha256: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> FileEntry:
        return cls(fields.text("sha256"), fields.count("bytes"))


@dataclass(frozen=True)
class RecipeEntry:
    """The recipe as it was written, for `recipe_from_json` and for display: open plain data with a name."""

    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.data["name"])

    @property
    def description(self) -> str:
        return str(self.data["description"])

    def to_json(self) -> dict[str, Any]:
        return dict(self.data)

    @classmethod
    def from_json(cls, fields: Fields) -> RecipeEntry:
        for key in ("name", "description"):
            fields.text(key)
        return cls(fields.rest())


@dataclass(frozen=True)
class Calibration:
    """The samples that calibration drew, and what is known of the prompts that made their conditions: how many, their
    hash, the pipeline's class, the hash of its encoders' files. `sizes` are those of the conditions' open dimensions,
    by their names in the graph."""

    seed: int
    samples: int
    batch: int
    prompts: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        prompts = {"prompts": dict(self.prompts)} if self.prompts else {}
        sizes = {"sizes": dict(self.sizes)} if self.sizes else {}
        return {"seed": self.seed, "samples": self.samples, "batch": self.batch, **prompts, **sizes}

    @classmethod
    def from_json(cls, fields: Fields) -> Calibration:
        prompts = fields.maybe("prompts", fields.table) or {}
        sizes = fields.maybe("sizes", fields.counts) or {}
        return cls(fields.integer("seed"), fields.count("samples"), fields.count("batch"), prompts, sizes)


@dataclass(frozen=True)
class Source:
    """The float model that was compiled. `class_name` is that of diffusers; its configuration is a file of its own.

    `weights_sha256` is that of the weights behind the LoRAs.
    """

    kind: str
    name: str
    parameter_bytes: int
    weights_sha256: str | None = None
    class_name: str | None = None
    loras: tuple[LoraEntry, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            **({} if self.class_name is None else {"class": self.class_name}),
            "parameter_bytes": self.parameter_bytes,
            **({} if self.weights_sha256 is None else {"weights_sha256": self.weights_sha256}),
            **({"loras": [lora.to_json() for lora in self.loras]} if self.loras else {}),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Source:
        return cls(
            fields.text("kind"),
            fields.text("name"),
            fields.count("parameter_bytes"),
            fields.maybe("weights_sha256", fields.text),
            fields.maybe("class", fields.text),
            fields.maybe("loras", lambda key: fields.each(key, LoraEntry.from_json)) or (),
        )


@dataclass(frozen=True)
class InputEntry:
    """A graph input: its dtype as numpy writes it, and its declared shape, with names and None for open sizes."""

    dtype: str
    shape: tuple[int | str | None, ...]

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, fields: Fields) -> InputEntry:
        return cls(fields.parsed("dtype", dtype_name), fields.parsed("shape", declared_sizes))


def input_entries(inputs: Mapping[str, tuple[Any, Sequence[int | str | None]]]) -> dict[str, InputEntry]:
    """Return the entry of each graph input, from its numpy dtype and its declared shape."""
    return {name: InputEntry(str(dtype), tuple(shape)) for name, (dtype, shape) in inputs.items()}


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran; `options` is open plain data. `seconds` and `peak_memory_mb` do not count for the digest."""

    name: str
    options: Mapping[str, Any]
    nodes_before: int
    nodes_after: int
    note: str
    seconds: float
    peak_memory_mb: float

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.name,
            "options": dict(self.options),
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "note": self.note,
            "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> PassRecord:
        return cls(
            fields.text("pass"),
            fields.table("options"),
            fields.count("nodes_before"),
            fields.count("nodes_after"),
            fields.text("note"),
            fields.number("seconds"),
            fields.number("peak_memory_mb"),
        )


@dataclass(frozen=True)
class LayerKernel:
    """The kernel that onnxruntime runs for a layer; `why` is the reason of one in float, else empty."""

    kernel: str
    integer: bool
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "integer": self.integer, **({"why": self.why} if self.why else {})}

    @classmethod
    def from_json(cls, fields: Fields) -> LayerKernel:
        return cls(fields.text("kernel"), fields.flag("integer"), fields.maybe("why", fields.text) or "")


@dataclass(frozen=True)
class Kernels:
    """The graph that onnxruntime built: integer and float kernels, nodes by operation, and the kernel of each layer."""

    integer: int
    floating: int
    operations: Mapping[str, int]
    layers: Mapping[str, LayerKernel]

    def to_json(self) -> dict[str, Any]:
        return {
            "integer": self.integer,
            "float": self.floating,
            "operations": dict(self.operations),
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Kernels:
        return cls(
            fields.count("integer"),
            fields.count("float"),
            fields.counts("operations"),
            fields.named("layers", LayerKernel.from_json),
        )


@dataclass(frozen=True)
class StoredType:
    """The constants of one storage type."""

    bytes: int
    constants: int
    values: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> StoredType:
        return cls(fields.count("bytes"), fields.count("constants"), fields.count("values"))


@dataclass(frozen=True)
class Storage:
    """The constants of the graph by storage type, and the size of its files; `ratio` is model to float bytes."""

    types: Mapping[str, StoredType]
    constant_bytes: int
    model_bytes: int
    float_bytes: int
    ratio: float | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "types": {kind: stored.to_json() for kind, stored in self.types.items()},
            "constant_bytes": self.constant_bytes,
            "model_bytes": self.model_bytes,
            "float_bytes": self.float_bytes,
            "ratio": self.ratio,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Storage:
        return cls(
            fields.named("types", StoredType.from_json),
            fields.count("constant_bytes"),
            fields.count("model_bytes"),
            fields.count("float_bytes"),
            fields.parsed("ratio", lambda value: None if value is None else float(value)),
            fields.each_text("notes"),
        )


@dataclass(frozen=True)
class QuantizerEntry:
    """A quantizer of the plan. `scale` is the only one, or (smallest, largest); `zero_point` the different ones.

    `row_bits` counts output channels by their bits where they differ, `levels` the integers of a weight's codebook;
    `vectors` is (number, size) of a codebook of vectors. `by` is the pass that chose it.
    """

    site: str
    format: str
    axis: int | None
    scale: float | tuple[float, float]
    channels: int
    rows: int
    zero_point: tuple[int, ...]
    by: str
    row_bits: Mapping[str, int] | None = None
    levels: int | None = None
    vectors: tuple[int, int] | None = None

    @property
    def value(self) -> str:
        """The quantized value, without the reader of a quantizer that serves one reader only."""
        return self.site.partition(" -> ")[0]

    @property
    def bits(self) -> int:
        return int(self.format.lstrip("uint"))

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "format": self.format,
            "axis": self.axis,
            "scale": list(self.scale) if isinstance(self.scale, tuple) else self.scale,
            "channels": self.channels,
            "rows": self.rows,
            "zero_point": list(self.zero_point),
            "by": self.by,
            **({"row_bits": dict(self.row_bits)} if self.row_bits else {}),
            **({"levels": self.levels} if self.levels else {}),
            **({"vectors": list(self.vectors)} if self.vectors else {}),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> QuantizerEntry:
        return cls(
            fields.text("site"),
            fields.parsed("format", format_name),
            fields.parsed("axis", lambda value: None if value is None else int(value)),
            fields.parsed("scale", scale_or_range),
            fields.count("channels"),
            fields.count("rows"),
            fields.parsed("zero_point", lambda values: tuple(map(int, values))),
            fields.text("by"),
            fields.maybe("row_bits", fields.counts),
            fields.maybe("levels", fields.count),
            fields.maybe("vectors", lambda key: fields.parsed(key, number_and_size)),
        )
