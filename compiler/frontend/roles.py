"""Roles of a graph's inputs and outputs: the sample, the timestep, the conditions, the prediction."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from mezzotint.runtime.signature import IMAGE_RANK, MOST_RANK, Prediction, Signature, TimestepUnit

from ..errors import ModelError, SignatureError
from ..graph.nodes import name_of
from ..graph.require import dtype_of

_NAMES = {
    "timestep": ("timestep", "timesteps", "t", "time", "time_step", "time_steps", "ts"),
    "sample": ("sample", "latent_model_input", "latents", "latent", "x", "x_t", "noisy_sample", "hidden_states"),
}
_RANKS = {"timestep": (0, 1), "sample": tuple(range(2, MOST_RANK + 1))}
_LIKELY_RANKS = (IMAGE_RANK, 5, 3, 2, 6, 7, MOST_RANK)


def infer_signature(
    graph: ir.Graph,
    *,
    inputs: Mapping[str, str] | None = None,
    output: str | None = None,
    prediction: Prediction = "epsilon",
    timestep_unit: TimestepUnit = "steps",
    num_train_timesteps: int = 1000,
    where: str = "the model",
) -> Signature:
    """Return the signature of a graph. `inputs` maps roles ("sample", "timestep") to names; other roles are inferred.

    The sample is a float input with the rank of the prediction, 4 where the graph does not say it. The timestep is a
    number or a vector, recognised by its name when several inputs have such a shape. Raises SignatureError when a role
    cannot be inferred, ModelError for a sample that is not float32.
    """
    named_roles = dict(inputs or {})
    if unknown := set(named_roles) - {"sample", "timestep"}:
        raise SignatureError(
            f"unknown input role {sorted(unknown)[0]!r}", where=where, hint="roles are sample and timestep"
        )
    values = {name_of(v): v for v in graph.inputs if name_of(v) not in graph.initializers}
    listing = ", ".join(f"{n} {v.dtype}{v.shape}" for n, v in values.items())
    for role, name in named_roles.items():
        if name not in values:
            raise SignatureError(
                f"no input is called {name!r}", where=where, hint=f"for {role}, choose from: {listing}"
            )
    ranks_of_sample = _ranks_of_sample(graph, values, output)
    sample = named_roles.get("sample") or _pick(values, "sample", ranks_of_sample, where, listing)
    rest = {n: v for n, v in values.items() if n != sample}
    timestep = named_roles.get("timestep") or _pick(rest, "timestep", _RANKS["timestep"], where, listing)
    for role, name, ranks in (("sample", sample, _RANKS["sample"]), ("timestep", timestep, _RANKS["timestep"])):
        if _rank(values[name]) not in (*ranks, None):
            raise SignatureError(
                f"{name!r} cannot be the {role}: its shape is {values[name].shape}",
                where=where,
                hint=f"for {role}, choose from: {listing}",
            )
    if values[sample].dtype != ir.DataType.FLOAT:
        raise ModelError(
            f"the sample input {sample!r} is {values[sample].dtype}, not float32",
            where=where,
            hint="export the model in float32; half-precision graphs have no integer kernels on the CPU",
        )
    if timestep_unit != "steps" and not _is_number(values[timestep], "sample"):
        raise SignatureError(
            f"the timestep {timestep!r} is {values[timestep].dtype}: fractions need a floating type",
            where=where,
            hint="leave out --timestep-unit, or export the model with a float timestep",
        )
    return Signature(
        sample=sample,
        timestep=timestep,
        output=_pick_output(graph, output, _rank(values[sample]), where),
        conditions=tuple(n for n in rest if n != timestep),
        prediction=prediction,
        timestep_unit=timestep_unit,
        num_train_timesteps=num_train_timesteps,
    )


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _ranks_of_sample(graph: ir.Graph, values: Mapping[str, ir.Value], output: str | None) -> tuple[int, ...]:
    """Return the ranks that the sample may have: those of the outputs, or that of images where these do not say it.

    Without float inputs of that rank it is the next likely rank that some have.
    """
    ranks = {_rank(v) for v in graph.outputs if output in (None, name_of(v))}
    known = tuple(rank for rank in ranks if rank in _RANKS["sample"])
    if known and len(known) == len(ranks):
        return known
    floats = {_rank(v) for v in values.values() if v.dtype is not None and _is_number(v, "sample")}
    return next(((rank,) for rank in _LIKELY_RANKS if rank in floats), (IMAGE_RANK,))


def _pick(values: Mapping[str, ir.Value], role: str, ranks: tuple[int, ...], where: str, listing: str) -> str:
    names = _NAMES[role]
    fitting = [n for n, v in values.items() if _rank(v) in ranks and v.dtype is not None and _is_number(v, role)]
    named = [n for known in names for n in fitting if n.lower() == known]
    if named:
        return named[0]
    if role == "sample" and len(fitting) == 1:
        return fitting[0]
    if role == "timestep" and len(fitting) == 1 and "label" not in fitting[0].lower():
        return fitting[0]
    candidates = f"candidates: {', '.join(fitting)}" if fitting else "no input has a fitting shape"
    raise SignatureError(
        f"no input can be recognised as the {role} ({candidates})",
        where=f"{where}, inputs: {listing}",
        hint=f"name it: --input {role}=NAME",
    )


def _is_number(value: ir.Value, role: str) -> bool:
    dtype = dtype_of(value)
    return dtype.is_floating_point() if role == "sample" else dtype.is_floating_point() or dtype.is_integer()


def _pick_output(graph: ir.Graph, output: str | None, rank: int | None, where: str) -> str:
    names = [name_of(v) for v in graph.outputs]
    if output is not None:
        if output not in names:
            raise SignatureError(
                f"no output is called {output!r}", where=where, hint=f"choose from: {', '.join(names)}"
            )
        return output
    fitting = [name_of(v) for v in graph.outputs if _rank(v) in (rank, None)]
    if len(names) == 1 or len(fitting) == 1:
        return (fitting or names)[0]
    raise SignatureError(
        f"the model has several outputs: {', '.join(names)}",
        where=where,
        hint="name the one that predicts: --output-name epsilon=NAME",
    )
