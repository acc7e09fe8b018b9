"""shift_inputs: add a constant to each channel of a layer's input, and take it off the layer's bias again.

    x W + b    ->    (x + a) W + (b - a W)                   a: [C], the same for all tokens and samples

This is exact in float; what changes is where the numbers fall on the grid of the input. Methods:

- `center` (MPTQ-ViT, arXiv 2401.14895; Outlier Suppression+, arXiv 2304.09145): a = -(min + max) / 2 of each channel
  over the calibration. A channel that lies far from zero then takes no range away from the others.
- `noise` (NoisyQuant, arXiv 2211.16056): a is uniform in [-n, n], drawn once for each layer. Where many numbers of a
  long tail lie at the same place between two grid points, they are spread over the step, and their errors no longer
  agree. n is the one of `amplitudes`, in steps of the grid of `bits` bits, whose error at the layer's output is least
  over `calls` calls of the calibration, channels counted as independent; 0 means that no noise is best.

Layers over tokens and Gemms take shifts. Where a norm or a layer makes the channels, its own constants take a, and
nothing is computed at run time (compiler/rescaling); elsewhere an Add does, and with `exact_places` such layers stay.
The graph changes, so observe has to run again behind this pass.

Errors: StatsError if observe did not measure the channels of an input (`channels=inputs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.calibration.calibrate import follow_trajectories
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import Format, dequantize, quantize, scale_for_range
from mezzotint.compiler.core.option_checks import require_positive
from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.graph.nodes import Builder, Names, name_of, numpy_of, remove_dead, replace_use
from mezzotint.compiler.rescaling.edits import add_to_bias
from mezzotint.compiler.rescaling.scaling import Factors, channel_axis
from mezzotint.compiler.rescaling.sites import RescalingSite, find_sites, rescale_site
from mezzotint.runtime import streams
from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.sampling.condition_network import Conditions
from mezzotint.runtime.signature import Images, Timestep

STILL = 1e-3  # of the range of the loudest channel: a shift of less moves nothing


@dataclass(frozen=True)
class ShiftInputs(GraphPass):
    """Constant summands for the inputs of linear layers; `method`, `amplitudes`, `bits` and `calls` as above.

    - `exact_places`: only where nothing is computed at run time.
    """

    method: Literal["center", "noise"] = "center"
    amplitudes: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
    bits: int = 6
    calls: int = 5
    exact_places: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"normal", "stats"})
    tolerance: ClassVar[float | None] = 1e-4  # sums are rounded in another order

    def __post_init__(self) -> None:
        require_positive(self, "calls")
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"{self.name}.bits is {self.bits}", where=self.name, hint="choose 2 to 8")
        if not self.amplitudes or not all(0 <= n < np.inf for n in self.amplitudes):
            hint = "choose numbers of steps from 0 on"
            raise RecipeError(f"{self.name}.amplitudes is {self.amplitudes}", where=self.name, hint=hint)

    def run(self, program: Program, context: Context) -> Program:
        graph, stats = program.graph, program.require_stats()
        stats.check_graph(graphs.digest(program.model), self.name)
        names = Names(graph)
        found = [site for site in find_sites(graph) if all(layer.kind == "linear" for layer in site.readers)]
        sites = [site for site in found if not (self.exact_places and _at_run_time(site))]
        ranges = {site: self._extremes(program, site) for site in sites}
        if self.method == "noise":
            shifts = self._noise(program, context, ranges)
        else:
            shifts = {site: -(low + high) / 2 for site, (low, high) in ranges.items()}
        moved = computed = 0
        for site, shift in shifts.items():
            low, high = ranges[site]
            if np.abs(shift).max() <= STILL * (high - low).max():
                continue
            moved += 1
            computed += _at_run_time(site)
            if _at_run_time(site):
                _add(graph, names, site, shift)
            else:
                rescale_site(graph, names, site, np.ones(site.channels), -shift)
        remove_dead(graph)
        return replace(program, note=f"{moved} of {len(found)} inputs shifted, {computed} of them at run time")

    def _extremes(self, program: Program, site: RescalingSite) -> tuple[Factors, Factors]:
        """Return the least and the largest number of each channel `[C]` over all calls."""
        layer = site.readers[0]
        extremes = program.require_stats().extremes(name_of(layer.activations[0]), channel_axis(layer))
        if extremes is None:
            raise StatsError(
                "its input was not measured by channel",
                where=layer.name,
                hint="measure the inputs of layers: --set observe.channels=inputs",
            )
        return extremes[:, 0].min(axis=0), extremes[:, 1].max(axis=0)

    def _noise(
        self, program: Program, context: Context, ranges: Mapping[RescalingSite, tuple[Factors, Factors]]
    ) -> dict[RescalingSite, Factors]:
        """Return the noise of the best amplitude for each input."""
        tried: dict[RescalingSite, list[_Trial]] = {}
        for k, (site, (low, high)) in enumerate(ranges.items()):
            step = (high.max() - low.min()) / Format(self.bits).qmax
            unit = streams.INPUT_NOISE.generator(context.seed, k).uniform(-step, step, site.channels)
            tried[site] = [_Trial(n * unit, low, high, self.bits) for n in self.amplitudes]
        wanted = set(np.rint(np.linspace(0, len(program.deployment.calls) - 1, self.calls)).astype(int).tolist())
        seen = 0
        inputs = {site: site.readers[0].activations[0] for site in tried}
        taps = [name_of(value) for value in inputs.values()]
        with Executor(program.model, context.folder, taps=taps, threads=context.threads) as executor:

            def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
                nonlocal seen
                values = executor.call(program.signature, x, t, conditions)
                if seen % len(program.deployment.calls) in wanted:
                    for site, trials in tried.items():
                        rows = values[name_of(inputs[site])]
                        rows = np.moveaxis(rows, channel_axis(site.readers[0]), -1).reshape(-1, site.channels)
                        for trial in trials:
                            trial.add(rows)
                seen += 1
                return np.asarray(values[program.signature.output], np.float32)

            follow_trajectories(program, context, denoiser, f"{self.name}: float trajectory")
        power = {site: _power(site) for site in tried}
        return {
            site: min(trials, key=lambda one: float(one.errors @ power[site])).shift for site, trials in tried.items()
        }


class _Trial:
    """The squared error of each channel `[C]` with one shift, summed over the numbers that were added."""

    def __init__(self, shift: Factors, low: Factors, high: Factors, bits: int) -> None:
        self.shift, self._format = shift, Format(bits)
        self._scale, self._zero = scale_for_range((low + shift).min(), (high + shift).max(), self._format)
        self.errors = np.zeros(len(shift))

    def add(self, rows: Floats) -> None:
        moved = (rows + self.shift).astype(np.float32)
        rounded = dequantize(quantize(moved, self._scale, self._zero, self._format), self._scale, self._zero)
        self.errors += np.square(rounded - moved).sum(axis=0, dtype=np.float64)


def _power(site: RescalingSite) -> Factors:
    """Return the sum of squares of all weights that multiply each channel `[C]`."""
    total = np.zeros(site.channels)
    for layer in site.readers:
        weight = np.moveaxis(numpy_of(layer.require_weight()), layer.require_weight_axis(), 0)
        total += np.square(weight, dtype=np.float64).sum(axis=0)
    return total


def _at_run_time(site: RescalingSite) -> bool:
    return site.kind == "run_time" or bool(site.shift_reason)


def _add(graph: ir.Graph, names: Names, site: RescalingSite, shift: Factors) -> None:
    """Add `[C]` to a value in front of its readers, and take what they make of it off their biases."""
    shifted: dict[ir.Value, ir.Value] = {}
    for layer in site.readers:
        source = layer.activations[0]
        if source not in shifted:
            build = Builder(graph, names, layer.node)
            summand = build.constant(f"{name_of(source)}_shift", shift.astype(np.float32))
            shifted[source] = build.op("Add", [source, summand], f"{name_of(source)}_shifted", like=source)
        replace_use(layer.node, source, shifted[source])
        weight = np.moveaxis(numpy_of(layer.require_weight()), layer.require_weight_axis(), 0)
        add_to_bias(graph, names, layer.node, -(weight.astype(np.float64) @ shift))
