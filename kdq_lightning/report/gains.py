"""What distillation adds: each student against the control, the same network trained without a teacher."""

from collections.abc import Sequence

import numpy as np

from kdq_lightning.report.claims import format_difference, most_alike
from kdq_lightning.report.rows import Row, whole_rows
from kdq_lightning.report.significance import Difference, holm, paired_bootstrap
from kdq_lightning.report.tables import MISSING, Entry, Table, bit_widths, heading


def table_of_gains(rows: Sequence[Row]) -> Table | None:
    """Return accuracy minus the control's at the same bit width, in points; None if there is no such pair.

    The p-values of a row are adjusted together (Holm).
    """
    controls = [row for row in whole_rows(rows) if row.strategy == "control"]
    networks = {control.network for control in controls}
    students = [
        row for row in whole_rows(rows) if row.strategy not in ("teacher", "control") and row.network in networks
    ]
    if not students:
        return None
    widths = bit_widths(students)
    lines = []
    for row in students:
        tests = {bits: test for bits in widths if (test := _gain(row, bits, controls)) is not None}
        adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
        texts = [
            format_difference(tests[bits]._replace(p=adjusted[bits])) if bits in tests else MISSING for bits in widths
        ]
        lines.append([Entry(row.label), *map(Entry, texts)])
    return Table(["", *(heading(bits, []) for bits in widths)], lines)


def _gain(row: Row, bits: int, controls: Sequence[Row]) -> Difference | None:
    """Return the difference from the control that is most like the row, None if either knows no right answers."""
    same = [control for control in controls if control.network == row.network]
    able = [control for control in same if bits in control.cells and control.cells[bits].correct]
    if bits not in row.cells or not row.cells[bits].correct or not able:
        return None
    own, other = row.cells[bits].correct, most_alike(row, bits, able).cells[bits].correct
    return paired_bootstrap(np.stack(list(own.values())), np.stack(list(other.values())))
