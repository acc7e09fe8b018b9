"""Measures the README's table: Mezzotint, onnxruntime's quantizer and OpenVINO on one float model, in one run.

    python tools/peers_table.py                                      the embedded digits, 50 steps, 64 images
    python tools/peers_table.py NET.onnx --scheduler FILE.json --size 28 28 --steps 30 --batch 32

Prints Markdown: for each network the speed of one call (fp32 onnxruntime of the same run is 1), PSNR of images from the
same noise, SQNR of epsilon on the same latents, and the size of the file. Peers are those of mezzotint/bench/peers.py
that are installed (`pip install openvino nncf`); a peer that fails has its error in its row.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mezzotint import compile_model
from mezzotint.bench import peers
from mezzotint.bench.pairs import folder_bytes, middle_timestep, parallel_run, unseen_seed
from mezzotint.doctor import examine
from mezzotint.progress import shown
from mezzotint.runtime.bundle.bundle import MODEL, Bundle
from mezzotint.runtime.compare import PEAK, psnr_db
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.latency import in_turns, ratio
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import Network
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Timestep

FLOAT = "fp32 onnxruntime"
LABELS = {
    peers.ONNXRUNTIME: "onnxruntime `quantize_static`",
    peers.OPENVINO_F32: "OpenVINO, f32",
    peers.OPENVINO_BF16: "OpenVINO, bf16",
    peers.NNCF: "OpenVINO + NNCF int8",
    peers.NNCF_SMOOTH: "OpenVINO + NNCF int8, SmoothQuant",
}
PACKAGES = ("onnxruntime", "openvino", "nncf")


class Table:
    """The networks of one float model, and the folder of their files."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.exported = folder / "float.onnx"
        self.networks: dict[str, Network] = {}
        self.bytes: dict[str, int] = {}
        self.errors: dict[str, str] = {}

    def prepare(self) -> Bundle:
        """Compile the bundles and prepare the peers. Returns the first bundle, whose deployment all share."""
        args = self.args
        bundles: list[Bundle] = []
        for recipe in args.recipe:
            with shown() as report:
                bundle = compile_model(
                    args.model,
                    self.folder / recipe,
                    recipe=recipe,
                    scheduler=args.scheduler,
                    size=tuple(args.size) if args.size else None,
                    steps=args.steps,
                    calibration_batch=args.calibration_batch,
                    threads=args.threads,
                    cache=self.folder / "cache",
                    export=None if bundles else self.exported,
                    progress=report,
                )
            bundles.append(bundle)
            self._add(f"Mezzotint `{recipe}`", bundle.denoiser(args.threads), folder_bytes(bundle.path / MODEL))
        exact = Denoiser(self.exported, bundles[0].signature, threads=args.threads)
        self.networks = {FLOAT: exact, **self.networks}
        self.bytes[FLOAT] = folder_bytes(self.exported)
        calls = self._calls(exact, bundles[0])
        for peer in peers.PEERS:
            self._prepare_peer(peer, bundles[0], calls)
        return bundles[0]

    def _prepare_peer(self, peer: str, bundle: Bundle, calls: Sequence[peers.Call]) -> None:
        folder = self.folder / peer
        folder.mkdir()
        signature, threads = bundle.signature, self.args.threads
        try:
            network, file = peers.prepare_peer(peer, self.exported, signature, calls, folder, threads)
        except MezzotintError as error:
            self.errors[LABELS[peer]] = error.what
        else:
            parts = [file] if file.suffix == ".onnx" else file.parent.glob(f"{file.stem}.*")
            self._add(LABELS[peer], network, sum(part.stat().st_size for part in parts))

    def _add(self, name: str, network: Network, count: int) -> None:
        self.networks[name], self.bytes[name] = network, count

    def _calls(self, exact: Network, bundle: Bundle) -> list[peers.Call]:
        """One batch of the float trajectory, from the noise that the bundle was calibrated on."""
        calls: list[peers.Call] = []

        def record(x: Images, t: Timestep) -> Images:
            calls.append((x, t, {}))
            return exact(x, t)

        self._draw(record, bundle, seed=0, n=self.args.batch)
        return calls

    def _draw(self, network: Network, bundle: Bundle, seed: int, n: int) -> Images:
        """`[n, C, H, W]` by the bundle's deployment, without a noise correction."""
        images = []
        for first in range(0, n, self.args.batch):
            x = samplers.initial_noise(seed, (self.args.batch, *bundle.sample_shape), first=first)
            noise = samplers.seeded_noise(seed, first=first)
            images.append(samplers.sample(network, x, bundle.schedule, bundle.deployment, noise=noise))
        return np.concatenate(images)

    def rows(self, bundle: Bundle) -> list[str]:
        """Measure everything; rows of Markdown in the order of the networks."""
        args, seed = self.args, unseen_seed(bundle)
        exact = self.networks[FLOAT]
        others = {name: network for name, network in self.networks.items() if name != FLOAT}
        with shown() as report:
            images, sqnr = parallel_run(
                exact, others, bundle, args.images, seed=seed, batch=args.batch, progress=report
            )
        x = samplers.initial_noise(0, (args.batch, *bundle.sample_shape))
        times = in_turns(
            list(self.networks.values()), x, middle_timestep(bundle), repeats=args.repeats, rounds=args.rounds
        )
        latency = dict(zip(self.networks, times, strict=True))
        rows = [f"| {FLOAT} | 1 | | | | | {self.bytes[FLOAT] / 1e6:.1f} MB |"]
        for name, network in others.items():
            drawn = self._draw(network, bundle, seed, args.images)
            psnr = psnr_db(np.clip(images, -1, 1), np.clip(drawn, -1, 1), peak=PEAK)
            speed = ratio(latency[FLOAT], latency[name])
            cells = [
                f"{speed.value:.2f}x ({speed.low:.2f} to {speed.high:.2f})",
                *(f"{value:.1f}" for value in (np.median(psnr), np.percentile(psnr, 10, method="lower"))),
                *(f"{value:.1f}" for value in (sqnr[name].pooled(), sqnr[name].worst()[1])),
                f"{self.bytes[name] / 1e6:.1f} MB",
            ]
            rows.append(f"| {name} | {' | '.join(cells)} |")
        return rows + [f"| {name} | {error} | - | - | - | - | - |" for name, error in self.errors.items()]


def about(args: argparse.Namespace, bundle: Bundle) -> str:
    """The conditions of the measurement in one sentence."""
    facts = examine()
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return (
        f"{args.threads} threads of {_processor()} ({', '.join(facts['cpu_features'] or [])}); {versions}; "
        f"{bundle.deployment.sampler}, {args.steps} steps, batch {args.batch}, {args.images} images; speeds in "
        f"{2 * args.rounds} blocks of {args.repeats} calls in turns, smallest and largest ratio of a block in brackets."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", help="what `mezzotint compile` takes; no conditions")
    parser.add_argument("--recipe", action="append", help="w8a8-steps by default (may be repeated)")
    parser.add_argument("--scheduler", help="as for `mezzotint compile`")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--calibration-batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    args.recipe = args.recipe or ["w8a8-steps"]
    args.images = -(-args.images // args.batch) * args.batch  # whole batches: OpenVINO's shapes are fixed
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with TemporaryDirectory(prefix="mezzotint-peers-") as folder:
        table = Table(args, Path(folder))
        bundle = table.prepare()
        rows = table.rows(bundle)
        print(f"{about(args, bundle)}\n")
        print("| | speed of one call | PSNR, median | PSNR, p10 | SQNR of epsilon | worst step | file |")
        print("|---|---|---|---|---|---|---|")
        print("\n".join(rows))
        table.networks.clear()  # before the files that they may have mapped into memory
    return 0


if __name__ == "__main__":
    sys.exit(main())
