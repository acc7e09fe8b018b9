"""Summaries of a bundle of several precisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.bundle.precisions import spans
from mezzotint.runtime.sampling.deployment import Deployment

from . import console


def mix_summary(bundle: Bundle) -> dict[str, Any]:
    """Return the main facts of a mixed bundle."""
    mixture = bundle.manifest.require_mixture()
    entries = mixture.precisions.values()
    return {
        "bundle": str(bundle.path),
        "precisions": {
            name: {key: getattr(entry, key) for key in ("file", "calls", "cost", "bytes", "bytes_alone")}
            for name, entry in mixture.precisions.items()
        },
        "precision_of_call": list(mixture.calls),
        "bytes": sum(entry.bytes for entry in entries) + mixture.shared_bytes,
        "bytes_alone": sum(entry.bytes_alone for entry in entries),
        "shared_bytes": mixture.shared_bytes,
        **mixture.choice,
        "digest": bundle.manifest.digest,
    }


def mix_rows(summary: dict[str, Any]) -> dict[str, str]:
    """Return mix_summary for display."""
    size, alone = summary["bytes"] / 1e6, summary["bytes_alone"] / 1e6
    return {
        "bundle": summary["bundle"],
        "choice": _rule(summary),
        "mean cost": f"{summary['mean_cost']:.3f} of the most expensive precision's ({_cost(summary['cost'])})",
        "left out": ", ".join(summary["unused"]) or "none",
        "size": f"{size:.2f} MB, {alone:.2f} MB apart; {summary['shared_bytes'] / 1e6:.2f} MB are shared",
        "noise correction": summary["correction"],
        "digest": summary["digest"],
    }


def print_precisions(bundle: Bundle) -> None:
    """Print the precisions of a mixed bundle, and the calls that use them."""
    mixture, timesteps = bundle.manifest.require_mixture(), bundle.deployment.calls
    rows = [
        (name, entry.file, f"{entry.bytes / 1e6:.2f}", f"{entry.cost:.3f}", entry.calls)
        for name, entry in mixture.precisions.items()
    ]
    title = f"precisions, {_rule(mixture.choice)}"
    console.print_table(title, ("precision", "file", "MB of its own", "cost of a call", "calls"), rows)
    table = mixture.choice["snr_db"]
    noise = mixture.choice["schedule_snr_db"]
    runs = [
        (
            str(first) if first == last else f"{first} to {last}",
            f"{timesteps[first]:g}" if first == last else f"{timesteps[first]:g} to {timesteps[last]:g}",
            name,
            _range(table[name][first : last + 1]),
            _range(noise[first : last + 1]),
        )
        for first, last, name in spans(mixture.calls)
    ]
    console.print_table(
        "network calls", ("call", "timestep", "precision", "SNR of the prediction, dB", "of the schedule, dB"), runs
    )


def precisions_of(bundle: Bundle, plan: Deployment) -> dict[str, str]:
    """Return how often a deployment uses each precision; empty for a bundle of one precision."""
    if bundle.precisions is None:
        return {}
    used = Counter(bundle.precisions.of(plan.solver(bundle.schedule).steps))
    return {"precisions": ", ".join(f"{name}: {count} calls" for name, count in used.items())}


def _rule(choice: Mapping[str, Any]) -> str:
    if choice["rule"].startswith("relaxed"):
        return f"{choice['rule']} {choice['fraction']:g} of the calls"
    tau = choice["threshold_db"]
    if tau is None:
        bound = "the best at each call"
    elif choice["rule"] == "picture":
        bound = f"a call adds at most {-tau:.1f} dB to the image"
    else:
        bound = f"{tau:+.1f} dB above the schedule"
    return bound if choice["budget"] is None else f"{bound}, within a budget of {choice['budget']:g}"


def _cost(how: dict[str, Any]) -> str:
    if how["kind"] == "given":
        return "as given"
    threads = "onnxruntime's choice of" if how["threads"] is None else how["threads"]
    calls = ", ".join(f"{name} {ms:.2f} ms" for name, ms in how["call_ms"].items())
    return f"measured on {threads} threads, batch {how['batch']}: {calls}"


def _range(values: list[float | None]) -> str:
    """Return the range of values in dB. None stands for infinity: no error, or no noise."""
    known = [value for value in values if value is not None]
    if not known:
        return "no error"
    low, high = min(known), max(known)
    return f"{low:.1f}" if len(values) == 1 else f"{low:.1f} to {high:.1f}"
