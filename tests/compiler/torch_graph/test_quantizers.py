"""Quantizers in torch: their values are those of compiler/core/formats.py, their gradients those of LSQ."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.func import vmap

from mezzotint.compiler.core.formats import Format, Grid, Levels, RowFormats, dequantize, quantize, scale_for_range
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.torch_graph.quantizers import Quantizer
from mezzotint.compiler.torch_graph.soft_rounding import SoftRounding

SAMPLES, CHANNELS, ROWS = 3, 6, 4
SHAPES = {2: (SAMPLES, CHANNELS), 3: (SAMPLES, 5, CHANNELS), 4: (SAMPLES, CHANNELS, 7, 5)}
FORMATS = [Format(8), Format(6), Format(4), Format(8, signed=True), *(Format(b, True, True) for b in (4, 6, 8))]


def module(scale: np.ndarray, zero: np.ndarray, grid: Grid, axis: int | None = None, rows: bool = False) -> Quantizer:
    low, high = (torch.as_tensor(np.asarray(end, np.float32)) for end in (grid.qmin, grid.qmax))
    return Quantizer(torch.from_numpy(scale), torch.from_numpy(zero.astype(np.float32)), low, high, axis, rows)


def drawn(rng: np.random.Generator, shape: tuple[int, ...], fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Ranges that hold most, not all, of a normal distribution; an array also where the shape is []."""
    scale, zero = scale_for_range(-rng.uniform(0.2, 2, shape), rng.uniform(0.2, 2, shape), fmt)
    return np.asarray(scale), np.asarray(zero)


def values(rng: np.random.Generator, shape: tuple[int, ...], scale: np.ndarray) -> np.ndarray:
    """Random values, a quarter of them halfway between two grid points of the first scale."""
    x = rng.normal(size=shape).astype(np.float32)
    halves = ((rng.integers(-9, 9, shape) + 0.5) * scale.reshape(-1)[0]).astype(np.float32)
    return np.where(rng.random(shape) < 0.25, halves, x)


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}{'s' * f.symmetric}")
def test_values_are_exactly_those_of_the_formats(fmt: Format, rank: int) -> None:
    rng, shape = np.random.default_rng(rank), SHAPES[rank]
    axis = 1 if rank != 3 else -1
    for parameters, along, rows in (((), None, False), ((CHANNELS,), axis, False), ((ROWS,), None, True)):
        scale, zero = drawn(rng, parameters, fmt)
        x = values(rng, shape, scale)
        for row in range(ROWS) if rows else [None]:
            s, z = (scale, zero) if row is None else (scale[row], zero[row])
            integers = quantize(x, s, z, fmt, along)
            built = module(scale, zero, fmt, along, rows)
            at = None if row is None else torch.tensor(row)
            np.testing.assert_array_equal(built.integers(torch.from_numpy(x), at).numpy(), integers)
            np.testing.assert_array_equal(
                built(torch.from_numpy(x), at).detach().numpy(), dequantize(integers, s, z, along)
            )


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_mixed_widths(axis: int) -> None:
    rng = np.random.default_rng(0)
    bits = np.array([4, 8, 6, 3, 2, 8], np.int8)
    w = rng.normal(size=(6, 6, 3)).astype(np.float32)
    scale = (np.abs(np.moveaxis(w, axis, 0)).reshape(6, -1).max(1) * 0.8 / RowFormats(bits).qmax).astype(np.float32)
    grid, zero = RowFormats(bits), np.zeros(6, np.int8)
    integers = quantize(w, scale, zero, grid, axis)
    built = module(scale, zero, grid, axis)
    np.testing.assert_array_equal(built(torch.from_numpy(w)).detach().numpy(), dequantize(integers, scale, zero, axis))


def with_levels(axis: int) -> tuple[Quantizer, np.ndarray, Levels]:
    """(quantizer, weight, levels) of six channels along an axis."""
    rng = np.random.default_rng(axis)
    grid = Levels(np.sort(rng.integers(-90, 91, (6, 5)), axis=1).astype(np.int8))
    w = rng.normal(size=(6, 6, 3)).astype(np.float32)
    scale = (np.abs(np.moveaxis(w, axis, 0)).reshape(6, -1).max(1) / 79.7).astype(np.float32)
    built = module(scale, np.zeros(6, np.int8), Format(8, True, True), axis)
    built.use_levels(grid.table)
    return built, w, grid


@pytest.mark.parametrize("axis", [0, 1])
def test_a_codebook(axis: int) -> None:
    """Values of the numpy arithmetic; gradients of LSQ, with the nearest level as round(v)."""
    built, w, grid = with_levels(axis)
    scale, zero = built.scale.detach().numpy(), np.zeros(6, np.int8)
    x = torch.from_numpy(w).requires_grad_()
    out = built(x)
    q = quantize(w, scale, zero, grid, axis)
    np.testing.assert_array_equal(out.detach().numpy(), dequantize(q, scale, zero, axis))
    np.testing.assert_array_equal(built.integers(x).numpy(), q)
    out.sum().backward()
    assert x.grad is not None and built.scale.grad is not None
    v, rows = np.moveaxis(w, axis, 0).reshape(6, -1) / scale[:, None], np.moveaxis(q, axis, 0).reshape(6, -1)
    inside = (v >= grid.qmin[:, None]) & (v <= grid.qmax[:, None])
    factor = 1 / np.sqrt(w.size / 6 * np.maximum(grid.qmax, 1))
    assert not inside.all()
    want = np.where(inside, rows - v, rows).sum(1)
    np.testing.assert_allclose(built.scale.grad.numpy(), want * factor, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(np.moveaxis(x.grad.numpy(), axis, 0).reshape(6, -1), inside, atol=1e-6)
    with pytest.raises(PassError, match="only a weight"):
        module(np.ones(ROWS, np.float32), np.zeros(ROWS), Format(8), None, rows=True).use_levels(grid.table[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_soft_rounding_between_two_levels(axis: int) -> None:
    built, w, grid = with_levels(axis)
    weight, scale, zero = torch.from_numpy(w), built.scale.detach().numpy(), np.zeros(6, np.int8)
    nearest = quantize(w, scale, zero, grid, axis)
    soft = SoftRounding(built, weight)
    np.testing.assert_array_equal(soft.integers().numpy(), nearest)
    np.testing.assert_array_equal(soft.hard().numpy(), dequantize(nearest, scale, zero, axis))
    low, high = (np.moveaxis(np.broadcast_to(e, (6, 3, 6)), 2, axis) for e in (grid.qmin * scale, grid.qmax * scale))
    gaps = np.diff(grid.table.astype(float), axis=1).max() * scale.max()
    soft_weights = soft().detach().numpy()
    np.testing.assert_allclose(soft_weights, np.clip(w, low, high), atol=2 * SoftRounding.EDGE * gaps + 1e-5)
    for row, table in zip(np.moveaxis(soft.base.numpy(), axis, 0), grid.table, strict=True):
        assert set(row.reshape(-1).tolist()) <= set(table.tolist())
    other = np.moveaxis(np.moveaxis(nearest, axis, 0)[:, ::-1], 0, axis).copy()  # of other weights: still levels
    chosen = SoftRounding(built, weight, torch.from_numpy(other.astype(np.float32)))
    np.testing.assert_array_equal(chosen.integers().numpy(), other)


@pytest.mark.parametrize("channels", [(), (CHANNELS,)])
def test_rows_of_samples_equal_calls_of_one_sample(channels: tuple[int, ...]) -> None:
    """Values and gradients, in one call and under vmap."""
    rng = np.random.default_rng(1)
    scale, zero = drawn(rng, (ROWS, *channels), Format(6))
    x = torch.from_numpy(values(rng, SHAPES[4], scale))
    row = torch.tensor([2, 0, 2])
    one, batch, mapped = (module(scale, zero, Format(6), 1 if channels else None, rows=True) for _ in range(3))
    apart = torch.cat([one(x[i : i + 1], row[i : i + 1]) for i in range(SAMPLES)])
    together = batch(x, row)
    under_vmap = vmap(lambda sample, r: mapped(sample[None], r)[0])(x, row)
    for out in (apart, together, under_vmap):
        out.square().sum().backward()
    assert torch.equal(apart, together) and torch.equal(apart, under_vmap)
    for other in (batch, mapped):
        torch.testing.assert_close(other.scale.grad, one.scale.grad)
        torch.testing.assert_close(other.zero_point.grad, one.zero_point.grad)
    assert one.scale.grad is not None and not one.scale.grad[[1, 3]].any() and one.scale.grad[[0, 2]].all()


def test_gradients_have_the_closed_forms() -> None:
    """LSQ's of the scale inside of the grid, at its ends and beyond; the zero point moves what is clamped."""
    s, z, low, high = 0.25, 3.0, 0, 15
    x = torch.tensor([-9.0, -0.76, -0.75, 0.1, 0.13, 2.99, 3.0, 9.0], dtype=torch.float64, requires_grad=True)
    quantizer = Quantizer(torch.tensor(s, dtype=torch.float64), torch.tensor(z, dtype=torch.float64), low, high)
    factor = 1 / math.sqrt(len(x) * high)
    for i, v in enumerate((x / s).tolist()):
        inside = low <= round(v) + z <= high
        end = low if round(v) + z < low else high
        quantizer.zero_grad()
        x.grad = None
        quantizer(x)[i].backward()
        grads = [quantizer.scale.grad, quantizer.zero_point.grad, x.grad]
        of_scale, of_zero, of_x = (torch.zeros(()) if g is None else g for g in grads)
        assert of_scale.item() == pytest.approx(factor * (round(v) - v if inside else end - z))
        assert of_zero.item() == pytest.approx(0 if inside else -s * factor)
        assert of_x[i].item() == pytest.approx(1 if inside else 0)


@pytest.mark.parametrize(("high", "s", "z"), [(255, 0.01, 100.0), (255, 0.02, 40.0), (127, 0.01, 0.0)])
def test_gradients_agree_with_finite_differences(high: int, s: float, z: float) -> None:
    """LSQ's gradient is that of an average over many elements, on a fine grid, clipped elements included."""
    torch.manual_seed(0)
    x, target = torch.randn(200_000, dtype=torch.float64), torch.randn(200_000, dtype=torch.float64)
    low = -high if z == 0 else 0

    def loss(scale: float) -> tuple[float, float]:
        at = torch.tensor(scale, dtype=torch.float64)
        trial = Quantizer(at, torch.full_like(at, z), low, high)
        out = (trial(x) * target + trial(x).square()).mean()
        out.backward()
        assert trial.scale.grad is not None
        return out.item(), trial.scale.grad.item() * math.sqrt(len(x) * high)

    step = 0.01 * s
    slope = (loss(s + step)[0] - loss(s - step)[0]) / (2 * step)
    assert abs(slope) > 1 and loss(s)[1] == pytest.approx(slope, rel=0.02)


def test_what_is_trained_is_what_is_written() -> None:
    quantizer = Quantizer(torch.tensor([0.1, -1.0, 0.0]), torch.tensor([2.4, 99.0, -7.0]), 0, 15, axis=0)
    assert quantizer.zero_points().tolist() == [2, 15, 0]
    assert (quantizer.scales() > 0).all() and quantizer.scales()[0] == 0.1
    quantizer(torch.randn(3, 40)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in quantizer.parameters())


def test_dropped_elements_are_seeded_and_stay_as_they_are() -> None:
    x = torch.randn(40, 50)
    plain = Quantizer(torch.tensor(0.5), torch.tensor(7.0), 0, 15)
    first, second = copy.deepcopy(plain), copy.deepcopy(plain)
    for quantizer in (first, second):
        quantizer.drop_elements(0.5, seed=3)
    out = first(x)
    assert torch.equal(out, second(x))
    kept = out == x
    assert 0.4 < kept.float().mean() < 0.6 and torch.equal(out[~kept], plain(x)[~kept])
    assert torch.equal(first.eval()(x), plain(x))


def rounding(pull: float | None = None) -> tuple[SoftRounding, torch.Tensor, torch.Tensor, Quantizer]:
    """Rounding of a random weight, its float values, integers beside the nearest ones, and its quantizer."""
    torch.manual_seed(0)
    weight = torch.randn(CHANNELS, 5, 3)
    scale = weight.abs().amax((1, 2)) * 0.9 / 7
    quantizer = Quantizer(scale, torch.zeros(CHANNELS), -7, 7, axis=0)
    chosen = torch.clamp(quantizer.integers(weight) + torch.randint(-2, 3, weight.shape), -7, 7)
    soft = SoftRounding(quantizer, weight) if pull is None else SoftRounding(quantizer, weight, chosen, pull)
    return soft, weight, chosen, quantizer


def test_soft_rounding_starts_at_the_float_weight_and_ends_on_the_grid() -> None:
    soft, weight, _, quantizer = rounding()
    scale = quantizer.scale[:, None, None]
    inside = (weight / scale).abs() <= 7
    away = (soft() - weight).abs() / scale
    assert inside.any() and (~inside).any() and away[inside].max() < 2 * SoftRounding.EDGE
    assert ((soft() / scale).abs()[~inside] - 7).abs().max() < 2 * SoftRounding.EDGE
    assert torch.equal(soft.hard(), quantizer(soft.hard())) and torch.equal(soft.hard(), quantizer(weight))
    assert torch.equal(soft.integers(), quantizer.integers(soft.hard()))
    assert soft(weight).requires_grad
    assert soft.regularizer(2.0) > 1 > torch.tensor(0.0)
    with torch.no_grad():
        soft.v.copy_(torch.where(soft.v >= 0, 9.0, -9.0))
    assert soft.regularizer(2.0) == 0 and torch.equal(soft(), soft.hard())


@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_soft_rounding_starts_from_given_integers(pull: float) -> None:
    """They are kept wherever they lie, every element has a gradient, and a neighbour is in reach of each."""
    soft, _, chosen, _ = rounding(pull)
    assert torch.equal(soft.integers(), chosen)
    (soft().sum() + soft.regularizer(4.0)).backward()
    assert soft.v.grad is not None and (soft.v.grad != 0).all()
    with torch.no_grad():
        soft.v.neg_()
    assert ((soft.integers() - chosen).abs() == 1).all() and soft.integers().abs().max() <= 7


def test_soft_rounding_moves_by_a_product_of_low_rank() -> None:
    soft, _, chosen, _ = rounding(0.5)
    before, start = soft.v.detach().clone(), soft().detach()
    assert [id(v) for v in soft.variables()] == [id(soft.v)]
    soft.use_low_rank(2, np.random.default_rng(0))
    a, b = soft.variables()
    assert (a.shape, b.shape) == ((CHANNELS, 2), (2, 15)) and torch.equal(soft(), start), "the product is 0 at first"
    (soft() ** 2).sum().backward()
    assert soft.v.grad is None and b.grad is not None and (b.grad != 0).all()
    with torch.no_grad():
        b.copy_(torch.randn(2, 15))
    moved = before + torch.einsum("cr,rn->cn", a, b).reshape(before.shape)
    torch.testing.assert_close(soft.logits(), moved)
    torch.testing.assert_close(soft.fractions(), torch.clamp(1.2 * torch.sigmoid(moved) - 0.1, 0, 1))
    assert np.array_equal(soft.ups(), moved.detach() >= 0) and not torch.equal(soft.integers(), chosen)
    ups, hard = soft.ups(), soft.hard()
    soft.choose(ups)
    assert torch.equal(soft(), hard) and torch.equal(soft.hard(), hard) and np.array_equal(soft.ups(), ups)


def test_gradient_of_soft_rounding() -> None:
    soft = rounding()[0].double()
    weights = torch.randn(soft.v.shape, dtype=torch.float64)
    (soft() * weights).sum().backward()
    step = 1e-6
    before, after = copy.deepcopy(soft), copy.deepcopy(soft)
    with torch.no_grad():
        before.v.sub_(step)
        after.v.add_(step)
        slope = ((after() - before()) * weights) / (2 * step)
    torch.testing.assert_close(soft.v.grad, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Quantizer(torch.ones(3), torch.zeros(3), 0, 15),
        lambda: Quantizer(torch.ones(3), torch.zeros(()), 0, 15, axis=1),
        lambda: Quantizer(torch.ones(()), torch.zeros(()), 0, torch.ones(4)),
        lambda: Quantizer(torch.ones(3), torch.zeros(3), 0, 15, rows=True)(torch.ones(2)),
        lambda: Quantizer(torch.ones(()), torch.zeros(()), 0, 15)(torch.ones(2), torch.tensor(0)),
        lambda: Quantizer(torch.ones(3), torch.zeros(3), 0, 15, rows=True)(torch.ones(4, 2), torch.tensor([0, 1])),
        lambda: Quantizer(torch.ones(()), torch.zeros(()), 0, 15).drop_elements(1.0, 0),
    ],
)
def test_what_cannot_work_is_an_error(wrong: object) -> None:
    with pytest.raises(PassError):
        wrong()  # type: ignore[operator]
