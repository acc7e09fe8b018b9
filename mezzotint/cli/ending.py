"""How a command ends: by a signal it removes what it began, and what it printed has to arrive."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

SIGNALS = ("SIGTERM", "SIGHUP")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, by an exception: hidden folders are removed.

    A handler of the caller stays, and a thread other than the main one can set none.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def output_arrives() -> Iterator[None]:
    """Write all of standard output by the end, so that a full disk is an error of the command. Raises OSError.

    Without a buffer (PYTHONUNBUFFERED), Python drops the rest of a text that a nearly full disk takes in part: the
    command gets a buffer. A stream that is closed (`>&-`) takes everything and keeps nothing.
    """
    streams = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, ExitStack() as buffers:
        sys.stdout = buffers.enter_context(_buffered(streams[0])) or nowhere
        sys.stderr = streams[1] or nowhere
        try:
            try:
                yield
            finally:
                sys.stdout.flush()
        except OSError:
            give_up(sys.stdout)
            raise
        finally:
            sys.stdout, sys.stderr = streams


def give_up(stream: TextIO) -> None:
    """Let what is left in a stream's buffer go nowhere: Python would try again at its end, with its own message."""
    with suppress(OSError, ValueError), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()


@contextmanager
def _buffered(stream: TextIO | None) -> Iterator[TextIO | None]:
    """Yield the stream, or one with a buffer for the same file; the file stays open."""
    raw = getattr(stream, "buffer", None)
    if stream is None or not isinstance(raw, io.RawIOBase):
        yield stream
        return
    buffer = io.BufferedWriter(raw)
    text = io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
    try:
        yield text
    finally:
        text.detach()
        buffer.detach()
