"""Grids of experiments: planned, run in processes, summarised beside published figures."""

from sj_robust.sweeping.grid import expand, seeds_of
from sj_robust.sweeping.plan import PlannedRun, load_records, plan_runs
from sj_robust.sweeping.pool import Outcome, perform_all
from sj_robust.sweeping.recipe import Recipe, load_recipe
from sj_robust.sweeping.record import RunRecord

__all__ = [
    "Outcome",
    "PlannedRun",
    "Recipe",
    "RunRecord",
    "expand",
    "load_recipe",
    "load_records",
    "perform_all",
    "plan_runs",
    "seeds_of",
]
