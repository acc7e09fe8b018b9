"""A weight at several sparsities and widths, pruned and rounded against its inputs, for a search to choose from.

    W'   = W with a share of zeros, by Optimal Brain Surgeon in blocks            (compiler/pruning/layer_pruning.py)
    W''  = s q, q of so many bits, zeros where W' has them, by GPTQ on W'         (compiler/rounding/matrix.py)
    rho  = tr((W - W'') H (W - W'')^T) / tr(W H W^T)

H is that of the dense network's inputs, and s is searched for the rows of W'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats

from ..core.formats import dequantize
from ..core.pipeline import Context
from ..core.program import Program, Quantizer
from ..graph import weight_store as store
from ..graph.nodes import name_of
from ..rounding import matrix as rounding
from ..rounding.matrix import Matrix
from ..scales.weights import rows_quantizer, weight_format
from .layer_pruning import LayerPruner
from .patterns import PruningPattern
from .prunable import PrunableWeight, find_prunable
from .weight_inputs import WeightInputs

DAMP, BLOCK = 0.01, 128
PRUNER = LayerPruner(PruningPattern("unstructured"), "obs", exact=0, block=64, polish=8, damp=DAMP)
"""In blocks whatever the size of a layer: a search prunes each weight several times."""


@dataclass(frozen=True)
class InputNumbers:
    """How much data H is measured on: the defaults of prune_weights and round_weights, where these are options."""

    calls: int = 10
    samples: int = 8
    columns: int = 8192
    balance: bool = True
    memory_gb: float = 3.0


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """A weight of so many `bits` with a share `sparsity` of zeros; `share` is rho.

    `integers` are int8 in the shape of the weight, in the folder of stored weights; `bits_in_file` are those of all
    that stay, and one for each weight where some are gone.
    """

    bits: int
    sparsity: float
    share: float
    quantizer: Quantizer
    integers: ir.TensorProtocol

    @property
    def bits_in_file(self) -> int:
        if not self.sparsity:
            return self.bits * self.integers.size
        return self.bits * round((1 - self.sparsity) * self.integers.size) + self.integers.size

    def values(self) -> Floats:
        """Return W'' in float32; rounding it to the nearest points of its grid gives the same integers."""
        quantizer = self.quantizer
        return dequantize(self.integers.numpy(), quantizer.scale, quantizer.zero_point, quantizer.axis)


def compressed_weights(
    program: Program,
    context: Context,
    widths: Sequence[int],
    sparsities: Sequence[float],
    islands: Sequence[str],
    by: str,
) -> dict[str, list[CompressedWeight]]:
    """Return each weight of a float graph that can be pruned, by its name, at all widths and sparsities.

    A sparsity of 0 is the dense weight. The graph stays as it is. `by` is the pass.
    """
    weights, _ = find_prunable(program, islands, PRUNER.pattern, by)
    inputs = WeightInputs.of(program, context, InputNumbers())
    found: dict[str, list[CompressedWeight]] = {}
    for weight, gathered in inputs.each(weights, f"{by}: weights"):
        grams = gathered.gram(weight.inputs)
        found[name_of(weight.inputs.floats)] = [
            _compressed(weight, grams, bits, sparsity, context, by) for sparsity in sparsities for bits in widths
        ]
    return found


def _compressed(
    weight: PrunableWeight, grams: Matrix, bits: int, sparsity: float, context: Context, by: str
) -> CompressedWeight:
    rows = weight.inputs.rows()
    left = PRUNER.prune_groups(rows, grams, weight.channels, sparsity, weight.name).values if sparsity else rows
    quantizer = rows_quantizer(left, weight_format(bits), "mse", by, weight.inputs.axis)
    scale = quantizer.scale.reshape(-1)
    integers = np.empty(rows.shape, np.float32)
    error, power, each = 0.0, 0.0, len(rows) // len(grams)
    for g, gram in enumerate(grams):
        part = slice(g * each, (g + 1) * each)
        rounding.check_gram(gram, weight.name)
        root = rounding.inverse_root(gram, rounding.input_order(gram, sort=True), DAMP, weight.name)
        kept = left[part] != 0
        integers[part] = rounding.gptq(left[part], root, scale[part], quantizer.grid, block=BLOCK, kept=kept)
        error += float(rounding.row_errors(rows[part] - scale[part, None] * integers[part], gram).sum())
        power += float(rounding.row_errors(rows[part], gram).sum())
    stored = store.kept(weight.shaped(integers).astype(np.int8), name_of(weight.inputs.floats), context.folder)
    return CompressedWeight(bits, sparsity, error / power if power > 0 else 0.0, quantizer, stored)
