"""`kdq report`: write the report from the records below some folders; it needs no checkpoint and no image."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kdq_lightning.commands.arguments import OneLineErrors
from kdq_lightning.errors import check_range
from kdq_lightning.files import parse_bytes, write_atomically
from kdq_lightning.report.document import ReportOptions, compose
from kdq_lightning.report.findings import find
from kdq_lightning.report.read_rows import read_rows
from kdq_lightning.report.table_formats import Table


def main(args: list[str]) -> int:
    """Write the report, print the answer and the report's path, and return the exit code 0."""
    parser = OneLineErrors(prog="kdq report", description="Tables, figures and the answer, from records alone.")
    parser.add_argument("folders", nargs="+", type=Path, help="Folders; every record below them is read.")
    parser.add_argument("--out", type=Path, default=Path("report"), help="Folder that gets report.md and the rest.")
    parser.add_argument(
        "--max_bytes", type=str | None, default=None, help="Budget of the file to ship, such as 100kB, 1.5MB or 50000."
    )
    parser.add_argument(
        "--min_accuracy", type=float | None, default=None, help="Accuracy that the file to ship must have, percent."
    )
    parser.add_argument(
        "--published", action="store_true", help="Add the published value and the difference to each cell."
    )
    options = parser.parse_args(args)
    max_bytes = None if options.max_bytes is None else parse_bytes(options.max_bytes, "--max_bytes")
    write_report(options.folders, options.out, ReportOptions(max_bytes, options.min_accuracy, options.published))
    return 0


def write_report(folders: list[Path], out: Path, options: ReportOptions | None = None) -> Path:
    """Write the report on every record below the folders, and print the answer.

    Equal records give equal files, to the byte.

    Args:
        folders: Folders of runs.
        out: Folder that gets the files; it is made if it doesn't exist.
        options: What the user asks for.

    Returns:
        Path of `report.md`.

    Raises:
        UserError: If there is no record, one is damaged, an option is out of range, or `out` can't be written.
    """
    options = options or ReportOptions()
    if options.min_accuracy is not None:
        check_range("--min_accuracy", options.min_accuracy, low=0, high=100, including_low=True)
    datasets, notes = read_rows(folders)
    report = compose([find(rows) for rows in datasets.values()], notes, options)
    for name, content in report.files.items():
        write_atomically(out / name, content)
    console = Console()
    is_wrapped = console.is_terminal  # between words; a file gets whole paragraphs
    for number, paragraph in enumerate(report.answer.replace("**", "").split("\n\n")):
        is_command = paragraph.startswith("    ")  # which is to be copied whole
        console.print(
            "\n" * (number > 0) + paragraph, markup=False, highlight=False, soft_wrap=is_command or not is_wrapped
        )
    for dataset, table in report.advice.items():
        console.print(_shown(dataset, table))
    if report.advice:
        print("test, %: on the test images, mean ± standard deviation over seeds")
    print(f"\nThe whole report: {out / 'report.md'}")
    return out / "report.md"


def _shown(dataset: str, table: Table) -> RichTable:
    """Return the first columns of a table for the terminal: the report has the whole one."""
    shown = RichTable(title=f"\n{dataset}: what to ship", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column, title in enumerate(table.header[:3]):
        shown.add_column(title, justify="left" if column == 1 else "right", no_wrap=column != 1)
    for row in table.rows:
        shown.add_row(*(Text(entry.text) for entry in row[:3]))
    return shown
