"""Every key of a scheduler configuration: the samplers follow it, it changes nothing here, or it is refused by name.

The names are those of diffusers' schedulers. A key that no table has is refused, because nothing here can know what it
does to the arithmetic. Keys that begin with an underscore are notes of diffusers.
"""

from __future__ import annotations

from typing import Any

from .scheduler_config import ConfigReader

FOLLOWED = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "alphas_cumprod",
        "rescale_betas_zero_snr",
        "prediction_type",
        "clip_sample",
        "clip_sample_range",
        "timestep_spacing",
        "steps_offset",
        "set_alpha_to_one",
        "variance_type",
        "use_karras_sigmas",
        "sigma_min",
        "sigma_max",
        "final_sigmas_type",
        "solver_order",
        "lower_order_final",
        "euler_at_final",
        "lambda_min_clipped",
        "skip_prk_steps",
        "original_inference_steps",
        "timestep_scaling",
        "shift",
        "stochastic_sampling",
        "use_dynamic_shifting",
        "time_shift_type",
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
        "shift_terminal",
        "use_flow_sigmas",
        "flow_shift",
        "disable_corrector",
    }
)
"""Keys that the schedule or a sampler reads (runtime/sampling/schedule.py, solvers*.py)."""

HARMLESS = frozenset(
    {
        # Read only with a key that is refused: thresholding.
        "dynamic_thresholding_ratio",
        "sample_max_value",
        # Solvers that are not here: a sampler of another class does not read them in diffusers either.
        "corrector_order",
        "predictor_order",
        "tau_func",
        "noise_sampler_seed",
        "eta",
    }
)
"""Keys that change nothing for the samplers that are here."""

ONLY: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "invert_sigmas": (False,),
    "snr_shift_scale": (1, 1.0),
    "scale_factors": (None,),
    "upscale_mode": ("bicubic",),
}
"""Keys that change every sampler's arithmetic, with the values that are the usual arithmetic."""

ONLY_BETAS: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
}
"""The same for schedules of betas; those of flow matching follow these keys."""

SAMPLER_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    # key -> the values that the samplers follow, by the beginning of a sampler's name
    "use_exponential_sigmas": {"euler": (False,), "heun": (False,), "dpmpp": (False,), "unipc": (False,)},
    "use_beta_sigmas": {"euler": (False,), "heun": (False,), "dpmpp": (False,), "unipc": (False,)},
    "interpolation_type": {"euler": ("linear",)},
    "timestep_type": {"euler": ("discrete",)},
    "use_lu_lambdas": {"dpmpp": (False,)},
    # A scheduler of diffusers takes its own usual form for that of another class.
    "solver_type": {
        "dpmpp": ("midpoint", "logrho", "bh1", "bh2"),
        "unipc": ("bh2", "bh1", "midpoint", "heun", "logrho"),
    },
    "solver_p": {"unipc": (None,)},
    "predict_x0": {"unipc": (True,)},
    # The name of the sampler says which of the two; a plain DPM-Solver is another method.
    "algorithm_type": {"dpmpp": ("dpmsolver++", "sde-dpmsolver++")},
}
"""Keys that only some samplers read, with the values that these samplers follow."""


def check_keys(read: ConfigReader, *, flow: bool) -> None:
    """Raise ScheduleError for a key that is unknown, or that asks for other arithmetic with every sampler."""
    for key, allowed in (ONLY if flow else {**ONLY, **ONLY_BETAS}).items():
        _check(read, key, allowed, "no sampler here follows it")
    known = FOLLOWED | HARMLESS | ONLY.keys() | SAMPLER_ONLY.keys()
    unknown = [key for key in read.config if key not in known and not str(key).startswith("_")]
    if unknown:
        raise read.refuse(
            f"the key {str(unknown[0])!r} is not known, and it may change the arithmetic",
            "take it out of the configuration if the network was trained and is sampled without it",
        )


def check_sampler_keys(read: ConfigReader, sampler: str) -> None:
    """Raise ScheduleError for a key by which a sampler would compute something else than it does here."""
    for key, by_sampler in SAMPLER_ONLY.items():
        for begin, allowed in by_sampler.items():
            if sampler.startswith(begin):
                _check(read, key, allowed, f"{sampler} does not follow it")


def _check(read: ConfigReader, key: str, allowed: tuple[Any, ...], why: str) -> None:
    value = read.config.get(key)
    if value is not None and not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
    ):
        instead = " or ".join(repr(one) for one in allowed if one is not None)
        hint = f"set {key} to {instead}" if instead else f"remove {key}"
        raise read.refuse(f"{key} {value!r} is not supported: {why}", f"{hint}, if the network was trained so")
