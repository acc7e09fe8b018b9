"""The largest numbers that a caller can ask for. Above them a request is an accident: it is refused at once."""

from __future__ import annotations

from .errors import InputError, MezzotintError

MOST_SAMPLES = 10_000_000
MOST_BATCH = 4_096
MOST_STEPS = 10_000
MOST_THREADS = 512
LARGEST_SEED = 2**63 - 1
MOST_CALIBRATION_SAMPLES = 100_000
MOST_RESAMPLES = 1_000_000
MOST_REPEATS = 10_000
"""Calls in one block of a measurement, blocks, and other counts of a measurement."""
MOST_SIDE = 8_192
"""Height and width of a sample."""
MOST_LENGTH = 1 << 24
"""The length of a sample that has one size beside its channels: audio, tokens."""
MOST_FILE_BYTES = 4 << 30
"""Images that are made in memory for one file."""


def check_number(what: str, value: int | None, most: int, error: type[MezzotintError] = InputError) -> None:
    """Raise `error` for a number above `most`. `what` is what it counts, in the plural."""
    if value is not None and value > most:
        number = str(value) if value < 10**18 else "more than 10^18"
        raise error(f"{number} {what} are not possible", hint=f"the limit is {most}")


def check_seed(seed: int | None, error: type[MezzotintError] = InputError) -> None:
    """Raise `error` for a seed below 0 or above LARGEST_SEED."""
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise error("the seed is below 0 or has more than 63 bits", hint=f"choose one from 0 to {LARGEST_SEED}")
