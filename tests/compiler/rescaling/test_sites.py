"""Rescaling sites: which constants can take a factor for each channel, and that taking it changes nothing."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.nodes import Names, counts, name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rescaling import sites as engine
from mezzotint.compiler.rescaling.edits import Edit, apply_edit
from mezzotint.compiler.rescaling.scaling import Factors, multiply_weight
from mezzotint.compiler.rescaling.sites import RescalingSite, find_pairs, find_sites, rescale_pair, rescale_site
from tests.helpers.factors import BLOCK, END, change, factor_program

PAD = "<pads = [1, 1, 1, 1]>"
NORM = "<num_groups = 2, epsilon = 0.00001>"
GROUPED = """grouped_x = Reshape (sample, mixed) normal = InstanceNormalization (grouped_x, g8, wide_b)
    shaped = Reshape (normal, image)"""
ATTENTION = """q_h = Reshape (q, heads) q_t = Transpose <perm = [0, 2, 1, 3]> (q_h)
    k_h = Reshape (k, heads) k_t = Transpose <perm = [0, 2, 3, 1]> (k_h)
    v_h = Reshape (v, heads) v_t = Transpose <perm = [0, 2, 1, 3]> (v_h)
    [scores] scores = MatMul (q_t, k_t) a = Softmax <axis = -1> (scores) o_t = MatMul (a, v_t)
    o_h = Transpose <perm = [0, 2, 1, 3]> (o_t) mix = Reshape (o_h, joined) [proj] y = MatMul (mix, w3)"""
QKV = "q = MatMul (x, w0) k = MatMul (x, w1) v_raw = MatMul (x, w2) v = Add (v_raw, b0)"

LEGAL: dict[str, tuple[str, str, str]] = {  # case: the site's value, its kind, the graph
    "layer_norm": ("n", "norm", f"{BLOCK} n = LayerNormalization <axis = -1> (x, g0, b0) y = MatMul (n, w0) {END}"),
    "layer_norm_without_shift": (
        "n",
        "norm",
        f"{BLOCK} n = LayerNormalization <axis = -1> (x, g0) y = MatMul (n, w0) {END}",
    ),
    "readers_together": (
        "n",
        "norm",
        f"{BLOCK} n = LayerNormalization <axis = -1> (x, g0, b0) p = MatMul (n, w0) r = MatMul (n, w1) "
        f"y = Add (p, r) {END}",
    ),
    "rms_norm": (
        "n",
        "norm",
        f"{BLOCK} squares = Mul (x, x) mean = ReduceMean (squares, last) length = Sqrt (mean) d = Div (x, length) "
        f"n = Mul (d, g0) y = MatMul (n, w0) {END}",
    ),
    "group_norm": ("n", "norm", f"n = GroupNormalization {NORM} (sample, g0, b0) epsilon = Conv {PAD} (n, k0, b1)"),
    "group_norm_as_tokens": (
        "n",
        "norm",
        f"n = GroupNormalization {NORM} (sample, g0, b0) f = Reshape (n, tokens) "
        f"x = Transpose <perm = [0, 2, 1]> (f) y = MatMul (x, w0) {END}",
    ),
    "lowered_norm": (
        "shifted",
        "norm",
        f"{GROUPED} scaled = Mul (shaped, c0) shifted = Add (scaled, c1) epsilon = Conv {PAD} (shifted, k0, b0)",
    ),
    "gain_alone": ("scaled", "norm", f"{GROUPED} scaled = Mul (shaped, c0) epsilon = Conv {PAD} (scaled, k0, b0)"),
    "divisor": ("scaled", "norm", f"{GROUPED} scaled = Div (shaped, c0) epsilon = Conv {PAD} (scaled, k0, b0)"),
    "conv": ("m", "linear", f"m = Conv {PAD} (sample, k0, b0) epsilon = Conv {PAD} (m, k1, b1)"),
    "relu": ("r", "linear", f"m = Conv {PAD} (sample, k0, b0) r = Relu (m) epsilon = Conv {PAD} (r, k1)"),
    "leaky_relu": ("r", "linear", f"m = Conv {PAD} (sample, k0, b0) r = LeakyRelu (m) epsilon = Conv {PAD} (r, k1)"),
    "prelu": ("r", "linear", f"m = Conv {PAD} (sample, k0, b0) r = PRelu (m, slope) epsilon = Conv {PAD} (r, k1)"),
    "grouped_convs": (
        "m",
        "linear",
        "m = Conv <pads = [1, 1, 1, 1], group = 2> (sample, grouped, b0) "
        "epsilon = Conv <pads = [1, 1, 1, 1], group = 2> (m, grouped, b1)",
    ),
    "padded": (
        "p",
        "linear",
        "m = Conv (sample, k0, b0) p = Pad (m, pads) up = Conv <pads = [1, 1, 1, 1]> (p, k1)\n"
        "epsilon = Add (up, sample)",
    ),
    "resized": (
        "m",
        "linear",
        f"m = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (sample, k0, b0) "
        f'wide_m = Resize <mode = "nearest"> (m, , double) epsilon = Conv {PAD} (wide_m, k1)',
    ),
    "matmuls": ("m", "linear", f"{BLOCK} m_raw = MatMul (x, w0) m = Add (m_raw, b0) y = MatMul (m, w1) {END}"),
    "gemms": (
        "m",
        "linear",
        "pooled = GlobalAveragePool (sample) v = Flatten (pooled) m = Gemm <transB = 1> (v, w0, b0) "
        "u = Gemm (m, w1, b1) col = Unsqueeze (u, hw) epsilon = Add (sample, col)",
    ),
    "sum_of_layers": (
        "m",
        "linear",
        f"p = Conv {PAD} (sample, k0, b0) r = Conv {PAD} (sample, k1) m = Add (p, r) epsilon = Conv {PAD} (m, k2, b1)",
    ),
    "joined_layers": (
        "m",
        "linear",
        f"{BLOCK} p = MatMul (x, w0) r = MatMul (x, w1) m = Concat <axis = 2> (p, r) y = MatMul (m, tall) {END}",
    ),
    "values": ("mix", "value", f"{BLOCK} {QKV} {ATTENTION} {END}"),
    "fused_qkv": (
        "mix",
        "value",
        f"{BLOCK} qkv = MatMul (x, skew) q, k, v = Split <axis = -1, num_outputs = 3> (qkv) {ATTENTION} {END}",
    ),
    "values_of_two_sequences": (
        "mix",
        "value",
        f"{BLOCK} first = Slice (x, zero, four, axis1) second = Slice (x, four, sixteen, axis1) "
        f"v1 = MatMul (first, w2) v2 = MatMul (second, w4) v_raw = Concat <axis = 1> (v1, v2) q = MatMul (x, w0) "
        f"k = MatMul (x, w1) "
        f"v = Add (v_raw, b0) {ATTENTION.partition(' [proj]')[0]} text = Slice (mix, zero, four, axis1) "
        f"pixels = Slice (mix, four, sixteen, axis1) p = MatMul (text, w3) r = MatMul (pixels, w5) "
        f"y = Concat <axis = 1> (p, r) {END}",
    ),
    "geglu": (
        "m",
        "gated",
        f"{BLOCK} h = MatMul (x, wide) value, gate = Split <axis = -1, num_outputs = 2> (h) "
        f"a = Sigmoid (gate) m = Mul (value, a) y = MatMul (m, w1) {END}",
    ),
    "geglu_by_slices": (
        "m",
        "gated",
        f"{BLOCK} h = MatMul (x, wide) value = Slice (h, zero, four, last) gate = Slice (h, four, eight, last) "
        f"a = Sigmoid (gate) m = Mul (value, a) y = MatMul (m, w1) {END}",
    ),
}
NEEDS_CONDITION = {
    "adaln": (
        "n",
        "adaln",
        f"{BLOCK} mod = Gemm (cond, six, six_b) s0, h0, q0, s1, h1, q1 = Split <axis = 1, num_outputs = 6> (mod) "
        f"sc = Unsqueeze (s1, axis1) sh = Unsqueeze (h1, axis1) more = Add (sc, one) "
        f"normal = LayerNormalization <axis = -1> (x, g0) scaled = Mul (normal, more) n = Add (scaled, sh) "
        f"p = MatMul (n, w0) r = MatMul (n, w1) y = Add (p, r) {END}",
    ),
    "frozen_adaln": (
        "n",
        "adaln",
        f"{BLOCK} sc_row = Gather <axis = 0> (times, timestep) sh_row = Gather <axis = 0> (times_b, timestep) "
        f"sc = Unsqueeze (sc_row, axis1) sh = Unsqueeze (sh_row, axis1) more = Add (one, sc) "
        f"normal = LayerNormalization <axis = -1> (x, g0) scaled = Mul (normal, more) n = Add (sh, scaled) "
        f"y = MatMul (n, w0) {END}",
    ),
    "time_table_bias": (
        "m",
        "linear",
        f"found = Gather <axis = 0> (times, timestep_0) bias = Reshape (found, flat) "
        f"m = Conv {PAD} (sample, k0, bias) epsilon = Conv {PAD} (m, k1, b0)",
    ),
    "class_table": (
        "n",
        "adaln",
        f"found = Gather <axis = 0> (times, timestep) col = Unsqueeze (found, hw) "
        f"n = Mul (sample, col) epsilon = Conv {PAD} (n, k0, b0)",
    ),
}
FIRST = "timestep_0 = Slice (timestep, zero, axis1)"


def program_for(case: str) -> tuple[Program, str, str]:
    value, kind, body = (LEGAL | NEEDS_CONDITION)[case]
    prefix = f"{FIRST} " if "timestep_0" in body else ""
    conditions = ("cond",) if "cond" in body else ()
    return factor_program(prefix + body, conditions=conditions), value, kind


def the_site(program: Program, value: str) -> RescalingSite:
    return next(site for site in find_sites(program.graph) if site.name == value)


def factors(channels: int, seed: int = 5) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(0.5, 2.0, channels)


CONDITIONS = {"cond": np.random.default_rng(4).standard_normal((2, 4)).astype(np.float32)}


def given(program: Program) -> dict[str, npt.NDArray[np.float32]]:
    return {name: CONDITIONS[name] for name in program.conditions()}


CASES = sorted(LEGAL | NEEDS_CONDITION)


@pytest.mark.parametrize("case", CASES)
def test_a_legal_fold_is_exact_and_adds_no_node(case: str, tmp_path: Path) -> None:
    program, value, kind = program_for(case)
    site, before = the_site(program, value), counts(program.graph)
    assert (site.kind, site.reason) == (kind, "")
    s = factors(site.channels)
    difference = change(program, tmp_path, lambda g, n: rescale_site(g, n, site, s), given(program))
    assert difference < 1e-5
    assert counts(program.graph) == before


@pytest.mark.parametrize("case", CASES)
def test_a_reader_that_is_one_percent_off_is_seen(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, value, _ = program_for(case)
    site = the_site(program, value)
    s = factors(site.channels)
    monkeypatch.setattr(engine, "multiply_weight", lambda g, n, layer, f: multiply_weight(g, n, layer, f * 1.01))
    assert change(program, tmp_path, lambda g, n: rescale_site(g, n, site, s), given(program)) > 1e-4


@pytest.mark.parametrize("case", ["values", "fused_qkv", "geglu", "adaln", "frozen_adaln", "group_norm_as_tokens"])
def test_a_batch_that_is_written_into_the_graph(case: str, tmp_path: Path) -> None:
    value, kind, body = (LEGAL | NEEDS_CONDITION)[case]
    program = factor_program(body, batch=2, conditions=("cond",) if "cond" in body else ())
    site = the_site(program, value)
    assert site.kind == kind
    assert change(program, tmp_path, lambda g, n: rescale_site(g, n, site, factors(4)), given(program)) < 1e-5
    for pair in find_pairs(program.graph):
        assert change(program, tmp_path, partial(rescale_pair, pair=pair, factors=factors(4)), given(program)) < 1e-5


def spoil(monkeypatch: pytest.MonkeyPatch, wrong: Edit, error: float) -> None:
    """Let one edit be off by a share of what it changes."""

    def edit(graph: ir.Graph, names: Names, done: Edit, multiply: Factors, add: Factors) -> None:
        apply_edit(graph, names, done, multiply * (1 + error if done is wrong else 1), add)

    monkeypatch.setattr(engine, "apply_edit", edit)


@pytest.mark.parametrize("case", CASES)
def test_every_edit_counts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of the edits is one percent off, the output is."""
    for which in range(len(the_site(*program_for(case)[:2]).edits)):
        program, value, _ = program_for(case)
        site = the_site(program, value)
        spoil(monkeypatch, site.edits[which], 0.01)
        rewrite = partial(rescale_site, site=site, factors=factors(site.channels))
        assert change(program, tmp_path, rewrite, given(program)) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_a_shift_is_exact_or_refused(case: str, tmp_path: Path) -> None:
    program, value, _ = program_for(case)
    site = the_site(program, value)
    s, o = factors(site.channels), factors(site.channels, 6) - 1
    if site.shift_reason:
        with pytest.raises(ValueError, match="takes no shift"):
            rescale_site(program.graph, Names(program.graph), site, s, o)
    else:
        difference = change(program, tmp_path, lambda g, n: rescale_site(g, n, site, s, o), given(program))
        assert difference < 1e-5


SHIFTABLE = {"adaln", "frozen_adaln", "gemms", "group_norm_as_tokens", "layer_norm", "matmuls", "readers_together"}


def test_shifts_go_where_a_sum_holds_a_constant_and_nobody_pads() -> None:
    found = {case: the_site(*program_for(case)[:2]).shift_reason for case in CASES}
    assert {case for case, reason in found.items() if not reason} == SHIFTABLE
    assert "pads with zeros" in found["group_norm"]
    assert "has no shift" in found["layer_norm_without_shift"]
    assert "has no bias" in found["joined_layers"]


ILLEGAL: dict[str, tuple[str, str, str]] = {  # case: the value, what the reason says, the graph
    "input": ("sample", "'sample' is an input of the graph", f"epsilon = Conv {PAD} (sample, k0, b0)"),
    "silu": (
        "a",
        "SiLU or GELU, which is not homogeneous",
        f"n = GroupNormalization {NORM} (sample, g0, b0) s = Sigmoid (n) a = Mul (n, s) epsilon = Conv {PAD} (a, k0)",
    ),
    "gelu": (
        "a",
        "Gelu .* not homogeneous",
        f"{BLOCK} h = MatMul (x, w0) [gelu] a = Gelu (h) y = MatMul (a, w1) {END}",
    ),
    "written_out_gelu": (
        "a",
        "SiLU or GELU",
        f"{BLOCK} h = MatMul (x, w0) d = Div (h, three) e = Erf (d) m = Add (e, one) p = Mul (h, m) "
        f"a = Mul (p, quarter) y = MatMul (a, w1) {END}",
    ),
    "residual": (
        "r",
        "residual stream",
        f"m = Conv {PAD} (sample, k0, b0) r = Add (m, sample) epsilon = Conv {PAD} (r, k1)",
    ),
    "read_by_a_sum": (
        "n",
        "Add 'late' reads 'n', too",
        f"n = GroupNormalization {NORM} (sample, g0, b0) m = Conv {PAD} (n, k0) [late] epsilon = Add (m, n)",
    ),
    "read_by_a_norm": (
        "m",
        "GroupNormalization 'second' reads 'm', too",
        f"m = Conv {PAD} (sample, k0) [second] n = GroupNormalization {NORM} (m, g0, b0) "
        f"p = Conv {PAD} (m, k1) epsilon = Add (n, p)",
    ),
    "read_by_attention": (
        "n",
        "MatMul 'scores' reads",
        f"{BLOCK} n = LayerNormalization <axis = -1> (x, g0, b0) t = Transpose <perm = [0, 2, 1]> (n) "
        f"p = MatMul (n, w0) [scores] s = MatMul (n, t) y = MatMul (s, p) {END}",
    ),
    "norm_upstream": (
        "shaped",
        "mixes channels",
        f"m = Conv {PAD} (sample, k0) grouped_x = Reshape (m, pairs) "
        "[norm] normal = InstanceNormalization (grouped_x, half, half_b) shaped = Reshape (normal, image) "
        f"epsilon = Conv {PAD} (shaped, k1)",
    ),
    "softmax": ("a", "Softmax 'soft'", f"{BLOCK} h = MatMul (x, w0) [soft] a = Softmax (h) y = MatMul (a, w1) {END}"),
    "unknown": ("a", "Round 'odd'", f"{BLOCK} h = MatMul (x, w0) [odd] a = Round (h) y = MatMul (a, w1) {END}"),
    "joined_with_a_stream": (
        "j",
        "Concat 'join' joins several values, and",
        f"m = Conv {PAD} (sample, k0) [join] j = Concat <axis = 1> (m, sample) c = Conv (j, shortcut) "
        f"epsilon = Add (c, sample)",
    ),
    "several_readers_of_the_rows": (
        "value",
        "Slice .* reads 'h', too",
        f"{BLOCK} h = MatMul (x, wide) value = Slice (h, zero, four, last) other = Slice (h, two, eight, last) "
        f"p = MatMul (value, w1) o = MatMul (other, odd_w) y = Add (p, o) {END}",
    ),
    "mixed_by_a_reshape": (
        "r",
        "rows of Conv 'm' are not the channels",
        f"m = Conv {PAD} (sample, k0) r = Reshape (m, mixed) y8 = MatMul (r, square8) epsilon = Reshape (y8, image)",
    ),
    "one_factor_for_each_token": (
        "r",
        "rotary",
        f"{BLOCK} h = MatMul (x, w0) r = Mul (h, rope) y = MatMul (r, w1) {END}",
    ),
    "negative_padding_value": (
        "p",
        "pads with something else than zeros",
        f"m = Conv {PAD} (sample, k0) p = Pad (m, pads, three) epsilon = Conv (p, k1)",
    ),
}


@pytest.mark.parametrize("case", sorted(ILLEGAL))
def test_an_illegal_fold_says_why_and_divides_at_run_time(case: str, tmp_path: Path) -> None:
    value, reason, body = ILLEGAL[case]
    program = factor_program(body)
    found = [site for site in find_sites(program.graph) if site.name == value]
    assert [site.kind for site in found] == ["run_time"]
    assert re.search(reason, found[0].reason), found[0].reason
    s = factors(found[0].channels)
    assert change(program, tmp_path, lambda g, n: rescale_site(g, n, found[0], s)) < 1e-5
    assert any(name_of(v).endswith("_divided") for node in program.graph for v in node.outputs)


def test_an_output_of_the_graph_stays_as_it_is() -> None:
    program = factor_program(f"epsilon = Conv {PAD} (sample, k0) p = Conv {PAD} (epsilon, k1)")
    assert the_site(program, "epsilon").reason == "'epsilon' is an output of the graph"


def test_every_layer_reads_exactly_one_fold() -> None:
    for _, _, body in (*LEGAL.values(), *ILLEGAL.values()):
        program = factor_program(body)
        read = [reader.name for site in find_sites(program.graph) for reader in site.readers]
        assert sorted(read) == sorted(x.name for x in layers(program.graph) if x.weight is not None)


def test_two_illegal_views_of_one_value_are_two_folds() -> None:
    """A feature map that a sum reads, a convolution, and as tokens a matmul: each layer has a Mul of its own."""
    body = f"""m = Conv {PAD} (sample, k0) p = Conv {PAD} (m, k1) f = Reshape (m, tokens)
        x = Transpose <perm = [0, 2, 1]> (f) y = MatMul (x, w0) turned = Transpose <perm = [0, 2, 1]> (y)
        back = Reshape (turned, image) both = Add (p, back) epsilon = Add (both, m)"""
    found = [site for site in find_sites(factor_program(body).graph) if site.name in ("m", "x")]
    assert [(site.name, site.axis, site.kind) for site in found] == [("m", 1, "run_time"), ("x", -1, "run_time")]


def test_shared_constants_stay_as_they_are_for_others(tmp_path: Path) -> None:
    """One gain, one shift and one weight for two norms and two layers each, of which one pair is folded."""
    body = f"""{BLOCK} n = LayerNormalization <axis = -1> (x, g0, b0) p = MatMul (n, w0)
        q = LayerNormalization <axis = -1> (p, g0, b0) r = MatMul (q, w0) y = Add (r, q) {END}"""
    program = factor_program(body)
    site = the_site(program, "n")
    before = {name: numpy_of(v).copy() for name, v in program.graph.initializers.items() if name in ("g0", "b0", "w0")}
    assert change(program, tmp_path, lambda g, n: rescale_site(g, n, site, factors(4))) < 1e-5
    for name, array in before.items():
        np.testing.assert_array_equal(numpy_of(program.graph.initializers[name]), array)


def test_folds_after_one_another(tmp_path: Path) -> None:
    """A layer that is a reader of one site and the producer of another, with a shift that gives it a bias."""
    body = f"""{BLOCK} n = LayerNormalization <axis = -1> (x, g0, b0) m = MatMul (n, w0) y = MatMul (m, w1) {END}"""
    program = factor_program(body)

    def all_of_them(graph: ir.Graph, names: Names) -> None:
        first, second = find_sites(graph)
        assert (first.kind, second.kind) == ("norm", "linear")
        rescale_site(graph, names, first, factors(4), factors(4, 6))
        rescale_site(graph, names, second, factors(4, 7))

    assert change(program, tmp_path, all_of_them) < 1e-5
    assert counts(program.graph)["Add"] == 1


@pytest.mark.parametrize("wrong", [np.ones(3), np.array([1.0, 1.0, 0.0, 1.0]), np.array([1.0, np.inf, 1.0, 1.0])])
def test_factors_that_are_no_factors(wrong: npt.NDArray[np.float64]) -> None:
    program, value, _ = program_for("conv")
    with pytest.raises(ValueError, match="4 positive factors"):
        rescale_site(program.graph, Names(program.graph), the_site(program, value), wrong)


def test_a_value_of_unknown_rank() -> None:
    program = factor_program(f"m = Conv {PAD} (sample, k0) epsilon = Conv {PAD} (m, k1)")
    next(iter(program.graph)).outputs[0].shape = None
    site = the_site(program, "m")
    assert site.reason == "the rank of 'm' is not known"
    with pytest.raises(PassError, match="no known rank"):
        rescale_site(program.graph, Names(program.graph), site, factors(4))


PAIRS: dict[str, tuple[int, str]] = {
    "per_head": (4, QKV),
    "with_gains_of_their_own": (
        2,
        f"{QKV.replace('q =', 'q_raw =')} q_r = Reshape (q_raw, heads) "
        "q_n = LayerNormalization <axis = -1> (q_r, half) q = Reshape (q_n, joined)",
    ),
}


@pytest.mark.parametrize("case", sorted(PAIRS))
@pytest.mark.parametrize("error", [0.0, 0.01])
def test_queries_and_keys(case: str, error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    channels, body = PAIRS[case]
    program = factor_program(f"{BLOCK} {body} {ATTENTION} {END}")
    (pair,) = find_pairs(program.graph)
    assert (pair.name, pair.channels, pair.reason) == ("scores", channels, "")
    s = factors(channels)
    spoil(monkeypatch, pair.key_edits[0], error)
    difference = change(program, tmp_path, lambda g, n: rescale_pair(g, n, pair, s))
    assert difference > 1e-4 if error else difference < 1e-5


def test_rotated_queries_take_no_factors() -> None:
    rotary = QKV.replace("q =", "q_raw =") + " q = Mul (q_raw, rope)"
    program = factor_program(f"{BLOCK} {rotary} {ATTENTION} {END}")
    (pair,) = find_pairs(program.graph)
    assert "rotary" in pair.reason
    with pytest.raises(ValueError, match="takes no factors"):
        rescale_pair(program.graph, Names(program.graph), pair, np.ones(4))
