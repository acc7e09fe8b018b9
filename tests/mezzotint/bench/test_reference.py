"""The float model of a bundle: opened once, imported with the bundle's signature, compared by its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from mezzotint.bench import reference as reference_module
from mezzotint.bench.reference import ReferenceModel
from mezzotint.inspect.measure import PageOptions, measure_sections
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.session import Denoiser
from tests.helpers.models import THREADS, Compiled


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were opened as a reference."""
    files: list[Path] = []

    class Counted(Denoiser):
        def __init__(self, model: Path, *args: object, **options: object) -> None:
            files.append(model)
            super().__init__(model, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_module, "Denoiser", Counted)
    return files


def test_the_network_is_opened_once_until_it_is_closed(hand: Compiled, opened: list[Path]) -> None:
    reference = ReferenceModel(hand.bundle, hand.exported, threads=THREADS)
    assert opened == []
    first = reference.network
    assert reference.network is first and opened == [hand.exported]
    reference.close()
    reference.close()
    assert reference.network is not first and opened == 2 * [hand.exported]


def test_a_page_opens_the_reference_once(hand: Compiled, opened: list[Path]) -> None:
    data = measure_sections(hand.bundle, PageOptions(hand.exported, pictures=1, calls=0, threads=THREADS))
    assert len(data["pictures"]["rows"]) == 3 and data["speed"]["float_ms"] > 0
    assert opened == [hand.exported]


def test_the_graph_has_the_signature_and_the_weights_of_the_bundle(hand: Compiled, tmp_path: Path) -> None:
    reference = ReferenceModel(hand.bundle, str(hand.exported))
    program = reference.program(tmp_path)
    assert program.signature == hand.bundle.signature and program.shape == hand.bundle.sample_shape
    assert reference.has_weights_of(program)


def test_a_missing_file_is_refused(hand: Compiled) -> None:
    with pytest.raises(InputError, match="no such float model") as refusal:
        ReferenceModel(hand.bundle, "none.onnx").check()
    assert "mezzotint export" in str(refusal.value.hint)
