"""Hostile inputs for commands, and what may come of each: a right result, or one error of ours.

`Battery.run` runs one command of the command line in a worker process that serves many of them, because starting
Python costs more than most commands. The worker may die (a damaged model can crash onnxruntime) or hang: the battery
kills it, records the problem and starts another one. `Outcome.problem` is empty for the outcomes that are allowed:

- exit code 0, or exit code 2 with a message of ours and without a traceback;
- a refusal takes at most REFUSAL_SECONDS of processor time and REFUSAL_BYTES of memory, and leaves no output;
- no file of `world` changes except under `targets`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
REFUSAL_SECONDS = 10.0
REFUSAL_BYTES = 1 << 30
HANG_SECONDS = 60.0  # of the clock, for anything: the machine may be busy with other work
LONGEST_MESSAGE = 20_000  # characters of one error
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


@dataclass(frozen=True)
class Outcome:
    """What one command did. `seconds` are of the processor, `memory` is the growth of its peak in bytes."""

    arguments: tuple[str, ...]
    code: int | None
    out: str
    err: str
    seconds: float
    memory: int
    problem: str

    @property
    def refused(self) -> bool:
        return self.code == 2


class Battery:
    """One worker process, restarted when it dies. Use it as a context manager; `outcomes` has every outcome."""

    def __init__(self, *, hang: float = HANG_SECONDS) -> None:
        self.outcomes: list[Outcome] = []
        self._hang = hang
        self._worker: subprocess.Popen[str] | None = None

    def __enter__(self) -> Battery:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    @property
    def problems(self) -> list[str]:
        """The problems so far, each with its command, ready for an assertion."""
        return self.problems_since(0)

    def problems_since(self, start: int) -> list[str]:
        """The same of the outcomes from a number on."""
        outcomes = self.outcomes[start:]
        return [f"{' '.join(o.arguments)[:300]}: {o.problem}" for o in outcomes if o.problem]

    def run(
        self,
        arguments: Sequence[object],
        *,
        world: Path,
        targets: Sequence[Path] = (),
        partial: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Outcome:
        """Run `mezzotint ARGUMENTS` in the folder `world`, and return its outcome.

        `targets` are the files or folders that the command may write. With `partial` a refused command may leave
        output there, as `sample` leaves the shards that it has drawn.
        """
        words = tuple(map(str, arguments))
        before = snapshot(world, targets)
        had = [os.path.lexists(target) for target in targets]
        answer = self._ask({"arguments": words, "world": str(world), "environment": environment or {}})
        problem = answer.pop("problem")
        code = answer["code"]
        if not problem and (changed := differences(before, snapshot(world, targets))):
            problem = f"files outside the target changed: {', '.join(changed[:5])}"
        new = [str(t) for t, old in zip(targets, had, strict=True) if not old and os.path.lexists(t)]
        if not problem and code == 2 and new and not partial:
            problem = f"a refused command left {new[0]}"
        outcome = Outcome(words, problem=problem, **answer)
        self.outcomes.append(outcome)
        if log := os.environ.get("MEZZOTINT_BATTERY_LOG"):  # for tools/battery.py
            facts = {"command": words[0], "code": code, "problem": problem}
            with Path(log).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "seconds": outcome.seconds, "memory": outcome.memory}) + "\n")
        return outcome

    def _ask(self, case: dict[str, Any]) -> dict[str, Any]:
        start = time.monotonic()
        worker = self._started()
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(case) + "\n")
        worker.stdin.flush()
        ready, _, _ = select.select([worker.stdout], [], [], self._hang)
        line = worker.stdout.readline() if ready else ""
        if line:
            return dict(json.loads(line))
        self._stop()
        died = f"the process died with {worker.returncode}" if ready else f"it hangs: {self._hang:g} s and no end"
        return {
            "code": None,
            "out": "",
            "err": "",
            "seconds": time.monotonic() - start,
            "memory": 0,
            "problem": died,
        }

    def _started(self) -> subprocess.Popen[str]:
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.battery"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        return self._worker

    def _stop(self) -> None:
        if self._worker is None:
            return
        worker, self._worker = self._worker, None
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            worker.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def snapshot(world: Path, targets: Sequence[Path] = ()) -> dict[str, tuple[int, int, int]]:
    """Return mode, size and time of change of everything in a folder, except what is under `targets`."""
    left_out = {world / target for target in targets}
    facts: dict[str, tuple[int, int, int]] = {}
    folders = [world]
    while folders:
        for path in folders.pop().iterdir():
            if path in left_out:
                continue
            state = path.lstat()
            if stat.S_ISDIR(state.st_mode):  # its size and time follow from the names in it
                folders.append(path)
                facts[str(path)] = (state.st_mode, 0, 0)
            else:
                facts[str(path)] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return facts


def differences(before: dict[str, tuple[int, int, int]], after: dict[str, tuple[int, int, int]]) -> list[str]:
    """Return the paths that came, went or changed."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def judged(code: object, out: str, err: str, seconds: float, memory: int) -> str:
    """Return what is wrong with an exit code and what was printed; an empty text for an allowed outcome."""
    if code not in (0, 2):
        return f"exit code {code}: {(err or out)[-300:]}"
    for name, text in (("output", out), ("messages", err)):
        if "Traceback (most recent call last)" in text:
            return f"a traceback in the {name}: {text[-600:]}"
        if found := _CONTROL.search(text.replace("\r\n", "\n").replace("\x1b", "")):
            return f"a control character in the {name}: {found.group()!r}"
    if code == 2:
        if "this is a fault of Mezzotint" in err:
            return f"an error that is not ours: {err[:300]}"
        if not err.strip():
            return "it is refused without a message"
        if len(err) > LONGEST_MESSAGE:
            return f"the message has {len(err)} characters"
        if seconds > REFUSAL_SECONDS:
            return f"it took {seconds:.1f} s to be refused"
        if memory > REFUSAL_BYTES:
            return f"it took {memory / 1e9:.1f} GB to be refused"
    return ""


def run_here(arguments: Sequence[str]) -> tuple[object, str, str, str]:
    """Run a command in this process; return its exit code, output, messages, and the traceback of what escaped."""
    import typer.main

    from mezzotint.cli.app import app

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    escaped = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            typer.main.get_command(app).main(list(arguments), prog_name="mezzotint")
        except SystemExit as left:
            code = 0 if left.code is None else left.code
        except BaseException:
            code, escaped = 1, traceback.format_exc()
    return code, out.getvalue(), err.getvalue(), escaped


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak(reset: bool) -> int:
    """Return the peak of this process's memory in bytes, and start measuring anew. 0 where the system has no /proc."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _serve(requests: IO[str], answers: IO[str]) -> None:
    usual = dict(os.environ)
    for line in requests:
        case = json.loads(line)
        os.chdir(case["world"])
        os.environ.clear()
        os.environ.update({**usual, **case["environment"]})
        before, start = _peak(reset=True), _processor_seconds()
        code, out, err, escaped = run_here(case["arguments"])
        seconds, memory = _processor_seconds() - start, max(0, _peak(reset=False) - before)
        problem = f"an exception escaped: {escaped[-1500:]}" if escaped else judged(code, out, err, seconds, memory)
        answer = Outcome((), code if isinstance(code, int) else 1, out, err, seconds, memory, problem)
        fields = {key: value for key, value in asdict(answer).items() if key != "arguments"}
        answers.write(json.dumps(fields) + "\n")
        answers.flush()


if __name__ == "__main__":
    # The commands, and onnxruntime below Python, may print: the pipe of the answers is no longer descriptor 1.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as pipe:
        os.dup2(2, 1)
        _serve(sys.stdin, pipe)
