"""The float graph that a bundle's quantizers were inserted into, from its recipe and the reference."""

from __future__ import annotations

from dataclasses import replace

from mezzotint.compiler.calibration.calibrate import random_conditions
from mezzotint.compiler.calibration.conditions import spread_labels
from mezzotint.compiler.core.pipeline import Context, GraphPass, Recipe
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.passes.recipes.files import recipe_from_json
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.guidance import Conditions, null_rows
from mezzotint.runtime.streams import SeedOffset


def checked_recipe(bundle: Bundle) -> Recipe:
    """Return the recipe of a bundle whose layers match the float graph's. Raises InputError for other bundles."""
    if bundle.precisions is not None:
        raise InputError(
            "the bundle mixes several precisions",
            where=str(bundle.path),
            hint="debug the bundles that it was mixed from, one by one",
        )
    try:
        recipe = recipe_from_json(bundle.manifest.recipe.to_json(), where=str(bundle.path))
    except RecipeError as error:
        raise InputError(
            f"the passes on the float graph must be run again, and one is not known here: {error.what}",
            where=str(bundle.path),
            hint="debug it where it was compiled, with the version and the passes that made it",
        ) from error
    return recipe


def replayed(
    bundle: Bundle,
    program: Program,
    recipe: Recipe,
    context: Context,
    conditions: Conditions | None = None,
    unconditional: Conditions | None = None,
) -> Program:
    """Run the recipe's passes on the float graph again, on copies: the graph that the quantizers were inserted into.

    A pass that rewrites the graph from statistics needs the calibration before it, so that runs again, too.
    """
    rewrites = [i for i, step in enumerate(recipe.passes) if isinstance(step, GraphPass)]
    measured = max((i for i in rewrites if "stats" in recipe.passes[i].needs), default=-1)
    if measured >= 0:
        context = _calibration_context(bundle, program, context, conditions, unconditional)
    for i, step in enumerate(recipe.passes):
        if i <= measured or i in rewrites:
            program = step.run(replace(program, model=program.model.clone()), context)
    return program


def _calibration_context(
    bundle: Bundle,
    program: Program,
    context: Context,
    conditions: Conditions | None = None,
    unconditional: Conditions | None = None,
) -> Context:
    """Return a context that calibrates as the compilation of the bundle did. Rows left out are random, as there."""
    calibration, signature = bundle.manifest.calibration, bundle.signature
    program = replace(program, signature=signature)  # the reference may come without the configuration of its labels
    seed, guided = calibration.seed, bundle.deployment.guided
    if conditions is None:
        rows = random_conditions(program, calibration.samples, seed, calibration.sizes)
    else:
        rows = {**spread_labels(signature, calibration.samples), **conditions}
    if unconditional is None:
        after = SeedOffset.UNCONDITIONAL.after(seed)
        drawn = random_conditions(program, 1, after, calibration.sizes) if guided else {}
        unconditional = {**drawn, **(null_rows(signature) if guided else {})}
    elif guided and not unconditional:
        unconditional = null_rows(signature)
    return replace(
        context,
        samples=calibration.samples,
        batch=calibration.batch,
        conditions=dict(rows),
        unconditional=dict(unconditional),
        condition_network=None if conditions is None else context.condition_network,
    )
