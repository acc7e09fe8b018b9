"""The figures of fit_noise over the trajectory, as one plot in the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

CallRows = Sequence[Mapping[str, Any]]


def plot_noise(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of six panels: SQNR, slope, bias and spread, the sampler's noise, its share, the remaining error.

    Network calls run from left to right, in the order of sampling. The same report gives the same bytes.
    """
    rows: CallRows = report["calls"]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).ravel()
    figure.suptitle(f"Quantization noise at each network call ({report['form']})")
    _lines(panels[0], rows, "SQNR on held-out calls, dB", **_sqnr(rows))
    _lines(panels[1], rows, "slope k: q = (1 + k) w + ...", slope=[row["slope"] for row in rows])
    _lines(panels[2], rows, "bias and spread of the output", bias=_of(rows, "bias"), spread=_of(rows, "spread"))
    _lines(panels[3], rows, "noise of the sampler", schedule=_of(rows, "sigma"), corrected=_of(rows, "noise"))
    taken = [1 - (row["noise"] / row["sigma"]) ** 2 if row["sigma"] else None for row in rows]
    _lines(panels[4], rows, "share of the variance taken (below 0: given)", taken=taken)
    clamped = [i for i, row in enumerate(rows) if row["clamped"]]
    panels[4].plot(clamped, [1.0] * len(clamped), "rv", label="clamped at 0")
    _lines(panels[5], rows, "shape of what is left", skewness=_of(rows, "skewness"), kurtosis=_of(rows, "kurtosis"))
    for panel in panels:
        panel.legend(fontsize="small")
    # Without the library's name and version, the bytes depend on the report only.
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def _sqnr(rows: CallRows) -> dict[str, list[Any]]:
    return {
        "as it is": [row["sqnr_db"]["none"] for row in rows],
        "corrected": [row["sqnr_db"][row["kept"]] for row in rows],
    }


def _of(rows: CallRows, key: str) -> list[Any]:
    return [row[key] for row in rows]


def _lines(panel: Axes, rows: CallRows, title: str, **curves: Sequence[float | None]) -> None:
    for label, values in curves.items():
        numbers = [float("nan") if value is None else value for value in values]
        panel.plot(range(len(rows)), numbers, marker=".", label=label)
    panel.set_title(title, fontsize="medium")
    ticks = sorted({0, len(rows) // 2, len(rows) - 1})
    panel.set_xticks(ticks, [f"t = {rows[i]['timestep']:g}" for i in ticks])
    panel.grid(alpha=0.3)
