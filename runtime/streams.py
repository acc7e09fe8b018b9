"""The random streams of the project: every use of random numbers has a name here, and with it a key of its own.

A run has one seed, that of its calibration. `SeedOffset` derives from it the seeds of the noise that the run draws for
other purposes. `Stream` and `noise_generator` derive numpy's generators from a seed. No other file seeds a generator
(tests/runtime/test_streams.py): a new use of random numbers is a new line here.

numpy fills a key of fewer than four words up with zeros: `[seed]`, `[seed, 0]` and `[seed, 0, 0]` are one key. Some
streams share keys for this reason, or because both count from 0; the comment at their names says so. The keys stay as
they are, because bundles and reports depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class SeedOffset(IntEnum):
    """What is added to the seed of the calibration, so that nothing is measured on noise that it was fitted to."""

    NOISE_FIT = 1
    """fit_noise fits the correction of the noise."""
    HELD_OUT = 2
    """Passes judge a change, and fit_noise the correction, on images that neither calibrated nor fitted anything."""
    EVALUATION = 3
    """Comparisons of a finished bundle with its float model."""
    MIXING = 4
    """The errors that a mixture of precisions is chosen by."""
    ACCEPTANCE = 5
    """The finished file beside the float model, at the end of a compilation."""
    RANKING = 6
    """step_scales ranks its tables; those of HELD_OUT judge them."""
    COMPONENTS = 7
    """Images whose latents calibrate a VAE."""
    COMPONENTS_HELD_OUT = 8
    """Images that measure the finished VAE."""
    UNCONDITIONAL = 1000
    """Random unconditional rows: other rows than the conditional ones of any usual seed."""

    def after(self, seed: int) -> int:
        """Return the seed for this purpose in a run whose calibration has `seed`."""
        return seed + self.value


@dataclass(frozen=True)
class Stream:
    """Random numbers for one purpose: `key` are the words that follow the seed, before the place of a draw."""

    name: str
    key: tuple[int, ...] = ()

    def entropy(self, seed: int, *place: int) -> list[int]:
        """Return the key of one generator: the seed, the words of this stream, and the place of the draw."""
        return [seed, *self.key, *place]

    def generator(self, seed: int, *place: int) -> np.random.Generator:
        """Return a new generator. The same seed and place give the same numbers."""
        return np.random.default_rng(self.entropy(seed, *place))


CONDITIONS = Stream("conditions", (0xC,))
"""Random rows of float conditions for calibration."""
EXACTNESS = Stream("exactness", (0xE,))
"""The inputs on which an exact pass is compared with the graph before it. Shares its key with RESIDUALS."""
RESIDUALS = Stream("residuals", (0xE,))
"""The subset of a call's values on which normality is tested. Shares its key with EXACTNESS."""
PROBES = Stream("probes", (0x60B,))
"""Signs of random projections of the network's prediction; place: (call, batch, number of the projection)."""
RANGE_NETWORKS = Stream("range networks")
"""First weights of the networks that learn ranges; place: (number of the value).

Shares its keys for value 0 with BOOTSTRAP, for 12 with CONDITIONS, for 14 with EXACTNESS and RESIDUALS."""
POSITIONS = Stream("positions")
"""Positions of a layer's inputs that rounding reads; place: (call, batch, crc32 of the value's name)."""
TRAINING_BATCHES = Stream("training batches", (0xB,))
"""The calls and samples of each step of a fit; place: (crc32 of the unit's name), for a whole network (the same,
iteration), because its fit can go on in between."""
DROPPED_ELEMENTS = Stream("dropped elements", (0xD,))
"""The seeds of what QDrop leaves unquantized in a fit; place: (crc32 of the unit's name)."""
INPUT_NOISE = Stream("input noise", (0xA, 0xDD))
"""The constant noise of shift_inputs; place: (number of the input)."""
CONFIGURATIONS = Stream("configurations", (0x5E,))
"""The random configurations of a search; place: (round, number of the configuration)."""
ADAPTERS = Stream("adapters", (0xA, 0xDA))
"""The first values of low-rank adapters of weights; of low-rank roundings, with the place (crc32 of the unit's name,
crc32 of the weight's)."""
BOOTSTRAP = Stream("bootstrap")
"""Resamples of images for intervals of metrics; seed: that of the metrics. Shares its key with place 0 of
RANGE_NETWORKS."""
BENCH_CONDITIONS = Stream("bench conditions")
"""Conditions for timing; seed: FIXED. Shares its key with MIX_CHECK, and with BOOTSTRAP and place 0 of
RANGE_NETWORKS."""
MIX_CHECK = Stream("mix check")
"""Conditions on which a network is compared with its copy in a mixture; seed: FIXED. Shares the key of
BENCH_CONDITIONS."""

STREAMS = (
    CONDITIONS,
    EXACTNESS,
    RESIDUALS,
    PROBES,
    RANGE_NETWORKS,
    POSITIONS,
    TRAINING_BATCHES,
    DROPPED_ELEMENTS,
    INPUT_NOISE,
    CONFIGURATIONS,
    ADAPTERS,
    BOOTSTRAP,
    BENCH_CONDITIONS,
    MIX_CHECK,
)
"""Every stream, apart from the noise of sampling."""

FIXED = 0
"""The seed where a run has none: inputs for timing, for checks of copies, and torch's example inputs for export."""


def prompt_seed(seed: int, image: int) -> int:
    """Return the seed of the generator of torch that draws image `image` of a prompt."""
    return seed + image


def noise_generator(seed: int, image: int, draw: int) -> np.random.Generator:
    """Return the generator of one image's noise: draw 0 is the image's start, draw i + 1 the noise of call i.

    The key has at least six words (four of the seed, the image, the draw), so that no `Stream` shares it.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(image, draw))))
