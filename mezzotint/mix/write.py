"""The folder of a mixed bundle: its files, its correction, its manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.bundle.card import CARD, NOISE_PLOT, card_text
from mezzotint.compiler.bundle.staging import write_text
from mezzotint.compiler.errors import CompileError
from mezzotint.compiler.mixing.mixture import write_sharing
from mezzotint.compiler.mixing.noise import NoiseTables, mixed_correction, mixed_report
from mezzotint.runtime import __version__, streams
from mezzotint.runtime.bundle.acceptance import Acceptance
from mezzotint.runtime.bundle.bundle import CORRECTION, MODEL, SCHEDULER, Bundle, seal_bundle
from mezzotint.runtime.bundle.layout import CONFIG, located
from mezzotint.runtime.bundle.manifest_entries import RecipeEntry, input_entries
from mezzotint.runtime.bundle.precisions import Mixture, PrecisionEntry
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Timestep
from mezzotint.runtime.streams import FIXED

from ..bench.pairs import folder_bytes


def write_mix(
    bundles: Mapping[str, Bundle],
    folder: Path,
    calls: Sequence[str],
    costs: Mapping[str, float],
    facts: Mapping[str, Any],
    acceptance: Acceptance,
    *,
    threads: int | None = None,
) -> None:
    """Write the bundle that runs precision `calls[i]` at call i. The first of `bundles` becomes the default network.

    Layers, quantizers and storage in the manifest are those of the default network, as it was compiled. `facts` is how
    the choice was made, and `acceptance` what was measured for it. Raises CompileError where a file does not compute
    the same as its bundle.
    """
    default = next(iter(bundles.values()))
    names = list(bundles)
    files = {name: MODEL if name == names[0] else MODEL.replace(".onnx", f".{name}.onnx") for name in names}
    sources = {Path(file).name: bundles[name].model_path for name, file in files.items()}
    shared = write_sharing(sources, (folder / MODEL).parent)
    for name, file in files.items():
        _check_same(name, bundles[name], folder / file, threads)
        _copy_passes(bundles[name].path / "passes", folder / "passes" / name)
    write_text(folder / SCHEDULER, json.dumps(dict(default.schedule.config), indent=2) + "\n")
    if (config := located(CONFIG, default.manifest.files)) in default.manifest.files:
        shutil.copyfile(default.path / config, folder / CONFIG)
    steps = default.deployment.solver(default.schedule).steps
    noise = {name: _noise_of(bundle) for name, bundle in bundles.items()}
    correction, correction_facts = mixed_correction(noise, calls, default.deployment, steps)
    report = None if correction is None else mixed_report(noise, calls, steps)
    if correction is not None:
        correction.save(folder / CORRECTION)
    if report:
        from mezzotint.compiler.correction.noise_plot import plot_noise  # matplotlib takes a second to load

        plot_noise(report, folder / NOISE_PLOT)
    mixture = Mixture(
        precisions={
            name: PrecisionEntry(
                file=files[name],
                recipe=bundle.manifest.recipe,
                compiled=bundle.manifest.digest,
                calls=calls.count(name),
                cost=costs[name] / max(costs.values()),
                bytes=folder_bytes(folder / files[name]),
                bytes_alone=folder_bytes(bundle.model_path),
                integer_kernels=bundle.manifest.kernels.integer,
                float_kernels=bundle.manifest.kernels.floating,
                islands=bundle.manifest.islands,
            )
            for name, bundle in bundles.items()
        },
        calls=tuple(calls),
        shared_bytes=shared,
        choice={**facts, "correction": correction_facts},
    )
    description = "mixed: " + ", ".join(f"{name} at {calls.count(name)} calls" for name in names)
    seed = max(map(calibration_seed, bundles.values()))
    manifest = replace(
        default.manifest,
        mezzotint=__version__,
        inputs=input_entries(default.denoiser(threads).inputs),
        recipe=RecipeEntry({"name": " + ".join(names), "description": description}),
        calibration=replace(default.manifest.calibration, seed=seed),
        deployed_timesteps=_deployed(bundles),
        acceptance=acceptance,
        mixture=mixture,
        noise=report or {},
        measured={},
        digests_before=(),
    )
    write_text(folder / CARD, card_text(manifest, folder))
    seal_bundle(folder, manifest)


def calibration_seed(bundle: Bundle) -> int:
    """Return the seed of a compilation; its passes draw from the few seeds after it."""
    return bundle.manifest.calibration.seed


def _check_same(name: str, bundle: Bundle, file: Path, threads: int | None) -> None:
    """Raise CompileError unless the network of `file` computes bit for bit the same as that of its bundle."""
    before, after = bundle.denoiser(threads), Denoiser(file, bundle.signature, threads=threads)
    rows = before.fixed_batch or 1
    rng = streams.MIX_CHECK.generator(FIXED)
    conditions = {}
    for condition in bundle.signature.conditions:
        dtype, shape = before.inputs[condition]
        sizes = [rows if axis == 0 else size if isinstance(size, int) else 2 for axis, size in enumerate(shape)]
        conditions[condition] = (rng.standard_normal(sizes) if dtype.kind == "f" else np.zeros(sizes)).astype(dtype)
    x = initial_noise(FIXED, (rows, *bundle.sample_shape))
    for t in bundle.deployment.calls[:: max(1, len(bundle.deployment.calls) - 1)]:
        if not np.array_equal(before(x, t, **conditions), after(x, t, **conditions), equal_nan=True):
            raise CompileError(
                f"the network {name} computes other values after it was moved",
                where=str(file),
                hint="this is a bug of onnxruntime or of Mezzotint: please report it with both bundles",
            )


def _copy_passes(source: Path, target: Path) -> None:
    """Copy the text of all passes, without the models after each pass, which are kept on request."""
    for file in sorted(source.glob("*")) if source.is_dir() else ():
        if file.suffix in (".txt", ".diff"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.name)


def _noise_of(bundle: Bundle) -> NoiseTables:
    return NoiseTables(bundle.correction, bundle.manifest.noise or None, bool(bundle.manifest.quantizers))


def _deployed(bundles: Mapping[str, Bundle]) -> tuple[Timestep, ...] | None:
    """Return the timesteps that every network with tables has a row for."""
    tables = [bundle.deployed_timesteps for bundle in bundles.values() if bundle.deployed_timesteps is not None]
    return tuple(t for t in tables[0] if all(t in others for others in tables)) if tables else None
