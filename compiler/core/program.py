"""Program: all that is known and decided about one denoiser, frozen.

The graph is an `onnx_ir.Model`, which is mutable; the pipeline hands each pass a clone of it, and a pass returns a
new Program. Everything else (statistics, plan, correction) is typed data beside the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats, Integers
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Signature, Timestep

from ..errors import PassError
from .formats import Format, Grid, RowFormats
from .stats import Stats

__all__ = ["Lowering", "Plan", "Program", "Quantizer", "Record", "Schedule", "Signature", "Site"]


Lowering = Literal["qdq", "integer", "premul"]
"""The forms of a quantized graph that a target can get: one file each in compiler/lowering."""

_T = TypeVar("_T")


@dataclass(frozen=True, order=True)
class Site:
    """A value of the graph, or one consumer's view of it when `consumer` (a node's name) is given."""

    value: str
    consumer: str = ""

    def __str__(self) -> str:
        return f"{self.value} -> {self.consumer}" if self.consumer else self.value


@dataclass(frozen=True, eq=False)
class Quantizer:
    """How a site is quantized. `scale` float32 and `zero_point` are scalars, or `[C]` along `axis`.

    A `table` has one row for each group of timesteps: both are `[groups]`, or `[groups, C]` along `axis`, and one call
    uses one row. `row_bits` `[C]` are the widths of a weight's output channels where they differ; `format` is then the
    widest one's.
    """

    format: Format
    scale: Floats
    zero_point: Integers
    by: str
    axis: int | None = None
    table: bool = False
    row_bits: npt.NDArray[np.int8] | None = None

    @property
    def grid(self) -> Grid:
        """What values are rounded to."""
        return self.format if self.row_bits is None else RowFormats(self.row_bits)

    @property
    def widths(self) -> dict[int, int]:
        """The number of output channels by bits where they differ, else empty."""
        if self.row_bits is None:
            return {}
        widths, counts = np.unique(self.row_bits, return_counts=True)
        return {int(b): int(n) for b, n in zip(widths, counts, strict=True)}

    def to_json(self) -> dict[str, Any]:
        scales = self.scale.reshape(-1)
        rows = len(self.scale) if self.table else 1
        return {
            "format": self.format.name,
            "axis": self.axis,
            "scale": float(scales[0]) if scales.size == 1 else [float(scales.min()), float(scales.max())],
            "channels": int(scales.size) // rows,
            "rows": rows,
            "zero_point": sorted({int(z) for z in self.zero_point.reshape(-1)}),
            "by": self.by,
            **({"row_bits": {str(b): n for b, n in self.widths.items()}} if self.widths else {}),
        }


@dataclass(frozen=True)
class Plan:
    """What was decided: a quantizer for each site, and the nodes kept in float, each with the reason.

    `groups` gives the row of the tables for each timestep of the deployment, in the order of its first call; it is
    empty while there are no tables. `report` is what assign_bits measured and weighed, as plain data for readers.
    """

    quantizers: Mapping[Site, Quantizer] = field(default_factory=dict)
    islands: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    def of(self, value: str, consumer: str = "") -> Quantizer | None:
        """The quantizer of a consumer's view of a value, else of the value itself."""
        return self.quantizers.get(Site(value, consumer)) or self.quantizers.get(Site(value))


@dataclass(frozen=True)
class Record:
    """One line of a program's history."""

    name: str
    options: Mapping[str, Any]
    nodes_before: int
    nodes_after: int
    seconds: float
    peak_memory_mb: float
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.name,
            "options": dict(self.options),
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "note": self.note,
            "seconds": round(self.seconds, 3),
            "peak_memory_mb": round(self.peak_memory_mb, 1),
        }


@dataclass(frozen=True, eq=False)
class Program:
    """A denoiser on its way through the compiler.

    `source` says where the model came from, as plain data; its `config` is the configuration that diffusers writes,
    where there is one. `shape` is (channels, height, width) of the sample that calibration and checks use; where the
    graph leaves height or width open, other sizes work too. `frozen` lists the timesteps that the tables in the graph
    hold, in the order of the rows, once freeze_time ran. `float_model` is the graph as it was before the quantizers
    came in, for passes that compare with it; `lowering` names the spelling in which the target gets the quantized one.
    `allocation` is the number of calibration samples that count at each timestep of the deployment, in the order of
    its first call; empty: all of them, everywhere. `refused` maps a value, or a node, to the reason why a pass that
    moves factors left it alone. `noise_report` is what fit_noise measured, as plain data for readers.
    """

    model: ir.Model
    signature: Signature
    schedule: Schedule
    deployment: Deployment
    shape: tuple[int, int, int]
    source: Mapping[str, Any]
    stats: Stats | None = None
    plan: Plan | None = None
    correction: Correction | None = None
    noise_report: Mapping[str, Any] = field(default_factory=dict)
    frozen: tuple[Timestep, ...] | None = None
    float_model: ir.Model | None = None
    lowering: Lowering = "qdq"
    allocation: tuple[int, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Record, ...] = ()
    note: str = ""
    fx_text: str | None = None

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    def with_model(self, model: ir.Model, note: str = "") -> Program:
        """This program with another graph; the note says what the pass did, in one line of the history."""
        return replace(self, model=model, note=note or self.note)

    def noted(self, note: str) -> Program:
        return replace(self, note=note)

    def require_plan(self) -> Plan:
        """Return the plan. Raise PassError when nothing was decided yet."""
        return self._require(self.plan, "plan", "choose_scales")

    def require_stats(self) -> Stats:
        """Return the statistics. Raise PassError when nothing was measured yet, or the graph has changed since."""
        return self._require(self.stats, "statistics", "observe")

    def require_float_model(self) -> ir.Model:
        """Return the graph as it was before the quantizers came in. Raise PassError while there are none."""
        return self._require(self.float_model, "quantizers", "insert_qdq")

    def require_frozen(self) -> tuple[Timestep, ...]:
        """Return the timesteps of the tables in the graph. Raise PassError when there are no tables."""
        return self._require(self.frozen, "timestep tables", "freeze_time")

    def _require(self, thing: _T | None, what: str, giver: str) -> _T:
        if thing is None:
            raise PassError(
                f"the program has no {what}, which {giver} gives",
                hint=f"put {giver} in front of this pass, and declare in its `needs` what it needs",
            )
        return thing

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that is written into the graph, or None where any will do."""
        sample = next(v for v in self.graph.inputs if v.name == self.signature.sample)
        size = sample.shape[0] if sample.shape else None
        return size if isinstance(size, int) else None

    def conditions(self) -> dict[str, ir.Value]:
        """The graph inputs that are neither the sample nor the timestep, by name."""
        by_name = {v.name: v for v in self.graph.inputs}
        return {name: by_name[name] for name in self.signature.conditions}
