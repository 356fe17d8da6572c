"""Many checkpoints, many measures, resumable."""

from sam_optim.sweep.columns import Measures
from sam_optim.sweep.landscape import Grid, draw_landscape
from sam_optim.sweep.problems import FunctionProblem, ImageProblem
from sam_optim.sweep.reports import write_report
from sam_optim.sweep.store import Entry
from sam_optim.sweep.study import Sweep, measure_checkpoints
from sam_optim.sweep.text import TextProblem

__all__ = [
    "Entry",
    "FunctionProblem",
    "Grid",
    "ImageProblem",
    "Measures",
    "Sweep",
    "TextProblem",
    "draw_landscape",
    "measure_checkpoints",
    "write_report",
]
