"""The run directory: what a run leaves on disk, and who may read it. Fields and units: ``docs/run-directory.md``."""

from phi3v.runlog.directory import EVAL_MOMENTS, EvalMoment, RunDirectory
from phi3v.runlog.environment import environment

__all__ = ["EVAL_MOMENTS", "EvalMoment", "RunDirectory", "environment"]
