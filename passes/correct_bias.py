"""correct_bias: subtract the mean error that quantization makes in a layer's output from its bias.

Rounded weights make an error (Q(W) - W) x, whose mean over samples and positions is not 0 because x has a mean. The
mean error is the same at every position, so later layers do not average it out. DFQ (Data-Free Quantization, arXiv
1906.04721) computes it from batch normalization, which a denoiser does not have. Here it is measured along the
sampler's own trajectory, on the float network's latents:

    b[c] -= E[y_q - y]_c          y_q: the layer's output with its bias, before its own quantizer

The reference y is the option `against`:

- `network`: the same output of the float network. It includes all effects of quantization, also those from upstream.
  Layers are corrected in the order of the graph, in `stages` of consecutive layers; a stage is measured with the
  corrections of all earlier stages in place. Within a stage a layer corrects again what the layer before it corrects.
- `layer`: the output of the float weights on the same quantized input. It includes the effect of the weights only, and
  nothing from upstream.

A bias that is a row of a time table (fold_time) gets a correction for each row, at no cost. Few samples leave the mean
of a row uncertain, so it is shrunk toward the mean over all calls (compiler/correction/channel_means.py). Other biases
get the mean over all calls of the deployment.

Afterwards images are drawn from other noise, with and without the correction. A correction that does not bring them
nearer to the float network's is discarded; the history has both figures. Images decide rather than the prediction,
because the correction removes a shift that adds up over the calls and hardly changes the error of one call.

Measured on the digits, 20 DDIM steps, w8a8-steps with 4-bit weights rounded to nearest, 8 calibration samples (epsilon,
median PSNR of 16 images of other noise): uncorrected 27.42 dB, 24.5 dB; layer 27.47, 31.5; layer by the mean of all
calls 27.32, 30.5; network in 1 stage 25.69, 24.2; in 12 stages (4 samples, 11 times as long) 27.69, 31.5. With 8-bit
weights the shifts are 0.16 % of the outputs, and correcting them loses (52.3 to 50.7 dB). With static scales and 4-bit
weights it loses as well (w8a8, 4 samples: 23.6 to 21.8 dB on 8 images), and the trial discards it.
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
    """Corrected biases, and the trial that judges them.

    - `against`, `stages`: as above.
    - `steps`: `rows` corrects each row of a time table by itself, `mean` all of them by their mean.
    - `held_out`: samples of another seed that judge the correction; 0 keeps it without a trial.
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
        every_layer = list(quantized_layers(program, self.name))
        if not every_layer:
            return program.noted("no layer is quantized: nothing to correct")
        before = replace(program, model=program.model.clone())
        names = Names(program.graph)
        parts = np.array_split(np.arange(len(every_layer)), min(self.stages, len(every_layer)))
        sizes: list[float] = []
        for i, part in enumerate(parts):
            stage = [every_layer[k] for k in part]
            means = self._measure(program, context, stage, f"{self.name}, stage {i + 1} of {len(parts)}")
            for layer, mean in zip(stage, means, strict=True):
                shift = mean.by_row() if self.steps == "rows" and layer.table else mean.overall()
                if layer.fits(layer.values() - shift):
                    layer.with_bias(program.graph, names, layer.values() - shift)
                    sizes.append(_size(program, layer, shift))
        remove_dead(program.graph)
        tables = sum(layer.table is not None for layer in every_layer)
        note = f"{len(sizes)} biases corrected ({tables} tables), by {_median(sizes)} of the output's rms"
        if len(sizes) < len(every_layer):
            note += f"; {len(every_layer) - len(sizes)} would not fit into 32 bits and stay"
        return judged(before, program, context, self.held_out, note, self.name)

    def _measure(
        self, program: Program, context: Context, stage: Sequence[QuantizedLayer], label: str
    ) -> list[ChannelMeans]:
        """Return the mean errors of each layer of a stage over all network calls of the calibration."""
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
    """Return a shift's root mean square in units of the output's; NaN if the output was not measured."""
    summary = None if program.stats is None else program.stats.summary(name_of(layer.layer.output))
    if summary is None or not summary.square:
        return float("nan")
    return float(np.sqrt((shift**2).mean() / (summary.square / summary.count)))


def _median(sizes: Sequence[float]) -> str:
    known = [size for size in sizes if not np.isnan(size)]
    return f"{np.median(known):.2%}" if known else "an unknown share"
