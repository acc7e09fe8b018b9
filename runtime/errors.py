"""Every error that Mezzotint raises on purpose, drawn as a tree.

The root and the errors of a bundle's user are here; `compiler/errors.py` adds those of compilation. An error states
what was wrong, where (node, input, file) and what to do.

    MezzotintError
    |-- BundleError              a bundle that is changed or cannot be read
    |-- ScheduleError            an unknown or unfitting scheduler configuration
    |-- InputError               an invalid argument of a denoiser or sampler
    |   |-- EngineError          an engine that is unknown, missing, or cannot run the model
    |   |-- MixedTimesteps       one call has one timestep
    |   `-- TimestepNotDeployed  a timestep outside the frozen table
    `-- CompileError             see compiler/errors.py
"""

from __future__ import annotations


class MezzotintError(Exception):
    """Root of the tree: `what` went wrong, `where`, and a `hint` at the fix."""

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"where: {self.where}")
        if self.hint:
            lines.append(f"what to do: {self.hint}")
        return "\n".join(lines)


class BundleError(MezzotintError):
    """The bundle is missing, incomplete, changed on disk, or written by an unknown version."""


class ScheduleError(MezzotintError):
    """A scheduler configuration is unknown, inconsistent, or of another length than the model's."""


class InputError(MezzotintError):
    """A call has an invalid argument."""


class EngineError(InputError):
    """An engine is unknown, not installed, not usable here, or cannot run the model as it was asked to."""


class MixedTimesteps(InputError):
    """A batch holds more than one timestep; timestep tables have one row for one call."""


class TimestepNotDeployed(InputError):
    """The timestep has no row in the bundle's tables."""


class MezzotintWarning(UserWarning):
    """Root of the warnings: the result is right, and not what the caller may expect."""


class CompileWarning(MezzotintWarning):
    """The model has something that the compiled one does not have, or that had to be assumed."""


class EngineFallback(MezzotintWarning):
    """Some nodes run on the CPU provider, and not on the engine that was asked for."""


class LowFidelity(MezzotintWarning):
    """A compiled file is less accurate than `min_sqnr`."""


class InterpolatedCorrection(MezzotintWarning):
    """The noise tables were fitted for another number of steps, and interpolated between its timesteps."""


class HalfPipeline(MezzotintWarning):
    """A pipeline in half precision uses a bundle, which computes in its own types: the boundary is cast."""
