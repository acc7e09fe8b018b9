"""The marker of each test: what it needs (pure, onnxruntime, torch, browser), and whether it is slow.

`make quick` runs the pure and the onnxruntime tests that are not slow. The tables name files and folders of tests/, and
fixtures; a test of no table needs onnxruntime. `check` holds the tables while the tests run: it fails a test that opens
a session or loads torch without the marker for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
NEEDS = ("pure", "onnxruntime", "torch", "browser")
BROWSER_FIXTURES = frozenset({"chromium"})
TORCH_FIXTURES = frozenset({"unet", "conditional", "dit", "whole"})

TORCH = (
    "compiler/audit/test_fusion.py",
    "compiler/bundle/test_writer.py",
    "compiler/components/",
    "compiler/frontend/architectures/",
    "compiler/frontend/test_exports.py",
    "compiler/frontend/test_from_torch.py",
    "compiler/graph/test_block_models.py",
    "compiler/rescaling/test_models.py",
    "compiler/torch_graph/",
    "compiler/training/test_learned_scales.py",
    "compiler/training/test_torch_device.py",
    "passes/test_distill.py",
    "passes/test_learn_scales.py",
    "passes/test_reconstruct.py",
    "mezzotint/cli/",
    "mezzotint/debug/",
    "mezzotint/evaluate/test_extractors.py",
    "mezzotint/evaluate/test_run.py",
    "mezzotint/inspect/",
    "mezzotint/interchange/",
    "mezzotint/io/test_sources.py",
    "mezzotint/mix/",
    "mezzotint/pipeline/",
    "mezzotint/test_api.py",
    "mezzotint/test_diffusers.py",
    "mezzotint/test_doctor.py",
    "mezzotint/test_recard.py",
    "mezzotint/test_prompts.py",
    "mezzotint/test_stand_ins.py",
    "passes/test_allocate_steps.py",
    "passes/test_fit_noise.py",
    "passes/test_settle_scales.py",
    "passes/test_smooth_scales.py",
    "passes/test_split_shortcuts.py",
    "runtime/bundle/test_model_config.py",
    "runtime/diffusers/",
    "runtime/sampling/test_samplers.py",
    "runtime/sampling/test_schedule.py",
    "runtime/sampling/test_solvers.py",
    "tools/test_leaderboard.py",
    "tools/test_train_",
    "whole/",
)
PURE = (
    "compiler/audit/test_tensorrt.py",
    "compiler/bits/test_allocation.py",
    "compiler/bits/test_content.py",
    "compiler/bits/test_parts.py",
    "compiler/bundle/test_staging.py",
    "compiler/calibration/test_collect.py",
    "compiler/core/test_stats.py",
    "compiler/correction/test_noise_report.py",
    "compiler/frontend/test_roles.py",
    "compiler/frontend/test_sample_shape.py",
    "compiler/graph/",
    "compiler/mixing/test_choice.py",
    "compiler/mixing/test_noise.py",
    "compiler/low_rank/",
    "compiler/pruning/",
    "compiler/rescaling/test_axes.py",
    "compiler/rescaling/test_smoothing.py",
    "compiler/rounding/test_codebook.py",
    "compiler/rounding/test_matrix.py",
    "compiler/rounding/test_vectors.py",
    "compiler/scales/test_codebooks.py",
    "compiler/scales/test_ranges.py",
    "compiler/scales/test_tdq.py",
    "docs/test_pages.py",
    "mezzotint/evaluate/test_metrics.py",
    "mezzotint/test_options.py",
    "mezzotint/text/",
    "mezzotint/test_progress.py",
    "mezzotint/web/test_onnxruntime_web.py",
    "passes/recipes/",
    "passes/test_group_steps.py",
    "runtime/bundle/test_ranges.py",
    "runtime/sampling/test_correction.py",
    "runtime/sampling/test_noise_fit.py",
    "runtime/sampling/test_steps.py",
    "runtime/test_compare.py",
    "runtime/test_streams.py",
    "runtime/test_tables.py",
    "test_architecture.py",
    "test_style.py",
    "test_tiers.py",
    "tools/test_battery.py",
    "tools/test_docs.py",
    "tools/test_packaging.py",
    "tools/test_replay.py",
    "tools/test_simulate_cluster.py",
)
SLOW = (
    "compiler/audit/test_kernels.py",
    "compiler/audit/test_versions.py",
    "compiler/bundle/test_range_rows.py",
    "compiler/bundle/test_storage.py",
    "compiler/components/",
    "compiler/core/test_islands.py",
    "compiler/frontend/architectures/",
    "compiler/core/test_snapshot.py",
    "compiler/lowering/test_layout.py",
    "compiler/lowering/test_constant.py",
    "compiler/scales/test_row_inputs.py",
    "docs/test_method.py",
    "docs/test_readme.py",
    "docs/test_tutorial.py",
    "mezzotint/cluster/test_cluster.py",
    "mezzotint/pipeline/",
    "mezzotint/shards/",
    "passes/test_assign_bits",
    "passes/test_choose_levels.py",
    "passes/test_choose_scales.py",
    "passes/test_correct_",
    "passes/test_dilate_weights.py",
    "passes/test_freeze_time.py",
    "passes/test_observe.py",
    "passes/test_prune_weights.py",
    "passes/test_round_weights.py",
    "tools/test_experiment.py",
    "tools/test_leaderboard.py",
    "tools/test_packaging.py",
    "tools/test_train_",
    "whole/",
)
TABLES = {"TORCH": TORCH, "PURE": PURE, "SLOW": SLOW}


def need(file: str, fixtures: frozenset[str]) -> str:
    """Return the largest need of a test: of its file, relative to tests/, and of its fixtures."""
    if fixtures & BROWSER_FIXTURES:
        return "browser"
    if fixtures & TORCH_FIXTURES or file.startswith(TORCH):
        return "torch"
    return "pure" if file.startswith(PURE) else "onnxruntime"


def mark(items: list[pytest.Item]) -> None:
    """Give each test its marker, and `slow` where the table says so."""
    for item in items:
        file = item.path.relative_to(TESTS).as_posix()
        item.add_marker(need(file, frozenset(getattr(item, "fixturenames", ()))))
        if file.startswith(SLOW):
            item.add_marker("slow")


def is_quick(file: str) -> bool:
    """Whether `--quick` collects a test file at all: importing torch takes seconds, even where no test of it runs."""
    return not file.startswith((*TORCH, *SLOW))


@contextmanager
def check(item: pytest.Item) -> Iterator[None]:
    """Fail a pure test that opens a session, and a test that is the first to load torch without being marked."""
    marker = next(name for name in NEEDS if item.get_closest_marker(name))
    had_torch = "torch" in sys.modules
    with pytest.MonkeyPatch.context() as patch:
        if marker == "pure" and "onnxruntime" in sys.modules:
            patch.setattr(sys.modules["onnxruntime"], "InferenceSession", _refuse)
        yield
    if marker in ("pure", "onnxruntime") and "torch" in sys.modules and not had_torch:
        pytest.fail(f"it loads torch, and is marked {marker}; give its file a line in tests/helpers/tiers.py")


def _refuse(*arguments: object, **options: object) -> None:
    pytest.fail("it opens an onnxruntime session, and is marked pure; see tests/helpers/tiers.py")
