"""Reporters of progress: bars in a terminal, lines in a notebook, nothing in a pipe."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

import mezzotint
from mezzotint import progress
from mezzotint.progress import Bars, Lines, Progress, auto, shown, silent, stage


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def in_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace standard error. Not a fixture, because pytest replaces it again between a fixture and its test."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def notebook(monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def work(report: Progress) -> None:
    """Two stages, one inside the other."""
    report("passes", 0, 2)
    report("observe", 0, 3)
    report("observe", 3, 3)
    report("passes", 1, 2)
    report("passes", 2, 2)


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_terminal(monkeypatch)
    report = auto()

    assert isinstance(report, Bars)
    work(report)
    assert "observe" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h"), "the display ended: the cursor is shown again"


def test_the_display_of_bars_begins_again_with_the_next_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_terminal(monkeypatch)
    report = auto()
    work(report)
    before = len(terminal.getvalue())

    work(report)

    later = terminal.getvalue()[before:]
    assert "2/2" in later
    assert later.rstrip("\n").endswith("\x1b[?25h")


def test_bars_that_are_dropped_in_the_middle_show_the_cursor_again(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_terminal(monkeypatch)
    report = Bars()
    report("passes", 1, 2)
    assert not terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")

    del report

    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_a_command_that_fails_shows_the_cursor_again(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_terminal(monkeypatch)
    with pytest.raises(ValueError, match="stopped"), shown() as report:
        report("passes", 1, 2)
        raise ValueError("stopped")

    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    assert auto() is silent


def test_a_notebook_gets_a_line_for_each_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook(monkeypatch, SimpleNamespace(kernel=object()))

    report = auto()

    assert isinstance(report, Lines)
    work(report)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" in ")[0] for line in lines] == ["observe: 3 done", "passes: 2 done"]


def test_a_detail_that_changes_belongs_to_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    terminal = in_terminal(monkeypatch)
    for report in (Lines(lines.append), Bars()):
        report("train", 0, 2)
        report("train | loss 0.7", 1, 2)
        report("train | loss 0.3", 2, 2)
    assert [line.partition(" in ")[0] for line in lines] == ["train | loss 0.3: 2 done"]
    assert "loss 0.3" in terminal.getvalue()
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h"), "no second bar waits for its end"


@pytest.mark.parametrize("shell", [None, SimpleNamespace()])
def test_ipython_in_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
    in_terminal(monkeypatch)
    notebook(monkeypatch, shell)

    assert isinstance(auto(), Bars)


def test_a_command_in_a_pipe_writes_a_line_for_each_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown() as report:
        work(report)
    with shown(quiet=True) as report:
        work(report)

    written = capsys.readouterr()
    assert written.out == ""
    assert [line.partition(" in ")[0] for line in written.err.splitlines()] == ["observe: 3 done", "passes: 2 done"]


def test_a_stage_that_fails_is_not_done() -> None:
    calls: list[tuple[str, int, int]] = []
    with stage(lambda *call: calls.append(call), "load torch"):
        pass
    with pytest.raises(ValueError, match="stopped"), stage(lambda *call: calls.append(call), "import digits"):
        raise ValueError("stopped")

    assert calls == [("load torch", 0, 1), ("load torch", 1, 1), ("import digits", 0, 1)]


def test_it_is_a_part_of_the_package() -> None:
    assert mezzotint.progress is progress
