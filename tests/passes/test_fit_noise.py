"""fit_noise: what it measures is what the two graphs do, at every call, guided or not, and what helps is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint import compile_model
from mezzotint.compiler.calibration.calibrate import follow_trajectories
from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.noise_runs import FittedBatch, NoiseNetworks
from mezzotint.compiler.errors import ConditionError, RecipeError, StatsError
from mezzotint.compiler.lowering.lower import lower
from mezzotint.passes.fit_noise import JUDGED, FitNoise
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.sampling.correction import FORMS
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.noise_fit import NoiseFit
from mezzotint.runtime.sampling.samplers import StepInfo, initial_noise, sample, seeded_noise
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Timestep
from mezzotint.runtime.streams import SeedOffset
from tests.helpers.models import CONTEXT, SMALL, THREADS, hand_written, write
from tests.helpers.spreads import Backwards
from tests.helpers.tiny import program_of, tiny_program

W8A8 = RECIPES["w8a8"].passes
STAGES = ("fit_noise", "fit_noise, held out", "fit_noise, images")
TABLES = ("scale", "shift", "spread")
ROWS = np.random.default_rng(0).standard_normal((4, CONTEXT)).astype(np.float32)
EMPTY = np.zeros((1, CONTEXT), np.float32)


def quantized(context: Context, sampler: str = "ddim", eta: float = 1.0) -> Program:
    program = tiny_program()
    deployment = Deployment.of(program.schedule, sampler, 4, eta)
    return pipeline.run_passes(replace(program, deployment=deployment), W8A8, context)


@pytest.fixture
def program(context: Context) -> Program:
    """The tiny denoiser in W8A8, deployed with four noisy DDIM steps."""
    return quantized(context)


def measured(program: Program, context: Context, *, bend: float = 1.0) -> NoiseFit:
    """Pairs along the float trajectory, by whole arrays; `bend` plants a slope in the quantized output."""
    assert program.float_model is not None
    fit, seen = NoiseFit(), 0
    signature, calls, scale = program.signature, len(program.deployment.calls), program.deployment.guidance
    with (
        Executor(program.float_model, context.folder, threads=THREADS) as exact,
        Executor(lower(program), context.folder, threads=THREADS) as integer,
    ):

        def both(x: Images, t: Timestep, conditions: Conditions) -> Images:
            nonlocal seen
            want, got = (
                np.asarray(net.call(signature, x, t, conditions)["epsilon"], np.float32) for net in (exact, integer)
            )
            pair = [want, got * np.float32(bend)]
            if program.deployment.guided:
                half = len(x) // 2
                pair = [a[:half] + np.float32(scale) * (a[half:] - a[:half]) for a in pair]
            fit.add(seen % calls, pair[0], pair[1])
            seen += 1
            return want

        follow_trajectories(program, context, both, "test")
    return fit


def check_tables(found: Any, fit: NoiseFit, program: Program, form: str) -> None:
    steps = program.deployment.solver(program.schedule).steps
    wanted = fit.correction(program.deployment, steps, "epsilon", form)
    for name in TABLES:
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=2e-3, atol=2e-6, err_msg=name)
    np.testing.assert_array_equal(found.stages, [step.stage for step in steps])


@pytest.mark.parametrize("form", FORMS)
def test_the_tables_are_those_of_the_float_trajectory(program: Program, context: Context, form: str) -> None:
    found = FitNoise(form=form, gate=False).run(program, context).correction
    fresh = replace(context, seed=SeedOffset.NOISE_FIT.after(context.seed))
    check_tables(found, measured(program, fresh), program, form)
    with pytest.raises(AssertionError):
        check_tables(found, measured(program, fresh, bend=1.01), program, form)
    with pytest.raises(AssertionError):
        check_tables(found, measured(program, context), program, form)  # the noise of the calibration


def test_the_sampler_keeps_its_noise_where_asked(program: Program, context: Context) -> None:
    """D2-DPM's deterministic form corrects the output alone."""
    found = {on: FitNoise(gate=False, noise=on).run(program, context).correction for on in (True, False)}
    changed, kept = found[True], found[False]
    assert changed is not None and kept is not None
    assert changed.excess.any() and not kept.excess.any()
    np.testing.assert_array_equal(changed.scale, kept.scale)
    np.testing.assert_array_equal(changed.shift, kept.shift)


@pytest.mark.parametrize("sampler", ["heun", "pndm", "dpmpp-2m-sde", "lcm"])
def test_every_call_has_a_row(context: Context, sampler: str) -> None:
    """Two calls at one timestep have two."""
    program = quantized(context, sampler, 0.0)
    after = FitNoise(gate=False).run(program, context)
    assert after.correction is not None
    calls = program.deployment.calls
    assert len(after.correction.scale) == len(calls) == len(after.noise_report["calls"])
    check_tables(
        after.correction, measured(program, replace(context, seed=SeedOffset.NOISE_FIT)), program, "regression"
    )
    assert [row["timestep"] for row in after.noise_report["calls"]] == list(calls)
    if sampler in ("heun", "pndm"):
        assert len(set(calls)) < len(calls)
        twice = [i for i, t in enumerate(calls) if calls.count(t) > 1]
        assert len({float(s) for s in after.correction.scale[twice]}) > len({calls[i] for i in twice})


def moved(program: Program, context: Context, form: str, nudge: float = 0.0) -> list[float]:
    """The variance of what the corrected error does to x' at each call, on held-out noise, by whole arrays."""
    correction = FitNoise(form=form, gate=False).run(program, context).correction
    assert program.float_model is not None and correction is not None
    solver, signature = program.deployment.solver(program.schedule), program.signature
    fresh = replace(context, seed=SeedOffset.HELD_OUT.after(context.seed))
    differences: dict[int, list[Images]] = {}
    with (
        Executor(program.float_model, context.folder, threads=THREADS) as exact,
        Executor(lower(program), context.folder, threads=THREADS) as integer,
    ):

        def pick(x: Images, t: Timestep, conditions: Conditions) -> Images:
            return np.asarray(exact.call(signature, x, t, conditions)["epsilon"], np.float32)

        def compare(info: StepInfo) -> None:
            got = np.asarray(integer.call(signature, info.x, info.timestep)["epsilon"], np.float32)
            fixed = correction.apply(got, info.index) + np.float32(nudge) * info.x
            step, spare = solver.steps[info.index], np.empty_like(info.x)
            one, other = (step.advance(info.state, out, spare)["x"] for out in (info.output, fixed))
            differences.setdefault(info.index, []).append(other - one)

        follow_trajectories(program, fresh, pick, "test", compare)
    return [float(np.concatenate(differences[call]).astype(np.float64).var()) for call in range(len(solver.steps))]


def test_the_regression_takes_what_the_error_does_to_the_state(program: Program, context: Context) -> None:
    """Clipping and all; PTQD takes the variance of the output, by the squared gain."""
    steps = program.deployment.solver(program.schedule).steps
    found = FitNoise(gate=False).run(program, context).correction
    paper = FitNoise(form="ptqd", gate=False).run(program, context).correction
    assert found is not None and paper is not None
    taken = [step.gain**2 * excess for step, excess in zip(steps, found.excess, strict=True)]
    assert taken == pytest.approx(moved(program, context, "regression"), rel=1e-3)
    assert taken != pytest.approx(moved(program, context, "regression", nudge=0.1), rel=1e-3)
    np.testing.assert_allclose(paper.excess, paper.spread**2)
    assert (found.excess < found.spread**2).any()


def test_what_does_not_help_on_held_out_noise_is_switched_off(
    program: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fit sees another network's outputs at call 1; the held-out calls are what they are."""
    real, perform = NoiseFit.add, FittedBatch.perform
    fitting: list[FittedBatch] = []

    def planted(self: NoiseFit, call: int, w: Images, q: Images) -> None:
        real(self, call, w, q * np.float32(1.3) if call == 1 and fitting else q)

    def performed(self: FittedBatch, networks: NoiseNetworks) -> NoiseFit:
        fitting[:] = [self]
        found = perform(self, networks)
        fitting.clear()
        return found

    honest = FitNoise().run(program, context)
    monkeypatch.setattr(FittedBatch, "perform", performed)
    monkeypatch.setattr(NoiseFit, "add", planted)
    gated = FitNoise().run(program, context)
    ungated = FitNoise(gate=False).run(program, context)
    assert gated.correction is not None and ungated.correction is not None and honest.correction is not None
    assert ungated.correction.scale[1] < 0.9
    assert gated.correction.scale[1] == 1.0
    assert gated.noise_report["calls"][1]["kept"] in ("none", "bias")
    # The other calls are as they were, or left alone where whole pictures are better so.
    others = gated.correction.scale[[0, 2, 3]]
    assert np.all((others == ungated.correction.scale[[0, 2, 3]]) | (others == 1.0))


@pytest.mark.parametrize("best", ["none", "slope", "bias", "both"])
def test_whole_pictures_decide(program: Program, context: Context, monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    """Whichever candidate's pictures are nearest is what the bundle gets, whatever single calls say."""
    names = iter(("none", "slope", "bias", "both", "noise"))
    monkeypatch.setattr("mezzotint.passes.fit_noise._score", lambda *_: 30.0 if next(names) == best else 20.0)
    after = FitNoise().run(program, context)
    table, rows = after.correction, after.noise_report["calls"]
    assert table is not None
    kept = {row["kept"] for row in rows}
    allowed = {"none": {"none"}, "slope": {"none", "slope"}, "bias": {"none", "bias"}}
    assert kept <= allowed.get(best, {"none", "slope", "bias", "both"})
    assert (kept == {"none"}) == (best == "none")
    if best in ("none", "bias"):
        np.testing.assert_array_equal(table.scale, 1.0)
    if best in ("none", "slope"):
        np.testing.assert_array_equal(table.shift, 0.0)
    np.testing.assert_array_equal(table.excess, 0.0)  # with less noise the pictures were further off
    assert f"({best})" in after.note


def test_pictures_are_those_of_the_loop(program: Program, context: Context) -> None:
    """The figure for nothing undone is that of pictures drawn here by hand."""
    after = FitNoise().run(program, context)
    assert program.float_model is not None
    fresh = replace(context, seed=SeedOffset.HELD_OUT.after(context.seed))
    drawn: list[list[Images]] = [[], []]
    for k, model in enumerate((program.float_model, lower(program))):
        with Executor(model, context.folder, threads=THREADS) as executor:

            def call(x: Images, t: Timestep, conditions: Conditions, executor: Executor = executor) -> Images:
                return np.asarray(executor.call(program.signature, x, t, conditions)["epsilon"], np.float32)

            def keep(info: StepInfo, k: int = k) -> None:
                if info.index == len(program.deployment.calls) - 1:
                    drawn[k].append(info.x_next)

            follow_trajectories(program, fresh, call, "test", keep)
    pairs = zip(*(np.concatenate(part)[:JUDGED] for part in drawn), strict=True)
    by_hand = float(np.mean([sqnr_db(a, b) for a, b in pairs]))
    found = after.noise_report["pictures_db"]
    assert found["none"] == pytest.approx(by_hand, abs=1e-6)
    assert found["none"] != pytest.approx(by_hand * 1.01, abs=1e-6)
    assert set(found) >= {"none", "slope", "bias", "both"}


def test_the_report_is_complete_and_the_same_whoever_runs_the_networks(
    program: Program, context: Context, tmp_path: Path
) -> None:
    few, workers = replace(context, batch=3, samples=7), Backwards()
    after, again = (FitNoise().run(program, each) for each in (few, replace(few, spread=workers)))
    assert {stage: count % 3 for stage, count in workers.pieces.items()} == dict.fromkeys(STAGES, 0)
    assert after.correction is not None and again.correction is not None
    for name in (*TABLES, "excess"):
        np.testing.assert_array_equal(getattr(after.correction, name), getattr(again.correction, name))
    assert json.dumps(after.noise_report, allow_nan=False) == json.dumps(again.noise_report, allow_nan=False)
    assert after.note == after.noise_report["summary"]
    row = after.noise_report["calls"][0]
    assert set(row) >= {"slope", "bias", "spread", "kept", "sqnr_db", "sigma", "noise", "clamped", "normal_p"}
    snapshot.save_program(after, tmp_path / "snapshot")
    assert snapshot.load_program(tmp_path / "snapshot")[0].noise_report == json.loads(json.dumps(after.noise_report))


def test_refusals(context: Context) -> None:
    with pytest.raises(RecipeError, match="form is 'best'") as caught:
        FitNoise(form="best")
    assert caught.value.hint == "choose one of regression, ptqd, ptqd-released"
    with pytest.raises(StatsError, match="the float graph to compare with is gone"):
        FitNoise().run(tiny_program(), context)


# Under guidance.


def conditional(context: Context, guidance: float, batch: int | str = "batch") -> tuple[Program, Context]:
    model = ir.from_proto(
        hand_written(sample="sample", timestep="timestep", output="epsilon", context="prompt", opset=21, batch=batch)
    )
    program = program_of(model, conditions=("prompt",))
    deployment = Deployment.of(program.schedule, "ddim", 4, 0.5, guidance)
    given = replace(context, conditions={"prompt": ROWS}, unconditional={"prompt": EMPTY})
    return pipeline.run_passes(replace(program, deployment=deployment), W8A8, given), given


@pytest.mark.parametrize("batch", ["batch", 4])
def test_the_statistics_are_those_of_the_guided_output(context: Context, batch: int | str) -> None:
    program, given = conditional(context, 4.0, batch)
    found = FitNoise(gate=False).run(program, replace(given, spread=Backwards())).correction
    assert found is not None
    assert found.deployment.guidance == 4.0
    assert found.shift.shape == (4, 1)
    fresh = replace(given, seed=SeedOffset.NOISE_FIT)
    check_tables(found, measured(program, fresh), program, "regression")
    # Those of the network's own output are others: guidance multiplies its error.
    plain = replace(program, deployment=replace(program.deployment, guidance=1.0))
    alone = measured(plain, fresh).correction(
        plain.deployment, plain.deployment.solver(plain.schedule).steps, "epsilon"
    )
    assert (found.spread > 1.5 * alone.spread).all()
    with pytest.raises(AssertionError):
        check_tables(found, measured(plain, fresh), plain, "regression")


def test_guidance_without_the_other_half_is_refused(context: Context) -> None:
    program, given = conditional(context, 4.0)
    with pytest.raises(ConditionError, match="guidance 4 needs unconditional rows"):
        FitNoise().run(program, replace(given, unconditional={}))


@pytest.mark.parametrize("batch", ["batch", 6])
def test_a_guided_bundle(tmp_path: Path, batch: int | str) -> None:
    """Compiled, corrected, and sampled: with a correction of the guided output, in a loop written down here."""
    source = write(hand_written(context="prompt", batch=batch), tmp_path / "m.onnx")
    given: dict[str, Any] = {"conditions": {"prompt": ROWS}, "unconditional": {"prompt": EMPTY}}
    options = {**SMALL, "eta": 0.5, "guidance": 4.0, "recipe": "ptqd-w8a8"}
    bundle = compile_model(source, tmp_path / "b", **options, **given)
    again = compile_model(source, tmp_path / "again", **options, **given)
    assert bundle.manifest.digest == again.manifest.digest
    assert bundle.manifest.noise == again.manifest.noise
    assert bundle.manifest.deployment.guidance == 4.0
    assert len(bundle.manifest.noise["calls"]) == 4
    network = Denoiser(bundle.model_path, bundle.signature, threads=THREADS)

    def predict(x: Images, t: Timestep, scale: float = 4.0) -> Images:
        def one(rows: Images) -> Images:
            if batch == "batch":
                return network(x, t, prompt=rows)
            wide = [np.concatenate([a, a]) for a in (x, rows)]
            return network(wide[0], t, prompt=wide[1])[: len(x)]

        without = one(np.repeat(EMPTY, len(x), axis=0))
        return np.asarray(without + np.float32(scale) * (one(ROWS[:3]) - without))

    def drawn(scale: float) -> Images:
        return sample(
            lambda x, t: predict(x, t, scale),
            initial_noise(5, (3, 1, 8, 8)),
            bundle.schedule,
            bundle.deployment,
            noise=seeded_noise(5),
            correction=bundle.correction,
        )

    found = bundle.sample(
        3, seed=5, threads=THREADS, conditions={"prompt": ROWS[:3]}, unconditional=given["unconditional"]
    )
    np.testing.assert_allclose(found, drawn(4.0), rtol=0, atol=2e-3 * np.abs(found).max())
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found, drawn(4.2), rtol=0, atol=2e-3 * np.abs(found).max())
    float_bundle = compile_model(source, tmp_path / "float", **{**options, "recipe": "float"}, **given)
    assert not float_bundle.manifest.noise
