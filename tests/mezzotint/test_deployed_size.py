"""The times that a compilation deploys beside those that the pipelines of diffusers pass to the same tiny network."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from onnx import TensorProto

from mezzotint.compiler.frontend.architectures.registry import ROWS
from mezzotint.compiler.frontend.network_inputs import network_inputs
from mezzotint.options import RANDOM, CalibrationOptions, CompileOptions, DeploymentOptions, ImportRoles
from mezzotint.prepared import Prepared, calibration_rows, prepare
from mezzotint.runtime.errors import ScheduleError
from mezzotint.runtime.sampling.flow_sigmas import IMAGE_TOKENS
from mezzotint.runtime.sampling.schedule import Schedule
from tests.helpers.models import hand_written, write
from tools.tiny_models import TINY
from tools.tiny_network import TinyModel

STEPS = 3
EULER: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
DYNAMIC = {**EULER, "use_dynamic_shifting": True, "base_image_seq_len": 2, "max_image_seq_len": 64}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "prediction_type": "flow_prediction",
}
DPM = {**UNIPC, "_class_name": "DPMSolverMultistepScheduler"}


@dataclass(frozen=True)
class Pipe:
    """A pipeline of diffusers, its scheduler, and arguments of its call; `side` is a pixel's count of one latent."""

    name: str
    scheduler: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    side: int = 8
    time: str = "timestep"
    prompt: str = "encoder_hidden_states"


MASK = {"prompt_attention_mask": torch.ones(1, 5).long()}
UNGUIDED = {"guidance_scale": 1.0}
PIPES = {
    "FluxTransformer2DModel": Pipe("FluxPipeline", DYNAMIC, {"pooled_prompt_embeds": torch.randn(1, 12)}),
    "Flux2Transformer2DModel": Pipe("Flux2Pipeline", DYNAMIC),
    "ChromaTransformer2DModel": Pipe(
        "ChromaPipeline", DYNAMIC, {"prompt_attention_mask": torch.ones(1, 5), "guidance_scale": 0.0}
    ),
    "SD3Transformer2DModel": Pipe(
        "StableDiffusion3Pipeline", DYNAMIC, {**UNGUIDED, "pooled_prompt_embeds": torch.randn(1, 12)}
    ),
    "QwenImageTransformer2DModel": Pipe(
        "QwenImagePipeline", {**DYNAMIC, "shift_terminal": 0.02}, {"prompt_embeds_mask": torch.ones(1, 5).long()}
    ),
    "Lumina2Transformer2DModel": Pipe("Lumina2Pipeline", DYNAMIC, {**MASK, **UNGUIDED}),
    "ZImageTransformer2DModel": Pipe("ZImagePipeline", DYNAMIC, {"guidance_scale": 0.0}, time="t", prompt="cap_feats"),
    "LTXVideoTransformer3DModel": Pipe(
        "LTXPipeline", {**DYNAMIC, "shift_terminal": 0.1}, {**MASK, **UNGUIDED, "num_frames": 9}, side=32
    ),
    "AuraFlowTransformer2DModel": Pipe("AuraFlowPipeline", {**EULER, "shift": 1.73}, {**MASK, **UNGUIDED}),
    "HunyuanVideoTransformer3DModel": Pipe(
        "HunyuanVideoPipeline",
        {**EULER, "shift": 7.0},
        {**MASK, "pooled_prompt_embeds": torch.randn(1, 12), "num_frames": 5},
    ),
    "WanTransformer3DModel": Pipe("WanPipeline", UNIPC, {**UNGUIDED, "num_frames": 5}),
    "SanaTransformer2DModel": Pipe("SanaPipeline", DPM, {**MASK, **UNGUIDED, "use_resolution_binning": False}, side=32),
}


def prepared(tiny: TinyModel, scheduler: Schedule | Path, tmp_path: Path, model: Any = None) -> Prepared:
    options = CompileOptions(
        deployment=DeploymentOptions(steps=STEPS, scheduler=scheduler),
        calibration=CalibrationOptions(conditions=tiny.conditions(1)),
        roles=ImportRoles(size=tiny.size),
    )
    return prepare(model or tiny.build(), tmp_path / "out", options)


def times_of_pipeline(pipe: Pipe, tiny: TinyModel, module: Any) -> list[float]:
    """Return the timestep that the network sees in each call, with the size that the compilation has."""
    kind: Any = getattr(diffusers, pipe.name)
    scheduler = getattr(diffusers, pipe.scheduler["_class_name"]).from_config(pipe.scheduler)
    named = inspect.signature(kind.__init__).parameters.values()
    parts = {p.name: None for p in named if p.default is p.empty and p.name != "self"}
    made = kind(**{**parts, "transformer": module, "scheduler": scheduler})
    made.set_progress_bar_config(disable=True)
    seen: list[float] = []
    forward = module.forward

    def recorded(*args: Any, **arguments: Any) -> Any:
        seen.append(float((args[1] if len(args) > 1 else arguments[pipe.time]).flatten()[0]))
        return forward(*args, **arguments)

    module.forward = recorded
    side = tiny.size or (8, 8)
    height, width = (pipe.side * latents for latents in side[-2:])
    embeds: Any = torch.randn(1, *tiny.asked[pipe.prompt])
    if pipe.name == "ZImagePipeline":
        embeds = [embeds[0]]
    options = {"height": height, "width": width, "num_inference_steps": STEPS, "output_type": "latent"}
    with torch.no_grad():
        made(prompt_embeds=embeds, **{**options, **pipe.options})
    del module.forward
    return seen


@pytest.mark.parametrize("name", PIPES)
def test_the_deployed_times_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    pipe, tiny = PIPES[name], TINY[name]
    if name == "SanaTransformer2DModel":  # the tiny one is Sana-Sprint, which has another pipeline
        tiny = replace(tiny, config={**tiny.config, "guidance_embeds": False})
    module = tiny.build()
    found = prepared(tiny, Schedule.from_config(pipe.scheduler), tmp_path, module)

    times = [found.signature.network_time(t) for t in found.deployment.calls]

    assert times == pytest.approx(times_of_pipeline(pipe, tiny, module), rel=1e-5)


def test_every_class_that_shifts_by_length_is_here() -> None:
    assert {name for name, row in ROWS.items() if row.tokens or row.sigmas != "own"} <= set(PIPES)


def test_an_embedded_guidance_has_the_scale_of_the_pipeline(tmp_path: Path) -> None:
    """Unless it is given; random conditions have it, too."""
    tiny = TINY["FluxTransformer2DModel"]
    module: Any = tiny.build()
    given = tiny.conditions(1)
    own = given.pop("guidance")
    found = []
    for conditions in (given, {**given, "guidance": own}, RANDOM):
        options = CompileOptions(
            deployment=DeploymentOptions(steps=STEPS, scheduler=Schedule.from_config(EULER)),
            calibration=CalibrationOptions(conditions=conditions),
            roles=ImportRoles(size=tiny.size),
        )
        ready = prepare(module, tmp_path / "out", options)
        values = network_inputs(tiny.cls, module.config, tiny.size, tiny.asked).conditions
        inputs = {name: value.value(name) for name, value in values.items()}
        found.append(calibration_rows(ready, inputs, options.calibration)[0]["guidance"].tolist())
    assert found == [[3.5], own.tolist(), [3.5]]


def test_another_size_shifts_otherwise(tmp_path: Path) -> None:
    tiny = TINY["SD3Transformer2DModel"]
    large = TinyModel(tiny.cls, tiny.config, tiny.asked, flow=True, size=(16, 16))
    schedule = Schedule.from_config(DYNAMIC)

    one, two = (prepared(t, schedule, tmp_path) for t in (tiny, large))

    assert (one.source.schedule.config[IMAGE_TOKENS], two.source.schedule.config[IMAGE_TOKENS]) == (16, 64)
    assert one.deployment.calls != two.deployment.calls


def test_an_onnx_file_needs_its_configuration(tmp_path: Path) -> None:
    """Nothing says how an image without a class is cut into tokens; the configuration next to the file does."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "scheduler_config.json").write_text(json.dumps(DYNAMIC))
    file = write(hand_written(time_dtype=TensorProto.FLOAT), folder / "model.onnx")
    roles, options = ImportRoles(timestep_unit="steps"), DeploymentOptions(steps=STEPS)
    with pytest.raises(ScheduleError, match="number of image tokens") as caught:
        prepare(file, tmp_path / "out", CompileOptions(deployment=options, roles=roles))
    assert "exp(mu)" in str(caught.value.hint)

    config = {"_class_name": "SD3Transformer2DModel", "patch_size": 4, "joint_attention_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    found = prepare(file, tmp_path / "out", CompileOptions(deployment=options, roles=roles))
    _, height, width = found.shape
    assert found.source.schedule.config[IMAGE_TOKENS] == (height // 4) * (width // 4)
