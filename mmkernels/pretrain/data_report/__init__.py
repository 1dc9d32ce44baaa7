"""`mmkernels data-report`: what is in a data set, and what is wrong with it, on one page.

mmkernels data-report folder:photos                             # look
mmkernels data-report folder:photos --drop broken,leaked        # and write a list of what training leaves out
mmkernels pretrain --data folder:photos --filter data-reports/photos/drop.jsonl
"""

from mmkernels.pretrain.data_report.cli import data_report, main
from mmkernels.pretrain.data_report.settings import DataReport

__all__ = ["DataReport", "data_report", "main"]
