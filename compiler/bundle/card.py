"""The model card: a bundle's README.md, made of its manifest and of nothing else.

It says what the bundle is, from what and how it was made, how good and how fast it was found to be, how to run it, what
it does not promise, and what its files are. In front stand the fields that the Hugging Face hub reads. No field is made
up: a licence that nobody told is `unknown`, a base model or a task that nobody knows is left out. The manifest has no
times that get into it, so the same compilation twice writes the same card.

What was measured behind the compilation (`mezzotint card --eval --bench`) lies in the manifest as `measured`, in the
form of compiler/bundle/card_figures.py; the programs are those of compiler/bundle/card_code.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mezzotint.runtime.bundle.bundle import CORRECTION, MANIFEST, MODEL, SCHEDULER
from mezzotint.runtime.bundle.model_config import CONFIG
from mezzotint.runtime.bundle.ranges import RANGES
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.session import TESTED_ONNXRUNTIME

from . import card_code as code
from .card_figures import measured

CARD = "README.md"
NOISE_PLOT = "noise.png"
UNKNOWN = "unknown"
WIDTH = 110  # of the recipe's lines, as `mezzotint recipes NAME` prints it
_FIELDS = ("license", "license_name", "license_link", "base_model", "pipeline_tag")  # what a manifest's `card` may have


def card(manifest: Mapping[str, Any], folder: Path) -> str:
    """The text for a bundle whose other files lie in `folder`, all but the manifest."""
    config, correction = (folder / CONFIG).is_file(), (folder / CORRECTION).is_file()
    parts = [
        _front(manifest, config),
        _title(manifest),
        _origin(manifest),
        _made(manifest),
        _good(manifest),
        measured(manifest.get("measured", {})),
        _run(manifest, config, correction),
        _limits(manifest, correction),
        _islands(manifest),
        _files(manifest, folder),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(manifest: Mapping[str, Any], config: bool) -> str:
    """The YAML in front; `license` is always there, the rest where it is known."""
    told = {key: manifest.get("card", {}).get(key) for key in _FIELDS}
    fields: dict[str, Any] = {"license": told["license"] or UNKNOWN}
    fields |= {key: told[key] for key in ("license_name", "license_link") if told[key]}
    fields["library_name"] = "mezzotint"
    if told["base_model"]:
        fields |= {"base_model": told["base_model"], "base_model_relation": "quantized"}
    plain = manifest["source"].get("class") == "UNet2DModel" and not manifest["signature"]["conditions"]
    if task := told["pipeline_tag"] or ("unconditional-image-generation" if plain else None):
        fields["pipeline_tag"] = task
    kinds = ["quantized"] if manifest["quantizers"] else []
    fields["tags"] = ["mezzotint", "onnx", "onnxruntime", *(["diffusers"] if config else []), *kinds]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _title(manifest: Mapping[str, Any]) -> str:
    signature, kernels = manifest["signature"], manifest["kernels"]
    names = ", ".join(f"`{n}`" for n in (signature["sample"], signature["timestep"], *signature["conditions"]))
    recipe = manifest["recipe"]
    return f"""# {manifest["source"].get("name", "A denoiser")}, a Mezzotint bundle ({recipe["name"]})

A diffusion model's denoiser, compiled for onnxruntime's CPU kernels.
Recipe `{recipe["name"]}`: {recipe["description"]}.

`{MODEL}` is an ordinary ONNX file: inputs {names}, output `{signature["output"]}` ({signature["prediction"]}).
{kernels["integer"]} convolutions and matmuls run on onnxruntime's integer CPU kernels, {kernels["float"]} in float.
{_size(manifest["storage"])}{_precisions(manifest)}
It was made for {Deployment.from_json(manifest["deployment"])}."""


def _size(found: Mapping[str, Any]) -> str:
    """One line about the size of the file."""
    kinds = ", ".join(f"{row['bytes'] / 1e6:.2f} MB {kind}" for kind, row in found["types"].items())
    share = "" if found["ratio"] is None else f", {found['ratio']:.3f} of the float parameters"
    return f"The file has {found['model_bytes'] / 1e6:.2f} MB{share}: {kinds}, the rest is the graph."


def _precisions(manifest: Mapping[str, Any]) -> str:
    """What the files of a mixed bundle are; nothing where there is one precision."""
    if "precisions" not in manifest:
        return ""
    rows = "".join(
        f"\n- `{row['file']}`: `{name}`, {row['calls']} of {len(manifest['precision_of_call'])} network calls"
        for name, row in manifest["precisions"].items()
    )
    text = f"\n\nIt is one of several precisions of the network, of which Mezzotint picks one for each call:\n{rows}\n"
    if manifest["shared_bytes"]:
        text += "\nWhat they have in common lies in `unet/shared.data`: keep the folder together.\n"
    return text


def _origin(manifest: Mapping[str, Any]) -> str:
    source, told = manifest["source"], manifest.get("card", {})
    facts = {
        "name": source.get("name"),
        "read from": {"onnx": "an ONNX file", "diffusers": "a diffusers model"}.get(source["kind"], source["kind"]),
        "class": source.get("class"),
        "base model": told.get("base_model"),
        "float parameters": f"{source['parameter_bytes']} bytes" if "parameter_bytes" in source else None,
        "SHA-256 of the weights": source.get("weights_sha256"),
    }
    if told.get("license"):
        whose = "that of the float model, as its card says" if told.get("license_from") == "source" else "as was given"
        legal = f"The licence, `{told['license']}`, is {whose}."
    else:
        legal = "Nobody told its licence: that of the float model holds, for these weights are made from its own."
    return f"## From what\n\n{_list(facts)}\n\n{legal}"


def _made(manifest: Mapping[str, Any]) -> str:
    """The recipe, to be handed to `--recipe` again, and what else a second compilation needs."""
    runs, deployment = manifest["calibration"], manifest["deployment"]
    facts = {
        "deployment": str(Deployment.from_json(deployment)),
        "calibration": f"{runs['samples']} samples in batches of {runs['batch']}, seed {runs['seed']}",
        "Mezzotint": manifest["mezzotint"],
        **manifest["versions"],
    }
    told = manifest.get("precisions")
    recipes = {name: row["recipe"] for name, row in told.items()} if told else {"": manifest["recipe"]}
    blocks = []
    for name, recipe in recipes.items():
        what = f"The recipe of `{name}`" if name else "The recipe"
        text = yaml.safe_dump(recipe, sort_keys=False, width=WIDTH)
        blocks.append(f"{what}, with all options, for `mezzotint compile --recipe FILE`:\n\n```yaml\n{text}```")
    mixed = "\n\nThese bundles were mixed by `mezzotint mix`." if told else ""
    return f"## How it was made\n\n{_list(facts)}{mixed}\n\n" + "\n\n".join(blocks)


def _good(manifest: Mapping[str, Any]) -> str:
    """What was measured while compiling."""
    found = []
    if "noise" in manifest:
        noise = manifest["noise"]
        found.append(
            f"Quantization noise is undone while sampling ({CORRECTION}; `{NOISE_PLOT}` shows it, `--no-correction` "
            f"leaves it): {noise['summary']}. Plain onnxruntime knows nothing of that."
        )
        kept = [row["sqnr_db"][row["kept"]] for row in noise["calls"]]
        raw = [row["sqnr_db"]["none"] for row in noise["calls"]]
        found.append(
            "Signal to quantization noise of the prediction, on noise that nothing was fitted to, from the worst "
            f"network call to the best: {_span(raw)} as the network makes it, {_span(kept)} corrected."
        )
    if "bits" in manifest and "precisions" not in manifest:
        chosen = manifest["bits"]["chosen"]
        found.append(
            f"Weights have {chosen['mean_bits']:.2f} bits on average; the choice was predicted to cost "
            f"{_db(chosen['sqnr_db'])} of signal to noise, and measured {_db(chosen['measured_sqnr_db'])}."
        )
    text = "\n\n".join(found) or "Nothing but ranges was measured while compiling."
    return f"## How good\n\n{text}"


def _span(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.1f} to {max(known):.1f} dB" if known else "no error"


def _db(value: float | None) -> str:
    return "no error" if value is None else f"{value:.1f} dB"


def _run(manifest: Mapping[str, Any], config: bool, correction: bool) -> str:
    """The programs; all of them run in the bundle's folder."""
    parts = [
        "## How to run it\n\nAll of this runs in this folder. On the command line:\n\n"
        "    mezzotint sample . -n 16 -o ../pictures.png\n    mezzotint inspect .",
        f"In plain onnxruntime, one call of the network:\n\n{_python(code.plain_onnxruntime(manifest))}",
        f"In Mezzotint's runtime, from noise to pictures:\n\n{_python(code.own_runtime(manifest))}",
    ]
    if config:
        plan = Deployment.from_json(manifest["deployment"])
        call = f"num_inference_steps={plan.steps}" + (f", guidance_scale={plan.guidance!r}" if plan.guided else "")
        call += f", eta={plan.eta!r}" if plan.eta else ""
        parts += [
            "With a scheduler of diffusers, in the place of the network:\n\n"
            + _python(code.with_diffusers(manifest, correction)),
            f"In a pipeline, which is then called with `{call}`:\n\n" + _python(code.in_a_pipeline()),
        ]
    return "\n\n".join(parts)


def _limits(manifest: Mapping[str, Any], correction: bool) -> str:
    frozen = manifest["deployed_timesteps"]
    shape = manifest["inputs"][manifest["signature"]["sample"]]["shape"]
    found = [
        "Its timestep branch was kept, so every timestep works."
        if frozen is None
        else f"It holds tables for {len(frozen)} timesteps; plain onnxruntime takes the nearest row for any other, "
        f"Mezzotint's runtime refuses it. They are {', '.join(f'{t:g}' for t in sorted(frozen))}.",
        "One call has one timestep: the rows of a batch share it.",
        f"Which graphs become integer kernels is onnxruntime's affair: tested were {', '.join(TESTED_ONNXRUNTIME)}, "
        f"and it was compiled with {manifest['versions'].get('onnxruntime', 'an unknown one')}. `mezzotint bench` "
        "tells what another version makes of it.",
    ]
    if isinstance(shape[0], int):
        found.append(f"The batch size {shape[0]} is written into the graph.")
    if all(isinstance(n, int) for n in shape[2:]):
        found.append(f"Samples have {shape[2]} x {shape[3]} values in each channel, no other size.")
    if correction:
        plan = Deployment.from_json(manifest["deployment"])
        found.append(f"The noise correction is valid for {plan} only; other numbers of steps are interpolated.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in found)


def _islands(manifest: Mapping[str, Any]) -> str:
    rows = "\n".join(f"- `{name}`: {why}" for name, why in manifest["islands"].items()) or "- none"
    return f"Layers kept in float:\n\n{rows}"


def _files(manifest: Mapping[str, Any], folder: Path) -> str:
    what = {
        MODEL: "the network",
        f"{MODEL}.data": "its weights",
        CONFIG: "the configuration of the float network, as diffusers writes it",
        SCHEDULER: "the scheduler's, as it came from the model",
        CORRECTION: "the tables that undo the quantization noise",
        RANGES: "what each quantizer covers at each timestep, for readers",
        NOISE_PLOT: "what that noise is at each network call",
        "passes": "the graph as text behind each pass of the compiler, and what the pass changed",
    }
    mixed = {row["file"]: f"the network in precision `{name}`" for name, row in manifest.get("precisions", {}).items()}
    rows = [f"- `{name}`: {text}" for name, text in {**what, **mixed}.items() if (folder / name).exists()]
    rows.append(f"- `{MANIFEST}`: all facts, and the hash of every file")
    return "## Files\n\n" + "\n".join(rows)


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)


def _python(text: str) -> str:
    return f"```python\n{text}\n```"
