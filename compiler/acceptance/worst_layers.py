"""The layers that cost the finished file the most at one network call, as `mezzotint debug` finds them.

The float graph that the quantizers were inserted into has the names of the file's layers, so both are put side by side
(compiler/audit/side_by_side.py). Where all layers would take too long, only those whose own outputs have the largest
relative errors are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mezzotint.runtime.bundle.acceptance import WorstLayer
from mezzotint.runtime.compare import StepSQNR
from mezzotint.runtime.signature import Images, Timestep

from ..audit.side_by_side import put_side_by_side
from ..audit.suggestions import FULL_BITS, SMALL, Facts, suggest
from ..audit.switched import SwitchedNetwork
from ..core.pipeline import Context, Recipe
from ..core.program import Plan, Program

NAMED = 3
FEWEST = 12  # layers that are tried in any case
SWITCHED = 2.0  # the time of a call of the joint graph over that of a float call

Predictor = Callable[[Callable[..., Images]], Images]
"""Makes the prediction at the call in question, of a network that is called as `net(x, t, **conditions)`."""


def worst_layers(
    program: Program,
    file: Path,
    recipe: Recipe,
    context: Context,
    predict: Predictor,
    call: tuple[int, Timestep],
    budget_calls: float,
) -> tuple[WorstLayer, ...]:
    """Return up to NAMED layers with the largest costs at `call`, the largest first.

    `budget_calls` is the number of float calls that this may take. Nothing is returned for a graph whose layers cannot
    be separated.
    """
    if program.float_model is None:
        return ()
    compared = put_side_by_side(replace(program, model=program.float_model), file)
    if not compared.layers:
        return ()
    index, _ = call
    facts = {name: Facts() for name in compared.layers}
    costs = {name: StepSQNR() for name in compared.layers}
    with SwitchedNetwork.of(compared, program.signature, context) as network:
        exact = predict(network)
        network.note(facts, index)
        by_own_error = sorted(facts, key=lambda name: facts[name].local()[index])
        tried = by_own_error[: max(FEWEST, int(budget_calls / SWITCHED))]
        for done, name in enumerate(tried, 1):
            costs[name].add(index, exact, network.quantized([name], lambda: predict(network)))
            context.progress("worst layers", done, len(tried))
    noise = {name: sum(costs[name].noise().values()) for name in tried}
    everything = sum(noise.values())
    bits = {str(site): quantizer.bits for site, quantizer in (program.plan or Plan()).quantizers.items()}
    found = []
    for name in sorted(noise, key=lambda name: -noise[name])[:NAMED]:
        share = noise[name] / everything if everything else 0.0
        weight = compared.layers[name].weight
        if share >= SMALL:
            advice = suggest(name, facts[name], share, recipe, bits.get(weight, FULL_BITS) if weight else None)
            found.append(WorstLayer(name, round(share, 3), advice.why, advice.what))
    return tuple(found)
