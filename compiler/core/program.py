"""Program: one denoiser with its graph, statistics, plan and correction, as a frozen value.

The graph is an `onnx_ir.Model`, which is mutable: the pipeline gives each pass a clone of it, and the pass returns a
new Program. Everything else is typed, immutable data next to the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats, Integers
from mezzotint.runtime.bundle.manifest_entries import PassRecord, QuantizerEntry
from mezzotint.runtime.bundle.training import TrainedUnit
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Signature, Timestep
from mezzotint.runtime.targets import ONNXRUNTIME, Target

from ..errors import PassError
from ..graph.nodes import name_of
from ..graph.ops import Layer
from .formats import Format, Grid, Levels, RowFormats, Vectors, along
from .stats import Stats

__all__ = ["Lowering", "Plan", "Program", "Quantizer", "Record", "Schedule", "Signature", "Site"]


Lowering = Literal["qdq", "integer", "constant"]
"""The forms of a quantized graph that a target can get: one file each in compiler/lowering."""

_T = TypeVar("_T")


@dataclass(frozen=True, order=True)
class Site:
    """A value of the graph, or the view that one consumer (a node, by name) has of it."""

    value: str
    consumer: str = ""

    def __str__(self) -> str:
        return f"{self.value} -> {self.consumer}" if self.consumer else self.value


@dataclass(frozen=True, eq=False)
class Quantizer:
    """The parameters that quantize one site, and the name of the pass that chose them (`by`).

    `scale` (float32) and `zero_point` are scalars, or `[C]` along `axis`. With `table` they have one row for each group
    of timesteps, `[groups]` or `[groups, C]`, and each network call uses one row. `row_bits` `[C]` are the widths of a
    weight's output channels where they differ; `format` is then the format of the widest channel. `levels`, int8
    `[count]` or `[C, count]`, are the integers of a weight's codebook; `format` is then int8, as the kernel has it. So
    are `vectors`, int8 `[count, size]`, of `size` neighbouring inputs at once.
    """

    format: Format
    scale: Floats
    zero_point: Integers
    by: str
    axis: int | None = None
    table: bool = False
    row_bits: npt.NDArray[np.int8] | None = None
    levels: npt.NDArray[np.int8] | None = None
    vectors: npt.NDArray[np.int8] | None = None

    @property
    def uniform(self) -> bool:
        """Return whether the grid is that of `format`: one width, and no codebook."""
        return self.row_bits is None and self.levels is None and self.vectors is None

    @property
    def bits(self) -> int:
        """Return the bits of a point of the grid; where rows have different widths, those of the widest."""
        if self.vectors is not None:
            return (len(self.vectors) - 1).bit_length() // int(self.vectors.shape[1])
        return self.format.bits if self.levels is None else int(self.levels.shape[-1] - 1).bit_length()

    @property
    def grid(self) -> Grid:
        """Return the grid that values are rounded to."""
        if self.levels is not None:
            return Levels(self.levels)
        if self.vectors is not None:
            return Vectors(self.vectors)
        return self.format if self.row_bits is None else RowFormats(self.row_bits)

    @property
    def widths(self) -> dict[int, int]:
        """Return the number of output channels of each width, or nothing when all have the same."""
        if self.row_bits is None:
            return {}
        widths, counts = np.unique(self.row_bits, return_counts=True)
        return {int(b): int(n) for b, n in zip(widths, counts, strict=True)}

    def raised(self, scale: Floats) -> Quantizer:
        """Return a weight's quantizer whose integers q became rint(q s / scale): its levels are then coarser too."""
        if self.levels is None:
            return replace(self, scale=scale)
        ratio = along(np.broadcast_to(self.scale / scale, np.shape(scale)), 0, 2)
        return replace(self, scale=scale, levels=np.rint(self.levels * ratio).astype(np.int8))

    def entry(self, site: Site) -> QuantizerEntry:
        """Return the manifest's entry of this quantizer."""
        scales = self.scale.reshape(-1)
        rows = len(self.scale) if self.table else 1
        return QuantizerEntry(
            site=str(site),
            format=self.format.name,
            axis=self.axis,
            scale=float(scales[0]) if scales.size == 1 else (float(scales.min()), float(scales.max())),
            channels=int(scales.size) // rows,
            rows=rows,
            zero_point=tuple(sorted({int(z) for z in self.zero_point.reshape(-1)})),
            by=self.by,
            row_bits={str(b): n for b, n in self.widths.items()} or None,
            levels=None if self.levels is None else self.levels.shape[-1],
            vectors=None if self.vectors is None else self.vectors.shape[:2],
        )


@dataclass(frozen=True)
class Plan:
    """The quantizer of each site, and the nodes that stay in float, each with the reason.

    `groups` is the row of the tables for each timestep of the deployment, in the order of first calls; it is empty
    without tables. `report` holds the measurements and costs of assign_bits, as plain data for display.
    """

    quantizers: Mapping[Site, Quantizer] = field(default_factory=dict)
    islands: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    def read_by(self, layers: Iterable[Layer]) -> Plan:
        """Return the plan with the quantizers that these layers read inputs and weights through, and no others."""
        used: set[Site] = set()
        for layer in layers:
            for value in (*layer.activations, *([] if layer.weight is None else [layer.weight])):
                own = Site(name_of(value), layer.name)
                used.add(own if own in self.quantizers else Site(name_of(value)))
        return replace(self, quantizers={site: q for site, q in self.quantizers.items() if site in used})

    @property
    def has_tables(self) -> bool:
        """Return whether the scales of a quantizer depend on the timestep."""
        return any(quantizer.table for quantizer in self.quantizers.values())

    def of(self, value: str, consumer: str = "") -> Quantizer | None:
        """Return the quantizer of a consumer's view of a value, else that of the value, else None."""
        return self.quantizers.get(Site(value, consumer)) or self.quantizers.get(Site(value))


@dataclass(frozen=True)
class Record:
    """What one pass did: an entry of a program's history."""

    name: str
    options: Mapping[str, Any]
    nodes_before: int
    nodes_after: int
    seconds: float
    peak_memory_mb: float
    note: str = ""

    def entry(self) -> PassRecord:
        """Return the manifest's entry of this record."""
        return PassRecord(
            name=self.name,
            options=dict(self.options),
            nodes_before=self.nodes_before,
            nodes_after=self.nodes_after,
            note=self.note,
            seconds=round(self.seconds, 3),
            peak_memory_mb=round(self.peak_memory_mb, 1),
        )


@dataclass(frozen=True, eq=False)
class Program:
    """A denoiser on its way through the compiler.

    source        where the model came from, as plain data; its `config` is the configuration of a diffusers model
    shape         the sizes of the sample behind its batch in calibration and checks, such as (channels, height, width);
                  other sizes work too where the graph leaves them open. The signature says which are the channels
    frozen        the timesteps of the tables in the graph, in the order of the rows (set by freeze_time)
    float_model   the graph before insert_qdq, for passes that compare with it
    lowering      the form in which the target gets the quantized graph
    target        the engine that gets it
    allocation    the number of calibration samples used at each timestep of the deployment, in the order of first
                  calls; empty: every sample at every timestep
    widths        the bits of weights that a pass in front of choose_scales chose, by the names of their layers
    refused       the values and nodes that a rewriting pass left unchanged, with the reason
    noise_report  the measurements of fit_noise, as plain data for display
    training      the layers and blocks that passes trained, in the order of training
    warnings      what passes did otherwise than their options ask for, for the end of the compilation
    """

    model: ir.Model
    signature: Signature
    schedule: Schedule
    deployment: Deployment
    shape: tuple[int, ...]
    source: Mapping[str, Any]
    stats: Stats | None = None
    plan: Plan | None = None
    correction: Correction | None = None
    noise_report: Mapping[str, Any] = field(default_factory=dict)
    frozen: tuple[Timestep, ...] | None = None
    float_model: ir.Model | None = None
    lowering: Lowering = "qdq"
    target: Target = ONNXRUNTIME
    allocation: tuple[int, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Record, ...] = ()
    training: tuple[TrainedUnit, ...] = ()
    warnings: tuple[str, ...] = ()
    note: str = ""
    fx_text: str | None = None

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    @property
    def row_of(self) -> dict[Timestep, int]:
        """Return the row of the tables of each timestep of the deployment; empty without tables."""
        groups = () if self.plan is None else self.plan.groups
        return dict(zip(self.deployment.timesteps, groups, strict=True)) if groups else {}

    def with_model(self, model: ir.Model, note: str = "") -> Program:
        """Return this program with another graph. The note, one line of the history, says what the pass did."""
        return replace(self, model=model, note=note or self.note)

    def noted(self, note: str) -> Program:
        """Return this program with another note for the history."""
        return replace(self, note=note)

    def require_plan(self) -> Plan:
        """Return the plan. Raise PassError when choose_scales has not run."""
        return self._require(self.plan, "plan", "choose_scales")

    def require_stats(self) -> Stats:
        """Return the statistics. Raise PassError when observe has not run since the graph last changed."""
        return self._require(self.stats, "statistics", "observe")

    def require_float_model(self) -> ir.Model:
        """Return the graph before insert_qdq. Raise PassError when insert_qdq has not run."""
        return self._require(self.float_model, "quantizers", "insert_qdq")

    def require_frozen(self) -> tuple[Timestep, ...]:
        """Return the timesteps of the tables in the graph. Raise PassError when freeze_time has not run."""
        return self._require(self.frozen, "timestep tables", "freeze_time")

    def _require(self, fact: _T | None, name: str, giver: str) -> _T:
        if fact is None:
            raise PassError(
                f"the program has no {name}, which {giver} gives",
                hint=f"put {giver} in front of this pass, and declare the fact in its `needs`",
            )
        return fact

    @property
    def channels(self) -> int:
        """Return the number of channels of the sample."""
        return self.signature.channels(self.shape)

    @property
    def fixed_batch(self) -> int | None:
        """Return the batch size that the graph fixes, or None when the batch is open."""
        sample = next(v for v in self.graph.inputs if v.name == self.signature.sample)
        size = sample.shape[0] if sample.shape else None
        return size if isinstance(size, int) else None

    @property
    def free_zero_points(self) -> bool:
        """Return whether training may move zero points: `constant` has one for all rows of a table."""
        return self.lowering != "constant" or not (self.plan or Plan()).has_tables

    def conditions(self) -> dict[str, ir.Value]:
        """Return the graph inputs other than the sample and the timestep, by name."""
        by_name = {v.name: v for v in self.graph.inputs}
        return {name: by_name[name] for name in self.signature.conditions}
