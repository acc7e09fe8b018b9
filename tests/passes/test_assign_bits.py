"""assign_bits: what is sensitive gets the bits, budgets hold, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint import open_bundle
from mezzotint.compiler.bits.mixdq import split_budget
from mezzotint.compiler.bundle.writer import Compilation, write_bundle
from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program, Site
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.scales.weights import weight_format, weight_quantizer
from mezzotint.passes import assign_bits
from mezzotint.passes.assign_bits import AssignBits
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.group_steps import GroupSteps
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.files import make_pass
from mezzotint.passes.step_scales import StepScales
from mezzotint.runtime.bundle.manifest_entries import Calibration, RecipeEntry
from mezzotint.text.report import print_inspection
from tests.helpers.tiny import context_in, tiny_program

QUICK: dict[str, Any] = {"calls": 2, "samples": 2}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_in(tmp_path_factory.mktemp("bits"))


@pytest.fixture(scope="module")
def planned(here: Context) -> Program:
    return pipeline.run_passes(tiny_program(), [Normalize(), Observe(channels="inputs"), ChooseScales()], here)


def assigned(program: Program, context: Context, **options: Any) -> Program:
    return pipeline.run_passes(program, [AssignBits(**{**QUICK, **options})], context)


def widths(program: Program) -> dict[str, tuple[int, int]]:
    """(bits, number of weights) of each layer with weights, 32 bits in float, from the plan alone."""
    assert program.plan is not None
    found = {}
    for layer in layers(program.graph):
        if layer.weight is not None:
            quantizer = program.plan.of(name_of(layer.weight), layer.name)
            assert quantizer is not None
            bits = 32 if layer.name in program.plan.islands else quantizer.format.bits
            found[layer.name] = (bits, numpy_of(layer.weight).size)
    return found


def mean_bits(program: Program) -> float:
    free = {name: w for name, w in widths(program).items() if name not in ("conv_in", "conv_out")}
    return sum(b * n for b, n in free.values()) / sum(n for _, n in free.values())


def report_of(program: Program) -> Any:
    assert program.plan is not None
    return json.loads(json.dumps(program.plan.report))


@pytest.mark.parametrize("options", [{}, {"score": "hawq"}, {"scope": "layer"}, {"weighting": "absolute"}])
def test_the_budget_is_kept_and_spent(planned: Program, here: Context, options: dict[str, Any]) -> None:
    after = assigned(planned, here, mean_bits=5.5, **options)
    assert 4.5 < mean_bits(after) <= 5.5
    assert {b for b, _ in widths(after).values()} == {4, 8, 32}
    report = report_of(after)
    assert report["chosen"]["mean_bits"] == pytest.approx(mean_bits(after), rel=1e-9)
    curve = [(point["takes"], point["sqnr_db"]) for point in report["pareto"]]
    assert curve == sorted(curve) and len(curve) > 3
    assert curve[0][0] == 4 and curve[-1][0] == 8
    four, eight = report["uniform"]
    assert four["measured_sqnr_db"] < report["chosen"]["measured_sqnr_db"] < eight["measured_sqnr_db"]


def test_widths_of_1_to_3_bits_with_levels(planned: Program, here: Context) -> None:
    after = assigned(planned, here, mean_bits=1.99, widths=(1, 2, 3), levels="kmeans")
    plan, total, spent = after.require_plan(), 0, 0
    bits: set[int] = set()
    for layer in layers(after.graph):
        quantizer = plan.of(name_of(layer.weight), layer.name) if layer.weight is not None else None
        if quantizer is not None and layer.name not in plan.islands:
            assert quantizer.levels is not None and quantizer.levels.shape == (
                len(quantizer.scale),
                1 << quantizer.bits,
            )
            size = numpy_of(layer.weight).size if layer.weight is not None else 0
            bits, total, spent = bits | {quantizer.bits}, total + size, spent + quantizer.bits * size
    report = report_of(after)
    assert bits == {1, 2, 3} and 1.7 < spent / total <= 1.99
    assert report["chosen"]["mean_bits"] == pytest.approx(spent / total)
    one, two, three = (uniform["measured_sqnr_db"] for uniform in report["uniform"])
    assert one < two < three, "levels are what is measured: a uniform grid of 1 bit would leave nothing"
    assert one > 0
    pipeline.run_passes(after, [InsertQdq()], here)


def check_additive(report: Any, off_db: float = 0.0) -> None:
    for point in (report["chosen"], *report["uniform"]):
        assert abs(point["sqnr_db"] + off_db - point["measured_sqnr_db"]) < 2.5


def test_errors_of_layers_add_up(planned: Program, here: Context) -> None:
    report = report_of(assigned(planned, here, mean_bits=5.5))
    check_additive(report)
    with pytest.raises(AssertionError):
        check_additive(report, off_db=5.0)


def coarse(program: Program, value: str, factor: float) -> Program:
    """A plan whose quantizer of one weight has 4 bits, with steps so much longer: the profile takes it for 4 bits."""
    assert program.plan is not None
    layer = next(layer for layer in layers(program.graph) if name_of(layer.weight) == value)
    made = weight_quantizer(layer, weight_format(4), "mse", "test")
    longer = replace(made, scale=(made.scale * np.float32(factor)).astype(np.float32))
    return replace(program, plan=replace(program.plan, quantizers={**program.plan.quantizers, Site(value): longer}))


def worst(report: Any) -> str:
    """The layer that hurts most at 4 bits."""
    table = report["profile"]
    return str(min(table, key=lambda name: np.mean(table[name]["4"])))


@pytest.mark.parametrize("score", ["sqnr", "hawq"])
def test_a_planted_sensitive_layer_is_found(planned: Program, here: Context, score: str) -> None:
    plain = assigned(planned, here, mean_bits=5.0, score=score, probes=4)
    assert worst(report_of(plain)) != "b1_conv2"
    after = assigned(coarse(planned, "b1_w2", 10.0), here, mean_bits=5.0, score=score, probes=4)
    assert worst(report_of(after)) == "b1_conv2" and widths(after)["b1_conv2"][0] == 8


def test_a_budget_that_cannot_be_met_names_the_least(planned: Program, here: Context) -> None:
    with pytest.raises(RecipeError, match=r"budget of 3\.000 bits a weight .* smallest possible is 4\.000 bits"):
        AssignBits(mean_bits=3.0).run(planned, here)
    with pytest.raises(RecipeError, match=r"0\.0100 of the fp32 size .* smallest possible is 0\.\d+ of"):
        AssignBits(size=0.01).run(planned, here)


def test_a_loose_budget_leaves_layers_in_float(planned: Program, here: Context) -> None:
    after = assigned(planned, here, size=0.7, floats=True)
    assert after.plan is not None
    chosen = [name for name, reason in after.plan.islands.items() if reason.startswith("assign_bits:")]
    assert chosen
    assert 0.3 < report_of(after)["chosen"]["takes"] <= 0.7
    quantized = pipeline.run_passes(after, [InsertQdq(islands=())], here)
    assert quantized.plan is not None
    assert {name: quantized.plan.islands[name] for name in chosen} == dict.fromkeys(
        chosen, "assign_bits: worth more in float"
    )
    for layer in layers(quantized.graph):
        if layer.name in chosen and layer.weight is not None:
            assert layer.weight.const_value is not None, "its weights come without a quantizer"
    assert quantized.plan.report == after.plan.report
    x = np.zeros((1, *after.shape), np.float32)
    with Executor(quantized.model, here.folder, threads=2) as executor:
        assert np.isfinite(executor.call(after.signature, x, 0)["epsilon"]).all()


def test_latency_buys_float_layers_and_attention_counts(planned: Program, here: Context) -> None:
    tight = assigned(planned, here, latency=1.0, floats=True)
    assert "float" not in report_of(tight)["chosen"]["layers"]
    loose = report_of(assigned(planned, here, latency=2.0, floats=True))
    assert loose["chosen"]["layers"]["float"] > 0 and 1 < loose["chosen"]["takes"] <= 2
    assert {"scores", "mix"} <= loose["units"].keys()


def test_bit_operations_with_narrow_activations_and_tables(here: Context) -> None:
    steps = [Normalize(), make_pass("freeze_time"), Observe(groups=0), ChooseScales(), GroupSteps(), StepScales()]
    program = pipeline.run_passes(tiny_program(), steps, here)
    after = assigned(program, here, bops=0.6, activation_widths=(6, 8))
    assert after.plan is not None
    assert report_of(after)["chosen"]["takes"] <= 0.6
    own = {site: q for site, q in after.plan.quantizers.items() if site.consumer and q.format.name == "uint6"}
    labels = {name for name, label in report_of(after)["units"].items() if label.endswith("/6")}
    assert labels and {site.consumer for site in own} == labels
    for site, q in own.items():
        assert program.plan is not None
        whole = program.plan.of(site.value, site.consumer)
        assert whole is not None and q.table == whole.table
        np.testing.assert_allclose(q.scale * 63, whole.scale * 255, rtol=1e-5)


def test_mixdq_keeps_the_best_split(planned: Program, here: Context) -> None:
    after = assigned(planned, here, mean_bits=5.5, score="mixdq", splits=3, length=2)
    report = report_of(after)
    assert mean_bits(after) <= 5.5
    assert 1 <= len(report["splits"]) <= 3 and all(0 <= s < 2 for s in report["splits"])


def test_mixdq_splits_the_budget_between_content_and_quality(
    planned: Program, here: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of both groups by name, and the scores of each; the tiny network has no content of its own."""
    seen: list[tuple[Any, list[bool]]] = []

    def spied(errors: Any, costs: Any, content: list[bool], *rest: Any) -> Any:
        seen.append((errors, content))
        return split_budget(errors, costs, content, *rest)

    monkeypatch.setattr(assign_bits, "split_budget", spied)
    options: dict[str, Any] = {"mean_bits": 5.5, "score": "mixdq", "splits": 2, "length": 2}
    plain = report_of(assigned(planned, here, **options))
    assert plain["content"] == [] and len(plain["splits"]) == 1
    monkeypatch.setattr(assign_bits, "content_layers", lambda program: frozenset({"q", "b1_conv1"}))
    report = report_of(assigned(planned, here, **options))
    (quality, nothing), (scores, content) = seen
    names = list(report["units"])
    assert not any(nothing) and {name for name, of in zip(names, content, strict=True) if of} == {"q", "b1_conv1"}
    assert report["content"] == ["b1_conv1", "q"]
    for name, row, errors in zip(names, scores, quality, strict=True):
        assert (row != errors) == (name in ("q", "b1_conv1")), "images score these, and errors all others"


def test_the_same_twice_and_a_snapshot_keeps_it(planned: Program, here: Context, tmp_path: Path) -> None:
    one, two = (assigned(planned, here, mean_bits=5.0) for _ in range(2))
    assert one.plan is not None and two.plan is not None
    assert one.plan.report == two.plan.report and widths(one) == widths(two)
    snapshot.save_program(one, tmp_path / "saved")
    loaded, _ = snapshot.load_program(tmp_path / "saved")
    assert loaded.plan is not None
    assert loaded.plan.report == report_of(one) and loaded.plan.islands == one.plan.islands
    assert widths(loaded) == widths(one)


def test_only_what_changes_gets_another_quantizer(planned: Program, here: Context) -> None:
    after = assigned(planned, here, mean_bits=5.5)
    assert after.plan is not None and planned.plan is not None
    for site, q in after.plan.quantizers.items():
        old = planned.plan.quantizers[site]
        assert (q is old) == (q.by != "assign_bits") and (q is old or q.format.bits == 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mean_bits": 5.0, "size": 0.2}, "2 budgets: mean_bits, size"),
        ({"mean_bits": -1.0}, "mean_bits is -1"),
        ({"widths": [4, 9]}, "widths is"),
        ({"widths": []}, "widths is"),
        ({"widths": [4, 4]}, "widths is"),
        ({"activation_widths": [1]}, "activation_widths is"),
        ({"widths": [1, 2]}, "weights of 1 bit have no uniform grid"),
        ({"parts": 2, "levels": "kmeans"}, "do not go with levels"),
        ({"calls": 0}, "calls is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"splits": 0}, "splits is 0"),
        ({"probes": 0}, "probes is 0"),
        ({"spread": 0.0}, "spread is 0"),
        ({"float_cost": 0.5}, "float_cost is 0.5"),
        ({"scope": "layer", "score": "hawq"}, "scope layer has no score hawq"),
        ({"latency": 1.5}, "widths do not change the latency"),
        ({"mean_bits": 5.0, "activation_widths": [6, 8]}, "narrower activations save nothing of mean_bits"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        make_pass("assign_bits", options)
    assert caught.value.hint


def test_without_a_budget(planned: Program, here: Context) -> None:
    with pytest.raises(RecipeError, match="has no budget") as caught:
        AssignBits().run(planned, here)
    assert "mean_bits" in str(caught.value.hint)


def test_the_bundle_tells_it(
    planned: Program, here: Context, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = replace(planned, source={"kind": "test", "name": "tiny", "parameter_bytes": 1})
    program = pipeline.run_passes(assigned(named, here, mean_bits=5.5), [InsertQdq()], here)
    recipe = RecipeEntry({"name": "test", "description": "bits"})
    compilation = Compilation("test", recipe, Calibration(seed=0, samples=4, batch=2), versions={})
    write_bundle(program, tmp_path / "bundle", here.folder, compilation, threads=2)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.bits == report_of(program)
    print_inspection(bundle)
    said = capsys.readouterr().out
    assert "layers by bits" in said and "chosen" in said
