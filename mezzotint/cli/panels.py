"""The options of a long command in groups, for its help."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

PANELS = {
    "Output": ("bundle", "components", "dump_passes", "export", "license", "force", "dry_run"),
    "Recipe": ("recipe", "target", "set_"),
    "Deployment": ("scheduler", "sampler", "steps", "eta", "guidance", "timestep_unit"),
    "Calibration": (
        *("calibration_samples", "calibration_batch", "conditions", "unconditional", "seed", "cache"),
        *("prompts", "negative", "control_images"),
        *("size",),
    ),
    "Weights of a diffusers model": ("lora", "variant", "config"),
    "ONNX files": ("input_", "output", "prediction", "channels", "channel_axis"),
    "Acceptance of the finished file": ("min_sqnr", "strict", "acceptance_seconds"),
    "This run": ("threads", "device", "cluster", "quiet", "json", "help"),
}
"""The title of each group, and the parameters of the command in it. Others are in the group `Options`."""


class GroupedCommand(TyperCommand):
    """A command whose help shows its options in the groups of PANELS."""

    def __init__(self, *rest: Any, **extra: Any) -> None:
        super().__init__(*rest, **extra)
        panel_of = {name: panel for panel, names in PANELS.items() for name in names}
        for parameter in self.params:
            if parameter.name in panel_of:
                parameter.rich_help_panel = panel_of[parameter.name]  # type: ignore[attr-defined]
