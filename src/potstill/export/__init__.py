"""What a run made, in other programs' files: another trainer's data and settings, a plain model, rows."""

from potstill.export.huggingface import export_huggingface
from potstill.export.llamafactory import Exported, export_llamafactory, sharegpt_row
from potstill.export.rows import export_rows

__all__ = ["Exported", "export_huggingface", "export_llamafactory", "export_rows", "sharegpt_row"]
