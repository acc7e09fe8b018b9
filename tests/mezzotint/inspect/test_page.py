"""`mezzotint inspect --html`: the page in real headless Chromium, and the command that writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from mezzotint import Bundle, compile_model
from mezzotint.inspect import page as inspect_page
from mezzotint.inspect.blocks import TIMESTEP_TABLES
from mezzotint.inspect.html import json_for_html
from mezzotint.inspect.measure import NO_REFERENCE, PageOptions, measure_sections
from mezzotint.inspect.page import page_data, render_page, write_page
from mezzotint.runtime.bundle.ranges import RANGES, Ranges
from mezzotint.runtime.errors import InputError
from tests.helpers.browser import (
    PHONE,
    READY,
    changed_bundle,
    large_bundle,
    made_up_ranges,
    opened,
)
from tests.helpers.manifests import changed_manifest
from tests.helpers.models import CONTEXT, INTEGER, SMALL, THREADS, Cli, Compiled, hand_written, write

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

UNMEASURED = {part: {"note": f"no {part} here"} for part in ("pictures", "speed", "cost")}
SECTIONS = (
    *("summary", "pictures", "cost", "passes", "training", "graph", "audit"),
    *("ranges", "noise", "islands", "quantizers", "manifest"),
)
EVIL = '</script><img src="x" onerror="window.harmed = 1"><!--'


@dataclass(frozen=True)
class Made:
    """A page on disk, the data that it shows, and their sources."""

    file: Path
    data: dict[str, Any]
    bundle: Bundle
    ranges: Ranges


def trained(bundle: Bundle) -> Bundle:
    """The bundle, as if a pass had trained two units of it."""
    errors = {"pass": "reconstruct", "start": 0.2, "soft": 0.05, "hard": 0.1, "kept": True}
    curves = {"mid_block": [1.0, 0.5, 0.25], EVIL: [1.0, 2.0]}
    units = [{"unit": unit, **errors, "losses": losses} for unit, losses in curves.items()]
    return Bundle(bundle.path, changed_manifest(bundle.manifest, training=units))


@pytest.fixture(scope="module")
def made(unet: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A small UNet2DModel with everything measured; its scales are static, so ranges that move are made up."""
    measured = measure_sections(unet.bundle, PageOptions(unet.exported, pictures=2, calls=2, threads=THREADS))
    ranges = made_up_ranges(unet.bundle)
    data = page_data(trained(unet.bundle), measured, ranges)
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(render_page(data), encoding="utf-8")
    return Made(file, data, unet.bundle, ranges)


@pytest.fixture(scope="module")
def desktop(made: Made, chromium: Browser) -> Iterator[Page]:
    with opened(chromium, made.file) as seen:
        yield seen.page


@pytest.fixture
def shown(desktop: Page) -> Page:
    """That page on a desktop, with its graph as it was at the start."""
    desktop.evaluate("Mezzotint.graph.select(null); Mezzotint.graph.enter(0)")
    desktop.locator(".stage").scroll_into_view_if_needed()
    return desktop


def layer_with_ranges(made: Made) -> str:
    """An integer layer whose input is quantized."""
    nodes = made.data["graph"]["nodes"]
    return str(next(n["name"] for n in nodes if n["kind"] == 0 and any(role == "input" for _, role in n["quantizers"])))


def find(page: Page, words: str) -> None:
    page.fill("#search", words)
    page.press("#search", "Enter")


class TestPage:
    def test_every_section_has_text(self, shown: Page) -> None:
        for name in SECTIONS:
            text = shown.inner_text(f"#{name}")
            assert len(text.splitlines()) >= 3, (name, text)

    def test_each_trained_unit_has_its_curve(self, shown: Page) -> None:
        plots = shown.locator("#training svg.plot")
        assert plots.count() == 2
        assert plots.first.get_attribute("aria-label") == "loss of mid_block"
        assert (plots.first.locator("path.s1").get_attribute("d") or "").count("L") == 2
        row = shown.locator("#training tbody tr").first.inner_text()
        assert all(word in row for word in ("mid_block", "reconstruct", "0.2", "0.05", "0.1", "yes"))
        assert shown.evaluate("window.harmed") is None

    def test_search_finds_a_node_and_opens_it(self, made: Made, shown: Page) -> None:
        name = layer_with_ranges(made)
        find(shown, name)

        panel = shown.locator(".panel")
        assert panel.get_attribute("data-panel") == name
        assert shown.locator(".item.chosen").get_attribute("data-node") == name
        text = panel.inner_text()
        assert all(word in text for word in ("QLinearConv", "input:", "weight:", "share of all error", "uint8", "int8"))
        assert " ms (" in text
        captions = panel.locator("figcaption").all_inner_texts()
        assert any("scale by timestep" in caption for caption in captions)
        assert panel.locator("svg.plot path.s1").count() >= 2

    def test_search_finds_values_blocks_and_quantizers(self, made: Made, shown: Page) -> None:
        site = next(q["site"] for q in made.data["quantizers"] if "->" not in q["site"])
        block = made.data["graph"]["blocks"][2]["path"]
        value = made.data["graph"]["nodes"][-1]["out"][0]
        wanted = (site, "quantizer"), (block, "block"), (made.data["graph"]["values"][value][0], "value")
        for words, kind in wanted:
            shown.fill("#search", words)
            assert any(kind in text for text in shown.locator("#found li").all_inner_texts()), words
        shown.fill("#search", "nothing is called so")
        assert shown.inner_text("#found") == "no name matches"
        shown.fill("#search", "")

    def test_blocks_open_and_close(self, made: Made, shown: Page) -> None:
        blocks = made.data["graph"]["blocks"]
        inner = next(
            i for i, b in enumerate(blocks) if b["children"] and b["parent"] == 0 and b["name"] != TIMESTEP_TABLES
        )
        shown.locator(".crumbs button").first.click()
        assert shown.locator(".item.block").count() == len(blocks[0]["children"])
        shown.locator(f'.item.block[data-block="{blocks[inner]["path"]}"]').click()

        assert shown.locator(".crumbs button").all_inner_texts() == ["whole graph", blocks[inner]["name"]]
        assert shown.locator(".item.block").count() == len(blocks[inner]["children"])
        assert shown.locator(".item.node").count() == len(blocks[inner]["nodes"])
        assert shown.locator("path.edge").count() == len(blocks[inner]["edges"])
        shown.keyboard.press("Escape")
        assert shown.locator(".crumbs button").all_inner_texts() == ["whole graph"]
        shown.locator(f'.item.block[data-block="{blocks[inner]["path"]}"]').press("Enter")
        assert shown.locator(".crumbs button").count() == 2
        shown.keyboard.press("Backspace")
        assert shown.locator(".crumbs button").count() == 1

    def test_the_drawing_moves(self, shown: Page) -> None:
        drawing = shown.locator(".stage svg")
        before = drawing.get_attribute("viewBox")
        shown.get_by_role("button", name="zoom in").click()
        nearer = drawing.get_attribute("viewBox")
        assert float(str(nearer).split()[2]) < float(str(before).split()[2])
        box = drawing.bounding_box()
        assert box is not None
        shown.mouse.move(box["x"] + 20, box["y"] + 40)
        shown.mouse.down()
        shown.mouse.move(box["x"] + 80, box["y"] + 90, steps=3)
        shown.mouse.up()
        moved = drawing.get_attribute("viewBox")
        assert str(moved).split()[:2] != str(nearer).split()[:2] and str(moved).split()[2] == str(nearer).split()[2]
        shown.mouse.wheel(0, -200)
        shown.wait_for_function(
            "before => document.querySelector('.stage svg').getAttribute('viewBox') !== before", arg=moved
        )

    def test_colours_by_time_and_by_error(self, shown: Page) -> None:
        for word in ("time", "error"):
            shown.get_by_role("button", name=word, exact=True).click()
            fills = {str(box.get_attribute("style")) for box in shown.locator(".item.block rect.box").all()}
            assert len(fills) > 2 and any("65%" in fill for fill in fills), (word, fills)
        shown.get_by_role("button", name="precision", exact=True).click()
        assert shown.locator(".item rect.box[style]").count() == 0

    def test_quantizers_are_labelled_by_the_node_of_their_value(self, made: Made) -> None:
        graph, places = made.data["graph"], dict[str, str]()
        for node in graph["nodes"]:
            places |= {graph["values"][value][0]: node["name"] for value in node["out"]}
        makers = {q["site"]: q["maker"] for q in made.data["quantizers"] if "maker" in q}
        exact = {site: maker for site, maker in makers.items() if site in places}
        assert len(exact) > 10 and all(places[site] == maker for site, maker in exact.items())

    def test_the_heat_map_has_a_row_for_each_quantizer(self, made: Made, shown: Page) -> None:
        canvas = shown.locator(".heat canvas")
        rows = made.data["quantizers"]
        weights = sum(q["kind"] == "weight" for q in rows)
        assert weights == sum(q.format != "uint8" for q in made.bundle.manifest.quantizers) > 0
        assert canvas.get_attribute("data-rows") == str(len(made.bundle.manifest.quantizers))
        assert canvas.get_attribute("data-columns") == str(len(made.ranges.timesteps))
        shown.get_by_role("button", name=f"weights ({weights})").click()
        assert canvas.get_attribute("data-rows") == str(weights)
        shown.get_by_role("button", name=f"activations ({len(rows) - weights})").click()
        assert canvas.get_attribute("data-rows") == str(len(rows) - weights)
        shown.get_by_role("button", name=f"all ({len(rows)})").click()

    def test_the_heat_map_shows_numbers(self, made: Made, shown: Page) -> None:
        canvas = shown.locator(".heat canvas")
        canvas.focus()
        shown.keyboard.press("ArrowDown")
        shown.keyboard.press("ArrowRight")

        values = [i for i, q in enumerate(made.data["quantizers"]) if q["kind"] == "value"]
        row, column = values[1], int(np.argsort(-made.ranges.timesteps)[1])  # the noisiest step comes first
        text = shown.inner_text(".readout")
        assert made.data["quantizers"][row]["site"] in text
        assert f"{made.ranges.timesteps[column]:g}" in text
        low, high = (float(f"{table[row, column]:.4g}") for table in (made.ranges.low, made.ranges.high))
        assert f"{low:g} .. {high:g}" in text
        shown.keyboard.press("Enter")
        assert shown.locator("#ranges svg.plot").count() == 1

    def test_the_heat_map_is_painted(self, made: Made, shown: Page) -> None:
        """A pixel in the middle of a cell has another colour where the range is narrower."""
        shown.locator("#ranges").scroll_into_view_if_needed()
        values = [i for i, q in enumerate(made.data["quantizers"]) if q["kind"] == "value"][:12]  # those in sight
        widths = (made.ranges.high - made.ranges.low)[values][:, np.argsort(-made.ranges.timesteps)]
        row = int(np.argmin(widths.min(axis=1) / widths.max(axis=1)))
        assert widths[row].min() < 0.9 * widths[row].max()
        colours = shown.evaluate(
            """([row, columns, count]) => { const c = document.querySelector('.heat canvas');
            const left = Math.min(220, c.width * 0.38), cell = (c.width - left) / count;
            const copy = new OffscreenCanvas(c.width, c.height).getContext('2d', { willReadFrequently: true });
            copy.drawImage(c, 0, 0);
            const at = (column) => copy.getImageData(left + (column + 0.5) * cell, 28 + 15 * row, 1, 1);
            return columns.map((column) => [...at(column).data].join()); }""",
            [row, [int(widths[row].argmin()), int(widths[row].argmax())], widths.shape[1]],
        )
        assert colours[0] != colours[1]

    def test_a_pass_shows_its_difference(self, made: Made, shown: Page) -> None:
        number = [r.name for r in made.bundle.manifest.history].index("insert_qdq") + 1
        lines = (made.bundle.path / "passes" / f"{number:03d}_insert_qdq.diff").read_text().splitlines()
        shown.click("[data-pass=insert_qdq]")
        shown.wait_for_selector(".diff .line")
        texts = shown.locator(".diff .line").all_text_contents()
        assert texts == [line or " " for line in lines][: len(texts)] and len(texts) == min(len(lines), 1500)
        assert shown.locator(".diff .added").count() > 10
        shown.click("[data-pass=observe]")
        shown.wait_for_selector("#diff .note")
        assert "did not change the graph" in shown.inner_text("#diff")

    def test_tables_are_filtered_and_sorted(self, made: Made, shown: Page) -> None:
        shown.locator("#quantizers input").fill("weight int8")
        assert shown.locator("#quantizers [data-quantizer]").count() > 0
        assert all("int8" in text for text in shown.locator("#quantizers [data-quantizer]").all_inner_texts())
        shown.locator("#quantizers input").fill("")
        shown.locator("#cost th button").nth(1).click()
        shown.locator("#cost th button").nth(1).click()
        first = shown.locator("#cost tbody tr").first.inner_text()
        assert min(made.data["cost"]["rows"], key=lambda row: row["share"])["name"] in first.replace("\u200b", "")

    def test_the_audit_lists_every_layer(self, made: Made, shown: Page) -> None:
        rows = made.data["audit"]
        shown.locator("#audit").get_by_role("button", name="in float").click()
        floats = shown.locator("#audit tbody tr")
        assert floats.count() == sum(not row["integer"] for row in rows) > 0
        assert "island" in floats.first.inner_text()
        shown.locator("#audit").get_by_role("button", name="all", exact=True).click()
        floats.first.locator("button").click()
        assert shown.locator(".panel").get_attribute("data-panel") == rows[0]["name"]
        shown.keyboard.press("Escape")

    def test_images_stand_side_by_side(self, shown: Page) -> None:
        assert shown.locator(".strip").count() == 3
        sizes = shown.evaluate("[...document.querySelectorAll('.strip img')].map((i) => i.naturalWidth)")
        assert sizes == [8] * 6


class TestReaders:
    def test_a_phone(self, made: Made, chromium: Browser) -> None:
        with opened(chromium, made.file, PHONE, is_mobile=True, has_touch=True) as seen:
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
            find(seen.page, layer_with_ranges(made))
            seen.page.click("[data-pass=insert_qdq]")
            seen.page.wait_for_selector(".diff .line")
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
            assert seen.page.locator(".panel").is_visible()

    def test_dark_and_light(self, made: Made, chromium: Browser) -> None:
        papers = []
        for scheme in ("light", "dark"):
            with opened(chromium, made.file, color_scheme=scheme) as seen:
                colours = seen.page.evaluate(
                    "['color', 'backgroundColor'].map((k) => getComputedStyle(document.body)[k].match(/[0-9]+/g)[1])"
                )
                papers.append(tuple(map(int, colours)))
        assert papers[0][0] < 80 < 200 < papers[0][1]
        assert papers[1][1] < 80 < 200 < papers[1][0]

    def test_paper(self, made: Made, chromium: Browser) -> None:
        with opened(chromium, made.file) as seen:
            rows = seen.page.locator("#quantizers tbody tr").count()
            seen.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
            seen.page.emulate_media(media="print")
            count = len(made.data["quantizers"])
            assert seen.page.locator("#quantizers tbody tr").count() == 120 > rows
            assert f"{count - 120} more rows: on a screen only" in seen.page.inner_text("#quantizers")
            for name in SECTIONS:
                assert seen.page.inner_text(f"#{name}").count("\n") >= 2, name
            assert not seen.page.locator("#search").is_visible() and seen.page.locator("canvas.printed").is_visible()
            assert seen.page.pdf().startswith(b"%PDF")

    def test_keys_alone(self, made: Made, chromium: Browser) -> None:
        with opened(chromium, made.file) as seen:
            seen.page.keyboard.press("/")
            seen.page.keyboard.type(layer_with_ranges(made))
            seen.page.keyboard.press("Enter")
            assert seen.page.locator(".panel").count() == 1
            focused = "document.activeElement.getAttribute('data-node')"
            assert seen.page.evaluate(focused) == layer_with_ranges(made)
            seen.page.keyboard.press("Escape")
            assert seen.page.locator(".panel").count() == 0
            seen.page.keyboard.press("Tab")
            assert seen.page.evaluate("document.activeElement.classList.contains('item')")


class TestSafety:
    @pytest.fixture
    def hostile(self, hand: Compiled, tmp_path: Path) -> Bundle:
        """A bundle whose names and notes are markup."""
        model = onnx.load(hand.bundle.model_path)
        for node in model.graph.node[-3:]:
            node.name = f"{EVIL}/{node.name}"
        manifest = hand.bundle.manifest
        history = [{**record.to_json(), "note": EVIL} for record in manifest.history]
        quantizers = [{**q.to_json(), "site": f"{EVIL}{q.site}"} for q in manifest.quantizers]
        source = {**manifest.source.to_json(), "name": EVIL}
        islands = {EVIL: EVIL}
        facts: dict[str, Any] = {"history": history, "quantizers": quantizers, "source": source, "islands": islands}
        return changed_bundle(hand.bundle, tmp_path / "evil", model, **facts)

    def test_names_are_only_text(self, hostile: Bundle, chromium: Browser, tmp_path: Path) -> None:
        data = page_data(hostile, UNMEASURED, made_up_ranges(hostile))
        (tmp_path / "page.html").write_text(render_page(data), encoding="utf-8")
        with opened(chromium, tmp_path / "page.html") as seen:
            assert seen.page.title().startswith(EVIL) and seen.page.inner_text("h1").startswith(EVIL)
            find(seen.page, f"{data['graph']['nodes'][-1]['name']}")
            assert EVIL in seen.page.inner_text(".panel h3")
            assert seen.page.evaluate("window.harmed") is None
            assert seen.page.locator("img").count() == 0

    def test_a_page_that_did_not_escape_is_noticed(
        self, hostile: Bundle, chromium: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inspect_page, "json_for_html", json.dumps)
        (tmp_path / "page.html").write_text(render_page(page_data(hostile, UNMEASURED)), encoding="utf-8")
        context = chromium.new_context()
        broken = context.new_page()
        broken.goto((tmp_path / "page.html").as_uri())
        assert broken.locator("img").count() > 0 and broken.locator(READY).count() == 0
        assert broken.evaluate("window.harmed") is None  # the policy holds where the escaping does not
        context.close()

    @pytest.mark.parametrize(
        "planted",
        ["<script>window.harmed = 1</script>", '<img src="https://example.org/x.png" alt="">'],
    )
    def test_the_policy_lets_nothing_else_in(self, made: Made, chromium: Browser, tmp_path: Path, planted: str) -> None:
        text = made.file.read_text(encoding="utf-8")
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
        (tmp_path / "page.html").write_text(text.replace("<main", f"{planted}<main"), encoding="utf-8")
        with pytest.raises(AssertionError, match="Content Security Policy"), opened(chromium, tmp_path / "page.html"):
            pass

    def test_the_policy_stops_an_inline_handler(self, made: Made, chromium: Browser, tmp_path: Path) -> None:
        """Whether the console reports it, and when, differs between versions of Chromium."""
        planted = made.file.read_text(encoding="utf-8").replace(
            "<main", '<p id="planted" onclick="window.harmed = 1">planted</p><main'
        )
        harmed = []
        for name, text in (("page", planted), ("open", planted.replace("Content-Security-Policy", "X-No-Policy"))):
            file = tmp_path / f"{name}.html"
            file.write_text(text, encoding="utf-8")
            context = chromium.new_context()
            page = context.new_page()
            page.goto(file.as_uri())
            page.wait_for_selector(READY)
            page.locator("#planted").dispatch_event("click")
            harmed.append(page.evaluate("window.harmed"))
            context.close()
        assert harmed == [None, 1]

    def test_json_survives(self) -> None:
        data = {"a": [EVIL, "\u2028", "é"], "b": None}
        text = json_for_html(data)
        assert json.loads(text) == data and not set("<>&\u2028") & set(text)
        with pytest.raises(ValueError, match="JSON"):
            json_for_html(float("nan"))


class TestSize:
    def test_thousands_of_nodes_open_at_once(self, hand: Compiled, chromium: Browser, tmp_path: Path) -> None:
        bundle = large_bundle(hand.bundle, tmp_path / "large")
        data = page_data(bundle, UNMEASURED, made_up_ranges(bundle))
        assert len(data["graph"]["nodes"]) == 8001
        assert max(len(block["items"]) for block in data["graph"]["blocks"]) <= 80
        (tmp_path / "page.html").write_text(render_page(data), encoding="utf-8")

        with opened(chromium, tmp_path / "page.html") as seen:
            name = data["graph"]["nodes"][5000]["name"]
            find(seen.page, name)
            assert seen.page.locator(".panel").get_attribute("data-panel") == name
            assert seen.page.locator(".heat canvas").get_attribute("data-rows") == "1500"
            seen.page.click("[data-pass=pass_3]")
            seen.page.wait_for_selector(".diff .line")
            assert seen.page.locator(".diff .line").count() == 1500
            assert seen.page.evaluate("document.querySelectorAll('*').length") < 12000


class TestCommand:
    def test_it_writes_a_page(self, hand: Compiled, cli: Cli, tmp_path: Path, chromium: Browser) -> None:
        target = tmp_path / "new" / "page.html"
        answer = cli(
            *("inspect", hand.bundle.path, "--html", target, "--reference", hand.exported),
            *("-n", "2", "--calls", "1", "--threads", THREADS),
        )
        assert answer.code == 0, answer.err
        assert answer.out == f"wrote {target}\n"
        with opened(chromium, target) as seen:
            text = seen.page.inner_text("#summary")
            assert f"{INTEGER} / " in text and "PSNR" in text and "times as fast as float" in text
            assert seen.page.locator("#cost tbody tr").count() == INTEGER

    def test_without_a_reference_it_names_the_missing_parts(
        self, hand: Compiled, tmp_path: Path, chromium: Browser
    ) -> None:
        write_page(hand.bundle, tmp_path / "page.html", PageOptions(pictures=1, profile=False))
        with opened(chromium, tmp_path / "page.html") as seen:
            assert NO_REFERENCE in seen.page.inner_text("#cost") and NO_REFERENCE in seen.page.inner_text("#pictures")
            assert "--no-profile" in seen.page.inner_text("#graph")
            if RANGES not in hand.bundle.manifest.files:
                assert RANGES in seen.page.inner_text("#ranges")
            assert "fit_noise" in seen.page.inner_text("#noise")
            assert seen.page.locator(".strip").count() == 1

    def test_conditions_that_are_missing(self, tmp_path: Path) -> None:
        source = write(hand_written(context="words"), tmp_path / "conditional.onnx")
        given = {"words": np.ones((2, CONTEXT), np.float32)}
        bundle = compile_model(source, tmp_path / "bundle", recipe="w8a8", conditions=given, **SMALL)
        found = measure_sections(bundle, PageOptions(pictures=1, profile=False, threads=THREADS))
        assert "words" in found["pictures"]["note"]
        found = measure_sections(bundle, PageOptions(pictures=1, conditions=given, threads=THREADS))
        assert len(found["pictures"]["rows"]) == 1 and found["speed"]["call_ms"] > 0

    def test_a_bundle_that_cannot_be_debugged(self, hand: Compiled) -> None:
        recipe = json.loads(json.dumps(hand.bundle.manifest.recipe.to_json()))
        recipe["passes"].append({"pass": "own"})
        bundle = Bundle(hand.bundle.path, changed_manifest(hand.bundle.manifest, recipe=recipe))
        found = measure_sections(bundle, PageOptions(hand.exported, pictures=0, profile=False))
        assert "no pass called 'own'" in found["cost"]["note"] and "-n 0" in found["pictures"]["note"]

    def test_a_reference_that_is_not_there(self, hand: Compiled, cli: Cli, tmp_path: Path) -> None:
        answer = cli("inspect", hand.bundle.path, "--html", tmp_path / "p.html", "--reference", tmp_path / "no.onnx")
        assert answer.code == 2 and "there is no such float model" in answer.err
        assert not (tmp_path / "p.html").exists()
        with pytest.raises(InputError, match="no such float model"):
            measure_sections(hand.bundle, PageOptions(tmp_path / "no.onnx"))

    def test_an_impossible_place_is_refused_before_anything_is_measured(
        self, hand: Compiled, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inspect_page, "measure_sections", None)
        (tmp_path / "file").write_text("")
        for place, words in ((tmp_path, "a folder of that name"), (tmp_path / "file" / "p.html", "cannot write there")):
            answer = cli("inspect", hand.bundle.path, "--html", place)
            assert answer.code == 2 and words in answer.err

    def test_a_failure_leaves_the_earlier_page(
        self, hand: Compiled, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "p.html").write_text("earlier")
        honest = Path.write_text

        def full(path: Path, text: str, **more: Any) -> int:
            honest(path, text[:100], **more)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        answer = cli("inspect", hand.bundle.path, "--html", tmp_path / "p.html", "--no-profile", "-n", "0")
        assert answer.code == 2 and "the disk is full" in answer.err
        assert [f.name for f in tmp_path.iterdir()] == ["p.html"] and (tmp_path / "p.html").read_text() == "earlier"

    def test_options_of_the_page_without_one(self, hand: Compiled, cli: Cli) -> None:
        plain = json.loads(cli("inspect", hand.bundle.path, "--json").out)
        assert plain["digest"] == hand.bundle.manifest.digest
        for option in ("--reference", "--seed", "--conditions", "--unconditional"):
            answer = cli("inspect", hand.bundle.path, option, "3")
            assert answer.code == 2 and f"{option} is for the page" in answer.err

    def test_twice_the_same(self, hand: Compiled) -> None:
        data = [render_page(page_data(hand.bundle, UNMEASURED, made_up_ranges(hand.bundle))) for _ in range(2)]
        assert data[0] == data[1]
