"""Run the passes that a failed compile still had before it.

    python tools/replay.py FOLDER.failed                 all of them
    python tools/replay.py FOLDER.failed --only 1        the failing one alone
    python tools/replay.py FOLDER.failed --dump DIR      with the graph after each

FOLDER.failed is what a compile leaves beside its output when a pass breaks: the program before that pass, its
statistics and plan, and the passes that were pending with their options.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mezzotint.compiler.calibration.calibrate import random_conditions
from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.passes.recipes.files import make_pass
from mezzotint.progress import shown
from mezzotint.runtime.errors import MezzotintError
from mezzotint.text.console import print_error, print_table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", type=int, help="how many of the pending passes to run")
    parser.add_argument("--dump", type=Path, help="write NNN_pass.{txt,diff,onnx} here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4, help="calibration samples of the passes that run the model")
    parser.add_argument("--device", default=pipeline.CPU, help="where passes train: cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    try:
        program, pending = snapshot.load_program(args.folder)
        passes = [make_pass(p["pass"], p["options"]) for p in pending[: args.only]]
        with shown() as report:
            context = pipeline.Context(
                args.folder.absolute(),
                threads=args.threads,
                device=args.device,
                samples=args.samples,
                conditions=random_conditions(program, args.samples, seed=0),
                unconditional=random_conditions(program, 1, seed=1) if program.deployment.guided else {},
                progress=report,
            )
            dump = None if args.dump is None else pipeline.Dump(args.dump, models=True)
            done = pipeline.run_passes(program, passes, context, dump=dump)
    except MezzotintError as error:
        print_error(error)
        return 2
    rows = [(r.name, f"{r.nodes_before} -> {r.nodes_after}", r.note) for r in done.history]
    print_table(f"replayed {len(passes)} passes", ("pass", "nodes", "what it did"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
