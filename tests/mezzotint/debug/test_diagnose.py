"""`mezzotint debug`: the layer that costs most comes first, and its suggestion follows from measurements."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mezzotint import compile_model, open_bundle
from mezzotint.bench.pairs import paired_run, unseen_seed
from mezzotint.compiler.audit.suggestions import Facts, suggest
from mezzotint.compiler.core.pipeline import Context, Recipe
from mezzotint.compiler.core.program import Program, Site
from mezzotint.compiler.errors import SignatureError
from mezzotint.debug import diagnose as diagnose_module
from mezzotint.debug.diagnose import Diagnosis, diagnose
from mezzotint.mix.mix import mix_bundles
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import recipe_from_json
from mezzotint.runtime.bundle.bundle import Bundle, seal_bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.session import Denoiser
from tests.helpers.models import CONTEXT, SMALL, THREADS, Cli, Compiled, hand_written, write
from tests.helpers.spreads import cluster_here

SUMS = {"signal": 1.0, "noise": 2e-3, "x_signal": 1.0, "x_noise": 1e-3, "y_noise": 1e-4}
WIDTHS = {"x_low": -1.0, "x_high": 1.0, "x_reach": 2.0, "y_low": -1.0, "y_high": 1.0, "y_reach": 2.0}
QUIET = {**SUMS, **WIDTHS}
NARROW = {"weight": 4, "activation": 6, "output": 6}
FEW_ISLANDS = {"insert_qdq.islands": ["first", "last"]}
SMOOTH_ALL = {"gain": -100.0, "run_time": True, "run_time_gain": -100.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qdq": ("w8a8", {}),
    "smoothed": (
        "smoothquant",
        {"smooth_scales.gain": -100.0, "smooth_scales.run_time": True, "smooth_scales.run_time_gain": -100.0},
    ),
    "integer": ("w8a8-steps", FEW_ISLANDS),
    "narrow": ("w8a8-steps", {**FEW_ISLANDS, **{f"choose_scales.{what}_bits": n for what, n in NARROW.items()}}),
}


def examined(bundle: Bundle, reference: Path, n: int = 1, **options: Any) -> Diagnosis:
    return diagnose(bundle, reference, n, threads=THREADS, **options)


def names(found: Diagnosis) -> list[str]:
    return [layer.name for layer in found.layers]


def edited(bundle: Bundle, target: Path, name: str, factor: float) -> Bundle:
    """A copy of a bundle in which one initializer of the network is another, sealed again."""
    shutil.copytree(bundle.path, target)
    model = onnx.load(target / "unet" / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * factor).astype(np.float32), name))
    for file in (target / "unet").glob("model.onnx*"):
        file.unlink()
    onnx.save(model, target / "unet" / "model.onnx")
    seal_bundle(target, bundle.manifest)
    return open_bundle(target)


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """`sabotage[value] = factor` multiplies the scales of all views of a value, before they are written."""
    factors: dict[str, float] = {}
    honest = InsertQdq.run

    def run(self: InsertQdq, program: Program, context: Context) -> Program:
        assert program.plan is not None

        def planted(site: Site) -> np.float32:
            return np.float32(factors.get(site.value, 1.0))

        quantizers = {site: replace(q, scale=q.scale * planted(site)) for site, q in program.plan.quantizers.items()}
        return honest(self, replace(program, plan=replace(program.plan, quantizers=quantizers)), context)

    monkeypatch.setattr(InsertQdq, "run", run)
    yield factors


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    recipe, settings = VARIANTS[request.param]
    target = tmp_path_factory.mktemp("variant") / "bundle"
    return compile_model(hand.exported, target, recipe=recipe, settings=settings, **SMALL)


class TestRanking:
    @pytest.mark.parametrize("kind", ["qdq", "integer", "narrow"])
    @pytest.mark.parametrize("value", ["h2", "h3.act"])
    def test_a_sabotaged_layer_comes_first(
        self, hand: Compiled, tmp_path: Path, sabotage: dict[str, float], kind: str, value: str
    ) -> None:
        recipe, settings = VARIANTS[kind]
        layer = {"h2": "second", "h3.act": "third"}[value]
        honest = compile_model(hand.exported, tmp_path / "honest", recipe=recipe, settings=settings, **SMALL)
        sabotage[value] = 4.0
        planted = compile_model(hand.exported, tmp_path / "planted", recipe=recipe, settings=settings, **SMALL)

        before, after = examined(honest, hand.exported), examined(planted, hand.exported)
        assert names(after)[0] == layer
        shares = [next(x.share for x in found.layers if x.name == layer) for found in (before, after)]
        assert shares[1] > 0.6 and shares[1] > shares[0] + 0.1
        assert after.layers[0].suggestion.kind == "range"
        assert all(x.suggestion.kind != "range" for x in before.layers)

    def test_one_of_many_layers(self, unet: Compiled, tmp_path: Path) -> None:
        honest = examined(unet.bundle, unet.exported, calls=2)
        chosen = [layer.name for layer in honest.layers[1:] if layer.kernel == "QLinearConv"][2]
        nodes = onnx.load(unet.bundle.model_path, load_external_data=False).graph.node
        made = next(node.output[0] for node in nodes if node.name == chosen)
        scale = next(node.input[1] for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] == made)

        planted = examined(edited(unet.bundle, tmp_path / "b", scale, 4.0), unet.exported, calls=2)
        assert len(honest.layers) > 15 and not honest.unknown
        assert honest.same_weights
        assert names(honest)[0] != chosen and names(planted)[0] == chosen
        assert honest.together.pooled() == pytest.approx(honest.bundle.pooled(), abs=0.7)  # 46 layers, two calls

    @pytest.mark.parametrize(("name", "layer"), [("h2_scale", "second"), ("second.w_scale", "second")])
    def test_a_scale_that_was_changed_in_the_file(self, hand: Compiled, tmp_path: Path, name: str, layer: str) -> None:
        assert names(examined(hand.bundle, hand.exported))[0] != layer
        found = examined(edited(hand.bundle, tmp_path / "edited", name, 4.0), hand.exported)
        assert found.layers[0].name == layer and found.layers[0].suggestion.kind == "range"
        same = examined(edited(hand.bundle, tmp_path / "same", name, 1.0), hand.exported)
        assert same.to_json() == examined(hand.bundle, hand.exported).to_json()


class TestMeasures:
    def test_all_layers_together_are_the_bundle(self, variant: Bundle, hand: Compiled) -> None:
        found = examined(variant, hand.exported)

        assert sorted(names(found)) == ["second", "third"] and not found.unknown
        for call, db in found.bundle.per_step().items():
            assert found.together.per_step()[call] == pytest.approx(db, abs=0.05)
        assert sum(layer.share for layer in found.layers) == pytest.approx(1)

    def test_a_cost_is_the_error_of_the_bundle_with_all_other_layers_in_float(
        self, variant: Bundle, hand: Compiled, tmp_path: Path
    ) -> None:
        recipe = recipe_from_json(variant.manifest.recipe.to_json(), where="the bundle")
        settings = {"insert_qdq.islands": ["first", "last", "third"]}
        alone = compile_model(hand.exported, tmp_path / "b", recipe=recipe, settings=settings, **SMALL)
        seed = unseen_seed(alone)
        exact = Denoiser(hand.exported, alone.signature, threads=THREADS)
        _, wanted = paired_run(exact, alone.denoiser(THREADS), alone, 2, seed=seed)
        found = {layer.name: layer for layer in examined(variant, hand.exported, 2).layers}

        for call, db in wanted.per_step().items():
            assert found["second"].cost.per_step()[call] == pytest.approx(db, abs=0.05)
        assert abs(found["third"].cost.pooled() - wanted.pooled()) > 0.5

    def test_calls_are_spread_and_measured_in_the_same_way(self, hand: Compiled) -> None:
        whole, few = (examined(hand.bundle, hand.exported, calls=calls) for calls in (None, 2))

        timesteps = hand.bundle.deployment.calls
        assert whole.calls == dict(enumerate(timesteps))
        worst = whole.bundle.worst()[0]
        assert len(few.calls) == 2 and worst in few.calls and set(few.calls.items()) <= set(whole.calls.items())
        for layer in few.layers:
            like = next(x for x in whole.layers if x.name == layer.name)
            assert {call: like.local[call] for call in few.calls} == layer.local
            assert {call: like.cost.per_step()[call] for call in few.calls} == layer.cost.per_step()

    def test_guidance_and_conditions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = write(hand_written(context="context"), tmp_path / "m.onnx")
        given, empty = ({"context": np.full((1, CONTEXT), value, np.float32)} for value in (1.0, 0.0))
        rows: dict[str, Any] = {"conditions": given, "unconditional": empty}
        options: dict[str, Any] = {**rows, "guidance": 3.0, "recipe": "w8a8", **SMALL}
        bundle = compile_model(source, tmp_path / "b", **options)
        seed = unseen_seed(bundle)
        exact = Denoiser(source, bundle.signature, threads=THREADS)
        _, wanted = paired_run(exact, bundle.denoiser(THREADS), bundle, 2, seed=seed, **rows)

        found = examined(bundle, source, 2, **rows)
        assert found.bundle.per_step() == pytest.approx(wanted.per_step(), abs=0.01)
        assert found.together.per_step() == pytest.approx(wanted.per_step(), abs=0.1)
        cluster = cluster_here(monkeypatch, diagnose_module)
        spread = examined(bundle, source, 2, **rows, cluster="local")
        assert cluster.pieces == {"layers, one by one": len(bundle.deployment.calls)}
        assert spread.to_json() == found.to_json()
        fed = copy.copy(bundle)
        fed.condition_network = object()  # type: ignore[assignment]
        with pytest.raises(InputError, match="cannot travel"):
            examined(fed, source, 2, **rows, cluster="local")


class TestAdvice:
    W8A8 = RECIPES["w8a8"]

    def advised(self, *calls: dict[str, float], parts: tuple[float, ...] = (), **options: Any) -> str:
        facts = Facts()
        for i, changes in enumerate(calls):
            facts.add(i, {**QUIET, **changes}, parts)
        given = {"share": 0.5, "recipe": self.W8A8, "weight_bits": 8, **options}
        return suggest("layer", facts, **given).kind

    def test_each_rule(self) -> None:
        loud = {"x_noise": 1e-2, "noise": 1.1e-2}
        narrow = {**loud, "x_low": -0.4, "x_high": 0.4}
        assert self.advised(loud) == "island"
        assert self.advised(loud, narrow) == "table"
        assert self.advised(loud, {**narrow, "x_reach": 0.8}) == "island"
        assert self.advised(loud, parts=(1.0, 5.0)) == "split"
        assert self.advised(loud, parts=(1.0, 3.0)) == "island"
        assert self.advised({**loud, "x_reach": 8.0}) == "range"
        assert self.advised({**loud, "x_reach": 0.5}) == "range"
        assert self.advised({"y_noise": 1e-2, "noise": 1.1e-2, "y_reach": 8.0}) == "range"
        assert self.advised({"noise": 0.5}) == "range"
        assert self.advised({"noise": 0.01}) == "rounding"
        assert self.advised({"noise": 0.01}, weight_bits=4) == "bits"
        assert self.advised({"noise": 0.01}, recipe=RECIPES["w8a8-best"]) == "island"
        assert self.advised({"noise": 0.5}, weight_bits=None) == "island"
        assert self.advised(loud, share=0.009) == "-"

    def test_the_options_of_an_island_can_be_typed_as_printed(self, hand: Compiled, cli: Cli, tmp_path: Path) -> None:
        import shlex

        found = examined(hand.bundle, hand.exported)
        said = next(x.suggestion for x in found.layers if x.suggestion.kind == "island")
        words = ["--recipe", "w8a8", "--scheduler", "ddpm-linear", "--steps", 4, "--calibration-samples", 2]
        answer = cli("compile", hand.exported, "-o", tmp_path / "b", *words, *shlex.split(said.what))
        assert answer.code == 0, answer.err
        assert names(found)[0] in open_bundle(tmp_path / "b").manifest.islands


class TestRefusals:
    def test_recipes_that_cannot_be_taken_apart(self, hand: Compiled, tmp_path: Path) -> None:
        bundle = compile_model(hand.exported, tmp_path / "b", recipe="float", **SMALL)
        with pytest.raises(InputError, match="no layer of the bundle is quantized"):
            examined(bundle, hand.exported)

    def test_layers_with_the_timestep_in_front_of_their_scales(self, hand: Compiled, tmp_path: Path) -> None:
        """The constant form: a layer with a table cannot be taken out of it, and is named; the others can."""
        for gain, known in ((1000.0, 2), (-1000.0, 0)):
            settings = {**FEW_ISLANDS, "step_scales.decide": "expected", "step_scales.gain": gain}
            made = compile_model(
                hand.exported, tmp_path / f"{known}", target="openvino", settings=settings, force=True, **SMALL
            )
            if not known:
                with pytest.raises(InputError, match="no layer of the bundle is quantized and has a float layer"):
                    examined(made, hand.exported)
                continue
            found = examined(made, hand.exported)
            assert len(found.layers) == known
            assert found.together.pooled() == pytest.approx(found.bundle.pooled(), abs=1.0)

    def test_a_mixture(self, hand: Compiled, tmp_path: Path) -> None:
        other = compile_model(hand.exported, tmp_path / "b", recipe="w8a8-steps", settings=FEW_ISLANDS, **SMALL)
        options: dict[str, Any] = {
            "reference": hand.exported,
            "costs": {"a": 1.0, "b": 2.0},
            "pictures": 1,
            "threads": THREADS,
        }
        mixed = mix_bundles({"a": str(hand.bundle.path), "b": str(other.path)}, tmp_path / "mixed", **options)
        with pytest.raises(InputError, match="mixes several precisions"):
            examined(mixed, hand.exported)

    def test_a_pass_that_is_not_known_here(self, hand: Compiled, tmp_path: Path) -> None:
        class Own(InsertQdq):
            pass

        steps = tuple(Own() if isinstance(step, InsertQdq) else step for step in RECIPES["w8a8"].passes)
        bundle = compile_model(hand.exported, tmp_path / "b", recipe=Recipe("own", "", steps), **SMALL)
        with pytest.raises(InputError, match="one is not known here: there is no pass called 'own'"):
            examined(bundle, hand.exported)

    def test_another_reference(self, hand: Compiled, unet: Compiled) -> None:
        with pytest.raises(SignatureError, match="no input is called 'x'"):
            examined(hand.bundle, unet.exported)

    def test_other_weights_are_reported(self, hand: Compiled, tmp_path: Path, cli: Cli) -> None:
        model = onnx.load(hand.exported)
        tensor = next(t for t in model.graph.initializer if t.name == "second.w")
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), "second.w"))
        other = write(model, tmp_path / "other.onnx")

        answer = cli("debug", hand.bundle.path, "--reference", other)
        assert answer.code == 0 and "other weights" in " ".join(answer.err.split())
        found = examined(hand.bundle, other)
        assert not found.same_weights and examined(hand.bundle, hand.exported).same_weights
        assert (found.layers[0].name, found.layers[0].suggestion.kind) == ("second", "range")

    @pytest.mark.parametrize("options", [{"n": 0}, {"calls": 0}])
    def test_nothing_to_measure(self, hand: Compiled, options: dict[str, int]) -> None:
        with pytest.raises(InputError, match="ask for at least one of each"):
            examined(hand.bundle, hand.exported, **options)


class TestCommand:
    def test_json_and_text(self, hand: Compiled, cli: Cli) -> None:
        words = ("debug", hand.bundle.path, "--reference", hand.exported, "--threads", THREADS)
        found = examined(hand.bundle, hand.exported)

        answer = cli(*words, "--json")
        assert answer.code == 0, answer.err
        assert json.loads(answer.out) == json.loads(json.dumps(found.to_json()))
        answer = cli(*words, "--top", 1)
        assert answer.code == 0 and "1 layers with smaller costs" in answer.out and found.layers[0].name in answer.out
