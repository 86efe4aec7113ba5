"""Whether distilling helped: each strategy against the control, the same network trained without a teacher."""

from collections.abc import Mapping, Sequence

from kdq_lightning.files import format_bytes
from kdq_lightning.quantization.methods import DEFAULT_METHOD, MIXED_METHOD
from kdq_lightning.report.duels import File
from kdq_lightning.report.findings import Findings
from kdq_lightning.report.formatting import format_p, format_summary
from kdq_lightning.report.rows import Row, by_method
from kdq_lightning.report.significance import Difference
from kdq_lightning.runs.records import FLOAT_BITS

Gains = Mapping[Row, Mapping[int, Difference]]


def sentences_on_distilling(findings: Findings) -> str:
    """Say which strategies are better than the control, and where; then how the file to ship compares with it.

    Strategies are counted by the files of one method, the default if there are such.

    Returns:
        The sentences; nothing if no distilled network can be compared with a control.
    """
    gains = {row: tests for row, tests in findings.gains.items() if row.method != MIXED_METHOD and not row.is_teachers}
    if not gains:
        return ""
    methods = by_method(list(gains))
    rows = next(iter(methods.values()))
    better, worse = (_where({row: gains[row] for row in rows}, wanted) for wanted in (1, -1))
    helped = {name for names in better.values() for name in names}
    others = [name for name in _names(rows) if all(name not in names for names in (*better.values(), *worse.values()))]
    alike = "alike by the default method" if rows[0].method == DEFAULT_METHOD and len(methods) > 1 else "alike"
    than = f" than the control, the same network trained without a teacher and quantized {alike}"
    verdicts = _verdicts(f"Better{than}", better)
    verdicts += _verdicts("Worse" if verdicts else f"Worse{than}", worse)
    from_it = " from it" if verdicts else than.replace("than", "from", 1)
    verdicts += [f"Not distinguishable{from_it}: {_listed(others)}."] if others else []
    said = "Whether distilling helped can't be told"
    if helped:
        of = "" if len(rows) == 1 else f" with {len(helped)} of {len(rows)} strategies"
        said = f"Distilling helped{of}"
    elif worse:
        said = "Distilling did not help"
    return " ".join([f"**{said}.**", *verdicts, _on_one_file(findings, gains)])


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the rows' labels, without the network if they have one in common."""
    same = len({row.network for row in rows}) == 1
    return [row.label.replace(f" ({row.network})", "") if same else row.label for row in rows]


def _where(gains: Gains, wanted: int) -> dict[str, list[str]]:
    """Return the names of the rows with differences of the wanted sign, by the bit widths where they have it."""
    found: dict[str, list[str]] = {}
    for name, tests in zip(_names(list(gains)), gains.values(), strict=True):
        if widths := [bits for bits, test in tests.items() if test.sign == wanted]:
            found.setdefault(_widths_in_words(widths, gains), []).append(name)
    return dict(sorted(found.items(), key=lambda item: item[0] != EVERY))


def _verdicts(word: str, where: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence such as "Better: A and B at every bit width, C at 2 bits." if there is anything to say."""
    texts = [f"{_listed(names)} at {widths}" for widths, names in where.items()]
    return [f"{word}: {'; '.join(texts)}."] if texts else []


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), names[-1]])


def _on_one_file(findings: Findings, gains: Gains) -> str:
    """Compare the largest student's file to ship with the control; without such the best distilled on validation."""
    shipped = [(f"The file to ship from {format_bytes(a.low)} on", a.file) for a in findings.advice]
    able = [(said, file) for said, file in shipped if file.bits in findings.gains.get(file.row, {})]
    if not able:
        best = max(
            ((row.cells[bits].validation_top1 or 0.0, bits, row) for row, tests in gains.items() for bits in tests),
            key=lambda choice: choice[:2],
        )
        _, bits, row = best
        able = [("The best distilled file on validation", File(row, bits, row.cells[bits].packed_bytes))]
    said, file = able[-1]
    test = findings.gains[file.row][file.bits]
    controls = [
        row.cells[file.bits]
        for row in findings.rows
        if (row.strategy, row.network, row.method) == ("control", file.row.network, file.row.method)
        and file.bits in row.cells
    ]
    seeds = ", one seed" if test.runs == 1 else ""
    verdict = "" if test.sign else ", not distinguishable"
    return (
        f"{said}, {file.label}, has {format_summary(file.cell, 'test_top1')} %, the control quantized alike"
        f" {format_summary(controls[0], 'test_top1')} % ({format_p(test.p)}{seeds}{verdict})."
    )


EVERY = "every bit width"


def gains_in_words(gains: Gains, more: str = "better", less: str = "worse") -> list[str]:
    """Say where each student is better or worse than the control, a sentence each.

    Args:
        gains: `Findings.gains`, or other differences from a reference by row and bit width.
        more: What a positive difference is called.
        less: What a negative difference is called.
    """
    sentences = []
    for row, tests in gains.items():
        if row.method == MIXED_METHOD:
            continue
        parts = []
        for word, sign in ((more, 1), (less, -1)):
            found = {bits: test for bits, test in tests.items() if test.sign == sign}
            if found:
                points = sorted((test.points for test in found.values()), key=abs)
                by = " to ".join(dict.fromkeys(f"{value:+.2f}" for value in (points[0], points[-1])))
                p = f"{format_p(max(test.p for test in found.values()))}{' at most' if len(found) > 1 else ''}"
                parts.append(f"{word} at {_widths_in_words(list(found), gains)}, {by} points ({p})")
        single = "; one seed on a side" if any(test.runs == 1 for test in tests.values()) else ""
        sentences.append(f"**{row.label}**: {' and '.join(parts) or 'not distinguishable'}{single}.")
    return sentences


def _widths_in_words(widths: Sequence[int], gains: Gains) -> str:
    """Return bit widths as "2, 4 bits and float", or that they are as many as a row has at most."""
    if len(widths) == max(map(len, gains.values())):
        return EVERY
    quantized = ", ".join(str(bits) for bits in widths if bits != FLOAT_BITS)
    return " and ".join([*([f"{quantized} bits"] if quantized else []), *(["float"] if FLOAT_BITS in widths else [])])
