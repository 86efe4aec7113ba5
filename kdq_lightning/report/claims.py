"""The claims of the published study, each beside what the records say of it."""

from collections.abc import Iterator, Sequence

from kdq_lightning.quantization.methods import MIXED_METHOD
from kdq_lightning.report.answer import TRACK_VERDICTS, verdict
from kdq_lightning.report.findings import Drop, Findings
from kdq_lightning.report.formatting import format_difference
from kdq_lightning.report.published import NETWORKS, SHARPER_DROP, WINNER
from kdq_lightning.report.rows import Row

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
                if drop.versus_teacher and drop.versus_teacher.sign == sign
            ]
            parts += [f"{words} {'; '.join(numbers)}"] if numbers else []
        if parts and not row.is_teachers:
            sentences.append(f"{row.label} {'; '.join(parts)}.")
    return sentences


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
