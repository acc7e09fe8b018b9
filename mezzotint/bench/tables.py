"""The results of `mezzotint bench` as tables."""

from __future__ import annotations

from typing import Any

from mezzotint.runtime.compare import db_text
from mezzotint.runtime.engine import EngineUsage

from ..text import console

_FIDELITY = {
    "psnr_db_median": "PSNR of images, dB",
    "psnr_db_p10": "10th percentile, dB",
    "eps_sqnr_db": "SQNR of epsilon, dB",
    "eps_sqnr_db_worst_step": "worst step, dB",
}
"""The keys of a network's fidelity, and their columns."""


def print_bench(found: dict[str, Any]) -> None:
    """Print `Bench.to_json` as tables."""
    call, slow, floor, traced = found["call_ms"], found["float_call_ms"], found["floor"], found["profile"]
    calls = 2 * found["rounds"] * found["repeats"]
    pairs = {
        "onnxruntime": found["onnxruntime"] + ("" if found["onnxruntime_tested"] else " (not tested)"),
        **({} if found["engine"]["engine"] == "cpu" else {"engine": EngineUsage(**found["engine"]).text()}),
        "threads": f"{found['threads']}, pinned",
        "timestep": found["timestep"],
        **{f"input {name}": array for name, array in found["inputs"].items()},
        "one call": _call(call, calls),
    }
    if slow is not None:
        pairs["one float call"] = _call(slow, calls)
        low, high = found["speedup_range"]
        blocks = f"medians; {low:.2f} to {high:.2f} over {2 * found['rounds']} blocks in turns"
        pairs["speed-up"] = f"{found['speedup']:.2f}x ({blocks})"
    pairs["integer kernels alone"] = (
        f"{floor['share']:.1%} of the kernel time ({floor['integer_kernels_ms']:.3f} ms profiled); "
        f"the floor of the call is {floor['call_ms']:.3f} ms"
    )
    if (branches := found["branches"]) is not None:
        pairs["branches of low rank"] = (
            f"{branches['nodes']} nodes in float, {branches['share']:.1%} of the kernel time ({branches['ms']:.3f} ms)"
        )
    pairs["profiled call"] = f"{traced['call_ms']:.3f} ms, {traced['kernels_ms']:.3f} ms of it in kernels"
    console.print_pairs(found["bundle"], pairs)
    if found["peers"]:
        _print_peers(found)
    profiler = found["engine"]["library"].partition(" ")[0]
    title = f"one call under {profiler}'s profiler, {traced['nodes']} nodes, median of {traced['calls']} calls"
    for column, rows in (("group", found["groups"]), ("op", found["operations"])):
        cells = [(row[column], row["nodes"], f"{row['ms']:.3f}", f"{row['share']:.1%}") for row in rows]
        console.print_table(title, (column, "nodes", "ms", "share"), cells)
    for note in found["notes"]:
        console.print_line(note)


def _print_peers(found: dict[str, Any]) -> None:
    """Print the networks of the same float model, with speed, size and fidelity."""
    mine = {
        "peer": "this bundle",
        "error": None,
        "call_ms": found["call_ms"],
        "speedup": found["speedup"],
        "speedup_range": found["speedup_range"],
        "bytes": found["model_bytes"],
        "fidelity": found["fidelity"],
    }
    rows: list[tuple[str, ...]]
    rows = [("fp32 onnxruntime", f"{found['float_call_ms']['median']:.3f}", "1", _mb(found["float_bytes"]), *[""] * 4)]
    for peer in (mine, *found["peers"]):
        if peer["error"] is not None:
            rows.append((peer["peer"], "-", peer["error"], *["-"] * 5))
            continue
        low, high = peer["speedup_range"]
        speed = f"{peer['speedup']:.2f}x ({low:.2f} to {high:.2f})"
        fidelity = (db_text(peer["fidelity"][key], 2) for key in _FIDELITY)
        rows.append((peer["peer"], f"{peer['call_ms']['median']:.3f}", speed, _mb(peer["bytes"]), *fidelity))
    columns = ("", "one call, ms", "speed-up", "file", *_FIDELITY.values())
    title = f"beside peers, batch {found['batch']}, {found['threads']} threads, {found['fidelity']['pictures']} images"
    console.print_table(title, columns, rows)
    for line in found["advice"]:
        console.print_line(line)


def _call(latency: dict[str, float], calls: int) -> str:
    return f"{latency['median']:.3f} ms median, {latency['minimum']:.3f} ms minimum, {calls} calls"


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
