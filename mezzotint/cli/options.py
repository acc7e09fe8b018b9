"""What all commands share: how errors are answered, and options that several have."""

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

from mezzotint.runtime.errors import InterpolatedCorrection, MezzotintError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of onnxruntime; its own choice when left out.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Reference = Annotated[Path, typer.Option(help="The float .onnx that `mezzotint export` wrote.")]
Noise = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the noise; one that nothing drew from.")]
Conditions = Annotated[Path | None, typer.Option(help=".npz with the model's conditions.")]
Unconditional = Annotated[Path | None, typer.Option(help="The same of the empty prompt, for guidance.")]


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Our own warnings are for whoever typed the command: without the place in the code, which Python would print."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, InterpolatedCorrection):
            usual(message, category, *where, **more)
            return
        from ..text.console import print_warning

        print_warning(str(message))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


class Group(TyperGroup):
    """Prints our errors as answers (exit code 2); `--debug`, anywhere on the line, adds the traceback."""

    def main(self, args: list[str] | None = None, *rest: Any, **extra: Any) -> Any:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given
        try:
            with plain_warnings():
                return super().main([a for a in given if a != "--debug"], *rest, **extra)
        except MezzotintError as error:
            if debug:
                traceback.print_exc()
            from ..text.console import print_error

            print_error(error)
            sys.exit(2)
