"""The figures of fit_noise over the trajectory, as one plot in the bundle.

Matplotlib keeps a cache in the user's home and takes its defaults from files there and in the current folder. Here it
gets a temporary folder instead, and its own defaults: the plot depends on the report only.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..stages import scratch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOME = "MPLCONFIGDIR"
CallRows = Sequence[Mapping[str, Any]]


def plot_noise(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of six panels: SQNR, slope, bias and spread, the sampler's noise, its share, the remaining error.

    Network calls run from left to right, in the order of sampling. The same report gives the same bytes.
    """
    with _own_home():
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg

    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context(defaults):
        figure = matplotlib.figure.Figure(figsize=(12, 6.5), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(report, figure)
        # Without the library's name and version, the bytes depend on the report only.
        figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


@contextmanager
def _own_home() -> Iterator[None]:
    """Let Matplotlib be imported with a temporary folder as its home; the process keeps it until it ends."""
    if "matplotlib" in sys.modules or HOME in os.environ:  # the caller's own choice
        yield
        return
    files = ExitStack()
    atexit.register(files.close)
    os.environ[HOME] = str(files.enter_context(scratch()))
    try:
        yield
    finally:
        del os.environ[HOME]


def _draw(report: Mapping[str, Any], figure: Figure) -> None:
    rows: CallRows = report["calls"]
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
