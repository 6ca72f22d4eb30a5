"""The report of one or several runs: a self-contained HTML page and PNG curves, made from run folders alone.

`run/reading.py` reads run folders (also of a run that is still training, or was killed while it wrote),
`run/summary.py` derives the figures of the table, `panels.py` decides which curves there are, `curves.py` draws them,
`page.py` fills the templates `report.html` and `tables.html`. Open `page.build_report` first. No module here imports
torch, deepspeed or matplotlib at import time.
"""

from jp_train.tools.report.page import build_report

__all__ = ["build_report"]
