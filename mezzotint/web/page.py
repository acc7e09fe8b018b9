"""`mezzotint web BUNDLE -o FOLDER`: a folder that any static web server serves, which samples in the browser.

    index.html, page.css, page.js      the page; its data (networks, scalars of the sampler) is JSON inside it
    worker.js, sampler.js, noise.js    the sampling loop, away from the page's own thread
    networks/                          the bundle's ONNX files and the float model, byte for byte
    onnxruntime/                       onnxruntime-web: one script and its wasm
    mezzotint-web.json                 what made the folder, and its files with their SHA-256

The page loads nothing from elsewhere, and its policy forbids that. Scripts are called .js and the wasm is handed over
as bytes, so a server need not know the types of .mjs and .wasm.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.staging import check_target, place_of, staged
from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.bounds import check_seed
from mezzotint.runtime.bundle.bundle import Bundle, file_sha256
from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.json_text import read_json
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.guidance import Conditions, with_labels
from mezzotint.runtime.sampling.samplers import Stepper
from mezzotint.runtime.signature import EXTRA_CHANNELS, no_image
from mezzotint.runtime.visible import visible

from ..bench.reference import ReferenceModel
from ..inspect.html import base_style, fill_template, json_for_html
from .conditions import conditions_json
from .networks import WebNetwork
from .onnxruntime_web import ORT_SCRIPT, ORT_WASM, WEB_VERSION, web_runtime_files
from .scalars import solver_json

WEB_ASSETS = Path(__file__).parents[1] / "assets" / "web"
WEB_SCRIPTS = ("page.js", "worker.js", "sampler.js", "noise.js")
WEB_SCRIPT = "onnxruntime/ort.wasm.bundle.min.js"
LICENSE = "onnxruntime-license.txt"
WEB_MANIFEST = "mezzotint-web.json"
BESIDE = "float"
OWN_MODEL = "bundle"
MOST_PAGE_IMAGES = 64
USUAL_IMAGES = 4
CONDITION_FIELD = (
    '<div class="field"><label for="condition">Condition</label><select id="condition">{options}</select></div>\n'
)
LEAD = (
    "These images are computed in this browser, by onnxruntime-web {version} on one thread. Nothing is sent. The noise "
    "of a seed is the one that Mezzotint draws in Python."
)


@dataclass(frozen=True)
class WebOptions:
    """The choices of a page. `sampler`, `eta` and `correction` are those of `Bundle.sample`; the page offers `steps` in
    this order, the deployment's own when empty. `seed` and `count` (4 when left out) fill the form. The rows of
    `conditions` are choices too; `unconditional` has the rows of guidance."""

    float_model: Path | None = None
    sampler: str | None = None
    steps: Sequence[int] = field(default=())
    eta: float | None = None
    correction: bool | None = None
    seed: int = 0
    count: int | None = None
    conditions: Conditions = field(default_factory=dict)
    unconditional: Conditions = field(default_factory=dict)


def write_web(
    bundle: Bundle,
    target: Path,
    options: WebOptions | None = None,
    *,
    runtime: Path | None = None,
    cache: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the folder and return its manifest. `runtime` and `cache` are those of `web_runtime_files`.

    Raises InputError for a bundle that the page cannot sample, WebRuntimeMissing, and OutputError for a target that
    exists (with `force`: that holds something else than a page).
    """
    options = options or WebOptions()
    target = place_of(target)
    check_target(target, force=force, ours=_is_page)
    check_bundle(bundle)
    data, files = web_data(bundle, options)
    found = web_runtime_files(runtime, cache)
    files[data["wasm"]] = found[ORT_WASM]
    data["bytes"] = sum(path.stat().st_size for path in files.values())
    files[WEB_SCRIPT] = found[ORT_SCRIPT]
    with staged(target, force=force, ours=_is_page) as (folder, _):
        for name, path in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        for name in WEB_SCRIPTS:
            shutil.copyfile(WEB_ASSETS / name, folder / name)
        shutil.copyfile(WEB_ASSETS / LICENSE, folder / "onnxruntime" / "LICENSE.txt")
        _write(folder / "page.css", base_style() + (WEB_ASSETS / "page.css").read_text(encoding="utf-8"))
        _write(folder / "index.html", render_web_page(data))
        manifest = {
            "mezzotint": bundle.manifest.mezzotint,
            "bundle": bundle.manifest.digest,
            "onnxruntime-web": WEB_VERSION,
            "deployments": [deployment["label"] for deployment in data["deployments"]],
            "files": {
                path.relative_to(folder).as_posix(): file_sha256(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        }
        _write(folder / WEB_MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def check_bundle(bundle: Bundle) -> None:
    """Raise InputError for a bundle that the page cannot sample: of latents, or with channels that are no image's."""
    if EXTRA_CHANNELS in bundle.signature.conditions:
        what = "the network takes channels behind those of the image, which the page cannot give"
    elif (reason := no_image(bundle.sample_shape)) is not None:
        what = f"{reason}, and the page has no decoder"
    else:
        return
    raise InputError(what, where=str(bundle.path), hint="sample it with `mezzotint sample`")


def web_data(bundle: Bundle, options: WebOptions) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the page's data, and the source of each file of a network by its place in the page's folder.

    Raises InputError, TimestepNotDeployed and ScheduleError.
    """
    own = _own_networks(bundle)
    denoisers = list(dict.fromkeys(bundle.denoisers(threads=1)))
    models = {OWN_MODEL: (f"bundle ({bundle.manifest.recipe.name})", own)}
    if options.float_model is not None:
        reference = ReferenceModel(bundle, options.float_model, threads=1)
        network = WebNetwork.of(reference.path, reference.network, bundle.sample_shape)
        models[BESIDE] = ("float model", {BESIDE: network})
        denoisers.append(reference.network)
    rows = with_labels(bundle.signature, bundle.deployment, options.conditions, options.unconditional)
    conditions = conditions_json(bundle, *rows, denoisers)
    networks = {name: network for _, parts in models.values() for name, network in parts.items()}
    batches = {network.fixed_batch for network in networks.values()}
    if len(batches) > 1:
        raise InputError("the networks have batches of different sizes", where=str(options.float_model or bundle.path))
    batch = batches.pop()
    if batch and bundle.deployment.guided:
        raise InputError("guidance doubles the batch, and the network's is fixed", where=str(bundle.path))
    most = min(batch or MOST_PAGE_IMAGES, MOST_PAGE_IMAGES)
    count = min(USUAL_IMAGES, most) if options.count is None else options.count
    check_seed(options.seed)
    if not 1 <= count <= most:
        raise InputError(f"a page of {count} images is not possible", hint=f"ask for 1 to {most}")
    places = _places(networks.values())
    signature = bundle.signature
    data = {
        "title": f"{bundle.manifest.source.name}, {bundle.manifest.recipe.name}",
        "sample": list(bundle.sample_shape),
        "inputs": {"sample": signature.sample, "timestep": signature.timestep, "output": signature.output},
        "batch": batch,
        "most": most,
        "seed": str(options.seed),  # JSON's numbers end at 2^53 in a browser
        "count": count,
        "conditions": conditions,
        "models": {
            name: {"label": visible(label), "bytes": sum(network.bytes for network in parts.values())}
            for name, (label, parts) in models.items()
        },
        "networks": {name: network.to_json(places) for name, network in networks.items()},
        "deployments": [
            {"label": str(plan), "solvers": _solvers(bundle, plan, options, networks)}
            for plan in _plans(bundle, options)
        ],
        "wasm": f"onnxruntime/{ORT_WASM}",
    }
    return data, {place: path for path, place in places.items()}


def _own_networks(bundle: Bundle) -> dict[str, WebNetwork]:
    """Return the bundle's networks by the names of the page: one, or one for each precision."""
    if bundle.precisions is None:
        return {OWN_MODEL: WebNetwork.of(bundle.model_path, bundle.denoiser(1), bundle.sample_shape)}
    return {
        f"{OWN_MODEL}/{name}": WebNetwork.of(bundle.path / file, bundle.denoiser(1, name), bundle.sample_shape)
        for name, file in bundle.precisions.files.items()
    }


def _plans(bundle: Bundle, options: WebOptions) -> list[Deployment]:
    steps: list[int | None] = [*dict.fromkeys(options.steps)] or [None]
    return [bundle.plan(options.sampler, count, options.eta) for count in steps]


def _solvers(
    bundle: Bundle, plan: Deployment, options: WebOptions, networks: Mapping[str, WebNetwork]
) -> dict[str, Any]:
    """Return the scalars of a plan for each model; only the bundle's output is corrected. Raises InputError."""
    solver = plan.solver(bundle.schedule)
    for network in networks.values():
        network.check_times([bundle.signature.network_time(t) for t in solver.calls])
    names = bundle.precisions.of(solver.steps) if bundle.precisions else ()
    own = [f"{OWN_MODEL}/{name}" for name in names] or [OWN_MODEL] * len(solver.steps)
    stepper = Stepper(solver, bundle.chosen_correction(plan, options.correction))
    solvers = {OWN_MODEL: solver_json(stepper, own, bundle.signature)}
    if options.float_model is not None:
        solvers[BESIDE] = solver_json(Stepper(solver), [BESIDE] * len(solver.steps), bundle.signature)
    if plan.guided:
        solvers = {name: {**solver, "guidance": plan.guidance} for name, solver in solvers.items()}
    return solvers


def _places(networks: Iterable[WebNetwork]) -> dict[Path, str]:
    """Return the place of each file in the page's folder. Precisions may share a file, which is there once."""
    files = dict.fromkeys(file for network in networks for file in network.files)
    return {
        file: f"networks/{number}{'.onnx' if file.suffix == '.onnx' else '.data'}" for number, file in enumerate(files)
    }


def render_web_page(data: dict[str, Any]) -> str:
    """Return index.html. Text from a bundle reaches it as text only."""
    models = data["models"]
    beside = '<div class="field check"><input id="beside" type="checkbox" checked>' + (
        '<label for="beside">Float model beside it</label></div>\n'
    )
    fields = {
        "TITLE": escape(visible(data["title"])),
        "LEAD": escape(LEAD.format(version=WEB_VERSION)),
        "SEED": escape(data["seed"]),
        "COUNT": str(data["count"]),
        "MOST": str(data["most"]),
        "BESIDE": beside if BESIDE in models else "",
        "DEPLOYMENTS": _options(deployment["label"] for deployment in data["deployments"]),
        "CONDITION": CONDITION_FIELD.format(options=_options(data["conditions"]["choices"]))
        if data["conditions"]
        else "",
        "MODELS": "\n".join(_model_section(name, model["label"]) for name, model in models.items()),
        "ROWS": "\n".join(_figure_row(name, model) for name, model in models.items()),
        "DATA": json_for_html(data),
    }
    return fill_template((WEB_ASSETS / "index.html").read_text(encoding="utf-8"), fields)


def _options(labels: Iterable[str]) -> str:
    return "".join(f'<option value="{i}">{escape(visible(label))}</option>' for i, label in enumerate(labels))


def _model_section(name: str, label: str) -> str:
    return (
        f'<section id="model-{name}" aria-labelledby="title-{name}">\n<h2 id="title-{name}">{escape(label)}</h2>\n'
        f'<div class="images" id="images-{name}"></div>\n</section>'
    )


def _figure_row(name: str, model: dict[str, Any]) -> str:
    size = f"{model['bytes'] / 1e6:.1f} MB"
    cell = '<td class="number" data-cell>–</td>'
    return (
        f'<tr id="row-{name}"><th scope="row">{escape(model["label"])}</th>{cell}{cell}'
        f'<td class="number">{size}</td></tr>'
    )


def _is_page(folder: Path) -> bool:
    """Return whether a folder holds nothing but a page of `write_web`."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    there = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    if not there:
        return not any(folder.iterdir())
    try:
        known = read_json(folder / WEB_MANIFEST, "the page's manifest", OutputError)["files"]
    except (MezzotintError, KeyError, TypeError):
        return False
    return there <= {*known, WEB_MANIFEST}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
