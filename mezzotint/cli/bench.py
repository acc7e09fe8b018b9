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
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="Time calls alone, at all of batch=1,2,4 and threads=1,2; may be repeated."),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Let each machine of a cluster of Ray do the --sweep, alone.")
    ] = None,
    provider: Provider = "cpu",
    provider_option: ProviderOptions = None,
    precision: PrecisionOfFloats = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """How long one call takes, which operations take the time, and how far that is from the integer kernels alone."""
    from mezzotint.runtime.bundle.bundle import open_bundle
    from mezzotint.runtime.errors import InputError

    from ..bench.bench import run_bench
    from ..bench.peers import PEERS
    from ..bench.tables import print_bench
    from ..doctor import untested_onnxruntime
    from ..io.networks import with_checked_networks
    from ..io.settings import parse_engine
    from ..sweep.points import SweepPoints
    from ..sweep.sweep import SweepTimer, run_sweep
    from ..sweep.tables import print_sweep
    from ..text import console

    engine = parse_engine(provider, provider_option, precision)
    if warning := untested_onnxruntime():
        console.print_warning(warning)
    if sweep and peers:
        raise InputError("a sweep measures no peers", where="--peers", hint="leave out --peers or --sweep")
    if cluster is not None and not sweep:
        raise InputError(
            "workers that share a machine slow each other down", where="--cluster", hint="give --sweep: it times alone"
        )
    points = SweepPoints.parse(sweep, batch=batch, threads=threads) if sweep else None
    opened = with_checked_networks(open_bundle(bundle)).on(engine)
    if points is not None:
        timer = SweepTimer(points, repeats, rounds)
        with shown(quiet=quiet or json) as report:
            found = run_sweep(opened, timer, float_model=float_, cluster=cluster, progress=report)
        machines = [machine.to_json() for machine in found]
        whole = {"bundle": str(bundle), "repeats": repeats, "rounds": rounds, "machines": machines}
        console.print_json(whole) if json else print_sweep(found, 2 * rounds * repeats)
        return
    with shown(quiet=quiet or json) as report:
        result = run_bench(
            opened,
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
