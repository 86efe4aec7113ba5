"""The claims of the published study, each beside what the records say of it."""

from collections.abc import Iterator, Mapping, Sequence

from kdq_lightning.quantization.methods import MIXED_METHOD
from kdq_lightning.report.answer import TRACK_VERDICTS, verdict
from kdq_lightning.report.findings import Drop, Findings
from kdq_lightning.report.formatting import format_difference, format_p
from kdq_lightning.report.published import NETWORKS, SHARPER_DROP, WINNER
from kdq_lightning.report.rows import Row
from kdq_lightning.report.significance import LEVEL, Difference
from kdq_lightning.runs.records import FLOAT_BITS

DROP_VERDICTS = {
    1: "drops more sharply than the teacher at",
    -1: "drops less than the teacher at",
    0: "has a drop that is not distinguishable from the teacher's at",
}
"""How a student's loss from float compares with the teacher's, by the sign of the difference, 0 if not significant."""

NEAR = 1.0  # points below float that count as "nearly match"


def section_on_claims(findings: Findings) -> str:
    """Return the Markdown section on a data set that compares each published claim with the findings."""
    claimed = "nothing on this data set"
    if findings.dataset in WINNER:
        claimed = f"the quantized {WINNER[findings.dataset]} wins here ({', '.join(NETWORKS)}, 2^b + 1 levels)"
    measured = TRACK_VERDICTS[verdict(findings.duels)]
    networks = ", ".join(dict.fromkeys(row.network for row in findings.rows))
    return "\n\n".join(
        [
            f"### {findings.dataset}",
            f"**Which track wins.** Published: {claimed}. Measured, at equal bytes: {measured} ({networks}).",
            "**Does the student drop more sharply?** Loss from float minus the teacher's loss, in points:",
            _bullets(sharper_drop(findings.drops)),
            "**Do quantized networks nearly match float?** Loss from float, in points:",
            _bullets(nearly_float(findings.drops)),
        ]
    )


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences or ["Nothing to compare: records are missing."])


def _by_row(drops: Sequence[Drop]) -> Iterator[tuple[Row, list[Drop]]]:
    """Yield each row of one bit width for all layers with its drops, in ascending order of that width."""
    for row in dict.fromkeys(drop.row for drop in drops if drop.row.method != MIXED_METHOD):
        yield row, sorted((drop for drop in drops if drop.row is row), key=lambda drop: drop.bits)


def sharper_drop(drops: Sequence[Drop]) -> list[str]:
    """Answer whether the students lose more than the teacher, in a sentence for each student."""
    sentences = []
    for row, own in _by_row(drops):
        parts = []
        for sign, words in DROP_VERDICTS.items():
            numbers = [
                f"{drop.bits} bits{' (sharper drop claimed)' if drop.bits in SHARPER_DROP.get(row.dataset, ()) else ''}"
                f" {format_difference(drop.versus_teacher)}"
                for drop in own
                if drop.versus_teacher and _sign(drop.versus_teacher) == sign
            ]
            parts += [f"{words} {'; '.join(numbers)}"] if numbers else []
        if parts and not row.is_teachers:
            sentences.append(f"{row.label} {'; '.join(parts)}.")
    return sentences


def _sign(difference: Difference) -> int:
    """Return 1 or -1 for a significant difference, else 0."""
    if difference.p >= LEVEL:
        return 0
    return 1 if difference.points > 0 else -1


def nearly_float(drops: Sequence[Drop]) -> list[str]:
    """Answer from how many bits on each row nearly matches its float accuracy, in a sentence for each row."""
    sentences = []
    for row, own in _by_row(drops):
        smallest = next((drop for drop in own if drop.own.points <= NEAR), None)
        certain = next((drop for drop in own if drop.own.high <= NEAR), None)
        most = own[-1]
        text = f"{row.label} loses, at {most.bits} bits, {format_difference(most.own, with_p=False)} points"
        if smallest is None:
            text += f"; no bit width is within {NEAR:g} point of float"
        else:
            text += f"; the smallest bit width within {NEAR:g} point of float is {smallest.bits} bits"
            text += f" ({format_difference(smallest.own, with_p=False)})"
            text += f"; {f'{certain.bits} bits' if certain else 'none'} with its whole interval"
        sentences.append(f"{text}.")
    return sentences


def gains_in_words(gains: Mapping[Row, Mapping[int, Difference]]) -> list[str]:
    """Say where each student is better or worse than the control, a sentence each; `gains` is `Findings.gains`."""
    sentences, every = [], max(map(len, gains.values()))
    for row, tests in gains.items():
        if row.method == MIXED_METHOD:
            continue
        parts = []
        for word, sign in (("better", 1), ("worse", -1)):
            found = {bits: test for bits, test in tests.items() if _sign(test) == sign}
            if found:
                points = sorted((test.points for test in found.values()), key=abs)
                by = " to ".join(dict.fromkeys(f"{value:+.2f}" for value in (points[0], points[-1])))
                where = "every bit width" if len(found) == every else _listed(list(found))
                p = f"{format_p(max(test.p for test in found.values()))}{' at most' if len(found) > 1 else ''}"
                parts.append(f"{word} at {where}, {by} points ({p})")
        single = "; one seed on a side" if any(test.runs == 1 for test in tests.values()) else ""
        sentences.append(f"**{row.label}**: {' and '.join(parts) or 'not distinguishable'}{single}.")
    return sentences


def _listed(widths: Sequence[int]) -> str:
    """Return bit widths as "2, 4 bits and float"."""
    quantized = ", ".join(str(bits) for bits in widths if bits != FLOAT_BITS)
    return " and ".join([*([f"{quantized} bits"] if quantized else []), *(["float"] if FLOAT_BITS in widths else [])])
