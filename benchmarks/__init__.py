"""Programs that make docs/results, run in the project's folder as `python -m benchmarks.NAME`; not part of the wheel."""
