"""What travels to the workers of a cluster: bundles, the ControlNets that compute their conditions, and ONNX files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mezzotint.runtime.bundle.bundle import Bundle, open_bundle
from mezzotint.runtime.bundle.controlnet import files_of_controlnet, open_controlnet
from mezzotint.runtime.bundle.file_checks import read_manifest
from mezzotint.runtime.bundle.layout import MANIFEST
from mezzotint.runtime.engine import Engine
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.condition_network import ConditionNetwork, Conditions

from ..cluster.driver import Cluster
from ..cluster.placement import CarriedFolder, Fetch, placed_folder
from ..cluster.spread import folder_digest


@dataclass(frozen=True, eq=False)
class CarriedControlNet:
    """A ControlNet for workers: its folder, what multiplies its residuals, and the rows that it has of its own."""

    folder: CarriedFolder
    names: tuple[str, ...]
    scale: float
    rows: Conditions

    @classmethod
    def of(cls, network: ConditionNetwork, cluster: Cluster) -> CarriedControlNet:
        """Return the ControlNet for the workers of a cluster. Raises InputError for a network of no folder."""
        opened = network.opened_from
        if opened is None:
            raise InputError(
                "the conditions of this bundle are computed by a function of this process, which cannot travel",
                where="--cluster",
                hint="give the ControlNet that `open_controlnet` returns, or leave --cluster out",
            )
        names = tuple(file.name for file in files_of_controlnet(opened.folder))
        carried = cluster.carried(opened.folder, names, folder_digest(opened.folder, names))
        return cls(carried, names, opened.scale, network.rows)

    def open(self, fetch: Fetch, threads: int) -> ConditionNetwork:
        """Return the network on this machine."""
        folder = placed_folder(self.folder, lambda place: folder_digest(place, self.names), fetch)
        return open_controlnet(folder, rows=self.rows, scale=self.scale, threads=threads)


@dataclass(frozen=True)
class CarriedBundle:
    """A bundle for workers: its folder, the engine that it runs on, and the ControlNet of its conditions, if any."""

    folder: CarriedFolder
    engine: Engine
    conditions: CarriedControlNet | None = None

    @classmethod
    def of(cls, bundle: Bundle, cluster: Cluster) -> CarriedBundle:
        """Return the bundle for the workers of a cluster. Raises InputError for one that cannot travel."""
        computing = bundle.condition_network
        conditions = None if computing is None else CarriedControlNet.of(computing, cluster)
        names = [*bundle.manifest.files, MANIFEST]
        return cls(cluster.carried(bundle.path, names, bundle.manifest.digest), bundle.engine, conditions)

    def open(self, fetch: Fetch, threads: int) -> Bundle:
        """Return the bundle on this machine. Every file is hashed: the driver has checked those of this digest.

        `threads` are those of the ControlNet.
        """
        folder = placed_folder(self.folder, lambda place: read_manifest(place / MANIFEST).digest, fetch)
        bundle = open_bundle(folder).on(self.engine)
        return bundle if self.conditions is None else bundle.fed_by(self.conditions.open(fetch, threads))


@dataclass(frozen=True)
class CarriedNetwork:
    """An ONNX file for workers, with the weights in `<name>.data` beside it if there are any."""

    folder: CarriedFolder
    names: tuple[str, ...]

    @classmethod
    def of(cls, cluster: Cluster, file: Path) -> CarriedNetwork:
        """Return a file for the workers of a cluster."""
        folder = file.absolute().parent
        names = tuple(name for name in (file.name, f"{file.name}.data") if (folder / name).is_file())
        return cls(cluster.carried(folder, names, folder_digest(folder, names)), names)

    def place(self, fetch: Fetch) -> Path:
        """Return the file on this machine."""
        folder = placed_folder(self.folder, lambda place: folder_digest(place, self.names), fetch)
        return folder / self.names[0]
