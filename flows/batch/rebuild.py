"""Report files that were torn are written again from the journal, or set aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flows.entries import EndEntry, ModelEntry
from flows.journal import Journal, open_journal
from quant_core.model.atomic import discard
from tasks.rows import TABLES, Row, RunRow

# pyarrow is imported only where it is needed: a run begins before.

MAGIC = b"PAR1"  # the first and the last bytes of a Parquet file


def rebuild(folder: Path) -> tuple[list[Path], int]:
    """Write the reports of all runs that the journal of an output folder holds; heal the others.

    Returns the files that were written, and how many lines of the journal are spoiled.

    Raises: RequestError if a batch is working there.
    """
    from tasks.report import write_table

    with open_journal(folder) as journal:
        heal(folder, journal, is_whole=_can_be_read)
        written = []
        for end in _ends(journal):
            for name, rows in _tables(journal, end).items():
                written.append(write_table(folder / "reports", name, end.run_id, rows))
        return written, journal.skipped_lines


def heal(folder: Path, journal: Journal, is_whole: Callable[[Path], bool] | None = None) -> None:
    """Write again every torn report file that the journal knows, and set the others aside.

    One torn file would keep readers from all others. Set aside means that its name begins with a
    dot, which they pass over.

    is_whole  how torn files are recognized; None: by their first and last bytes alone
    """
    is_whole = is_whole or _begins_and_ends_well
    reports = folder / "reports"
    torn = [path for name in TABLES for path in (reports / name).glob("*.parquet")]
    torn = [path for path in torn if not path.name.startswith(".") and not is_whole(path)]
    if not torn:
        return
    from tasks.report import write_table

    ends = {end.run_id: end for end in _ends(journal)}
    for path in torn:
        tables = _tables(journal, ends[path.stem]) if path.stem in ends else {}
        if path.parent.name in tables:
            discard(path)  # it may be a folder
            write_table(reports, path.parent.name, path.stem, tables[path.parent.name])
        else:
            aside = path.with_name(f".{path.name}.torn")
            discard(aside)
            path.replace(aside)


def _can_be_read(path: Path) -> bool:
    """Whether every value of a Parquet file can be read, which takes as long as to read it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException):
        return False
    return True


def _begins_and_ends_well(path: Path) -> bool:
    """Whether the file begins and ends as a Parquet file does."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(MAGIC))
            file.seek(-len(MAGIC), 2)
            return begin == MAGIC == file.read()
    except OSError:
        return False


def _ends(journal: Journal) -> list[EndEntry]:
    return [entry for entry in journal.entries if isinstance(entry, EndEntry)]


def _tables(journal: Journal, end: EndEntry) -> Mapping[str, Sequence[Row]]:
    """The tables of one run. Of a model that it tried twice the last entry counts."""
    latest: dict[str, ModelEntry] = {}
    for entry in journal.models():
        if entry.run_id == end.run_id:
            latest[entry.row.output] = entry
    return tables_of([*latest.values()], end.row)


def tables_of(entries: Sequence[ModelEntry], run: RunRow | None) -> dict[str, Sequence[Row]]:
    """The tables of a run and of the models that it finished; that of runs last, if its row is
    known: whoever finds a run there finds the other rows.
    """
    tables: dict[str, Sequence[Row]] = {
        "layers": [row for entry in entries for row in entry.layers],
        "timings": [row for entry in entries for row in entry.timings],
        "models": [entry.row for entry in entries],
    }
    return tables | {"runs": [run]} if run else tables
