"""The float model of a leaderboard: where it comes from, its export, its schedule, and what it predicts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from mezzotint.api import compile_model, export_model
from mezzotint.io.settings import load_conditions, parse_size
from mezzotint.io.sources import CONFIG_FILE, FolderSource, ModelSource, OnnxSource, resolve
from mezzotint.runtime.bundle.bundle import Bundle, file_sha256, open_bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import Deployment, usual_sampler
from mezzotint.runtime.sampling.guidance import Conditions, Network, rows_in_turn, with_labels
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Timestep
from mezzotint.shards.run import condition_facts

if TYPE_CHECKING:
    from tools.leaderboard_options import BoardOptions

DIGITS_NAME, DIGITS_SIZE = "digits", (32, 32)


def title_of(model: str) -> str:
    """Return the name of a model on its page: that of its file, or of its folder where the file is a `model.onnx`."""
    path = Path(model)
    stem = path.stem if path.suffix == ".onnx" else path.name
    return path.absolute().parent.name if stem == "model" else stem


class FloatModel:
    """A model that a board is measured on. `folder` gets its float ONNX file and a bundle without quantization.

    `conditions` and `unconditional` are the rows of calibration and of all images; class labels that the model's
    configuration says may be left out.
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        *,
        scheduler: str | None = None,
        size: tuple[int, ...] | None = None,
        sampler: str | None = None,
        steps: int = 20,
        eta: float = 0.0,
        guidance: float = 1.0,
        conditions: Conditions | None = None,
        unconditional: Conditions | None = None,
        threads: int | None = None,
    ) -> None:
        self.source: ModelSource = resolve(model, scheduler)
        self.schedule = self.source.schedule
        self.size = size or (DIGITS_SIZE if model == DIGITS_NAME else None)
        self.deployment = Deployment.of(self.schedule, sampler or usual_sampler(self.schedule), steps, eta, guidance)
        self.conditions, self.unconditional = conditions or {}, unconditional or {}
        self.folder, self.threads = folder, threads
        self.exported = folder / "float.onnx"

    @classmethod
    def of(cls, args: BoardOptions, folder: Path) -> FloatModel:
        """Return the model of a board's options."""
        model = cls(
            args.model,
            folder,
            scheduler=args.scheduler,
            size=parse_size(args.size),
            sampler=args.sampler,
            steps=args.steps,
            eta=args.eta,
            guidance=args.guidance,
            conditions=None if args.conditions is None else load_conditions(args.conditions),
            unconditional=None if args.unconditional is None else load_conditions(args.unconditional),
            threads=args.threads,
        )
        if args.reference is not None and args.reference.exists():
            model.reference = open_bundle(args.reference)
        return model

    @cached_property
    def digest(self) -> str:
        """The hash of the model's files and of its size: another model in the same folder is measured anew."""
        parts = [file_sha256(file) for file in sorted(_files(self.source))]
        return hashlib.sha256(json.dumps([parts, self.size]).encode()).hexdigest()

    @property
    def given(self) -> dict[str, Any]:
        """What identifies the rows of conditions that were given, empty for none."""
        both = {"conditions": self.conditions, "unconditional": self.unconditional}
        return {name: condition_facts(name, arrays) for name, arrays in both.items() if arrays}

    def export(self) -> None:
        """Write the float ONNX file, unless it is there and comes from this model; its configuration beside it."""
        if isinstance(self.source, FolderSource):
            shutil.copyfile(self.source.path / CONFIG_FILE, self.folder / CONFIG_FILE)
        made = self.folder / "float.json"
        if self.exported.exists() and made.exists() and made.read_text(encoding="utf-8") == self.digest:
            return
        made.unlink(missing_ok=True)
        rows = self.conditions or None
        export_model(self.path, self.exported, scheduler=self.schedule, size=self.size, conditions=rows, force=True)
        made.write_text(self.digest, encoding="utf-8")

    @property
    def path(self) -> str:
        """What the export starts from."""
        if isinstance(self.source, (OnnxSource, FolderSource)):
            return str(self.source.path)
        raise InputError("a leaderboard is measured on a file or a folder", where=self.source.name)

    @property
    def compiled(self) -> str:
        """What a compilation starts from: an ONNX file as it came, else the export, which needs no torch."""
        return self.path if isinstance(self.source, OnnxSource) else str(self.exported)

    @cached_property
    def reference(self) -> Bundle:
        """A bundle without quantization: it has the schedule, the deployment and the sizes."""
        plan = self.deployment
        return compile_model(
            self.compiled,
            self.folder / "reference",
            recipe="float",
            scheduler=self.schedule,
            size=self.size,
            sampler=plan.sampler,
            steps=plan.steps,
            eta=plan.eta,
            guidance=plan.guidance,
            conditions=self.conditions,
            unconditional=self.unconditional,
            threads=self.threads,
            force=True,
        )

    def rows(self, first: int, n: int) -> tuple[Conditions, Conditions]:
        """Return conditions and unconditional rows of images first .. first + n - 1."""
        both = with_labels(self.reference.signature, self.deployment, self.conditions, self.unconditional)
        here, without = (rows_in_turn(arrays, first, n) for arrays in both)
        return here, without

    def denoiser(self) -> Denoiser:
        """Return the float network, newly opened."""
        return Denoiser(self.exported, self.reference.signature, threads=self.threads)

    @cached_property
    def exact(self) -> Network:
        """The float network. Every row calls it on the same latents, so it remembers its predictions."""
        net = self.denoiser()
        known: dict[tuple[Timestep, bytes], Images] = {}

        def predict(x: Images, t: Timestep, **conditions: Any) -> Images:
            parts = b"".join(np.ascontiguousarray(part).tobytes() for part in (x, *conditions.values()))
            key = t, hashlib.sha256(parts).digest()
            if key not in known:
                known[key] = net(x, t, **conditions)
            return known[key]

        return predict

    def check_batch(self, batch: int) -> None:
        """Raise InputError for a batch that the graph does not take."""
        fixed = self.denoiser().fixed_batch
        if fixed not in (None, batch):
            raise InputError(f"the graph takes {fixed} images a call, not {batch}", hint=f"give --batch {fixed}")


def corrected(nets: Sequence[Network], correction: Correction) -> list[Network]:
    """Return the network of each call with the correction applied to its prediction, as the sampler does."""

    def of_call(call: int, net: Network) -> Network:
        return lambda x, t, **conditions: correction.apply(net(x, t, **conditions), call)

    return [of_call(call, net) for call, net in enumerate(nets)]


def _files(source: ModelSource) -> Iterator[Path]:
    """Yield the files that the model consists of."""
    if isinstance(source, FolderSource):
        yield from (file for file in source.path.rglob("*") if file.is_file())
    elif isinstance(source, OnnxSource):
        values = ir.load(source.path).graph.initializers.values()
        outside = {str(v.const_value.location) for v in values if isinstance(v.const_value, ir.ExternalTensor)}
        yield from (source.path, *(source.path.parent / name for name in outside))
