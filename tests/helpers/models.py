"""Denoisers for the tests of the front ends, the API and the command line; a pytest plugin (see tests/conftest.py).

An ONNX file written by hand, which compiles in a second, and diffusers models made small. Exporting one of those from
torch takes many seconds, so each is compiled once in a run, by one of its workers.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import typer.main
from onnx import TensorProto, helper, numpy_helper

from mezzotint import Bundle, compile_model, export_model, open_bundle
from mezzotint.cli.app import app
from mezzotint.io.sources import DIGITS
from mezzotint.text import console
from tests.helpers.made_once import made_once

if TYPE_CHECKING:
    import torch

THREADS = 2
SCHEDULER = "ddpm-linear"
SMALL: dict[str, Any] = {"scheduler": SCHEDULER, "steps": 4, "calibration_samples": 2, "threads": THREADS}
"""Options of compile_model for a compilation that takes about a second."""
FAST = (
    *("--scheduler", SCHEDULER, "--steps", "4", "--recipe", "w8a8"),
    *("--calibration-samples", "2", "--threads", str(THREADS)),
)
"""The same for the command line, and the recipe of the bundles below; what comes later counts."""

CHANNELS = 16
CONVS = 4  # the first and the last are islands
TIME_LAYERS = 2  # become tables
INTEGER = CONVS - 2
CONTEXT = 6  # width of the optional condition


def hand_written(
    *,
    opset: int = 13,
    sample: str = "x",
    timestep: str = "t",
    output: str = "y",
    size: tuple[int | str, int | str] = (8, 8),
    batch: int | str = "batch",
    dtype: int = TensorProto.FLOAT,
    time_dtype: int = TensorProto.INT64,
    context: str | None = None,
) -> onnx.ModelProto:
    """A denoiser as somebody else's exporter might write it: convolutions, SiLU, a time branch of two Gemms.

    `context` names a condition `[batch, CONTEXT]` that is added to the time embedding.
    """
    rng = np.random.default_rng(3)
    weights: dict[str, npt.NDArray[Any]] = {
        "frequencies": (0.01 ** (np.arange(8) / 8)).reshape(1, 8).astype(np.float32),
        "column": np.array([1], np.int64),
        "image": np.array([2, 3], np.int64),
    }

    def layer(name: str, *shape: int) -> list[str]:
        fan = int(np.prod(shape[1:]))
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        weights[f"{name}.w"] = (rng.standard_normal(shape) / np.sqrt(fan)).astype(kind)
        weights[f"{name}.b"] = (rng.standard_normal(shape[0]) * 0.1).astype(kind)
        return [f"{name}.w", f"{name}.b"]

    def silu(name: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Sigmoid", [name], [f"{name}.gate"]),
            helper.make_node("Mul", [name, f"{name}.gate"], [f"{name}.act"]),
        ]

    def conv(name: str, source: str, target: str, *shape: int) -> onnx.NodeProto:
        return helper.make_node(
            "Conv", [source, *layer(name, *shape)], [target], name=name, kernel_shape=[3, 3], pads=[1, 1, 1, 1]
        )

    c = CHANNELS
    nodes = [
        helper.make_node("Cast", [timestep], ["number"], to=dtype),
        helper.make_node("Unsqueeze", ["number", "column"], ["numbers"]),
        helper.make_node("Mul", ["numbers", "frequencies"], ["angles"]),
        helper.make_node("Sin", ["angles"], ["waves"]),
        helper.make_node("Gemm", ["waves", *layer("time1", c, 8)], ["emb1"], name="time1", transB=1),
        *silu("emb1"),
        helper.make_node("Gemm", ["emb1.act", *layer("time2", c, c)], ["emb2"], name="time2", transB=1),
    ]
    if context:
        mixed = helper.make_node("Gemm", [context, *layer("mix", c, CONTEXT)], ["mixed"], name="mix", transB=1)
        nodes += [mixed, helper.make_node("Add", ["emb2", "mixed"], ["emb"])]
    nodes += [
        helper.make_node("Unsqueeze", ["emb" if context else "emb2", "image"], ["shift"]),
        conv("first", sample, "h1", c, 1, 3, 3),
        *silu("h1"),
        conv("second", "h1.act", "h2", c, c, 3, 3),
        helper.make_node("Add", ["h2", "shift"], ["h3"]),
        *silu("h3"),
        conv("third", "h3.act", "h4", c, c, 3, 3),
        helper.make_node("Add", ["h4", "h1"], ["h5"]),
        *silu("h5"),
        conv("last", "h5.act", output, 1, c, 3, 3),
    ]
    if dtype != TensorProto.FLOAT:
        weights["frequencies"] = weights["frequencies"].astype(helper.tensor_dtype_to_np_dtype(dtype))
    inputs = [
        helper.make_tensor_value_info(sample, dtype, [batch, 1, *size]),
        helper.make_tensor_value_info(timestep, time_dtype, [batch]),
    ]
    if context:
        inputs.append(helper.make_tensor_value_info(context, dtype, [batch, CONTEXT]))
    graph = helper.make_graph(
        nodes,
        "denoiser",
        inputs,
        [helper.make_tensor_value_info(output, dtype, [batch, 1, *size])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    if opset >= 13:  # before, Unsqueeze had its axes as an attribute
        onnx.checker.check_model(model, full_check=True)
    return model


def write(model: onnx.ModelProto, path: Path, *, external: str | None = None) -> Path:
    """Save a model; with `external`, its weights in a file of that name beside it."""
    if external is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    return path


def small_unet(**changes: Any) -> torch.nn.Module:
    """A UNet2DModel of 0.28 M parameters for 1x8x8 samples, seeded."""
    import torch
    from diffusers import UNet2DModel

    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (32, 32),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    return UNet2DModel(**{**config, **changes})  # type: ignore[no-any-return]


def small_conditional_unet(**changes: Any) -> torch.nn.Module:
    """A UNet2DConditionModel of 0.36 M parameters for 4x8x8 latents and prompts of width 16, seeded."""
    import torch
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 32),
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **changes})  # type: ignore[no-any-return]


PROMPT = 77  # tokens
WIDTH, CLASSES = 32, 10  # of the transformer


def prompts(rows: int) -> npt.NDArray[np.float32]:
    """Random prompt embeddings for `small_conditional_unet`, float32 `[rows, PROMPT, 16]`."""
    return np.random.default_rng(5).standard_normal((rows, PROMPT, 16)).astype(np.float32)


@dataclass(frozen=True)
class Compiled:
    """A source, the float graph that its front end made, and the W8A8 bundle."""

    module: Any
    exported: Path
    bundle: Bundle


@pytest.fixture(scope="session")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The hand-written ONNX file, compiled by `w8a8`; `module` is None."""
    folder = tmp_path_factory.mktemp("hand")
    source = write(hand_written(), folder / "hand.onnx")
    return Compiled(None, source, compile_model(source, folder / "bundle", recipe="w8a8", **SMALL))


@pytest.fixture(scope="session")
def exported_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits, a diffusers folder whose network is an ONNX file: exporting it takes many seconds."""

    def make(folder: Path) -> None:
        shutil.copytree(DIGITS, folder / "digits", ignore=shutil.ignore_patterns("*.safetensors"))
        export_model("digits", folder / "digits" / "unet" / "model.onnx")

    return made_once(tmp_path_factory, "digits", make) / "digits"


@pytest.fixture(scope="session")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A small UNet2DModel, compiled from memory by `w8a8`; it was in training mode."""
    return _from_memory(tmp_path_factory, "unet", small_unet().train())


@pytest.fixture(scope="session")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A small UNet2DConditionModel, compiled from memory by `w8a8`."""
    given = {"encoder_hidden_states": prompts(2)}
    return _from_memory(tmp_path_factory, "conditional", small_conditional_unet().eval(), conditions=given)


def _from_memory(factory: pytest.TempPathFactory, name: str, module: torch.nn.Module, **options: Any) -> Compiled:
    """Return a module with its float graph and its bundle, by one compilation for all workers."""

    def make(folder: Path) -> None:
        compile_model(module, folder / "bundle", recipe="w8a8", export=folder / "float.onnx", **options, **SMALL)

    folder = made_once(factory, name, make)
    return Compiled(module, folder / "float.onnx", open_bundle(folder / "bundle"))


@pytest.fixture(scope="session")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of two blocks for 4x8x8 latents, conditioned on a class, as torch's exporter writes it."""
    return made_once(tmp_path_factory, "dit", lambda folder: _export_dit(folder / "dit.onnx")) / "dit.onnx"


def _export_dit(file: Path) -> None:
    import torch
    from diffusers import DiTTransformer2DModel

    class Denoiser(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
            given = {"timestep": timestep, "class_labels": class_labels}
            return self.model(sample, **given, return_dict=False)[0]  # type: ignore[no-any-return]

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": WIDTH // 4, "num_layers": 2, "sample_size": 8}
    model = DiTTransformer2DModel(in_channels=4, out_channels=4, num_embeds_ada_norm=CLASSES, patch_size=2, **sizes)
    example = (torch.randn(3, 4, 8, 8), torch.tensor([5, 5, 5]), torch.tensor([1, 2, 3]))
    names = ["sample", "timestep", "class_labels"]
    batch = {0: torch.export.Dim("batch", max=63)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    exported = torch.onnx.export(
        Denoiser(model).eval(),
        example,
        dynamo=True,
        opset_version=21,
        input_names=names,
        output_names=["epsilon"],
        dynamic_shapes=dict.fromkeys(names, batch),
        verbose=False,
    )
    assert exported is not None
    exported.save(file)


@dataclass(frozen=True)
class Answer:
    """What a command said: its exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Cli = Callable[..., Answer]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("compile", path, ...)` runs a command in this process, on a console so wide that no table wraps."""
    for stream in (console.out, console.err):
        monkeypatch.setattr(stream, "width", 1000)

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            typer.main.get_command(app).main([str(a) for a in arguments], prog_name="mezzotint")
        said = capsys.readouterr()
        code = left.value.code
        return Answer(code if isinstance(code, int) else 0 if code is None else 1, said.out, said.err)

    return run
