"""The deployed way of sampling: sampler, steps, eta and guidance, which determine the network calls.

The samplers are those of diffusers' schedulers, by name:

    ddim            DDIMScheduler                     euler             EulerDiscreteScheduler
    ddpm            DDPMScheduler                     euler-ancestral   EulerAncestralDiscreteScheduler
    pndm            PNDMScheduler                     heun              HeunDiscreteScheduler
    lcm             LCMScheduler                      dpmpp-2m          DPMSolverMultistepScheduler
    flow-euler      FlowMatchEulerDiscreteScheduler   dpmpp-2m-sde      the same, sde-dpmsolver++
    unipc           UniPCMultistepScheduler

The number of calls need not be that of the steps (Heun calls twice a step, PNDM once more than there are steps), and
two calls may have one timestep. Tables inside a graph have a row for each timestep, tables of the sampling loop one for
each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..bounds import MOST_STEPS, check_number
from ..errors import ScheduleError
from ..signature import Timestep, whole
from . import solvers, solvers_pndm, solvers_sigma, solvers_unipc
from .config_keys import check_sampler_keys
from .schedule import FLOW_CLASSES, Schedule
from .steps import Solver

_SOLVERS: dict[str, Callable[[Schedule, int, float], Solver]] = {
    "ddim": lambda schedule, steps, eta: solvers.ddim(schedule, _own(schedule, steps), eta=eta),
    "ddpm": lambda schedule, steps, eta: solvers.ddpm(schedule, _own(schedule, steps)),
    "euler": lambda schedule, steps, eta: solvers_sigma.euler(schedule, steps),
    "euler-ancestral": lambda schedule, steps, eta: solvers_sigma.euler_ancestral(schedule, steps),
    "heun": lambda schedule, steps, eta: solvers_sigma.heun(schedule, steps),
    "dpmpp-2m": lambda schedule, steps, eta: solvers_sigma.dpmpp_2m(schedule, steps),
    "dpmpp-2m-sde": lambda schedule, steps, eta: solvers_sigma.dpmpp_2m(schedule, steps, stochastic=True),
    "pndm": lambda schedule, steps, eta: solvers_pndm.pndm(schedule, steps),
    "lcm": lambda schedule, steps, eta: solvers.lcm(schedule, steps),
    "flow-euler": lambda schedule, steps, eta: solvers.flow_euler(schedule, steps),
    "unipc": lambda schedule, steps, eta: solvers_unipc.unipc(schedule, steps),
}
SAMPLERS: tuple[str, ...] = tuple(_SOLVERS)
UNGUIDED = 1.0
"""The guidance scale at which the prediction is the conditional one, and the unconditional one is not computed."""


@dataclass(frozen=True)
class Deployment:
    """`calls` are the timesteps of all network calls, in order; `guidance` the scale of classifier-free guidance."""

    sampler: str
    steps: int
    eta: float
    calls: tuple[Timestep, ...]
    guidance: float = UNGUIDED

    def __post_init__(self) -> None:
        _check_choice(self.sampler, self.eta, self.guidance)
        if self.steps < 1 or len(self.calls) < self.steps:
            raise ScheduleError(f"{self.steps} steps cannot have {len(self.calls)} network calls")

    @classmethod
    def of(
        cls, schedule: Schedule, sampler: str, steps: int, eta: float = 0.0, guidance: float = UNGUIDED
    ) -> Deployment:
        """Return the deployment with the calls of a sampler. Raises ScheduleError if it cannot run on the schedule."""
        _check_choice(sampler, eta, guidance)
        check_number("steps", steps, MOST_STEPS, ScheduleError)
        check_sampler_keys(schedule.reader, sampler)
        calls = _SOLVERS[sampler](schedule, int(steps), float(eta)).calls
        return cls(sampler, int(steps), float(eta), calls, float(guidance))

    @property
    def timesteps(self) -> tuple[Timestep, ...]:
        """The distinct timesteps of the calls, in the order of their first calls."""
        return tuple(dict.fromkeys(self.calls))

    @property
    def whole(self) -> bool:
        """Whether all timesteps are training timesteps, so that an integer input can represent them."""
        return all(isinstance(t, int) for t in self.calls)

    @property
    def guided(self) -> bool:
        """Whether each call evaluates the network with and without the condition."""
        return self.guidance != UNGUIDED

    def solver(self, schedule: Schedule) -> Solver:
        """Return the scalars of all calls. Raises ScheduleError if the schedule gives other calls than these."""
        solver = _SOLVERS[self.sampler](schedule, self.steps, self.eta)
        if solver.calls != self.calls:
            raise ScheduleError(
                f"{self.sampler} with {self.steps} steps makes other network calls on this schedule "
                f"({_first(solver.calls)}) than it was deployed for ({_first(self.calls)})",
                hint="use the scheduler configuration that the model was compiled with",
            )
        return solver

    def __str__(self) -> str:
        parts = [self.sampler, f"{self.steps} steps"]
        if self.sampler == "ddim":
            parts.append(f"eta {self.eta:g}")
        if self.guided:
            parts.append(f"guidance {self.guidance:g}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "sampler": self.sampler,
            "steps": self.steps,
            "eta": self.eta,
            "guidance": self.guidance,
            "calls": list(self.calls),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Deployment:
        try:
            calls = tuple(whole(data["calls"]))
            return cls(str(data["sampler"]), int(data["steps"]), float(data["eta"]), calls, float(data["guidance"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ScheduleError(f"malformed deployment: {type(error).__name__} {error}") from error


def usual_sampler(schedule: Schedule) -> str:
    """Return the default sampler of a schedule: DDIM, or for flow matching that of its class, mostly Euler's method."""
    return FLOW_CLASSES.get(str(schedule.config.get("_class_name")), "flow-euler") if schedule.flow else "ddim"


def _own(schedule: Schedule, steps: int) -> list[int]:
    if schedule.flow:
        raise ScheduleError("this sampler needs a schedule of betas", hint="use flow-euler for flow matching")
    return [int(t) for t in schedule.timesteps(steps)]


def _first(calls: tuple[Timestep, ...]) -> str:
    return ", ".join(f"{t:g}" for t in calls[:3]) + (", ..." if len(calls) > 3 else "")


def _check_choice(sampler: str, eta: float, guidance: float) -> None:
    if sampler not in _SOLVERS:
        raise ScheduleError(f"unknown sampler {sampler!r}", hint=f"use one of {', '.join(SAMPLERS)}")
    if not 0.0 <= eta <= 1.0:
        raise ScheduleError(f"eta is {eta}", hint="choose between 0, deterministic, and 1, as noisy as DDPM")
    if sampler != "ddim" and eta != 0.0:
        raise ScheduleError(f"{sampler} has no eta", hint="leave eta at 0, or use ddim")
    if not 0.0 <= guidance < math.inf:
        raise ScheduleError(f"guidance is {guidance}", hint="1 is no guidance; usual scales are 3 to 8")
