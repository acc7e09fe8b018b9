"""Runs an experiment that one YAML file declares, and writes its table with intervals and a page of plots.

    python -m tools.experiment FILE.yaml                     rows and results in out/experiments/NAME
    python -m tools.experiment FILE.yaml --cluster local     rows on the workers of Ray
    python -m tools.experiment FILE.yaml --write-only        the results again, from the rows that are there
    python -m tools.experiment FILE.yaml --model-path mnist-onnx=DIR/model.onnx     a model from elsewhere

tools/experiments/ has those of the leaderboards, of the noise correction and of this project's own claims;
tools/experiment_file.py says what a file may declare. Each row is a file, so an experiment that was stopped goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mezzotint.runtime.errors import InputError, MezzotintError
from tools.experiment_file import NoiseExperiment, read_experiment
from tools.experiment_grid import measure_grid
from tools.experiment_noise import measure_noise
from tools.experiment_results import PAGE, write_results
from tools.pieces import ROOT


def model_paths(words: list[str]) -> dict[str, Path]:
    """Return the files of --model-path by name. Raises InputError."""
    paths = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path:
            raise InputError(f"{word!r} names no model with its file", where="--model-path", hint="give NAME=FILE")
        paths[name] = Path(path)
    return paths


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--cluster", help="local, local:WORKERS, or an address of Ray")
    parser.add_argument("--folder", type=Path, help="by default out/experiments/NAME")
    parser.add_argument("--write-only", action="store_true", help="measure nothing")
    parser.add_argument("--model-path", metavar="NAME=FILE", action="append", default=[])
    args = parser.parse_args(argv)
    try:
        experiment = read_experiment(args.file)
        folder = (args.folder or ROOT / "out" / "experiments" / experiment.name).absolute()
        rest = args.file.absolute(), folder, model_paths(args.model_path), args.cluster, args.write_only
        if isinstance(experiment, NoiseExperiment):
            results = measure_noise(experiment, *rest)
        else:
            results = measure_grid(experiment, *rest)
        if results is None:
            raise InputError("there are no rows yet", where=str(folder), hint="leave out --write-only")
        write_results(experiment.name, results, folder)
    except MezzotintError as error:
        print(error, file=sys.stderr)
        return 2
    print(folder / PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
