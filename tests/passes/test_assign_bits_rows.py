"""Widths by output channel, from assign_bits to the file: every row stays in its grid, and what that is worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint import Bundle, compile_model
from mezzotint.compiler.bits import report as bit_report
from mezzotint.compiler.core import pipeline, snapshot
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Recipe
from mezzotint.compiler.core.program import Program, Site
from mezzotint.compiler.errors import PassError, RecipeError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.lowering.qdq import lower_qdq
from mezzotint.compiler.rounding.layer_inputs import chosen_latents
from mezzotint.compiler.rounding.weights import find_weights, weight_rows
from mezzotint.compiler.scales.weights import rounded_weight
from mezzotint.passes.assign_bits import AssignBits
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.files import make_pass, with_options
from mezzotint.passes.recipes.parts import ISLANDS, static, stepwise
from mezzotint.passes.round_weights import RoundWeights
from mezzotint.text.report import print_inspection
from tests.helpers.models import SMALL
from tests.helpers.tiny import context_in, tiny_model, tiny_program

QUICK: dict[str, Any] = {"calls": 2, "samples": 2, "widths": (2, 4, 8), "mean_bits": 4.5}
ROWS: dict[str, Any] = {**QUICK, "parts": 10}
INSERT = (InsertQdq(), CleanQdq())


@pytest.fixture(scope="module", autouse=True)
def short_curve() -> Iterator[None]:
    """The Pareto curve costs most of the time, and has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bit_report, "CURVE", 2)
        yield


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_in(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def planned(here: Context) -> Program:
    return pipeline.run_passes(tiny_program(), [Normalize(), Observe(), ChooseScales()], here)


@pytest.fixture(scope="module")
def assigned(planned: Program, here: Context) -> Program:
    return pipeline.run_passes(planned, [AssignBits(**ROWS)], here)


@pytest.fixture(scope="module")
def inserted(assigned: Program, here: Context) -> Program:
    return pipeline.run_passes(assigned, INSERT, here)


def report_of(program: Program) -> Any:
    assert program.plan is not None
    return json.loads(json.dumps(program.plan.report))


def row_bits(program: Program) -> dict[str, Any]:
    """Bits of every output channel, by the name of the weight, as the plan has them."""
    assert program.plan is not None
    found = {}
    for layer in layers((program.float_model or program.model).graph):
        if layer.weight is not None and layer.name not in ("conv_in", "conv_out"):
            q = program.plan.of(name_of(layer.weight), layer.name)
            assert q is not None
            found[name_of(layer.weight)] = np.full(q.scale.size, q.format.bits) if q.row_bits is None else q.row_bits
    return found


def mean_bits(program: Program) -> float:
    sizes = {
        name: numpy_of((program.float_model or program.model).graph.initializers[name]).size
        for name in row_bits(program)
    }
    return float(sum(sizes[n] * bits.mean() for n, bits in row_bits(program).items()) / sum(sizes.values()))


@pytest.mark.parametrize(
    "options", [{}, {"score": "hawq", "probes": 4}, {"scope": "layer"}, {"order": "kurtosis"}, {"parts": 3}]
)
def test_the_budget_is_kept_and_told(planned: Program, here: Context, options: dict[str, Any]) -> None:
    after = pipeline.run_passes(planned, [AssignBits(**{**ROWS, **options})], here)
    report = report_of(after)
    assert 4.2 < mean_bits(after) <= 4.5
    assert report["chosen"]["mean_bits"] == pytest.approx(mean_bits(after), rel=1e-9)
    mixed = {layer for layer, label in report["units"].items() if label == "mixed"}
    assert mixed and mixed == report["channels"].keys()
    assert report["chosen"]["layers"]["mixed"] == len(mixed)
    assert f"{len(report['units'])} layers: " in after.history[-1].note
    assert f"{len(mixed)} mixed by channel; 4." in after.history[-1].note
    by_layer = {layer.name: name_of(layer.weight) for layer in layers(after.graph)}
    for layer, counts in report["channels"].items():
        bits = row_bits(after)[by_layer[layer]]
        assert counts == {str(b): int((bits == b).sum()) for b in np.unique(bits)}
    four, eight = report["uniform"][1:]
    assert four["measured_sqnr_db"] < report["chosen"]["measured_sqnr_db"] < eight["measured_sqnr_db"]


@pytest.mark.parametrize("budget", [{"size": 0.5}, {"bops": 0.55}])
def test_other_budgets_go_through_parts(planned: Program, here: Context, budget: dict[str, float]) -> None:
    after = pipeline.run_passes(planned, [AssignBits(**{**ROWS, "mean_bits": None, **budget})], here)
    (limit,) = budget.values()
    assert 0.9 * limit < report_of(after)["chosen"]["takes"] <= limit
    assert report_of(after)["chosen"]["layers"]["mixed"] >= 1


def test_where_all_parts_agree_nothing_differs(planned: Program, here: Context) -> None:
    """The same plan as without parts, quantizer by quantizer, and as from the other order."""
    one, ten = (
        pipeline.run_passes(planned, [AssignBits(**{**QUICK, "mean_bits": 8, "parts": n})], here) for n in (1, 10)
    )
    assert one.plan is not None and ten.plan is not None
    assert {site: q.entry(site) for site, q in one.plan.quantizers.items()} == {
        site: q.entry(site) for site, q in ten.plan.quantizers.items()
    }
    assert all(q.row_bits is None for q in ten.plan.quantizers.values())
    assert not report_of(ten)["channels"] and "channels" not in report_of(one)


def test_scales_are_those_of_each_rows_own_width(assigned: Program, planned: Program, here: Context) -> None:
    assert assigned.plan is not None
    plans = {bits: pipeline.run_passes(planned, [ChooseScales(weight_bits=bits)], here).plan for bits in (2, 4, 8)}
    for name, bits in row_bits(assigned).items():
        q = assigned.plan.of(name)
        assert q is not None and q.format.bits == bits.max()
        for i, width in enumerate(bits.tolist()):
            plan = plans[width]
            assert plan is not None
            np.testing.assert_array_equal(q.scale[i], plan.quantizers[Site(name)].scale[i])


def check_inside(program: Program, least: int = 3) -> None:
    """The integers of every mixed weight lie in the grids of its rows, in the graph and behind its lowering."""
    wanted = {name: bits for name, bits in row_bits(program).items() if np.ptp(bits)}
    assert program.float_model is not None
    floats = {layer.name: layer for layer in layers(program.float_model.graph)}
    checked = 0
    for weight in find_weights(program.graph):
        name = name_of(floats[weight.name].weight)
        if name in wanted:
            q = np.rint(weight.rows() / weight.scale()[:, None])
            assert (np.abs(q).max(axis=1) <= (1 << (wanted[name].astype(int) - 1)) - 1).all(), name
            assert np.abs(q).max() > 7 or wanted[name].max() < 8, "the widest rows use their width"
            checked += 1
    assert checked == len(wanted) >= least
    folded = lower_qdq(program.model).graph.initializers.values()
    stored = {
        name_of(v).partition("_rows_")[0]: v for v in folded if v.dtype == ir.DataType.INT8 and len(v.shape or ()) > 1
    }
    axes = {name_of(layer.weight): layer.weight_axis for layer in floats.values()}
    for name, bits in wanted.items():
        rows = np.moveaxis(numpy_of(stored[name]), axes[name] or 0, 0).reshape(len(bits), -1).astype(int)
        assert (np.abs(rows).max(axis=1) <= (1 << (bits.astype(int) - 1)) - 1).all()


def test_rows_lie_in_their_grids_behind_insert_qdq(inserted: Program) -> None:
    check_inside(inserted)
    plain = inserted.model.clone()
    weight = next(w for w in find_weights(plain.graph) if name_of(w.value).endswith("_rows"))
    weight.value.const_value = ir.tensor(numpy_of(weight.value) * np.float32(40), name=name_of(weight.value))
    with pytest.raises(AssertionError):
        check_inside(replace(inserted, model=plain))


def test_the_float_graph_keeps_its_weights(assigned: Program, inserted: Program) -> None:
    assert inserted.float_model is not None
    mixed = [name for name, bits in row_bits(inserted).items() if np.ptp(bits)]
    for name in mixed:
        kept = numpy_of(inserted.float_model.graph.initializers[name])
        np.testing.assert_array_equal(kept, numpy_of(assigned.graph.initializers[name]))
        assert name not in inserted.graph.initializers, "nothing reads the uncut weight any more"
        assert not np.array_equal(kept, numpy_of(inserted.graph.initializers[f"{name}_rows"]))


def test_a_session_computes_what_was_simulated(inserted: Program, here: Context) -> None:
    """The graph with its quantizers, against one that reads weights which were rounded in numpy."""
    assert inserted.plan is not None and inserted.float_model is not None
    simulated = inserted.model.clone()
    floats = {layer.name: layer for layer in layers(inserted.float_model.graph)}
    for weight in find_weights(simulated.graph):
        layer = floats[weight.name]
        assert layer.weight is not None
        q = inserted.plan.of(name_of(layer.weight), layer.name)
        assert q is not None
        weight.value.const_value = ir.tensor(rounded_weight(numpy_of(layer.weight), q), name=name_of(weight.value))
        for pair in weight.dequantizers:
            pair.outputs[0].replace_all_uses_with(weight.value)
    x = np.random.default_rng(0).standard_normal((2, *inserted.shape)).astype(np.float32)
    for t in inserted.deployment.timesteps:
        got, want = (epsilon(model, inserted, x, t, here) for model in (inserted.model, simulated))
        np.testing.assert_array_equal(got, want)
    uncut = inserted.model.clone()
    for weight in find_weights(uncut.graph):
        value = floats[weight.name].weight
        assert value is not None
        weight.value.const_value = ir.tensor(np.array(numpy_of(value)), name=name_of(weight.value))
    t = inserted.deployment.timesteps[0]
    wide, cut = (epsilon(model, inserted, x, t, here) for model in (uncut, inserted.model))
    assert not np.array_equal(wide, cut), "the twin: rows that are not cut off"


def epsilon(model: ir.Model, program: Program, x: Any, t: float, here: Context) -> Any:
    with Executor(model, here.folder, threads=1, level="none") as executor:
        return executor.call(program.signature, x, t)["epsilon"]


def sqnr(program: Program, here: Context) -> float:
    """Of epsilon in dB, on latents that calibration did not see."""
    assert program.float_model is not None
    signal, noise = 0.0, 0.0
    with (
        Executor(program.float_model, here.folder, threads=1) as exact,
        Executor(program.model, here.folder, threads=1, level="basic") as quantized,
    ):
        for latents in chosen_latents(program, replace(here, seed=5), 3):
            want, got = (
                e.call(program.signature, latents.x, latents.timestep)["epsilon"].astype(np.float64)
                for e in (exact, quantized)
            )
            signal, noise = signal + float(np.sum(want**2)), noise + float(np.sum((want - got) ** 2))
    return float(10 * np.log10(signal / noise))


ROUNDINGS: list[dict[str, Any]] = [
    *({"method": method} for method in ("nearest", "gptq", "gptaq", "comq", "obq")),
    *({"method": "gptq", "scales": scales} for scales in ("mse", "output")),
]


@pytest.mark.parametrize("options", ROUNDINGS)
def test_rows_lie_in_their_grids_behind_round_weights(
    inserted: Program, here: Context, options: dict[str, Any]
) -> None:
    after = pipeline.run_passes(inserted, [RoundWeights(**options)], here)
    assert after.plan is not None and after.plan.report, "new scales keep the report of assign_bits"
    check_inside(after)
    assert {name: b.tolist() for name, b in row_bits(after).items()} == {
        name: b.tolist() for name, b in row_bits(inserted).items()
    }
    if options["method"] != "nearest":
        assert sqnr(after, here) > sqnr(inserted, here) + 0.5


def test_rounding_starts_from_weights_that_are_not_cut_off(inserted: Program, here: Context) -> None:
    after = pipeline.run_passes(inserted, [RoundWeights(method="nearest")], here)
    assert "100% of nearest's" in after.history[-1].note
    assert inserted.float_model is not None
    floats = {layer.name: layer.weight for layer in layers(inserted.float_model.graph)}
    wider = pipeline.run_passes(inserted, [RoundWeights(method="nearest", scales="mse")], here)
    gained = 0
    for weight, before in zip(find_weights(wider.graph), find_weights(inserted.graph), strict=True):
        value = floats[weight.name]
        assert value is not None
        exact = weight_rows(value, weight.axis)
        if np.array_equal(exact, before.rows()):
            continue
        cut = np.rint(before.rows() / before.scale()[:, None]) * before.scale()[:, None]
        gained += int(np.square(weight.rows() - exact).sum() < np.square(cut - exact).sum())
    assert gained > 0, "a search on what was cut off would never find a longer step"


def with_loud_channels(program: Program) -> Program:
    """The weights of some layers with three channels each that are twelve times as large as the others."""
    model = program.model.clone()
    for name in ("b1_w1", "b2_w1", "b1_w2", "b2_w2", "up_w", "down_w"):
        array = np.array(numpy_of(model.graph.initializers[name]))
        array[[2, 7, 11]] *= 12
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return replace(program, model=model)


@pytest.mark.parametrize(("planted", "least", "most"), [(True, 3.0, np.inf), (False, -1.5, 1.5)])
def test_a_few_loud_channels_get_the_bits(here: Context, planted: bool, least: float, most: float) -> None:
    """What parts are worth at the same mean bits: dB of epsilon, activations in 8 bits and all."""
    made = with_loud_channels(tiny_program()) if planted else tiny_program()
    before = pipeline.run_passes(made, [Normalize(), Observe(), ChooseScales()], here)
    choose = [AssignBits(**{**QUICK, "widths": (4, 8), "mean_bits": 4.75, "parts": n}) for n in (1, 10)]
    one, ten = (pipeline.run_passes(before, [step, *INSERT], here) for step in choose)
    assert max(mean_bits(one), mean_bits(ten)) <= 4.75 + 1e-9
    assert least < sqnr(ten, here) - sqnr(one, here) < most
    if planted:
        widest = [row_bits(ten)[name].argsort()[-3:] for name in ("b1_w2", "b2_w2", "up_w")]
        assert sum(len({2, 7, 11} & set(rows.tolist())) for rows in widest) >= 5


def test_a_snapshot_keeps_the_widths(assigned: Program, tmp_path: Path) -> None:
    snapshot.save_program(assigned, tmp_path / "saved")
    loaded, _ = snapshot.load_program(tmp_path / "saved")
    assert loaded.plan is not None and assigned.plan is not None
    for site, q in assigned.plan.quantizers.items():
        got = loaded.plan.quantizers[site]
        assert (q.row_bits is None) == (got.row_bits is None) and got.entry(site) == q.entry(site)
        if q.row_bits is not None:
            assert got.row_bits is not None and got.row_bits.dtype == np.int8
            np.testing.assert_array_equal(got.row_bits, q.row_bits)
    assert any(q.row_bits is not None for q in loaded.plan.quantizers.values())


def test_a_second_assignment_starts_from_plain_quantizers(assigned: Program, here: Context) -> None:
    again = pipeline.run_passes(assigned, [AssignBits(**{**QUICK, "mean_bits": 8})], here)
    assert again.plan is not None
    assert all(q.row_bits is None for q in again.plan.quantizers.values())
    assert {int(b) for bits in row_bits(again).values() for b in bits} == {8}


def test_a_large_weight_is_cut_off_in_a_file(assigned: Program, here: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "INLINE_BYTES", 64)
    after = pipeline.run_passes(assigned, INSERT, here)
    cut = [v.const_value for name, v in after.graph.initializers.items() if name.endswith("_rows")]
    assert cut and all(isinstance(tensor, ir.ExternalTensor) for tensor in cut)
    check_inside(after)


def test_activations_have_no_rows(assigned: Program, here: Context) -> None:
    assert assigned.plan is not None
    site = Site("b1_a1")
    narrow = replace(assigned.plan.quantizers[site], row_bits=np.array([4, 8], np.int8))
    plan = replace(assigned.plan, quantizers={**assigned.plan.quantizers, site: narrow})
    with pytest.raises(PassError, match="only the output channels of a weight") as caught:
        InsertQdq().run(replace(assigned, model=assigned.model.clone(), plan=plan), here)
    assert caught.value.where == "b1_a1" and caught.value.hint


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"parts": 0}, "parts is 0"),
        ({"order": "size"}, "order"),
        ({"parts": 2, "latency": 1.5, "floats": True}, "do not go with a budget of latency"),
        ({"parts": 2, "mean_bits": 5.0, "floats": True}, "do not go with layers in float"),
        ({"parts": 2, "bops": 0.5, "activation_widths": [6, 8]}, "do not go with narrower activations"),
        ({"parts": 2, "mean_bits": 5.0, "score": "mixdq"}, "do not go with the score mixdq"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        make_pass("assign_bits", options)
    assert caught.value.hint


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """`compiled(spelling, parts)`: the tiny net's bundle with widths by channel, made once."""
    folder = tmp_path_factory.mktemp("compiled")
    ir.save(tiny_model(), folder / "tiny.onnx")
    made: dict[tuple[str, int, int], Bundle] = {}

    def make(spelling: str, parts: int = 10, run: int = 0) -> Bundle:
        if (spelling, parts, run) not in made:
            choose = AssignBits(**{**QUICK, "parts": parts, "mean_bits": 5.0 if parts > 1 else 8.0})
            portable = spelling == "qdq"
            islands = (
                {} if portable else {"assign_bits.islands": ["first", "last"], "insert_qdq.islands": ["first", "last"]}
            )
            passes = static(plan=(choose,)) if portable else stepwise(plan=(replace(choose, islands=ISLANDS),))
            chosen = with_options(Recipe("rows", "", passes), islands)
            out = folder / f"{spelling}-{parts}-{run}"
            made[spelling, parts, run] = compile_model(folder / "tiny.onnx", out, recipe=chosen, **SMALL)
        return made[spelling, parts, run]

    return make


@pytest.mark.parametrize("spelling", ["qdq", "integer"])
def test_the_file_shrinks_and_the_kernels_stay(compiled: Callable[..., Bundle], spelling: str) -> None:
    eight, mixed = compiled(spelling, 1), compiled(spelling)
    assert {q.format for q in eight.manifest.quantizers} == {"uint8", "int8"}
    assert any(len(q.row_bits or {}) > 1 for q in mixed.manifest.quantizers)
    kernels = [bundle.manifest.kernels for bundle in (eight, mixed)]
    assert kernels[0].integer == kernels[1].integer > 10 and kernels[0].layers == kernels[1].layers
    wide, narrow = (bundle.manifest.require_storage().types for bundle in (eight, mixed))
    assert "int4" not in wide
    packed = sum(narrow[kind].values for kind in ("int2", "int4") if kind in narrow)
    assert packed > 3000 and wide["int8"].values - narrow["int8"].values == packed
    made = [node.outputs[0].name or "" for node in ir.load(mixed.model_path).graph if node.op_type == "Concat"]
    assert any(name.partition("_rows_")[2] for name in made), "rows of several widths are put together again"
    x = np.random.default_rng(4).normal(size=(2, *mixed.sample_shape)).astype(np.float32)
    assert np.isfinite(mixed.denoiser(1)(x, mixed.deployment.timesteps[0])).all()


def test_a_second_compilation_gives_the_same_bytes(compiled: Callable[..., Bundle]) -> None:
    one, two = (compiled("integer", 10, run).model_path.read_bytes() for run in (0, 1))
    assert one == two


def test_the_bundle_tells_it(compiled: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    bundle = compiled("qdq")
    bits = bundle.manifest.bits
    assert bits["parts"] == 10 and bits["order"] == "error" and bits["channels"]
    print_inspection(bundle)
    said = " ".join(capsys.readouterr().out.split())
    assert "mixed by channel" in said
    assert bundle.manifest.require_storage().notes == ()
