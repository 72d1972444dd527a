"""Programs to run, to read and to copy from (README.md); measurements are in `benchmarks`."""
