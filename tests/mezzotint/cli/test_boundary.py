"""Every exception becomes one error, and says whose fault it is."""

from __future__ import annotations

import errno
import os

import pytest

from mezzotint.cli import boundary
from mezzotint.cli.boundary import SystemRefusal, Unexpected, as_error
from mezzotint.runtime.errors import InputError
from tests.helpers.models import Cli


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (InputError("ours"), InputError, "ours"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "secret"), SystemRefusal, "Permission denied"),
        (MemoryError(), SystemRefusal, "not enough memory"),
        (ValueError("odd"), Unexpected, "unexpected ValueError: odd"),
        (RecursionError("deep"), Unexpected, "unexpected RecursionError"),
    ],
)
def test_each_exception_is_one_error(error: Exception, kind: type, words: str) -> None:
    shown = as_error(error)
    assert type(shown) is kind
    assert words in shown.what
    assert kind is not Unexpected or "fault of Mezzotint" in str(shown.hint)


@pytest.mark.parametrize("way", ["plain", "--debug", "variable"])
def test_a_fault_has_a_traceback_on_request(way: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("planted\nerror: forged")

    monkeypatch.setattr("mezzotint.doctor.examine", broken)
    if way == "variable":
        monkeypatch.setenv(boundary.DEBUG_VARIABLE, "1")
    said = cli("doctor", *(["--debug"] if way == "--debug" else []))
    assert said.code == 2
    assert "unexpected ZeroDivisionError: planted error: forged\n" in said.err
    assert ("Traceback" in said.err) == (way != "plain")


def test_an_interrupt_is_no_error_of_ours(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mezzotint.doctor.examine", stopped)
    said = cli("doctor")
    assert said.code == 130
    assert "error:" not in said.err
