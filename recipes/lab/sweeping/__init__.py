"""Grids of experiments: planned, run in processes, summarised beside published figures; needs the extra ``recipes``."""

from lab.sweeping.grid import axes_of, expand, seeds_of
from lab.sweeping.plan import PlannedRun, load_records, plan_runs
from lab.sweeping.pool import EndedRun, executor_for, perform_all
from lab.sweeping.recipe import Recipe, load_recipe
from lab.sweeping.record import RunRecord
from lab.sweeping.summary import Cell, Statistic, axes_in, cells_of, columns_of

__all__ = [
    "Cell",
    "EndedRun",
    "PlannedRun",
    "Recipe",
    "RunRecord",
    "Statistic",
    "axes_in",
    "axes_of",
    "cells_of",
    "columns_of",
    "executor_for",
    "expand",
    "load_recipe",
    "load_records",
    "perform_all",
    "plan_runs",
    "seeds_of",
]
