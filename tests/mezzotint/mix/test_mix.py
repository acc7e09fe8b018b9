"""Bundles of one network, mixed: the files, the choice, the images, the refusals, the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mezzotint
from mezzotint import Bundle, MezzotintError, compile_model, mix_bundles, open_bundle
from mezzotint.bench.pairs import compare, parallel_run
from mezzotint.compiler.errors import CompileError, OutputError
from mezzotint.compiler.mixing.mixture import write_sharing
from mezzotint.io.settings import parse_bundles, parse_costs
from mezzotint.mix import mix as mix_module
from mezzotint.runtime.bundle.bundle import MANIFEST, MODEL
from mezzotint.runtime.bundle.manifest import manifest_digest
from mezzotint.runtime.errors import BundleError, InputError, InterpolatedCorrection
from mezzotint.runtime.latency import in_turns
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.session import Denoiser
from tests.helpers.models import CONTEXT, SMALL, THREADS, Cli, hand_written, write
from tests.helpers.spreads import cluster_here

COSTS = {"float": 1.0, "w8a8": 0.5}
NOISY: dict[str, Any] = {**SMALL, "eta": 0.5}


@dataclass(frozen=True)
class Made:
    """A float ONNX file and the bundles of several recipes, all for the same deployment."""

    source: Path
    bundles: Mapping[str, Bundle]

    def mix(self, output: Path, *names: str, **options: Any) -> Bundle:
        chosen = {name: self.bundles[name] for name in names or COSTS}
        settings: dict[str, Any] = {"reference": self.source, "pictures": 2, "threads": THREADS, "costs": COSTS}
        return mix_bundles(chosen, output, **{**settings, **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Deployed with DDIM, eta 0.5, so that a correction has noise to lessen."""
    folder = tmp_path_factory.mktemp("made")
    source = write(hand_written(), folder / "hand.onnx")
    recipes: dict[str, dict[str, Any]] = {
        "float": {"recipe": "float"},
        "w8a8": {"recipe": "w8a8"},
        "ptqd": {"recipe": "ptqd-w8a8"},
        "ptqd2": {"recipe": "ptqd-w8a8", "seed": 1},
        "paper": {"recipe": "ptqd-w8a8", "settings": {"fit_noise.form": "regression"}},
    }
    return Made(source, {n: compile_model(source, folder / n, **{**NOISY, **o}) for n, o in recipes.items()})


@pytest.fixture(scope="module")
def mixed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return made.mix(tmp_path_factory.mktemp("mixed") / "mix", budget=0.75)


SOURCE = {"kind": "onnx", "name": "hand.onnx", "parameter_bytes": 4}


def files(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def reseal(bundle: Bundle, folder: Path, **changes: Any) -> Bundle:
    """A copy of a bundle with a changed manifest."""
    shutil.copytree(bundle.path, folder)
    manifest = {**bundle.manifest.to_json(), **changes}
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return open_bundle(folder)


class TestMix:
    """What a mix is."""

    def test_every_network_computes_the_same_as_its_bundle(self, made: Made, mixed: Bundle) -> None:
        x = samplers.initial_noise(3, (2, *mixed.sample_shape))
        for name in COSTS:
            for t in mixed.deployment.calls:
                want = made.bundles[name].denoiser(THREADS)(x, t)
                np.testing.assert_array_equal(mixed.denoiser(THREADS, name)(x, t), want)
        low, high = (mixed.denoiser(THREADS, name)(x, 250) for name in COSTS)
        assert np.abs(low - high).max() > 0, "the twin: they are two networks"

    def test_sampling_equals_picking_by_hand(self, made: Made, mixed: Bundle) -> None:
        names = mixed.manifest.require_mixture().calls
        assert set(names) == set(COSTS)
        nets = [made.bundles[name].denoiser(THREADS) for name in names]
        x = samplers.initial_noise(0, (3, *mixed.sample_shape))

        def drawn(nets: list[Denoiser]) -> Any:
            noise = samplers.seeded_noise(0)
            return samplers.sample(nets, x, mixed.schedule, mixed.deployment, noise=noise)

        got = mixed.sample(3, threads=THREADS, correction=False)
        np.testing.assert_array_equal(got, drawn(nets))
        assert np.abs(got - drawn(nets[::-1])).max() > 0

    def test_the_choice_follows_from_the_figures_in_the_manifest(self, mixed: Bundle) -> None:
        choice = mixed.manifest.require_mixture().choice
        table = {n: [np.inf if db is None else db for db in row] for n, row in choice["snr_db"].items()}
        margins = {n: np.array(row) - np.array(choice["schedule_snr_db"]) for n, row in table.items()}
        for call, name in enumerate(mixed.manifest.require_mixture().calls):
            cheap_enough = margins["w8a8"][call] >= choice["threshold_db"] - 1e-9
            assert name == ("w8a8" if cheap_enough else "float")
        assert choice["rule"] == "schedule" and choice["mean_cost"] <= 0.75
        assert choice["cost"] == {"kind": "given"}
        alpha, sigma = mixed.schedule.levels(mixed.deployment.calls[1])
        assert choice["schedule_snr_db"][1] == pytest.approx(10 * np.log10(alpha**2 / sigma**2))

    def test_without_a_budget_a_call_is_cheap_where_its_error_is_below_the_schedules_noise(
        self, made: Made, tmp_path: Path
    ) -> None:
        """PTQD's rule, from the schedule's own alphas: |eps|^2 / |error|^2 against abar / (1 - abar)."""
        settings = {"choose_scales.weight_bits": 4}
        coarse = compile_model(made.source, tmp_path / "coarse", recipe="w8a8", settings=settings, **NOISY)
        options: dict[str, Any] = {"reference": made.source, "costs": COSTS, "pictures": 2, "threads": THREADS}
        mixed = mix_bundles({"float": made.bundles["float"], "w8a8": coarse}, tmp_path / "mix", **options)
        found = mixed.manifest.require_mixture()
        abar = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))[[int(t) for t in mixed.deployment.calls]]
        snr = np.array(found.choice["snr_db"]["w8a8"])
        enough = snr >= 10 * np.log10(abar / (1 - abar))
        assert list(found.calls) == ["w8a8" if cheap else "float" for cheap in enough]
        assert set(found.calls) == set(COSTS) and (snr > 0).all(), "the error alone is small at every call"

    def test_the_measured_ratio_is_that_of_a_paired_run(self, made: Made, mixed: Bundle) -> None:
        """The network predicts epsilon, so the noise that it stands for is its output."""
        seed = mixed.manifest.require_mixture().choice["seed"]
        _, found = parallel_run(
            Denoiser(made.source, mixed.signature, threads=THREADS),
            {"w8a8": made.bundles["w8a8"].denoiser(THREADS)},
            mixed,
            2,
            seed=seed,
        )
        wanted = list(found["w8a8"].per_step().values())
        np.testing.assert_allclose(mixed.manifest.require_mixture().choice["snr_db"]["w8a8"], wanted, rtol=1e-6)
        assert seed == 4, "a seed that neither a pass nor an evaluation draws from"

    def test_the_default_is_the_most_precise(self, made: Made, mixed: Bundle, tmp_path: Path) -> None:
        rows = mixed.manifest.require_mixture().precisions
        assert rows["float"].file == MODEL and rows["w8a8"].file == "unet/model.w8a8.onnx"
        assert mixed.denoiser(THREADS) is mixed.denoiser(THREADS, "float")
        assert mixed.manifest.kernels == made.bundles["float"].manifest.kernels
        assert rows["w8a8"].compiled == made.bundles["w8a8"].manifest.digest

    def test_a_precision_that_no_call_uses_is_left_out(self, made: Made, tmp_path: Path) -> None:
        mixed = made.mix(tmp_path / "m", budget=0.5)

        assert set(mixed.manifest.require_mixture().precisions) == {"w8a8"}
        assert mixed.manifest.require_mixture().choice["unused"] == ["float"]
        assert [n for n in mixed.manifest.files if n.endswith(".onnx")] == [MODEL]
        model = (made.bundles["w8a8"].path / MODEL).read_bytes()
        assert (mixed.path / MODEL).read_bytes() == model, "nothing to share, so not a byte changed"

    def test_common_constants_are_there_once(self, made: Made, tmp_path: Path) -> None:
        costs = {"ptqd": 0.5, "w8a8": 1.0}
        mixed = made.mix(tmp_path / "m", "w8a8", "ptqd", costs=costs, relax=0.5)

        assert mixed.manifest.require_mixture().shared_bytes > 4000
        rows = mixed.manifest.require_mixture().precisions.values()
        on_disk = sum(f.stat().st_size for f in (mixed.path / "unet").iterdir())
        assert on_disk == sum(row.bytes for row in rows) + mixed.manifest.require_mixture().shared_bytes
        assert on_disk < 0.9 * sum(row.bytes_alone for row in rows)
        assert "unet/shared.data" in mixed.manifest.files

    def test_relaxing(self, made: Made, tmp_path: Path) -> None:
        last, first = (made.mix(tmp_path / f"{i}", relax=0.25, relax_first=bool(i)) for i in range(2))
        assert last.manifest.require_mixture().calls == ("w8a8", "w8a8", "w8a8", "float")
        assert first.manifest.require_mixture().calls == ("float", "w8a8", "w8a8", "w8a8")
        assert first.manifest.require_mixture().choice["rule"] == "relaxed first"

    def test_the_picture_rule(self, made: Made, mixed: Bundle, tmp_path: Path) -> None:
        """By hand: errors of the raw output, times how far the step carries them into x / alpha."""
        found = made.mix(tmp_path / "m", budget=0.75, rule="picture")
        steps = found.deployment.solver(found.schedule).steps
        after = [found.schedule.levels(t)[0] for t in found.deployment.calls[1:]] + [1.0]
        weights = np.array([(step.next["out"] + step.next["image"] * step.image_out) for step in steps]) / after
        exact, net = Denoiser(made.source, found.signature, threads=THREADS), made.bundles["w8a8"].denoiser(THREADS)
        added: list[float] = []

        def add(info: samplers.StepInfo) -> None:
            error = net(info.x, info.timestep) - info.output
            added.append(float((error**2).mean()) * weights[info.index] ** 2)

        x = samplers.initial_noise(4, (2, *found.sample_shape))
        noise = samplers.seeded_noise(4)
        samplers.sample(exact, x, found.schedule, found.deployment, noise=noise, callback=add)
        worst = set(np.argsort(added)[-2:])  # the budget pays for two exact calls of four
        assert [i for i, n in enumerate(found.manifest.require_mixture().calls) if n == "float"] == sorted(worst)
        choice = found.manifest.require_mixture().choice
        assert choice["rule"] == "picture"
        assert -choice["threshold_db"] == pytest.approx(10 * np.log10(sorted(added)[1]), abs=1e-3)
        assert found.manifest.require_mixture().calls != mixed.manifest.require_mixture().calls

    def test_two_calls_at_one_timestep(self, tmp_path: Path) -> None:
        source = write(hand_written(time_dtype=1), tmp_path / "h.onnx")
        options = {**SMALL, "sampler": "heun", "steps": 3}
        bundles = [compile_model(source, tmp_path / r, recipe=r, **options) for r in COSTS]
        mixed = mix_bundles(
            bundles, tmp_path / "m", reference=source, costs=COSTS, relax=0.6, pictures=1, threads=THREADS
        )
        times, names = mixed.deployment.calls, mixed.manifest.require_mixture().calls
        assert times[1] == times[2] and names == ("w8a8", "w8a8", "float", "float", "float")

        nets = {str(b.manifest.recipe.name): b.denoiser(THREADS) for b in bundles}
        x = samplers.initial_noise(0, (1, *mixed.sample_shape))
        wanted = samplers.sample([nets[name] for name in names], x, mixed.schedule, mixed.deployment)
        np.testing.assert_array_equal(mixed.sample(1, threads=THREADS), wanted)
        by_time = [nets["w8a8" if t >= times[1] else "float"] for t in times]
        assert np.abs(samplers.sample(by_time, x, mixed.schedule, mixed.deployment) - wanted).max() > 0, "the trap"

    def test_the_same_costs_give_the_same_bytes_whoever_measures(
        self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On three batches, of 2, 2 and 1 images."""
        cluster = cluster_here(monkeypatch, mix_module)
        options: dict[str, Any] = {"budget": 0.75, "pictures": 5, "batch": 2, "threads": 1}
        mixed = made.mix(tmp_path / "one", **options)
        assert not cluster.pieces
        again = made.mix(tmp_path / "again", **options, cluster="local")
        assert cluster.pieces == {"float, paired calls": 3}
        one, two = files(mixed.path), files(again.path)
        assert sorted(one) == sorted(two)
        assert [name for name in one if one[name] != two[name] and name != MANIFEST] == []
        assert again.manifest.digest == mixed.manifest.digest

    def test_costs_are_measured(self, made: Made, tmp_path: Path) -> None:
        mixed = made.mix(tmp_path / "m", costs=None, repeats=2)
        how = mixed.manifest.require_mixture().choice["cost"]
        assert how["kind"] == "measured" and how["threads"] == THREADS and how["batch"] == 1
        assert set(how["call_ms"]) == set(COSTS) and min(how["call_ms"].values()) > 0
        assert max(row.cost for row in mixed.manifest.require_mixture().precisions.values()) <= 1

    def test_a_whole_evaluation_uses_the_mix(self, made: Made, mixed: Bundle) -> None:
        found = compare(mixed, made.source, 2, threads=THREADS)
        exact = mixed.manifest.require_mixture().calls.index("float")
        assert found.sqnr.per_step()[exact] > 100
        assert found.sqnr.worst()[1] < 80

    def test_conditions_and_guidance(self, tmp_path: Path) -> None:
        source = write(hand_written(context="c"), tmp_path / "c.onnx")
        rows = np.random.default_rng(0).standard_normal((2, CONTEXT)).astype(np.float32)
        given: dict[str, Any] = {"conditions": {"c": rows}, "unconditional": {"c": np.zeros((1, CONTEXT), np.float32)}}
        options: dict[str, Any] = {**SMALL, "guidance": 3.0, **given}
        bundles = [compile_model(source, tmp_path / r, recipe=r, **options) for r in COSTS]
        settings: dict[str, Any] = {"reference": source, "costs": COSTS, "pictures": 2, "threads": THREADS, **given}
        mixed = mix_bundles(bundles, tmp_path / "m", budget=0.75, **settings)
        each = mix_bundles(bundles, tmp_path / "e", budget=0.75, batch=1, **settings)

        found = (one.manifest.require_mixture().choice["snr_db"] for one in (mixed, each))
        first, second = (np.array(list(table.values()), float) for table in found)
        np.testing.assert_allclose(first, second, atol=0.01)  # image 1 has row 1 in a batch of its own, too
        assert set(mixed.manifest.require_mixture().precisions) == set(COSTS)
        assert mixed.sample(2, threads=THREADS, **given).shape == (2, 1, 8, 8)
        with pytest.raises(InputError, match="unconditional"):
            mix_bundles(bundles, tmp_path / "n", reference=source, costs=COSTS, pictures=2)

    def test_a_batch_that_is_written_in(self, tmp_path: Path) -> None:
        source = write(hand_written(batch=3), tmp_path / "b.onnx")
        bundles = [compile_model(source, tmp_path / r, recipe=r, **{**SMALL, "calibration_samples": 3}) for r in COSTS]
        mixed = mix_bundles(bundles, tmp_path / "m", reference=source, budget=1.0, pictures=2, repeats=1)

        assert mixed.manifest.require_mixture().choice["cost"]["batch"] == 3
        assert mixed.sample(4).shape == (4, 1, 8, 8)


class TestCorrection:
    """Statistics belong to the precision that runs."""

    def test_rows_come_from_each_bundle(self, made: Made, tmp_path: Path) -> None:
        costs = {"ptqd": 0.5, "ptqd2": 0.6, "float": 1.0}
        mixed = made.mix(tmp_path / "m", *costs, costs=costs, budget=0.8)
        names = mixed.manifest.require_mixture().calls

        table = mixed.correction
        assert table is not None and "float" in names and len(set(names)) > 1
        for call, name in enumerate(names):
            own = made.bundles[name].correction
            assert table.scale[call] == (1.0 if own is None else own.scale[call])
            assert mixed.manifest.noise["calls"][call]["precision"] == name
        assert mixed.manifest.require_mixture().choice["correction"].startswith("ptqd")
        free, corrected = (mixed.sample(2, threads=THREADS, correction=wish) for wish in (False, True))
        assert np.abs(free - corrected).max() > 0

    def test_other_steps_take_network_and_row_from_one_call(self, made: Made, tmp_path: Path) -> None:
        bundles = {"ptqd": made.bundles["ptqd"], "float": made.bundles["float"]}
        mixed = mix_bundles(
            bundles, tmp_path / "m", reference=made.source, costs={"ptqd": 0.5, "float": 1.0}, relax=0.5, pictures=1
        )
        plan = mixed.plan(steps=2)
        assert mixed.correction is not None and mixed.precisions is not None
        rows = mixed.precisions.nearest(plan.solver(mixed.schedule).steps)
        with pytest.warns(InterpolatedCorrection):
            table = mixed.correction_for(plan)
        assert isinstance(table, Correction)
        np.testing.assert_array_equal(table.scale, mixed.correction.scale[list(rows)])

    def test_none_where_one_has_none_or_another_form(self, made: Made, tmp_path: Path) -> None:
        for number, (pair, why) in enumerate({("ptqd", "w8a8"): "w8a8 was", ("ptqd", "paper"): "forms differ"}.items()):
            costs = dict(zip(pair, (0.5, 1.0), strict=True))
            for order in (pair, pair[::-1]):
                target = tmp_path / f"{number}{order[0]}"
                try:
                    found = made.mix(target, *pair, costs={**costs, order[0]: 0.4, order[1]: 1.0}, relax=0.5)
                except InputError as error:
                    assert "nothing to relax" in str(error)
                    continue
                assert found.correction is None and not found.manifest.noise
                assert why in found.manifest.require_mixture().choice["correction"]
                break
            else:
                pytest.fail("neither order could be relaxed")


class TestRefusals:
    """What does not fit together, by name."""

    def test_one_bundle(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="1 bundles cannot be mixed"):
            made.mix(tmp_path / "m", "w8a8")

    def test_two_of_one_name(self, made: Made, tmp_path: Path) -> None:
        pair = [made.bundles["ptqd"], made.bundles["ptqd2"]]
        with pytest.raises(InputError, match=r"two bundles are called 'ptqd-w8a8'[\s\S]*NAME=BUNDLE"):
            mix_bundles(pair, tmp_path / "m", reference=made.source)

    @pytest.mark.parametrize("name", ["../x", "", "a b", "onnx", ".hidden"])
    def test_a_name_that_is_none(self, made: Made, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match="cannot be part of a file name"):
            mix_bundles({name: made.bundles["w8a8"], "b": made.bundles["float"]}, tmp_path / "m", reference=made.source)

    def test_a_mix_of_a_mix(self, made: Made, mixed: Bundle, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a mix itself"):
            mix_bundles({"a": mixed, "b": made.bundles["w8a8"]}, tmp_path / "m", reference=made.source)

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"source": {**SOURCE, "weights_sha256": "other"}}, "differ in their source"),
            ({"signature": {"sample": "x", "timestep": "t", "output": "y", "prediction": "sample"}}, "signature"),
            ({"sample_shape": [1, 16, 16]}, r"sample shape \(\(1, 8, 8\) and \(1, 16, 16\)\)"),
        ],
    )
    def test_other_sources(self, made: Made, tmp_path: Path, changes: dict[str, Any], what: str) -> None:
        if "signature" in changes:
            changes = {"signature": {**made.bundles["w8a8"].manifest.signature.to_json(), "prediction": "sample"}}
        other = reseal(made.bundles["w8a8"], tmp_path / "other", **changes)
        with pytest.raises(InputError, match=what):
            mix_bundles({"float": made.bundles["float"], "w8a8": other}, tmp_path / "m", reference=made.source)

    def test_another_deployment_or_schedule(self, made: Made, tmp_path: Path) -> None:
        for change, what in (({"eta": 0.0}, "deployment"), ({"scheduler": "sd", "eta": 0.5}, "schedule")):
            other = compile_model(made.source, tmp_path / what, recipe="float", **{**SMALL, **change})
            with pytest.raises(InputError, match=f"float and w8a8 differ in their {what}"):
                mix_bundles({"float": other, "w8a8": made.bundles["w8a8"]}, tmp_path / "m", reference=made.source)

    def test_an_unknown_source(self, made: Made, tmp_path: Path) -> None:
        pair = {n: reseal(made.bundles[n], tmp_path / n, source=SOURCE) for n in COSTS}
        with pytest.raises(BundleError, match="does not name the weights"):
            mix_bundles(pair, tmp_path / "m", reference=made.source)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budget": 0.2}, r"cannot be met[\s\S]*costs 0\.5"),
            ({"budget": 1.2}, "not possible"),
            ({"budget": 0.7, "relax": 0.2}, "two rules"),
            ({"rule": "fid"}, r"no rule 'fid'[\s\S]*schedule, picture"),
            ({"rule": "picture"}, "no threshold of its own"),
            ({"relax_first": True}, "needs the fraction of the calls"),
            ({"relax": 1.0}, "relaxing"),
            ({"costs": {"float": 1.0}}, r"given for \['float'\], the precisions are \['float', 'w8a8'\]"),
            ({"costs": {"float": 1.0, "w8a8": -1.0}}, "positive"),
            ({"pictures": 0}, "nothing to measure on"),
            ({"reference": Path("gone.onnx")}, "no such float model"),
        ],
    )
    def test_choices_that_cannot_be_made(
        self, made: Made, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(MezzotintError, match=message):
            made.mix(tmp_path / "m", **options)
        assert list(tmp_path.iterdir()) == [], "nothing is left"

    def test_an_output_that_exists(self, made: Made, mixed: Bundle) -> None:
        before = files(mixed.path)
        with pytest.raises(OutputError, match="exists"):
            made.mix(mixed.path)
        assert files(mixed.path) == before

    def test_a_crash_leaves_nothing(self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "m"
        made.mix(target, budget=0.75)
        before = files(target)

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("mezzotint.mix.write.seal_bundle", full)
        with pytest.raises(OutputError, match="disk is full"):
            made.mix(target, budget=1.0, force=True)
        assert files(target) == before
        assert [f.name for f in tmp_path.iterdir()] == ["m"]

    def test_a_file_that_computes_something_else(
        self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def swapped(sources: Mapping[str, Path], folder: Path) -> int:
            return write_sharing(dict(zip(sources, list(sources.values())[::-1], strict=True)), folder)

        monkeypatch.setattr("mezzotint.mix.write.write_sharing", swapped)
        with pytest.raises(CompileError, match="computes other values"):
            made.mix(tmp_path / "m", budget=0.75)

    def test_a_network_that_predicts_no_numbers(
        self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = open_bundle(made.bundles["w8a8"].path)
        net = broken.denoiser(THREADS)
        monkeypatch.setattr(type(net), "__call__", lambda self, x, *a, **k: np.full_like(x, np.nan))
        with pytest.raises(InputError, match="predicts NaN at call 0"):
            made.mix(tmp_path / "m")


def test_calls_take_turns_there_and_back() -> None:
    order: list[str] = []

    def net(name: str) -> Any:
        return lambda x, t: order.append(name)

    found = in_turns([net("a"), net("b")], np.zeros((1, 1, 2, 2), np.float32), 0, repeats=2)
    assert order == ["a"] * 3 + ["b"] * 6 + ["a"] * 3
    assert [len(latency.seconds) for latency in found] == [4, 4]
    assert [len(latency.blocks) for latency in found] == [2, 2]


class TestCommand:
    """`mezzotint mix`, and the output of other commands for its bundles."""

    def line(self, made: Made, target: Path, *more: object) -> tuple[object, ...]:
        folders = [made.bundles[name].path for name in COSTS]
        costs = [part for name, cost in COSTS.items() for part in ("--cost", f"{name}={cost}")]
        return ("mix", *folders, "-o", target, "--reference", made.source, "-n", 2, "--threads", THREADS, *costs, *more)

    def test_it_reports_the_mix(self, cli: Cli, made: Made, mixed: Bundle, tmp_path: Path) -> None:
        answer = cli(*self.line(made, tmp_path / "m", "--budget", "0.75", "--json"))
        said = json.loads(answer.out)
        assert answer.code == 0
        assert said["precision_of_call"] == list(mixed.manifest.require_mixture().calls)
        assert said["digest"] == mixed.manifest.digest, "the door does the same"

        again = cli(*self.line(made, tmp_path / "m", "--relax", "0.25", "--force"))
        assert again.code == 0
        for word in ("relaxed last 0.25", "as given", "network calls", "0 to 2", "unet/model.w8a8.onnx"):
            assert word in again.out, (word, again.out)

    def test_it_refuses_in_words(self, cli: Cli, made: Made, tmp_path: Path) -> None:
        answer = cli(*self.line(made, tmp_path / "m", "--budget", "0.1"))
        assert answer.code == 2 and "cannot be met" in answer.err and "Traceback" not in answer.err

    def test_help(self, cli: Cli) -> None:
        assert "mezzotint mix" in cli("mix", "--help").out
        assert "mix" in cli("--help").out

    def test_every_precision_is_audited(self, cli: Cli, mixed: Bundle) -> None:
        answer = cli("audit", mixed.path, "--json", "--strict")
        assert answer.code == 0, answer.err
        files = json.loads(answer.out)["files"]
        assert mixed.precisions is not None and set(files) == set(mixed.precisions.files.values())
        integers = {name: files[file]["totals"]["integer"] for name, file in mixed.precisions.files.items()}
        assert integers["float"] == 0 < integers["w8a8"]

    def test_inspect_shows_the_precisions(self, cli: Cli, mixed: Bundle) -> None:
        shown = cli("inspect", mixed.path).out
        assert "network calls" in shown and "precisions, " in shown and "w8a8" in shown
        data = json.loads(cli("inspect", mixed.path, "--json").out)
        assert data["precision_of_call"] == list(mixed.manifest.require_mixture().calls)
        assert data["model_bytes"] == sum(f.stat().st_size for f in (mixed.path / "unet").iterdir())

    def test_sample_says_which_ran(self, cli: Cli, mixed: Bundle, tmp_path: Path) -> None:
        said = json.loads(cli("sample", mixed.path, "-n", 2, "-o", tmp_path / "p.npy", "--json").out)
        names = mixed.manifest.require_mixture().calls
        assert f"float: {names.count('float')} calls" in said["precisions"]
        np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), mixed.sample(2))

    def test_the_card_names_the_files(self, made: Made, mixed: Bundle) -> None:
        text = (mixed.path / "README.md").read_text()
        assert "`unet/model.w8a8.onnx`: `w8a8`" in text and "one of several precisions" in text
        assert "several precisions" not in (made.bundles["w8a8"].path / "README.md").read_text()

    def test_the_passes_of_each_come_along(self, mixed: Bundle) -> None:
        for name in COSTS:
            assert list((mixed.path / "passes" / name).glob("*.diff"))

    def test_names_and_costs_on_the_line(self, tmp_path: Path) -> None:
        odd = tmp_path / "a=b"
        odd.mkdir()
        assert parse_bundles(["x", "y"]) == ["x", "y"]
        assert parse_bundles(["p=x", "q=y=z"]) == {"p": "x", "q": "y=z"}
        assert parse_bundles([str(odd), "y"]) == [str(odd), "y"]
        for wrong in (["p=x", "y"], ["p=x", "p=y"]):
            with pytest.raises(InputError, match="no name of their own"):
                parse_bundles(wrong)
        assert parse_costs(["a=1", "b=0.5"]) == {"a": 1.0, "b": 0.5}
        for wrong in (["a"], ["a=cheap"]):
            with pytest.raises(InputError, match="not a cost"):
                parse_costs(wrong)


def test_the_door_has_it() -> None:
    assert mezzotint.mix_bundles is mix_bundles
    assert "mix_bundles" in dir(mezzotint)
