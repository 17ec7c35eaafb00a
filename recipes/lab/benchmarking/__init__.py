"""Layers and training steps beside their peers, each in a process of its own; ``recipes/benchmark.py`` is the face."""

from lab.benchmarking.race import ALLOCATORS, Measurement, race
from lab.benchmarking.subjects import SUBJECTS, MethodGroup, Task

__all__ = ["ALLOCATORS", "SUBJECTS", "Measurement", "MethodGroup", "Task", "race"]
