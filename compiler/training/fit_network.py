"""The fit of a whole network: Adam on what moves, judged by images of held-out noise.

The learning rates rise for a few iterations and then fall to 0 as half a cosine. At each check images are drawn, and
the fit keeps the state with the best ones; that of the start is one of them. With a cache the state of each check is
kept (network_state.py), so a fit that was stopped goes on behind the last one.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch

from mezzotint.runtime import streams

from ..errors import PassError
from .block_data import LossWatcher
from .movements import Movements
from .network_loss import NetworkFit, NetworkLoss
from .network_state import CheckCache, FitState
from .torch_device import wait_for
from .units import NETWORK

FIRST_SHARE = 0.02
"""Of the iterations, in which the learning rates rise: Adam knows no sizes of gradients at first."""
NETWORK_KEY = zlib.crc32(NETWORK.encode())
TIMED_ITERATIONS = 4
"""Iterations that are timed to find how many fit into the minutes. The first one, which warms up, does not count."""


@dataclass(frozen=True)
class NetworkResult:
    """What a fit did: its losses, the image fidelity of each check (dB, the start's first), and where it ended.

    Losses are errors as shares of those at the start: the exponential of what is trained. `kept` is the number of the
    check whose state is in the module; 0 is the start.
    """

    losses: tuple[float, ...]
    image_db: tuple[float, ...]
    kept: int

    @property
    def iterations(self) -> int:
        return len(self.losses)


def fit_network(
    loss: NetworkLoss, movements: Movements, fit: NetworkFit, seed: int, by: str, cache: CheckCache, step: LossWatcher
) -> NetworkResult:
    """Train what moves; the best state by images is in the variables afterwards.

    `step` is called after each network call and each iteration, with the loss of an iteration. Raise PassError for a
    loss that is not finite.
    """
    begun = time.monotonic()
    optimizer = torch.optim.Adam(movements.groups, betas=(0.9, 0.99))
    rates = [group["lr"] for group in optimizer.param_groups]
    state = FitState(movements.variables, optimizer, fit.iterations, movements.memory())
    loss.measure_start(movements, step)
    if not cache.restore(state):
        state.judge(loss.image_db(movements, step))
        if fit.minutes is not None:
            left = 60 * fit.minutes - fit.checks * (time.monotonic() - begun)
            affordable = int(left / _seconds(lambda: loss.draw(movements, _batches(seed, 0), 0.0), movements))
            state.iterations = max(min(fit.iterations, affordable), fit.checks)
        cache.keep(state)
    checks = np.rint(np.linspace(0, state.iterations, fit.checks + 1)[1:]).astype(int).tolist()
    for iteration in range(len(state.losses), state.iterations):
        rising = min(1.0, (iteration + 1) / (FIRST_SHARE * state.iterations + 1))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rising * 0.5 * (1 + cos(pi * iteration / state.iterations))
        current = loss.draw(movements, _batches(seed, iteration), iteration / state.iterations)
        state.losses.append(float(current.detach().exp()))
        if not np.isfinite(state.losses[-1]):
            raise PassError(
                f"the loss is {state.losses[-1]} at iteration {iteration}",
                where=by,
                hint=f"lower {by}.weight_steps and {by}.float_shares",
            )
        optimizer.zero_grad()
        current.backward()
        movements.restrain(optimizer, iteration / state.iterations)
        optimizer.step()
        step(state.losses[-1])
        if iteration + 1 in checks:
            state.judge(loss.image_db(movements, step))
            cache.keep(state)
    state.use_best()
    return NetworkResult(tuple(state.losses), tuple(state.image_db), state.kept)


def _batches(seed: int, iteration: int) -> np.random.Generator:
    """Return what draws the samples of an iteration: it depends on no earlier one."""
    return streams.TRAINING_BATCHES.generator(seed, NETWORK_KEY, iteration)


def _seconds(draw: Callable[[], torch.Tensor], movements: Movements) -> float:
    """Return the seconds of one iteration. It changes no state."""
    begun = 0.0
    for i in range(TIMED_ITERATIONS):
        begun = time.monotonic() if i == 1 else begun
        draw().backward()
        wait_for(movements.variables[0].device)
    for variable in movements.variables:
        variable.grad = None
    return (time.monotonic() - begun) / (TIMED_ITERATIONS - 1)
