"""One self-contained HTML file out of a run directory."""

from phi3v.report.page import write_report

__all__ = ["write_report"]
