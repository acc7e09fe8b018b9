"""The model card: a bundle's README.md, made of its manifest and of nothing else.

Its sections: the network, its origin, how it was made, quality and speed where they were measured, programs that run
it, limits, files. The front has the fields that the Hugging Face hub reads. No field is invented: without a stated
licence the field is `unknown`, and an unknown base model or task is left out. The card has no times, so the same
compilation twice writes the same card.

Measurements from after the compilation (`mezzotint card --eval --bench`) are in the manifest as `measured`, in the form
of compiler/bundle/card_figures.py; the programs are those of compiler/bundle/card_code.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mezzotint.runtime.bundle.acceptance import Acceptance
from mezzotint.runtime.bundle.layout import CONFIG, CORRECTION, MANIFEST, MODEL, SCHEDULER, located_in
from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.bundle.manifest_entries import Storage
from mezzotint.runtime.bundle.network_call import CALL
from mezzotint.runtime.bundle.precisions import Mixture
from mezzotint.runtime.bundle.ranges import RANGES
from mezzotint.runtime.compare import db_text
from mezzotint.runtime.session import TESTED_ONNXRUNTIME
from mezzotint.runtime.signature import no_image
from mezzotint.runtime.targets import ONNXRUNTIME, TARGETS, Target
from mezzotint.runtime.visible import one_line, visible

from . import card_code as code
from .card_figures import figure_sections

CARD = "README.md"
NOISE_PLOT = "noise.png"
UNKNOWN = "unknown"
WIDTH = 110  # of the recipe's lines, as `mezzotint recipes NAME` prints it
_FIELDS = ("license", "license_name", "license_link", "base_model", "pipeline_tag")  # what a manifest's `card` may have


def card_text(manifest: Manifest, folder: Path) -> str:
    """Return the text for a bundle whose other files, except the manifest, are in `folder`."""
    config, correction = (folder / located_in(folder, CONFIG)).is_file(), (folder / CORRECTION).is_file()
    network = located_in(folder, MODEL)
    parts = [
        _front(manifest, config),
        _title(manifest, network),
        _origin(manifest),
        _made(manifest),
        _good(manifest),
        figure_sections(manifest.measured),
        _run(manifest, network, config, not (folder / located_in(folder, CALL)).is_file(), correction),
        _limits(manifest, correction),
        _islands(manifest),
        _files(manifest, folder),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(manifest: Manifest, config: bool) -> str:
    """Return the YAML in front. It always has `license`, the other fields where they are known."""
    known = {key: manifest.card.get(key) for key in _FIELDS}
    fields: dict[str, Any] = {"license": known["license"] or UNKNOWN}
    fields |= {key: known[key] for key in ("license_name", "license_link") if known[key]}
    fields["library_name"] = "mezzotint"
    if known["base_model"]:
        fields |= {"base_model": known["base_model"], "base_model_relation": "quantized"}
    plain = manifest.source.class_name == "UNet2DModel" and not manifest.signature.conditions
    if task := known["pipeline_tag"] or ("unconditional-image-generation" if plain else None):
        fields["pipeline_tag"] = task
    kinds = ["quantized"] if manifest.quantizers else []
    fields["tags"] = ["mezzotint", "onnx", "onnxruntime", *(["diffusers"] if config else []), *kinds]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _title(manifest: Manifest, network: str) -> str:
    signature, kernels, recipe = manifest.signature, manifest.kernels, manifest.recipe
    names = ", ".join(_code(n) for n in (signature.sample, signature.timestep, *signature.conditions))
    size = "" if manifest.storage is None else _size(manifest.storage)
    other = "" if manifest.target == ONNXRUNTIME else "; that engine makes other choices, and was not asked"
    return f"""# {_plain(manifest.source.name)}, a Mezzotint bundle ({_plain(recipe.name)})

A diffusion model's denoiser, compiled for {_engine(manifest.target)}.
Recipe {_code(recipe.name)}: {_plain(recipe.description)}.

`{network}` is an ordinary ONNX file: inputs {names}, output {_code(signature.output)} ({signature.prediction}).
{kernels.integer} convolutions and matmuls run on onnxruntime's integer CPU kernels, {kernels.floating} in float{other}.
{size}{_precisions(manifest.mixture)}
It was made for {manifest.deployment}."""


def _engine(target: Target) -> str:
    return "onnxruntime's CPU kernels" if target == ONNXRUNTIME else f"{TARGETS[target]} (target `{target}`)"


def _size(storage: Storage) -> str:
    """Return one line about the size of the file."""
    kinds = ", ".join(f"{stored.bytes / 1e6:.2f} MB {kind}" for kind, stored in storage.types.items())
    share = "" if storage.ratio is None else f", {storage.ratio:.3f} of the float parameters"
    return f"The file has {storage.model_bytes / 1e6:.2f} MB{share}: {kinds}, the rest is the graph."


def _precisions(mixture: Mixture | None) -> str:
    """Return the files of a mixed bundle; an empty text for one precision."""
    if mixture is None:
        return ""
    rows = "".join(
        f"\n- `{entry.file}`: {_code(name)}, {entry.calls} of {len(mixture.calls)} network calls"
        for name, entry in mixture.precisions.items()
    )
    text = f"\n\nIt is one of several precisions of the network, of which Mezzotint picks one for each call:\n{rows}\n"
    if mixture.shared_bytes:
        text += "\nWhat they have in common lies in `unet/shared.data`: keep the folder together.\n"
    return text


def _origin(manifest: Manifest) -> str:
    source, fields = manifest.source, manifest.card
    facts = {
        "name": source.name,
        "read from": {"onnx": "an ONNX file", "diffusers": "a diffusers model"}.get(source.kind, source.kind),
        "class": source.class_name,
        "base model": fields.get("base_model"),
        "float parameters": f"{source.parameter_bytes} bytes",
        "SHA-256 of the weights": source.weights_sha256,
        **{f"fused LoRA {i}": lora for i, lora in enumerate(source.loras, 1)},
    }
    if fields.get("license"):
        from_source = fields.get("license_from") == "source"
        whose = "that of the float model, as its card says" if from_source else "as was given"
        legal = f"The licence, {_code(fields['license'])}, is {whose}."
    else:
        legal = "No licence was stated: that of the float model holds, because these weights are made from its weights."
    return f"## From what\n\n{_list(facts)}\n\n{legal}"


def _made(manifest: Manifest) -> str:
    """Return the recipe, as `--recipe` reads it again, and the other settings that a second compilation needs."""
    runs, mixture = manifest.calibration, manifest.mixture
    facts = {
        "deployment": str(manifest.deployment),
        "calibration": f"{runs.samples} samples in batches of {runs.batch}, seed {runs.seed}",
        "Mezzotint": manifest.mezzotint,
        **manifest.versions,
    }
    precisions = {} if mixture is None else mixture.precisions
    recipes = {name: entry.recipe for name, entry in precisions.items()} or {"": manifest.recipe}
    blocks = []
    for name, recipe in recipes.items():
        what = f"The recipe of {_code(name)}" if name else "The recipe"
        text = yaml.safe_dump(recipe.to_json(), sort_keys=False, width=WIDTH)
        blocks.append(f"{what}, with all options, for `mezzotint compile --recipe FILE`:\n\n```yaml\n{text}```")
    mixed = "\n\nThese bundles were mixed by `mezzotint mix`." if precisions else ""
    return f"## How it was made\n\n{_list(facts)}{mixed}\n\n" + "\n\n".join(blocks)


def _good(manifest: Manifest) -> str:
    """Return the measurements of the compilation. Times are left out."""
    paragraphs = [f"Warning of {visible(text)}." for text in manifest.warnings]
    paragraphs += [] if manifest.acceptance is None else [_accepted(manifest.acceptance)]
    if noise := manifest.noise:
        paragraphs.append(
            f"Quantization noise is undone while sampling ({CORRECTION}; `{NOISE_PLOT}` shows it, `--no-correction` "
            f"leaves it): {noise['summary']}. Plain onnxruntime does not do this."
        )
        kept = [row["sqnr_db"][row["kept"]] for row in noise["calls"]]
        raw = [row["sqnr_db"]["none"] for row in noise["calls"]]
        paragraphs.append(
            "Signal to quantization noise of the prediction, on noise that nothing was fitted to, from the worst "
            f"network call to the best: {_span(raw)} as the network makes it, {_span(kept)} corrected."
        )
    if manifest.bits and manifest.mixture is None:
        chosen = manifest.bits["chosen"]
        predicted, measured = (_with_unit(chosen[key]) for key in ("sqnr_db", "measured_sqnr_db"))
        paragraphs.append(
            f"Weights have {chosen['mean_bits']:.2f} bits on average; the choice was predicted to cost "
            f"{predicted} of signal to noise, and measured {measured}."
        )
    if manifest.target == "openvino":
        paragraphs.append(
            "OpenVINO in plain bfloat16 needs no quantization, and is fast too where the processor has matrix units "
            "for it (amx_bf16). `mezzotint bench BUNDLE --float FILE --provider openvino --peers` measures both, "
            "images included, and says where plain bfloat16 is the better choice."
        )
    text = "\n\n".join(paragraphs) or "Nothing but ranges was measured while compiling."
    return f"## How good\n\n{text}"


def _accepted(acceptance: Acceptance) -> str:
    """Return the accuracy of the finished file: in words, by group of timesteps, and what is low."""
    rows = "\n".join(f"| {group} | {_with_unit(group.sqnr_db)} |" for group in acceptance.groups)
    text = (
        "The finished file was run beside the float model, on noise that nothing was fitted to. Signal to quantization "
        f"noise of the prediction: {acceptance.sqnr_text()}. PSNR of images from the same noise "
        f"({acceptance.images}): {acceptance.psnr_text()}.\n\n| network calls | SQNR |\n|---|---|\n{rows}"
    )
    notes = [visible(note) for note in (acceptance.note, acceptance.warning) if note]
    return "\n\n".join([text, *(f"{note[0].upper()}{note[1:]}." for note in notes)])


def _span(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.1f} to {max(known):.1f} dB" if known else "no error"


def _with_unit(value: float | None) -> str:
    return db_text(value) + (" dB" if value is not None else "")


def _run(manifest: Manifest, network: str, config: bool, whole: bool, correction: bool) -> str:
    """Return the programs; all of them run in the bundle's folder. `whole` is whether the graph has all of a call."""
    drawn = "images.png" if no_image(manifest.sample_shape) is None else "samples.npy"
    parts = [
        "## How to run it\n\nAll of this runs in this folder. On the command line:\n\n"
        f"    mezzotint sample . -n 16 -o ../{drawn}\n    mezzotint inspect .",
        f"In plain onnxruntime, one call of the network:\n\n{_python(code.plain_onnxruntime(manifest, network))}",
        f"In Mezzotint's runtime, from noise to images:\n\n{_python(code.own_runtime(manifest))}",
    ]
    if config:
        plan = manifest.deployment
        call = f"num_inference_steps={plan.steps}" + (f", guidance_scale={plan.guidance!r}" if plan.guided else "")
        call += f", eta={plan.eta!r}" if plan.eta else ""
        if whole and manifest.signature.sample in code.TENSORS:
            parts.append(
                "With a scheduler of diffusers, in the place of the network:\n\n"
                + _python(code.with_diffusers(manifest, correction))
            )
        parts += [
            f"In a pipeline, which is then called with `{call}`:\n\n" + _python(code.in_a_pipeline()),
        ]
    return "\n\n".join(parts)


def _limits(manifest: Manifest, correction: bool) -> str:
    frozen = manifest.deployed_timesteps
    shape = manifest.require_inputs()[manifest.signature.sample].shape
    limits = [
        "Its timestep branch was kept, so every timestep works."
        if frozen is None
        else f"It holds tables for {len(frozen)} timesteps; plain onnxruntime takes the nearest row for any other, "
        f"Mezzotint's runtime refuses it. They are {', '.join(f'{t:g}' for t in sorted(frozen))}.",
        "One call has one timestep: the rows of a batch share it.",
        f"onnxruntime decides which graphs become integer kernels: tested were {', '.join(TESTED_ONNXRUNTIME)}, "
        f"and it was compiled with {manifest.versions.get('onnxruntime', 'an unknown version')}. `mezzotint bench` "
        "measures the bundle with another version.",
    ]
    if isinstance(shape[0], int):
        limits.append(f"The batch size {shape[0]} is written into the graph.")
    declared = [0 if size is None or isinstance(size, str) else size for size in shape[1:]]
    sides = manifest.signature.sides(declared)
    if all(sides):
        limits.append(f"Samples have {' x '.join(map(str, sides))} values in each channel, no other size.")
    if known := manifest.calibration.sizes:
        sizes = ", ".join(f"{name} {size}" for name, size in known.items())
        limits.append(f"Conditions may have other lengths than in calibration, which had {sizes}.")
    if correction:
        limits.append(
            f"The noise correction is valid for {manifest.deployment} only; other numbers of steps are interpolated."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in limits)


def _islands(manifest: Manifest) -> str:
    rows = "\n".join(f"- {_code(name)}: {_plain(why)}" for name, why in manifest.islands.items()) or "- none"
    return f"Layers kept in float:\n\n{rows}"


def _files(manifest: Manifest, folder: Path) -> str:
    network = located_in(folder, MODEL)
    purposes = {
        network: "the network",
        f"{network}.data": "its weights",
        located_in(folder, CONFIG): "the configuration of the float network, as diffusers writes it",
        SCHEDULER: "the scheduler's, as it came from the model",
        CORRECTION: "the tables that undo the quantization noise",
        RANGES: "the range of each quantizer at each timestep, for display",
        NOISE_PLOT: "that noise at each network call",
        "passes": "the graph as text after each pass of the compiler, and the changes of the pass",
    }
    precisions = {} if manifest.mixture is None else manifest.mixture.precisions
    mixed = {entry.file: f"the network in precision {_code(name)}" for name, entry in precisions.items()}
    rows = [f"- `{name}`: {text}" for name, text in {**purposes, **mixed}.items() if (folder / name).exists()]
    rows.append(f"- `{MANIFEST}`: all facts, and the hash of every file")
    return "## Files\n\n" + "\n".join(rows)


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {_plain(value)}" for name, value in facts.items() if value is not None)


def _plain(text: object) -> str:
    """Return a text of the model or its files in Markdown: one line, without HTML."""
    return one_line(text).replace("&", "&amp;").replace("<", "&lt;")


def _code(name: object) -> str:
    """Return a name as code in Markdown, between more backticks than it has in a row."""
    shown = visible(name)
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _python(text: str) -> str:
    return f"```python\n{text}\n```"
