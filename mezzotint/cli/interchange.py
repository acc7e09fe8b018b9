"""`mezzotint overlay` and `mezzotint overrides`: facts of a bundle in the file formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Force, Json, Threads


def overlay(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help=".json file to write.")],
    what: Annotated[str, typer.Option(help="precision, kernel, scale, time or cost.")] = "precision",
    debug: Annotated[
        Path | None, typer.Option("--layers", help="For cost: the output of `mezzotint debug --json`.")
    ] = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write node data for Model Explorer: the nodes of the network, coloured by one of their properties."""
    from mezzotint.compiler.bundle.staging import check_target_file
    from mezzotint.runtime.bundle.bundle import open_bundle

    from ..interchange import write_json
    from ..interchange.overlay import make_overlay
    from ..io.networks import with_checked_networks
    from ..text import console

    check_target_file(output, force=force)
    opened = with_checked_networks(open_bundle(bundle))
    node_data = make_overlay(opened, what, debug=debug, threads=threads)  # type: ignore[arg-type]  # it refuses others
    write_json(output, node_data.data, force=force)
    summary = {
        "file": str(output),
        "model": str(opened.model_path),
        "nodes": f"{node_data.nodes} of {node_data.of}",
        **({"not in it": node_data.unknown} if node_data.unknown else {}),
    }
    console.print_json(summary) if json else console.print_pairs(f"overlay: {what}", summary)


def overrides(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    float_: Annotated[Path, typer.Option("--float", help="The float .onnx that `mezzotint export` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help=".json file to write.")],
    conditions: Annotated[Path | None, typer.Option(help=".npz with the model's conditions; random when left out.")] = (
        None
    ),
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write TensorQuantOverrides for onnxruntime's quantizer: the bundle's scales for tensors of the float model."""
    from mezzotint.compiler.bundle.staging import check_target_file
    from mezzotint.runtime.bundle.bundle import open_bundle

    from ..interchange import write_json
    from ..interchange.overrides import make_overrides
    from ..io.networks import with_checked_networks
    from ..io.settings import load_conditions
    from ..text import console

    check_target_file(output, force=force)
    rows = None if conditions is None else load_conditions(conditions)
    scales = make_overrides(with_checked_networks(open_bundle(bundle)), float_, conditions=rows, threads=threads)
    write_json(output, scales.to_json(), force=force)
    summary = {
        "file": str(output),
        "tensors": len(scales.tensors),
        "widest of several": len(scales.widened),
        "left out": len(scales.skipped),
        "layers in float": len(scales.excluded),
    }
    if json:
        console.print_json({**summary, "skipped": dict(scales.skipped)})
        return
    console.print_pairs("overrides", summary)
    if scales.skipped:
        console.print_table("left to onnxruntime", ("tensor", "why"), list(scales.skipped.items()))
