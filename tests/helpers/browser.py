"""Pages in a real browser: headless Chromium, driven by Playwright; and bundles that are hard on a page.

Playwright brings its own driver and no browser: Chromium is the system's. Where there is none, the tests skip.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mezzotint import Bundle, open_bundle
from mezzotint.runtime.bundle.bundle import seal_bundle
from mezzotint.runtime.bundle.ranges import Ranges
from mezzotint.web.onnxruntime_web import WebRuntimeMissing, web_runtime_files
from tests.helpers.manifests import changed_manifest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
DESKTOP, PHONE = (1280, 900), (360, 740)
READY = "body[data-ready]"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser; tests that ask for it skip where there is none."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=OPTIONS)
        yield opened
        opened.close()


@dataclass
class Seen:
    """A page that is open, and what went wrong or out since."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Browser, file: Path, size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator[Seen]:
    """Open a file and wait until all its sections are there; at the end nothing may have gone wrong or out."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    seen = Seen(context.new_page())
    address = file.resolve().as_uri()
    seen.page.on("console", lambda said: seen.complaints.append(f"{said.type}: {said.text}"))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.on("request", lambda asked: seen.requests.append(asked.url))
    try:
        seen.page.goto(address)
        seen.page.wait_for_selector(READY)
        yield seen
        assert seen.complaints == []
        assert {r.partition("#")[0] for r in seen.requests if not r.startswith("data:image/")} == {address}
    finally:
        context.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine with Python's own web server, and yield its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def web_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the files of onnxruntime-web, fetched by npm; tests that ask for it skip where that fails."""
    cache = tmp_path_factory.mktemp("onnxruntime-web")
    try:
        web_runtime_files(cache=cache)
    except WebRuntimeMissing as error:
        pytest.skip(f"the files of onnxruntime-web cannot be had here: {error.what}")
    return cache


def made_up_ranges(bundle: Bundle) -> Ranges:
    """Ranges that drift with the timestep for activations, and stay for weights; not all were measured."""
    rng = np.random.default_rng(7)
    times = np.array(sorted(bundle.deployed_timesteps or bundle.deployment.timesteps), np.float64)
    rows = bundle.manifest.quantizers
    start, drift = rng.uniform(1, 4, (len(rows), 1)), rng.uniform(-0.7, 2, (len(rows), 1))
    drift[[q.format.startswith("int") for q in rows]] = 0
    width = start * (1 + drift * np.linspace(0, 1, len(times)))
    high, low = (0.6 * width).astype(np.float32), (-0.4 * width).astype(np.float32)
    seen = np.where(drift != 0, 0.9, np.nan).astype(np.float32)
    return Ranges(times, low, high, (high - low) / np.float32(255), low * seen, high * seen)


def changed_bundle(bundle: Bundle, folder: Path, model: onnx.ModelProto, **facts: Any) -> Bundle:
    """A copy of a bundle with another graph and other facts in its manifest, sealed again."""
    shutil.copytree(bundle.path, folder)
    onnx.save(model, folder / "unet" / "model.onnx")
    seal_bundle(folder, changed_manifest(bundle.manifest, **facts))
    return open_bundle(folder)


def named_bundle(bundle: Bundle, folder: Path) -> tuple[Bundle, dict[str, str]]:
    """A copy whose nodes have names of modules: those of the layers' weights, and behind a layer its own.

    Also the new name of each old one.
    """
    model = onnx.load(bundle.model_path)
    if any("/" in node.name for node in model.graph.node):
        return bundle, {node.name: node.name for node in model.graph.node}
    weights = {i.name for i in model.graph.initializer if ".weight" in i.name}
    names: dict[str, str] = {}
    scope = "start"
    for number, node in enumerate(model.graph.node):
        weight = next((name for name in node.input if name in weights and "quantized" in name), "")
        if weight:
            path = weight.removeprefix("model.").partition(".weight")[0].split(".")
            joined = [f"{a}.{b}" if b.isdigit() else a for a, b in zip(path, [*path[1:], ""], strict=True)]
            scope = "/".join(part for part in joined if not part.isdigit())
        names[node.name] = f"{scope}/{node.op_type}_{number}"
        node.name = names[node.name]
    kernels = bundle.manifest.kernels.to_json()
    layers = {names.get(name, name): row for name, row in kernels["layers"].items()}
    islands = {names.get(name, name): why for name, why in bundle.manifest.islands.items()}
    return changed_bundle(bundle, folder, model, kernels={**kernels, "layers": layers}, islands=islands), names


def large_bundle(bundle: Bundle, folder: Path, nodes: int = 8000, quantizers: int = 1500) -> Bundle:
    """As large as SD 1.5: so many nodes in a U of modules with long shortcuts, fourteen passes with long diffs."""
    chain: list[onnx.NodeProto] = []
    last = bundle.signature.sample
    shortcuts: list[str] = []
    per_module = 40
    modules = nodes // per_module
    layers: dict[str, dict[str, Any]] = {}
    for m in range(modules):
        down = m < modules // 2
        scope = f"{'down' if down else 'up'}_blocks.{m % (modules // 2) // 12}/attentions.{m % 12}"
        for k in range(per_module):
            out, block = f"v{m}_{k}", f"{scope}/transformer_blocks.0/{('attn1', 'attn2', 'ff', 'norm')[k // 10]}"
            op = ("Conv", "Sigmoid", "Mul", "Add", "Relu")[k % 5]
            inputs = {"Conv": [last, "kernel"], "Mul": [last, last], "Add": [last, last]}.get(op, [last])
            if op == "Add" and k == per_module - 2 and not down and shortcuts:
                inputs = [last, shortcuts.pop()]
            name = f"{block}/{op}_{k}"
            chain.append(helper.make_node(op, inputs, [out], name=name))
            if op == "Conv":
                integer = k % 10 != 0
                layers[name] = {"kernel": "QLinearConv" if integer else "Conv", "integer": integer}
                layers[name] |= {} if integer else {"why": "onnxruntime did not fuse it"}
            last = out
        if down:
            shortcuts.append(last)
    chain.append(helper.make_node("Identity", [last], [bundle.signature.output], name="end"))
    sizes: list[str | int | None] = ["batch", *bundle.sample_shape]
    graph = helper.make_graph(
        chain,
        "large",
        [
            helper.make_tensor_value_info(bundle.signature.sample, TensorProto.FLOAT, sizes),
            helper.make_tensor_value_info(bundle.signature.timestep, TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info(bundle.signature.output, TensorProto.FLOAT, sizes)],
        [helper.make_tensor("kernel", TensorProto.FLOAT, [1, 1, 1, 1], [1.0])],
    )
    base = bundle.manifest.quantizers[0].to_json()
    sites = [n.output[0] for n in chain[: quantizers - 300]] + [f"w{i}.weight" for i in range(300)]
    rows = [{**base, "site": s, "format": "int8" if s.endswith("weight") else "uint8", "rows": 1} for s in sites]
    history = [{**bundle.manifest.history[0].to_json(), "pass": f"pass_{i}"} for i in range(14)]
    made = changed_bundle(
        bundle,
        folder,
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        kernels={**bundle.manifest.kernels.to_json(), "layers": layers},
        quantizers=rows,
        history=history,
        islands={},
    )
    lines = "".join(f"{'+-'[i % 2]}      value_{i} = Conv <pads = [1, 1, 1, 1]> (v{i}, kernel)\n" for i in range(40000))
    for i in range(14):
        (folder / "passes" / f"{i + 1:03d}_pass_{i}.diff").write_text(lines, encoding="utf-8")
    return made
