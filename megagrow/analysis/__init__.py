"""What came out of runs: their curves, the speedup of growth, plots and tables."""
