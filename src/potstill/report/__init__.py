"""Reports of runs: one offline HTML page a run, comparisons, model cards and tables for the terminal."""

from potstill.report.card import model_card
from potstill.report.comparison import comparison_table, write_comparison
from potstill.report.page import write_report
from potstill.report.ratings import rating_table
from potstill.report.results import results_of
from potstill.report.text import terminal_table
from potstill.report.view import RunView, StepView

__all__ = [
    "RunView",
    "StepView",
    "comparison_table",
    "model_card",
    "rating_table",
    "results_of",
    "terminal_table",
    "write_comparison",
    "write_report",
]
