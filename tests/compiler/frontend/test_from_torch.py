"""diffusers models become ONNX graphs that agree with torch, keep their names, and say nothing about this machine."""

from __future__ import annotations

import json
import site
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch

from mezzotint import compile_model
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.verify import relative_difference
from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend import from_torch as front
from mezzotint.compiler.frontend.torch_export import OUTPUT
from mezzotint.runtime.bundle.model_config import CONFIG
from mezzotint.runtime.sampling.deployment import Deployment, usual_sampler
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import ClassLabels, Signature
from tests.helpers.models import SMALL, THREADS, Compiled, prompts, small_unet

SCHEDULE = Schedule.named("ddpm-linear")
TOLERANCE = 1e-4  # of the largest output: float32 kernels of two libraries
Import = Callable[..., Program]


@pytest.fixture
def load(tmp_path: Path) -> Import:
    def run(model: torch.nn.Module, schedule: Schedule = SCHEDULE, **options: Any) -> Program:
        deployment = Deployment.of(schedule, usual_sampler(schedule), 4)
        return front.import_torch(model, tmp_path, schedule=schedule, deployment=deployment, threads=2, **options)

    return run


def torch_output(module: Any, x: npt.NDArray[np.float32], t: float, **conditions: npt.NDArray[Any]) -> npt.NDArray[Any]:
    training = module.training
    module.eval()
    given = {name: torch.from_numpy(array) for name, array in conditions.items()}
    with torch.no_grad():
        output = module(torch.from_numpy(x), torch.full((len(x),), t), **given, return_dict=False)[0]
    module.train(training)
    return np.asarray(output.numpy())


def noise(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def float_unet(unet: Compiled) -> Denoiser:
    return Denoiser(unet.exported, unet.bundle.signature, threads=THREADS)


@pytest.fixture(scope="module")
def float_conditional(conditional: Compiled) -> Denoiser:
    return Denoiser(conditional.exported, conditional.bundle.signature, threads=THREADS)


@pytest.mark.parametrize("t", [0, 7, 999])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 8, 8), (5, 16, 12)])
def test_a_unet_agrees_with_torch(
    unet: Compiled, float_unet: Denoiser, t: int, batch: int, height: int, width: int
) -> None:
    x = noise(batch, 1, height, width)

    assert relative_difference(torch_output(unet.module, x, t), float_unet(x, t)) < TOLERANCE


@pytest.mark.parametrize("t", [0, 500])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 8, 8), (5, 4, 12)])
def test_a_conditional_unet_agrees_with_torch(
    conditional: Compiled, float_conditional: Denoiser, t: int, batch: int, height: int, width: int
) -> None:
    x, given = noise(batch, 4, height, width), {"encoder_hidden_states": prompts(batch)}

    got = float_conditional(x, t, **given)

    assert relative_difference(torch_output(conditional.module, x, t, **given), got) < TOLERANCE


def test_names_and_bytes_are_those_of_diffusers(unet: Compiled, conditional: Compiled) -> None:
    assert unet.bundle.signature == Signature("sample", "timestep", OUTPUT)
    assert conditional.bundle.signature.conditions == ("encoder_hidden_states",)
    for compiled, name in ((unet, "UNet2DModel"), (conditional, "UNet2DConditionModel")):
        source = compiled.bundle.manifest.source
        distinct = {p.detach().numpy().tobytes() for p in compiled.module.parameters()}
        assert (source.kind, source.class_name) == ("diffusers", name)
        assert source.parameter_bytes >= sum(len(b) for b in distinct)


def test_the_configuration_goes_into_the_bundle(unet: Compiled, conditional: Compiled, hand: Compiled) -> None:
    for compiled in (unet, conditional):
        theirs = json.loads(compiled.module.to_json_string())
        text = (compiled.bundle.path / CONFIG).read_text()
        assert json.loads(text) == {key: value for key, value in theirs.items() if key != "_use_default_values"}
        assert list(json.loads(text)) == sorted(theirs)
        assert CONFIG in compiled.bundle.manifest.files, "sealed with the rest"
        assert "config" not in compiled.bundle.manifest.source.to_json(), "written once"
    assert not (hand.bundle.path / CONFIG).exists()


def test_nothing_written_names_this_machine(unet: Compiled, conditional: Compiled) -> None:
    here = [Path.cwd(), Path(__file__).parents[3], Path(torch.__file__).parent, Path.home(), *site.getsitepackages()]
    marks = {str(path).encode() for path in here} | {b"site-packages", b"import_torch.py"}
    for compiled in (unet, conditional):
        assert (compiled.bundle.path / "passes" / "000_fx.txt").read_text().startswith("class GraphModule")
        for file in (f for f in compiled.bundle.path.rglob("*") if f.is_file()):
            found = [m for m in marks if m in file.read_bytes()]
            assert not found, f"{file.name} holds {found}"


def small_dit(**changes: Any) -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    config = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "num_layers": 1, "sample_size": 8}
    torch.manual_seed(0)
    return DiTTransformer2DModel(**{**config, **changes}).eval()  # type: ignore[no-any-return]


def test_a_transformer_keeps_its_names_and_predicts_the_noise_only(load: Import, tmp_path: Path) -> None:
    model = small_dit(out_channels=8, num_embeds_ada_norm=10)

    program = load(model, Schedule.named("flow"))

    known = (ClassLabels("class_labels", 10, null=10),)
    names = ("hidden_states", "timestep", OUTPUT, ("class_labels",))
    assert program.signature == Signature(*names, "flow_prediction", labels=known)
    timestep = next(value for value in program.graph.inputs if value.name == "timestep")
    assert program.deployment.whole and timestep.dtype == ir.DataType.FLOAT, "other numbers of steps are not whole"
    assert (program.source["class"], program.source["config"]["out_channels"]) == ("DiTTransformer2DModel", 8)
    assert program.shape == (4, 8, 8)
    x, labels = noise(3, 4, 8, 8), np.array([1, 9, 10])
    want = torch_output(model, x, 7, class_labels=labels)
    with Executor(program.model, tmp_path, threads=THREADS) as executor:
        got = executor.call(program.signature, x, 7, {"class_labels": labels})[OUTPUT]
    assert want.shape == (3, 8, 8, 8) and relative_difference(want[:, :4], got) < TOLERANCE
    assert relative_difference(want[:, 4:], got) > 0.1, "the variances are others"


def test_the_positions_of_a_transformer_have_one_size(load: Import) -> None:
    with pytest.raises(ModelError, match="samples are 8x8, not 16x8"):
        load(small_dit(), size=(16, 8))


def test_double_precision_is_refused(load: Import) -> None:
    with pytest.raises(ModelError, match=r"not in float32: .* is torch\.float64") as caught:
        load(small_unet().double())

    assert ".float()" in (caught.value.hint or "")


def test_other_classes_are_refused(load: Import) -> None:
    with pytest.raises(ModelError, match=r"Linear cannot be exported yet; docs/models\.md lists") as caught:
        load(torch.nn.Linear(2, 2))

    assert ".onnx" in (caught.value.hint or "")


def exporting(graph: Path, change: Callable[[ir.Model], None]) -> Callable[..., tuple[ir.Model, str, list[str]]]:
    """An exporter that makes this graph, with something done to it."""
    model = ir.load(graph)
    change(model)
    return lambda denoiser, example: (model, "", [])


def test_an_export_that_agrees_is_accepted(unet: Compiled, load: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_export", exporting(unet.exported, lambda model: None))

    assert load(unet.module).shape == (1, 8, 8)
    assert unet.module.training, "eval() is undone"


def test_one_weight_off_by_one_per_cent_is_refused(
    unet: Compiled, load: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perturb(model: ir.Model) -> None:
        name = next(n for n in model.graph.initializers if n.endswith("conv_in.weight"))
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=name)

    monkeypatch.setattr(front, "_export", exporting(unet.exported, perturb))

    with pytest.raises(ModelError, match="disagrees with torch at timestep 0: relative difference"):
        load(unet.module)
    assert unet.module.training, "eval() is undone by a failure too"


def test_a_lost_parameter_is_refused(unet: Compiled, load: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(model: ir.Model) -> None:
        name = next(n for n in model.graph.initializers if n.endswith("conv_in.weight"))
        value = model.graph.initializers.pop(name)
        assert value.shape is not None
        shape = ir.Value(name="lost_shape", const_value=ir.tensor(np.array(value.shape.numpy())))
        model.graph.register_initializer(shape)
        zeros = ir.node("ConstantOfShape", [shape])
        zeros.outputs[0].name = "lost"
        model.graph.insert_before(model.graph[0], zeros)
        ir.convenience.replace_all_uses_with(value, zeros.outputs[0])

    monkeypatch.setattr(front, "_export", exporting(unet.exported, lose))

    with pytest.raises(ModelError, match=r"the export holds \d+ bytes of weights, the module \d+"):
        load(unet.module)


def test_a_class_conditional_unet_compiles_with_given_labels(tmp_path: Path) -> None:
    one_level = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    module = small_unet(num_class_embeds=10, add_attention=False, **one_level).eval()
    labels = np.arange(4) % 10

    bundle = compile_model(module, tmp_path / "bundle", conditions={"class_labels": labels}, **SMALL)

    x, t = noise(2, 1, 8, 8), bundle.deployment.timesteps[0]
    denoiser = bundle.denoiser(THREADS)
    first, second = (denoiser(x, t, class_labels=np.array([k, k])) for k in (1, 8))
    assert bundle.signature.conditions == ("class_labels",)
    assert relative_difference(torch_output(module, x, t, class_labels=np.array([1, 1])), first) < 0.2
    assert relative_difference(first, second) > 0.01, "the class still matters"
    assert bundle.sample(2, threads=THREADS, conditions={"class_labels": labels[:2]}).shape == (2, 1, 8, 8)
    inputs = {v.name for v in onnx.load(bundle.model_path).graph.input}
    assert inputs == {"sample", "timestep", "class_labels"}


class TestLoadModel:
    """Model folders."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        small_unet().save_pretrained(tmp_path / "m")  # type: ignore[operator]
        return tmp_path / "m"

    def test_a_saved_model_is_loaded_in_eval_mode(self, folder: Path) -> None:
        loaded = front.load_model(folder)

        assert not loaded.training
        want, got = small_unet().state_dict(), loaded.state_dict()
        assert all(torch.equal(want[name], got[name]) for name in want)

    def test_half_precision_weights_are_widened(self, tmp_path: Path) -> None:
        small_unet().half().save_pretrained(tmp_path / "h")  # type: ignore[operator]

        assert {p.dtype for p in front.load_model(tmp_path / "h").parameters()} == {torch.float32}

    def test_a_truncated_checkpoint_is_refused(self, folder: Path) -> None:
        weights = folder / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])

        with pytest.raises(ModelError, match="diffusers cannot load the model") as caught:
            front.load_model(folder)
        assert caught.value.where == str(folder)
        assert caught.value.hint

    def test_missing_weights_are_refused(self, folder: Path) -> None:
        (folder / "diffusion_pytorch_model.safetensors").unlink()

        with pytest.raises(ModelError, match="the folder has no weights"):
            front.load_model(folder)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"_class_name": "AutoencoderKL"}', "{}"])
    def test_an_odd_configuration_is_refused(self, folder: Path, content: str) -> None:
        (folder / "config.json").write_text(content)

        with pytest.raises(ModelError, match=r"configuration|cannot be exported yet"):
            front.load_model(folder)

    def test_a_configuration_that_does_not_fit_is_refused(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [32, 64]}))

        with pytest.raises(ModelError, match="diffusers cannot load the model"):
            front.load_model(folder)
