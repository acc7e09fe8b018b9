"""The errors of the compiler (the root of the tree is in runtime/errors.py).

CompileError
|-- ModelError          the source model cannot be read, or holds NaN or infinite weights
|-- SignatureError      the roles of its inputs and outputs cannot be inferred
|-- ConditionError      calibration data for the model's conditions is missing or does not fit
|-- RecipeError         an unknown pass, a misspelt option, an order that cannot work
|-- PassError           a pass left an invalid graph, or relied on a fact that does not hold
|   `-- NotExact        an exact pass changed the function
|-- StatsError          statistics are missing, or were measured on another graph
|-- AcceptanceError     the finished file does not run, is not finite, or is below --min-sqnr under --strict
`-- OutputError         the output folder cannot be written
"""

from __future__ import annotations

from mezzotint.runtime.errors import MezzotintError


class CompileError(MezzotintError):
    """The compilation of a model into a bundle failed."""


class ModelError(CompileError):
    """The source model is missing, truncated, incomplete, or holds weights that are not finite."""


class SignatureError(CompileError):
    """The sample or the timestep cannot be recognised among the inputs, or a named input does not exist."""


class ConditionError(CompileError):
    """A conditional model has no conditions to calibrate on, or conditions that do not fit its inputs."""


class RecipeError(CompileError):
    """A recipe names an unknown pass, misspells an option, or has an order that cannot work."""


class PassError(CompileError):
    """A pass left an invalid graph, or relied on a fact that does not hold. It names pass, history and node."""


class NotExact(PassError):
    """An exact pass changed the function that the graph computes."""


class StatsError(CompileError):
    """Statistics are missing, or were measured on another graph."""


class AcceptanceError(CompileError):
    """The finished file does not run, gives values that are not finite, or is less accurate than was asked for."""


class OutputError(CompileError):
    """The output folder exists, or cannot be written (permissions, full disk)."""
