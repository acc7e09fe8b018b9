"""A compiled pipeline on disk: a denoiser's bundle in its slot, and the other networks of the pipeline beside it.

    mezzotint.json                     its manifest: the class, the components, hashes of all other files
    model_index.json                   as diffusers writes it, without the paths of a machine
    unet/ or transformer/              the bundle of the denoiser, which has a manifest of its own (layout.py)
    text_encoder/, text_encoder_2/     model.onnx (+ .data) and config.json
    vae_decoder/, vae_encoder/         the same: the two halves of `vae`
    controlnet/                        the same, of pipelines that have one (controlnet.py)
    scheduler/, tokenizer/, ...        copies
    README.md                          the card

The files of the denoiser's slot are those of its own manifest: its card can be written again by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import BundleError
from ..json_text import read_json
from .bundle import Bundle, check_file, file_sha256, open_bundle
from .json_fields import Fields
from .layout import DENOISERS, MANIFEST, PIPELINE_FORMAT, is_pipeline
from .manifest import manifest_digest
from .manifest_entries import FileEntry

FORMAT_VERSION_OF_PIPELINES = 1
MODEL_INDEX = "model_index.json"
COMPONENT_MODEL = "model.onnx"


@dataclass(frozen=True)
class ComponentEntry:
    """One network beside the denoiser.

    class_name   of diffusers or transformers, which the network was exported from
    form         "float" or "int8"
    bytes        of the ONNX file and its external data, and of the float parameters before
    integer, floating   the layers on onnxruntime's integer kernels, and those in float
    islands      the layers that an int8 component keeps in float, each with the reason
    sqnr_db      of each output beside torch's, on data that the component was not calibrated on; capped as text is
    data         what it was calibrated and measured on, in words
    """

    class_name: str
    form: str
    bytes: int
    parameter_bytes: int
    integer: int
    floating: int
    islands: Mapping[str, str]
    sqnr_db: Mapping[str, float]
    data: str

    def to_json(self) -> dict[str, Any]:
        return {
            "class": self.class_name,
            "form": self.form,
            "bytes": self.bytes,
            "parameter_bytes": self.parameter_bytes,
            "integer": self.integer,
            "floating": self.floating,
            "islands": dict(self.islands),
            "sqnr_db": dict(self.sqnr_db),
            "data": self.data,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> ComponentEntry:
        return cls(
            fields.text("class"),
            fields.text("form"),
            fields.count("bytes"),
            fields.count("parameter_bytes"),
            fields.count("integer"),
            fields.count("floating"),
            fields.texts("islands"),
            fields.numbers("sqnr_db"),
            fields.text("data"),
        )

    @property
    def worst_db(self) -> float:
        """The lowest of the SQNR in dB."""
        return min(self.sqnr_db.values())


@dataclass(frozen=True)
class PipelineManifest:
    """All facts of a pipeline.

    `left_out` gives the reason for each part that the source has and the pipeline lacks. `call` are the arguments of
    the pipeline's call, beside texts and steps, that it was compiled for: sizes, the scale of guidance.
    """

    mezzotint: str
    class_name: str
    denoiser: str
    components: Mapping[str, ComponentEntry]
    left_out: Mapping[str, str] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            PIPELINE_FORMAT: FORMAT_VERSION_OF_PIPELINES,
            "mezzotint": self.mezzotint,
            "class": self.class_name,
            "denoiser": self.denoiser,
            "components": {name: entry.to_json() for name, entry in self.components.items()},
            "left_out": dict(self.left_out),
            "call": dict(self.call),
            "files": {name: entry.to_json() for name, entry in self.files.items()},
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> PipelineManifest:
        fields.integer(PIPELINE_FORMAT)
        return cls(
            fields.text("mezzotint"),
            fields.text("class"),
            fields.text("denoiser"),
            fields.named("components", ComponentEntry.from_json),
            fields.texts("left_out"),
            fields.parsed("call", _plain_arguments),
            fields.named("files", FileEntry.from_json),
            fields.text("digest"),
        )


@dataclass(frozen=True)
class PipelineFolder:
    """An opened pipeline: the folder, its manifest, and the bundle of its denoiser."""

    path: Path
    manifest: PipelineManifest
    bundle: Bundle

    @property
    def index(self) -> dict[str, Any]:
        """The model_index.json."""
        data = read_json(self.path / MODEL_INDEX, "the index of the pipeline", BundleError)
        if not isinstance(data, dict):
            raise BundleError("the index of the pipeline is no JSON object", where=str(self.path / MODEL_INDEX))
        return data

    def component(self, name: str) -> Path | None:
        """Return the ONNX file of a component, None for one that the pipeline lacks."""
        return self.path / name / COMPONENT_MODEL if name in self.manifest.components else None


def _plain_arguments(data: Any) -> dict[str, Any]:
    """Return arguments of a call that are numbers or booleans. Raises ValueError for any others."""
    if not isinstance(data, dict) or not all(isinstance(value, (bool, int, float)) for value in data.values()):
        raise ValueError("numbers and booleans by name are expected")
    return data


def seal_pipeline(folder: Path, manifest: PipelineManifest) -> PipelineManifest:
    """Write the manifest with the hash of every file outside the denoiser's slot; return what was written."""
    paths = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    ours = [name for name in paths if name != MANIFEST and not name.startswith(f"{manifest.denoiser}/")]
    files = {name: FileEntry(file_sha256(folder / name), (folder / name).stat().st_size) for name in ours}
    manifest = replace(manifest, files=files)
    manifest = replace(manifest, digest=manifest_digest(manifest.to_json()))
    text = json.dumps(manifest.to_json(), indent=2, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    return manifest


def is_pipeline_folder(path: Path) -> bool:
    """Return whether a folder has the manifest of a pipeline. Raises BundleError for a manifest that is no JSON."""
    file = path / MANIFEST
    return file.is_file() and is_pipeline(read_json(file, "the manifest", BundleError))


def open_pipeline(path: str | Path, *, verify: bool = True) -> PipelineFolder:
    """Open the folder of a compiled pipeline. `verify` reads every file and compares its hash.

    Raises BundleError: no such folder, no pipeline, of another format, a file missing or changed.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError("there is no such folder", where=str(folder), hint="give the folder that `compile` wrote")
    if not file.is_file():
        raise BundleError(f"there is no {MANIFEST}", where=str(folder), hint="this folder is no compiled pipeline")
    data = read_json(file, "the manifest", BundleError)
    if not is_pipeline(data):
        raise BundleError(
            "this is the bundle of a denoiser, without text encoders and VAE",
            where=str(folder),
            hint="compile the whole pipeline: mezzotint compile FOLDER --components float",
        )
    if data[PIPELINE_FORMAT] != FORMAT_VERSION_OF_PIPELINES:
        raise BundleError(
            f"the pipeline has format {data[PIPELINE_FORMAT]!r}, this version reads {FORMAT_VERSION_OF_PIPELINES}",
            where=str(file),
            hint="use the version of Mezzotint that wrote it",
        )
    if data.get("digest") != manifest_digest(data):
        raise BundleError("the manifest was changed after it was written", where=str(file), hint="compile again")
    manifest = Fields(data, str(file)).finish(PipelineManifest.from_json)
    if manifest.denoiser not in DENOISERS:
        raise BundleError(f"the pipeline has no slot {manifest.denoiser!r}", where=str(file), hint="compile it again")
    for name, entry in manifest.files.items():
        check_file(folder, name, entry, verify)
    for name in (MODEL_INDEX, *(f"{part}/{COMPONENT_MODEL}" for part in manifest.components)):
        if name not in manifest.files:
            raise BundleError(f"the manifest does not list {name}", where=str(file), hint="compile it again")
    return PipelineFolder(folder, manifest, open_bundle(folder, verify=verify))
