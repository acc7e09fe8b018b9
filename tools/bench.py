"""Measures the claims of docs/measurements.md: speed against fp32 onnxruntime in the same run, size, memory, overhead.

    python -m tools.bench digits              embedded model, batch 16, images and sampling loop too
    python -m tools.bench cifar10             the ddpm-cifar10-32 configuration, random weights, batch 4
    python -m tools.bench sd15                the Stable Diffusion 1.5 UNet configuration, random weights
    python -m tools.bench sd15-speed          the same, 64x64 latents: speed and memory of a call, ours and peers'
    python -m tools.bench sd15-gptq           the same, with 4-bit weights rounded by GPTQ
    python -m tools.bench sd15-pruned         the same, 2 of every 4 inputs removed before GPTQ
    python -m tools.bench sd15-svdquant       the same, with branches of low rank beside weights of 4 bits
    python -m tools.bench sd15-training       the same, two of its blocks trained for 20 iterations
    python -m tools.bench digits --peer       onnxruntime's own quantizer too
    python -m tools.bench gpu                 on a GPU: parity with the CPU, nodes by provider, speed, memory

Threads are pinned (--threads, 2 by default). Every bar is printed with what was measured; the exit code is 1 when one
was missed, 2 when it cannot be measured here (`gpu` without a usable GPU provider).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from mezzotint.api import compile_model
from mezzotint.bench import peers
from mezzotint.bench.pairs import compare, folder_bytes, latency_ratio
from mezzotint.progress import shown
from mezzotint.runtime.bundle.bundle import MODEL, Bundle
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.latency import call_ratio
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Timestep
from tools import bench_gpu, bench_sd15
from tools.bench_bars import Bars
from tools.bench_models import CIFAR10, random_model

TRAINED_BLOCKS = ("down_blocks.2/resnets.1", "down_blocks.2/attentions.1/transformer_blocks.0")


def digits(args: argparse.Namespace, folder: Path, bars: Bars) -> None:
    """The embedded model: speed, size, pictures, and what the sampling loop costs beside the network."""
    exported = folder / "float.onnx"
    with shown() as report:
        bundle = compile_model("digits", folder / "bundle", threads=args.threads, export=exported, progress=report)
        found = compare(bundle, exported, args.images, threads=args.threads, progress=report)
    print(json.dumps(found.to_json()))
    _speed_and_size(bundle, exported, 16, args.threads, bars, speed=2.0, size=0.3)
    static = {"step_scales.gain": 1000.0, "channel_scales.gain": 1000.0}  # no table gains as much
    with shown() as report:
        plain = compile_model("digits", folder / "static", settings=static, threads=args.threads, progress=report)
    cost = 1 / latency_ratio(bundle, plain.path / MODEL, 16, threads=args.threads, repeats=25)[2]
    bars.add("time of a call with tables, of one without", cost, "<= 1.02", cost <= 1.02)
    share = loop_share(bundle, 16, args.threads)
    bars.add("sampling loop outside the network, batch 16", share, "<= 0.03", share <= 0.03)
    if args.peer:
        _peer(bundle, exported, 16, args.threads, folder)


def cifar10(args: argparse.Namespace, folder: Path, bars: Bars) -> None:
    """The ddpm-cifar10-32 configuration with random weights."""
    model = random_model("UNet2DModel", CIFAR10)
    exported = folder / "float.onnx"
    with shown() as report:
        bundle = compile_model(
            model(),
            folder / "bundle",
            scheduler="ddpm-linear",
            steps=5,
            calibration_samples=4,
            calibration_batch=4,
            threads=args.threads,
            export=exported,
            progress=report,
        )
    _speed_and_size(bundle, exported, 4, args.threads, bars, speed=2.9, size=0.3)
    if args.peer:
        _peer(bundle, exported, 4, args.threads, folder)


def loop_share(bundle: Bundle, batch: int, threads: int | None) -> float:
    """Share of a sampling run's time that is spent outside the network call."""
    net = bundle.denoiser(threads)
    inside = 0.0

    def timed(x: Images, t: Timestep) -> Images:
        nonlocal inside
        start = time.perf_counter()
        output = net(x, t)
        inside += time.perf_counter() - start
        return output

    x = samplers.initial_noise(0, (batch, *bundle.sample_shape))
    net(x, bundle.deployment.timesteps[0])
    start = time.perf_counter()
    samplers.sample(timed, x, bundle.schedule, bundle.deployment, noise=samplers.seeded_noise(0))
    total = time.perf_counter() - start
    return (total - inside) / total


def _speed_and_size(
    bundle: Bundle, exported: Path, batch: int, threads: int | None, bars: Bars, *, speed: float, size: float
) -> None:
    before, after, ratio = latency_ratio(bundle, exported, batch, threads=threads, repeats=15)
    print(json.dumps({"float_call_ms": round(before * 1e3, 1), "integer_call_ms": round(after * 1e3, 1)}))
    bars.add(f"speed-up of one call, batch {batch}, {threads} threads", ratio, f">= {speed}", ratio >= speed)
    share = folder_bytes(bundle.path / MODEL) / folder_bytes(exported)
    bars.add("size of the fp32 file", share, f"<= {size}", share <= size)
    print(json.dumps({"integer": bundle.manifest.kernels.integer, "float": bundle.manifest.kernels.floating}))


def _peer(bundle: Bundle, exported: Path, batch: int, threads: int | None, folder: Path) -> None:
    """onnxruntime's quantize_static on the same float file, calibrated on as many calls along the trajectory."""
    calls: list[peers.Call] = []
    net = Denoiser(exported, bundle.signature, threads=threads)

    def record(x: Images, t: Timestep) -> Images:
        calls.append((x, t, {}))
        return net(x, t)

    x = samplers.initial_noise(0, (batch, *bundle.sample_shape))
    samplers.sample(record, x, bundle.schedule, bundle.deployment)
    peer, _ = peers.prepare_peer(peers.ONNXRUNTIME, exported, bundle.signature, calls, folder, threads)
    _, _, ratio = call_ratio(net, peer, x, bundle.deployment.timesteps[-1], repeats=15)
    print(json.dumps({"peer": "onnxruntime quantize_static, Conv+Gemm+MatMul", "speedup": round(ratio, 3)}))


def gpu(args: argparse.Namespace, folder: Path, bars: Bars) -> None:
    """Parity, nodes, speed and memory on real hardware (tools/bench_gpu.py)."""
    providers = bench_gpu.usable(args.providers)
    for name in args.models:
        bundle, exported, batch = bench_gpu.compiled(name, folder / name, args.threads)
        rows = bench_gpu.random_conditions(bundle, batch)
        for provider in providers:
            result = bench_gpu.measure(bundle, exported, provider, batch, threads=args.threads, conditions=rows)
            bench_gpu.report({"model": name, **result}, bars.add)


MODELS = {
    "digits": digits,
    "cifar10": cifar10,
    "sd15": bench_sd15.steps,
    "sd15-speed": bench_sd15.speed,
    "sd15-gptq": bench_sd15.gptq,
    "sd15-pruned": bench_sd15.pruned,
    "sd15-svdquant": bench_sd15.svdquant,
    "sd15-training": bench_sd15.training,
    "gpu": gpu,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=64, help="pictures to compare (digits)")
    parser.add_argument("--peer", action="store_true", help="also onnxruntime's own quantizer")
    parser.add_argument("--keep", type=Path, help="keep the files in this folder")
    parser.add_argument("--providers", nargs="+", default=bench_gpu.GPU_PROVIDERS, help="of `gpu`")
    parser.add_argument("--models", nargs="+", choices=bench_gpu.MODELS_OF_GPU, default=bench_gpu.MODELS_OF_GPU)
    args = parser.parse_args()
    bars = Bars()
    run = MODELS[args.what]
    try:
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            run(args, args.keep, bars)
        else:
            with TemporaryDirectory() as folder:
                run(args, Path(folder), bars)
    except MezzotintError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if bars.reached else 1


if __name__ == "__main__":
    sys.exit(main())
