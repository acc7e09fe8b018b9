"""What an error in a layer's outputs makes in epsilon, measured once for each layer of the float graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mezzotint.runtime.arrays import Floats

from ..bits.simulate import Simulator, signal
from ..core.pipeline import Context
from ..core.program import Program
from ..graph.nodes import name_of
from .prunable import PrunableWeight


def epsilon_shares(
    program: Program,
    context: Context,
    weights: Sequence[PrunableWeight],
    pruned: Mapping[str, Callable[[], Floats]],
    calls: int,
    where: str,
) -> dict[str, float]:
    """Return, by layer, the squared error of epsilon as a share of its power when this weight alone is pruned.

    `pruned` gives the weight in its own shape. The mean over so many calls of the float trajectory, spread evenly.
    """
    last = len(program.deployment.timesteps) - 1
    chosen = sorted({round(float(c)) for c in np.linspace(0, last, calls)})
    names = {weight.name: name_of(weight.inputs.floats) for weight in weights}
    found: dict[str, float] = {}
    with Simulator(program, context, weights=list(names.values())) as simulator:
        scenes = simulator.follow(context, chosen, context.samples, f"{where}: float trajectory")
        power = signal(scenes)
        for weight in weights:
            noise = simulator.noise(scenes, {names[weight.name]: pruned[weight.name]()})
            found[weight.name] = float(np.mean(noise / power))
            context.progress(f"{where}: layers", len(found), len(weights))
    return found
