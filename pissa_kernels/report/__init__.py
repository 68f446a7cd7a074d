"""Reports of an initialization: objects, text tables, JSON files, pictures and an HTML page."""

from .layer import LayerReport
from .quantization import Quantization
from .report import REPORT_NAME, Report, find_report

__all__ = ["REPORT_NAME", "LayerReport", "Quantization", "Report", "find_report"]
