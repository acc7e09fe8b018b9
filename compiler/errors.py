"""What can go wrong while compiling (the root of the tree is in runtime/errors.py).

CompileError
|-- ModelError          the source model cannot be read, or holds NaN or infinite weights
|-- SignatureError      the roles of its inputs and outputs cannot be told
|-- ConditionError      calibration data for the model's conditions is missing or does not fit
|-- RecipeError         an unknown pass, a misspelt option, an order that cannot work
|-- PassError           a pass broke something it promised to keep
|   `-- NotExact        an exact pass changed the function
|-- StatsError          statistics that were measured on another graph, or are missing
`-- OutputError         the bundle cannot be written where it should be
"""

from __future__ import annotations

from mezzotint.runtime.errors import MezzotintError


class CompileError(MezzotintError):
    """Something went wrong on the way from a model to a bundle."""


class ModelError(CompileError):
    """The source model is missing, truncated, incomplete, or holds weights that are not finite."""


class SignatureError(CompileError):
    """No input can be recognised as the sample or the timestep, or a named one does not exist."""


class ConditionError(CompileError):
    """A conditional model was given no conditions to calibrate on, or some that do not fit."""


class RecipeError(CompileError):
    """A recipe names an unknown pass, misspells an option, or has an order that cannot work."""


class PassError(CompileError):
    """A pass left an invalid graph behind; the message names the pass, the history and the node."""


class NotExact(PassError):
    """A pass that claims to keep the function changed what the graph computes."""


class StatsError(CompileError):
    """Statistics are missing, or were measured on another graph than the one at hand."""


class OutputError(CompileError):
    """The output folder exists, or cannot be written (permissions, full disk)."""
