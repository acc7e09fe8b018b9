"""A float network in torch, and gradients of random projections of its prediction.

For a projection v of signs, +1 or -1 with equal chance, the gradient of v^T f(x) with respect to a value z of the graph
is g = J^T v, where J is the derivative of the prediction f by z. Its products have the expectation

    E[g g^T] = J^T E[v v^T] J = J^T J,

the Gauss-Newton matrix of 1/2 |f(z + dz) - f(z)|^2. For a regression under Gaussian noise it is the Fisher matrix, and
the Hessian where the error is 0. Papers about language models take the gradients of their cross entropy in its place.

The prediction is that of the sampler: behind guidance, where a batch holds both halves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep

from ..core.execute import feeds
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import name_of
from ..torch_graph.convert import to_torch


class ProbedNetwork:
    """A float graph on a device, with the values `taps`; gradients reach the constants `weights` and what they change.

    Only behind the first of the weights does a call keep what the backward pass needs; without weights, gradients reach
    all that depends on the sample. Without `combined` the
    prediction is that of the network, both halves of guidance apart.
    """

    def __init__(
        self,
        program: Program,
        model: ir.Model,
        device: torch.device,
        *,
        taps: Sequence[str] = (),
        weights: Collection[str] = (),
        combined: bool = True,
    ) -> None:
        self._graph = to_torch(model, taps=taps, signature=program.signature).to(device)
        self._signature, self._deployment = program.signature, program.deployment
        self._combined = combined and program.deployment.guided
        self._inputs = {name_of(value): value for value in model.graph.inputs}
        self._taps = tuple(taps)
        for parameter in self._graph.module.parameters():
            parameter.requires_grad_(False)
        self._from_sample = not weights
        for name in weights:
            self._graph.weights[name].requires_grad_(True)
        self.weights = {name: self._graph.weights[name] for name in weights}

    @property
    def module(self) -> fx.GraphModule:
        return self._graph.module

    @property
    def halves(self) -> int:
        """Return how many rows of a batch belong to one sample: 2 under guidance, whose first half is unconditional."""
        return 2 if self._combined else 1

    def __call__(self, x: Images, t: Timestep, conditions: Conditions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the prediction `[samples, ...]` for the network's input x `[rows, ...]`, and the tapped values."""
        graph = self._graph
        fed = feeds(self._inputs, self._signature, x, t, conditions)
        arguments = {name: torch.from_numpy(np.array(fed[name])).to(graph.device) for name in graph.inputs}
        arguments[self._signature.sample].requires_grad_(self._from_sample)
        with torch.enable_grad():
            output, *tapped = graph.module(*arguments.values())
            if self._combined:
                without, conditional = output.chunk(2)
                output = without + self._deployment.guidance * (conditional - without)
        return output, dict(zip(self._taps, tapped, strict=True))


def project(prediction: torch.Tensor, seed: int, *place: int) -> torch.Tensor:
    """Return v^T f for seeded signs v; `place` is (call, batch, probe). Raise PassError for a prediction not finite."""
    signs = streams.PROBES.generator(seed, *place).integers(0, 2, tuple(prediction.shape), dtype=np.int8)
    v = torch.from_numpy(2.0 * signs.astype(np.float32) - 1).to(prediction.device)
    total = (prediction * v).sum()
    if not bool(torch.isfinite(total)):
        raise PassError("the float network predicts numbers that are not finite", hint="debug the float model")
    return total


def gradients(total: torch.Tensor, values: dict[str, torch.Tensor], *, keep: bool = False) -> dict[str, Floats]:
    """Return the gradient of a number by each value, on the host; zeros where it does not depend on the value.

    `keep` leaves the graph of the call for another backward pass.
    """
    found = torch.autograd.grad(
        total, list(values.values()), retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    return {name: gradient.cpu().numpy() for name, gradient in zip(values, found, strict=True)}
