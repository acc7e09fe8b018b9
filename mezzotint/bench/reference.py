"""The reference: the float ONNX model that a bundle was compiled from, as a network and as a graph."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from mezzotint.compiler.core.program import Program
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.graph.model_file import check_model_file
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.session import Denoiser


def check_float_model(path: Path) -> None:
    """Raise InputError when there is no such file, ModelError for a file that no session may open."""
    if not path.exists():
        raise InputError(
            "there is no such float model",
            where=str(path),
            hint="write it with `mezzotint export MODEL -o FILE.onnx`, from the model that the bundle was made of",
        )
    check_model_file(path)


class ReferenceModel:
    """The float .onnx file of a bundle. Nothing is read before it is needed, and the network is opened once."""

    def __init__(self, bundle: Bundle, path: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(path)
        self._bundle, self._threads = bundle, threads

    def check(self) -> None:
        """Raise InputError when there is no such file, ModelError for a file that no session may open."""
        check_float_model(self.path)

    @cached_property
    def network(self) -> Denoiser:
        """The session, opened at the first use and kept until `close`."""
        check_float_model(self.path)
        return Denoiser(self.path, self._bundle.signature, threads=self._threads)

    def close(self) -> None:
        """Drop the session: its memory is free once no caller holds the network."""
        self.__dict__.pop("network", None)

    def program(self, folder: Path) -> Program:
        """Import the graph with the bundle's signature, schedule and deployment; `folder` receives the weights.

        Raises ModelError, SignatureError.
        """
        signature = self._bundle.signature
        return import_onnx(
            self.path,
            folder,
            schedule=self._bundle.schedule,
            deployment=self._bundle.deployment,
            inputs={"sample": signature.sample, "timestep": signature.timestep},
            output=signature.output,
            prediction=signature.prediction,
            timestep_unit=signature.timestep_unit,
            channel_axis=signature.channel_axis,
            size=signature.sides(self._bundle.sample_shape),
        )

    def has_weights_of(self, program: Program) -> bool:
        """Return whether an imported program has the weights that the bundle was compiled from."""
        compiled_from = self._bundle.manifest.source.weights_sha256
        return bool(program.source.get("weights_sha256") == compiled_from)
