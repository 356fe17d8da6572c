"""Results -> tables, figures, one self-contained HTML page."""

from sam_optim.report.overview import results_page
from sam_optim.report.page import write_page
from sam_optim.report.pictures import (
    contour_picture,
    save_picture,
    sharpness_picture,
    slices_picture,
    spectrum_picture,
    surface_picture,
)

__all__ = [
    "contour_picture",
    "results_page",
    "save_picture",
    "sharpness_picture",
    "slices_picture",
    "spectrum_picture",
    "surface_picture",
    "write_page",
]
