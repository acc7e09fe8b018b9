"""normalize: bring graphs of all exporters into one form.

1. Inline functions, turn Constant nodes into initializers, and remove initializers from the graph's inputs.
2. Raise opsets below 18 to 18. The pipeline compares the outputs before and after, as for every exact pass.
   GroupNormalization with a scale per group (opsets 18 to 20) becomes that of opset 21, with a scale per channel.
3. Name the open dimensions of the inputs `batch`, `channels`, `height`, `width`.
4. Fold nodes that only constants feed, and layers with zero weights (compiler/graph/dead_layers.py). Remove nodes that
   return an input of theirs (`x / 1`, Dropout, a Reshape to the same shape), make shapes constant that are known, merge
   equal subexpressions, remove dead nodes.
5. Sort the nodes, name them after their modules, and infer shapes.

The exporter's notes are dropped, because they name files of its machine. The names of modules are kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.constant_folding import fix_reshapes, fold_constants, infer_shapes
from mezzotint.compiler.graph.dead_layers import fold_dead_layers
from mezzotint.compiler.graph.no_ops import remove_no_ops
from mezzotint.compiler.graph.nodes import name_of, remove_dead
from mezzotint.compiler.graph.opset import raise_opset, upgrade_group_norms
from mezzotint.compiler.graph.scopes import SCOPES, name_by_module

KEPT_METADATA = (SCOPES, "pkg.torch.onnx.class_hierarchy")
DIMENSIONS = ("batch", "channels", "height", "width")
LENGTH = re.compile(r"tokens(_\d+)?( \+ \d+)?")


@dataclass(frozen=True)
class Normalize(GraphPass):
    """It has no options; the steps are numbered in the module's docstring."""

    gives: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # folding computes in numpy what onnxruntime computed in its kernels

    def run(self, program: Program, context: Context) -> Program:
        model = ir.passes.Sequential(
            common.InlinePass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.RemoveInitializersFromInputsPass(),
        )(program.model).model
        model, raised = raise_opset(model)
        model = upgrade_group_norms(model)
        _drop_notes(model)
        _name_dimensions(model.graph, program)
        model = infer_shapes(fold_constants(model))
        dead = fold_dead_layers(model)
        removed = remove_no_ops(model.graph)
        fix_reshapes(model.graph)
        model = ir.passes.Sequential(
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.TopologicalSortPass(),
            common.NameFixPass(),
        )(model).model
        remove_dead(model.graph)
        name_by_module(model.graph)
        known = infer_shapes(model)
        values = [v for node in known.graph for v in node.outputs]
        shapes = sum(v.shape is not None for v in values)
        notes = [raised, f"{removed} nodes without effect removed" if removed else ""]
        notes.append(f"{dead} layers with zero weights became constants" if dead else "")
        notes.append(f"shapes of {shapes} of {len(values)} values known")
        return program.with_model(known, ", ".join(note for note in notes if note))


def _drop_notes(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.doc_string = None
    for node in model.graph.all_nodes():
        node.doc_string = None
        kept = {k: v for k, v in node.metadata_props.items() if k in KEPT_METADATA}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        for value in node.outputs:
            value.metadata_props.clear()


def _name_dimensions(graph: ir.Graph, program: Program) -> None:
    """Name the open dimensions of the inputs and outputs, independently of the exporter's run.

    The names of open lengths stay: a prompt and its mask share one (frontend/architectures).
    """
    batch_like = {program.signature.sample: DIMENSIONS, program.signature.output: DIMENSIONS}
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is None:
            continue
        preferred = batch_like.get(name_of(value), ("batch",))
        value.shape = ir.Shape(
            dim
            if isinstance(dim, int) or LENGTH.fullmatch(dim.value or "")
            else (preferred[i] if i < len(preferred) else f"{name_of(value)}_{i}")
            for i, dim in enumerate(value.shape)
        )
