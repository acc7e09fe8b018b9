"""The programs that a model card shows: complete, with the names, sizes and types of this bundle's own inputs.

tests/mezzotint/test_recard.py runs each one as it is printed, in the bundle's folder. An input's open dimensions become
those of the sample where they bear its names, and else a prompt's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mezzotint.runtime.bundle.bundle import MODEL
from mezzotint.runtime.sampling.deployment import Deployment

BATCH = 1  # rows in an example, unless the graph says
PICTURES = 2
TOKENS = 77  # what an open dimension of a condition becomes: the tokens of a CLIP prompt
NARROW = frozenset({"int4", "uint4"})  # storage types whose MatMuls onnxruntime computes inexactly, unless told not to

# What diffusers calls the samplers, and what it has to be told beside the configuration.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", ""),
    "ddpm": ("DDPMScheduler", ""),
    "euler": ("EulerDiscreteScheduler", ""),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", ""),
    "heun": ("HeunDiscreteScheduler", ""),
    "pndm": ("PNDMScheduler", ""),
    "lcm": ("LCMScheduler", ""),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", ', algorithm_type="dpmsolver++"'),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", ', algorithm_type="sde-dpmsolver++"'),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", ""),
}


def described(inputs: Mapping[str, tuple[Any, Sequence[int | str | None]]]) -> dict[str, dict[str, Any]]:
    """dtype and declared shape of each input, as a manifest has them."""
    return {name: {"dtype": str(dtype), "shape": list(shape)} for name, (dtype, shape) in inputs.items()}


def plain_onnxruntime(manifest: Mapping[str, Any]) -> str:
    """One call of the network."""
    signature = manifest["signature"]
    t = manifest["deployment"]["calls"][len(manifest["deployment"]["calls"]) // 2]
    lines = ["import numpy as np", "import onnxruntime as ort", ""]
    options = ""
    if NARROW & set(manifest["storage"]["types"]):
        lines += [
            "options = ort.SessionOptions()",
            "# Else onnxruntime rounds what 4-bit MatMuls read to 8 bits, on its own.",
            'options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")',
        ]
        options = "options, "
    lines += [
        f'session = ort.InferenceSession("{MODEL}", {options}providers=["CPUExecutionProvider"])',
        "rng = np.random.default_rng(0)",
        "inputs = {",
    ]
    for name in manifest["inputs"]:
        made = _timestep(manifest, t) if name == signature["timestep"] else _array(manifest, name, None)
        lines.append(f"    {_quoted(name)}: {made},")
    lines += [
        "}",
        f"[prediction] = session.run([{_quoted(signature['output'])}], inputs)",
        "print(prediction.shape, prediction.dtype)",
    ]
    return "\n".join(lines)


def own_runtime(manifest: Mapping[str, Any]) -> str:
    """Pictures, with everything that the bundle knows about sampling."""
    signature = manifest["signature"]
    fixed = manifest["inputs"][signature["sample"]]["shape"][0]
    lines = ["from mezzotint import open_bundle", "", 'bundle = open_bundle(".")']
    given = ""
    if signature["conditions"]:
        lines = ["import numpy as np", *lines, "rng = np.random.default_rng(0)"]
        roles = ["conditions", *(["unconditional"] if Deployment.from_json(manifest["deployment"]).guided else [])]
        for role in roles:
            rows = [f"    {_quoted(name)}: {_array(manifest, name, 1)}," for name in signature["conditions"]]
            lines += [f"{role} = {{", *rows, "}"]
        given = "".join(f", {role}={role}" for role in roles)
    shape = [PICTURES, *manifest["sample_shape"]]
    note = f"float32 {shape}, in the model's own range" + ("; one row of a condition serves all" if given else "")
    if isinstance(fixed, int):
        note += f"; the network takes {fixed} at once"
    lines += [f"images = bundle.sample({PICTURES}, seed=0{given})", f"print(images.shape)  # {note}"]
    return "\n".join(lines)


def with_diffusers(manifest: Mapping[str, Any], correction: bool) -> str:
    """A sampling loop of diffusers' scheduler and the bundle in the network's place."""
    deployment = Deployment.from_json(manifest["deployment"])
    scheduler, more = SCHEDULERS[deployment.sampler]
    correction = correction and not _only_here(manifest)
    conditions = list(manifest["signature"]["conditions"])
    passes = ["conditional", *(["unconditional"] if deployment.guided else [])] if conditions else []
    flow = deployment.sampler == "flow-euler"
    lines = [
        *(["import numpy as np"] if conditions else []),
        "import torch",
        f"from diffusers import {scheduler}",
        f"from mezzotint.diffusers import {'correct, ' if correction else ''}stand_in",
        "",
        'network = stand_in(".")',
        f'scheduler = {scheduler}.from_pretrained("scheduler"{more})',
    ]
    if correction:
        lines.append(f'scheduler = correct(scheduler, ".", guidance_scale={deployment.guidance!r})')
    if conditions:
        lines.append("rng = np.random.default_rng(0)")
    for role in passes:
        lines += [f"{role} = {{", *_keywords(manifest, conditions), "}"]
    size = ", ".join(map(str, _shape(manifest, manifest["signature"]["sample"], None)))
    start = "" if flow else " * scheduler.init_noise_sigma"
    lines += [
        "generator = torch.Generator().manual_seed(0)",
        f"scheduler.set_timesteps({deployment.steps})",
        f"x = torch.randn({size}, generator=generator){start}",
        "for t in scheduler.timesteps:",
    ]
    seen = "x" if flow else "scheduler.scale_model_input(x, t)"
    lines.append(f"    prediction = network({seen}, t{', **conditional' if conditions else ''}).sample")
    if len(passes) > 1:
        lines += [
            f"    without = network({seen}, t, **unconditional).sample",
            f"    prediction = without + {deployment.guidance!r} * (prediction - without)",
        ]
    eta = f", eta={deployment.eta!r}" if deployment.sampler == "ddim" and deployment.eta else ""
    drawn = ", generator=generator" if deployment.sampler not in ("pndm", "heun") else ""
    lines += [f"    x = scheduler.step(prediction, t, x{eta}{drawn}).prev_sample", "print(x.shape)"]
    return "\n".join(lines)


def in_a_pipeline() -> str:
    """The bundle in a pipeline that somebody has loaded."""
    return "\n".join(
        [
            "from mezzotint.diffusers import attach",
            "",
            "# `pipe`: the pipeline that the network came from, loaded with torch_dtype=torch.float32, on the CPU.",
            'attach(pipe, ".")',
        ]
    )


def _only_here(manifest: Mapping[str, Any]) -> bool:
    """Whether no scheduler of diffusers can apply the correction (runtime/diffusers/scheduler.py)."""
    form, sampler = manifest.get("noise", {}).get("form"), manifest["deployment"]["sampler"]
    return (form, sampler) == ("ptqd-released", "ddim")


def _keywords(manifest: Mapping[str, Any], conditions: Sequence[str]) -> list[str]:
    """The conditions as a diffusers network takes them: those of its own call, and SDXL's in a dict of their own."""
    direct = [name for name in conditions if name in ("encoder_hidden_states", "class_labels")]
    added = [name for name in conditions if name not in direct]
    rows = [f"    {_quoted(n)}: torch.from_numpy({_array(manifest, n, None)})," for n in direct]
    if added:
        inner = [f"        {_quoted(n)}: torch.from_numpy({_array(manifest, n, None)})," for n in added]
        rows += ['    "added_cond_kwargs": {', *inner, "    },"]
    return rows


def _array(manifest: Mapping[str, Any], name: str, rows: int | None) -> str:
    """An expression for an input: random where it is floating, zeros where it counts something."""
    dtype, shape = manifest["inputs"][name]["dtype"], tuple(_shape(manifest, name, rows))
    if dtype.startswith("float"):
        return f"rng.standard_normal({shape}).astype(np.{dtype})"
    return f"np.{'ones' if dtype == 'bool' else 'zeros'}({shape}, np.{dtype if dtype != 'bool' else 'bool_'})"


def _timestep(manifest: Mapping[str, Any], t: float) -> str:
    """An expression for one timestep in the shape that the graph declares: [], [1] or [batch]."""
    told = manifest["inputs"][manifest["signature"]["timestep"]]
    if not told["shape"]:
        return f"np.array({t!r}, np.{told['dtype']})"
    return f"np.full({tuple(_shape(manifest, manifest['signature']['timestep'], None))}, {t!r}, np.{told['dtype']})"


def _shape(manifest: Mapping[str, Any], name: str, rows: int | None) -> list[int]:
    """The sizes of an input in an example, `rows` in front unless None: then what the graph says, or BATCH."""
    sample = manifest["inputs"][manifest["signature"]["sample"]]["shape"]
    batch = sample[0] if isinstance(sample[0], int) else BATCH
    known = {d: n for d, n in zip(sample, (batch, *manifest["sample_shape"]), strict=True) if isinstance(d, str)}
    first, *rest = manifest["inputs"][name]["shape"]
    sizes = manifest["sample_shape"] if name == manifest["signature"]["sample"] else rest
    front = rows if rows is not None else first if isinstance(first, int) else batch
    return [front, *(n if isinstance(n, int) else known.get(n, TOKENS) for n in sizes)]


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
