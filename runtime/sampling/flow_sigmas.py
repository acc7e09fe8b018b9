"""The sigmas of flow matching: their spacing, and the shift that a long sequence gives them.

A schedule with `use_dynamic_shifting` shifts by mu, a line through (`base_image_seq_len`, `base_shift`) and
(`max_image_seq_len`, `max_shift`) at the number of image tokens. The pipelines of diffusers compute mu, and some give
the scheduler other sigmas than its own to shift. What they would pass for a network and its size is kept in the
configuration under three keys of ours, which diffusers ignores:

    _image_tokens   the image tokens of the deployed size
    _even_sigmas    whether the sigmas in front of the shift go from 1 to 1 / steps; else they end at 1 / train
    _shift_by       "length", or "length and steps" for the empirical mu of Flux 2
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import Doubles
from .scheduler_config import ConfigReader

IMAGE_TOKENS, EVEN_SIGMAS, SHIFT_BY = "_image_tokens", "_even_sigmas", "_shift_by"
BY_LENGTH, BY_LENGTH_AND_STEPS = "length", "length and steps"
PASSED = (IMAGE_TOKENS, EVEN_SIGMAS, SHIFT_BY)
"""The keys of ours."""
_LENGTHS: dict[str, Any] = {
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
    IMAGE_TOKENS: None,
    SHIFT_BY: BY_LENGTH,
}
_ONE = 1e-6
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def is_dynamic(read: ConfigReader) -> bool:
    """Return whether the length of a sequence shifts the sigmas."""
    return read.flag("use_dynamic_shifting", False)


def flow_facts(read: ConfigReader) -> list[tuple[str, str]]:
    """Return the options of these sigmas that are not the usual ones, for a digest."""
    keys: dict[str, Any] = {"shift_terminal": None, EVEN_SIGMAS: False, **dict.fromkeys(_SPACINGS[1:], False)}
    if is_dynamic(read):
        keys = {"use_dynamic_shifting": False, **keys, **_LENGTHS}
    return [(key, repr(read.get(key, usual))) for key, usual in keys.items() if read.get(key, usual) != usual]


def flow_sigmas(read: ConfigReader, shift: float, train: int, steps: int) -> npt.NDArray[np.float32]:
    """Return the sigma of each step, falling, float32 `[steps]`. Raises ScheduleError for options that do not fit."""
    sigmas: npt.NDArray[np.floating[Any]]
    if read.flag(EVEN_SIGMAS, False):
        sigmas = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    else:
        # Without a dynamic shift the smallest sigma is shifted here, and again with all others, as diffusers does.
        lowest = np.float32(1 / train)
        if not is_dynamic(read):
            lowest = np.float32(shifted(np.array([lowest], np.float64), shift)[0])
        sigmas = np.linspace(float(train), float(lowest * np.float32(train)), steps) / train
    return _spaced(read, _stretched(read, _moved(read, sigmas, shift, steps)), steps).astype(np.float32)


def unipc_flow_sigmas(read: ConfigReader, shift: float, train: int, steps: int) -> Doubles:
    """Return the sigmas of UniPC with `use_flow_sigmas`, float64 `[steps]`; the first stays below 1."""
    even = read.flag(EVEN_SIGMAS, False)
    sigmas = np.linspace(1.0, 1 / steps, steps) if even else np.linspace(1, 1 / train, steps + 1)[:-1]
    sigmas = _stretched(read, _moved(read, sigmas, shift, steps))
    if abs(sigmas[0] - 1) < _ONE:
        sigmas[0] -= _ONE  # its logarithmic ratio of image and noise must be finite
    return sigmas


def dpm_flow_sigmas(read: ConfigReader, shift: float, train: int, steps: int) -> Doubles:
    """Return the sigmas of DPM-Solver++ with `use_flow_sigmas`, float64 `[steps]`."""
    for key in ("use_dynamic_shifting", "shift_terminal"):
        if read.get(key, False):
            raise read.refuse(f"{key} {read.get(key, None)!r} is not supported by dpmpp-2m", "use unipc or flow-euler")
    found: Doubles = shifted(1 - np.linspace(1, 1 / train, steps + 1), shift)[::-1][:-1].copy()
    return found


def shifted(sigmas: npt.NDArray[Any], shift: float) -> npt.NDArray[Any]:
    """Return shift sigma / (1 + (shift - 1) sigma)."""
    found: npt.NDArray[Any] = shift * sigmas / (1 + (shift - 1) * sigmas)
    return found


def sequence_shift(read: ConfigReader, steps: int) -> float:
    """Return mu, what a pipeline passes to `set_timesteps`. Raises ScheduleError for an unknown number of tokens."""
    if read.get(IMAGE_TOKENS, None) is None:
        raise read.refuse(
            "use_dynamic_shifting shifts by the number of image tokens, which nothing here says",
            "compile a model of a class that docs/models.md lists; for another one set use_dynamic_shifting to false "
            "and shift to exp(mu), with the mu of its pipeline",
        )
    tokens = read.integer(IMAGE_TOKENS, 0, smallest=1)
    if read.choice(SHIFT_BY, BY_LENGTH, (BY_LENGTH, BY_LENGTH_AND_STEPS)) == BY_LENGTH_AND_STEPS:
        return _empirical(tokens, steps)
    short, long = (read.integer(key, _LENGTHS[key], smallest=1) for key in ("base_image_seq_len", "max_image_seq_len"))
    if short == long:
        raise read.refuse(f"base_image_seq_len and max_image_seq_len are both {short}")
    low, high = (float(read.get(key, _LENGTHS[key])) for key in ("base_shift", "max_shift"))
    slope = (high - low) / (long - short)
    return tokens * slope + low - slope * short


def timestep_options(read: ConfigReader, steps: int) -> dict[str, Any]:
    """Return the arguments of a diffusers scheduler's `set_timesteps` by which it takes these steps."""
    even = {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist()} if read.flag(EVEN_SIGMAS, False) else {}
    mu = {"mu": sequence_shift(read, steps)} if is_dynamic(read) else {}
    return {"num_inference_steps": steps, **even, **mu}


def _empirical(tokens: int, steps: int) -> float:
    """Return the mu of Flux 2: a line in the steps between one for 10 and one for 200, and that for 200 if long."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


def _moved(read: ConfigReader, sigmas: npt.NDArray[Any], shift: float, steps: int) -> npt.NDArray[Any]:
    if not is_dynamic(read):
        return shifted(sigmas, shift)
    mu = sequence_shift(read, steps)
    kind = read.choice("time_shift_type", "exponential", ("exponential", "linear"))
    factor = math.exp(mu) if kind == "exponential" else mu
    found: npt.NDArray[Any] = factor / (factor + (1 / sigmas - 1))
    return found


def _stretched(read: ConfigReader, sigmas: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the sigmas stretched so that the last one is `shift_terminal`."""
    if not read.get("shift_terminal", None):
        return sigmas
    terminal = read.number("shift_terminal", 0.0)
    if len(sigmas) < 2 or terminal >= 1:
        raise read.refuse(f"{len(sigmas)} steps cannot end at shift_terminal {terminal:g}", "ask for 2 steps or more")
    images = 1 - sigmas
    found: npt.NDArray[Any] = 1 - images / (images[-1] / (1 - terminal))
    return found


def _spaced(read: ConfigReader, sigmas: npt.NDArray[Any], steps: int) -> npt.NDArray[Any]:
    """Return sigmas between the same ends, spaced as the configuration asks: not at all, Karras', exponential, beta."""
    asked = [key for key in _SPACINGS if read.flag(key, False)]
    if not asked:
        return sigmas
    if len(asked) > 1:
        raise read.refuse(f"{asked[0]} and {asked[1]} are both true", "keep one of them")
    low = float(read.get("sigma_min", None) or sigmas[-1])
    high = float(read.get("sigma_max", None) or sigmas[0])
    if asked[0] == "use_karras_sigmas":
        return karras_sigmas(low, high, steps)
    if asked[0] == "use_exponential_sigmas":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    return low + _beta_quantiles(read, steps) * (high - low)


def karras_sigmas(low: float, high: float, steps: int) -> Doubles:
    """Return sigmas evenly spaced in sigma^(1/7) (arXiv 2206.00364, formula 5)."""
    found: Doubles = (high ** (1 / 7) + np.linspace(0, 1, steps) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return found


def _beta_quantiles(read: ConfigReader, steps: int) -> Doubles:
    """Return quantiles of the beta distribution (0.6, 0.6), falling from 1 to 0 (arXiv 2407.12173)."""
    try:
        from scipy.special import betaincinv
    except ModuleNotFoundError as error:
        raise read.refuse("use_beta_sigmas needs scipy, which is not installed", "pip install scipy") from error
    found: Doubles = betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps))
    return found
