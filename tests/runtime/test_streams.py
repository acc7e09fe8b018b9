"""Random streams: the numbers that bundles depend on, keys that differ, and no generator seeded elsewhere."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from mezzotint.runtime import streams
from mezzotint.runtime.streams import FIXED, STREAMS, SeedOffset, noise_generator
from tools.rooms import ROOT, sources

TOPS = ("compiler", "passes", "runtime", "mezzotint")
OWNER = "runtime/streams.py"
IN_PROGRAMS = {"compiler/bundle/card_code.py": "the example programs of a card draw inputs of their own"}

# Pairs of streams that draw the same numbers at some place of one run, and why that does no harm.
SHARED = {
    ("exactness", "residuals"): "one draws inputs of a float graph, the other chooses positions in its outputs",
    ("conditions", "range networks"): "rows of conditions; first weights of network 12",
    ("exactness", "range networks"): "inputs of a check; first weights of network 14",
    ("range networks", "residuals"): "first weights of network 14; positions in outputs",
    ("bootstrap", "range networks"): "resamples of images after the run; first weights of network 0",
    ("bench conditions", "mix check"): "two commands that nothing passes between",
    ("bench conditions", "bootstrap"): "two commands that nothing passes between",
    ("bootstrap", "mix check"): "two commands that nothing passes between",
    ("bench conditions", "range networks"): "timing; first weights of network 0",
    ("mix check", "range networks"): "a check of copies; first weights of network 0",
}


def places(stream: streams.Stream) -> Iterator[tuple[int, ...]]:
    if stream is streams.RANGE_NETWORKS:
        yield from ((k,) for k in range(40))
    elif stream is streams.PROBES:
        yield from product(range(12), range(6), range(4))
    elif stream is streams.POSITIONS:
        yield from product(range(12), range(6), (1, 12, 14, 0x9F2B6C31))
    elif stream in (streams.TRAINING_BATCHES, streams.DROPPED_ELEMENTS):
        yield from ((crc,) for crc in (12, 14, 0x9F2B6C31))
    elif stream is streams.ADAPTERS:
        yield from ((), *product((12, 0x9F2B6C31), (14, 0x51C0FFEE)))
    else:
        yield ()


def keys(seed: int) -> Iterator[tuple[str, np.random.Generator]]:
    """Every generator of a run whose calibration has this seed, by the name of its stream."""
    for stream in STREAMS:
        fixed = stream in (streams.BENCH_CONDITIONS, streams.MIX_CHECK)
        seeds = {FIXED if fixed else seed}
        if stream is streams.CONDITIONS:
            seeds.add(SeedOffset.UNCONDITIONAL.after(seed))
        for one in seeds:
            for place in places(stream):
                yield stream.name, stream.generator(one, *place)
    for offset in (0, *SeedOffset):
        for image, draw in product(range(16), range(22)):
            yield f"noise {int(offset)}", noise_generator(seed + offset, image, draw)


def shared(seed: int) -> set[tuple[str, str]]:
    by_state: dict[int, set[str]] = defaultdict(set)
    for name, generator in keys(seed):
        by_state[generator.bit_generator.state["state"]["state"]].add(name)
    return {(a, b) for names in by_state.values() for a in names for b in names if a < b}


def test_streams_of_one_run_differ_apart_from_those_that_are_listed() -> None:
    found = set().union(*(shared(seed) for seed in (0, 1, 12, 42, 1234)))
    assert found == set(SHARED)


def test_a_seed_serves_one_purpose() -> None:
    assert len({0, *SeedOffset}) == 1 + len(SeedOffset)
    assert [offset.after(7) for offset in SeedOffset] == [8, 9, 10, 11, 12, 13, 14, 15, 1007]


@pytest.mark.parametrize(
    ("stream", "seed", "place", "key"),
    [
        (streams.CONDITIONS, 5, (), [5, 0xC]),
        (streams.EXACTNESS, 5, (), [5, 0xE]),
        (streams.RESIDUALS, 5, (), [5, 0xE]),
        (streams.PROBES, 5, (3, 1, 2), [5, 0x60B, 3, 1, 2]),
        (streams.RANGE_NETWORKS, 5, (3,), (5, 3)),
        (streams.POSITIONS, 5, (2, 1, 99), [5, 2, 1, 99]),
        (streams.TRAINING_BATCHES, 5, (99,), [5, 0xB, 99]),
        (streams.BOOTSTRAP, 5, (), 5),
        (streams.BENCH_CONDITIONS, FIXED, (), 0),
        (streams.MIX_CHECK, FIXED, (), 0),
    ],
)
def test_keys_are_those_that_bundles_were_made_with(
    stream: streams.Stream, seed: int, place: tuple[int, ...], key: object
) -> None:
    wanted = np.random.default_rng(key).standard_normal(4)  # type: ignore[arg-type]
    np.testing.assert_array_equal(stream.generator(seed, *place).standard_normal(4), wanted)


def test_noise_is_that_which_bundles_were_made_with() -> None:
    key = np.random.SeedSequence(5, spawn_key=(3, 2))
    wanted = np.random.Generator(np.random.PCG64(key)).standard_normal(4, np.float32)
    np.testing.assert_array_equal(noise_generator(5, 3, 2).standard_normal(4, np.float32), wanted)


def seeded(source: str) -> list[str]:
    """The calls in a file that seed a generator with something other than a name of runtime/streams.py."""
    seeders = {"default_rng", "SeedSequence", "RandomState", "PCG64", "Philox", "MT19937", "SFC64"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            literal = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if called in seeders or (called in ("manual_seed", "seed") and literal):
                found.append(f"line {node.lineno}: {called}")
            elif called in ("initial_noise", "seeded_noise") and literal:
                found.append(f"line {node.lineno}: {called} with a literal seed")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = [ast.unparse(side) for side in (node.left, node.right)]
            if any(side.split(".")[-1] in ("seed", "_seed") for side in sides):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "default_rng(" in node.value:
            found.append(f"line {node.lineno}: default_rng in a string")
    return found


def test_no_other_file_seeds_a_generator() -> None:
    problems = {}
    for path in sources(ROOT):
        name = path.relative_to(ROOT).as_posix()
        if name.split("/")[0] in TOPS and name != OWNER and (found := seeded(path.read_text(encoding="utf-8"))):
            problems[name] = found
    assert problems.keys() == IN_PROGRAMS.keys(), problems


@pytest.mark.parametrize(
    "line",
    [
        "rng = np.random.default_rng(seed)",
        "rng = default_rng([seed, 0xF])",
        "key = np.random.SeedSequence(seed)",
        "generator = torch.Generator().manual_seed(0)",
        "fresh = replace(context, seed=context.seed + 7)",
        "x = initial_noise(0, shape)",
        "lines = ['rng = np.random.default_rng(0)']",
    ],
)
def test_a_planted_seed_is_found(line: str) -> None:
    assert len(seeded(line)) == 1


@pytest.mark.parametrize("line", ["rng = streams.PROBES.generator(seed, 3)", "x = initial_noise(seed, shape)"])
def test_a_named_stream_is_no_seed_of_its_own(line: str) -> None:
    assert seeded(line) == []
