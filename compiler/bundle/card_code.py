"""The complete programs of a model card, with the names, sizes and types of the bundle's own inputs.

tests/mezzotint/test_recard.py runs each one as it is printed, in the bundle's folder. An open dimension of an input has
the size of the sample's dimension of the same name, or else the length of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.open_sizes import open_size
from mezzotint.runtime.visible import visible

EXAMPLE_BATCH = 1  # rows in an example where the graph does not fix them
EXAMPLE_IMAGES = 2
TOKENS = 77  # the size of an open dimension of a condition: the tokens of a CLIP prompt
NARROW = frozenset({"int4", "uint4"})  # storage types whose MatMuls onnxruntime computes inexactly by default

UNET_SAMPLE = "sample"
"""The name of the sample in the call of a U-Net of diffusers; transformers have others, and other orders."""
TENSORS = (UNET_SAMPLE, "hidden_states")
"""The names of samples that are one tensor in the call; that of Z-Image is a list."""

# Sampler -> (class of diffusers, arguments in addition to the configuration).
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
    "unipc": ("UniPCMultistepScheduler", ""),
}


def plain_onnxruntime(manifest: Manifest, network: str) -> str:
    """Return the program of one network call; `network` is the ONNX file in the bundle's folder."""
    signature, calls = manifest.signature, manifest.deployment.calls
    t = calls[len(calls) // 2]
    lines = ["import numpy as np", "import onnxruntime as ort", ""]
    options = ""
    if manifest.storage is not None and NARROW & set(manifest.storage.types):
        lines += [
            "options = ort.SessionOptions()",
            "# Else onnxruntime rounds what 4-bit MatMuls read to 8 bits, on its own.",
            'options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")',
        ]
        options = "options, "
    lines += [
        f'session = ort.InferenceSession("{network}", {options}providers=["CPUExecutionProvider"])',
        "rng = np.random.default_rng(0)",
        "inputs = {",
    ]
    for name in manifest.require_inputs():
        array = _timestep(manifest, t) if name == signature.timestep else _array(manifest, name, None)
        lines.append(f"    {_quoted(name)}: {array},")
    lines += [
        "}",
        f"[prediction] = session.run([{_quoted(signature.output)}], inputs)",
        "print(prediction.shape, prediction.dtype)",
    ]
    return "\n".join(lines)


def own_runtime(manifest: Manifest) -> str:
    """Return the program that draws images with the bundle's own sampling."""
    signature = manifest.signature
    fixed = manifest.require_inputs()[signature.sample].shape[0]
    lines = ["from mezzotint import open_bundle", "", 'bundle = open_bundle(".")']
    arguments = ""
    if signature.conditions:
        lines = ["import numpy as np", *lines, "rng = np.random.default_rng(0)"]
        roles = ["conditions", *(["unconditional"] if manifest.deployment.guided else [])]
        for role in roles:
            rows = [f"    {_quoted(name)}: {_array(manifest, name, 1)}," for name in signature.conditions]
            lines += [f"{role} = {{", *rows, "}"]
        arguments = "".join(f", {role}={role}" for role in roles)
    shape = [EXAMPLE_IMAGES, *manifest.sample_shape]
    note = f"float32 {shape}, in the model's own range" + ("; one row of a condition serves all" if arguments else "")
    if isinstance(fixed, int):
        note += f"; the network takes {fixed} at once"
    lines += [f"images = bundle.sample({EXAMPLE_IMAGES}, seed=0{arguments})", f"print(images.shape)  # {note}"]
    return "\n".join(lines)


def with_diffusers(manifest: Manifest, correction: bool) -> str:
    """Return a sampling loop with a scheduler of diffusers, and the bundle in the place of the network."""
    deployment = manifest.deployment
    scheduler, more = SCHEDULERS[deployment.sampler]
    correction = correction and not _only_here(manifest)
    conditions = list(manifest.signature.conditions)
    passes = ["conditional", *(["unconditional"] if deployment.guided else [])] if conditions else []
    flow = deployment.sampler == "flow-euler"
    velocity = flow or manifest.signature.prediction.endswith("flow_prediction")
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
    size = ", ".join(map(str, _shape(manifest, manifest.signature.sample, None)))
    # Pipelines of flow matching pass the shift of their sequence's length, and some of them sigmas.
    steps = f"**network.bundle.schedule.timestep_options({deployment.steps})" if velocity else f"{deployment.steps}"
    start = "" if flow else " * scheduler.init_noise_sigma"
    lines += [
        "generator = torch.Generator().manual_seed(0)",
        f"scheduler.set_timesteps({steps})",
        f"x = torch.randn({size}, generator=generator){start}",
        "for t in scheduler.timesteps:",
    ]
    seen = _called(manifest, "x" if flow else "scheduler.scale_model_input(x, t)")
    lines.append(f"    prediction = network({seen}{', **conditional' if conditions else ''}).sample")
    if len(passes) > 1:
        lines += [
            f"    without = network({seen}, **unconditional).sample",
            f"    prediction = without + {deployment.guidance!r} * (prediction - without)",
        ]
    eta = f", eta={deployment.eta!r}" if deployment.sampler == "ddim" and deployment.eta else ""
    drawn = ", generator=generator" if deployment.sampler not in ("pndm", "heun") else ""
    lines += [f"    x = scheduler.step(prediction, t, x{eta}{drawn}).prev_sample", "print(x.shape)"]
    return "\n".join(lines)


def in_a_pipeline() -> str:
    """Return the program that puts the bundle into a loaded pipeline."""
    return "\n".join(
        [
            "from mezzotint.diffusers import attach",
            "",
            "# `pipe`: the pipeline that the network came from, loaded with torch_dtype=torch.float32, on the CPU.",
            'attach(pipe, ".")',
        ]
    )


def _only_here(manifest: Manifest) -> bool:
    """Return whether no scheduler of diffusers can apply the correction (runtime/diffusers/scheduler.py)."""
    form, sampler = manifest.noise.get("form"), manifest.deployment.sampler
    return (form, sampler) == ("ptqd-released", "ddim")


def _called(manifest: Manifest, x: str) -> str:
    """Return sample and timestep as arguments of a diffusers network, with the timestep that its pipeline gives."""
    signature = manifest.signature
    if signature.sample == UNET_SAMPLE:
        return f"{x}, t"
    train = signature.num_train_timesteps
    time = {"steps": "t", "fraction": f"t / {train}", "reversed_fraction": f"1 - t / {train}"}[signature.timestep_unit]
    rows = _shape(manifest, signature.sample, None)[0]
    rows_of_time = f"({time}).expand({rows})" if " " in time else f"{time}.expand({rows})"
    return f"{signature.sample}={x}, {signature.timestep}={rows_of_time}"


def _keywords(manifest: Manifest, conditions: Sequence[str]) -> list[str]:
    """Return the conditions as a diffusers network takes them: arguments of its call, and a dict for those of SDXL."""
    unet = manifest.signature.sample == UNET_SAMPLE
    direct = [name for name in conditions if not unet or name in ("encoder_hidden_states", "class_labels")]
    added = [name for name in conditions if name not in direct]
    rows = [f"    {_quoted(n)}: torch.from_numpy({_array(manifest, n, None)})," for n in direct]
    if added:
        inner = [f"        {_quoted(n)}: torch.from_numpy({_array(manifest, n, None)})," for n in added]
        rows += ['    "added_cond_kwargs": {', *inner, "    },"]
    return rows


def _array(manifest: Manifest, name: str, rows: int | None) -> str:
    """Return an expression for an input: random numbers for a floating type, ones for bool, zeros for integers."""
    dtype, shape = manifest.require_inputs()[name].dtype, tuple(_shape(manifest, name, rows))
    if dtype.startswith("float"):
        if not shape:
            return f"np.array(rng.standard_normal(), np.{dtype})"
        return f"rng.standard_normal({shape}).astype(np.{dtype})"
    return f"np.{'ones' if dtype == 'bool' else 'zeros'}({shape}, np.{dtype if dtype != 'bool' else 'bool_'})"


def _timestep(manifest: Manifest, t: float) -> str:
    """Return an expression for one timestep in the shape that the graph declares: [], [1] or [batch]."""
    name = manifest.signature.timestep
    declared = manifest.require_inputs()[name]
    seen = manifest.signature.network_time(t)
    if not declared.shape:
        return f"np.array({seen!r}, np.{declared.dtype})"
    return f"np.full({tuple(_shape(manifest, name, None))}, {seen!r}, np.{declared.dtype})"


def _shape(manifest: Manifest, name: str, rows: int | None) -> list[int]:
    """Return the sizes of an input in an example. The first is `rows`; for None that of the graph, or EXAMPLE_BATCH."""
    sample = manifest.require_inputs()[manifest.signature.sample].shape
    batch = sample[0] if isinstance(sample[0], int) else EXAMPLE_BATCH
    known = dict(manifest.calibration.sizes)
    known |= {d: n for d, n in zip(sample, (batch, *manifest.sample_shape), strict=True) if isinstance(d, str)}
    declared = manifest.require_inputs()[name].shape
    if not declared:
        return [] if rows is None else [rows]
    first, *rest = declared
    sizes = manifest.sample_shape if name == manifest.signature.sample else rest
    front = rows if rows is not None else first if isinstance(first, int) else batch
    return [front, *(n if isinstance(n, int) else open_size(n, known, TOKENS) for n in sizes)]


def _quoted(name: str) -> str:
    """Return a Python literal; what is not shown as itself is an escape, which Python reads back."""
    return '"' + visible(name.replace("\\", "\\\\").replace('"', '\\"'), None) + '"'
