"""What distillation adds: each student against the control, the same network trained without a teacher."""

from collections.abc import Sequence

import numpy as np

from kdq_lightning.report.claims import closest_reference, format_difference
from kdq_lightning.report.rows import Row, whole_rows
from kdq_lightning.report.significance import LEVEL, Difference, holm, paired_bootstrap
from kdq_lightning.report.tables import MISSING, Entry, Table, bit_widths, heading
from kdq_lightning.runs.records import FLOAT_BITS

Gains = dict[str, dict[int, Difference]]
"""Of each row, by its label, accuracy minus the control's at the same bit width, in points."""


def gains_over_control(rows: Sequence[Row]) -> Gains:
    """Return the gains of the rows that have a control of the same network.

    The p-values of a row are adjusted together (Holm).
    """
    whole = whole_rows(rows)
    controls = [row for row in whole if row.strategy == "control"]
    networks = {control.network for control in controls}
    gains: Gains = {}
    for row in whole:
        if row.strategy not in ("teacher", "control") and row.network in networks:
            tests = {bits: test for bits in row.cells if (test := _gain(row, bits, controls)) is not None}
            adjusted = holm([test.p for test in tests.values()])
            gains[row.label] = {bits: tests[bits]._replace(p=p) for bits, p in zip(tests, adjusted, strict=True)}
    return gains


def _gain(row: Row, bits: int, controls: Sequence[Row]) -> Difference | None:
    """Return the difference from the control that is most like the row, None if either knows no right answers."""
    same = [control for control in controls if control.network == row.network]
    able = [control for control in same if bits in control.cells and control.cells[bits].correct]
    if not row.cells[bits].correct or not able:
        return None
    own, other = row.cells[bits].correct, closest_reference(row, bits, able).cells[bits].correct
    return paired_bootstrap(np.stack(list(own.values())), np.stack(list(other.values())))


def table_of_gains(gains: Gains, rows: Sequence[Row]) -> Table:
    """Return the gains, a row a student; the columns are those of a table of `rows`."""
    widths = bit_widths(rows)
    lines = [
        [Entry(label), *(Entry(format_difference(tests[bits]) if bits in tests else MISSING) for bits in widths)]
        for label, tests in gains.items()
    ]
    return Table(["", *(heading(bits, []) for bits in widths)], lines)


def sentence_of_gains(gains: Gains) -> str:
    """Say at which bit widths each student is better or worse than the control."""
    parts, every = [], max(map(len, gains.values()))
    for label, tests in gains.items():
        verdicts = []
        for verdict, sign in (("better", 1), ("worse", -1)):
            widths = [bits for bits, test in tests.items() if test.p < LEVEL and sign * test.points > 0]
            if widths:
                verdicts.append(f"{verdict} at {'every bit width' if len(widths) == every else _listed(widths)}")
        parts.append(f"{label} {' and '.join(verdicts) or 'not distinguishable'}")
    single = [label for label, tests in gains.items() if any(test.runs == 1 for test in tests.values())]
    doubt = f" With one seed on a side, so tested against the images' chance alone: {', '.join(single)}."
    return f"Against the control: {'; '.join(parts)}.{doubt if single else ''}"


def _listed(widths: Sequence[int]) -> str:
    """Return "2, 4 bits and float"."""
    quantized = ", ".join(str(bits) for bits in widths if bits != FLOAT_BITS)
    return " and ".join([*([f"{quantized} bits"] if quantized else []), *(["float"] if FLOAT_BITS in widths else [])])
