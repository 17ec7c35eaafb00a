"""Measuring spiking layers beside their peers, each in a process of its own; ``recipes/benchmark.py`` is its face."""

from sj_robust.benchmarking.methods import METHODS, build
from sj_robust.benchmarking.race import Measurement, race

__all__ = ["METHODS", "Measurement", "build", "race"]
