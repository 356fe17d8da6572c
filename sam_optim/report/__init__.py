"""Results -> tables, figures, one self-contained HTML page."""

from sam_optim.report.overview import results_page
from sam_optim.report.page import write_page

__all__ = ["results_page", "write_page"]
