"""A study: arms x seeds, their jobs, what they left, paired differences with intervals, tables (docs/adding.md)."""

from t2i_rl.study.arms import Study
from t2i_rl.study.report import run_study

__all__ = ["Study", "run_study"]
