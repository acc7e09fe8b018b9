"""HAWQ's traces: how much a random change of each weight moves the network's output, for all weights at once.

HAWQ-V2 and -V3 (arXiv 1911.03852, 2011.10680) rank layers by the trace of their Hessian. With the output's squared
error as the loss, the Hessian at the float weights is J^T J, and for random signs v over the outputs (Hutchinson)

    E |J^T v|^2 = tr(J E[v v^T] J^T) = tr(J^T J):

one backward pass of v^T f gives a sample of the trace of every weight. noise = trace / n * |Q_c(w) - w|^2, with n
weights in w. A run is a projection of all batches at all calls, and runs are added until the standard error of the mean
over the calls is small enough for every weight.

Measured on the digits (49 weights, 4 samples, 5 calls, to 10 %): 18 runs and 38 seconds of one core for all of
assign_bits. Without gradients, differences of predictions along random changes u of a weight, E |J u|^2, take 5.9 runs
for each weight, 288 in all, and 155 seconds; the two traces of a weight differ by 9 % (root mean square; 20 % at most).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from mezzotint.runtime.arrays import Doubles

from ..bits.profile import Profile, Profiler, Trace
from ..bits.simulate import Scene, Simulator, signal
from ..bits.units import Unit
from ..graph.nodes import name_of, numpy_of
from ..training.torch_device import training_device
from .probed_network import ProbedNetwork, project

LEAST_PROBES = 4  # runs below which a spread is not known


def hawq_profile(
    profiler: Profiler, simulator: Simulator, scenes: Sequence[Scene], probes: int, spread: float
) -> Profile:
    """Return the profile of the score `hawq`: up to `probes` runs, until the spread of no trace is above `spread`."""
    weighted = [unit for unit in profiler.units if unit.weight is not None]
    traces = measure_traces(profiler, weighted, scenes, probes, spread)

    def at_widths(unit: Unit) -> dict[int, Doubles]:
        weight = numpy_of(unit.require_weight())
        each = traces[unit.name].values / weight.size
        return {bits: each * sum_of_squares(profiler.rounded(unit, bits) - weight) for bits in profiler.widths}

    profile = profiler.profile_of(simulator, scenes, at_widths)
    return Profile(profile.calls, profile.signal, profile.weights, profile.activations, traces)


def measure_traces(
    profiler: Profiler, units: Sequence[Unit], scenes: Sequence[Scene], probes: int, spread: float
) -> Mapping[str, Trace]:
    """Return the trace of each unit's weight, by the names of units."""
    program, context, power = profiler.program, profiler.context, signal(scenes)
    names = [name_of(unit.weight) for unit in units]
    found: list[Doubles] = []
    left = np.full(len(units), np.inf)
    with training_device(context) as device:
        network = ProbedNetwork(program, program.model, device, weights=names, combined=False)
        while len(found) < probes and bool((left > spread).any()):
            found.append(_run(network, names, scenes, context.seed, len(found)))
            context.progress(f"{profiler.by}: traces", len(found), probes)
            if len(found) >= LEAST_PROBES:
                shares = np.mean(np.array(found) / power, axis=2)
                error = np.std(shares, axis=0, ddof=1) / math.sqrt(len(found))
                left = error / np.maximum(shares.mean(axis=0), 1e-30)
    mean = np.mean(found, axis=0)
    known = len(found) >= LEAST_PROBES
    return {unit.name: Trace(mean[k], len(found), float(left[k]) if known else None) for k, unit in enumerate(units)}


def _run(network: ProbedNetwork, names: Sequence[str], scenes: Sequence[Scene], seed: int, probe: int) -> Doubles:
    """Return |J^T v|^2 of each weight at each call `[weights, calls]`, summed over the batches of the call."""
    calls = sorted({scene.call for scene in scenes})
    total = np.zeros((len(names), len(calls)))
    batches = dict.fromkeys(calls, 0)
    for scene in scenes:
        prediction, _ = network(scene.x, scene.timestep, scene.conditions)
        gradient = project(prediction, seed, scene.call, batches[scene.call], probe)
        batches[scene.call] += 1
        powers = gradient_powers(network, gradient)
        total[:, calls.index(scene.call)] += [powers[name] for name in names]
    return total


def gradient_powers(network: ProbedNetwork, total: torch.Tensor) -> dict[str, float]:
    """Return |gradient|^2 of a number by each weight. A gradient is freed as soon as it is known."""
    found = dict.fromkeys(network.weights, 0.0)

    def keep(name: str, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            found[name] = float(weight.grad.double().square().sum())
            weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(partial(keep, name)) for name, weight in network.weights.items()]
    try:
        total.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def sum_of_squares(values: npt.NDArray[np.float32]) -> float:
    """Return the sum of squares."""
    flat = values.reshape(-1).astype(np.float64)
    return float(flat @ flat)
