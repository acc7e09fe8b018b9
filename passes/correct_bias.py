"""correct_bias: what quantization adds to the mean of a layer's output is taken out of its bias.

Rounded weights make an error (Q(W) - W) x whose mean over samples and positions is not 0, because x has a mean. It is
the same at every position, so nothing behind the layer averages it out. DFQ (Data-Free Quantization, arXiv 1906.04721)
computes it from batch normalization, which a denoiser does not have; here it is measured along the sampler's own
trajectory, on the float network's latents:

    b[c] -= E[y_q - y]_c          y_q: the layer's output with its bias, before its own quantizer

What y is, is an option:

network   the same output of the float network. It sees all that quantization does, also what came from upstream.
          Layers are corrected in the order of the graph, in `stages` of consecutive layers: a stage is measured with
          the corrections of all stages before it in place. Within a stage a layer takes out once more what the one in
          front of it takes out.
layer     the output of the float weights on the same quantized input. It sees what the weights do, and nothing from
          upstream.

A bias that is a row of a time table already (fold_time) gets a correction for each row, at no cost. Few samples leave a
row's mean uncertain, and it is drawn to the mean over all calls by as much (compiler/correction/channel_means.py).
Other biases get the mean over all calls of the deployment.

Afterwards pictures are drawn from other noise, with the correction and without: one that does not bring them nearer to
the float network's is thrown away. The history says which, with both figures. Pictures judge and not the prediction,
because what is left out of it is a shift that adds up over the calls, while a call's own error hardly changes.

Measured on the digits, 20 DDIM steps, w8a8-steps with 4-bit weights rounded to nearest, 8 calibration samples (epsilon,
median PSNR of 16 pictures of other noise): nothing 27.42 dB, 24.5 dB; layer 27.47, 31.5; layer by the mean of all calls
27.32, 30.5; network in 1 stage 25.69, 24.2; in 12 stages (4 samples, 11 times as long) 27.69, 31.5. With 8-bit weights
the shifts are 0.16 % of the outputs, and correcting them is of no use (52.3 to 50.7 dB); nor is it for static scales
with 4-bit weights (w8a8, 4 samples: 23.6 to 21.8 dB on 8 pictures), which the trial refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from mezzotint.compiler.calibration.calibrate import follow_trajectories
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.biases import QuantizedLayer, quantized_layers, with_float_twins
from mezzotint.compiler.correction.channel_means import ChannelMeans, with_means
from mezzotint.compiler.correction.trial import judged
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import Names, name_of, remove_dead
from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep


@dataclass(frozen=True)
class CorrectBias(Pass):
    """`against` and `stages` as above; `steps` says whether rows of time tables are corrected one by one.

    `held_out` samples of another seed judge the correction; with 0 it is kept unseen.
    """

    against: Literal["layer", "network"] = "layer"
    stages: int = 1
    steps: Literal["rows", "mean"] = "rows"
    held_out: int = 4

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        for option, value, least in (("stages", self.stages, 1), ("held_out", self.held_out, 0)):
            if value < least:
                raise RecipeError(f"{self.name}.{option} is {value}", where=self.name, hint=f"choose {least} or more")

    def run(self, program: Program, context: Context) -> Program:
        if program.float_model is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        found = list(quantized_layers(program, self.name))
        if not found:
            return program.noted("no layer is quantized: nothing to correct")
        before = replace(program, model=program.model.clone())
        names = Names(program.graph)
        parts = np.array_split(np.arange(len(found)), min(self.stages, len(found)))
        sizes: list[float] = []
        for i, part in enumerate(parts):
            stage = [found[k] for k in part]
            means = self._measure(program, context, stage, f"{self.name}, stage {i + 1} of {len(parts)}")
            for layer, mean in zip(stage, means, strict=True):
                shift = mean.by_row() if self.steps == "rows" and layer.table else mean.overall()
                if layer.fits(layer.values() - shift):
                    layer.with_bias(program.graph, names, layer.values() - shift)
                    sizes.append(_size(program, layer, shift))
        remove_dead(program.graph)
        tables = sum(layer.table is not None for layer in found)
        note = f"{len(sizes)} biases corrected ({tables} tables), by {_median(sizes)} of the output's rms"
        if len(sizes) < len(found):
            note += f"; {len(found) - len(sizes)} would not fit into 32 bits and stay"
        return judged(before, program, context, self.held_out, note, self.name)

    def _measure(
        self, program: Program, context: Context, stage: Sequence[QuantizedLayer], label: str
    ) -> list[ChannelMeans]:
        """The mean error of each layer of a stage, over all network calls of the calibration."""
        row_of = {t: row for row, t in enumerate(program.frozen or ())}
        means = [ChannelMeans(1 if layer.table is None else len(row_of), layer.channels) for layer in stage]
        exact_model, logical = program.require_float_model(), program.model
        if self.against == "network":
            exact_model, wants = with_means(exact_model, [(name_of(q.layer.output), q.axis) for q in stage])
            logical, gots = with_means(logical, [(name_of(q.output), q.axis) for q in stage])
        else:
            logical, twins = with_float_twins(program, stage)
            values = [*zip(twins, stage, strict=True), *((name_of(q.node.outputs[0]), q) for q in stage)]
            logical, both = with_means(logical, [(name, q.axis) for name, q in values])
            wants, gots = both[: len(stage)], both[len(stage) :]
        signature, threads = program.signature, context.threads
        with (
            Executor(exact_model, context.folder, threads=threads) as exact,
            # As it is written: fused kernels accept no scales by channel, and round what is averaged here.
            Executor(logical, context.folder, threads=threads, level="none") as quantized,
        ):

            def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
                outer = exact.call(signature, x, t, conditions)
                inner = quantized.call(signature, x, t, conditions)
                source = outer if self.against == "network" else inner
                for mean, layer, want, got in zip(means, stage, wants, gots, strict=True):
                    mean.add(row_of[t] if layer.table else 0, source[want], inner[got], len(x))
                return np.asarray(outer[signature.output], np.float32)

            follow_trajectories(program, context, denoiser, label)
        return means


def _size(program: Program, layer: QuantizedLayer, shift: Doubles) -> float:
    """A shift's root mean square in units of the output's; NaN where the output was not measured."""
    summary = None if program.stats is None else program.stats.summary(name_of(layer.layer.output))
    if summary is None or not summary.square:
        return float("nan")
    return float(np.sqrt((shift**2).mean() / (summary.square / summary.count)))


def _median(sizes: Sequence[float]) -> str:
    known = [size for size in sizes if not np.isnan(size)]
    return f"{np.median(known):.2%}" if known else "an unknown share"
