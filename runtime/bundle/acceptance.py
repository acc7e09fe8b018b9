"""What the finished file of a bundle computes beside the float model, as the manifest keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..compare import db_text
from ..signature import Timestep, whole
from .json_fields import Fields


@dataclass(frozen=True)
class GroupFidelity:
    """Network calls `first` to `last`, at the timesteps of the same order: SQNR of the prediction in dB.

    `sqnr_db` is None without any error. `measured` is the number of calls that were compared.
    """

    first: int
    last: int
    timesteps: tuple[Timestep, Timestep]
    measured: int
    sqnr_db: float | None

    def __str__(self) -> str:
        """Return the timesteps for display."""
        first, last = self.timesteps
        return f"timestep {first:g}" if self.first == self.last else f"timesteps {first:g} to {last:g}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "timesteps": list(self.timesteps)}

    @classmethod
    def from_json(cls, fields: Fields) -> GroupFidelity:
        return cls(
            fields.integer("first"),
            fields.integer("last"),
            fields.parsed("timesteps", _pair),
            fields.integer("measured"),
            fields.parsed("sqnr_db", decibels_of),
        )


@dataclass(frozen=True)
class WorstLayer:
    """A layer whose quantization causes `share` of the error at the worst call, the reason, and what helps."""

    layer: str
    share: float
    why: str
    advice: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> WorstLayer:
        return cls(fields.text("layer"), fields.number("share"), fields.text("why"), fields.text("advice"))


@dataclass(frozen=True)
class Acceptance:
    """The run of the finished file in plain onnxruntime beside the float model, on noise that nothing was fitted to.

    `psnr_db` has one value for each image that both models drew from the same noise (None: identical); it is empty
    where no image was drawn, and `note` says why. `warning` is empty, or says what is below `min_sqnr_db`, with the
    worst layers in `layers`. `seconds` are times of this machine, which do not count for the digest: `acceptance`,
    and of one network call of `batch` images, `float_call` and `call`.
    """

    seed: int
    images: int
    groups: tuple[GroupFidelity, ...]
    psnr_db: tuple[float | None, ...]
    min_sqnr_db: float
    note: str = ""
    warning: str = ""
    layers: tuple[WorstLayer, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def worst(self) -> GroupFidelity:
        """Return the group with the lowest SQNR."""
        return min(self.groups, key=lambda group: float("inf") if group.sqnr_db is None else group.sqnr_db)

    def shown(self, measured_in: str = "") -> dict[str, str]:
        """Return the figures by name for display; the speed only where it was measured.

        `measured_in` says where that was, for a file that is made for another engine.
        """
        speed = self.speed_text()
        verdict = f" {measured_in}" if measured_in else ": not faster than float" if self.slower else ""
        return {
            "SQNR of the prediction": self.sqnr_text(),
            f"PSNR of {self.images} image{'s' if self.images > 1 else ''}": self.psnr_text(),
            **({"speed": speed + verdict} if speed else {}),
            **({"measured less": self.note} if self.note else {}),
        }

    def sqnr_text(self) -> str:
        """Return the SQNR of the prediction over all groups, for display."""
        values = [group.sqnr_db for group in self.groups if group.sqnr_db is not None]
        if not values:
            return "no error"
        worst = self.worst()
        return f"{db_text(worst.sqnr_db)} dB at the worst ({worst}), {max(values):.1f} dB at the best"

    def psnr_text(self) -> str:
        """Return the PSNR of the images, for display."""
        if not self.psnr_db:
            return "not measured"
        values = sorted(float("inf") if value is None else value for value in self.psnr_db)
        low, median = values[0], values[(len(values) - 1) // 2]
        texts = ["identical" if value == float("inf") else f"{value:.1f} dB" for value in (median, low)]
        return texts[0] if len(values) == 1 else f"{texts[0]} median, {texts[1]} worst"

    def speed_text(self) -> str:
        """Return the time of a network call beside the float model's; empty where it was not measured."""
        if not {"call", "float_call", "batch"} <= self.seconds.keys():
            return ""
        mine, exact, batch = (self.seconds[key] for key in ("call", "float_call", "batch"))
        return f"{exact / mine:.2f}x the float model's ({mine * 1e3:.2f} ms against {exact * 1e3:.2f}, batch {batch:g})"

    @property
    def slower(self) -> bool:
        """Return whether a call took no less time than one of the float model."""
        return bool(self.speed_text()) and self.seconds["call"] >= self.seconds["float_call"]

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "images": self.images,
            "groups": [group.to_json() for group in self.groups],
            "psnr_db": list(self.psnr_db),
            "min_sqnr_db": self.min_sqnr_db,
            **({"note": self.note} if self.note else {}),
            **({"warning": self.warning} if self.warning else {}),
            **({"layers": [layer.to_json() for layer in self.layers]} if self.layers else {}),
            **({"seconds": dict(self.seconds)} if self.seconds else {}),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Acceptance:
        return cls(
            fields.integer("seed"),
            fields.integer("images"),
            fields.each("groups", GroupFidelity.from_json),
            fields.parsed("psnr_db", lambda values: tuple(decibels_of(value) for value in values)),
            fields.number("min_sqnr_db"),
            fields.maybe("note", fields.text) or "",
            fields.maybe("warning", fields.text) or "",
            fields.maybe("layers", lambda key: fields.each(key, WorstLayer.from_json)) or (),
            fields.maybe("seconds", fields.numbers) or {},
        )


def decibels_of(value: Any) -> float | None:
    """Return decibels from JSON, None for an infinite ratio."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number of decibels")
    return value


def _pair(values: Any) -> tuple[Timestep, Timestep]:
    first, last = whole(values)
    return first, last
