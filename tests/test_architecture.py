"""The rooms of the project and the arrows between them, held to one table by reading the imports.

`violations`, `long_files` and the functions of tools/rooms.py take the root of a tree: the same functions run on this
repository and on small trees with one planted fault each.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tools.draw_rooms import draw
from tools.rooms import DRAWING, LINKED, ROOT, Import, arrows, file_arrows, floors, imports, main, rings, sources

LONGEST = 320  # lines of a file outside tests/
TORCH = frozenset({"torch", "diffusers", "transformers", "accelerate"})
NEWER = frozenset({"tomllib"})  # in the standard library, but not in that of Python 3.10
# What mezzotint/ may load only inside a function: none of it is needed to print a help text.
HEAVY = TORCH | {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "networkx", "scipy", "matplotlib"}

# Top folder -> the top folders that it may import. `mezzotint` is the front; nothing imports it from below.
BELOW = {
    "runtime": {"runtime"},
    "compiler": {"runtime", "compiler"},
    "passes": {"runtime", "compiler", "passes"},
    "mezzotint": {"runtime", "compiler", "passes", "mezzotint"},
}

# Room -> the rooms of its own top folder that it imports; "." is the top folder itself. Exactly these: a new arrow is
# a decision, written down here.
ARROWS = {
    "runtime": "",
    "runtime/providers": ".",
    "runtime/sampling": ".",
    "runtime/bundle": ". sampling",
    "runtime/diffusers": ". bundle sampling",
    "compiler": "",
    "compiler/graph": ".",
    "compiler/core": ". graph",
    "compiler/audit": ". core graph",
    "compiler/calibration": ". core",
    "compiler/components": ". audit bundle calibration core frontend frontend/architectures graph lowering",
    "compiler/frontend": ". core frontend/architectures graph",
    "compiler/frontend/architectures": ".",
    "compiler/rescaling": ". core graph",
    "compiler/scales": ". core graph",
    "compiler/acceptance": ". audit calibration core graph",
    "compiler/bits": ". calibration core graph scales",
    "compiler/lowering": ". core graph scales",
    "compiler/shortcuts": "calibration core graph rescaling scales",
    "compiler/correction": ". calibration core graph lowering scales",
    "compiler/rounding": ". calibration core graph lowering scales",
    "compiler/pruning": ". bits core graph rounding scales",
    "compiler/training": ". calibration core correction graph lowering rounding scales torch_graph",
    "compiler/torch_graph": ". core graph lowering scales",
    "compiler/bundle": ". audit core correction graph lowering",
    "compiler/low_rank": ". bits core graph rounding scales",
    "compiler/gradients": ". bits core graph rounding torch_graph training",
    "compiler/mixing": "bundle correction graph",
    "passes": "",
    "passes/recipes": ".",
    "mezzotint/io": "",
    "mezzotint/pipeline": "io prompts",
    "mezzotint/frechet": "io",
    "mezzotint/text": "",
    "mezzotint/bench": "text",
    "mezzotint/cluster": "io",
    "mezzotint/shards": "cluster io text",
    "mezzotint/prompts": "",
    "mezzotint": "bench cluster io pipeline prompts",
    "mezzotint/debug": "bench cluster text",
    "mezzotint/evaluate": "bench cluster frechet io shards text",
    "mezzotint/mix": "bench cluster io shards",
    "mezzotint/sweep": "bench cluster shards text",
    "mezzotint/inspect": "bench debug io text",
    "mezzotint/interchange": "bench debug io",
    "mezzotint/web": "bench inspect io",
    "mezzotint/cli": ". bench debug evaluate inspect interchange io mix pipeline prompts shards sweep text web",
}

# Top folder -> the libraries that every file of it may import, beside the standard library.
LIBRARIES = {
    "runtime": {"numpy", "safetensors"},
    "compiler": {"numpy", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes"},
    "passes": {"numpy", "onnx_ir"},
}

# File -> the libraries that it may import beside those of its folder.
DOORS: dict[str, set[str]] = {
    "runtime/session.py": {"onnxruntime"},
    "runtime/providers/openvino.py": {"openvino"},
    "runtime/sampling/flow_sigmas.py": {"scipy"},
    "runtime/diffusers/autoencoder.py": {"torch", "diffusers"},
    "runtime/diffusers/compiled_module.py": {"torch"},
    "runtime/diffusers/controlnet.py": {"torch", "diffusers"},
    "runtime/diffusers/text_encoder.py": {"torch", "transformers"},
    "runtime/diffusers/unet.py": {"torch", "diffusers"},
    "runtime/diffusers/network_arguments.py": {"torch"},
    "runtime/diffusers/network_classes.py": {"torch"},
    "runtime/diffusers/network_time.py": {"torch"},
    "runtime/diffusers/scheduler.py": {"torch", "diffusers"},
    "compiler/audit/openvino_built.py": {"openvino"},
    "compiler/components/compile.py": {"torch"},
    "compiler/components/export.py": {"torch"},
    "compiler/components/recording.py": {"torch", "diffusers"},
    "compiler/frontend/from_torch.py": {"torch", "diffusers"},
    "compiler/frontend/lora.py": {"torch", "diffusers"},
    "compiler/frontend/module_weights.py": {"torch"},
    "compiler/frontend/single_file.py": {"torch"},
    "compiler/frontend/torch_example.py": {"torch"},
    "compiler/frontend/torch_export.py": {"torch"},
    "compiler/frontend/architectures/audio.py": {"diffusers"},
    "compiler/frontend/architectures/cogvideox.py": {"diffusers"},
    "compiler/frontend/architectures/flux.py": {"torch"},
    "compiler/frontend/architectures/hunyuan_dit.py": {"diffusers"},
    "compiler/frontend/architectures/lumina2.py": {"torch"},
    "compiler/frontend/architectures/patches.py": {"torch"},
    "compiler/frontend/architectures/qwen_image.py": {"diffusers", "torch"},
    "compiler/frontend/architectures/row.py": {"torch"},
    "compiler/frontend/architectures/rotary.py": {"torch"},
    "compiler/frontend/architectures/unet_video.py": {"torch"},
    "compiler/frontend/architectures/z_image.py": {"torch"},
    "compiler/graph/topology.py": {"networkx"},
    "compiler/graph/blocks.py": {"networkx"},
    "compiler/graph/residuals.py": {"networkx"},
    "compiler/pruning/blocked.py": {"scipy"},
    "compiler/pruning/channel_order.py": {"scipy"},
    "compiler/pruning/restoration.py": {"scipy"},
    "compiler/low_rank/residual.py": {"scipy"},
    "compiler/rounding/downdated.py": {"scipy"},
    "compiler/rounding/exact.py": {"scipy"},
    "compiler/rounding/gram.py": {"scipy"},
    "compiler/rounding/matrix.py": {"scipy"},
    "compiler/bits/allocation.py": {"scipy"},
    "compiler/bits/configurations.py": {"scipy"},
    "compiler/correction/noise_report.py": {"scipy"},
    "compiler/correction/noise_plot.py": {"matplotlib"},
    "compiler/core/blas_threads.py": {"scipy", "threadpoolctl"},
    "compiler/core/memory.py": {"psutil"},
    "compiler/gradients/block_fisher.py": {"torch"},
    "compiler/gradients/probed_network.py": {"torch"},
    "compiler/gradients/relevance_rules.py": {"torch"},
    "compiler/gradients/stage_curvature.py": {"torch"},
    "compiler/gradients/traces.py": {"torch"},
    "compiler/torch_graph/constants.py": {"torch"},
    "compiler/torch_graph/convert.py": {"torch"},
    "compiler/torch_graph/dtypes.py": {"torch"},
    "compiler/torch_graph/operations_elementwise.py": {"torch"},
    "compiler/torch_graph/operations_linear.py": {"torch"},
    "compiler/torch_graph/operations_normalization.py": {"torch"},
    "compiler/torch_graph/operations_resize.py": {"torch"},
    "compiler/torch_graph/operations_shapes.py": {"torch"},
    "compiler/torch_graph/pairs.py": {"torch"},
    "compiler/torch_graph/parity.py": {"torch"},
    "compiler/torch_graph/quantizers.py": {"torch"},
    "compiler/torch_graph/soft_rounding.py": {"torch"},
    "compiler/torch_graph/values.py": {"torch"},
    "compiler/training/distillation.py": {"torch"},
    "compiler/training/fisher_loss.py": {"torch"},
    "compiler/training/fit_network.py": {"torch"},
    "compiler/training/movements.py": {"torch"},
    "compiler/training/network_loss.py": {"torch"},
    "compiler/training/nested_widths.py": {"torch"},
    "compiler/training/network_state.py": {"torch", "safetensors"},
    "compiler/training/moving_weights.py": {"torch"},
    "compiler/training/trajectories.py": {"torch"},
    "compiler/training/fit_rounding.py": {"torch"},
    "compiler/training/unit_batches.py": {"torch"},
    "compiler/training/rounding_of_unit.py": {"torch"},
    "compiler/training/fit_scales.py": {"torch"},
    "compiler/training/fading_branches.py": {"torch"},
    "compiler/training/learned_levels.py": {"torch"},
    "compiler/training/learned_scales.py": {"torch"},
    "compiler/training/range_networks.py": {"torch"},
    "compiler/training/restraints.py": {"torch"},
    "compiler/training/steady_scales.py": {"torch"},
    "compiler/training/steady_weights.py": {"torch"},
    "compiler/training/torch_device.py": {"torch"},
    "compiler/torch_graph/write_back.py": {"torch"},
    "compiler/stages.py": {"psutil"},
    "compiler/bundle/card.py": {"yaml"},
    "compiler/yaml_text.py": {"yaml"},
    "passes/recipes/files.py": {"pydantic", "yaml"},
}


def violations(root: Path) -> list[str]:
    """Every import that the tables forbid, as `file:line: what is wrong`."""
    found = []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        for item in imports(root, path):
            problem = _problem(name, item)
            if problem:
                found.append(f"{name}:{item.line}: {problem}")
    return found


def _problem(name: str, item: Import) -> str | None:
    top = name.partition("/")[0]
    if item.library in LINKED:
        return f"`{item.module}` is no import name; it is mezzotint.{item.module}"
    if top in {"tests", "tools"}:
        return "tests and tools import by absolute names" if item.relative else None
    if item.top is not None:
        return _folder_problem(name, top, item.top, item)
    if top == "mezzotint":
        return f"mezzotint/ imports {item.library} lazily only" if item.library in HEAVY and not item.lazy else None
    allowed = LIBRARIES[top] | DOORS.get(name, set())
    if item.library in allowed or item.library in sys.stdlib_module_names - NEWER:
        return None
    doors = sorted(file for file, libraries in DOORS.items() if item.library in libraries and file.startswith(top))
    return f"{top}/ does not import {item.library}" + (f", except {', '.join(doors)}" if doors else "")


def _folder_problem(name: str, top: str, target: str, item: Import) -> str | None:
    if target not in BELOW[top]:
        return f"{top}/ does not import {target}/"
    if item.relative != (target == top):
        return f"imports inside {top}/ are relative" if target == top else f"imports of {target}/ are absolute"
    if target == top == "passes" and not name.startswith("passes/recipes/"):
        return "a pass does not import another pass (passes/recipes/ does)"
    return None


def wrong_arrows(root: Path, table: dict[str, str]) -> list[str]:
    """Arrows between rooms of one top folder that the table lacks, or that it has and the code lacks."""
    found = []
    allowed = {room: {_full_name(room, name) for name in names.split()} for room, names in table.items()}
    for room, targets in arrows(root).items():
        inner = {target for target in targets if target.partition("/")[0] == room.partition("/")[0]}
        if room not in allowed:
            found.append(f"{room}: a new room; give it a line in ARROWS")
            continue
        found += [f"{room} -> {target}: not in ARROWS" for target in sorted(inner - allowed[room])]
        found += [f"{room} -> {target}: in ARROWS, but no file imports it" for target in sorted(allowed[room] - inner)]
    return found + [f"{room}: in ARROWS, but there is no such room" for room in sorted(allowed.keys() - arrows(root))]


def _full_name(room: str, name: str) -> str:
    top = room.partition("/")[0]
    return top if name == "." else f"{top}/{name}"


def long_files(root: Path) -> list[str]:
    """Files outside tests/ that are longer than the project allows, as `file: lines`."""
    sizes = {path.relative_to(root): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)}
    return [f"{n.as_posix()}: {lines}" for n, lines in sizes.items() if lines > LONGEST and n.parts[0] != "tests"]


def loaded_after(statement: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after a statement."""
    code = f"{statement}\nimport sys; print(*sorted(name for name in sys.modules if '.' not in name))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_every_import_is_allowed() -> None:
    assert violations(ROOT) == []


def test_rooms_have_exactly_the_arrows_of_the_table() -> None:
    assert wrong_arrows(ROOT, ARROWS) == []


def test_rooms_and_files_form_no_ring() -> None:
    assert rings(arrows(ROOT)) == []
    assert rings(file_arrows(ROOT)) == []


def test_files_are_short() -> None:
    assert long_files(ROOT) == []


def test_the_checker_reads_every_file() -> None:
    """Guards against a checker that passes because it found nothing to read."""
    read = {path.relative_to(ROOT).as_posix() for path in sources(ROOT)}
    some = {"runtime/errors.py", "compiler/core/program.py", "mezzotint/cli/app.py", "tools/rooms.py"}
    assert some | {"tests/test_architecture.py"} <= read
    assert not any(name.startswith(tuple(f"mezzotint/{top}/" for top in LINKED)) for name in read)
    assert DOORS.keys() <= read


@pytest.mark.parametrize(
    ("statement", "never"),
    [
        ("import mezzotint", HEAVY | {"numpy", "rich", "typer"}),
        ("import mezzotint.cli.app", HEAVY),
        ("import mezzotint.runtime.bundle.bundle", TORCH | {"onnx", "onnx_ir", "onnxscript", "networkx"}),
        ("import mezzotint.passes.recipes.catalog", TORCH),
        ("import mezzotint.diffusers", TORCH),
    ],
)
def test_importing_loads_no_more_than_it_needs(statement: str, never: Sequence[str]) -> None:
    assert loaded_after(statement) & set(never) == set()


def test_the_probe_for_loaded_modules_sees_them() -> None:
    assert {"safetensors", "numpy"} <= loaded_after("import safetensors.numpy")


CLEAN = {
    "runtime/__init__.py": "",
    "runtime/tables.py": "import json\nimport numpy as np\nfrom safetensors.numpy import load_file",
    "runtime/session.py": "import onnxruntime as ort\nfrom . import tables",
    "runtime/diffusers/__init__.py": '"""Stand-ins."""',
    "runtime/diffusers/unet.py": "import torch\nfrom diffusers import ModelMixin\nfrom .. import tables",
    "compiler/__init__.py": "",
    "compiler/graph/__init__.py": '"""Graphs."""',
    "compiler/graph/nodes.py": "import onnx_ir as ir\nfrom mezzotint.runtime.tables import nearest",
    "compiler/graph/topology.py": "import networkx as nx",
    "compiler/frontend/__init__.py": '"""Front ends."""',
    "compiler/frontend/from_torch.py": "def run():\n    import torch.export, diffusers\n"
    "    from ..graph.nodes import model_text",
    "passes/__init__.py": "",
    "passes/normalize.py": "import onnx_ir\nfrom mezzotint.compiler.graph import nodes",
    "passes/recipes/__init__.py": '"""Recipes."""',
    "passes/recipes/catalog.py": "from ..normalize import Normalize",
    "passes/recipes/files.py": "import yaml\nfrom .catalog import RECIPES",
    "mezzotint/__init__.py": "def load():\n    import torch\n    from mezzotint.compiler.graph.nodes import model_text",
    "tests/test_tables.py": "import torch\nfrom mezzotint.runtime import tables",
    "tools/bench.py": "import onnxruntime\nfrom mezzotint.compiler.graph import nodes",
}
CLEAN_ARROWS = {
    "runtime": "",
    "runtime/diffusers": ".",
    "compiler": "",
    "compiler/graph": "",
    "compiler/frontend": "graph",
    "passes": "",
    "passes/recipes": ".",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in {**CLEAN, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


def test_a_clean_tree_has_no_violations(tmp_path: Path) -> None:
    root = plant(tmp_path, {})
    assert (violations(root), rings(arrows(root)), rings(file_arrows(root)), long_files(root)) == ([], [], [], [])
    assert wrong_arrows(root, CLEAN_ARROWS) == []


NODES, NORMALIZE, TABLES = "compiler/graph/nodes.py", "passes/normalize.py", "runtime/tables.py"


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        (TABLES, "import torch", "runtime/ does not import torch, except runtime/diffusers/autoencoder.py"),
        ("runtime/diffusers/unet.py", "import transformers", "runtime/ does not import transformers, except"),
        (TABLES, "import onnx", "runtime/ does not import onnx"),
        (TABLES, "import onnxruntime", "runtime/ does not import onnxruntime, except runtime/session.py"),
        (TABLES, "from mezzotint.compiler.graph import nodes", "runtime/ does not import compiler/"),
        (TABLES, "from mezzotint.passes.normalize import Normalize", "runtime/ does not import passes/"),
        (TABLES, "from mezzotint import open_bundle", "runtime/ does not import mezzotint/"),
        (TABLES, "from mezzotint.runtime import session", "imports inside runtime/ are relative"),
        (NODES, "import torch.fx", "compiler/ does not import torch, except compiler/components/compile.py"),
        (NODES, "from diffusers import UNet2DModel", "compiler/ does not import diffusers"),
        (NODES, "import networkx", "compiler/ does not import networkx, except compiler/graph/blocks.py"),
        ("compiler/graph/topology.py", "import torch", "compiler/ does not import torch"),
        (NODES, "import onnxruntime", "compiler/ does not import onnxruntime"),
        (NODES, "from mezzotint.passes import normalize", "compiler/ does not import passes/"),
        (NODES, "from mezzotint.cli import app", "compiler/ does not import mezzotint/"),
        (NODES, "import mezzotint", "compiler/ does not import mezzotint/"),
        (NODES, "from ...runtime import tables", "imports of runtime/ are absolute"),
        (NODES, "from mezzotint.compiler.graph import topology", "imports inside compiler/ are relative"),
        (NODES, "import runtime.tables", "is no import name; it is mezzotint.runtime.tables"),
        (NODES, "import importlib; importlib.import_module('torch')", "compiler/ does not import torch"),
        (NODES, "import_module('...passes.normalize', __package__)", "compiler/ does not import passes/"),
        (NODES, "__import__('onnxruntime')", "compiler/ does not import onnxruntime"),
        (NODES, "import tomllib", "compiler/ does not import tomllib"),
        (NODES, "import scipy.stats", "compiler/ does not import scipy, except compiler/bits/allocation.py"),
        (NORMALIZE, "import onnxruntime", "passes/ does not import onnxruntime"),
        (NORMALIZE, "import diffusers", "passes/ does not import diffusers"),
        (NORMALIZE, "import networkx", "passes/ does not import networkx"),
        (NORMALIZE, "from .recipes.catalog import RECIPES", "a pass does not import another pass"),
        (NORMALIZE, "from . import recipes", "a pass does not import another pass"),
        (NORMALIZE, "import yaml", "passes/ does not import yaml, except passes/recipes/files.py"),
        (NORMALIZE, "from torch import fx, nn", "passes/ does not import torch"),
        ("passes/recipes/catalog.py", "import torch", "passes/ does not import torch"),
        (NORMALIZE, "from mezzotint.cli.app import app", "passes/ does not import mezzotint/"),
        ("mezzotint/__init__.py", "import torch", "mezzotint/ imports torch lazily only"),
        (
            "mezzotint/__init__.py",
            "from onnxruntime import InferenceSession",
            "mezzotint/ imports onnxruntime lazily only",
        ),
        ("mezzotint/__init__.py", "from .runtime import tables", "imports of runtime/ are absolute"),
        ("tests/test_tables.py", "from compiler import graph", "is no import name; it is mezzotint.compiler"),
        ("tests/test_tables.py", "from .helpers import near", "tests and tools import by absolute names"),
        ("tools/bench.py", "import passes.normalize", "is no import name; it is mezzotint.passes.normalize"),
    ],
)
def test_a_planted_import_is_reported(tmp_path: Path, name: str, line: str, problem: str) -> None:
    found = violations(plant(tmp_path, {name: f"{CLEAN[name]}\n{line}"}))
    assert len(found) == 1, found
    assert found[0].startswith(f"{name}:{CLEAN[name].count(chr(10)) + 2}: ")
    assert problem in found[0]


@pytest.mark.parametrize(
    "body",
    [
        "def f():\n    import torch",
        "class A:\n    def f(self):\n        if self:\n            from torch import fx",
        "if TYPE_CHECKING:\n    import torch",
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
        "async def f():\n    import torch",
    ],
)
def test_a_hidden_import_is_reported(tmp_path: Path, body: str) -> None:
    found = violations(plant(tmp_path, {TABLES: body}))
    assert len(found) == 1 and "runtime/ does not import torch" in found[0], found


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        (NODES, "from ..frontend import from_torch", "compiler/graph -> compiler/frontend: not in ARROWS"),
        (
            "compiler/frontend/from_torch.py",
            "",
            "compiler/frontend -> compiler/graph: in ARROWS, but no file imports it",
        ),
        ("compiler/bits/__init__.py", "", "compiler/bits: a new room; give it a line in ARROWS"),
    ],
)
def test_a_planted_arrow_is_reported(tmp_path: Path, name: str, line: str, problem: str) -> None:
    assert wrong_arrows(plant(tmp_path, {name: line}), CLEAN_ARROWS) == [problem]


@pytest.mark.parametrize("lazily", ["from .nodes import model_text", "def f():\n    from . import nodes"])
def test_a_planted_ring_of_files_is_reported(tmp_path: Path, lazily: str) -> None:
    files = {NODES: "from .ops import traits", "compiler/graph/ops.py": lazily}
    ring = "compiler/graph/nodes.py -> compiler/graph/ops.py -> compiler/graph/nodes.py"
    assert rings(file_arrows(plant(tmp_path, files))) == [ring]


def test_a_planted_ring_of_rooms_is_reported(tmp_path: Path) -> None:
    """Two rooms may import each other through different files, without a ring of files."""
    root = plant(tmp_path, {"compiler/graph/late.py": "from ..frontend import from_torch"})
    assert rings(file_arrows(root)) == []
    assert rings(arrows(root)) == ["compiler/frontend -> compiler/graph -> compiler/frontend"]


def test_floors_are_the_longest_way_down(tmp_path: Path) -> None:
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}) == [["c", "d"], ["b"], ["a"]]


def test_a_planted_long_file_is_reported(tmp_path: Path) -> None:
    many = "\n".join(["a = 1"] * LONGEST)
    files = {NORMALIZE: many, "tools/bench.py": many + "\na = 1", "tests/test_tables.py": many * 2}
    assert long_files(plant(tmp_path, files)) == ["tools/bench.py: 321"]


def test_syntax_newer_than_python_3_10_is_refused(tmp_path: Path) -> None:
    root = plant(tmp_path, {TABLES: "try:\n    pass\nexcept* ValueError:\n    pass"})
    with pytest.raises(SyntaxError):
        violations(root)


def test_the_drawing_is_what_the_code_says() -> None:
    assert (ROOT / DRAWING).read_text(encoding="utf-8") == draw(ROOT), "run: python tools/rooms.py --draw"


def test_a_drawing_has_every_room_and_the_shortest_arrows(tmp_path: Path) -> None:
    root = plant(tmp_path, {"compiler/frontend/from_onnx.py": "from ..graph import nodes\nfrom .. import errors"})
    (root / "compiler/errors.py").write_text("", encoding="utf-8")
    (root / "compiler/graph/ops.py").write_text("from .. import errors", encoding="utf-8")

    drawing = draw(root)

    assert re.findall(r'class="name"[^>]*>([^<]+)<', drawing) == [
        *("recipes", "passes/*.py", "frontend", "graph", "compiler/*.py", "diffusers", "runtime/*.py")
    ]
    assert "<title>compiler/frontend: Front ends.</title>" in drawing
    assert ">2 files<" in drawing and ">1 file<" in drawing
    titles = re.findall(r"<title>(\S+ imports \S+)</title>", drawing)
    assert "compiler/frontend imports compiler/graph" in titles and "compiler/graph imports compiler" in titles
    assert "compiler/frontend imports compiler" not in titles  # by way of compiler/graph


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("passes/other.py", ""),
        ("compiler/graph/__init__.py", '"""Another purpose."""'),
        ("passes/recipes/catalog.py", "from mezzotint.runtime.diffusers import unet"),
        ("compiler/scales/__init__.py", '"""A new room."""'),
    ],
)
def test_a_drawing_that_the_code_left_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    root = plant(tmp_path, {})
    assert main(["--check"], root) == 1
    assert main(["--draw"], root) == 0
    assert main(["--check"], root) == 0
    capsys.readouterr()
    plant(root, {name: text})

    assert main(["--check"], root) == 1
    assert capsys.readouterr().out == f"differs: {DRAWING}\n"
