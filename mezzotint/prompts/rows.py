"""Conditions of prompts for a compilation or an evaluation: checked, encoded, and kept in a cache if there is one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import isqrt
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from mezzotint.compiler.core.cache import Cache, EntryForm
from mezzotint.compiler.frontend.architectures.row import SampleSize
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling.guidance import Conditions

from .pipeline import PromptPipeline, prompt_pipeline
from .texts import PromptTexts, read_prompts

_ENTRY = EntryForm("prompts", "the conditions of prompts", 1)
_CONDITIONS, _UNCONDITIONAL = "conditions.", "unconditional."
_LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True, eq=False)
class PromptPlan:
    """Prompts, and the pipeline that will encode them. Nothing but texts and configurations has been read."""

    pipeline: PromptPipeline
    texts: PromptTexts


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Conditions `[prompts, ...]`, unconditional rows `[1, ...]` (none without guidance), and what they are made of."""

    conditions: Conditions
    unconditional: Conditions
    facts: Mapping[str, Any]


def prompt_plan(folder: Path, prompts: str | Path, negative: str | None, count: int) -> PromptPlan:
    """Return the first `count` prompts with the pipeline of a folder. Raises ConditionError."""
    return PromptPlan(prompt_pipeline(folder), read_prompts(prompts, negative).first(count))


def prompt_rows(
    plan: PromptPlan,
    *,
    guided: bool,
    size: SampleSize | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> PromptRows:
    """Return the rows of a plan. Raises ConditionError, see `encode_prompts`, and StatsError for a damaged cache."""
    from .encode import encode_prompts

    texts, pipeline = plan.texts, plan.pipeline
    facts = {
        "count": len(texts.prompts),
        "sha256": texts.digest,
        "pipeline": pipeline.class_name,
        "encoders_sha256": pipeline.digest(),
    }
    name = f"prompts-{_key(facts, guided, size)}"
    known = None if cache is None else cache.load(_ENTRY, name, lambda data, folder: load_file(folder / _ENTRY.arrays))
    if known is not None:
        both: dict[str, Any] = known
    else:
        conditions, unconditional = encode_prompts(pipeline, texts, guided=guided, size=size, progress=progress)
        both = {f"{_CONDITIONS}{name}": rows for name, rows in conditions.items()}
        both |= {f"{_UNCONDITIONAL}{name}": rows for name, rows in unconditional.items()}
        if cache is not None:
            cache.keep(_ENTRY, name, lambda folder: _written(both, folder))
    halves = [
        {name.removeprefix(prefix): rows for name, rows in both.items() if name.startswith(prefix)}
        for prefix in (_CONDITIONS, _UNCONDITIONAL)
    ]
    return PromptRows(halves[0], halves[1], facts)


def _written(rows: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    save_file(dict(rows), folder / _ENTRY.arrays)
    return {}


def bundle_rows(
    bundle: Bundle,
    folder: Path,
    prompts: str | Path,
    negative: str | None,
    count: int,
    progress: Progress | None = None,
) -> PromptRows:
    """Return the rows of prompts for a bundle, by the pipeline in a folder."""
    signature, shape = bundle.signature, bundle.sample_shape
    size = signature.sides(shape)
    if len(shape) == 2 and signature.channel_axis == len(shape):  # tokens of a square image, in front of the packing
        size = (2 * isqrt(shape[0]),) * 2
    plan = prompt_plan(folder, prompts, negative, count)
    return prompt_rows(plan, guided=bundle.deployment.guided, size=size, progress=progress)


def _key(facts: Mapping[str, Any], guided: bool, size: SampleSize | None) -> str:
    known = [dict(facts), guided, size, [version(name) for name in _LIBRARIES]]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
