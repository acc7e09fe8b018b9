"""Small graphs whose channels take factors, and the check that a rewrite keeps their outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.verify import relative_difference
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import Names, remove_dead
from tests.helpers.tiny import program_of

CHANNELS = 4
SHAPES: dict[str, tuple[int, ...]] = {
    "sample": (CHANNELS, 4, 4),
    **{f"k{i}": (4, 4, 3, 3) for i in range(4)},
    **{f"b{i}": (4,) for i in range(6)},
    **{f"w{i}": (4, 4) for i in range(6)},
    **{f"g{i}": (4,) for i in range(3)},
    **{f"c{i}": (4, 1, 1) for i in range(3)},
    "grouped": (4, 2, 3, 3),
    "wide": (4, 8),
    "tall": (8, 4),
    "six": (4, 24),
    "six_b": (24,),
    "wide_b": (8,),
    "g8": (8,),
    "times": (6, 4),
    "times_b": (6, 4),
    "slope": (4, 1, 1),
    "rope": (1, 16, 4),
    "half": (2,),
    "half_b": (2,),
    "skew": (4, 12),
    "shortcut": (4, 8, 1, 1),
    "odd_w": (6, 4),
    "square8": (8, 8),
}
INTEGERS: dict[str, list[int]] = {
    "tokens": [0, 4, 16],
    "image": [0, 4, 4, 4],
    "heads": [0, 16, 2, 2],
    "joined": [0, 16, 4],
    "mixed": [0, 8, 8],
    "pairs": [0, 2, 32],
    "axis1": [1],
    "flat": [-1],
    "zero": [0],
    "two": [2],
    "four": [4],
    "last": [2],
    "eight": [8],
    "sixteen": [16],
    "hw": [2, 3],
    "pads": [0, 0, 1, 1, 0, 0, 1, 1],
    "thirds": [4, 8],
}
NUMBERS = {"one": 1.0, "quarter": 0.25, "three": 3.0}
DOUBLE = "float[4] double = {1, 1, 2, 2}"
BLOCK = "flat_x = Reshape (sample, tokens) x = Transpose <perm = [0, 2, 1]> (flat_x)"
"""Tokens `x` [batch, 16, 4] of the sample."""
END = "turned = Transpose <perm = [0, 2, 1]> (y) epsilon = Reshape (turned, image)"
"""Tokens `y` back to an image."""


def factor_program(
    body: str, *, seed: int = 3, batch: int | str = "batch", conditions: tuple[str, ...] = ()
) -> Program:
    """`body` between `sample` and `epsilon`, float [batch, 4, 4, 4]; weights by name, random.

    `cond` may be a condition [batch, 4].
    """
    words = set(re.findall(r"\w+", body)) - {"sample"}
    declared = ", ".join(
        [f"float[{','.join(map(str, SHAPES[n]))}] {n}" for n in sorted(words & set(SHAPES))]
        + [
            f"int64[{len(INTEGERS[n])}] {n} = {{{', '.join(map(str, INTEGERS[n]))}}}"
            for n in sorted(words & set(INTEGERS))
        ]
        + [f"float {n} = {{{v}}}" for n, v in NUMBERS.items() if n in words]
        + [DOUBLE] * ("double" in words)
    )
    more = f", float[{batch},4] cond" if "cond" in conditions else ""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[{batch},4,4,4] sample, int64[{batch}] timestep{more}) => (float[{batch},4,4,4] epsilon)
    <{declared}> {{ {body} }}""")
    rng = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        if name in SHAPES:
            array = rng.standard_normal(SHAPES[name]).astype(np.float32)
            value.const_value = ir.tensor(array, name=name)
    for node in model.graph:
        for v in node.inputs:
            if v is not None and v.name in SHAPES and v.name != "sample" and v.const_value is None:
                array = rng.standard_normal(SHAPES[v.name]).astype(np.float32)
                v.const_value = ir.tensor(array, name=v.name)
                model.graph.register_initializer(v)
    return program_of(infer_shapes(model), shape=(CHANNELS, 4, 4), num_train=6, conditions=conditions)


def outputs(program: Program, folder: Path, conditions: Mapping[str, npt.NDArray[Any]] | None = None) -> Any:
    """epsilon at one timestep for two seeded samples."""
    x = np.random.default_rng(1).standard_normal((2, *program.shape)).astype(np.float32)
    with Executor(program.model, folder, threads=1) as executor:
        called = executor.call(program.signature, x, program.deployment.timesteps[1], conditions)
    return called[program.signature.output]


def change(
    program: Program,
    folder: Path,
    rewrite: Callable[[ir.Graph, Names], None],
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
) -> float:
    """Return the relative difference of the outputs before and after a rewrite of the graph in place."""
    before = outputs(program, folder, conditions)
    rewrite(program.graph, Names(program.graph))
    remove_dead(program.graph)
    return relative_difference(before, outputs(program, folder, conditions))
