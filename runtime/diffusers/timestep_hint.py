"""What to do where a pipeline calls a timestep that a bundle's tables have no row for, in terms of a pipeline."""

from __future__ import annotations

from ..bundle.bundle import Bundle

_SHOWN = 8  # numbers of steps
_COMPILE = "or compile for the timesteps that the pipeline calls"


def timestep_hint(bundle: Bundle) -> str:
    """Return how a pipeline comes to the timesteps of the deployment: by its number of steps, or by their sigmas."""
    counts, schedule = bundle.deployed_steps(), bundle.schedule
    steps = f"call the pipeline with num_inference_steps={' or '.join(map(str, counts[-_SHOWN:]))}"
    if not schedule.flow:
        spacing = f"timestep_spacing {schedule.timestep_spacing!r} and steps_offset {schedule.steps_offset}"
        return f"{steps}, and a scheduler with {spacing}; {_COMPILE}"
    scheduler = f"the scheduler of the bundle ({bundle.path / 'scheduler'}) and images of its size"
    if not schedule.shift or schedule.config.get("use_dynamic_shifting"):
        return f"{steps}, {scheduler}; {_COMPILE}"
    sigmas = [unshifted(t / schedule.num_train_timesteps, schedule.shift) for t in bundle.deployment.timesteps]
    listed = ", ".join(f"{sigma:.6g}" for sigma in sigmas)
    return f"{steps} and {scheduler}; where the pipeline sets sigmas of its own, give it sigmas=[{listed}]; {_COMPILE}"


def unshifted(sigma: float, shift: float) -> float:
    """Return the sigma that a scheduler shifts to this one: sigma' = shift sigma / (1 + (shift - 1) sigma)."""
    return sigma / (shift - (shift - 1) * sigma)
