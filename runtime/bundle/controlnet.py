"""A compiled ControlNet: the component of a pipeline that computes the residuals of its U-Net at each call.

    sample            [B, C, h, w]   that of the U-Net
    timestep          [B]            training timesteps, float32
    controlnet_cond   [B, 3, H, W]   the image that it reads, in [0, 1]
    encoder_hidden_states, text_embeds, time_ids   the U-Net's own

It gives `down_block_additional_residuals_0` ... and `mid_block_additional_residual`, names that the U-Net's graph has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..component import ComponentNetwork
from ..errors import BundleError
from ..json_text import read_json
from ..sampling.condition_network import ConditionNetwork, Conditions, OpenedFolder
from ..signature import Images
from .file_checks import check_file, file_sha256
from .json_fields import Fields
from .layout import CONTROLNET, MANIFEST
from .manifest import manifest_digest
from .manifest_entries import FileEntry

SAMPLE, TIMESTEP, CONTROL = "sample", "timestep", "controlnet_cond"
SHARED_ROWS = ("encoder_hidden_states", "text_embeds", "time_ids")
"""Conditions of a U-Net that a ControlNet may read, too."""
CONTROLNET_CONFIG = "config.json"
DOWN, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"


def residual_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a ControlNet's residuals, by its configuration: one for each skip connection, the middle."""
    count = len(config["block_out_channels"]) * (int(config["layers_per_block"]) + 1)
    return (*(f"{DOWN}_{i}" for i in range(count)), MIDDLE)


class ControlNetwork:
    """The ONNX file of a compiled ControlNet; it opens with the first call."""

    def __init__(self, file: Path, *, threads: int | None = None) -> None:
        self.network = ComponentNetwork(file, threads=threads)

    def __call__(
        self, x: Images, t: float | npt.NDArray[Any], rows: Conditions, scale: float = 1.0
    ) -> dict[str, npt.NDArray[Any]]:
        """Return the residuals `[B, ...]` of one call, times `scale`. A condition of one row is shared by all samples.

        Raises InputError for inputs that are missing, unknown, or of other types and shapes than the graph's.
        """
        times = np.broadcast_to(np.asarray(t, np.float32).reshape(-1), (len(x),))
        wide = {
            name: np.broadcast_to(array, (len(x), *array.shape[1:])) if len(array) == 1 else array
            for name, array in rows.items()
        }
        found = self.network({SAMPLE: x, TIMESTEP: times, **wide})
        return found if scale == 1.0 else {name: array * np.float32(scale) for name, array in found.items()}


def controlnet_conditions(
    file: Path,
    config: Mapping[str, Any],
    digest: str,
    *,
    rows: Conditions | None = None,
    scale: float = 1.0,
    threads: int | None = None,
) -> ConditionNetwork:
    """Return the residuals of a compiled ControlNet as conditions that a network computes.

    `config` is that of the ControlNet, `digest` that of its weights. `rows` are images `controlnet_cond` that samples
    take in turn, `scale` multiplies the residuals. The file may be written later: it opens with the first call.
    """
    network = ControlNetwork(file, threads=threads)
    shared = SHARED_ROWS if config.get("addition_embed_type") == "text_time" else SHARED_ROWS[:1]
    return ConditionNetwork(
        lambda x, t, given: network(x, t, given, scale),
        residual_names(config),
        shared,
        (CONTROL,),
        rows or {},
        hashlib.sha256(f"{digest} {scale:g}".encode()).hexdigest(),
    )


def open_controlnet(
    folder: str | Path, *, rows: Conditions | None = None, scale: float = 1.0, threads: int | None = None
) -> ConditionNetwork:
    """Return the ControlNet of a component's folder, see `controlnet_conditions`. Raises BundleError for others."""
    place = Path(folder)
    *parts, _ = files_of_controlnet(place)
    digest = " ".join(file_sha256(part) for part in parts)
    network = controlnet_conditions(parts[0], _config(place), digest, rows=rows, scale=scale, threads=threads)
    return replace(network, opened_from=OpenedFolder(place, scale))


def files_of_controlnet(folder: Path) -> list[Path]:
    """Return the files of a component's folder: the graph, its weights if they are apart, the configuration.

    Raises BundleError where there is no graph.
    """
    if not (folder / "model.onnx").is_file():
        raise BundleError(
            "there is no model.onnx", where=str(folder), hint="give the controlnet/ of a compiled pipeline"
        )
    weights = folder / "model.onnx.data"
    return [folder / "model.onnx", *([weights] if weights.is_file() else []), folder / CONTROLNET_CONFIG]


def pipeline_controlnet(folder: Path, *, verify: bool = True) -> ConditionNetwork | None:
    """Return the ControlNet of a compiled pipeline, None for one without. Raises BundleError for changed files."""
    data = read_json(folder / MANIFEST, "the manifest", BundleError)
    where = str(folder / MANIFEST)
    if not isinstance(data.get("components"), dict) or CONTROLNET not in data["components"]:
        return None
    if data.get("digest") != manifest_digest(data):
        raise BundleError("the manifest was changed after it was written", where=where, hint="compile again")
    entries = Fields(data, where).named("files", FileEntry.from_json)
    ours = {name: entry for name, entry in entries.items() if name.startswith(f"{CONTROLNET}/")}
    for name, entry in ours.items():
        check_file(folder, name, entry, verify)
    digest = " ".join(entry.sha256 for _, entry in sorted(ours.items()))
    place = folder / CONTROLNET
    network = controlnet_conditions(place / "model.onnx", _config(place), digest)
    return replace(network, opened_from=OpenedFolder(place, 1.0))


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONTROLNET_CONFIG
    config = read_json(file, "the configuration of the ControlNet", BundleError)
    sizes = ("block_out_channels", "layers_per_block")
    if not isinstance(config, dict) or any(not config.get(key) for key in sizes):
        raise BundleError("the configuration is not that of a ControlNet", where=str(file), hint="compile it again")
    return config
