"""choose_scales: choose a quantizer for each activation from its measured range, and for each weight from its values.

- Activations (uint8, per tensor): from the summaries of observe, by `minmax`, `percentile` or `mse`
  (compiler/scales/ranges.py has the formulas). Symmetric ones are int8 with zero point 0. TensorRT demands that of all
  activations: the outputs of SiLU and softmax then use little more than half of the grid. OpenVINO demands it of the
  factors of a product of two activations, unless one is never negative: its zero point is 0 as uint8. With others it
  runs an attention in float (measured on 2026.4.1: 8 heads, 2048 tokens: 75 ms in float, 79 with uint8, 33 with int8).
- Outputs of convolutions that no layer reads directly: `output_bits`. The papers leave outputs in float, and a kernel
  writes 8 bits whatever its inputs have, so that 256 levels cost nothing where the inputs have 16.
- Weights (int8, symmetric, per output channel): from the tensor, by `minmax` or `mse`, the same search on |w| for each
  channel (compiler/scales/weights.py). Without `per_channel` the channels of a weight have one scale in common, as in
  DFQ (arXiv 1906.04721). Layers for which split_ranks chose a width have that one. Weights of 1 bit have no grid: a
  recipe with them needs choose_levels.
- Products of two activations, and layers of the prompt, stay in float where an input has fewer than `levels` levels up
  to its typical value: a loud channel or token takes the others (compiler/scales/loud_layers.py). The plan's islands
  say which.
- Weights of transposed convolutions that lower_transposed left: 8 bits, whatever the width of the others. Their kernel
  is float, so fewer bits would cost accuracy and gain no speed. Per output channel, or per input channel with groups.

Every range contains 0.

Errors: StatsError if the graph changed after observe, or a value was not measured; RecipeError for weights of 1 bit
without choose_levels behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from mezzotint.compiler.core.formats import INT8, Format, scale_for_range
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.graph.nodes import is_constant, name_of
from mezzotint.compiler.graph.ops import Layer, layers, transposed_layer
from mezzotint.compiler.scales.loud_layers import loud_layers
from mezzotint.compiler.scales.ranges import RangeMethod, check_percentile, range_of
from mezzotint.compiler.scales.weights import WeightMethod, weight_format, weight_quantizer
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.targets import ONNXRUNTIME, Target


@dataclass(frozen=True)
class ChooseScales(Pass):
    """Static quantizers: the methods and the widths.

    - `activations`, `weights`: the methods.
    - `percentile`: in percent; used by the method `percentile` only.
    - `per_channel`: a scale for each output channel of a weight, otherwise one for the whole weight.
    - `activation_bits`, `weight_bits`: widths in bits. The file stores weights of 2 bits in 2, of 3 and 4 bits in 4,
      and of 5 to 8 bits in 8, and those with levels (1 bit has no others) in the bits of a code. Activations in "float"
      leave weights alone to quantize: a small file, and float kernels.
    - `output_bits`: the width of outputs of convolutions that no layer reads directly.
    - `symmetric`: the activations that have zero point 0 and a signed grid: none, factors of products of two
      activations, or all. `--target` chooses.
    - `levels`: the fewest levels of 8 bits up to the typical key, value or number of a prompt; 0 keeps no layer in
      float.
    """

    activations: RangeMethod = "percentile"
    weights: WeightMethod = "mse"
    percentile: float = 99.999
    activation_bits: Literal[2, 3, 4, 5, 6, 7, 8, "float"] = 8
    weight_bits: Literal[1, 2, 3, 4, 5, 6, 7, 8] = 8
    output_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    per_channel: bool = True
    symmetric: Literal["none", "products", "all"] = "none"
    levels: float = 3.0

    needs: ClassVar[frozenset[str]] = frozenset({"stats"})
    gives: ClassVar[frozenset[str]] = frozenset({"plan"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        check_percentile(self.percentile, self.name)
        if not 0 <= self.levels <= 127:
            raise RecipeError(f"{self.name}.levels is {self.levels}", where=self.name, hint="choose 0 to 127")

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        behind = passes[list(passes).index(self) :]
        if self.weight_bits == 1 and not any(step.name == "choose_levels" for step in behind):
            raise RecipeError(
                "weights of 1 bit have no uniform grid, and no pass gives them levels",
                where=f"{self.name}.weight_bits",
                hint="put choose_levels behind choose_scales, as the recipe ganq does, or choose 2 bits or more",
            )

    def for_target(self, target: Target, passes: Sequence[Pass]) -> ChooseScales:
        """Return this pass with the symmetric activations that a target demands, beside those that it has already."""
        if target == "tensorrt":
            return replace(self, symmetric="all")
        return self if target == ONNXRUNTIME or self.symmetric == "all" else replace(self, symmetric="products")

    def run(self, program: Program, context: Context) -> Program:
        stats = program.require_stats()
        stats.check_graph(graphs.digest(program.model), self.name)
        every_layer = list(layers(program.graph))
        quantizers = {} if self.activation_bits == "float" else self._of_activations(every_layer, stats)
        loud = loud_layers(program, every_layer, quantizers, stats, self.levels)
        for i, layer in enumerate(every_layer):
            if layer.weight is not None:
                bits = program.widths.get(layer.name, self.weight_bits)
                self._add_weight(quantizers, layer, weight_format(bits))
            context.progress(self.name, i + 1, len(every_layer))
        for node in program.graph:
            if (transposed := transposed_layer(node)) is not None:
                self._add_weight(quantizers, transposed, INT8)
        note = f"{len(quantizers)} quantizers" + (f", {len(loud)} layers of loud activations" if loud else "")
        return replace(program, plan=Plan(quantizers, loud), note=note)

    def _of_activations(self, every_layer: Sequence[Layer], stats: Stats) -> dict[Site, Quantizer]:
        """Return a quantizer for each value that a layer reads or computes."""
        read = {name_of(v) for layer in every_layer for v in layer.activations}
        factors = {name_of(v) for layer in every_layer if layer.kind == "attention" for v in layer.activations}
        found: dict[Site, Quantizer] = {}
        for name in dict.fromkeys(
            name_of(v) for layer in every_layer for v in (*layer.activations, layer.output) if not is_constant(v)
        ):
            summary = stats.summary(name)
            if summary is None:
                raise StatsError(f"the value {name!r} was not measured", where=self.name, hint="run observe again")
            chosen = name in factors and summary.low < 0 and self.symmetric == "products"
            symmetric = chosen or self.symmetric == "all"
            bits = self.activation_bits if name in read else self.output_bits
            fmt = Format(int(bits), signed=symmetric, symmetric=symmetric)
            scale, zero = scale_for_range(*range_of(summary, self.activations, self.percentile, fmt), fmt)
            found[Site(name)] = Quantizer(fmt, scale, zero, self.name)
        return found

    def _add_weight(self, quantizers: dict[Site, Quantizer], layer: Layer, fmt: Format) -> None:
        """Add one quantizer for a weight; a layer that shares the weight along another axis gets its own."""
        site = Site(name_of(layer.weight))
        shared = quantizers.get(site)
        if shared is not None:
            if shared.axis == layer.weight_axis:
                return
            site = Site(site.value, layer.name)
        quantizers[site] = weight_quantizer(layer, fmt, self.weights, self.name, per_channel=self.per_channel)
