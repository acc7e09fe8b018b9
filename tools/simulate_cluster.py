"""Simulates a run on a cluster that is not here: the ledger of mezzotint/cluster, on measured times of pieces.

    python -m tools.simulate_cluster            write docs/scale.md
    python -m tools.simulate_cluster --print    print the page

Events are taken in the order of their time: a machine arrives, a worker has a result, a machine is lost. Workers take
the oldest piece that was handed out. The driver does one thing at a time. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill

import numpy as np

from mezzotint.cluster.driver import AHEAD
from mezzotint.cluster.ledger import Ledger

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
ARRIVES, RESULT, LOST = range(3)


@dataclass(frozen=True)
class Scenario:
    """A run. `image` is the time of an image on one worker, `spread` its relative deviation from piece to piece.

    `dispatch` is the driver's time for a piece. `slow` is the share of machines that take `slowness` times as long.
    Machines arrive evenly within `arrival`, fetch `weights` through the driver's uplink of `bandwidth` bytes a second,
    which doubles with each generation of machines that has them, and open them in `opening`. Each machine is lost at
    the rate `loss` per hour, and comes back after `arrival`; a piece crashes its worker with the probability `crash`.
    """

    images: int
    shard: int
    machines: int
    workers: int
    image: float
    threads: int = 2
    spread: float = 0.05
    dispatch: float = 0.0014
    slow: float = 0.02
    slowness: float = 3.0
    arrival: float = 300.0
    weights: float = 0.9e9
    bandwidth: float = 1.25e9
    opening: float = 20.0
    loss: float = 0.0
    crash: float = 0.0
    result_bytes: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a run took: seconds, the useful share of workers' time, the busy one of the driver's, pieces repeated."""

    seconds: float
    useful: float
    driver: float
    repeated: int
    given_up: int
    core_hours: float

    @property
    def hours(self) -> float:
        return self.seconds / 3600


def simulate(case: Scenario) -> Outcome:
    """Return the outcome of a run. The same scenario gives the same one."""
    rng = np.random.default_rng(case.seed)
    count = math.ceil(case.images / case.shard)
    ledger = Ledger(count)
    speed = np.where(rng.random(case.machines) < case.slow, case.slowness, 1.0)
    fetch = case.weights / case.bandwidth * (1 + math.log2(max(case.machines, 1)))
    events: list[tuple[float, int, int, int, int]] = []  # (time, order, kind, machine, worker of its life, piece)
    order = 0
    life = [0] * case.machines

    def push(when: float, kind: int, machine: int, piece: int = -1) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (when, order, kind, machine, piece * 1_000_000 + life[machine] if piece >= 0 else -1))

    for machine in range(case.machines):
        push(rng.random() * case.arrival + fetch + case.opening, ARRIVES, machine)
        if case.loss:
            push(rng.exponential(3600 / case.loss), LOST, machine)
    waiting: deque[int] = deque()  # pieces handed out that no worker has yet
    idle: deque[tuple[int, int]] = deque()  # (machine, its life) of each idle worker
    running: list[dict[int, float]] = [{} for _ in range(case.machines)]
    busy_until = 0.0  # of the driver
    driver = useful = wasted = 0.0
    repeated = outstanding = arrived = 0
    now = 0.0
    each = case.dispatch + case.result_bytes * case.shard / case.bandwidth

    def hand_out() -> None:
        nonlocal busy_until, driver, outstanding
        while outstanding < AHEAD * max(arrived, 1) * case.workers and (piece := ledger.take()) is not None:
            waiting.append(piece)
            outstanding += 1
        while waiting and idle:
            machine, of_life = idle.popleft()
            if of_life != life[machine]:
                continue
            piece = waiting.popleft()
            busy_until = max(busy_until, now) + each
            driver += each
            seconds = case.image * case.shard * speed[machine] * max(0.2, 1 + case.spread * rng.standard_normal())
            running[machine][piece] = busy_until
            push(busy_until + seconds, RESULT, machine, piece)

    while not ledger.is_over:
        now, _, kind, machine, code = heapq.heappop(events)
        if kind == ARRIVES:
            arrived += 1
            idle.extend([(machine, life[machine])] * case.workers)
        elif kind == LOST:
            life[machine] += 1
            arrived -= 1
            for piece, since in running[machine].items():
                wasted += max(0.0, now - since)
                repeated += 1
                outstanding -= 1
                ledger.failed(piece, "lost", lost=True)
            running[machine].clear()
            push(now + case.arrival + case.weights / case.bandwidth + case.opening, ARRIVES, machine)
            push(now + case.arrival + rng.exponential(3600 / case.loss), LOST, machine)
        else:
            piece, of_life = divmod(code, 1_000_000)
            if of_life != life[machine]:
                continue
            since = running[machine].pop(piece)
            outstanding -= 1
            idle.append((machine, of_life))
            if case.crash and rng.random() < case.crash:
                wasted += now - since
                repeated += 1
                ledger.failed(piece, "crashed")
            else:
                useful += now - since
                ledger.done(piece)
        hand_out()
    total = now * case.machines * case.workers
    hours = total * case.threads / 3600
    return Outcome(now, useful / total, driver / now, repeated, len(ledger.failures), hours)


SD = Scenario(1_000_000, 16, 1000, 8, image=211.0)
DIGITS = Scenario(1_000_000, 256, 100, 16, image=0.2, threads=1, weights=5e6, opening=3.0)


def table(title: str, cases: list[tuple[str, Scenario]]) -> list[str]:
    """Return a table of scenarios, as lines."""
    lines = [
        f"| {title} | hours | core-hours | workers useful | driver busy | pieces again | given up |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in cases:
        found = simulate(case)
        cells = [name, f"{found.hours:.2f}", f"{found.core_hours:,.0f}", f"{found.useful:.0%}", f"{found.driver:.1%}"]
        lines.append("| " + " | ".join([*cells, f"{found.repeated:,}", str(found.given_up)]) + " |")
    return [*lines, ""]


def page() -> str:
    """Return docs/scale.md."""
    sizes = [(f"{n} images", replace(SD, shard=n)) for n in (1, 4, 16, 64)]
    machines = [(f"{n:,} machines", replace(SD, machines=n, shard=4)) for n in (10, 100, 1000, 4000)]
    faults = [
        ("nothing fails", replace(SD, shard=4, slow=0.0)),
        ("2 % of machines take 3 times as long", replace(SD, shard=4)),
        ("and each machine is lost once in 20 hours", replace(SD, shard=4, loss=0.05)),
        ("once in 2 hours", replace(SD, shard=4, loss=0.5)),
        ("once in 2 hours, 64 images in a shard", replace(SD, shard=64, loss=0.5)),
        ("1 piece of 1000 ends its worker", replace(SD, shard=4, crash=0.001)),
        ("1 piece of 20 ends its worker", replace(SD, shard=4, crash=0.05)),
    ]
    small = [(f"{n} images", replace(DIGITS, shard=n)) for n in (16, 64, 256, 1024)]
    passing = [
        ("workers write to a URL", replace(DIGITS, shard=256)),
        ("npz through the driver (4 KiB an image)", replace(DIGITS, shard=256, result_bytes=4096)),
    ]
    measured = (
        f"Measured: a call of the Stable Diffusion 1.5 UNet at 64x64 latents with guidance takes 4.22 s on two threads "
        f"([measurements](measurements.md)), so 50 steps take {SD.image:.0f} s; a digit of 20 steps takes "
        f"{DIGITS.image:g} s on one thread. A piece costs the driver {1000 * SD.dispatch:.1f} ms. Assumed: eight "
        "workers of two threads on a machine, machines that arrive within five minutes, weights of 0.9 GB over 10 "
        "Gbit/s, 20 s to open them, times of pieces that vary by 5 %, and 2 % of the machines three times slower."
    )
    lines = [
        "# A million images on a thousand machines",
        "",
        fill(
            "By simulation: `python -m tools.simulate_cluster` runs the ledger of `mezzotint/cluster` (which piece "
            "comes next, how often it is tried) on times that were measured on one machine. No such cluster was used.",
            PAGE_WIDTH,
        ),
        "",
        fill(measured, PAGE_WIDTH),
        "",
        "## Stable Diffusion's size, 10^6 images",
        "",
        *table("images in a shard, 1,000 machines", sizes),
        *table("4 images in a shard", machines),
        *table("4 images in a shard, 1,000 machines", faults),
        "## Digits, 10^6 images, 100 machines of 16 workers",
        "",
        *table("images in a shard", small),
        *table("256 images in a shard", passing),
        "## What breaks first",
        "",
        *(fill(f"{i}. {text}", PAGE_WIDTH, subsequent_indent="   ") for i, text in enumerate(CONCLUSIONS, 1)),
    ]
    return "\n".join(lines).rstrip() + "\n"


PAGE_WIDTH = 118
CONCLUSIONS = (
    "*The size of a shard.* The usual 256 images of Stable Diffusion's size are a piece of 15 hours. Give a "
    "`--shard-size` that takes 5 to 15 minutes: the end of the run waits for the last pieces, and a lost machine "
    "throws away what it was doing.",
    "*Machines that live shorter than a few pieces.* A piece that was lost with ten machines is given up, and named. "
    "The same command draws it again, but with pieces of hours on machines of hours most of the work is thrown away.",
    "*Slow machines.* The last pieces are not handed out twice, so the end waits for the slowest machine: 2 % of "
    "machines at a third of the speed cost 7 % of the whole with pieces of a quarter of an hour.",
    "*A piece that ends its worker more often than by chance.* Three times is final: at 1 in 20 some are given up.",
    "*The arrival of the machines*, for runs of minutes.",
    "*The driver*: at 1.4 ms a piece it hands out 700 pieces a second, far more than any run above asks for. Shards of "
    "a local folder pass through it, those of a URL do not.",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", dest="shown", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    text = page()
    if args.shown:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
