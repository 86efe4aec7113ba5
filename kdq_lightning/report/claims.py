"""The claims of the published study, each beside what the records say of it."""

from collections.abc import Iterator, Sequence

from kdq_lightning.quantization.methods import MIXED_METHOD
from kdq_lightning.report.answer import TRACK_VERDICTS, verdict
from kdq_lightning.report.findings import Drop, Findings
from kdq_lightning.report.formatting import format_difference
from kdq_lightning.report.gains import gains_in_words
from kdq_lightning.report.published import NETWORKS, SHARPER_DROP, WINNER
from kdq_lightning.report.rows import Row
from kdq_lightning.report.table_formats import Table, table_of_texts, to_markdown

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
            f"## {findings.dataset}",
            f"**Which track wins.** Published: {claimed}. Measured, at equal bytes: {measured} ({networks}).",
            f"**Does the student drop more sharply?** Published: {_sharper_claimed(findings.dataset)}. Measured, the"
            " student's loss from float against the teacher's at equal bits"
            f" ([each difference](loss_from_float_{findings.dataset}.csv)):",
            "\n".join(f"- {sentence}" for sentence in sharper_drop(findings.drops)) or NOTHING,
            "**Do quantized networks nearly match float?** Loss from float, in points:",
            to_markdown(nearly_float(findings.drops)) if findings.drops else NOTHING,
        ]
    )


NOTHING = "Nothing to compare: records are missing."


def _sharper_claimed(dataset: str) -> str:
    widths = SHARPER_DROP.get(dataset)
    return f"it does at {', '.join(map(str, widths))} bits" if widths else "nothing on this data set"


def _by_row(drops: Sequence[Drop]) -> Iterator[tuple[Row, list[Drop]]]:
    """Yield each row of one bit width for all layers with its drops, in ascending order of that width."""
    for row in dict.fromkeys(drop.row for drop in drops if drop.row.method != MIXED_METHOD):
        yield row, sorted((drop for drop in drops if drop.row is row), key=lambda drop: drop.bits)


def sharper_drop(drops: Sequence[Drop]) -> list[str]:
    """Answer whether the students lose more than the teacher, in a sentence for each student."""
    differences = {
        row: {drop.bits: drop.versus_teacher for drop in own if drop.versus_teacher}
        for row, own in _by_row(drops)
        if not row.is_teachers
    }
    return gains_in_words({row: tests for row, tests in differences.items() if tests}, "sharper", "less sharp")


def nearly_float(drops: Sequence[Drop]) -> Table:
    """Return the table that answers from how many bits on each row nearly matches its float accuracy."""
    lines = []
    for row, own in _by_row(drops):
        smallest = next((drop for drop in own if drop.own.points <= NEAR), None)
        certain = next((drop for drop in own if drop.own.high <= NEAR), None)
        losses = [_loss(drop) if drop else "none" for drop in (own[-1], smallest)]
        lines.append([row.label, *losses, f"{certain.bits} bits" if certain else "none"])
    header = ["", "at the most bits", f"at the fewest within {NEAR:g} point", "fewest, whole interval"]
    return table_of_texts(header, lines)


def _loss(drop: Drop) -> str:
    return f"{drop.bits} bits: {format_difference(drop.own, with_p=False)}"
