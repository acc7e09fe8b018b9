"""A board: the rows of one model in a working folder, and how each is measured.

Everything is paired: the same noise for float and quantized images, the prediction compared on the latents of the float
trajectory, speed against fp32 onnxruntime in the same minute, threads pinned. A bundle with a correction is drawn and
judged with it, at the eta for which its paper claims something (`claim_eta`), and so is its baseline.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mezzotint.api import compile_model
from mezzotint.bench import peers
from mezzotint.bench.pairs import Comparison, folder_bytes, middle_timestep, paired_run, unseen_seed
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.progress import shown
from mezzotint.runtime.bundle.bundle import MODEL, Bundle, open_bundle
from mezzotint.runtime.compare import PEAK, json_db, psnr_db
from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.latency import call_ratio
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import Network, predictor
from mezzotint.runtime.session import running_version
from mezzotint.runtime.signature import Images, Timestep
from tools.leaderboard_model import FloatModel, corrected
from tools.leaderboard_options import BoardOptions
from tools.leaderboard_page import Row
from tools.leaderboard_recipes import at_width, chosen_options, cut
from tools.leaderboard_record import read_record

SAME = ("images", "calibration", "steps", "threads", "batch")  # options that two rows of a page have in common
Piece = tuple[str, str, float] | str  # (recipe, width, eta), or a peer
Wanted = tuple[Path, Piece, bool]  # the row's file, what is measured, whether it is there


class Board:
    """The working folder: rows, the float model, and what measuring them needs."""

    def __init__(self, args: BoardOptions) -> None:
        self.args, self.folder = args, args.folder
        self.rows = self.folder / "rows"
        self.rows.mkdir(parents=True, exist_ok=True)
        for row in read_record(args.page):
            if not (file := self.rows / f"{self.stem(*row.place)}.json").exists():
                row.save(file)
        self.model = FloatModel.of(args, self.folder)

    def prepare(self) -> None:
        """Write what rows are measured with. Raises InputError, also for a batch that the graph does not take."""
        self.model.export()
        self.model.check_batch(self.args.batch)

    def key(self, what: Any, eta: float) -> str:
        """Return what makes two measurements of a row the same."""
        plan = replace(self.model.deployment, eta=eta).to_json()
        numbers = {name: getattr(self.args, name) for name in SAME}
        model = {"model": self.model.digest, "schedule": self.model.schedule.digest(), "deployment": plan}
        model |= self.model.given
        numbers |= {"seed": self.args.seed} if self.args.seed else {}
        facts = {"recipe": what, **model, **numbers, "onnxruntime": running_version()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def recipe_key(self, name: str, width: str, eta: float, iterations: int | None = None) -> str:
        recipe = cut(RECIPES[name], iterations)
        return self.key([width, recipe.claim, chosen_options(recipe)], eta)

    def is_done(self, row: Row | None, place: tuple[str, str, float]) -> bool:
        """Return whether the row is of today's recipe, trained for the iterations asked for or for more."""
        if row is None or row.key != self.recipe_key(*place, row.iterations):
            return False
        return row.iterations is None or row.iterations >= (self.args.iterations or np.inf)

    def eta_of(self, name: str) -> float:
        """Return the eta that a recipe is measured at: that of its claim, where the board's sampler has one."""
        claimed = RECIPES[name].claim_eta
        return claimed if claimed and self.model.deployment.sampler == "ddim" else float(self.args.eta)

    def measure(self, name: str, width: str, eta: float) -> Row:
        plan, args = self.model.deployment, self.args
        shortened = cut(RECIPES[name], args.iterations)
        iterations = None if shortened is RECIPES[name] else args.iterations
        empty = Row(name, width, self.recipe_key(name, width, eta, iterations), eta, iterations=iterations)
        start = time.perf_counter()
        try:
            recipe = at_width(shortened, width)
            with shown() as report:
                bundle = compile_model(
                    self.model.compiled,
                    self.bundle(name, width, eta),
                    recipe=recipe,
                    scheduler=self.model.schedule,
                    size=self.model.size,
                    sampler=plan.sampler,
                    steps=plan.steps,
                    eta=eta,
                    guidance=plan.guidance,
                    conditions=self.model.conditions,
                    unconditional=self.model.unconditional,
                    calibration_samples=args.calibration,
                    seed=args.seed,
                    threads=args.threads,
                    cache=self.folder / "cache",
                    progress=report,
                    force=True,
                )
                nets: list[Network] = list(bundle.denoisers(threads=args.threads))
                if bundle.correction is not None:
                    if plan.guided:
                        raise InputError("the correction is of the guided prediction, and this board has none of that")
                    nets = corrected(nets, bundle.correction)
                rows, without = self.model.rows(0, self.images)
                drawn = bundle.sample(
                    self.images,
                    seed=unseen_seed(bundle),
                    batch=args.batch,
                    conditions=rows,
                    unconditional=without,
                    threads=args.threads,
                )
                kernels = bundle.manifest.kernels
                return replace(
                    self.quality(empty, bundle, nets, drawn, report),
                    corrected=bundle.correction is not None,
                    size=folder_bytes(bundle.path / MODEL) / folder_bytes(self.model.exported),
                    seconds=sum(float(record.seconds) for record in bundle.manifest.history),
                    kernels=f"{kernels.integer}/{kernels.floating}",
                    islands=len(bundle.manifest.islands),
                )
        except MezzotintError as error:
            print(f"{name} {width}: refused after {time.perf_counter() - start:.0f} s: {error}", flush=True)
            return replace(empty, refused=error.what)

    def stem(self, name: str, width: str, eta: float) -> str:
        seed = f"-seed{self.args.seed}" if self.args.seed else ""
        return f"{name}-{width}" + ("" if eta == self.args.eta else f"-eta{eta:g}") + seed

    def bundle(self, name: str, width: str, eta: float) -> Path:
        return self.folder / "bundles" / self.stem(name, width, eta)

    def add_speeds(self) -> None:
        """Measure the speeds of all rows that have none, one after the other: nothing else runs in between."""
        waiting = [job for job in self.listed() if job[1].speed is None and self.bundle(*job[1].place).exists()]
        if waiting:
            self.prepare()
        for file, row in waiting:
            bundle = open_bundle(self.bundle(*row.place))
            replace(row, speed=self.speed(bundle, bundle.denoiser(self.args.threads))).save(file)
            print(f"speed of {file.stem}", flush=True)

    def measure_peer(self, peer: str) -> Row:
        """Measure a peer at 8 bits. Peers raise errors of any class for models that they do not support."""
        row = Row(peer, "w8a8", self.key(peer, self.args.eta), self.args.eta)
        try:
            return self._of_peer(row)
        except Exception as error:
            why = next(iter(str(error).splitlines()), "").rstrip(".")
            print(f"{peer}: refused: {error}", flush=True)
            return replace(row, refused=f"{type(error).__name__}: {why}")

    def _of_peer(self, row: Row) -> Row:
        """Calibrate the peer on one batch of the float trajectory, and measure it."""
        threads, batch, exported = self.args.threads, self.args.batch, self.model.exported
        with TemporaryDirectory(dir=self.folder) as folder, shown() as report:
            bundle = self.model.reference
            calls: list[peers.Call] = []

            def record(x: Images, t: Timestep, **conditions: Any) -> Images:
                calls.append((x, t, conditions))
                return self.model.exact(x, t, **conditions)

            x = samplers.initial_noise(0, (batch, *bundle.sample_shape))
            predict = predictor(record, bundle.deployment, *self.model.rows(0, batch))
            samplers.sample(predict, x, bundle.schedule, bundle.deployment, noise=samplers.seeded_noise(0))
            start = time.perf_counter()
            net, file = peers.prepare_peer(row.recipe, exported, bundle.signature, calls, Path(folder), threads)
            seconds = time.perf_counter() - start
            seed = unseen_seed(bundle)
            mine = []
            for first in range(0, self.images, batch):
                x = samplers.initial_noise(seed, (batch, *bundle.sample_shape), first=first)
                noise = samplers.seeded_noise(seed, first=first)
                predict = predictor(net, bundle.deployment, *self.model.rows(first, batch))
                mine.append(samplers.sample(predict, x, bundle.schedule, bundle.deployment, noise=noise))
            return replace(
                self.quality(row, bundle, [net] * len(bundle.deployment.calls), np.concatenate(mine), report),
                speed=self.speed(bundle, net),
                size=file.stat().st_size / folder_bytes(exported),
                seconds=seconds,
            )

    def quality(self, row: Row, bundle: Bundle, nets: Sequence[Network], drawn: Images, report: Progress) -> Row:
        """Return the row with the figures of the images that were drawn, and of the prediction."""
        seed, batch = unseen_seed(bundle), self.args.batch
        rows, without = self.model.rows(0, len(drawn))
        images, sqnr = paired_run(
            self.model.exact,
            nets,
            bundle,
            len(drawn),
            seed=seed,
            batch=batch,
            conditions=rows,
            unconditional=without,
            progress=report,
        )
        psnr = psnr_db(np.clip(images, -1, 1), np.clip(drawn, -1, 1), peak=PEAK)
        data = Comparison(images, drawn, sqnr, psnr).to_json()
        return replace(
            row,
            sqnr=data["eps_sqnr_db"],
            worst=data["eps_sqnr_db_worst_step"],
            psnr=data["psnr_db_median"],
            psnr_p10=data["psnr_db_p10"],
            images=tuple(json_db(float(db)) for db in psnr),
        )

    def speed(self, bundle: Bundle, net: Network) -> float:
        x = samplers.initial_noise(0, (self.args.batch, *bundle.sample_shape))
        rows = self.model.rows(0, self.args.batch)[0]
        exact, mine = (lambda x, t, of=of: of(x, t, **rows) for of in (self.model.denoiser(), net))
        return call_ratio(exact, mine, x, middle_timestep(bundle), repeats=9)[2]

    @property
    def images(self) -> int:
        """Whole batches: a peer may have its batch written in."""
        batch = int(self.args.batch)
        return -(-int(self.args.images) // batch) * batch

    def places(self) -> list[tuple[str, str, float]]:
        """Return (recipe, width, eta) of the rows that were asked for, with the baselines at the eta of a claim."""
        found = []
        for name, width in self.args.rows:
            eta = self.eta_of(name)
            found.append((name, width, eta))
            if (self.args.baselines or eta != self.args.eta) and RECIPES[name].baseline:
                found.append((RECIPES[name].baseline, width, eta))
        return list(dict.fromkeys(found))

    def row(self, piece: Piece) -> Row:
        return self.measure_peer(piece) if isinstance(piece, str) else self.measure(*piece)

    def wanted(self) -> Iterator[Wanted]:
        """Yield the rows that were asked for."""
        for place in self.places():
            file = self.rows / f"{self.stem(*place)}.json"
            done = self.is_done(Row.load(file), place)
            yield file, place, done
        for peer in peers.available() if self.args.peers else []:
            file, row = self.rows / f"{peer}-w8a8.json", Row.load(self.rows / f"{peer}-w8a8.json")
            done = row is not None and row.key == self.key(peer, self.args.eta)
            yield file, peer, done

    def done(self) -> Iterator[Row]:
        """Yield the rows that were asked for and are there, peers apart."""
        for file, piece, done in self.wanted():
            if done and not isinstance(piece, str) and (row := Row.load(file)) is not None:
                yield row

    def listed(self) -> Iterator[tuple[Path, Row]]:
        """Yield the rows that were measured with today's recipes and with these options, and their files."""
        for file in sorted(self.rows.glob("*.json")):
            row = Row.load(file)
            if row is None or (row.recipe not in RECIPES and row.recipe not in peers.PEERS):
                continue
            peer = row.recipe not in RECIPES
            if row.key == (self.key(row.recipe, row.eta) if peer else self.recipe_key(*row.place, row.iterations)):
                yield file, row
