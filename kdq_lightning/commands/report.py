"""`kdq report`: reads records below folders and writes the report; nothing else is needed, no checkpoint, no image."""

from pathlib import Path

from jsonargparse import ArgumentParser

from kdq_lightning.errors import check_range
from kdq_lightning.files import write_atomically
from kdq_lightning.report.document import compose
from kdq_lightning.report.rows import read_rows
from kdq_lightning.report.sentences import ReportOptions


def main(args: list[str]) -> int:
    """Write the report and say where it lies."""
    parser = ArgumentParser(prog="kdq report", description="Tables, figures and the answer, from records alone.")
    parser.add_argument("folders", nargs="+", type=Path, help="Folders; every record below them is read.")
    parser.add_argument("--out", type=Path, default=Path("report"), help="Folder that gets report.md and the rest.")
    parser.add_argument("--max_bytes", type=float | None, default=None, help="Budget of the file to ship, in bytes.")
    parser.add_argument(
        "--min_accuracy", type=float | None, default=None, help="Accuracy that the file to ship must have, percent."
    )
    parser.add_argument(
        "--published", action="store_true", help="Add the published value and the difference to each cell."
    )
    options = parser.parse_args(args)
    wanted = ReportOptions(options.max_bytes, options.min_accuracy, options.published)
    write_report(options.folders, options.out, wanted)
    return 0


def write_report(folders: list[Path], out: Path, options: ReportOptions | None = None) -> Path:
    """Write the report of every record below the folders into `out`, print the answer, and return its `report.md`.

    Equal records give equal files, to the byte.

    Raises:
        UserError: If there is no record, one is damaged, an option is out of range, or `out` can't be written.
    """
    options = options or ReportOptions()
    if options.max_bytes is not None:
        check_range("--max_bytes", options.max_bytes, low=0)
    if options.min_accuracy is not None:
        check_range("--min_accuracy", options.min_accuracy, low=0, high=100, including_low=True)
    datasets, notes = read_rows(folders)
    report = compose(datasets, notes, options)
    for name, content in report.files.items():
        write_atomically(out / name, content)
    print(report.answer)
    print(f"\nThe whole report: {out / 'report.md'}")
    return out / "report.md"
