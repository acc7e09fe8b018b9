"""Compiled for each sampler: what the bundle draws is what the float model draws, its tables hit the right rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from mezzotint import Bundle, compile_model, open_bundle
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.errors import ConditionError, RecipeError, SignatureError
from mezzotint.passes.allocate_steps import AllocateSteps
from mezzotint.runtime.compare import psnr_db
from mezzotint.runtime.errors import CompileWarning, ScheduleError
from mezzotint.runtime.sampling.deployment import SAMPLERS
from mezzotint.runtime.sampling.samplers import initial_noise, sample, seeded_noise
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.session import Denoiser, open_session
from mezzotint.runtime.signature import Images, Timestep, TimestepUnit
from tests.helpers.models import SMALL, THREADS, Compiled, hand_written, small_unet, write
from tests.helpers.tiny import tiny_program

LINEAR = {"beta_schedule": "linear", "clip_sample": True}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
EXACT = 1e-4  # of the largest value of the picture
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("ddim", LINEAR, 5),
    ("ddpm", LINEAR, 5),
    ("euler", SD, 6),
    ("euler", {**SD, "use_karras_sigmas": True}, 60),  # two timesteps round to 0
    ("euler-ancestral", SD, 6),
    ("heun", {**LINEAR, "timestep_spacing": "linspace"}, 5),
    ("heun", {**LINEAR, "timestep_spacing": "leading"}, 5),
    ("dpmpp-2m", {**SD, "use_karras_sigmas": True}, 6),
    ("dpmpp-2m-sde", SD, 6),
    ("pndm", {**SD, "skip_prk_steps": True}, 5),
    ("pndm", SD, 5),
    ("lcm", SD, 4),
    ("flow-euler", FLOW, 5),
    ("unipc", SD, 5),
]
NAMES = [f"{sampler}-{i}" for i, (sampler, _, _) in enumerate(CASES)]
UNET = [CASES[i] for i in (2, 5, 8, 9, 11, 12)]


def compiled(
    source: Path | torch.nn.Module, target: Path, case: tuple[str, dict[str, Any], int], recipe: str, **more: Any
) -> Bundle:
    sampler, config, steps = case
    options: dict[str, Any] = {**SMALL, "scheduler": Schedule.from_config(config), "sampler": sampler, "steps": steps}
    if config is FLOW and isinstance(source, Path):  # else a warning says that steps are assumed
        options["timestep_unit"] = "steps"
    return compile_model(source, target, recipe=recipe, **{**options, **more})


@pytest.fixture(scope="module")
def float_time(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-written denoiser with a float timestep."""
    return write(hand_written(time_dtype=TensorProto.FLOAT), tmp_path_factory.mktemp("float-time") / "m.onnx")


@pytest.fixture(scope="module")
def unet_float_time(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small UNet2DModel as it is imported for a sampler whose timesteps are no integers."""
    folder = tmp_path_factory.mktemp("unet-float-time")
    case = ("euler", SD, 6)
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    module = small_unet(block_out_channels=(32,), **blocks)
    bundle = compiled(module, folder / "bundle", case, "float", export=folder / "unet.onnx")
    assert not bundle.deployment.whole
    return folder / "unet.onnx"


def drawn(model: Path, bundle: Bundle, n: int = 2, late: float = 0.0) -> Images:
    """By the float file, whose timestep branch is computed, as the bundle would; `late` plants wrong timesteps."""
    net = Denoiser(model, bundle.signature, threads=THREADS)

    def predict(x: Images, t: Timestep) -> Images:
        return net(x, t + late)

    x, noise = initial_noise(0, (n, *bundle.sample_shape)), seeded_noise(0)
    return sample(predict, x, bundle.schedule, bundle.deployment, noise=noise)


def check_pictures(found: Images, wanted: Images) -> None:
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT * float(np.abs(wanted).max()))


def check_exact(bundle: Bundle, source: Path) -> None:
    found = bundle.sample(2, threads=THREADS)
    check_pictures(found, drawn(source, bundle))
    late = 3.0 if bundle.deployment.whole else 2.5
    with pytest.raises(AssertionError):
        check_pictures(found, drawn(source, bundle, late=late))


def test_every_sampler_is_compiled() -> None:
    assert {sampler for sampler, _, _ in CASES} == set(SAMPLERS)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_frozen_tables_hit_the_right_rows(
    float_time: Path, tmp_path: Path, case: tuple[str, dict[str, Any], int]
) -> None:
    bundle = compiled(float_time, tmp_path / "b", case, "float")
    deployment = bundle.deployment
    assert bundle.deployed_timesteps == tuple(sorted(deployment.timesteps))
    assert bundle.manifest.deployment.calls == deployment.calls
    check_exact(bundle, float_time)
    assert open_bundle(bundle.path).deployment == deployment


@pytest.mark.parametrize("unit", ["fraction", "reversed_fraction"])
def test_the_unit_of_a_timestep_is_that_of_the_network(float_time: Path, tmp_path: Path, unit: TimestepUnit) -> None:
    """The file takes what the float network takes, also where tables are looked up by it."""
    bundle = compiled(float_time, tmp_path / "b", CASES[12], "float", timestep_unit=unit)
    assert bundle.deployed_timesteps == tuple(sorted(bundle.deployment.timesteps))
    assert open_bundle(bundle.path).signature.timestep_unit == unit
    noise, t = initial_noise(0, (2, *bundle.sample_shape)), bundle.deployment.calls[1]
    seen = t / 1000 if unit == "fraction" else 1 - t / 1000
    [want] = open_session(float_time).run(None, {"x": noise, "t": np.full(2, seen, np.float32)})
    [other] = open_session(float_time).run(None, {"x": noise, "t": np.full(2, t, np.float32)})
    np.testing.assert_allclose(bundle.denoiser(1)(noise, t), want, atol=EXACT)
    assert np.abs(other - want).max() > 10 * EXACT


def test_a_flow_network_of_unknown_unit_is_compiled_with_a_warning(float_time: Path, tmp_path: Path) -> None:
    with pytest.warns(CompileWarning, match="--timestep-unit fraction"):
        bundle = compiled(float_time, tmp_path / "b", CASES[12], "float", timestep_unit=None)
    assert bundle.signature.timestep_unit == "steps"


@pytest.mark.parametrize("case", [CASES[i] for i in (2, 3, 6, 10, 12)], ids=lambda case: f"{case[0]}-{case[2]}")
def test_the_default_recipe_draws_what_the_float_model_draws(
    float_time: Path, tmp_path: Path, case: tuple[str, dict[str, Any], int]
) -> None:
    """With a row of scales for each timestep."""
    bundle = compiled(float_time, tmp_path / "b", case, "w8a8-steps")
    rows = {q.rows for q in bundle.manifest.quantizers}
    assert max(rows) <= len(bundle.deployment.timesteps)
    wanted = drawn(float_time, bundle)
    found = bundle.sample(2, threads=THREADS)
    assert np.isfinite(found).all()
    peak = 2 * float(np.abs(wanted).max())
    assert float(np.median(psnr_db(wanted, found, peak=peak))) > 25
    assert float(np.median(psnr_db(wanted, -found, peak=peak))) < 25


@pytest.mark.parametrize("case", UNET, ids=lambda case: case[0])
def test_a_unet(unet_float_time: Path, tmp_path: Path, case: tuple[str, dict[str, Any], int]) -> None:
    check_exact(compiled(unet_float_time, tmp_path / "b", case, "float", size=(8, 8)), unet_float_time)


@pytest.mark.parametrize("case", [UNET[1], UNET[5]], ids=lambda case: case[0])
def test_a_unet_in_integers(unet_float_time: Path, tmp_path: Path, case: tuple[str, dict[str, Any], int]) -> None:
    bundle = compiled(unet_float_time, tmp_path / "b", case, "w8a8-steps", size=(8, 8))
    wanted, found = drawn(unet_float_time, bundle), bundle.sample(2, threads=THREADS)
    peak = 2 * float(np.abs(wanted).max())
    assert float(np.median(psnr_db(wanted, found, peak=peak))) > 20


def test_the_imported_timestep_is_what_the_sampler_needs(unet_float_time: Path, unet: Compiled) -> None:
    model = onnx.load(unet_float_time)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    assert types["timestep"] == TensorProto.FLOAT
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.load(unet.exported).graph.input}
    assert types["timestep"] == TensorProto.INT64


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-ancestral"])
def test_an_integer_timestep_refuses_timesteps_between(tmp_path: Path, sampler: str) -> None:
    source = write(hand_written(), tmp_path / "m.onnx")
    with pytest.raises(SignatureError, match=rf"{sampler} calls timestep 799\.2, and .* is INT64") as caught:
        compiled(source, tmp_path / "b", (sampler, SD, 6), "float")
    assert "timestep_spacing to leading or trailing" in str(caught.value.hint)
    assert caught.value.where == "input t"
    bundle = compiled(source, tmp_path / "b", (sampler, {**SD, "timestep_spacing": "trailing"}, 6), "float")
    check_exact(bundle, source)


def test_a_sampler_that_cannot_run_on_the_schedule_is_refused_first(float_time: Path, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="needs a schedule of betas"):
        compiled(float_time, tmp_path / "b", ("heun", FLOW, 5), "float")
    with pytest.raises(ScheduleError, match="flow-euler needs a schedule of flow matching"):
        compiled(float_time, tmp_path / "b", ("flow-euler", SD, 5), "float")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "case",
    [("heun", {**LINEAR, "timestep_spacing": "leading"}, 4), ("pndm", {**LINEAR, "skip_prk_steps": True}, 4)],
    ids=lambda case: case[0],
)
@pytest.mark.parametrize("recipe", ["pcr", "ptqd-w8a8"])
def test_two_calls_at_one_timestep_share_a_row(
    float_time: Path, tmp_path: Path, case: tuple[str, dict[str, Any], int], recipe: str
) -> None:
    """In the graph; pcr walks all calls in lock-step, and the tables of the loop have a row for each call."""
    settings = {"group_steps.method": "each"} if recipe == "pcr" else None
    bundle = compiled(float_time, tmp_path / "b", case, recipe, settings=settings)
    calls = bundle.deployment.calls
    assert max(Counter(calls).values()) == 2
    assert bundle.deployed_timesteps == tuple(sorted(set(calls)))
    if recipe == "pcr":
        assert max(q.rows for q in bundle.manifest.quantizers) == len(set(calls)) < len(calls)
    else:
        assert bundle.correction is not None
        assert len(bundle.correction.scale) == len(calls)
        assert not bundle.correction.noise(bundle.deployment.solver(bundle.schedule).steps)[0]
    wanted, found = drawn(float_time, bundle), bundle.sample(2, threads=THREADS)
    peak = 2 * float(np.abs(wanted).max())
    assert float(np.median(psnr_db(wanted, found, peak=peak))) > 20


def test_mixdq_rounds_timesteps_and_follows_a_flow(float_time: Path, tmp_path: Path) -> None:
    """Its short trajectories are a method of their own, not the deployment's."""
    settings = {"assign_bits.splits": 2, "assign_bits.length": 2, "assign_bits.samples": 1}
    for i, case in enumerate((("euler", SD, 6), ("flow-euler", FLOW, 5))):
        bundle = compiled(float_time, tmp_path / f"{i}", case, "mixdq", settings=settings)
        assert np.isfinite(bundle.sample(1, threads=THREADS)).all()
        splits = bundle.manifest.bits["splits"]
        assert splits and all(np.isfinite(s) for s in splits)


def test_samples_of_a_guided_call_cannot_be_counted_apart(context: Context) -> None:
    program = tiny_program()
    guided = replace(program, deployment=replace(program.deployment, guidance=3.0))
    with pytest.raises(RecipeError, match="cannot be counted one by one") as caught:
        AllocateSteps().run(guided, context)
    assert "calibrate without guidance" in str(caught.value.hint)
    assert pipeline.run_passes(program, [AllocateSteps()], context).allocation


def test_guidance_needs_a_condition(float_time: Path, tmp_path: Path) -> None:
    with pytest.raises(ConditionError, match="guidance is for models with a condition") as caught:
        compiled(float_time, tmp_path / "b", CASES[0], "float", guidance=3.0)
    assert caught.value.hint == "leave out --guidance"
    assert not (tmp_path / "b").exists()
