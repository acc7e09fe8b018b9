"""An engine by its name: which provider or library computes, and what to install where it is missing.

cpu                  onnxruntime's CPU provider, the default
openvino             OpenVINO itself (openvino.py)
cuda, tensorrt ...   providers of onnxruntime, see KNOWN
NAME                 any other provider that the installed onnxruntime lists, with or without "ExecutionProvider"
plugin:MODULE        a Python package that brings a plugin library for onnxruntime, such as onnxruntime_ep_openvino
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..engine import Engine, EnginePrecision, check_precision
from ..errors import EngineError
from ..session import CPU_ENGINE, CPU_PROVIDER, OnnxRuntime, listed_providers
from .openvino import OPENVINO, OpenVino

SUFFIX = "ExecutionProvider"
PLUGIN = "plugin:"
Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KnownEngine:
    """A name for an engine.

    provider     its name in onnxruntime
    install      the pip package, or the extra
    plugin       the Python module of the plugin, for a provider that comes as one
    precisions   provider options for each precision; "graph" stands for the types of the graph, which None and f32 mean
    """

    provider: str
    install: str
    plugin: str | None = None
    precisions: Mapping[str, Settings] | None = None


KNOWN: dict[str, KnownEngine] = {
    "cuda": KnownEngine(
        f"CUDA{SUFFIX}",
        "pip install onnxruntime-gpu (in place of onnxruntime)",
        precisions={"f32": (("use_tf32", "0"),)},
    ),
    "tensorrt": KnownEngine(
        f"Tensorrt{SUFFIX}",
        "pip install onnxruntime-gpu tensorrt (in place of onnxruntime)",
        precisions={
            "f32": (("trt_fp16_enable", "0"), ("trt_bf16_enable", "0")),
            "f16": (("trt_fp16_enable", "1"),),
            "bf16": (("trt_bf16_enable", "1"),),
        },
    ),
    "nv_tensorrt_rtx": KnownEngine(
        f"NvTensorRTRTX{SUFFIX}", "pip install onnxruntime-ep-nv-tensorrt-rtx", plugin="onnxruntime_ep_nv_tensorrt_rtx"
    ),
    "webgpu": KnownEngine(f"WebGpu{SUFFIX}", "pip install onnxruntime-ep-webgpu", plugin="onnxruntime_ep_webgpu"),
    "qnn": KnownEngine(f"QNN{SUFFIX}", "pip install onnxruntime-qnn", plugin="onnxruntime_qnn"),
    "migraphx": KnownEngine(f"MIGraphX{SUFFIX}", "pip install onnxruntime-migraphx (in place of onnxruntime)"),
    "directml": KnownEngine(f"Dml{SUFFIX}", "pip install onnxruntime-directml (in place of onnxruntime)"),
    "coreml": KnownEngine(f"CoreML{SUFFIX}", "pip install onnxruntime, on a Mac"),
}
CPU_NAME = CPU_ENGINE.name


def find_engine(
    name: str = CPU_NAME,
    options: Mapping[str, str] | None = None,
    precision: EnginePrecision | None = None,
) -> Engine:
    """Return an engine by its name, as it is asked to compute. It is opened with the first network.

    `options` are for the engine, by its own names. `precision` is that of the operations that the graph has in float.
    Raises EngineError for an unknown name, an option that is set twice, and a precision that the engine cannot choose;
    for an engine that is not installed, with what to install.
    """
    check_precision(precision)
    pairs = tuple(sorted((options or {}).items()))
    if name == OPENVINO:
        return OpenVino(name, pairs, precision)
    if name == CPU_NAME:
        if pairs:
            raise EngineError(f"the CPU provider has no option {pairs[0][0]!r}", hint="leave the options out")
        known: KnownEngine | None = KnownEngine(CPU_PROVIDER, "")
    else:
        known = _plugin(name) if name.startswith(PLUGIN) else KNOWN.get(name) or _listed(name)
    if known is None:
        names = ", ".join([CPU_NAME, OPENVINO, *KNOWN])
        more = ", ".join(listed_providers())
        raise EngineError(
            f"no engine is called {name!r}",
            hint=f"use one of {names}; a provider of this onnxruntime ({more}); or {PLUGIN}MODULE for a plugin",
        )
    settings = _settings(name, known, precision)
    if twice := sorted(dict(settings).keys() & dict(pairs).keys()):
        raise EngineError(f"{twice[0]} is set by an option and by the precision", hint="leave one of them out")
    library = None
    if known.provider not in listed_providers():  # what onnxruntime was built with needs no plugin
        library = None if known.plugin is None else plugin_library(name, known)
    install = f"install it: {known.install}" if known.install else None
    return OnnxRuntime(name, pairs, precision, known.provider, library, settings, install)


def plugin_library(name: str, known: KnownEngine) -> str:
    """Return the path of a plugin's library. Raises EngineError where the plugin is not installed."""
    module = known.plugin or ""
    if find_spec(module) is None:
        raise EngineError(f"{name} is not installed", hint=f"install it: {known.install}")
    return str(_call(module, "get_library_path"))


def _plugin(name: str) -> KnownEngine:
    """Return the engine of `plugin:MODULE`. Importing the module is what its user asks for."""
    module = name.removeprefix(PLUGIN)
    if not module.isidentifier():
        raise EngineError(f"{module!r} is not the name of a Python module", hint=f"the form is {PLUGIN}MODULE")
    install = f"pip install {module.replace('_', '-')}"
    if find_spec(module) is None:
        raise EngineError(f"the plugin {module} is not installed", hint=f"install it: {install}")
    return KnownEngine(str(_call(module, "get_ep_name")), install, plugin=module)


def _call(module: str, function: str) -> Any:
    """Return the result of one of the functions that plugin packages have by convention. Raises EngineError."""
    try:
        return getattr(import_module(module), function)()
    except Exception as error:  # code of other projects
        raise EngineError(
            f"{module} is no plugin of onnxruntime, or it is broken: {type(error).__name__}: {error}",
            hint=f"a plugin has {function}()",
        ) from error


def _listed(name: str) -> KnownEngine | None:
    """Return the provider that the installed onnxruntime lists by this name."""
    wanted = name.lower().removesuffix(SUFFIX.lower())
    for provider in listed_providers():
        if provider.lower() == f"{wanted}{SUFFIX.lower()}":
            return KnownEngine(provider, "")
    return None


def _settings(name: str, known: KnownEngine, precision: EnginePrecision | None) -> Settings:
    """Return the provider options of a precision. Raises EngineError where the provider cannot choose it."""
    precisions = known.precisions or {"f32": ()}
    if (precision or "f32") in precisions:
        return precisions[precision or "f32"]
    raise EngineError(
        f"{name} cannot compute in {precision}: it computes in the types of the graph",
        hint=f"leave --precision out, or choose {', '.join(precisions)}",
    )
