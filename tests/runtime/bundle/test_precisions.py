"""Which precision runs at which call, and the loop with one denoiser for each call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.bundle.bundle import MODEL, open_bundle, seal_bundle
from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.bundle.precisions import Precisions, spans
from mezzotint.runtime.errors import BundleError, InputError
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Predict

SCHEDULE = Schedule.named("ddpm-linear")
FILES = {"low": "unet/model.low.onnx", "high": MODEL}


def precisions(sampler: str, steps: int, calls: tuple[str, ...]) -> Precisions:
    return Precisions(FILES, calls, Deployment.of(SCHEDULE, sampler, steps).solver(SCHEDULE).steps)


def steps_of(sampler: str, steps: int) -> Any:
    return Deployment.of(SCHEDULE, sampler, steps).solver(SCHEDULE).steps


class TestPick:
    """Precisions.of: a name for each call."""

    def test_the_deployment_has_its_own_names(self) -> None:
        names = ("low", "high", "low", "high")
        assert precisions("ddim", 4, names).of(steps_of("ddim", 4)) == names

    def test_two_calls_at_one_timestep_may_differ(self) -> None:
        steps = steps_of("heun", 4)
        names = tuple("high" if step.stage else "low" for step in steps)
        times = [step.timestep for step in steps]

        assert len(set(times)) < len(times)
        assert precisions("heun", 4, names).of(steps) == names

    def test_other_steps_take_the_nearest_fitted_call(self) -> None:
        known = precisions("ddim", 4, ("low", "low", "high", "high"))  # timesteps 750, 500, 250, 0

        names = known.of(steps_of("ddim", 8))  # 875, 750, ..., 125, 0

        assert names == ("low", "low", "low", "low", "high", "high", "high", "high")
        assert known.nearest(steps_of("ddim", 8)) == (0, 0, 1, 1, 2, 2, 3, 3), "of two the later one"

    def test_the_stage_of_a_step_counts_before_the_timestep(self) -> None:
        known = steps_of("heun", 4)
        names = tuple("high" if step.stage else "low" for step in known)

        asked = steps_of("heun", 7)
        assert precisions("heun", 4, names).of(asked) == tuple("high" if step.stage else "low" for step in asked)

    def test_a_sampler_without_stages_asks_the_first_ones(self) -> None:
        names = tuple("high" if step.stage else "low" for step in steps_of("heun", 4))
        assert set(precisions("heun", 4, names).of(steps_of("euler", 4))) == {"low"}

    def test_names_and_calls_must_fit(self) -> None:
        with pytest.raises(InputError, match="3 calls, the deployment has 4"):
            precisions("ddim", 4, ("low", "low", "high"))
        with pytest.raises(InputError, match="'middle', which is not among"):
            precisions("ddim", 4, ("low", "low", "middle", "high"))

    def test_spans_are_runs_of_equal_names(self) -> None:
        assert spans("aabca") == [(0, 1, "a"), (2, 2, "b"), (3, 3, "c"), (4, 4, "a")]
        assert spans([]) == []


class TestLoop:
    """samplers.run_solver with a list."""

    def test_a_list_of_one_denoiser_is_that_denoiser(self) -> None:
        deployment = Deployment.of(SCHEDULE, "heun", 4)
        x = samplers.initial_noise(0, (2, 1, 4, 4))

        def net(x: Floats, t: float) -> Floats:
            return x * np.float32(0.5)

        one = samplers.sample(net, x, SCHEDULE, deployment)
        np.testing.assert_array_equal(one, samplers.sample([net] * len(deployment.calls), x, SCHEDULE, deployment))

    def test_each_call_has_its_own(self) -> None:
        deployment = Deployment.of(SCHEDULE, "heun", 4)
        asked: list[int] = []

        def make(index: int) -> Predict:
            def net(x: Floats, t: float) -> Floats:
                asked.append(index)
                return x * np.float32(0.1 * index)

            return net

        nets = [make(i) for i in range(len(deployment.calls))]
        x = samplers.initial_noise(0, (1, 1, 4, 4))
        got = samplers.sample(nets, x, SCHEDULE, deployment)

        assert asked == list(range(len(deployment.calls)))
        stepper = samplers.Stepper(deployment.solver(SCHEDULE))
        state = stepper.begin(x)
        for i in range(len(deployment.calls)):  # by hand
            state = stepper.advance(i, state, state["x"] * np.float32(0.1 * i))
        np.testing.assert_array_equal(got, state["x"])
        swapped = samplers.sample([*nets[:2][::-1], *nets[2:]], x, SCHEDULE, deployment)
        assert np.abs(swapped - got).max() > 1e-3, "the order matters"

    def test_a_list_of_another_length_is_refused(self) -> None:
        deployment = Deployment.of(SCHEDULE, "heun", 4)
        with pytest.raises(InputError, match="4 denoisers for 7 network calls"):
            samplers.sample([lambda x, t: x] * 4, np.zeros((1, 1, 4, 4), np.float32), SCHEDULE, deployment)


def precision(file: str) -> dict[str, Any]:
    """Return the plain data of one precision's entry."""
    counts = {"calls": 1, "cost": 1.0, "bytes": 1, "bytes_alone": 1, "integer_kernels": 0, "float_kernels": 1}
    recipe = {"name": "test", "description": "none"}
    return {"file": file, "recipe": recipe, "compiled": "", **counts, "islands": {}}


@pytest.fixture
def make_mixed(
    make_bundle: Callable[..., tuple[Path, dict[str, Any]]], denoiser_onnx: Callable[..., bytes]
) -> Callable[..., Path]:
    """A bundle with a second network that predicts twice as much, used as `names` say."""

    def make(names: list[str], **changes: Any) -> Path:
        folder, manifest = make_bundle(**{k: v for k, v in changes.items() if k in ("sampler", "eta")})
        import onnx

        model = onnx.load_model_from_string(denoiser_onnx())
        weight = next(t for t in model.graph.initializer if t.name == "weight")
        weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), "weight"))
        (folder / FILES["low"]).write_bytes(model.SerializeToString())
        entries = changes.get("entries", {name: precision(file) for name, file in FILES.items()})
        mixture = {"precisions": entries, "precision_of_call": names, "shared_bytes": 0, "precision_choice": {}}
        seal_bundle(folder, Manifest.from_json({**manifest, **mixture}, "make_mixed"))
        return folder

    return make


class TestBundle:
    """Bundle: networks by name and by call."""

    def test_sampling_picks_by_call(self, make_mixed: Callable[..., Path]) -> None:
        names = ["low"] * 4 + ["high"] * 2 + ["low"] * 4
        bundle = open_bundle(make_mixed(names))
        nets = {name: bundle.denoiser(1, name) for name in FILES}

        assert bundle.denoisers(threads=1) == [nets[name] for name in names]
        x = samplers.initial_noise(5, (3, *bundle.sample_shape))
        expected = samplers.sample([nets[name] for name in names], x, bundle.schedule, bundle.deployment)
        np.testing.assert_array_equal(bundle.sample(3, seed=5, threads=1), expected)
        other = samplers.sample(nets["high"], x, bundle.schedule, bundle.deployment)
        assert np.abs(expected - other).max() > 1e-3, "the twin: one network throughout draws others"

    def test_other_steps_pick_the_nearest(self, make_mixed: Callable[..., Path]) -> None:
        bundle = open_bundle(make_mixed(["low"] * 5 + ["high"] * 5))
        plan = bundle.plan(steps=4)  # 750, 500, 250, 0 beside 900, 800, ..., 0

        assert bundle.denoisers(plan, 1) == [bundle.denoiser(1, n) for n in ("low", "low", "high", "high")]
        assert bundle.sample(1, steps=4, threads=1).shape == (1, 1, 8, 8)

    def test_sessions_are_opened_once_and_when_needed(self, make_mixed: Callable[..., Path]) -> None:
        bundle = open_bundle(make_mixed(["high"] * 10))
        bundle.sample(1, threads=1)

        assert bundle.denoiser(1) is bundle.denoiser(1, "high"), "the default network is one of them"
        assert len(bundle._denoisers) == 1, "nobody asked for the other"

    def test_an_unknown_name_is_refused(self, make_mixed: Callable[..., Path]) -> None:
        with pytest.raises(InputError, match="no precision is called 'w2a2'"):
            open_bundle(make_mixed(["high"] * 10)).denoiser(1, "w2a2")

    def test_a_bundle_of_one_precision_knows_none(self, make_bundle: Callable[..., tuple[Path, Any]]) -> None:
        bundle = open_bundle(make_bundle()[0])

        assert bundle.precisions is None
        assert set(bundle.denoisers(threads=1)) == {bundle.denoiser(1)}
        with pytest.raises(InputError, match="no precision"):
            bundle.denoiser(1, "high")

    @pytest.mark.parametrize(
        ("names", "entries", "message"),
        [
            (["high"] * 9, None, "9 calls, the deployment has 10"),
            (["other"] * 10, None, "'other'"),
            (["high"] * 10, {"high": precision("unet/gone.onnx")}, "does not list unet/gone.onnx"),
            (["high"] * 10, {"high": {}}, r"the manifest has no `precisions\.high\.file`"),
            (["high"] * 10, ["high"], r"`precisions` is \['high'\], not an object"),
        ],
    )
    def test_a_manifest_that_does_not_fit_is_refused(
        self, make_mixed: Callable[..., Path], names: list[str], entries: Any, message: str
    ) -> None:
        with pytest.raises(BundleError, match=message):
            open_bundle(make_mixed(names, **({} if entries is None else {"entries": entries})))

    def test_the_choice_is_part_of_the_digest(self, make_mixed: Callable[..., Path]) -> None:
        folder = make_mixed(["high"] * 10)
        file = folder / "mezzotint.json"
        manifest = json.loads(file.read_text())
        manifest["precision_of_call"][0] = "low"
        file.write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="changed"):
            open_bundle(folder)
