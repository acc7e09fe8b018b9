"""Files for other tools: node data for Model Explorer, overrides for onnxruntime's quantizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from mezzotint import Bundle, compile_model
from mezzotint.compiler.core.formats import INT8, scale_for_range
from mezzotint.interchange import load_arguments, load_overrides, write_json
from mezzotint.interchange.overlay import make_overlay
from mezzotint.interchange.overrides import make_overrides
from mezzotint.runtime.bundle.bundle import MODEL
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.errors import InputError
from tests.helpers.models import CHANNELS, SMALL, THREADS, Cli, Compiled
from tests.mezzotint.cli.test_app import refused

ENDS = {"insert_qdq.islands": ["first", "last"]}  # so that the hand-written model has layers to quantize
NUMBERS = ("scale", "time", "cost")


@pytest.fixture(scope="module")
def stepped(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The hand-written model with tables of scales."""
    folder = tmp_path_factory.mktemp("stepped")
    return compile_model(hand.exported, folder / "b", recipe="w8a8-steps", settings=ENDS, **SMALL)


def layers_file(bundle: Bundle, path: Path, *names: str) -> Path:
    """Write the fields of `mezzotint debug --json` that an overlay reads."""
    known = names or [n for n, row in bundle.manifest.kernels.layers.items() if row.integer]
    path.write_text(json.dumps({"layers": [{"layer": n, "share": 1 / (2 + i)} for i, n in enumerate(known)]}))
    return path


def check_node_data(data: Any, model: Path) -> dict[str, Any]:
    """The schema of ai-edge-model-explorer 0.1.34, node_data_builder.py; the graph's and the nodes' own names as keys.

    Returns the results.
    """
    graph = onnx.load(model, load_external_data=False).graph
    assert list(data) == [graph.name]
    node_data = data[graph.name]
    assert set(node_data) <= {"name", "results", "gradient", "thresholds"}
    assert isinstance(node_data["name"], str)
    results: dict[str, Any] = node_data["results"]
    assert results and set(results) <= {node.name for node in graph.node}
    for row in results.values():
        assert set(row) <= {"value", "bgColor", "textColor"}
        assert isinstance(row["value"], (str, float))
        assert row.get("bgColor", "#000000").startswith("#") and len(row.get("bgColor", "#000000")) == 7
    for item in node_data.get("gradient", []):
        assert set(item) == {"stop", "bgColor"} and 0 <= item["stop"] <= 1
    assert {item["stop"] for item in node_data.get("gradient", [])} in (set(), {0, 1})
    return results


class TestOverlay:
    """`mezzotint overlay`."""

    @pytest.mark.parametrize("what", ["precision", "kernel", "scale", "time", "cost"])
    def test_every_kind_is_node_data(self, cli: Cli, unet: Compiled, tmp_path: Path, what: str) -> None:
        words = ["overlay", unet.bundle.path, "-o", tmp_path / "o.json", "--what", what, "--threads", THREADS]
        words += ["--layers", layers_file(unet.bundle, tmp_path / "debug.json")] if what == "cost" else []

        answer = cli(*words, "--json")

        assert answer.code == 0, answer.err
        data = json.loads((tmp_path / "o.json").read_text())
        results = check_node_data(data, unet.bundle.path / MODEL)
        values = [row["value"] for row in results.values()]
        assert all(isinstance(v, float) for v in values) == (what in NUMBERS)
        assert ("gradient" in next(iter(data.values()))) == (what in NUMBERS)
        assert json.loads(answer.out)["nodes"].startswith(f"{len(results)} of ")
        if what == "time":
            assert min(values) >= 0 and max(values) > 0
            assert "% of the time" in json.loads(answer.out)["not in it"]
        refused(cli(*words), "the output exists already", "--force")
        assert cli(*words, "--force").code == 0

    def test_layers_have_their_precision_and_their_kernel(self, unet: Compiled) -> None:
        bundle = unet.bundle
        precision, kernel = (
            next(iter(make_overlay(bundle, what).data.values()))["results"] for what in ("precision", "kernel")
        )
        integer = {n for n, row in bundle.manifest.kernels.layers.items() if row.integer}
        weighted = {n for n in integer if precision[n]["value"] == "int8"}

        for name, why in bundle.manifest.islands.items():
            if name in precision:
                assert precision[name]["value"] == why.partition(":")[0]
                assert precision[name]["bgColor"] not in {precision[n]["bgColor"] for n in integer}
        assert len(integer) - len(weighted) == 8, "the two products of each of the four attentions have no weights"
        assert {precision[n]["value"] for n in integer} <= {"int8", "integer"}
        rows = bundle.manifest.kernels.layers
        assert {n: row["value"] for n, row in kernel.items()} == {n: rows[n].kernel for n in kernel}

    def test_four_bits_are_distinguished_from_eight(self, hand: Compiled, tmp_path: Path) -> None:
        options: dict[str, Any] = {**SMALL, "settings": {"choose_scales.weight_bits": 4, **ENDS}}
        bundle = compile_model(hand.exported, tmp_path / "b", recipe="w8a8-steps", **options)
        [data] = make_overlay(bundle, "precision").data.values()

        assert data["results"]["third"]["value"] == "int4"

    def test_scales_are_those_of_the_manifest(self, stepped: Bundle) -> None:
        [data] = make_overlay(stepped, "scale").data.values()
        known = [q.scale for q in stepped.manifest.quantizers]
        widest = {max(s) if isinstance(s, tuple) else s for s in known}

        assert {row["value"] for row in data["results"].values()} <= widest

    def test_refusals(self, cli: Cli, unet: Compiled, tmp_path: Path) -> None:
        words = ["overlay", unet.bundle.path, "-o", tmp_path / "o.json", "--what"]

        refused(cli(*words, "color"), "no overlay is called 'color'", "precision, kernel, scale, time, cost")
        refused(cli(*words, "cost"), "must be measured first", "mezzotint debug")
        other = layers_file(unet.bundle, tmp_path / "other.json", "elsewhere")
        refused(cli(*words, "cost", "--layers", other), "no node of this network has a known cost", "another bundle")
        (tmp_path / "x.json").write_text("{}")
        refused(cli(*words, "cost", "--layers", tmp_path / "x.json"), "not the output of `mezzotint debug --json`")
        assert sorted(f.name for f in tmp_path.iterdir()) == ["other.json", "x.json"]


class Calls(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """A few calls of the float model, on noise."""

    def __init__(self, bundle: Bundle, **conditions: npt.NDArray[Any]) -> None:
        self._rows = self._feeds(bundle, conditions)

    def get_next(self) -> Any:
        return next(self._rows, None)

    @staticmethod
    def _feeds(bundle: Bundle, conditions: Mapping[str, npt.NDArray[Any]]) -> Iterator[dict[str, npt.NDArray[Any]]]:
        for t in bundle.deployment.timesteps:
            x = np.random.default_rng(int(t)).standard_normal((1, *bundle.sample_shape)).astype(np.float32)
            yield {bundle.signature.sample: x, bundle.signature.timestep: np.array([t], np.int64), **conditions}


def scales(model: Path) -> dict[str, npt.NDArray[Any]]:
    """Of a file that onnxruntime's quantizer wrote, by the tensor's name."""
    found = {i.name: numpy_helper.to_array(i) for i in onnx.load(model).graph.initializer}
    return {n.removesuffix("_scale"): a.reshape(-1) for n, a in found.items() if n.endswith("_scale")}


def wanted(rows: list[dict[str, Any]]) -> npt.NDArray[Any]:
    if "scale" in rows[0]:
        return np.array([row["scale"] for row in rows])
    return np.array([(row["rmax"] - row["rmin"]) / 255 for row in rows])


def nearness(float_model: Path, quantized: Path, bundle: Bundle, **conditions: npt.NDArray[Any]) -> float:
    sessions = [ort.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in (float_model, quantized)]
    feeds = Calls(bundle, **conditions).get_next()
    exact, mine = (session.run(None, feeds)[0] for session in sessions)
    return float(sqnr_db(exact, mine))


class TestOverrides:
    """`mezzotint overrides`: onnxruntime's own quantizer, with our scales."""

    def test_the_quantizer_takes_our_scales(self, cli: Cli, unet: Compiled, tmp_path: Path) -> None:
        file = tmp_path / "o.json"
        answer = cli("overrides", unet.bundle.path, "--float", unet.exported, "-o", file, "--threads", THREADS)
        assert answer.code == 0, answer.err
        arguments = load_arguments(file)
        mine = load_overrides(file)

        quantize_static(unet.exported, tmp_path / "mine.onnx", Calls(unet.bundle), **arguments)
        arguments["extra_options"] = {}
        quantize_static(unet.exported, tmp_path / "theirs.onnx", Calls(unet.bundle), **arguments)

        ours, theirs = scales(tmp_path / "mine.onnx"), scales(tmp_path / "theirs.onnx")
        assert len(mine) > 20
        for name, rows in mine.items():
            np.testing.assert_allclose(ours[name], wanted(rows), rtol=1e-5, err_msg=name)
        others = [n for n, rows in mine.items() if not np.allclose(theirs[n], wanted(rows), rtol=1e-3)]
        assert len(others) > len(mine) / 2, "the twin: by itself it chooses others"
        assert nearness(unet.exported, tmp_path / "mine.onnx", unet.bundle) > 20

    def test_scales_are_those_of_the_plan(self, hand: Compiled) -> None:
        """Compared with the manifest; weights with the scales of choose_scales for a layer's largest numbers."""
        found = make_overrides(hand.bundle, hand.exported)
        known = {q.site: q for q in hand.bundle.manifest.quantizers}

        assert set(found.tensors) == {"second.w", "third.w", "h1.act", "h2", "h3.act", "h4"}
        assert not found.widened
        for name, rows in found.tensors.items():
            scale = np.array([row["scale"] for row in rows])
            scales = known[name].scale
            low, high = scales if isinstance(scales, tuple) else (scales, scales)
            np.testing.assert_allclose([scale.min(), scale.max()], [low, high], rtol=1e-6)
            if rows[0]["quant_type"] == "QUInt8":
                assert (rows[0]["zero_point"],) == known[name].zero_point
        weight = next(i for i in onnx.load(hand.exported).graph.initializer if i.name == "third.w")
        largest = np.abs(numpy_helper.to_array(weight)).reshape(CHANNELS, -1).max(axis=1)
        most, _ = scale_for_range(-largest, largest, INT8)
        mine = np.array([row["scale"] for row in found.tensors["third.w"]])
        assert found.tensors["third.w"][0]["axis"] == 0
        assert np.all(mine <= most * (1 + 1e-6)) and np.all(mine > most / 2)
        assert sorted(found.excluded) == ["first", "last", "time1", "time2"]

    def test_tables_become_the_widest_range(self, hand: Compiled, stepped: Bundle, tmp_path: Path) -> None:
        found = make_overrides(stepped, hand.exported)
        known = {q.value: q for q in stepped.manifest.quantizers}
        tables = {name for name in found.tensors if known[name].rows > 1}

        assert tables and tables <= set(found.widened)
        for name in tables:
            [row] = found.tensors[name]
            widest = np.max(known[name].scale)
            assert row["rmin"] <= 0 <= row["rmax"]
            assert row["rmax"] - row["rmin"] >= 255 * widest * (1 - 1e-6)
        assert "depend on the timestep" in found.to_json()["note"]
        write_json(tmp_path / "o.json", found.to_json())
        quantize_static(hand.exported, tmp_path / "q.onnx", Calls(stepped), **load_arguments(tmp_path / "o.json"))
        for name, rows in load_overrides(tmp_path / "o.json").items():
            np.testing.assert_allclose(scales(tmp_path / "q.onnx")[name], wanted(rows), rtol=1e-5, err_msg=name)
        assert nearness(hand.exported, tmp_path / "q.onnx", stepped) > 20

    def test_a_name_whose_value_was_changed_is_left_out(self, hand: Compiled, stepped: Bundle) -> None:
        """fold_time puts the time embedding into `second`, whose output keeps its name."""
        static, timed = make_overrides(hand.bundle, hand.exported), make_overrides(stepped, hand.exported)

        assert "h2" in static.tensors
        assert "h2" not in timed.tensors
        assert timed.skipped["h2"] == "a pass changed its value: the float file has another value of this name"

    def test_conditions(self, conditional: Compiled, tmp_path: Path) -> None:
        found = make_overrides(conditional.bundle, conditional.exported, threads=THREADS)
        write_json(tmp_path / "o.json", found.to_json())

        assert len(found.tensors) > 20
        assert all(why for why in found.skipped.values())
        assert {QuantType.QInt8, QuantType.QUInt8} == {
            rows[0]["quant_type"] for rows in load_overrides(tmp_path / "o.json").values()
        }

    @pytest.mark.parametrize(("bits", "word"), [(4, None), (6, "it has 6 bits")])
    def test_narrow_weights(self, hand: Compiled, tmp_path: Path, bits: int, word: str | None) -> None:
        """Four bits are a type of onnxruntime's quantizer, other widths are not."""
        options: dict[str, Any] = {**SMALL, "settings": {"choose_scales.weight_bits": bits}}
        bundle = compile_model(hand.exported, tmp_path / "b", recipe="w8a8", **options)
        found = make_overrides(bundle, hand.exported)

        if word is not None:
            assert word in found.skipped["third.w"]
            assert "third.w" not in found.tensors
            return
        assert found.tensors["third.w"][0]["quant_type"] == "QInt4"
        write_json(tmp_path / "o.json", found.to_json())
        quantize_static(hand.exported, tmp_path / "q.onnx", Calls(bundle), **load_arguments(tmp_path / "o.json"))
        got = scales(tmp_path / "q.onnx")["third.w"]
        np.testing.assert_allclose(got, wanted(load_overrides(tmp_path / "o.json")["third.w"]), rtol=1e-5)

    def test_refusals(self, cli: Cli, hand: Compiled, unet: Compiled, tmp_path: Path) -> None:
        words = ["overrides", hand.bundle.path, "-o", tmp_path / "o.json", "--float"]

        refused(cli(*words, tmp_path / "no.onnx"), "no such float model", "mezzotint export")
        assert cli(*words, unet.exported).code == 2
        assert not (tmp_path / "o.json").exists()
        for content in ("{", "[]", '{"format": 1}'):
            (tmp_path / "x.json").write_text(content)
            with pytest.raises(InputError, match="overrides"):
                load_overrides(tmp_path / "x.json")
