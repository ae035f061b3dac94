"""What is mutated, and which tests should notice: the modules that decide pictures and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A part of the house -> files of the package, and the test files or folders that look at them.
PARTS: dict[str, list[tuple[str, str]]] = {
    "patching": [
        ("patching/options/schedule.py", "patching/options/test_schedule.py planning/test_plan.py"),
        ("patching/report.py", "tuning/test_attention_error.py patching/test_patch.py"
         " test_showing.py"),
        ("patching/run/*.py", "patching/run patching/swap/test_hold.py"
         " patching/swap/test_guide.py"),
        ("patching/attention/[dlm]*.py", "patching/test_patch.py patching/attention"),
        ("patching/transformer.py", "patching/test_patch.py patching/test_combinations.py"
         " patching/test_custom_model.py patching/test_lifetime.py patching/swap/test_cache.py"
         " patching/test_wrapped.py"),
        ("patching/options/settle.py", "patching/options pipelines/test_presets.py"),
    ],
    "patterns": [
        ("patterns/axes.py", "patterns methods/test_static_methods.py methods/test_methods.py"),
        ("patterns/build.py", "patterns methods/test_static_methods.py methods/test_methods.py"),
        ("patterns/grid.py", "patterns methods/test_static_methods.py methods/test_methods.py"),
        ("patterns/packed.py", "patterns patching/attention/test_modes.py"),
        ("patterns/pattern.py", "patterns methods/test_static_methods.py test_showing.py"),
        ("patterns/tiles.py", "patterns methods/test_static_methods.py methods/test_methods.py"),
    ],
    "methods": [
        ("methods/axis.py", "methods/test_static_methods.py methods/test_neighborhood.py"),
        ("methods/base.py", "methods/test_methods.py methods/test_wrapper.py methods/larger"
         " test_checking.py"),
        ("methods/disc.py", "methods/test_static_methods.py methods/test_fit_on_grids.py"),
        ("methods/dynamic/*.py", "methods/dynamic"),
        ("methods/learned/files.py", "tuning/test_distill.py methods/linear/test_linear.py"),
        ("methods/linear/*.py", "methods/linear/test_linear.py methods/linear/test_piecewise.py"
         " tuning/test_distill.py"),
        ("methods/longer.py", "methods/test_longer.py"),
        ("methods/neighborhood.py", "methods/test_neighborhood.py methods/test_static_methods.py"
         " methods/test_fit_on_grids.py"),
        ("methods/radial/*.py", "methods/test_methods.py methods/test_static_methods.py"
         " methods/test_fit_on_grids.py"),
        ("methods/selection.py", "methods/dynamic/test_dynamic.py"
         " methods/temporal/test_temporal_tiles.py"),
        ("methods/sliding_tile.py", "methods/test_static_methods.py methods/test_fit_on_grids.py"),
        ("methods/temporal/*.py", "methods/temporal/test_temporal_tiles.py"
         " patching/run/test_temporal_state.py"),
        ("methods/window.py", "methods/test_window.py methods/test_static_methods.py"),
        ("methods/wrapper.py", "methods/test_wrapper.py methods/temporal/test_temporal_tiles.py"),
    ],
    "kernels": [
        ("kernels/active_tiles/[art]*.py", "kernels/active_tiles/test_active_tiles.py"
         " methods/temporal/test_temporal_tiles.py kernels/test_asked.py"),
        ("kernels/block_sparse/[arw][pe]*.py", "kernels/block_sparse/test_block_sparse.py"),
        ("kernels/block_sparse/int8/[lr]*.py", "kernels/block_sparse/test_int8.py"),
        ("kernels/block_sparse/fp8/[lr]*.py", "kernels/block_sparse/test_fp8.py"),
        ("kernels/block_sparse/torch_plan/*.py", "kernels/block_sparse/test_block_sparse.py"
         " kernels/block_sparse/test_views.py kernels/block_sparse/test_chooser.py"),
        ("kernels/blocks.py", "kernels/test_blocks.py kernels/block_sparse/test_block_sparse.py"),
        ("kernels/dense.py", "kernels/block_sparse/test_block_sparse.py"
         " patching/attention/test_masks.py"),
        ("kernels/linear/[agfr][a-z]*.py", "methods/linear/test_linear.py"
         " kernels/linear/test_linear_triton.py kernels/test_asked.py"),
        ("kernels/merge.py", "kernels/test_merge.py"),
        ("kernels/pieces.py", "kernels/virtual_tokens/test_virtual_tokens.py"
         " methods/linear/test_piecewise.py"),
        ("kernels/selection/*.py", "kernels/selection"),
        ("kernels/virtual_tokens/[ar]*.py", "kernels/test_asked.py"
         " kernels/virtual_tokens/test_virtual_tokens.py"
         " methods/linear/test_piecewise.py"),
    ],
    "quality": [
        ("eval/quality/distances.py", "eval/test_metrics_distances.py"),
        ("eval/quality/metrics.py", "eval/test_metrics.py"),
        ("eval/quality/[eist]*.py", "eval/test_quality.py eval/test_quality_examples.py"
         " cli/test_eval_cli.py eval/test_details.py"),
    ],
    "sweep": [
        ("eval/sweep/store.py", "eval/sweep/test_sweep.py eval/sweep/test_spec.py"),
        ("eval/sweep/[dpq]*.py", "eval/sweep/test_sweep.py eval/sweep/test_spec.py"
         " eval/sweep/test_pictures.py"),
        ("eval/sweep/s[cep]*.py", "eval/sweep/test_sweep.py eval/sweep/test_spec.py"),
        ("eval/sweep/report/[rstv]*.py", "eval/sweep/report eval/sweep/test_sweep.py"),
    ],
    "targets": [
        ("targets/*.py", "targets"),
        ("tuning/attention_error.py", "tuning/test_attention_error.py"),
        ("tuning/calibration.py", "tuning/test_temporal_calibration.py"),
        ("tuning/[pt]*.py", "tuning/test_tune.py tuning/test_temporal_calibration.py"
         " tuning/test_unfinished.py tuning/test_front.py cli/test_tune.py"),
    ],
    "planning": [("planning/*.py", "planning patching/options")],
}  # fmt: skip
# What looks at everything: property tests, and those that were written for edits none noticed.
EVERYWHERE = "proof"
# What looks at classes and defaults, which are outside of functions: run for every edit there.
OUTSIDE = (
    "tests/test_house.py::test_dataclasses_stay_as_they_are",
    "tests/proof/test_defaults.py::test_defaults_are_those_that_were_meant",
)
# What is collected: a test of any of these that enters an edited function is run.
COLLECTED = sorted(
    {f"tests/{name}" for rows in PARTS.values() for _, tests in rows for name in tests.split()}
    | {f"tests/{EVERYWHERE}", "tests/test_house.py"}
)


@dataclass(frozen=True)
class Target:
    """A file to mutate.

    Attributes:
        part: the part of the house that it counts for.
        file: below the package's folder.
        tests: test files and folders, below the folder of tests.
    """

    part: str
    file: str
    tests: tuple[str, ...]


def targets(package: Path) -> Iterator[Target]:
    """All files of the table that exist."""
    for part, rows in PARTS.items():
        for pattern, tests in rows:
            for path in sorted(package.glob(pattern)):
                if path.stat().st_size and "triton" not in path.name and path.name != "__init__.py":
                    name = path.relative_to(package).as_posix()
                    yield Target(part, name, (*tests.split(), EVERYWHERE))
