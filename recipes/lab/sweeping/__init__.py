"""Grids of experiments: planned, performed as jobs, summarised beside published accuracies."""
