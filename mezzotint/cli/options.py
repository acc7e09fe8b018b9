"""What every command shares: options that several commands have, and how errors and warnings are printed."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mezzotint.runtime import bounds
from mezzotint.runtime.errors import MezzotintWarning
from mezzotint.runtime.visible import one_line

from .boundary import DEBUG, as_error, wants_traceback
from .ending import ended_by_signals, give_up, output_arrives

LONGEST_USAGE = 500  # characters of a message about the command line

# Spelled out, because --help must not load numpy; a test compares them with runtime/sampling/deployment.py.
SAMPLER_NAMES = "ddim, ddpm, euler, euler-ancestral, heun, dpmpp-2m, dpmpp-2m-sde, pndm, lcm, flow-euler, unipc"


def number(most: int, help: str, *names: str, least: int = 1) -> Any:
    """Return an option that is a number from `least` to `most`."""
    return typer.Option(*names, min=least, max=most, help=help)


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress. --json implies it.")]
Threads = Annotated[
    int | None, number(bounds.MOST_THREADS, "Threads of the engine; OMP_NUM_THREADS, or its own choice, when left out.")
]
Provider = Annotated[
    str, typer.Option("--provider", help="The engine: cpu, openvino, cuda, ...; `mezzotint doctor` lists them.")
]
ProviderOptions = Annotated[
    list[str] | None, typer.Option("--provider-option", help="KEY=VALUE for the engine; may be repeated.")
]
PrecisionOfFloats = Annotated[
    str | None, typer.Option("--precision", help="Of what the graph has in float, where the engine can choose: f32.")
]
ClusterName = Annotated[
    str | None,
    typer.Option("--cluster", help="Workers of Ray: local, local:WORKERS, or the address of a cluster that runs."),
]
All = Annotated[bool, typer.Option("--all", help="Print every row of every table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
ModelArgument = Annotated[
    str, typer.Argument(help="`digits`, `digits-dit`, a diffusers folder, an .onnx or a .safetensors file.")
]
InputRoles = Annotated[list[str] | None, typer.Option("--input", help="ONNX: sample=NAME or timestep=NAME.")]
PredictionName = Annotated[
    str | None, typer.Option(help="ONNX: epsilon, v_prediction, sample, flow_prediction, reversed_flow_prediction.")
]
TimestepUnitName = Annotated[
    str | None, typer.Option(help="ONNX: the timestep counts steps, fraction (0 to 1) or reversed_fraction.")
]
ImageChannels = Annotated[
    int | None, number(bounds.MOST_SIDE, "ONNX: channels of the image, if it has others.", "--channels")
]
ChannelAxis = Annotated[
    int | None, typer.Option("--channel-axis", help="ONNX: axis of the sample's channels; -1 is the last.")
]
Loras = Annotated[
    list[str] | None, typer.Option("--lora", help="FILE or FILE:WEIGHT, fused into the weights; may be repeated.")
]
Variant = Annotated[str | None, typer.Option(help="Which weights of a folder, as fp16, where it has several.")]
ConfigFolder = Annotated[
    Path | None,
    typer.Option("--config", help="A diffusers folder with the configuration of a .safetensors file."),
]
Reference = Annotated[Path, typer.Option(help="The float .onnx that `mezzotint export` wrote.")]
NoiseSeed = Annotated[
    int | None, number(bounds.LARGEST_SEED, "Seed of the noise; an unused one when left out.", "--seed", least=0)
]
ConditionsFile = Annotated[Path | None, typer.Option(help=".npz with the model's conditions, or NAME=1,2,3.")]
PromptsFile = Annotated[
    str | None,
    typer.Option("--prompts", help="Text file of prompts, or `default`: the pipeline's encoders make the conditions."),
]
NegativePrompt = Annotated[
    str | None, typer.Option("--negative", help="The prompt that guidance leads away from; empty when left out.")
]
UnconditionalFile = Annotated[Path | None, typer.Option(help="The same of the empty prompt, for guidance.")]


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings of Mezzotint as one line, without the place in the code that Python adds."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, MezzotintWarning):
            usual(message, category, *where, **more)
            return
        from ..text.console import print_warning

        print_warning(str(message))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


class CommandGroup(TyperGroup):
    """The commands. Every exception is printed as one message (exit code 2); `--debug` adds the traceback."""

    def main(self, args: list[str] | None = None, *rest: Any, **extra: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        try:
            with plain_warnings(), ended_by_signals(), output_arrives():
                return super().main([word for word in words if word != DEBUG], *rest, **extra)
        except Exception as error:
            if wants_traceback(words):
                traceback.print_exc()
            from ..text.console import print_error

            try:
                print_error(as_error(error))
            except OSError:  # standard error is full, too
                give_up(sys.stderr)
            sys.exit(2)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _visible_usage():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _visible_usage():
            return super().invoke(ctx)


@contextmanager
def _visible_usage() -> Iterator[None]:
    """Make the message of a wrong command line visible: it repeats words of the command line."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "message"):
            error.message = one_line(error.message, LONGEST_USAGE)
        raise
