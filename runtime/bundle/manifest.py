"""`mezzotint.json` as a type: what a bundle is, how it was made, and the hash of every file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import BundleError
from ..sampling.deployment import Deployment
from ..signature import MOST_RANK, Signature, Timestep, whole
from ..targets import ONNXRUNTIME, TARGETS, Target, target_named
from .acceptance import Acceptance
from .json_fields import HINT, Fields, T
from .manifest_entries import (
    Calibration,
    FileEntry,
    InputEntry,
    Kernels,
    PassRecord,
    QuantizerEntry,
    RecipeEntry,
    Source,
    Storage,
)
from .precisions import Mixture
from .training import TrainedUnit

FORMAT_VERSION = 3
LARGEST_SIDE = 1 << 24
MOST_VALUES = 1 << 32
TIME_KEYS = frozenset({"seconds", "peak_memory_mb"})
"""Keys that differ between two runs of the same compilation. The digest leaves them out wherever they stand."""
_RENAMED = {"faith": "fidelity", "mend": "fix"}  # keys of format 2 -> keys of format 3


@dataclass(frozen=True)
class Manifest:
    """All facts of a bundle, in the order of the file. `seal_bundle` fills in `files` and `digest`.

    `deployed_timesteps` are the rows of the frozen tables, None without tables. `quantizers` are in the order of the
    plan. `islands` and `refused` give a reason for each layer or value. `inputs`, `storage` and `acceptance` are
    None for bundles that were compiled before the manifest had them. `card`, `measured`, `noise` and `bits` are open
    plain data for display: the fields of the model card, the figures of `mezzotint card`, the reports of fit_noise and
    assign_bits. `training` has the layers and blocks that passes trained, `warnings` what
    passes did otherwise than their options ask for. `target` is the engine that the graph was written for; `kernels`
    are those of onnxruntime's CPU provider for every target.
    `digests_before` are those that the bundle had before its card was rewritten.
    """

    mezzotint: str
    recipe: RecipeEntry
    calibration: Calibration
    versions: Mapping[str, str]
    source: Source
    signature: Signature
    inputs: Mapping[str, InputEntry] | None
    deployment: Deployment
    deployed_timesteps: tuple[Timestep, ...] | None
    sample_shape: tuple[int, ...]
    history: tuple[PassRecord, ...]
    kernels: Kernels
    storage: Storage | None
    quantizers: tuple[QuantizerEntry, ...]
    islands: Mapping[str, str]
    refused: Mapping[str, str]
    nodes: Mapping[str, int]
    noise: Mapping[str, Any] = field(default_factory=dict)
    bits: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    training: tuple[TrainedUnit, ...] = ()
    warnings: tuple[str, ...] = ()
    acceptance: Acceptance | None = None
    mixture: Mixture | None = None
    target: Target = ONNXRUNTIME
    measured: Mapping[str, Any] = field(default_factory=dict)
    digests_before: tuple[str, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    digest: str = ""

    @property
    def measured_in(self) -> str:
        """Return where kernels were counted and speed was measured, if the target is another engine; else nothing."""
        return "" if self.target == ONNXRUNTIME else f"in onnxruntime's CPU provider; the form is for {self.target}"

    def kernels_text(self) -> str:
        """Return the numbers of integer and float kernels, and the engine that they are of, for display."""
        counts = f"{self.kernels.integer} integer, {self.kernels.floating} float"
        return f"{counts} {self.measured_in}" if self.measured_in else counts

    def require_inputs(self) -> Mapping[str, InputEntry]:
        """Return the inputs. Raise BundleError for a manifest without."""
        return _required(self.inputs, "`inputs`: the bundle is of an older version")

    def require_storage(self) -> Storage:
        """Return the storage. Raise BundleError for a manifest without."""
        return _required(self.storage, "`storage`: the bundle is of an older version")

    def require_mixture(self) -> Mixture:
        """Return the precisions. Raise BundleError for a bundle of one precision."""
        return _required(self.mixture, "`precisions`: the bundle has only one")

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain data of format FORMAT_VERSION."""
        timesteps = self.deployed_timesteps
        return {
            "format": FORMAT_VERSION,
            "mezzotint": self.mezzotint,
            "recipe": self.recipe.to_json(),
            "calibration": self.calibration.to_json(),
            "versions": dict(self.versions),
            **({} if self.target == ONNXRUNTIME else {"target": self.target}),
            **_unless_empty("card", self.card),
            "source": self.source.to_json(),
            "signature": self.signature.to_json(),
            **({} if self.inputs is None else {"inputs": {name: v.to_json() for name, v in self.inputs.items()}}),
            "deployment": self.deployment.to_json(),
            "deployed_timesteps": None if timesteps is None else list(timesteps),
            "sample_shape": list(self.sample_shape),
            "history": [record.to_json() for record in self.history],
            "kernels": self.kernels.to_json(),
            **({} if self.storage is None else {"storage": self.storage.to_json()}),
            "quantizers": [quantizer.to_json() for quantizer in self.quantizers],
            "islands": dict(self.islands),
            "refused": dict(self.refused),
            **_unless_empty("noise", self.noise),
            **_unless_empty("bits", self.bits),
            "nodes": dict(self.nodes),
            **({"training": [unit.to_json() for unit in self.training]} if self.training else {}),
            **({"warnings": list(self.warnings)} if self.warnings else {}),
            **({} if self.acceptance is None else {"acceptance": self.acceptance.to_json()}),
            **({} if self.mixture is None else self.mixture.to_json()),
            **_unless_empty("measured", self.measured),
            **({"digests_before": list(self.digests_before)} if self.digests_before else {}),
            "files": {name: entry.to_json() for name, entry in self.files.items()},
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> Manifest:
        """Read plain data of this format or of format 2; `where` is the file, for messages.

        `files` and `digest` may be absent, as before sealing. Raises BundleError for another format, and for a key that
        is missing, unknown or of the wrong type. The digest is not checked here.
        """
        check_format(data, where)
        data = _of_format_2(data) if data["format"] == 2 else data
        manifest = Fields({key: value for key, value in data.items() if key != "format"}, where).finish(_manifest)
        _check_inputs(manifest, where)
        return manifest


def check_format(data: Any, where: str) -> None:
    """Raise BundleError for anything but a manifest of a format that this version reads."""
    if not isinstance(data, Mapping) or "format" not in data:
        raise BundleError("the manifest does not state its format", where=where, hint=HINT)
    if data["format"] not in (2, FORMAT_VERSION):
        raise BundleError(
            f"the bundle has format {data['format']!r}, this version of Mezzotint reads 2 and {FORMAT_VERSION}",
            where=where,
            hint=HINT,
        )


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's plain data as canonical JSON, without its own digest and without times."""
    facts = _without_times({key: value for key, value in manifest.items() if key != "digest"})
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(fields: Fields) -> Manifest:
    return Manifest(
        mezzotint=fields.text("mezzotint"),
        recipe=fields.one("recipe", RecipeEntry.from_json),
        calibration=fields.one("calibration", Calibration.from_json),
        versions=fields.texts("versions"),
        source=fields.one("source", Source.from_json),
        signature=fields.parsed("signature", Signature.from_json),
        inputs=fields.maybe("inputs", lambda key: fields.named(key, InputEntry.from_json)),
        deployment=fields.parsed("deployment", Deployment.from_json),
        deployed_timesteps=fields.parsed(
            "deployed_timesteps", lambda rows: None if rows is None else tuple(whole(rows))
        ),
        sample_shape=fields.parsed("sample_shape", _shape),
        history=fields.each("history", PassRecord.from_json),
        kernels=fields.one("kernels", Kernels.from_json),
        storage=fields.maybe("storage", lambda key: fields.one(key, Storage.from_json)),
        quantizers=fields.each("quantizers", QuantizerEntry.from_json),
        islands=fields.texts("islands"),
        refused=fields.maybe("refused", fields.texts) or {},
        nodes=fields.counts("nodes"),
        noise=fields.maybe("noise", fields.table) or {},
        bits=fields.maybe("bits", fields.table) or {},
        card=fields.maybe("card", fields.table) or {},
        training=fields.maybe("training", lambda key: fields.each(key, TrainedUnit.from_json)) or (),
        warnings=fields.maybe("warnings", fields.each_text) or (),
        acceptance=fields.maybe("acceptance", lambda key: fields.one(key, Acceptance.from_json)),
        mixture=Mixture.from_json(fields),
        target=fields.maybe("target", lambda key: fields.parsed(key, _target)) or ONNXRUNTIME,
        measured=fields.maybe("measured", fields.table) or {},
        digests_before=fields.maybe("digests_before", fields.each_text) or (),
        files=fields.maybe("files", lambda key: fields.named(key, FileEntry.from_json)) or {},
        digest=fields.maybe("digest", fields.text) or "",
    )


def _check_inputs(manifest: Manifest, where: str) -> None:
    """Raise BundleError where the sample's shape or `inputs` are not those of the signature."""
    signature, inputs = manifest.signature, manifest.inputs
    if signature.channel_axis > len(manifest.sample_shape):
        what = f"`sample_shape` has no channels along axis {signature.channel_axis}"
        raise BundleError(what, where=where, hint=HINT)
    if inputs is None:
        return
    names = {signature.sample, signature.timestep, *signature.conditions}
    ranks = [len(inputs[name].shape) for name in (signature.sample, signature.timestep) if name in inputs]
    if set(inputs) != names or ranks[0] != 1 + len(manifest.sample_shape) or ranks[1] > 1:
        raise BundleError("the manifest's `inputs` are not those of its `signature`", where=where, hint=HINT)


def _of_format_2(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest with the keys of format 3. Names of layers are keys, too, and stay as they are."""
    changed = {key: _renamed(value) if key == "measured" else value for key, value in data.items()}
    kernels = data.get("kernels")
    if isinstance(kernels, Mapping) and isinstance(kernels.get("layers"), Mapping):
        layers = {name: _renamed(row) for name, row in kernels["layers"].items()}
        changed["kernels"] = {**kernels, "layers": layers}
    return changed


def _renamed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_RENAMED.get(key, key): _renamed(part) for key, part in value.items()}
    return [_renamed(part) for part in value] if isinstance(value, list) else value


def _required(part: T | None, name: str) -> T:
    if part is None:
        raise BundleError(f"the manifest has no {name}", hint="compile the model again")
    return part


def _timesteps(rows: Any) -> tuple[Timestep, ...] | None:
    return None if rows is None else tuple(whole(rows))


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or not 1 <= len(sizes) < MOST_RANK:
        raise ValueError(f"a sample has 1 to {MOST_RANK - 1} sizes behind its batch")
    if not all(type(size) is int and 1 <= size <= LARGEST_SIDE for size in sizes):
        raise ValueError(f"sizes are integers from 1 to {LARGEST_SIDE}")
    if math.prod(sizes) > MOST_VALUES:
        raise ValueError(f"a sample has {MOST_VALUES} values at most")
    return tuple(sizes)


def _target(name: Any) -> Target:
    if not isinstance(name, str) or (target := target_named(name)) is None:
        raise ValueError(f"choose one of {', '.join(TARGETS)}")
    return target


def _unless_empty(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value)} if value else {}


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_times(part) for key, part in value.items() if key not in TIME_KEYS}
    if isinstance(value, (list, tuple)):
        return [_without_times(part) for part in value]
    return value
