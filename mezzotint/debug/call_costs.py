"""What every layer costs at one network call. Calls do not know each other: each is a piece, here or in a worker."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mezzotint.compiler.audit.side_by_side import PairedLayer, SideBySide
from mezzotint.compiler.audit.suggestions import Facts
from mezzotint.compiler.audit.switched import JOINT_LEVEL, SwitchedNetwork, joint_taps
from mezzotint.compiler.core.blas_threads import blas_threads_for_workers, with_blas_threads
from mezzotint.compiler.core.context import Context
from mezzotint.compiler.core.execute import NetworkSession, write_network
from mezzotint.runtime.compare import StepSQNR
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.condition_network import ConditionNetwork
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.guidance import Conditions, predictor
from mezzotint.runtime.signature import Images, Signature, Timestep

LAYERS_STAGE = "layers, one by one"
JOINT = "joint"


@dataclass(frozen=True, eq=False)
class ProbedCall:
    """A network call of the float trajectory: its number, and the sampler's x `[n, ...]`."""

    index: int
    timestep: Timestep
    x: Images

    def __str__(self) -> str:
        return f"call {self.index}"


@dataclass
class CallCosts:
    """The errors of epsilon with one layer quantized, and with all `together`, and facts of each layer, by its name."""

    costs: dict[str, StepSQNR]
    facts: dict[str, Facts]
    together: StepSQNR = field(default_factory=StepSQNR)

    @classmethod
    def of_layers(cls, names: Sequence[str]) -> CallCosts:
        """Return those of no call."""
        return cls({name: StepSQNR() for name in names}, {name: Facts() for name in names})

    def add(self, other: CallCosts) -> None:
        """Add those of other calls."""
        for name, cost in other.costs.items():
            self.costs[name] = self.costs[name] + cost
            self.facts[name].merge(other.facts[name])
        self.together = self.together + other.together


@dataclass(frozen=True)
class CallProbe:
    """The settings of all calls: what the sampler calls the network with. It is pickled for workers."""

    groups: Mapping[str, PairedLayer]
    signature: Signature
    deployment: Deployment
    conditions: Conditions
    unconditional: Conditions

    def measure(
        self,
        network: SwitchedNetwork,
        call: ProbedCall,
        computing: ConditionNetwork | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> CallCosts:
        """Return what the layers cost at a call. `progress` is called after each of (layers + 1) network calls."""
        names = list(self.groups)
        found = CallCosts.of_layers(names)
        predict = predictor(network, self.deployment, self.conditions, self.unconditional, computing)
        exact = predict(call.x, call.timestep)
        network.note(found.facts, call.index)
        pairs = [*(([name], found.costs[name]) for name in names), (names, found.together)]
        for layers, measure in pairs:
            output = network.quantized(layers, lambda: predict(call.x, call.timestep))
            measure.add(call.index, exact, output)
            progress()
        return found


@dataclass(frozen=True)
class ProbeWork:
    """Calls that workers measure. The folder has the joint graph."""

    probe: CallProbe
    blas: int

    def open(self, folder: Path, threads: int) -> Callable[[ProbedCall], CallCosts]:
        """Return the function from a call to what the layers cost there."""
        session = NetworkSession(folder / f"{JOINT}.onnx", threads=threads, level=JOINT_LEVEL)
        network = SwitchedNetwork(self.probe.groups, self.probe.signature, session)

        def measure(call: ProbedCall) -> CallCosts:
            with with_blas_threads(self.blas):
                return self.probe.measure(network, call)

        return measure


def costs_of_calls(
    probe: CallProbe,
    compared: SideBySide,
    network: SwitchedNetwork,
    calls: Sequence[ProbedCall],
    context: Context,
    progress: Progress = silent,
) -> Iterator[CallCosts]:
    """Yield what the layers cost at each call, in order; workers measure where the context has some."""
    blas = None if context.spread is None else blas_threads_for_workers("debug")
    if context.spread is not None and blas is not None:
        with tempfile.TemporaryDirectory(dir=context.folder) as folder:
            write_network(compared.model, Path(folder), JOINT, taps=joint_taps(compared))
            yield from context.spread.in_order(ProbeWork(probe, blas), Path(folder), calls, LAYERS_STAGE, unit="calls")
        return
    each = len(probe.groups) + 1
    for i, call in enumerate(calls):
        done = i * each

        def step() -> None:
            nonlocal done
            done += 1
            progress(LAYERS_STAGE, done, len(calls) * each)

        yield probe.measure(network, call, context.condition_network, step)
