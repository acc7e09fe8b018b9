"""Compiles the embedded digits with every recipe at several widths, and writes docs/leaderboard.md.

    python -m tools.leaderboard                              all recipes at W8A8, W6A6 and W4A8, 32 pictures
    python -m tools.leaderboard --recipe gptq --width w4a8   one row
    python -m tools.leaderboard --write-only                 the page again, from the rows that are there

Each row is a file in the working folder (out/leaderboard), written when it is done: a run that was stopped goes on
where it stopped. A row counts as done when it was measured with the same passes, width and numbers of pictures; --again
measures it anew after a change of the code. Calibration is measured once for all recipes that share it. Speeds come
last, from the bundles that are kept beside the rows: --no-speed leaves them to a run on a machine that is quiet.

Everything is paired: the same noise for float and quantized pictures, the prediction compared on the latents of the
float trajectory, speed against fp32 onnxruntime in the same minute, threads pinned.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mezzotint.api import compile_model, export_model
from mezzotint.bench import peers
from mezzotint.bench.pairs import (
    Comparison,
    folder_bytes,
    middle_timestep,
    paired_run,
    unseen_seed,
)
from mezzotint.compiler.core.pipeline import Recipe
from mezzotint.io.sources import DIGITS
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.progress import shown
from mezzotint.runtime.bundle.bundle import MODEL, Bundle, open_bundle
from mezzotint.runtime.compare import PEAK, psnr_db
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.latency import call_ratio
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import Network
from mezzotint.runtime.session import Denoiser, running_version
from mezzotint.runtime.signature import Images, Timestep
from tools.leaderboard_page import WIDTHS, Row, page

OWN_WIDTH = frozenset({"float"})  # recipes without a width to set
BATCH, SIZE = 16, (32, 32)
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "leaderboard.md"


def at_width(recipe: Recipe, width: str) -> Recipe:
    """The recipe with these bits in every pass that has an option for them.

    What mixes widths has a budget of bits on average: its own where the recipe claims to be good, elsewhere this width.
    """
    weight, activation = WIDTHS[width]
    wanted: dict[str, float] = {"weight_bits": weight, "activation_bits": activation}
    if width != recipe.claim:
        wanted["mean_bits"] = float(weight)
    given = [(p.name, p.options()) for p in recipe.passes]
    settings = {f"{name}.{o}": bits for name, have in given for o, bits in wanted.items() if have.get(o) is not None}
    return with_options(recipe, settings)


class Board:
    """The working folder: rows, the float model, and what measuring them needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(args.folder)
        self.rows = self.folder / "rows"
        self.rows.mkdir(parents=True, exist_ok=True)
        self.exported = self.folder / "float.onnx"
        if not self.exported.exists() and not args.write_only:
            export_model("digits", self.exported)

    def key(self, recipe: Any) -> str:
        """What makes two measurements of a row the same."""
        numbers = {n: getattr(self.args, n) for n in ("images", "calibration", "steps", "threads")}
        return json.dumps({"recipe": recipe, **numbers, "onnxruntime": running_version()}, sort_keys=True)

    def measure(self, name: str, width: str) -> Row:
        recipe = at_width(RECIPES[name], width)
        key = self.key(recipe.to_json()["passes"])
        start = time.perf_counter()
        try:
            with shown() as report:
                bundle = compile_model(
                    self.exported,
                    self.bundle(name, width),
                    recipe=recipe,
                    scheduler=DIGITS,
                    size=SIZE,
                    steps=self.args.steps,
                    calibration_samples=self.args.calibration,
                    threads=self.args.threads,
                    cache=self.folder / "cache",
                    progress=report,
                    force=True,
                )
                seconds = sum(float(record.seconds) for record in bundle.manifest.history)
                mine = bundle.denoiser(self.args.threads)
                n, threads = self.images, self.args.threads
                drawn = bundle.sample(n, seed=unseen_seed(bundle), batch=BATCH, threads=threads)
                data = self.quality(bundle, mine, drawn, report)
                kernels = bundle.manifest.kernels
                return Row(
                    name,
                    width,
                    key,
                    data["eps_sqnr_db"],
                    data["eps_sqnr_db_worst_step"],
                    data["psnr_db_median"],
                    data["psnr_db_p10"],
                    None,
                    folder_bytes(bundle.path / MODEL) / folder_bytes(self.exported),
                    seconds,
                    f"{kernels.integer}/{kernels.floating}",
                    len(bundle.manifest.islands),
                )
        except MezzotintError as error:
            print(f"{name} {width}: refused after {time.perf_counter() - start:.0f} s: {error}", flush=True)
            return Row(name, width, key, refused=error.what)

    def bundle(self, name: str, width: str) -> Path:
        return self.folder / "bundles" / f"{name}-{width}"

    def add_speeds(self) -> None:
        """The speeds of all rows that have none, one after the other, as nothing else is measured in between."""
        for file in sorted(self.rows.glob("*.json")):
            row = Row.load(file)
            if row is not None and row.speed is None and not row.refused:
                bundle = open_bundle(self.bundle(row.recipe, row.width))
                replace(row, speed=self.speed(bundle, bundle.denoiser(self.args.threads))).save(file)
                print(f"speed of {file.stem}", flush=True)

    def measure_peer(self, peer: str) -> Row:
        """A peer at 8 bits, calibrated on one batch of the float trajectory."""
        threads = self.args.threads
        with TemporaryDirectory(dir=self.folder) as folder, shown() as report:
            bundle = self.reference
            calls: list[peers.Call] = []

            def record(x: Images, t: Timestep) -> Images:
                calls.append((x, t, {}))
                return self.exact(x, t)

            x = samplers.initial_noise(0, (BATCH, *bundle.sample_shape))
            samplers.sample(record, x, bundle.schedule, bundle.deployment, noise=samplers.seeded_noise(0))
            start = time.perf_counter()
            net, file = peers.prepare_peer(peer, self.exported, bundle.signature, calls, Path(folder), threads)
            seconds = time.perf_counter() - start
            seed = unseen_seed(bundle)
            mine = []
            for first in range(0, self.images, BATCH):
                x = samplers.initial_noise(seed, (BATCH, *bundle.sample_shape), first=first)
                noise = samplers.seeded_noise(seed, first=first)
                mine.append(samplers.sample(net, x, bundle.schedule, bundle.deployment, noise=noise))
            data = self.quality(bundle, net, np.concatenate(mine), report)
            return Row(
                peer,
                "w8a8",
                self.key(peer),
                data["eps_sqnr_db"],
                data["eps_sqnr_db_worst_step"],
                data["psnr_db_median"],
                data["psnr_db_p10"],
                self.speed(bundle, net),
                file.stat().st_size / folder_bytes(self.exported),
                seconds,
            )

    def quality(self, bundle: Bundle, net: Network, drawn: Images, report: Progress) -> dict[str, Any]:
        """What a denoiser is like beside the float one, and the pictures that it has drawn."""
        seed = unseen_seed(bundle)
        images, sqnr = paired_run(self.exact, net, bundle, len(drawn), seed=seed, batch=BATCH, progress=report)
        psnr = psnr_db(np.clip(images, -1, 1), np.clip(drawn, -1, 1), peak=PEAK)
        return Comparison(images, drawn, sqnr, psnr).to_json()

    def speed(self, bundle: Bundle, net: Network) -> float:
        exact = Denoiser(self.exported, bundle.signature, threads=self.args.threads)
        x = samplers.initial_noise(0, (BATCH, *bundle.sample_shape))
        return call_ratio(exact, net, x, middle_timestep(bundle), repeats=9)[2]

    @property
    def images(self) -> int:
        """Whole batches: a peer may have its batch written in."""
        return -(-int(self.args.images) // BATCH) * BATCH

    @cached_property
    def reference(self) -> Bundle:
        """A float bundle: it knows the schedule, the deployment and the sizes."""
        path, args = self.folder / "reference", self.args
        return compile_model(
            self.exported,
            path,
            recipe="float",
            scheduler=DIGITS,
            size=SIZE,
            steps=args.steps,
            threads=args.threads,
            force=True,
        )

    @cached_property
    def exact(self) -> Network:
        """The float denoiser. Every row asks it about the same latents: it remembers what it said."""
        net = Denoiser(self.exported, self.reference.signature, threads=self.args.threads)
        said: dict[tuple[Timestep, bytes], Images] = {}

        def predict(x: Images, t: Timestep) -> Images:
            key = t, hashlib.sha256(x.tobytes()).digest()
            if key not in said:
                said[key] = net(x, t)
            return said[key]

        return predict

    def work(self) -> Iterator[tuple[Path, Callable[[], Row], str]]:
        """(file, how to measure it, its key) of every row that was asked for."""
        args = self.args
        for width in args.width:
            for name in args.recipe:
                key = self.key(at_width(RECIPES[name], width).to_json()["passes"])
                yield self.rows / f"{name}-{width}.json", lambda n=name, w=width: self.measure(n, w), key  # type: ignore[misc]
        for peer in peers.available() if args.peers else []:
            yield self.rows / f"{peer}-w8a8.json", lambda p=peer: self.measure_peer(p), self.key(peer)  # type: ignore[misc]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in RECIPES if name not in OWN_WIDTH]
    parser.add_argument("--recipe", action="append", choices=names, help="only this one (may be repeated)")
    parser.add_argument("--width", action="append", choices=list(WIDTHS), help="only this one (may be repeated)")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="leave that for another run")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--write-only", action="store_true", help="measure nothing")
    parser.add_argument("--folder", default=str(ROOT / "out" / "leaderboard"))
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    args.recipe, args.width = args.recipe or names, args.width or list(WIDTHS)
    board = Board(args)
    waiting = []
    for file, measure, key in board.work():
        row = None if args.again else Row.load(file)
        if row is None or row.key != key:
            waiting.append((file, measure))
    for i, (file, measure) in enumerate([] if args.write_only else waiting):
        print(f"[{i + 1}/{len(waiting)}] {file.stem}", flush=True)
        measure().save(file)
    if args.speed and not args.write_only:
        board.add_speeds()
    rows = [row for file in sorted(board.rows.glob("*.json")) if (row := Row.load(file)) is not None]
    known = [row for row in rows if row.recipe in RECIPES or row.recipe in peers.PEERS]
    about = f"DDIM with {args.steps} steps, {args.images} pictures from the same noise, {args.calibration} others for "
    about += f"calibration, onnxruntime {running_version()}, {args.threads} threads, batch {BATCH}"
    text = page(known, about, RECIPES)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    partial = args.page.with_suffix(f".{os.getpid()}")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
