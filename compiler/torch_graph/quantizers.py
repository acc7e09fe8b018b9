"""Quantizers as torch modules: the arithmetic of QuantizeLinear and DequantizeLinear, with gradients.

    v = x / s    q = clamp(round(v) + z, qmin, qmax)    x' = (q - z) s

Every float32 value equals that of compiler/core/formats.py. Rounding passes gradients on unchanged, and the scale has
the gradient of LSQ (Esser et al., 2020): round(v) - v inside of the grid, and the end that q was clamped to outside.
Both follow from ordinary autograd. A function of torch.autograd would need rules of its own for torch.func.vmap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..core.formats import SMALLEST_SCALE
from ..errors import PassError


def with_gradient_of(value: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
    """Return exactly `value`, with the gradient of `through`."""
    return value.detach() + (through - through.detach())


class Quantizer(nn.Module):
    """A quantizer with trainable scale and zero point.

    `scale` and `zero_point` have one shape: `[]`, or `[C]` along `axis` of the values. With `rows` they are tables,
    `[rows]` or `[rows, C]`. `qmin` and `qmax` are the ends of the grid, or one end for each channel `[C]`.

    The zero point is a float that is rounded and clamped to the grid in each call, so that what is trained is what is
    written. The gradients of both parameters are multiplied by 1 / sqrt(n qmax), as LSQ does, where n is the number of
    elements that share a scale; with tables, of those of one sample.

    `use_levels` puts a codebook in the place of the integers: round(v) is then the nearest level. Its gradient reaches
    the level, too, where levels are trained (compiler/training/learned_levels.py). Weights beyond the outer levels have
    no gradient; where a row has two levels, and half of its weights lie beyond them, this begins half their distance
    further out. `branch` is added to what is on the grid, while a network is trained (fading_branches.py).

    `nest` rounds to a finer grid first, whose steps are those of this one over `finer` (nested_widths.py).
    """

    qmin: torch.Tensor
    qmax: torch.Tensor
    levels: torch.Tensor | None
    branch: torch.Tensor | None
    finer: torch.Tensor | None

    def __init__(
        self,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        qmin: float | torch.Tensor,
        qmax: float | torch.Tensor,
        axis: int | None = None,
        rows: bool = False,
    ) -> None:
        super().__init__()
        expected = int(rows) + int(axis is not None)
        if scale.shape != zero_point.shape or scale.ndim != expected:
            raise PassError(
                f"a quantizer {'with' if rows else 'without'} rows, along axis {axis}, has a scale of the shape "
                f"{list(scale.shape)} and a zero point of the shape {list(zero_point.shape)}",
                hint="give both the same shape: [], [C], [rows] or [rows, C]",
            )
        if axis is None and any(isinstance(end, torch.Tensor) and end.ndim for end in (qmin, qmax)):
            raise PassError("the ends of a grid differ along no axis", hint="give the axis of the channels")
        self.axis, self.rows = axis, rows
        dtype = scale.dtype if scale.dtype.is_floating_point else torch.float32
        self.scale = nn.Parameter(scale.detach().clone().to(dtype))
        self.zero_point = nn.Parameter(zero_point.detach().clone().to(dtype))
        self.register_buffer("qmin", torch.as_tensor(qmin, dtype=dtype).clone())
        self.register_buffer("qmax", torch.as_tensor(qmax, dtype=dtype).clone())
        self.register_buffer("levels", None, persistent=False)
        self.register_buffer("branch", None, persistent=False)
        self.register_buffer("finer", None, persistent=False)
        self.cut = False
        self.drop_probability = 0.0
        self.drop_generator: torch.Generator | None = None

    def use_levels(self, table: npt.NDArray[np.int8]) -> None:
        """Round to these levels `[count]` or `[C, count]`, ascending. Raise PassError for a zero point or a table."""
        if self.rows or (table.ndim > 1 and self.axis is None) or bool(self.zero_points().any()):
            raise PassError("only a weight on a symmetric grid has a codebook", hint="leave levels to weights")
        self.levels = torch.as_tensor(table.astype(np.float32), dtype=self.qmin.dtype, device=self.qmin.device)
        self.qmin, self.qmax = self.levels[..., 0].clone(), self.levels[..., -1].clone()

    def nest(self, finer: float, *, cut: bool) -> None:
        """Round to steps of 1 / `finer` first, and round or cut that to this grid."""
        self.finer, self.cut = torch.full_like(self.qmin.max(), finer), cut

    @torch.no_grad()
    def levels_at(self, scale: npt.NDArray[np.float32]) -> npt.NDArray[np.int8] | None:
        """Return the levels, in units of `scale` where that was raised behind the training; None without a codebook."""
        if self.levels is None:
            return None
        trained = self.scales().cpu().numpy()
        ratio = (trained / scale.reshape(trained.shape))[..., None]
        levels = self.levels.cpu().numpy()
        table: npt.NDArray[np.int8] = np.rint(levels if np.all(ratio == 1) else levels * ratio).astype(np.int8)
        return table

    def mean_gap(self, rank: int) -> torch.Tensor:
        """Return the mean distance of neighbours on the grid, as it broadcasts over values of that rank."""
        if self.levels is None:
            return torch.ones_like(self.qmin.max())
        gap = (self.qmax - self.qmin).clamp(min=1) / (self.levels.shape[-1] - 1)
        return self._shaped(gap, rank, gap.ndim > 0)

    def nearest(self, v: torch.Tensor) -> torch.Tensor:
        """Return the nearest integers, or levels, of values in units of the scale; the grid's ends are not applied."""
        if self.finer is not None:
            coarse = torch.round(v * self.finer) / self.finer
            return torch.trunc(coarse) if self.cut else torch.round(coarse)
        if self.levels is None:
            return torch.round(v)
        middles = (self.levels[..., 1:] + self.levels[..., :-1]) / 2
        return self._at(self.levels, self._above(v, middles, strictly=True))

    def around(
        self, v: torch.Tensor, zero: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the lower one of two neighbours on the grid around each value, and their distance.

        Values, neighbours and `chosen` are in units of the scale, without the zero point. `chosen` are points of the
        grid, each of which is one of the two; its neighbour is the one towards the value.
        """
        if self.levels is None:
            low, high = self._shaped_end(self.qmin, v), self._shaped_end(self.qmax, v)
            base = torch.clamp(torch.floor(v), low - zero, high - zero - 1)
            if chosen is not None:
                base = torch.where(chosen > base + 1, chosen - 1, torch.where(chosen < base, chosen, base))
            return base, torch.ones((), dtype=v.dtype, device=v.device)
        last = self.levels.shape[-1] - 2
        index = self._above(v, self.levels[..., 1:], strictly=False).clamp(max=last)
        if chosen is not None:
            own = self._above(chosen, self.levels[..., 1:], strictly=False)
            index = torch.where(own > index + 1, own - 1, torch.where(own < index, own, index)).clamp(max=last)
        base = self._at(self.levels, index)
        return base, self._at(self.levels, index + 1) - base

    def _above(self, v: torch.Tensor, ends: torch.Tensor, *, strictly: bool) -> torch.Tensor:
        """Return how many ends `[n]` or `[C, n]` each value is above, or not below."""
        count = torch.zeros(v.shape, dtype=torch.int64, device=v.device)
        for k in range(ends.shape[-1]):
            end = self._shaped_end(ends[..., k], v)
            count = count + (v > end if strictly else v >= end)
        return count

    def _at(self, levels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if levels.ndim == 1:
            return levels[index]
        rows = torch.arange(levels.shape[0], device=index.device)
        return levels[self._shaped(rows, index.ndim, True), index]

    def _shaped_end(self, end: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._shaped(end, v.ndim, end.ndim > 0)

    def forward(self, x: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
        """Return the values of `x` on the grid, plus the `branch`.

        `row` (int64) selects the row of a table: a scalar or `[1]` for all of `x`, or `[B]`, one for each sample along
        the first axis of `x`.
        """
        if not (x.dtype.is_floating_point and x.element_size() >= self.scale.element_size()):
            x = x.to(self.scale.dtype)  # autocast computes in 16 bits; the grid is that of float32
        scale, zero, low, high = self.parameters_for(x, row)
        v = x / scale
        if self.levels is None:
            q = torch.clamp(with_gradient_of(self.nearest(v), v) + zero, low, high)
        else:  # the nearest level is inside of the grid, and has a gradient of its own where levels are trained
            beyond = (high - low) / 2 if self.levels.shape[-1] == 2 else torch.zeros_like(low)
            through = torch.clamp(v, low - beyond, high + beyond)
            q = self.nearest(v) + (through - through.detach())
        quantized = (q - zero) * scale
        if self.training and self.drop_probability > 0:
            chance = torch.rand(x.shape, generator=self.drop_generator, device=x.device)
            quantized = torch.where(chance < self.drop_probability, x, quantized)
        return quantized if self.branch is None else quantized + self.branch

    @torch.no_grad()
    def integers(self, x: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
        """Return the integers of `x`, as floats of the same shape."""
        scale, zero, low, high = self.parameters_for(x, row)
        return torch.clamp(self.nearest(x / scale) + zero, low, high)

    def parameters_for(self, x: torch.Tensor, row: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Return scale, zero point, lowest and highest integer, shaped to broadcast over `x`."""
        if self.rows != (row is not None):
            raise PassError(
                "a quantizer with a table needs a row" if self.rows else "a quantizer without a table has no rows",
                hint="pass the row of the timestep to the quantizers with tables only",
            )
        scale, zero = self.scales(), self.zero_points()
        low, high = (self._shaped(end, x.ndim, end.ndim > 0) for end in (self.qmin, self.qmax))
        if row is not None:
            samples = row.reshape(-1)
            self._check_samples(samples.shape[0], x)
            # Not scale[row]: Python reads the number of a scalar index, which vmap and a captured graph cannot do.
            scale, zero = (table.index_select(0, samples) for table in (scale, zero))
        scale, zero = (self._shaped(values, x.ndim, self.axis is not None) for values in (scale, zero))
        factor = torch.rsqrt(self._sharing(x) * torch.clamp(high, min=1))
        return with_gradient_of(scale, scale * factor), with_gradient_of(zero, zero * factor), low, high

    def scales(self) -> torch.Tensor:
        """Return the scales as they are used and written: none is smaller than SMALLEST_SCALE."""
        return with_gradient_of(torch.clamp(self.scale, min=float(SMALLEST_SCALE)), self.scale)

    def zero_points(self) -> torch.Tensor:
        """Return the zero points as they are used and written: integers of the grid; 0 with a codebook."""
        if self.levels is not None:
            return self.zero_point * 0
        return with_gradient_of(torch.clamp(torch.round(self.zero_point), self.qmin, self.qmax), self.zero_point)

    def drop_elements(self, probability: float, seed: int) -> None:
        """Leave each element as it is with this probability while the module trains (QDrop; Wei et al., 2022)."""
        if not 0 <= probability < 1:
            raise PassError(f"the probability of QDrop is {probability}", hint="choose one from 0 to less than 1")
        self.drop_probability = probability
        self.drop_generator = torch.Generator(self.scale.device).manual_seed(seed)

    def _shaped(self, values: torch.Tensor, rank: int, channels: bool) -> torch.Tensor:
        """Return `[]`, `[C]`, `[B]` or `[B, C]`, as `channels` and the number of dimensions say, as it broadcasts."""
        samples = values.ndim > int(channels)
        shape = [1] * rank
        if rank and samples:
            shape[0] = values.shape[0]
        if channels and self.axis is not None:
            shape[self.axis % rank] = values.shape[-1]
        return values.reshape(shape) if channels or samples else values

    def _check_samples(self, samples: int, x: torch.Tensor) -> None:
        if samples == 1:
            return
        if x.ndim == 0 or x.shape[0] != samples or (self.axis is not None and self.axis % x.ndim == 0):
            raise PassError(
                f"{samples} rows of a table, one a sample, for values of the shape {list(x.shape)}",
                hint="the first axis holds the samples; run values that mix samples along it under torch.func.vmap",
            )

    def _sharing(self, x: torch.Tensor) -> int:
        count = x.numel() // (x.shape[0] if self.rows and x.ndim else 1)
        return max(1, count // (self.scale.shape[-1] if self.axis is not None else 1))
