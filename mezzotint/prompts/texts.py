"""Prompts as text: a file with one in each line, or the list that comes with the package."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mezzotint.compiler.errors import ConditionError
from mezzotint.runtime.json_text import read_text

DEFAULT_PROMPTS = "default"
PROMPTS_FILE = Path(__file__).parents[1] / "assets" / "prompts.txt"
"""128 prompts that were written for this package: people, animals, places, things, styles, words inside of images."""
HELD_OUT = 4  # at the end of the list, that nothing is calibrated on where components are measured
MOST_PROMPTS = 4096
LONGEST_PROMPT = 4000  # characters; text encoders cut prompts off at some hundred tokens
MOST_TEXT_BYTES = 16 << 20


@dataclass(frozen=True)
class PromptTexts:
    """Prompts in their order, and the one that guidance leads away from. Raises ConditionError for none or too many."""

    prompts: tuple[str, ...]
    negative: str = ""
    where: str = "--prompts"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConditionError("there are no prompts", where=self.where, hint="write one in each line")
        if len(self.prompts) > MOST_PROMPTS:
            raise ConditionError(
                f"{len(self.prompts)} prompts, the limit is {MOST_PROMPTS}",
                where=self.where,
                hint="calibration reads as many as it has samples (--calibration-samples)",
            )
        for number, text in enumerate((*self.prompts, self.negative), 1):
            if len(text) > LONGEST_PROMPT:
                which = "the negative prompt" if number > len(self.prompts) else f"prompt {number}"
                raise ConditionError(
                    f"{which} has {len(text)} characters, the limit is {LONGEST_PROMPT}",
                    where=self.where,
                    hint="shorten it: text encoders read some hundred tokens",
                )

    def first(self, count: int) -> PromptTexts:
        """Return the first so many prompts."""
        return PromptTexts(self.prompts[:count], self.negative, self.where)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the texts."""
        text = json.dumps([list(self.prompts), self.negative], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_prompts(source: str | Path, negative: str | None = None) -> PromptTexts:
    """Return the prompts of a text file, one in each line, or of DEFAULT_PROMPTS. Empty lines are left out."""
    path = PROMPTS_FILE if str(source) == DEFAULT_PROMPTS else Path(source)
    text = read_text(
        path,
        "the prompts",
        ConditionError,
        hint=f"give a text file with a prompt in each line, or --prompts {DEFAULT_PROMPTS}",
        most=MOST_TEXT_BYTES,
    )
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    return PromptTexts(lines, negative or "", str(source))


def held_out_prompts() -> tuple[str, ...]:
    """Return the prompts of the package that components are measured on."""
    return read_prompts(DEFAULT_PROMPTS).prompts[-HELD_OUT:]
