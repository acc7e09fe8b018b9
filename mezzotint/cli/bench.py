"""`mezzotint bench`: the time of one call, compared with fp32 onnxruntime and with other quantizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.runtime import bounds

from ..progress import shown
from .options import Json, PrecisionOfFloats, Provider, ProviderOptions, Quiet, number


def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    batch: Annotated[
        int | None,
        number(bounds.MOST_BATCH, "Samples in one call; 1, or the graph's fixed batch, when left out."),
    ] = None,
    threads: Annotated[
        int, number(bounds.MOST_THREADS, "Threads of the engine, of onnxruntime, and of every peer.")
    ] = 2,
    float_: Annotated[
        Path | None, typer.Option("--float", help="The float .onnx that `mezzotint export` wrote, to compare with.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Measure peers of --float too: onnxruntime's quantizer, OpenVINO, NNCF.")
    ] = False,
    calibration: Annotated[int, number(bounds.MOST_REPEATS, "Float calls for the calibration of the peers.")] = 16,
    pictures: Annotated[
        int,
        number(bounds.MOST_BATCH, "Images, at least, on which the peers' fidelity is measured.", "-n", "--pictures"),
    ] = 4,
    repeats: Annotated[int, number(bounds.MOST_REPEATS, "Calls in one block of the measurement.")] = 8,
    rounds: Annotated[int, number(bounds.MOST_REPEATS, "Passes over all blocks, each forwards and backwards.")] = 2,
    provider: Provider = "cpu",
    provider_option: ProviderOptions = None,
    precision: PrecisionOfFloats = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """How long one call takes, which operations take the time, and how far that is from the integer kernels alone."""
    from mezzotint.runtime.bundle.bundle import open_bundle

    from ..bench.bench import run_bench
    from ..bench.peers import PEERS
    from ..bench.tables import print_bench
    from ..doctor import untested_onnxruntime
    from ..io.networks import with_checked_networks
    from ..io.settings import parse_engine
    from ..text import console

    engine = parse_engine(provider, provider_option, precision)
    if warning := untested_onnxruntime():
        console.print_warning(warning)
    with shown(quiet=quiet or json) as report:
        result = run_bench(
            with_checked_networks(open_bundle(bundle)).on(engine),
            batch=batch,
            threads=threads,
            float_model=float_,
            repeats=repeats,
            rounds=rounds,
            peers=PEERS if peers else (),
            calibration=calibration,
            pictures=pictures,
            progress=report,
        )
    console.print_json(result.to_json()) if json else print_bench(result.to_json())
