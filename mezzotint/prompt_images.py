"""`mezzotint sample --prompt`: images of a text, drawn by a compiled pipeline and decoded.

The pipeline's class in diffusers runs, with the compiled networks: how a prompt is tokenized, how encoders are joined,
how guidance is applied, and how latents are packed and scaled is code of each class. A second copy of it in runtime/
would follow every one of them. The networks need none of torch's kernels; loading it takes seconds.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mezzotint.compiler.bundle.staging import claim_file
from mezzotint.runtime import bounds
from mezzotint.runtime.bundle.layout import CONTROLNET
from mezzotint.runtime.bundle.pipeline import PipelineFolder, open_pipeline
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.streams import prompt_seed

from .diffusers import load
from .io.images import check_image_file, save_images, save_picture
from .pipeline.control_images import read_control
from .pipeline.preview import Preview
from .prompts.calls import library, quiet_libraries
from .prompts.guidance import TRUE, USUAL, guidance_arguments
from .prompts.texts import LONGEST_PROMPT

if TYPE_CHECKING:
    from mezzotint.runtime.engine import Engine
    from mezzotint.runtime.signature import Images


@dataclass(frozen=True)
class PromptOptions:
    """What is drawn. None is the number of steps, and the guidance, that the denoiser was compiled for.

    Image i has the noise of seed + i. `preview` is a PNG file that shows each step. `control_image` is a file that the
    pipeline's ControlNet reads, and `control_scale` multiplies its residuals. Raises InputError.
    """

    prompt: str
    negative: str = ""
    n: int = 1
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    correction: bool | None = None
    preview: Path | None = None
    control_image: Path | None = None
    control_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, text in (("--prompt", self.prompt), ("--negative", self.negative)):
            if len(text) > LONGEST_PROMPT:
                raise InputError(f"a text of {len(text)} characters", where=name, hint="encoders read some hundred")
        bounds.check_number("images", self.n, bounds.MOST_SAMPLES)
        bounds.check_seed(self.seed)
        if not math.isfinite(self.control_scale):
            raise InputError(f"the scale is {self.control_scale}", where="--control-scale", hint="1 is usual")


def draw_prompt(
    folder: str | Path,
    output: Path,
    options: PromptOptions,
    *,
    threads: int | None = None,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write images of a prompt into a .png or .npy file, and return a summary.

    Raises BundleError for a folder that is no compiled pipeline, InputError for steps that the denoiser has no tables
    for, and where diffusers or transformers is missing.
    """
    check_image_file(output)
    opened = open_pipeline(folder)
    bundle = opened.bundle
    plan = bundle.plan(None, options.steps, None, options.guidance)
    control = _control_arguments(opened, options)
    claim = claim_file(output)
    preview = None if options.preview is None else Preview(options.preview)
    progress("load the pipeline", 0, 1)
    for needed in ("torch", "diffusers", "transformers"):
        library(needed)
    with quiet_libraries():
        pipe = load(opened, threads=threads, engine=engine, correction=options.correction)
    pipe.set_progress_bar_config(disable=True)
    progress("load the pipeline", 1, 1)
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {"prompt": options.prompt, "num_inference_steps": plan.steps, "output_type": "np"}
    arguments |= {name: library("torch").from_numpy(value) for name, value in control.items()}
    optional = {**opened.manifest.call, "negative_prompt": options.negative, "eta": plan.eta}
    optional["controlnet_conditioning_scale"] = options.control_scale
    embedded = "guidance" in bundle.signature.conditions
    optional |= guidance_arguments(type(pipe), plan.guidance, embedded=embedded)
    if embedded and options.guidance is not None:  # else the class has its usual one
        optional |= {USUAL: plan.guidance, TRUE: bundle.deployment.guidance}
    arguments |= {name: value for name, value in optional.items() if name in taken}
    torch = library("torch")
    if preview is not None and "callback_on_step_end" not in taken:
        raise InputError(f"a {type(pipe).__name__} does not show its steps", where="--preview", hint="leave it out")
    drawn: list[Images] = []
    for i in range(options.n):

        def step(pipe: Any, index: int, t: Any, state: dict[str, Any], done: int = i) -> dict[str, Any]:
            progress("sample", done * plan.steps + index + 1, options.n * plan.steps)
            if preview is not None:
                preview.show(pipe, state["latents"], arguments.get("height"), arguments.get("width"))
            return state

        generator = torch.Generator().manual_seed(prompt_seed(options.seed, i))
        more = {"callback_on_step_end": step} if "callback_on_step_end" in taken else {}
        with torch.no_grad():
            drawn.append(_images(pipe(**arguments, **more, generator=generator)))
    pictures = np.concatenate(drawn)
    if len(pictures) == 1 and output.suffix == ".png":
        save_picture(pictures[0], output, claim=claim)
    else:
        save_images(pictures, output, claim=claim)
    return {
        "output": str(output),
        "pipeline": opened.manifest.class_name,
        "pictures": len(pictures),
        "size": f"{pictures.shape[3]}x{pictures.shape[2]}",
        "scheduler": type(pipe.scheduler).__name__,
        "steps": plan.steps,
        "guidance": arguments.get(USUAL) if embedded else plan.guidance,
        "seed": options.seed,
        "engine": bundle.engine.name if engine is None else engine.name,
    }


def _control_arguments(opened: PipelineFolder, options: PromptOptions) -> dict[str, Any]:
    """Return the image that a ControlNet reads, `[1, 3, height, width]`, as an argument of the pipeline's call."""
    wanted, where = opened.component(CONTROLNET) is not None, "--control-image"
    if options.control_image is None:
        if wanted:
            raise InputError("the pipeline has a ControlNet, which reads an image", where=where, hint="give one")
        return {}
    if not wanted:
        raise InputError(f"a {opened.manifest.class_name} has no ControlNet", where=where, hint="leave the option out")
    height, width = (int(opened.manifest.call[side]) for side in ("height", "width"))
    return {"image": read_control(options.control_image, height, width)[None]}


def _images(answer: Any) -> Images:
    """Return the pictures of a pipeline's answer, or the frames of its video, float32 `[n, 3, H, W]` in [-1, 1]."""
    found = getattr(answer, "images", None)
    if found is None:
        frames = getattr(answer, "frames", None)
        if frames is None:
            raise InputError(f"a pipeline that answers {type(answer).__name__} draws no images")
        found = np.asarray(frames)[0]
    pictures = np.asarray(found, np.float32)
    scaled: Images = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2) * 2 - 1, np.float32)
    return scaled
