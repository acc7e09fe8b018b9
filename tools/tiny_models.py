"""Networks of every registered class, made small: the tests of the rows and docs/models.md compile these."""

from __future__ import annotations

from tools.tiny_network import TinyModel
from tools.tiny_transformers import TINY_TRANSFORMERS
from tools.tiny_unets import TINY_UNETS

TINY: dict[str, TinyModel] = {**TINY_UNETS, **TINY_TRANSFORMERS}
