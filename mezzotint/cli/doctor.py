"""`mezzotint doctor`: this machine, and the engines that run on it."""

from __future__ import annotations

from .options import Json


def doctor(json: Json = False) -> None:
    """Print versions, CPU features, which engines are usable here, and what to install for the others."""
    from ..doctor import examine, untested_onnxruntime
    from ..engine_states import engine_states, omp_threads
    from ..text import console

    report = {**examine(), "omp_num_threads": omp_threads()}
    if report["packages"]["onnxruntime"] is not None and (warning := untested_onnxruntime()):
        console.print_warning(warning)
    engines = engine_states()
    if json:
        console.print_json({**report, "engines": [state.to_json() for state in engines]})
        return
    packages = {name: v or "not installed" for name, v in report.pop("packages").items()}
    features = report.pop("cpu_features")
    report["cpu_features"] = (
        "not listed by this system" if features is None else ", ".join(features) or "none that matter"
    )
    report["omp_num_threads"] = report["omp_num_threads"] or "not set"
    console.print_pairs("mezzotint doctor", {**report, **packages})
    rows = [
        (
            state.name,
            "yes" if state.usable else "no",
            state.version or "",
            ", ".join(state.precisions),
            state.used or (f"{state.why}; {state.install}" if state.install else state.why) or "",
        )
        for state in engines
    ]
    columns = ("name", "usable", "version", "--precision", "what it uses, or why not")
    console.print_table("engines, --provider", columns, rows)
