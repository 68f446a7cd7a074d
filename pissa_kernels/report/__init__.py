"""What an initialisation did: as objects, as a table, as a file, and as pictures."""

from .layer import LayerReport
from .report import REPORT_NAME, Report, find_report

__all__ = ["REPORT_NAME", "LayerReport", "Report", "find_report"]
