"""round_scales: round every scale to a dyadic number, an integer of few bits times a power of two.

    s = m 2^e,        m an integer of `bits` bits, 2^(bits - 1) <= m < 2^bits,        e an integer

A processor without floating point moves from one grid to the next by an integer product and a shift, if the factor
s_x s_w / s_y between both is dyadic (HAWQ-V3, arXiv 2011.10680). Products of dyadic scales are dyadic. With `bits` 1
scales are powers of two, and the move is a shift alone, as fixed-point hardware asks for.

Scales of activations are rounded up, so that no range is cut off, and zero points stay: a range grows by 2^(1 - bits)
of itself at most. Those of weights are rounded to the nearest one, and the weights to the new grid when insert_qdq
writes it. Rows of tables and channels are rounded one by one.

onnxruntime multiplies by the factor in float, so its kernels and their speed are the same: the pass shows what the form
costs in fidelity, and makes a file for engines that demand it. Deviation: HAWQ-V3 rounds the factor between two grids
once, here each scale is rounded; m has twice the bits in the product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.runtime.arrays import Floats

LARGEST_BITS = 16


@dataclass(frozen=True)
class RoundScales(Pass):
    """Scales with an integer factor of `bits` bits, 1 to 16. `weights` and `activations`: which of them."""

    bits: int = 8
    weights: bool = True
    activations: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"plan"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= LARGEST_BITS:
            raise RecipeError(f"{self.name}.bits is {self.bits}", where=self.name, hint=f"choose 1 to {LARGEST_BITS}")

    def run(self, program: Program, context: Context) -> Program:
        plan = program.require_plan()
        quantizers, moved = dict(plan.quantizers), [0.0]
        for site, quantizer in plan.quantizers.items():
            is_weight = quantizer.axis is not None and not quantizer.table
            if self.weights if is_weight else self.activations:
                scale = dyadic(quantizer.scale, self.bits, up=not is_weight)
                moved.append(float(np.max(np.abs(scale / quantizer.scale - 1))))
                quantizers[site] = replace(quantizer, scale=scale, by=self.name)
        note = f"{len(moved) - 1} quantizers with scales of {self.bits} bits, moved by {max(moved):.1%} at most"
        return replace(program, plan=replace(plan, quantizers=quantizers), note=note)


def dyadic(scale: Floats, bits: int, *, up: bool = False) -> Floats:
    """Return the nearest m 2^e, m of `bits` bits, to positive numbers; with `up` the least that is no less.

    float32 holds them exactly: m has fewer bits than its mantissa.
    """
    mantissa, exponent = np.frexp(scale.astype(np.float64))  # 1/2 <= mantissa < 1
    whole = mantissa * 2.0**bits
    rounded = np.ceil(whole) if up else np.rint(whole)
    return np.asarray(np.ldexp(rounded, exponent - bits), np.float32)
