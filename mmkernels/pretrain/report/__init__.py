"""`report.html` of a run, and `mmkernels compare`."""

from mmkernels.pretrain.report.figures import figure_table
from mmkernels.pretrain.report.page import write_report

__all__ = ["figure_table", "write_report"]
