"""Two compiled pipelines of one tiny Stable Diffusion, for the tests of whole pipelines; a pytest plugin.

Exports take most of the time, so the second compilation reuses the graphs of the first: the denoiser as an ONNX file in
its slot of the source, the components' from memory.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from mezzotint.compiler.components import compile as components
from mezzotint.compiler.components.export import export_component
from mezzotint.options import CalibrationOptions, CompileOptions, DeploymentOptions, ImportRoles, RecipeOptions
from mezzotint.runtime.bundle.pipeline import PipelineFolder, open_pipeline
from mezzotint.whole import ComponentOptions, compile_pipeline
from tests.helpers.made_once import made_once

STEPS, GUIDANCE = 3, 3.0
CALL: dict[str, Any] = {"prompt": "a cat on a mat", "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}


@dataclass(frozen=True)
class Whole:
    """The folder of diffusers' own pipeline, and what was compiled from it: in float, and in int8.

    `exported` are the graphs of its components, which pipelines with the same parts may use again.
    """

    source: Path
    floating: PipelineFolder
    quantized: PipelineFolder
    exported: dict[str, Any]


@contextmanager
def exports(kept: dict[str, Any]) -> Iterator[None]:
    """Export each component once, as long as the context lasts; `kept` holds the graphs by part."""
    export = export_component

    def once(module: Any, row: Any, part: str, example: Any, where: str) -> Any:
        if part not in kept:
            kept[part] = export(module, row, part, example, where)
        return replace(kept[part], model=kept[part].model.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "export_component", once)
        yield


def options(recipe: str, size: tuple[int, ...] | None = None) -> CompileOptions:
    return CompileOptions(
        RecipeOptions(recipe),
        DeploymentOptions(steps=STEPS, guidance=GUIDANCE),
        CalibrationOptions(samples=4, batch=4),
        ImportRoles(size=size),
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A StableDiffusionPipeline of one block each, latents 4x8x8, pictures 3x8x8."""
    folder = made_once(tmp_path_factory, "whole", _make)
    floating, quantized = (open_pipeline(folder / name) for name in ("float", "int8"))
    return Whole(folder / "source", floating, quantized, _read_exports(folder / "exports"))


def _make(folder: Path) -> None:
    from tests.helpers import pipelines

    source = folder / "source"
    pipelines.smallest(folder).save_pretrained(source)
    kept: dict[str, Any] = {}
    with exports(kept):
        floating = compile_pipeline(source, folder / "float", options("float"), threads=1)
        again = folder / "again"
        shutil.copytree(source, again, ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
        shutil.copytree(source / "vae", again / "vae", dirs_exist_ok=True)
        shutil.copyfile(floating.bundle.model_path, again / "unet" / "model.onnx")
        compile_pipeline(again, folder / "int8", options("w8a8-best", (8, 8)), ComponentOptions("int8"), threads=1)
    (folder / "exports").mkdir()
    for part, exported in kept.items():
        ir.save(exported.model, folder / "exports" / f"{part}.onnx")
        (folder / "exports" / f"{part}.pickle").write_bytes(pickle.dumps(replace(exported, model=None)))


def _read_exports(folder: Path) -> dict[str, Any]:
    """Return the exported components by part, as `_make` wrote them."""
    found = {file.stem: pickle.loads(file.read_bytes()) for file in folder.glob("*.pickle")}
    return {part: replace(rest, model=ir.load(folder / f"{part}.onnx")) for part, rest in found.items()}
