"""A step's traces as rows of a shape that others read."""

from pathlib import Path

from potstill.core.errors import DataError, StoreError
from potstill.core.records import read_records
from potstill.core.store import Artifact
from potstill.data.shapes import WrittenShape
from potstill.pipeline.outputs import WrittenRows, record_rows, write_rows

__all__ = ["export_rows"]


def export_rows(place: Path, output: Path, shape: WrittenShape) -> WrittenRows:
    """Write the traces of a step (a run's step folder, or an artifact's) as a new JSONL file of a shape.

    Raises StoreError where the file is there already or the place is no artifact, DataError where it holds
    no traces, or none that has the shape.
    """
    if output.exists():
        raise StoreError("is there already", where=str(output), mend="name a new file as --output")
    records = read_records(record_rows(Artifact.open(place)))
    output.parent.mkdir(parents=True, exist_ok=True)
    written = write_rows(records, output, shape)
    if not written.rows:
        output.unlink()
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in written.left_out.items())
        raise DataError(f"no row can be written ({reasons or 'there are none'})", where=str(place))
    return written
