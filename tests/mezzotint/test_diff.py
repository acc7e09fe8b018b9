"""Two bundles, and two passes of one, compared: the differences are reported, and nothing else."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mezzotint import compile_model
from mezzotint.diff import Difference, DiffTable, compare_bundles, compare_passes
from mezzotint.inspect.html import diff_section, document, table_section
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError
from tests.helpers.models import SMALL, Cli, Compiled


@pytest.fixture(scope="module")
def narrow(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of `hand` with weights of 4 bits and other ranges."""
    settings = {"choose_scales.weight_bits": 4, "choose_scales.activations": "minmax"}
    target = tmp_path_factory.mktemp("narrow") / "bundle"
    return compile_model(hand.exported, target, recipe="w8a8", settings=settings, **SMALL)


@pytest.fixture(scope="module")
def plain(hand: Compiled) -> Bundle:
    return hand.bundle


def by_name(found: DiffTable) -> dict[str, tuple[object, ...]]:
    return {str(row[0]): row[1:] for row in found.rows}


class Reader(HTMLParser):
    """Counts tags, and whether every one is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert not reader.open
    return reader


class TestBundles:
    def test_a_bundle_is_like_itself(self, plain: Bundle) -> None:
        found = compare_bundles(plain, plain)

        assert all(not t.rows for name, t in found.tables.items() if name != "measured")
        assert all(a == b for _, a, b in found.tables["measured"].rows)

    def test_what_differs_is_told(self, plain: Bundle, narrow: Bundle) -> None:
        found = compare_bundles(plain, narrow).tables

        assert by_name(found["passes"]) == {
            "choose_scales.activations": ("percentile", "minmax"),
            "choose_scales.weight_bits": (8, 4),
        }
        weights = {site: row for site, row in by_name(found["quantizers"]).items() if str(row[1]).startswith("int4")}
        assert weights and all(str(row[0]).startswith("int8") for row in weights.values())
        sizes = by_name(found["measured"])["bytes of the model"]
        assert sizes == (plain.manifest.require_storage().model_bytes, narrow.manifest.require_storage().model_bytes)
        assert not found["made"].rows and not found["islands"].rows

    def test_sides_are_not_swapped(self, plain: Bundle, narrow: Bundle) -> None:
        there, back = compare_bundles(plain, narrow), compare_bundles(narrow, plain)
        for name, one in there.tables.items():
            assert sorted(map(str, ((n, b, a) for n, a, b in one.rows))) == sorted(map(str, back.tables[name].rows))

    def test_passes_of_one_only(self, hand: Compiled, plain: Bundle, tmp_path: Path) -> None:
        exact = compile_model(hand.exported, tmp_path / "float", recipe="float", **SMALL)
        found = compare_bundles(exact, plain).tables

        passes = by_name(found["passes"])
        assert passes["observe"] == passes["insert_qdq"] == ("-", "yes")
        assert all(row[0] == "-" for row in by_name(found["quantizers"]).values())
        assert {row[1] for row in by_name(found["kernels"]).values()} >= {"QLinearConv"}
        assert by_name(found["made"])["recipe"] == ("float", "w8a8")


class TestPasses:
    def test_nodes_that_came(self, plain: Bundle) -> None:
        found = compare_passes(plain, "choose_scales", "insert_qdq")

        counts = by_name(found.tables["operations"])
        names = [record.name for record in plain.manifest.history]
        record = plain.manifest.history[names.index("insert_qdq")]
        assert counts["QuantizeLinear"][0] == "-"
        added = sum(int(str(b)) - (0 if a == "-" else int(str(a))) for a, b in counts.values())
        assert added == record.nodes_after - record.nodes_before
        assert any(line.startswith("+") and "QuantizeLinear" in line for line in found.text.splitlines())

    def test_a_pass_that_changed_no_graph(self, plain: Bundle) -> None:
        found = compare_passes(plain, "observe", "choose_scales")
        assert not found.text and not any(t.rows for t in found.tables.values())

    def test_names_and_numbers(self, plain: Bundle) -> None:
        names = [record.name for record in plain.manifest.history]
        number = names.index("insert_qdq") + 1
        requests = ("insert_qdq", str(number), f"{number:03}_insert_qdq")
        texts = {compare_passes(plain, "imported", requested).text for requested in requests}
        assert len(texts) == 1 and "" not in texts

    @pytest.mark.parametrize("requested", ["paint", "99", "fx"])
    def test_passes_that_are_not_there(self, plain: Bundle, requested: str) -> None:
        with pytest.raises(InputError, match=f"there is no pass '{requested}'") as caught:
            compare_passes(plain, "imported", requested)
        assert "001_normalize" in (caught.value.hint or "")

    def test_a_pass_that_ran_twice(self, plain: Bundle, tmp_path: Path) -> None:
        (tmp_path / "passes").mkdir()
        for name in ("001_normalize", "002_observe", "003_normalize"):
            (tmp_path / "passes" / f"{name}.txt").write_text("")
        twice = Bundle(plain.path, plain.manifest)
        twice.path = tmp_path
        with pytest.raises(InputError, match="2 passes are called 'normalize'"):
            compare_passes(twice, "normalize", "observe")


class TestPages:
    def test_a_page_holds_every_row(self, plain: Bundle, narrow: Bundle) -> None:
        found = compare_bundles(plain, narrow)
        html = document(found.title, [table_section(t.title, t.columns, t.rows) for t in found.tables.values()])

        reader = read(html)
        rows = sum(len(t.rows) for t in found.tables.values())
        assert reader.seen.count("tr") == rows + sum(bool(t.rows) for t in found.tables.values())
        assert not {"script", "link", "img", "iframe"} & set(reader.seen)
        assert "http" not in html

    def test_names_are_no_markup(self) -> None:
        evil = '</td><script>alert("x")</script>&amp;'
        html = document(
            evil, [table_section(evil, (evil,), [(evil,)]), diff_section(evil, f"+{evil}\n-{evil}\n {evil}")]
        )

        reader = read(html)
        assert "script" not in reader.seen and reader.text.count(evil) == 9
        assert {"added", "removed"} <= set(html.replace('"', " ").split())

    def test_nothing_is_said_to_differ(self) -> None:
        assert "no difference" in table_section("nodes", ("a",), [])


class TestCommand:
    def test_json_text_and_html(self, plain: Bundle, narrow: Bundle, cli: Cli, tmp_path: Path) -> None:
        wanted = compare_bundles(plain, narrow)

        answer = cli("diff", plain.path, narrow.path, "--json", "--html", tmp_path / "new" / "d.html")
        assert answer.code == 0, answer.err
        assert json.loads(answer.out) == json.loads(json.dumps(wanted.to_json()))
        assert "choose_scales.weight_bits" in read((tmp_path / "new" / "d.html").read_text()).text
        printed = cli("diff", plain.path, narrow.path)
        assert "choose_scales.weight_bits" in printed.out and "islands: no difference" in printed.out

    def test_passes(self, plain: Bundle, cli: Cli, tmp_path: Path) -> None:
        answer = cli("diff", plain.path, "--from", "imported", "--to", "insert_qdq", "--html", tmp_path / "d.html")
        assert answer.code == 0 and "DequantizeLinear" in answer.out
        assert "+++ 0" in read((tmp_path / "d.html").read_text()).text

    def test_what_cannot_be_meant(self, plain: Bundle, narrow: Bundle, cli: Cli) -> None:
        for words in ([], ["--from", "imported"], [narrow.path, "--from", "imported", "--to", "observe"]):
            answer = cli("diff", plain.path, *words)
            assert answer.code == 2 and "it is not clear what to compare" in answer.err

    def test_a_page_below_a_file_is_refused(self, plain: Bundle, narrow: Bundle, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        answer = cli("diff", plain.path, narrow.path, "--html", tmp_path / "file" / "d.html")
        assert answer.code == 2 and "cannot write" in answer.err
        assert (tmp_path / "file").read_text() == "kept"

    def test_a_difference_is_data(self) -> None:
        found = Difference("t", {"nodes": DiffTable("nodes", ("", "first"), (("Conv", 2),))}, "text")
        assert found.to_json() == {"title": "t", "nodes": [{"": "Conv", "first": 2}]}
