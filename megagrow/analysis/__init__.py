"""Analysis of finished runs: loss curves, speedup of growth, plots and tables."""
