"""remove_channels: drop whole channels between two layers, where the layers that read them can make up for it.

A pruned weight is as slow as a dense one: no kernel of onnxruntime's CPU provider skips zeros. A channel that nothing
reads is different, since the layer that makes it, the operations on the way and the layers that read it all get
smaller. Channels go by Optimal Brain Surgeon's step for all rows together (compiler/pruning/channel_order.py), by a
heap over all sites, and the layers that read the others are solved anew by least squares against the outputs that they
had:

    min over W' of  ||W X - W' X_kept||^2

`share` of all channels at such sites go (compiler/pruning/channel_sites.py): the hidden layers of feed-forward networks
and convolutions with only activation functions in between. What passes a norm, a Split or a Reshape stays; the note
says how many sites there are, and `refused` of the bundle why others are none.

Measured on the digits-dit (5 sites of 640 channels; float, batch 8, one thread, 21 calls of each in turns on a busy
machine): without a quarter of the channels a call takes 0.84 of the time (quartiles 0.72 to 0.88), without half of them
0.74 (0.68 to 0.84). The digits and mnist-onnx have no site but their time embedding: their blocks have norms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.core.islands import Islands
from mezzotint.compiler.core.option_checks import require_not_negative, require_positive
from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.graph.require import shape_of
from mezzotint.compiler.pruning.channel_order import channel_order, removals, without_channels
from mezzotint.compiler.pruning.channel_sites import ChannelSite, channel_site, input_axis
from mezzotint.compiler.rounding.gathering import gather_floats
from mezzotint.compiler.rounding.gram import Unfold
from mezzotint.compiler.rounding.layer_inputs import FloatInputs, chosen_latents
from mezzotint.compiler.rounding.matrix import check_gram, inverse_root, row_errors
from mezzotint.runtime.arrays import Doubles, Floats

MOST_INPUTS = 4096  # inputs of a reader: its inverse is changed once for each channel that goes
KeptChannels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RemoveChannels(GraphPass):
    """Channels removed from the graph.

    - `share`: of the channels of all sites. `multiple`: what stays of a site is a multiple of it.
    - `damp`, `calls`, `samples`, `columns`, `balance`: as in prune_weights. `islands`: as in insert_qdq; they stay.
    """

    share: float = 0.25
    multiple: int = 8
    damp: float = 0.01
    calls: int = 10
    samples: int = 8
    columns: int = 8192
    balance: bool = True
    islands: tuple[str, ...] = ("first", "last")

    def __post_init__(self) -> None:
        require_positive(self, "share", "multiple", "calls", "samples", "columns")
        require_not_negative(self, "damp")
        if self.share >= 1:
            raise RecipeError(
                f"remove_channels.share is {self.share:g}", where=self.name, hint="choose a share below 1"
            )

    def run(self, program: Program, context: Context) -> Program:
        sites, refused = self._sites(program)
        program = replace(program, refused={**program.refused, **refused})
        if not sites:
            return program.noted("no channels can be removed: see `refused`")
        few = replace(context, samples=min(self.samples, context.samples))
        latents = chosen_latents(replace(program, float_model=program.model), few, self.calls)
        inputs = [_inputs(site) for site in sites]
        done, total = 0, len(latents) + 2 * len(sites)

        def step() -> None:
            nonlocal done
            done += 1
            context.progress(self.name, done, total)

        gathered = gather_floats(
            program, context, inputs, latents, columns=self.columns, balance=self.balance, step=step
        )
        orders: list[KeptChannels] = []
        errors: list[Doubles] = []
        powers: list[float] = []
        for site, read in zip(sites, inputs, strict=True):
            gram = gathered.gram(read)[0]
            check_gram(gram, site.name)
            root = inverse_root(gram, np.arange(len(gram)), self.damp, site.name)
            np.einsum("ii->i", gram)[...] += root.damp * np.diagonal(gram).mean(dtype=np.float64)
            upper = root.upper.astype(np.float64)
            rows = _rows(site)
            power = max(float(row_errors(rows, gram).sum()), 1e-30)
            depth = max(site.channels - self.multiple, 0)
            order, found = channel_order(rows, upper.T @ upper, len(gram) // site.channels, depth)
            orders.append(order)
            errors.append(found / power)
            powers.append(power)
            step()
        counts = removals(errors, self.share, [site.channels for site in sites], self.multiple)
        shares = []
        for site, read, order, count, power in zip(sites, inputs, orders, counts, powers, strict=True):
            gram, rows = gathered.gram(read)[0], _rows(site)
            if count:
                kept = np.setdiff1d(np.arange(site.channels), order[:count])
                positions = len(gram) // site.channels
                values = without_channels(rows, gram, positions, kept)
                placed = np.zeros(rows.shape)
                placed[:, (kept[:, None] * positions + np.arange(positions)).reshape(-1)] = values
                shares.append(float(row_errors(rows - placed, gram).sum()) / power)
                _write(site, kept, values, context)
            step()
        gone, whole = sum(counts), sum(site.channels for site in sites)
        mean = float(np.mean(shares)) if shares else 0.0
        note = (
            f"{gone} of {whole} channels of {len(sites)} sites removed; squared error of the outputs {mean:.2%} (mean)"
        )
        return program.noted(note)

    def _sites(self, program: Program) -> tuple[list[ChannelSite], dict[str, str]]:
        """Return (the sites, of which none shares a layer's columns with another, why other layers have none)."""
        every_layer = list(layers(program.graph))
        islands = Islands(program, every_layer, self.islands, self.name)
        by_node = {layer.node: layer for layer in every_layer}
        sites: list[ChannelSite] = []
        refused: dict[str, str] = {}
        for layer in every_layer:
            if layer.weight is None:
                continue
            site = channel_site(layer, by_node)
            if isinstance(site, ChannelSite):
                kept = [r for each in (layer, *site.readers) if (r := islands.reason(each)) is not None]
                if _inputs(site).inputs > MOST_INPUTS:
                    kept = [f"the layers that read them have more than {MOST_INPUTS} inputs"]
                if not kept:
                    sites.append(site)
                    continue
                site = kept[0]
            refused[layer.name] = f"{self.name}: {site}"
        return sites, refused


def _inputs(site: ChannelSite) -> FloatInputs:
    reader = site.readers[0]
    shape = shape_of(reader.weight).numpy()
    size = int(np.prod(shape)) // int(shape[reader.require_weight_axis()])
    taps = (name_of(site.value),)
    return FloatInputs(
        reader.require_weight(), reader.require_weight_axis(), taps, (Unfold.of(reader.node, shape),), size
    )


def _rows(site: ChannelSite) -> Floats:
    """Return the weights of all readers, `[rows, channels * positions]`."""
    parts = [np.moveaxis(numpy_of(r.require_weight()), r.require_weight_axis(), 0) for r in site.readers]
    return np.concatenate([part.reshape(len(part), -1) for part in parts])


def _write(site: ChannelSite, kept: KeptChannels, values: Doubles, context: Context) -> None:
    """Write the smaller constants of a site into the graph."""
    arrays = site.remove(kept)
    start = 0
    for reader in site.readers:
        value, axis = reader.require_weight(), reader.require_weight_axis()
        shape = list(shape_of(value).numpy())
        shape[input_axis(reader)] = len(kept)
        rows = values[start : start + shape[axis]]
        start += shape[axis]
        turned = (shape[axis], *(n for i, n in enumerate(shape) if i != axis))
        arrays[value] = np.moveaxis(rows.reshape(turned), 0, axis).astype(np.float32)
    for value, array in arrays.items():
        value.const_value = store.kept(np.ascontiguousarray(array), name_of(value), context.folder)
        value.shape = ir.Shape(array.shape)
