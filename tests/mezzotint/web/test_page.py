"""`mezzotint web`: the page in real headless Chromium, served by a plain web server, and the command that writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from mezzotint import Bundle, compile_model, mix_bundles
from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.bundle.manifest_entries import RecipeEntry
from mezzotint.runtime.compare import psnr_db
from mezzotint.runtime.errors import InputError, TimestepNotDeployed
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import SAMPLERS, Deployment
from mezzotint.runtime.sampling.guidance import predictors, rows_in_turn
from mezzotint.runtime.sampling.samplers import Stepper, initial_noise, run_solver, sample, seeded_noise
from mezzotint.runtime.sampling.schedule import NAMED_SCHEDULES, Schedule
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import EXTRA_CHANNELS, Images, Signature
from mezzotint.web.networks import WebNetwork
from mezzotint.web.page import WEB_MANIFEST, WebOptions, web_data, write_web
from mezzotint.web.scalars import solver_json
from tests.helpers.browser import DESKTOP, PHONE, served
from tests.helpers.models import CONTEXT, SMALL, THREADS, Cli, Compiled, hand_written

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SEED, COUNT = 2**63 - 1, 2
PRECISIONS = ("float", "ptqd-w8a8")
SIGNATURE = Signature("x", "t", "y")
# Runs the page's own sampling loop over a made-up network, which both languages compute exactly: out = x / 4.
LOOP = """async ([solver, seed, batch, size]) => {
  const { advance, begin } = await import("./sampler.js"), { normal } = await import("./noise.js");
  let state = begin(solver, normal(seed, 0, batch, size));
  solver.calls.forEach((call, i) => {
    state = advance(call, state, state.x.map((value) => value / 4), size, () => normal(seed, i + 1, batch, size));
  });
  return [...state.x];
}"""
RESULT = """() => {
  const { images, times, decibels } = window.mezzotint.result;
  return { bundle: [...images.bundle], float: [...(images.float ?? [])], times, decibels };
}"""


@dataclass
class Visit:
    """A page that is open, and what went wrong or out since."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def wait(self, state: str) -> None:
        self.page.wait_for_selector(f"body[data-state={state}]")

    def choose(self, seed: object, count: int = COUNT, steps: int = 2) -> None:
        self.page.get_by_label("Seed").fill(str(seed))
        self.page.get_by_label("Images").fill(str(count))
        self.page.get_by_label("Sampler").select_option(f"ddim, {steps} steps, eta 0")

    def run(self) -> dict[str, Any]:
        """Sample, and return what the page then holds."""
        self.page.get_by_role("button", name="Sample").click()
        self.wait("done")
        return self.page.evaluate(RESULT)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def site(hand: Compiled, web_runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the hand-written model, beside its float model."""
    folder = tmp_path_factory.mktemp("web") / "site"
    write_web(hand.bundle, folder, WebOptions(hand.exported, steps=(2, 4)), cache=web_runtime)
    return folder


@contextmanager
def visiting(browser: Browser, folder: Path, size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator[Visit]:
    """Open the page and wait until its networks are there; nothing may go wrong, and no request elsewhere."""
    with served(folder) as address:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        visit = Visit(context.new_page())
        visit.page.on("console", lambda said: visit.complaints.append(f"{said.type}: {said.text}"))
        visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        context.on(
            "request", lambda asked: visit.foreign.append(asked.url) if not asked.url.startswith(address) else None
        )
        try:
            visit.page.goto(address)
            visit.wait("ready")
            yield visit
            assert visit.complaints == []
            assert [url for url in visit.foreign if not url.startswith("data:,")] == []
        finally:
            context.close()


@pytest.fixture(scope="module")
def visit(site: Path, chromium: Browser) -> Iterator[Visit]:
    with visiting(chromium, site) as opened:
        yield opened


def images_of(numbers: list[float], like: Images) -> Images:
    return np.array(numbers, np.float32).reshape(like.shape)


def float_images(made: Compiled, steps: int) -> Images:
    plan = made.bundle.plan(steps=steps)
    network = Denoiser(made.exported, made.bundle.signature, threads=1)
    x = initial_noise(SEED, (COUNT, *made.bundle.sample_shape))
    return sample(network, x, made.bundle.schedule, plan)


class TestSampling:
    @pytest.mark.parametrize("steps", [2, 4])
    def test_images_are_those_of_python(self, hand: Compiled, visit: Visit, steps: int) -> None:
        visit.choose(SEED, steps=steps)

        result = visit.run()

        exact = float_images(hand, steps)
        mine = images_of(result["float"], exact)
        assert np.abs(mine - exact).max() < 1e-4
        # The integer kernels of wasm may round a value to the neighbouring step.
        quantized = hand.bundle.sample(COUNT, steps=steps, seed=SEED, threads=1)
        integer = images_of(result["bundle"], quantized)
        assert psnr_db(quantized, integer, 2.0).min() > 35
        assert np.abs(quantized - exact).max() > 1e-3  # so the two networks of the page are not one
        between = psnr_db(np.clip(mine, -1, 1), np.clip(integer, -1, 1), 2.0)
        assert result["decibels"] == pytest.approx(between.tolist(), abs=0.01)
        assert [len(result["times"][model]) for model in ("bundle", "float")] == [steps, steps]
        assert min(result["times"]["bundle"]) > 0

    def test_the_page_shows_what_it_computed(self, visit: Visit) -> None:
        visit.choose(3)
        result = visit.run()

        page = visit.page
        assert page.locator("#images-bundle canvas").count() == COUNT
        assert page.get_by_role("img", name="image 2 of 2, float model").is_visible()
        pixels = page.evaluate(
            "[...document.querySelector('#images-float canvas').getContext('2d').getImageData(0, 0, 8, 8).data]"
        )
        wanted = np.rint((np.clip(result["float"][:64], -1, 1) + 1) * 127.5)
        assert np.abs(np.array(pixels).reshape(64, 4)[:, 0] - wanted).max() <= 1
        assert np.array(pixels).reshape(64, 4)[:, 3].min() == 255
        assert "ms" in page.inner_text("#row-bundle") and "ms" in page.inner_text("#row-float")
        assert "x as fast" in page.inner_text("#compared") and "dB" in page.inner_text("#compared")
        words = page.get_by_role("progressbar").get_attribute("aria-valuetext") or ""
        assert re.fullmatch(r"call 2 of 2: bundle \(w8a8\) [\d.]+ ms, float model [\d.]+ ms", words)
        assert page.inner_text("#call") == words

    def test_the_float_model_can_be_left_out(self, visit: Visit) -> None:
        visit.choose(3, count=1)
        visit.page.get_by_label("Float model beside it").uncheck()
        result = visit.run()
        assert (len(result["bundle"]), result["float"], result["decibels"]) == (64, [], None)
        assert not visit.page.locator("#model-float").is_visible()
        visit.page.get_by_label("Float model beside it").check()

    def test_a_run_stops(self, visit: Visit) -> None:
        visit.choose(3)
        visit.page.evaluate("document.getElementById('start').click(); document.getElementById('stop').click()")
        visit.wait("stopped")
        assert visit.page.get_by_role("status").inner_text() == "Stopped after 1 network calls."
        assert visit.page.evaluate("window.mezzotint.result") is None
        assert len(visit.run()["bundle"]) == COUNT * 64

    def test_wrong_numbers_are_refused_beside_the_form(self, visit: Visit) -> None:
        page = visit.page
        for seed, count, field_ in (("1.5", 1, "Seed"), (2**63, 1, "Seed"), ("", 1, "Seed"), (1, 65, "Images")):
            visit.choose(seed, count)
            page.get_by_role("button", name="Sample").click()
            assert page.get_by_role("alert").inner_text() != ""
            assert page.get_by_label(field_).get_attribute("aria-invalid") == "true"
            assert page.evaluate("document.activeElement.labels[0].textContent") == field_
        visit.choose(1)
        visit.run()
        assert page.get_by_role("alert").inner_text() == ""

    def test_it_works_by_keyboard(self, visit: Visit) -> None:
        visit.choose(7)
        visit.page.get_by_label("Seed").press("Enter")
        visit.wait("done")
        assert visit.page.evaluate("document.activeElement.id") == "start"


@pytest.fixture(scope="module")
def mixed(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Two precisions in one bundle, a corrected one among them; the float model has its weights in another file."""
    folder = tmp_path_factory.mktemp("mixed")
    noisy = {**SMALL, "eta": 0.5}
    bundles = {name: compile_model(hand.exported, folder / name, recipe=name, **noisy) for name in PRECISIONS}
    costs = {"float": 1.0, "ptqd-w8a8": 0.5}
    options: dict[str, Any] = {"pictures": 1, "threads": THREADS, "costs": costs, "budget": 0.75}
    bundle = mix_bundles(bundles, folder / "mix", reference=hand.exported, **options)
    outside = folder / "outside.onnx"
    onnx.save(hand_written(), outside, save_as_external_data=True, location="weights.bin", size_threshold=256)
    return Compiled(None, outside, bundle)


def test_precisions_corrections_and_external_data(
    mixed: Compiled, web_runtime: Path, chromium: Browser, tmp_path: Path
) -> None:
    data, files = web_data(mixed.bundle, WebOptions(mixed.exported, count=COUNT))
    calls = data["deployments"][0]["solvers"]["bundle"]["calls"]
    assert {call["network"] for call in calls} == {f"bundle/{name}" for name in PRECISIONS}
    assert all("correction" in call for call in calls) and calls[0]["noise"] > 0
    assert any(path.name == "weights.bin" for path in files.values())
    write_web(mixed.bundle, tmp_path / "site", WebOptions(mixed.exported, count=COUNT), cache=web_runtime)

    with visiting(chromium, tmp_path / "site") as opened:
        result = opened.run()

    wanted = mixed.bundle.sample(COUNT, threads=1)
    assert psnr_db(wanted, images_of(result["bundle"], wanted), 2.0).min() > 35
    network = Denoiser(mixed.exported, mixed.bundle.signature, threads=1)
    x = initial_noise(0, wanted.shape)
    exact = sample(network, x, mixed.bundle.schedule, mixed.bundle.deployment, noise=seeded_noise(0))
    assert np.abs(images_of(result["float"], exact) - exact).max() < 1e-4


CLASSES = np.arange(3)
TEXTS = np.random.default_rng(6).standard_normal((3, CONTEXT)).astype(np.float32)
ROWS: dict[str, Any] = {
    "conditions": {"label": CLASSES, "text": TEXTS},
    "unconditional": {"label": np.array([3])},  # the text is the same in both halves
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A network of three classes, the null class 3, and an embedding; deployed with guidance."""
    folder = tmp_path_factory.mktemp("labelled")
    model = hand_written(context="embedded")
    given = next(value for value in model.graph.input if value.name == "embedded")
    given.name = "text"
    model.graph.input.append(onnx.helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["batch"]))
    table = np.random.default_rng(5).standard_normal((4, CONTEXT)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "classes"))
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["classes", "label"], ["class"]))
    model.graph.node.insert(1, onnx.helper.make_node("Add", ["class", "text"], ["embedded"]))
    exported = folder / "labelled.onnx"
    onnx.save(model, exported)
    bundle = compile_model(exported, folder / "bundle", recipe="w8a8", guidance=3.0, **ROWS, **SMALL)
    return Compiled(None, exported, bundle)


class TestConditions:
    @pytest.fixture(scope="class")
    def options(self, labelled: Compiled) -> WebOptions:
        return WebOptions(labelled.exported, count=COUNT, **ROWS)

    def test_a_class_is_chosen_and_guidance_has_two_halves(
        self, labelled: Compiled, options: WebOptions, web_runtime: Path, chromium: Browser, tmp_path: Path
    ) -> None:
        write_web(labelled.bundle, tmp_path / "site", options, cache=web_runtime)
        drawn = {}
        with visiting(chromium, tmp_path / "site") as opened:
            for label in (0, 2):
                opened.page.get_by_label("Condition").select_option(f"label {label}")
                drawn[label] = opened.run()

        for label, result in drawn.items():
            rows: dict[str, Any] = {"label": CLASSES[[label]], "text": TEXTS[[label]]}
            quantized = labelled.bundle.sample(COUNT, conditions=rows, unconditional=options.unconditional, threads=1)
            assert psnr_db(quantized, images_of(result["bundle"], quantized), 2.0).min() > 35
            network = Denoiser(labelled.exported, labelled.bundle.signature, threads=1)
            plan = labelled.bundle.deployment
            (predict,) = set(predictors([network], plan, rows_in_turn(rows, 0, COUNT), options.unconditional))
            exact = sample(predict, initial_noise(0, quantized.shape), labelled.bundle.schedule, plan)
            assert np.abs(images_of(result["float"], exact) - exact).max() < 1e-4
        assert np.abs(np.subtract(drawn[0]["float"], drawn[2]["float"])).max() > 1e-2

    def test_rows_that_do_not_fit_are_refused(self, labelled: Compiled, options: WebOptions) -> None:
        def both(rows: npt.NDArray[Any]) -> dict[str, Any]:
            return {"conditions": {"label": rows, "text": TEXTS}, "unconditional": {"label": rows[:1]}}

        for changes, words in (
            ({"conditions": {}}, r"takes the conditions \['label', 'text'\], and \[\] were given"),
            (both(CLASSES.astype(np.int32)), "rows of int32"),
            (both(CLASSES[:, None]), r"rows of int64 \[1\]"),
            (both(CLASSES.astype(np.float16)), "rows of float16"),
            (both(np.arange(1001)), "1001 rows to choose from, and 3 of 'text'"),
            (both(CLASSES[:2]), "3 rows to choose from, and 2 of 'label'"),
            ({"unconditional": {}}, "guidance needs unconditional rows"),
        ):
            with pytest.raises(InputError, match=words):
                web_data(labelled.bundle, replace(options, **changes))
        plain = replace(labelled.bundle.manifest, deployment=replace(labelled.bundle.deployment, guidance=1.0))
        with pytest.raises(InputError, match="without guidance"):
            web_data(Bundle(labelled.bundle.path, plain), options)


class TestLoop:
    def test_noise_is_that_of_python(self, visit: Visit) -> None:
        for seed in (0, 7, SEED):
            numbers = visit.page.evaluate(
                "async (seed) => [...(await import('./noise.js')).normal(seed, 3, 2, 6000)]", str(seed)
            )
            wanted = seeded_noise(seed)(2, (2, 6000))
            assert np.abs(wanted).max() > 3.66  # beyond the last layer of the ziggurat
            assert np.array_equal(np.array(numbers, np.float32).reshape(2, 6000), wanted)

    @pytest.mark.parametrize("name", [*SAMPLERS, "pndm with Runge-Kutta", "ddim, corrected"])
    def test_every_sampler_is_that_of_python(self, visit: Visit, name: str) -> None:
        """To the bit: both languages round each operation to float32."""
        solver, correction = self.sampler(name)
        noise = seeded_noise(SEED)
        shape = (2, 3, 4, 4)
        stepper = Stepper(solver, correction)
        data = solver_json(stepper, ["net"] * len(solver.steps), SIGNATURE)

        numbers = visit.page.evaluate(LOOP, [data, str(SEED), 2, 48])

        quarter = np.float32(0.25)
        x = initial_noise(SEED, shape)
        wanted = run_solver(lambda x, t: x * quarter, x, solver, noise=noise, correction=correction)
        assert np.array_equal(images_of(numbers, wanted), wanted)

    def test_a_planted_error_is_noticed(self, visit: Visit) -> None:
        """The twin of the test above: one weight of one call is wrong by 1 %."""
        solver, _ = self.sampler("heun")
        data = solver_json(Stepper(solver), ["net"] * len(solver.steps), SIGNATURE)
        before = visit.page.evaluate(LOOP, [data, "0", 2, 48])
        _, terms = data["calls"][3]["rows"][-1]
        terms[0][1] *= 1.01
        assert np.abs(np.subtract(visit.page.evaluate(LOOP, [data, "0", 2, 48]), before)).max() > 1e-3

    def sampler(self, name: str) -> tuple[Any, Correction | None]:
        kind = name.partition(" ")[0].strip(",")
        changes = {"clip_sample": True, "clip_sample_range": 0.5, "skip_prk_steps": kind == name}
        config = NAMED_SCHEDULES["flow"] if kind == "flow-euler" else {**NAMED_SCHEDULES["ddpm-linear"], **changes}
        schedule = Schedule.from_config(config)
        plan = Deployment.of(schedule, kind, 5, 0.5 if kind == "ddim" else 0.0)
        count = len(plan.calls)
        if "corrected" not in name:
            return plan.solver(schedule), None
        scale, excess = np.linspace(0.9, 1.1, count), np.linspace(0.0, 0.1, count)
        shift = np.linspace(-0.1, 0.1, 3 * count).reshape(count, 3)
        stages = np.zeros(count, np.int64)
        return plan.solver(schedule), Correction(plan, "epsilon", "ptqd", stages, scale, shift, excess, excess)


class TestPage:
    def test_a_phone_shows_all_of_it(self, site: Path, chromium: Browser) -> None:
        with visiting(chromium, site, PHONE, color_scheme="dark", reduced_motion="reduce") as opened:
            page = opened.page
            opened.choose(3)
            assert not page.get_by_label("Show every step").is_checked()
            opened.run()
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
            table = page.locator(".wide")
            assert table.evaluate("(box) => box.scrollWidth <= box.clientWidth")
            assert page.get_by_role("img").count() == 2 * COUNT

    def test_every_field_has_a_label(self, visit: Visit) -> None:
        assert visit.page.evaluate(
            "[...document.querySelectorAll('input, select')].every((f) => f.labels.length === 1)"
        )

    def test_a_file_that_is_missing_is_named(self, site: Path, chromium: Browser) -> None:
        with served(site) as address:
            page = chromium.new_page()
            page.route("**/networks/0.onnx", lambda route: route.fulfill(status=404))
            page.goto(address)
            page.wait_for_selector("body[data-state=failed]")
            assert page.get_by_role("alert").inner_text() == "networks/0.onnx: the server answered 404"
            assert page.get_by_role("button", name="Sample").is_disabled()
            page.close()


class TestFolder:
    def test_text_from_a_bundle_stays_text(self, hand: Compiled, web_runtime: Path, tmp_path: Path) -> None:
        evil = '</script><img src="x">'
        manifest = hand.bundle.manifest
        recipe = RecipeEntry({**manifest.recipe.data, "name": evil})
        bundle = Bundle(hand.bundle.path, replace(manifest, recipe=recipe))
        write_web(bundle, tmp_path / "site", cache=web_runtime)
        html = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
        assert evil not in html and "<img" not in html and "&lt;/script&gt;" in html

    def test_only_a_page_is_replaced(self, hand: Compiled, site: Path, web_runtime: Path) -> None:
        with pytest.raises(OutputError, match="exists already"):
            write_web(hand.bundle, site, cache=web_runtime)
        before = json.loads((site / WEB_MANIFEST).read_text(encoding="utf-8"))
        write_web(hand.bundle, site, WebOptions(hand.exported, steps=(2, 4)), cache=web_runtime, force=True)
        assert json.loads((site / WEB_MANIFEST).read_text(encoding="utf-8")) == before
        foreign = site / "networks" / "mine.txt"
        foreign.write_text("mine", encoding="utf-8")
        with pytest.raises(OutputError, match="did not write it"):
            write_web(hand.bundle, site, cache=web_runtime, force=True)
        foreign.unlink()

    def test_bundles_that_the_page_cannot_sample_are_refused(self, hand: Compiled, tmp_path: Path) -> None:
        manifest = hand.bundle.manifest
        wider = replace(manifest.signature, conditions=(EXTRA_CHANNELS,))
        for changed, words in (
            (replace(manifest, signature=wider), "channels behind those of the image"),
            (replace(manifest, sample_shape=(4, 8, 8)), "4 channels are latents"),
        ):
            with pytest.raises(InputError, match=words):
                write_web(Bundle(hand.bundle.path, changed), tmp_path / "site")
        assert list(tmp_path.iterdir()) == []

    def test_steps_without_a_row_are_refused(self, hand: Compiled) -> None:
        with pytest.raises(TimestepNotDeployed, match="7 steps of ddim"):
            web_data(hand.bundle, WebOptions(steps=(4, 7)))

    def test_choices_that_no_page_can_have_are_refused(self, hand: Compiled) -> None:
        for options, words in (
            (WebOptions(count=65), "65 images"),
            (WebOptions(count=0), "0 images"),
            (WebOptions(seed=-1), "seed"),
        ):
            with pytest.raises(InputError, match=words):
                web_data(hand.bundle, options)
        network = WebNetwork(hand.exported, {}, "int64", (None,), None)
        network.check_times([1, 2.0])
        with pytest.raises(InputError, match=r"timestep 1\.5 lies between"):
            network.check_times([1.5])

    def test_the_command_says_how_to_serve_it(
        self, hand: Compiled, web_runtime: Path, cli: Cli, tmp_path: Path
    ) -> None:
        runtime = next(web_runtime.iterdir())
        said = cli("web", hand.bundle.path, "-o", tmp_path / "site", "--onnxruntime-web", runtime, "--steps", 2)
        assert (said.code, said.err) == (0, "")
        assert f"python -m http.server -d {tmp_path / 'site'}" in said.out
        assert "ddim, 2 steps" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
