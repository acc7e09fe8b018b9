"""The Stable Diffusion 1.5 UNet configuration with random weights: time, memory and size of compiling it."""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mezzotint.api import compile_model
from mezzotint.bench.pairs import folder_bytes
from mezzotint.compiler.core.memory import PeakMemory
from mezzotint.progress import shown
from mezzotint.runtime.bundle.bundle import MODEL, Bundle
from mezzotint.runtime.sampling import samplers
from tools import bench_calls
from tools.bench_bars import Bars
from tools.bench_models import SD15, random_model

TRAINED_BLOCKS = ("down_blocks.2/resnets.1", "down_blocks.2/attentions.1/transformer_blocks.0")


def steps(args: argparse.Namespace, folder: Path, bars: Bars) -> None:
    """The Stable Diffusion 1.5 UNet configuration: 859 M random parameters, 32x32 latents, two random prompts."""
    bundle = _sd15(args, folder, bars, gigabytes=12, minutes=20, steps=2, calibration_samples=2)
    _size_of_parameters(bundle, bars, 0.27)
    share = table_bytes(bundle) / folder_bytes(bundle.path / MODEL)
    bars.add("timestep tables, of the file", share, "<= 0.01", share <= 0.01)


def speed(args: argparse.Namespace, folder: Path, bars: Bars) -> None:
    """The same with 64x64 latents: a call of two samples on each engine, one process after the other.

    What was compiled into the folder of --keep before is measured as it is.
    """
    exported = folder / "float.onnx"
    options: dict[str, Any] = {"steps": 1, "calibration_samples": 1, "latents": 64}
    bundles = [folder / "onnxruntime", folder / "openvino"]
    for path, recipe, target in zip(bundles, ("w8a8-steps", "w8a8"), ("onnxruntime", "openvino"), strict=True):
        if path.exists():
            continue
        export: dict[str, Any] = {} if exported.exists() else {"export": exported}
        bundle = _sd15(
            args,
            folder,
            bars,
            gigabytes=18,
            minutes=40,
            name=path.name,
            recipe=recipe,
            target=target,
            **options,
            **export,
        )
        del bundle
        gc.collect()
    jobs = bench_calls.jobs_of(exported, bundles, folder, with_peers=True)
    found = bench_calls.measure_calls(jobs, folder, batch=2, threads=args.threads, calls=3)
    print(bench_calls.calls_table(found))
    floating, integer = found[bench_calls.FLOAT], found[bench_calls.own_name(bundles[0], "onnxruntime")]
    ratio = float(np.median(floating.seconds) / np.median(integer.seconds))
    bars.add(f"speed-up of one call, batch 2, {args.threads} threads", ratio, ">= 2.4", ratio >= 2.4)
    share = integer.memory_mb / floating.memory_mb
    bars.add("memory of the call, of that of fp32", share, "<= 0.5", share <= 0.5)


def gptq(args: argparse.Namespace, folder: Path, bars: Bars) -> None:
    """The same with 4-bit weights rounded by GPTQ, four samples at four calls: layers of up to 23,040 inputs."""
    options: dict[str, Any] = {"recipe": "gptq", "settings": {"choose_scales.weight_bits": 4}, "steps": 4}
    bundle = _sd15(args, folder, bars, gigabytes=14, minutes=45, calibration_samples=4, **options)
    _size_of_parameters(bundle, bars, 0.15)
    _print_notes(bundle, "round_weights")


def pruned(args: argparse.Namespace, folder: Path, bars: Bars) -> None:
    """The same with 2 of every 4 inputs of a weight removed by OBS, in blocks, and the others in 4 bits by GPTQ."""
    settings = {"round_weights.method": "gptq", "prune_weights.exact_inputs": 64}
    settings |= {"prune_weights.block": 16, "prune_weights.polish": 2}
    options: dict[str, Any] = {"recipe": "obc-compound", "settings": settings, "steps": 4}
    bundle = _sd15(args, folder, bars, gigabytes=16, minutes=60, calibration_samples=4, **options)
    _size_of_parameters(bundle, bars, 0.12)
    _print_notes(bundle, "prune_weights", "round_weights")


def svdquant(args: argparse.Namespace, folder: Path, bars: Bars) -> None:
    """The same with branches of low rank, found in 5 turns, and GPTQ of what is left; weights are normal."""
    options: dict[str, Any] = {"recipe": "svdquant", "settings": {"split_ranks.iterations": 5}, "steps": 4}
    bundle = _sd15(args, folder, bars, gigabytes=16, minutes=60, normal=True, calibration_samples=4, **options)
    _size_of_parameters(bundle, bars, 0.17)
    _print_notes(bundle, "split_ranks", "round_weights")


def training(args: argparse.Namespace, folder: Path, bars: Bars) -> None:
    """The same with 4-bit weights; the rounding of a residual block and of a transformer block is trained."""
    trained = {"unit": "block", "iterations": 20, "samples": 2, "batch": 2, "calls": 2, "units": TRAINED_BLOCKS}
    settings = {"choose_scales.weight_bits": 4, **{f"reconstruct.{key}": value for key, value in trained.items()}}
    options: dict[str, Any] = {"settings": settings, "steps": 2, "calibration_samples": 2}
    bundle = _sd15(args, folder, bars, gigabytes=14, minutes=30, recipe="adaround", **options)
    fits = bundle.manifest.training
    bars.add("trained blocks", len(fits), "2", len(fits) == 2)
    for fit in fits:
        bars.add(f"error of {fit.unit}, of that of nearest rounding", fit.hard / fit.start, "< 1", fit.hard < fit.start)
    _print_notes(bundle, "reconstruct")


def _sd15(
    args: argparse.Namespace,
    folder: Path,
    bars: Bars,
    *,
    gigabytes: float,
    minutes: float,
    latents: int = 32,
    name: str = "bundle",
    normal: bool = False,
    **options: Any,
) -> Bundle:
    source = folder / "source"
    if not source.exists():
        print("writing the model with random weights", flush=True)
        random_model("UNet2DConditionModel", SD15, normal=normal)().save_pretrained(source)
    gc.collect()  # modules hold themselves in cycles; what is left of this one is not the compiler's memory
    start = time.perf_counter()
    with PeakMemory() as memory, shown() as report:
        bundle = compile_model(
            source,
            folder / name,
            scheduler="sd",
            size=(latents, latents),
            calibration_batch=2,
            conditions="random",
            threads=args.threads,
            progress=report,
            **options,
        )
    took = (time.perf_counter() - start) / 60
    bars.add("compile peak memory, GB", memory.peak_mb / 1e3, f"<= {gigabytes}", memory.peak_mb <= gigabytes * 1e3)
    bars.add("compile wall time, minutes", took, f"<= {minutes}", took <= minutes)
    x = samplers.initial_noise(0, (1, *bundle.sample_shape))
    rng = np.random.default_rng(0)
    prompt = rng.standard_normal((1, 77, 768)).astype(np.float32)
    output = bundle.denoiser(args.threads)(x, bundle.deployment.timesteps[0], encoder_hidden_states=prompt)
    finite = bool(np.isfinite(output).all())
    bars.add("one call returns finite values", float(finite), "1", finite)
    print(json.dumps({"integer": bundle.manifest.kernels.integer, "float": bundle.manifest.kernels.floating}))
    return bundle


def _print_notes(bundle: Bundle, *passes: str) -> None:
    for record in bundle.manifest.history:
        if record.name in passes:
            print(f"{record.name}: {record.note}")


def _size_of_parameters(bundle: Bundle, bars: Bars, limit: float) -> None:
    size = folder_bytes(bundle.path / MODEL) / bundle.manifest.source.parameter_bytes
    bars.add("size of fp32 parameters", size, f"<= {limit}", size <= limit)


def table_bytes(bundle: Bundle) -> int:
    """Bytes of all constants of which a call reads one row: what the rows of scales, zero points and biases take."""
    graph = ir.load(bundle.path / MODEL).graph
    read = (node.inputs[0] for node in graph if node.op_type == "Gather")
    return sum(v.const_value.nbytes for v in read if v is not None and v.const_value is not None)
