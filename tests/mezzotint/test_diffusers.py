"""Bundles inside real diffusers pipelines: the same pictures as with the network they were made from, or a reason."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from mezzotint import Bundle, Schedule, compile_model, find_engine, mix_bundles
from mezzotint.diffusers import attach, stand_in
from mezzotint.io.sources import DIGITS
from mezzotint.prompts.texts import read_prompts
from mezzotint.runtime.bundle.bundle import MODEL
from mezzotint.runtime.bundle.model_config import bundle_config
from mezzotint.runtime.bundle.precisions import Precisions
from mezzotint.runtime.compare import psnr_db
from mezzotint.runtime.errors import BundleError, HalfPipeline, InputError, MixedTimesteps, TimestepNotDeployed
from mezzotint.runtime.sampling.samplers import initial_noise, seeded_noise
from tests.helpers import pipelines
from tests.helpers.models import SMALL, Cli, Compiled, hand_written, small_unet, write
from tests.helpers.pipelines import LENGTH, SIDE, WIDTH, quiet

STEPS = 3
TOLERANCE = 2e-5  # of pictures in [0, 1]: float32 kernels of two libraries; 1.1e-6 was the largest difference seen
NEAR_DB = 25.0  # of w8a8 compared with float on random weights after three steps
OPTIONS: dict[str, Any] = {"steps": STEPS, "calibration_samples": 2, "threads": 1}
TEXT = {"prompt": "a cat", "num_inference_steps": STEPS}
Pictures = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """A pipeline with its own network, the float bundle made from that, and the W8A8 one."""

    pipe: Any
    bundle: Bundle
    quantized: Bundle


def pair(pipe: Any, network: Any, folder: Path, conditions: Any, model: Path | None = None) -> Pair:
    """With a `model`, the pipeline's folder, the float bundle is calibrated on the prompts of the package."""
    schedule = Schedule.from_config(pipe.scheduler.config)
    given = {"scheduler": schedule, "conditions": conditions, **OPTIONS}
    exported = folder / "exported" / "model.onnx"
    rows = {} if model is None else {"conditions": None, "prompts": "default"}
    bundle = compile_model(
        network if model is None else model, folder / "float", recipe="float", export=exported, **{**given, **rows}
    )
    # As others lay out ONNX models: the graph and the configuration it was exported from in one folder.
    network.save_config(exported.parent)
    quantized = compile_model(exported.parent, folder / "w8a8", recipe="w8a8", size=(SIDE, SIDE), **given)
    return Pair(pipe, bundle, quantized)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("sd")
    pipe = pipelines.stable_diffusion(folder)
    pipe.save_pretrained(folder / "pipe")
    return pair(pipe, pipe.unet, folder, "random", folder / "pipe")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("sdxl")
    pipe = pipelines.stable_diffusion_xl(folder)
    return pair(pipe, pipe.unet, folder, "random")


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pipe = pipelines.diffusion_transformer()
    return pair(pipe, pipe.transformer, tmp_path_factory.mktemp("dit"), {"class_labels": np.arange(2)})


@pytest.fixture(scope="module")
def digits(exported_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """In float: rounding to 8 bits would turn the last bit of a latent into a step of a quantizer."""
    folder = tmp_path_factory.mktemp("digits") / "bundle"
    return compile_model(exported_digits, folder, recipe="float", size=(32, 32), **OPTIONS)


def with_bundle(pipe: Any, bundle: Bundle) -> Any:
    """Another pipeline of the same parts, whose network is the bundle."""
    return attach(quiet(type(pipe)(**pipe.components, **_flags(pipe))), bundle, threads=1)


def _flags(pipe: Any) -> dict[str, Any]:
    return {"requires_safety_checker": False} if "requires_safety_checker" in pipe.config else {}


def kin(pipe: Any, name: str) -> Any:
    """The pipeline of another task with the same parts, as diffusers' own from_pipe makes it."""
    return quiet(getattr(diffusers, name)(**pipe.components, **_flags(pipe)))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def pictures(pipe: Any, **call: Any) -> Pictures:
    """float32 `[n, H, W, C]` in [0, 1]."""
    return np.asarray(pipe(generator=seeded(), output_type="np", **call).images)


def photo() -> Image.Image:
    pixels = np.random.default_rng(4).integers(0, 256, (2 * SIDE, 2 * SIDE, 3), np.uint8)
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    return Image.fromarray(np.tile(np.repeat(np.array([0, 255], np.uint8), SIDE), (2 * SIDE, 1)))


EDIT: dict[str, Any] = {**TEXT, "image": photo(), "strength": 0.9}
FILL: dict[str, Any] = {**EDIT, "mask_image": mask(), "height": 2 * SIDE, "width": 2 * SIDE}
TASKS = [
    ("sd", "StableDiffusionPipeline", TEXT),
    ("sd", "StableDiffusionPipeline", {**TEXT, "guidance_scale": 1.0, "num_images_per_prompt": 2}),
    ("sd", "StableDiffusionImg2ImgPipeline", EDIT),
    ("sd", "StableDiffusionInpaintPipeline", FILL),
    ("sdxl", "StableDiffusionXLPipeline", TEXT),
    ("sdxl", "StableDiffusionXLImg2ImgPipeline", EDIT),
    ("sdxl", "StableDiffusionXLInpaintPipeline", FILL),
    ("dit", "DiTPipeline", {"class_labels": [3, 4], "num_inference_steps": STEPS}),
    ("dit", "DiTPipeline", {"class_labels": [3, 4], "num_inference_steps": STEPS, "guidance_scale": 1.0}),
]


@pytest.mark.parametrize(("model", "name", "call"), TASKS)
def test_the_pictures_are_those_of_the_network(
    request: pytest.FixtureRequest, model: str, name: str, call: dict[str, Any]
) -> None:
    """Classifier-free guidance is on where the call does not switch it off: both halves are one batch."""
    made: Pair = request.getfixturevalue(model)
    pipe = kin(made.pipe, name)
    want = pictures(pipe, **call)

    got = pictures(with_bundle(pipe, made.bundle), **call)
    near = pictures(with_bundle(pipe, made.quantized), **call)

    assert want.std() > 0.05, "there is a picture to compare"
    assert np.abs(got - want).max() < TOLERANCE
    assert not np.array_equal(near, got)
    assert psnr_db(want, near, peak=1.0).min() > NEAR_DB


@pytest.mark.parametrize("model", ["sd", "sdxl", "dit"])
def test_a_prediction_off_by_one_per_cent_shows(request: pytest.FixtureRequest, model: str) -> None:
    made: Pair = request.getfixturevalue(model)
    call = next(call for task, _, call in TASKS if task == model)
    pipe = with_bundle(made.pipe, made.bundle)
    network = pipe.transformer if model == "dit" else pipe.unet
    exact = network.denoiser
    network.denoiser = lambda x, t, **given: np.float32(1.01) * exact(x, t, **given)

    assert np.abs(pictures(pipe, **call) - pictures(made.pipe, **call)).max() > TOLERANCE


def our_noise(seed: int) -> Callable[..., torch.Tensor]:
    """In the place of diffusers' randn_tensor: the noise that `Bundle.sample` draws, in its order."""
    drawn = 0

    def draw(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return torch.from_numpy(initial_noise(seed, shape) if drawn == 1 else seeded_noise(seed)(drawn - 2, shape))

    return draw


@pytest.mark.parametrize(
    ("name", "scheduler", "sampler", "eta"),
    [
        ("DDIMPipeline", "DDIMScheduler", "ddim", 0.0),
        ("DDIMPipeline", "DDIMScheduler", "ddim", 1.0),
        ("DDPMPipeline", "DDPMScheduler", "ddpm", 0.0),
    ],
)
@pytest.mark.parametrize("fault", [0.0, 0.01])
def test_digits_are_those_of_our_own_loop(
    digits: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    scheduler: str,
    sampler: str,
    eta: float,
    fault: float,
) -> None:
    draw = our_noise(11)
    for module in ("pipelines.ddim.pipeline_ddim", "pipelines.ddpm.pipeline_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", draw)
    for module in ("scheduling_ddim", "scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", draw)
    steps = getattr(diffusers, scheduler).from_config(dict(digits.schedule.config))
    unet: Any = stand_in(digits, threads=1)
    pipe = quiet(getattr(diffusers, name)(unet=unet, scheduler=steps))
    if fault:
        exact = unet.denoiser
        unet.denoiser = lambda x, t: np.float32(1 + fault) * exact(x, t)
    given = {"eta": eta} if name == "DDIMPipeline" else {}

    got = pipe(batch_size=2, num_inference_steps=STEPS, output_type="np", **given).images

    ours = digits.sample(2, sampler=sampler, eta=eta, seed=11, correction=False, threads=1)
    want = np.clip(ours / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    assert (np.abs(got - want).max() < 1e-5) == (fault == 0)


class TestPrompts:
    """The bundle of `sd` was calibrated on prompts: the first two of the package's own."""

    def test_the_manifest_says_so(self, sd: Pair) -> None:
        facts = sd.bundle.manifest.calibration.prompts

        assert (facts["count"], facts["pipeline"]) == (2, "StableDiffusionPipeline")
        assert facts["sha256"] == read_prompts("default").first(2).digest
        assert len(facts["encoders_sha256"]) == 64
        assert sd.quantized.manifest.calibration.prompts == {}
        assert "prompts" not in sd.quantized.manifest.to_json()["calibration"]

    def test_an_evaluation_is_given_them(self, sd: Pair, cli: Cli, tmp_path: Path) -> None:
        folder = sd.bundle.path.parent
        reference = folder / "exported" / "model.onnx"
        call = ["eval", sd.quantized.path, "--reference", reference, "-n", 2, "--batch", 2, "--no-speed"]
        call += ["--features", "none", "--threads", 1, "--json"]
        with torch.no_grad():
            rows = sd.pipe.encode_prompt(list(read_prompts("default").prompts[:2]), "cpu", 1, False)[0].numpy()
        np.savez(tmp_path / "rows.npz", encoder_hidden_states=rows)

        got = cli(*call, "--prompts", "default", "--pipeline", folder / "pipe")
        want = cli(*call, "--conditions", tmp_path / "rows.npz")

        assert got.code == want.code == 0, got.err
        assert json.loads(got.out)["metrics"] == json.loads(want.out)["metrics"]
        refused = cli(*call, "--prompts", "default")
        assert refused.code == 2 and "give --pipeline FOLDER" in refused.err


class TestAttach:
    """What `attach` asks of a pipeline."""

    def test_it_changes_and_returns_the_pipeline(self, sd: Pair) -> None:
        pipe = kin(sd.pipe, "StableDiffusionPipeline")

        assert attach(pipe, sd.bundle.path) is pipe
        assert (pipe.dtype, pipe.device) == (torch.float32, torch.device("cpu"))
        assert pipe.to("cpu") is pipe
        assert attach(pipe, sd.quantized).unet.bundle is sd.quantized, "another bundle of the same model"

    def test_the_float_network_need_not_be_loaded(self, sd: Pair, tmp_path: Path) -> None:
        sd.pipe.save_pretrained(tmp_path)
        shutil.rmtree(tmp_path / "unet")
        load = diffusers.StableDiffusionPipeline.from_pretrained

        pipe = quiet(load(tmp_path, unet=stand_in(sd.bundle, threads=1), torch_dtype=torch.float32))

        assert np.abs(pictures(pipe, **TEXT) - pictures(sd.pipe, **TEXT)).max() < TOLERANCE

    def test_another_engine_draws_the_same(self, sd: Pair) -> None:
        pytest.importorskip("openvino")
        pipe = kin(sd.pipe, "StableDiffusionPipeline")

        attach(pipe, sd.bundle, threads=1, engine=find_engine("openvino"))

        assert pipe.unet.denoiser.usage.engine == "openvino"
        assert np.abs(pictures(pipe, **TEXT) - pictures(sd.pipe, **TEXT)).max() < TOLERANCE

    def test_the_size_of_the_pictures_is_the_pipelines(self, sd: Pair) -> None:
        pipe = kin(sd.pipe, "StableDiffusionPipeline")
        pipe.unet = copy.copy(pipe.unet)
        pipe.unet.register_to_config(sample_size=2 * SIDE)

        assert pictures(attach(pipe, sd.bundle), **TEXT).shape == (1, 4 * SIDE, 4 * SIDE, 3)

    def test_another_configuration_is_refused(self, sd: Pair) -> None:
        pipe = kin(sd.pipe, "StableDiffusionPipeline")
        pipe.unet = pipelines.unet(block_out_channels=(32, 32), mid_block_type="UNetMidBlock2DCrossAttn")

        with pytest.raises(InputError, match="another configuration") as caught:
            attach(pipe, sd.bundle)

        assert "block_out_channels is [32, 32], in the bundle [32, 64]" in caught.value.what
        assert "mid_block_type is 'UNetMidBlock2DCrossAttn', in the bundle 'absent'" in caught.value.what
        assert "cross_attention_dim" not in caught.value.what
        assert caught.value.hint
        assert type(pipe.unet).__name__ == "UNet2DConditionModel", "the pipeline is as it was"

    def test_another_bundle_in_place_is_compared_too(self, sd: Pair, sdxl: Pair) -> None:
        pipe = with_bundle(sd.pipe, sd.bundle)

        with pytest.raises(InputError, match="addition_embed_type"):
            attach(pipe, sdxl.bundle)

    def test_many_differences_are_counted(self, sd: Pair, sdxl: Pair) -> None:
        with pytest.raises(InputError, match=r"; and \d+ more"):
            attach(kin(sd.pipe, "StableDiffusionPipeline"), sdxl.bundle)

    def test_another_class_is_refused(self, sd: Pair) -> None:
        pipe = diffusers.DDPMPipeline(unet=small_unet(), scheduler=diffusers.DDPMScheduler())

        with pytest.raises(InputError, match="unet is a UNet2DModel, the bundle was made from a UNet2DConditionModel"):
            attach(pipe, sd.bundle)

    def test_a_pipeline_without_the_network_is_refused(self, sd: Pair, dit: Pair) -> None:
        with pytest.raises(InputError, match=r"DiTPipeline has no unet to replace: it has transformer, vae"):
            attach(dit.pipe, sd.bundle)
        empty = diffusers.StableDiffusionPipeline(**{**sd.pipe.components, "unet": None}, **_flags(sd.pipe))
        with pytest.raises(InputError, match="has no unet") as caught:
            attach(empty, sd.bundle)
        assert "unet=stand_in(bundle)" in (caught.value.hint or "")
        with pytest.raises(InputError, match="int has no unet to replace: it has no components"):
            attach(3, sd.bundle)

    @pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
    def test_double_precision_is_refused(self, sd: Pair, part: str) -> None:
        pipe = kin(sd.pipe, "StableDiffusionPipeline")
        setattr(pipe, part, copy.deepcopy(getattr(pipe, part)).double())

        with pytest.raises(InputError, match=rf"pipeline's {part} is in torch\.float64") as caught:
            attach(pipe, sd.bundle)
        assert "torch_dtype=torch.float32" in (caught.value.hint or "")

    def test_another_device_is_refused(self, sd: Pair) -> None:
        pipe = kin(sd.pipe, "StableDiffusionPipeline")
        pipe.vae = copy.deepcopy(pipe.vae).to("meta")

        with pytest.raises(InputError, match="vae lies on meta"):
            attach(pipe, sd.bundle)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"prediction_type": "v_prediction"}, "DDIMScheduler has prediction_type 'v_prediction', the bundle 'eps"),
            ({"num_train_timesteps": 500}, "has num_train_timesteps 500, the bundle 1000"),
        ],
    )
    def test_another_scheduler_is_refused(self, sd: Pair, change: dict[str, Any], complaint: str) -> None:
        pipe = kin(sd.pipe, "StableDiffusionPipeline")
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **change)

        with pytest.raises(InputError, match=complaint):
            attach(pipe, sd.bundle)

    def test_a_bundle_that_does_not_know_its_model_is_refused(self, hand: Compiled) -> None:
        with pytest.raises(InputError, match="keeps no configuration") as caught:
            stand_in(hand.bundle)
        assert "config.json" in (caught.value.hint or "")

    def test_a_bundle_of_a_model_without_a_stand_in_is_refused(self, tmp_path: Path) -> None:
        write(hand_written(), tmp_path / "model.onnx")
        (tmp_path / "config.json").write_text('{"_class_name": "PriorTransformer"}')
        bundle = compile_model(tmp_path, tmp_path / "bundle", recipe="float", **SMALL)

        with pytest.raises(InputError, match="PriorTransformer can use a bundle; UNet2DModel, "):
            stand_in(bundle)

    def test_a_path_that_holds_no_bundle(self, sd: Pair, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"no mezzotint\.json"):
            attach(sd.pipe, tmp_path)


class TestCall:
    """What the stand-in answers, and what it refuses when it is called."""

    @pytest.fixture
    def unet(self, sd: Pair) -> Any:
        return stand_in(sd.bundle, threads=1)

    @pytest.fixture
    def inputs(self, sd: Pair) -> dict[str, Any]:
        generator = seeded()
        return {
            "sample": torch.randn(2, 4, SIDE, SIDE, generator=generator),
            "timestep": torch.tensor(sd.bundle.deployment.timesteps[0]),
            "encoder_hidden_states": torch.randn(2, pipelines.LENGTH, pipelines.WIDTH, generator=generator),
        }

    @pytest.mark.parametrize("form", [int, float, lambda t: t[None], lambda t: t.repeat(2), torch.Tensor.float])
    def test_it_is_called_like_the_network(
        self, sd: Pair, unet: Any, inputs: dict[str, Any], form: Callable[[Any], Any]
    ) -> None:
        given = {**inputs, "timestep": form(inputs["timestep"])}
        with torch.no_grad():
            want = sd.pipe.unet(**given)

        got = unet(**given)

        assert type(got) is type(want)
        assert torch.allclose(got.sample, want.sample, rtol=0, atol=TOLERANCE * float(want.sample.abs().max()))
        assert torch.equal(unet(*given.values(), return_dict=False)[0], got.sample)

    def test_tensors_are_not_copied(self, unet: Any, inputs: dict[str, Any]) -> None:
        seen: list[Any] = []
        made: list[Any] = []
        exact = unet.denoiser

        def watch(x: Any, t: Any, **given: Any) -> Any:
            seen.extend([x, *given.values()])
            made.append(exact(x, t, **given))
            return made[0]

        unet.denoiser = watch
        got = unet(**inputs).sample

        assert [a.ctypes.data for a in seen] == [inputs[n].data_ptr() for n in ("sample", "encoder_hidden_states")]
        assert got.data_ptr() == made[0].ctypes.data

    def test_other_layouts_mean_the_same(self, unet: Any, inputs: dict[str, Any]) -> None:
        want = unet(**inputs).sample

        got = unet(**{**inputs, "sample": inputs["sample"].to(memory_format=torch.channels_last)}).sample

        assert torch.equal(got, want)

    def test_conditions_may_have_a_history_where_nobody_asks_for_gradients(
        self, unet: Any, inputs: dict[str, Any]
    ) -> None:
        inputs["sample"].requires_grad_()

        with torch.no_grad():
            assert not unet(**inputs).sample.requires_grad
        with pytest.raises(InputError, match="'sample' requires a gradient") as caught:
            unet(**inputs)
        assert "no_grad" in (caught.value.hint or "")

    @pytest.mark.parametrize("name", ["sample", "encoder_hidden_states"])
    def test_what_lies_on_another_device_is_refused(self, unet: Any, inputs: dict[str, Any], name: str) -> None:
        inputs[name] = inputs[name].to("meta")

        with pytest.raises(InputError, match=rf"lies on meta\n.*{name}\n.*pipe\.to\('cpu'\)"):
            unet(**inputs)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_halves_are_widened_and_the_prediction_rounded(
        self, unet: Any, inputs: dict[str, Any], dtype: torch.dtype
    ) -> None:
        halves = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        wide = {name: value.float() if value.is_floating_point() else value for name, value in halves.items()}

        with pytest.warns(HalfPipeline, match=f"{dtype}"):
            got = unet(**halves).sample
        assert got.dtype is dtype and torch.equal(got, unet(**wide).sample.to(dtype))

    def test_mixed_timesteps_are_refused(self, sd: Pair, unet: Any, inputs: dict[str, Any]) -> None:
        inputs["timestep"] = torch.tensor(sd.bundle.deployment.timesteps[:2])

        with pytest.raises(MixedTimesteps, match="one call has one timestep"):
            unet(**inputs)

    @pytest.mark.parametrize(
        ("name", "value", "hint"),
        [
            ("timestep_cond", torch.zeros(2, 8), "compiled without it"),
            ("attention_mask", torch.zeros(2, 77), "all ones"),
            ("encoder_attention_mask", torch.zeros(2, 77), "all ones"),
            ("cross_attention_kwargs", {"scale": 0.5}, "fuse a LoRA"),
            ("down_block_additional_residuals", (torch.zeros(1),), "ControlNets"),
            ("mid_block_additional_residual", torch.zeros(1), "ControlNets"),
            ("down_intrablock_additional_residuals", (torch.zeros(1),), "ControlNets"),
            ("class_labels", torch.tensor([1, 1]), "without it"),
            ("added_cond_kwargs", {"image_embeds": torch.zeros(2, 4)}, "IP adapters"),
        ],
    )
    def test_what_reaches_into_the_layers_is_refused(
        self, unet: Any, inputs: dict[str, Any], name: str, value: Any, hint: str
    ) -> None:
        what = "image_embeds" if name == "added_cond_kwargs" else name

        with pytest.raises(InputError, match=f"a bundle cannot use {what}") as caught:
            unet(**inputs, **{name: value})
        assert hint in (caught.value.hint or "")

    def test_empty_keywords_are_none(self, unet: Any, inputs: dict[str, Any]) -> None:
        assert torch.equal(unet(**inputs, cross_attention_kwargs={}).sample, unet(**inputs).sample)

    def test_a_missing_condition_is_refused(self, unet: Any, inputs: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="missing a required argument: 'encoder_hidden_states'"):
            unet(inputs["sample"], inputs["timestep"])
        inputs["encoder_hidden_states"] = None
        with pytest.raises(
            InputError, match=r"conditions \[\] were given, the model takes \['encoder_hidden_states'\]"
        ):
            unet(**inputs)

    def test_another_number_of_steps_says_what_works(self, sd: Pair) -> None:
        pipe = with_bundle(sd.pipe, sd.bundle)

        with pytest.raises(TimestepNotDeployed, match="timestep 801 has no row") as caught:
            pictures(pipe, prompt="a cat", num_inference_steps=5)

        assert "num_inference_steps=1 or 3, " in (caught.value.hint or "")
        assert "'leading' and steps_offset 1" in (caught.value.hint or "")


class TestModule:
    """What pipelines and their users do with a network besides calling it."""

    @pytest.fixture
    def pipe(self, sd: Pair) -> Any:
        return with_bundle(sd.pipe, sd.bundle)

    @pytest.mark.parametrize(
        ("move", "complaint"),
        [
            (lambda module: module.to("meta"), "cannot move to meta"),
            (lambda module: module.to(torch.device("meta"), torch.float32), "cannot move to meta"),
            (lambda module: module.double(), r"cannot become torch\.float64"),
        ],
    )
    def test_it_stays_where_and_what_it_is(self, pipe: Any, move: Callable[[Any], Any], complaint: str) -> None:
        with pytest.raises(InputError, match=complaint) as caught:
            move(pipe.unet)
        assert caught.value.hint

    def test_a_pipeline_takes_it_along_to_a_half_only(self, sd: Pair, digits: Bundle) -> None:
        pipe = diffusers.DDIMPipeline(unet=stand_in(digits), scheduler=diffusers.DDIMScheduler())

        with pytest.raises(InputError, match="cannot become"):
            pipe.to(torch.float64)
        with pytest.warns(HalfPipeline, match="float16"):
            pipe.to(torch.float16)
        assert pipe.dtype is torch.float16

    def test_it_may_be_told_what_it_is(self, pipe: Any) -> None:
        unet = pipe.unet

        assert unet.to("cpu").float().eval().requires_grad_(False) is unet
        assert unet.to(memory_format=torch.channels_last) is unet
        assert list(unet.parameters()) == []

    def test_its_configuration_is_that_of_the_network(self, sd: Pair, sdxl: Pair, dit: Pair) -> None:
        for made in (sd, sdxl):
            network, unet = made.pipe.unet, stand_in(made.bundle)
            ours = {k: v for k, v in unet.config.items() if not k.startswith("_")}
            theirs = json.loads(network.to_json_string())
            assert ours == {k: v for k, v in theirs.items() if not k.startswith("_")}
        widths = [net.add_embedding.linear_1.in_features for net in (stand_in(sdxl.bundle), sdxl.pipe.unet)]
        assert widths[0] == widths[1]
        assert stand_in(dit.bundle).config.out_channels == 4, "the channels that it returns"
        assert (bundle_config(dit.bundle) or {})["out_channels"] == 8, "those of the model that it was made from"

    def test_it_has_no_layers(self, pipe: Any) -> None:
        assert not hasattr(pipe.unet, "conv_in")
        with pytest.raises(AttributeError, match="stands in for a UNet2DConditionModel has no 'enable_freeu': its lay"):
            pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)

    def test_it_cannot_be_saved_as_a_model(self, pipe: Any, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be saved as a diffusers model") as caught:
            pipe.save_pretrained(tmp_path)
        assert "copy the bundle's folder" in (caught.value.hint or "")

    def test_digits_are_read_from_the_folder(self, digits: Bundle) -> None:
        theirs = json.loads((DIGITS / "unet" / "config.json").read_text())

        assert bundle_config(digits) == theirs


class TestSeveralPrecisions:
    """A mixed bundle runs the precision that was chosen for the timestep."""

    def test_each_timestep_has_its_own(self, sd: Pair, tmp_path: Path) -> None:
        exported = sd.bundle.path.parent / "exported" / "model.onnx"
        rows = np.random.default_rng(0).standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
        mixed = mix_bundles(
            {"int": sd.quantized, "float": sd.bundle},
            tmp_path / "mixed",
            reference=exported,
            costs={"int": 0.5, "float": 1.0},
            relax=0.4,
            pictures=1,
            conditions={"encoder_hidden_states": rows},
        )
        assert mixed.precisions is not None and set(mixed.precisions.calls) == {"int", "float"}
        network = stand_in(mixed, threads=1)
        x, words = torch.from_numpy(initial_noise(0, (1, 4, SIDE, SIDE))), torch.from_numpy(rows)
        own = {"int": stand_in(sd.quantized, threads=1), "float": stand_in(sd.bundle, threads=1)}
        for t, name in zip(mixed.deployment.calls, mixed.precisions.calls, strict=True):
            found = {key: net(x, t, words, return_dict=False)[0] for key, net in {**own, "mixed": network}.items()}
            assert torch.equal(found["mixed"], found[name])
            assert not torch.equal(found["int"], found["float"])

    def test_two_calls_at_one_timestep_are_refused(self, sd: Pair) -> None:
        steps = sd.bundle.deployment.solver(sd.bundle.schedule).steps
        twice = [steps[0], steps[1], replace(steps[1], stage=1)]
        broken = copy.copy(sd.bundle)
        broken.deployment = replace(sd.bundle.deployment, calls=tuple(step.timestep for step in twice))
        broken.precisions = Precisions({"a": MODEL, "b": MODEL}, ("a", "a", "b"), tuple(twice))
        with pytest.raises(InputError, match="cannot tell apart"):
            stand_in(broken)
