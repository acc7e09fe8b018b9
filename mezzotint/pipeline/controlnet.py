"""The ControlNet of a pipeline in float, before the denoiser is compiled: its residuals are conditions of that.

It is exported once. The float graph is what the denoiser is calibrated with; the component is made of it later, with
what the compiled denoiser's images give it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.bundle.writer import save_model
from mezzotint.compiler.components.compile import exported_component
from mezzotint.compiler.components.export import ExportedComponent
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.architectures.row import NetworkInputs
from mezzotint.compiler.frontend.network_inputs import network_inputs
from mezzotint.runtime.bundle.controlnet import CONTROL, SAMPLE, TIMESTEP, controlnet_conditions
from mezzotint.runtime.bundle.file_checks import file_sha256
from mezzotint.runtime.bundle.layout import CONTROLNET
from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.sampling.condition_network import ConditionNetwork

from .control_images import ControlImages, control_images
from .loading import weights_part
from .source import PipelineSource, part_config

_ROWS = 2  # torch.export takes a batch of one row for a constant
_TIMES = (600.0, 20.0)


@dataclass(frozen=True, eq=False)
class PipelineControl:
    """The ControlNet of a pipeline: its images, the inputs of the U-Net, and the float file that `export` writes.

    `network` computes the residuals with that file.
    """

    source: PipelineSource
    images: ControlImages
    known: NetworkInputs
    file: Path
    network: ConditionNetwork

    def export(self, folder: Path, threads: int | None) -> ExportedComponent:
        """Write the float file, and return the graph, whose weights are in `folder`. Raises ModelError."""
        row = self.source.components[CONTROLNET]
        module = weights_part(self.source.path / CONTROLNET, row.library, row.name)
        example = self._example(part_config(self.source.path / CONTROLNET))
        exported = exported_component(module, row, CONTROLNET, example, Context(folder, threads=threads))
        self.file.parent.mkdir()
        save_model(exported.model, self.file)
        return exported

    def _example(self, config: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Return inputs of the sizes that the pipeline has; waves stand for its numbers."""
        conditions = self.known.conditions
        names = [name for name in self.network.shared if name in conditions]
        sizes = {SAMPLE: self.known.shape, **{name: conditions[name].sizes for name in names}}
        waves = {
            name: np.sin(np.arange(_ROWS * np.prod(size), dtype=np.float32)).reshape(_ROWS, *size)
            for name, size in sizes.items()
        }
        images = self.images.own[np.arange(_ROWS) % len(self.images.own)]
        return {SAMPLE: waves.pop(SAMPLE), TIMESTEP: np.array(_TIMES, np.float32), **waves, CONTROL: images}


def pipeline_control(
    source: PipelineSource, place: Path | None, size: tuple[int, ...] | None, file: Path, threads: int | None
) -> PipelineControl:
    """Return the ControlNet of a pipeline, before anything is loaded. Raises ConditionError, ModelError.

    `place` has the control images, None for drawings; `size` is that of the latents, None for the usual one.
    """
    folder = source.path / CONTROLNET
    config, unet = part_config(folder), part_config(source.path / source.denoiser)
    known = network_inputs(str(unet.get(CLASS)), unet, size, {}, str(source.path / source.denoiser))
    blocks = part_config(source.path / "vae").get("block_out_channels") or ()
    embedding = config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
    if len(blocks) != len(embedding):
        raise ModelError(
            f"the ControlNet's images are {2 ** (len(embedding) - 1)} times as large as the latents, those of the VAE "
            f"{2 ** max(len(blocks) - 1, 0)} times",
            where=str(folder),
            hint="check that ControlNet and VAE belong to one pipeline",
        )
    height, width = (side * 2 ** (len(blocks) - 1) for side in known.shape[-2:])
    images = control_images(place, height, width)
    digest = " ".join(file_sha256(part) for part in sorted(folder.glob("*.safetensors")))
    network = controlnet_conditions(file, config, digest, rows={CONTROL: images.own}, threads=threads)
    return PipelineControl(source, images, known, file, network)
