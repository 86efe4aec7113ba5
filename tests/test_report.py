"""The report on made-up records: rows, tables, the answer against brute force, claims, and broken inputs."""

import csv
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdq_lightning.cli import main
from kdq_lightning.commands.report import write_report
from kdq_lightning.errors import UserError
from kdq_lightning.quantization.methods import CUSTOM_METHOD, METHODS, MIXED_METHOD
from kdq_lightning.report.advice import is_better
from kdq_lightning.report.answer import answer, verdict
from kdq_lightning.report.document import KINDS
from kdq_lightning.report.duels import File, comparable_files
from kdq_lightning.report.figures import draw_figures, render
from kdq_lightning.report.file_choice import rounded_sizes
from kdq_lightning.report.findings import Findings, find
from kdq_lightning.report.formatting import format_difference, format_p
from kdq_lightning.report.gains import gains_in_words, sentences_on_distilling
from kdq_lightning.report.published import BITS, TOP1, published_drop, published_top1
from kdq_lightning.report.read_rows import read_rows
from kdq_lightning.report.rows import Cell, Row, summarize
from kdq_lightning.report.shipping import advice_table, choose_measurement, sentence_on_shipping
from kdq_lightning.report.significance import Difference, holm, paired_bootstrap
from kdq_lightning.report.table_formats import to_csv, to_latex, to_markdown
from kdq_lightning.report.tables import gain_table, measure_table
from kdq_lightning.report.words import METHODS as METHODS_IN_WORDS
from kdq_lightning.report.words import STRATEGIES as STRATEGIES_IN_WORDS
from kdq_lightning.report.words import words
from kdq_lightning.runs.records import CORRECT, packed_path, read_correct, read_records, write_records
from kdq_lightning.strategies import APPEARANCES, appearances
from tests.records import ACCURACIES, WIDTHS, draw_correct, write_run, write_study

STRATEGIES = list(ACCURACIES)
pytestmark = pytest.mark.usefixtures("without_pictures")  # those of `report` are drawn, as it is made before


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs of a study on two data sets."""
    root = tmp_path_factory.mktemp("study")
    write_study(root / "ten")
    write_study(root / "hundred", "cifar100", ("teacher", "vanilla"))
    return root


@pytest.fixture(scope="module")
def report(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of that study's report, with published values."""
    out = tmp_path_factory.mktemp("report")
    assert main(["report", str(study), "--out", str(out), "--published"]) == 0
    return out


def test_rows_hold_every_record(study: Path):
    datasets, notes = read_rows([study])
    assert not notes and list(datasets) == ["cifar10", "cifar100"]
    rows = datasets["cifar10"]
    assert [row.strategy for row in rows] == STRATEGIES
    assert rows[0].label == "Teacher (resnet50)" and rows[0].seeds == [0, 1]
    assert all(tuple(row.cells) == WIDTHS for row in rows)
    dml = rows[-1].cells[4]
    accuracies = [[m.record.test_top1 for m in dml.measurements if m.record.seed == seed] for seed in (0, 1)]
    means = [sum(peers) / 2 for peers in accuracies]
    assert dml.summaries["test_top1"].mean == pytest.approx(sum(means) / 2)
    assert dml.summaries["test_top1"].deviation == pytest.approx(abs(means[0] - means[1]) / math.sqrt(2))
    assert np.array_equal(dml.correct[1], draw_correct(89.5, 1007).numpy())  # peer0 alone is compared


def test_peers_of_different_networks_are_rows_of_their_own(tmp_path: Path):
    """Each with its own accuracy beside its own bytes, also the one that isn't the first peer."""
    records = write_run(tmp_path, "dml", {2: 70.0, 4: 80.0}, peers=("peer0", "peer1"))
    other = [replace(r, network="resnet50", packed_bytes=2 * r.packed_bytes) for r in records if r.peer == "peer1"]
    write_records(tmp_path, [r for r in records if r.peer == "peer0"] + other)
    rows = read_rows([tmp_path])[0]["cifar10"]
    assert [row.label for row in rows] == ["DML (resnet18)", "DML (resnet50)"]
    for row, peer in zip(rows, ("peer0", "peer1"), strict=True):
        own = {r.bits: r for r in read_records(tmp_path) if r.peer == peer}
        for bits, cell in row.cells.items():
            assert cell.packed_bytes == own[bits].packed_bytes
            assert cell.summaries["test_top1"].mean == own[bits].test_top1 and list(cell.correct) == [0]


def test_table_in_all_forms(report: Path):
    with (report / "accuracy_cifar10.csv").open() as file:
        header, *rows = list(csv.reader(file))
    assert header == ["", *(f"{b} bits, {2**b} levels" for b in range(2, 9)), "float (32 bits)"]
    assert [row[0] for row in rows] == [row.split("|")[1].strip() for row in _table(report, "Teacher (resnet50)")]
    match = re.fullmatch(r"(\d+\.\d\d) ± (\d\.\d\d) \(90\.90, ([+-]\d+\.\d\d)\)", rows[0][1])
    assert float(match[1]) == pytest.approx(60.25, abs=0.01) and match[2] == "0.35" and match[3] == "-30.65"
    assert "(" not in rows[1][1]  # no published control
    text = (report / "accuracy_cifar10.tex").read_text()
    assert text.count(r"\\") == len(rows) + 1 and text.count("&") == len(header[1:]) * (len(rows) + 1)
    assert r"\textbf{72.25 $\pm$ 0.35 (71.87, +0.38)}" in text
    bold = [re.findall(r"\*\*", line.split("|")[2]) for line in _table(report, "Teacher (resnet50)")]
    assert [bool(found) for found in bold] == [False, False, True, False, False]  # vanilla is best at 2 bits


def _table(report: Path, first: str) -> list[str]:
    """Return the lines of the report's first table, from the given row on."""
    lines = (report / "report.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first}"))
    return lines[start : next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))]


def test_markdown_says_what_others_rely_on(report: Path):
    text = (report / "report.md").read_text()
    for said in ("±", "p = ", "equal bytes", "not distinguishable", "cifar10", "cifar100", "## The answer"):
        assert said in text
    assert "Without any record: DKD, Hints." in text and str(report) not in text
    assert "\n| --- | --- | ---: | --- | ---: |\n" in text, "words of the table of files to the left, numbers right"
    names = re.findall(r"\]\((.*?)\)", text)
    assert {name.rsplit(".")[-1] for name in names} == {"svg", "csv", "md"}
    for name in names:
        content = (report / name).read_text().rstrip()
        assert content.endswith("</svg>") if name.endswith("svg") else "," in content
    assert {path.name for path in report.iterdir() if path.suffix in (".csv", ".svg")} <= set(names)
    assert "-0.00" not in text and "nan" not in text


def test_pictures_are_drawn(report: Path):
    """Every figure has the colours of its curves, as PNG as well."""
    for name in ("accuracy_vs_bits", "accuracy_vs_bytes", "agreement_teacher", "relative_error"):
        pixels = np.asarray(Image.open(report / f"{name}_cifar10.png").convert("RGB")).reshape(-1, 3)
        assert ((pixels == (0x00, 0x72, 0xB2)).all(1)).sum() > 200, name  # vanilla's blue


@pytest.mark.parametrize(("accuracies", "span"), [({2: 90.0, 4: 90.1, 32: 90.1}, 2.0), ({2: 60, 4: 90, 32: 93}, 30)])
def test_a_few_images_are_no_cliff(tmp_path: Path, accuracies: dict[int, float], span: float):
    """An axis of accuracy shows two points or more."""
    write_run(tmp_path, "teacher", accuracies, network="resnet50")
    figures = draw_figures(_findings(tmp_path))
    for name in ("accuracy_vs_bits", "accuracy_vs_bytes", "methods"):
        low, high = figures[name].axes[0].get_ylim()
        assert high - low >= span - 1e-6 and low < min(accuracies.values()) and high > max(accuracies.values()), name


def test_yellow_passes_through_the_files_to_ship(study: Path):
    """Not through the highest points: nobody knows these before looking at the test images."""
    findings = _findings(study)
    axes = draw_figures(findings)["accuracy_vs_bytes"].axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "files to ship"]
    shipped = [(a.file.cell.packed_bytes, a.file.cell.summaries["test_top1"].mean) for a in findings.advice]
    assert list(zip(*line.get_data(), strict=True))[: len(shipped)] == shipped and len(shipped) >= 3


def test_the_words_of_every_strategy_and_method_are_explained(study: Path, report: Path):
    """Those of the project; a report explains those that it shows."""
    assert STRATEGIES_IN_WORDS.keys() == APPEARANCES.keys()
    assert METHODS_IN_WORDS.keys() == {*METHODS, MIXED_METHOD, CUSTOM_METHOD}
    strategies, methods = words(_findings(study).rows)
    assert [strategies.count(f"*{APPEARANCES[name].title}*:") for name in (*STRATEGIES, "dkd")] == [1] * 5 + [0]
    assert "*default*:" in methods and "*plain GPFQ*:" not in methods
    assert strategies in (report / "report.md").read_text()


def test_unknown_strategies_in_all_figures_and_tables(tmp_path: Path):
    """Each is titled by its name and takes the next colour and marker: the same in every figure, nobody else's."""
    write_run(tmp_path / "t", "teacher", {2: 70, 4: 90, 32: 93}, network="resnet50")
    for index, strategy in enumerate(("control", "my_distillation", "another")):
        write_run(tmp_path / strategy, strategy, {2: 60 + index, 4: 80 + index, 32: 90 + index}, agreement_teacher=80.0)
    report = write_report([tmp_path], tmp_path / "out")
    looks = {}
    for name, figure in draw_figures(_findings(tmp_path)).items():
        if name == "methods":  # a panel a strategy
            continue
        for bars in figure.axes[0].containers:
            if not bars.get_label().startswith("_"):
                look = bars.lines[0].get_color(), bars.lines[0].get_marker()
                assert looks.setdefault(bars.get_label(), look) == look, name
    assert list(looks) == [
        "Teacher (resnet50)",
        "Control (resnet18)",
        "another (resnet18)",
        "my_distillation (resnet18)",
    ]
    assert len({colour for colour, _ in looks.values()}) == len({marker for _, marker in looks.values()}) == 4
    text, details = report.read_text(), (tmp_path / "out" / "details.md").read_text()
    assert text.count("\n| my_distillation (resnet18) |") == 1
    assert text.count("\n- **my_distillation (resnet18)**:") == 1
    tables = {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.csv")}
    rows = {name: table.count("\nmy_distillation (resnet18),") for name, table in tables.items()}
    assert {name.removesuffix("_cifar10"): count for name, count in rows.items() if count} == {
        "accuracy": 1,
        "gain": 1,
        "loss_from_float": 2,
        "bytes": 1,
        "agreement_teacher": 1,
        "flips": 1,
        "ece": 1,
        "relative_error": 1,
    }
    assert "another (resnet18), 4 bits (6.1 kB, 82.00 %)" in text
    assert "another (resnet18), 2" in tables["equal_bytes_cifar10"]
    assert "- **another (resnet18)**: sharper at " in details and "\n| another (resnet18) | 4 bits: " in details
    with (tmp_path / "out" / "cells_cifar10.csv").open() as file:
        assert len([row for row in csv.DictReader(file) if row["strategy"] == "my_distillation"]) == 3


def _findings(folder: Path, dataset: str = "cifar10") -> Findings:
    return find(read_rows([folder])[0][dataset])


def test_equal_records_give_equal_reports(study: Path, report: Path, tmp_path: Path):
    """To the byte, whatever the time they took."""
    copy = tmp_path / "runs"
    for folder in study.rglob("version_0"):
        target = copy / folder.relative_to(study)
        target.mkdir(parents=True)
        (target / CORRECT).write_bytes((folder / CORRECT).read_bytes())
        write_records(target, [replace(record, seconds=99.0) for record in read_records(folder)])
    assert main(["report", str(copy), "--out", str(tmp_path / "again"), "--published"]) == 0
    assert {path.name for path in report.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()}
    for path in sorted(report.iterdir()):
        if path.suffix not in (".png", ".svg"):
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    figure = draw_figures(_findings(copy))["accuracy_vs_bytes"]
    for kind in KINDS:  # in the report's order, as drawing moves what is laid out
        assert render(figure, kind) == (report / f"accuracy_vs_bytes_cifar10.{kind}").read_bytes(), kind


def test_missing_cells_are_missing(tmp_path: Path):
    write_run(tmp_path / "a", "teacher", {2: 70, 4: 90, 32: 93}, network="resnet50")
    write_run(tmp_path / "b", "vanilla", {4: 88, 32: 91})
    datasets, _ = read_rows([tmp_path])
    rows = to_csv(measure_table(datasets["cifar10"], "test_top1")).splitlines()
    assert rows[1] == "Teacher (resnet50),70.00,missing,90.00,missing,missing,missing,missing,93.00"
    assert rows[2] == "Vanilla KD (resnet18),missing,missing,88.00,missing,missing,missing,missing,91.00"


def test_levels_are_named_in_cells_where_rows_differ(tmp_path: Path):
    write_run(tmp_path / "a", "teacher", {2: 70}, network="resnet50", levels=5, codebook="paper")
    write_run(tmp_path / "b", "vanilla", {2: 60})
    table = measure_table(read_rows([tmp_path])[0]["cifar10"], "test_top1")
    assert table.header[1] == "2 bits"
    assert [row[1].text for row in table.rows] == ["70.00, 5 levels", "60.00, 4 levels"]
    assert "**70.00, 5 levels**" in to_markdown(table) and r"\textbf{70.00, 5 levels}" in to_latex(table, "a_b")


def test_duels_are_those_of_brute_force(study: Path):
    """At every budget: the best file of each side on validation; the verdict of the paired test of these two."""
    findings = _findings(study)
    students, teachers = comparable_files(findings.rows)
    assert (len(students), len(teachers)) == (32, 8)
    duels = findings.duels
    for budget in range(3000, 100_000, 500):
        fitting = [[file for file in side if file.size <= budget] for side in (students, teachers)]
        best = [max(side, key=lambda file: (file.validation_top1, -file.size), default=None) for side in fitting]
        found = [duel for duel in duels if duel.low <= budget < duel.high]
        assert [(duel.student, duel.teacher) for duel in found] == ([tuple(best)] if any(best) else [])
    tested = [duel for duel in duels if duel.difference]
    p_values = {}
    for duel in tested:
        sides = [np.stack(list(file.cell.correct.values())) for file in (duel.student, duel.teacher)]
        alone = paired_bootstrap(*sides)
        assert duel.difference[:3] == alone[:3]
        p_values[duel.student.label, duel.teacher.label] = alone.p, duel.difference.p
        p, points = duel.difference.p, duel.difference.points
        assert duel.winner == ("" if p >= 0.05 else "student" if points > 0 else "teacher")
    unadjusted, adjusted = zip(*p_values.values(), strict=True)
    assert list(adjusted) == holm(unadjusted)
    assert tested[0].winner == "student" and tested[0].mcnemar.mid_p < 1e-6
    for duel in findings.file_duels:
        for file, other in ((duel.student, duel.teacher), (duel.teacher, duel.student)):
            assert file is None or other is None or max(file.size, other.size) == duel.low


def test_the_answer_in_words(tmp_path: Path):
    """A sentence for each range of budgets with one outcome, with points and p-values; then one on distilling."""
    for seed in (0, 1):
        write_run(tmp_path / f"t{seed}", "teacher", {2: 70, 4: 95, 5: 96}, seed=seed, network="resnet50")
        write_run(tmp_path / f"v{seed}", "vanilla", {2: 80, 3: 85, 5: 86}, seed=seed)
    findings = _findings(tmp_path)
    duels = findings.duels
    alone, student, teacher = duels[:2], duels[2:4], duels[4:]
    assert [duel.low for duel in duels] == [3300, 4700, 6500, 7500, 12500, 15500]
    assert not any(duel.difference for duel in alone)
    points = [f"{abs(duel.difference.points):.2f}" for duel in (*student, *teacher)]
    p_values = [format_p(duel.difference.p) for duel in (*student, *teacher)]
    assert len(set(p_values)) == 1
    assert answer(findings) == (
        "Under 6.5 kB only the student (resnet18) fits; ship Vanilla KD (resnet18), 2 bits (3.3 kB, 80.25 ± 0.35 %),"
        " or from 4.7 kB on Vanilla KD (resnet18), 3 bits (4.7 kB, 85.25 ± 0.35 %)."
        f" From 6.5 kB to 12.5 kB the student (resnet18) is better at equal bytes, by {points[0]} to {points[1]}"
        f" percentage points ({p_values[0]})."
        f" From 12.5 kB on the teacher (resnet50) is better at equal bytes, by {points[2]} to {points[3]}"
        f" percentage points ({p_values[0]})."
    )
    even = [
        replace(duel, difference=duel.difference._replace(p=p)) for duel, p in zip(student, (0.3, 0.6), strict=True)
    ]
    assert answer(replace(findings, duels=even)) == (
        "Up to 12.5 kB student and teacher are not distinguishable at equal bytes (p = 0.300 at least)."
    )
    assert answer(replace(findings, duels=alone)).startswith("The question stays open")


def test_what_to_ship_follows_from_the_tests(tmp_path: Path):
    """The winner; the smaller file where there is none; `--max_bytes` gives the table's file, whatever is larger."""
    for seed in (0, 1):
        write_run(tmp_path / f"t{seed}", "teacher", {2: 70, 4: 95}, seed=seed, network="resnet50")
        write_run(tmp_path / f"v{seed}", "vanilla", {2: 80, 3: 85, 4: 85.1, 5: 89}, seed=seed)
    findings = _findings(tmp_path)
    rows = [[entry.text for entry in row] for row in advice_table(findings).rows]
    assert [row[:2] for row in rows] == [
        ["3.3 kB", "Vanilla KD (resnet18), 2 bits"],
        ["4.7 kB", "Vanilla KD (resnet18), 3 bits"],
        ["7.5 kB", "Vanilla KD (resnet18), 5 bits"],
        ["12.5 kB", "Teacher (resnet50), 4 bits"],
    ]  # not 4 bits: on validation they are no better than 3 beyond chance
    assert rows[0][3:] == ["none fits", ""] and rows[-1][3].startswith("Vanilla KD (resnet18), 5 bits: 89.")
    assert all(row[4].startswith("+") for row in rows[2:])  # of the file to ship, whichever side it is on
    for budget, file in ((3300, "Vanilla KD (resnet18), 2 bits"), (12_499, "Vanilla KD (resnet18), 5 bits")):
        assert choose_measurement(findings, budget, None)[0].label == file
    assert choose_measurement(findings, 1e9, None)[0].label == "Teacher (resnet50), 4 bits"
    assert choose_measurement(findings, 3299, None) is None
    even = [
        duel if duel.winner is None else replace(duel, difference=duel.difference._replace(p=0.5))
        for duel in findings.duels
    ]
    assert choose_measurement(replace(findings, duels=even), 1e9, None)[0].label == "Vanilla KD (resnet18), 5 bits"


def test_a_larger_file_must_be_better_on_validation(tmp_path: Path):
    """Beyond chance, whatever it has on the test images; by half a point where the right answers aren't known."""
    write_run(tmp_path / "v", "vanilla", {2: 80, 3: 95}, val_top1=85.0)  # equal on validation
    write_run(tmp_path / "d", "dkd", {2: 60, 3: 50}, val_top1=90.0)
    (small, large), (_, better) = (
        [file for file in comparable_files(_findings(tmp_path).rows)[0] if file.row.strategy == strategy]
        for strategy in ("vanilla", "dkd")
    )
    assert not is_better(large, small) and is_better(better, small) and not is_better(small, better)

    def unknown(file: File) -> File:
        cell = Cell(tuple(replace(m, correct_validation=None) for m in file.cell.measurements))
        return replace(file, row=replace(file.row, cells={file.bits: cell}))

    assert not is_better(unknown(large), unknown(small)) and is_better(unknown(better), unknown(small))


def test_the_file_to_ship_exists_and_can_be_exported(tmp_path: Path):
    write_run(tmp_path / "v" / "version_0", "vanilla", {2: 80, 32: 90})
    folder = tmp_path / "v" / "version_0"
    assert "its packed file, `resnet18-" in sentence_on_shipping(_findings(tmp_path), 3300, None)
    packed = packed_path(folder, read_records(folder)[0])
    packed.parent.mkdir()
    packed.touch()
    assert f"\n\n    kdq export {packed} --to onnx --out {packed.stem}.onnx" in sentence_on_shipping(
        _findings(tmp_path), 3300, None
    )
    assert f"the float network of `{folder}`" in sentence_on_shipping(_findings(tmp_path), None, 89)


def test_whether_distilling_helped(tmp_path: Path):
    """Over all strategies and bit widths: who is better where, who is worse, who can't be told from the control."""
    write_run(tmp_path / "t", "teacher", {4: 96}, network="resnet50")
    write_run(tmp_path / "c", "control", {2: 70, 4: 85, 32: 86})
    write_run(tmp_path / "v", "vanilla", {2: 80, 4: 95, 32: 96})
    write_run(tmp_path / "m", "mixup", {2: 60, 4: 85.1, 32: 86.1})
    write_run(tmp_path / "d", "dkd", {2: 80, 4: 85.2, 32: 95})
    write_run(tmp_path / "h", "hint", {2: 70.2, 4: 85.2, 32: 86.2})
    write_run(tmp_path / "r", "recover", {2: 80})
    findings = _findings(tmp_path)
    than = "the control, the same network trained without a teacher and quantized alike"
    test = next(tests[4] for row, tests in findings.gains.items() if row.strategy == "vanilla")
    assert sentences_on_distilling(findings) == (
        f"**Distilling helped with 3 of 5 strategies.** Better than {than}: Vanilla KD at every bit width; DKD at 2"
        " bits and float; Recovered at 2 bits. Worse: Mixup KD at 2 bits. Not distinguishable from it: Hints. The"
        f" file to ship from 6.1 kB on, Vanilla KD (resnet18), 4 bits, has 95.00 %, the control quantized alike 85.00 %"
        f" ({format_p(test.p)}, one seed)."
    )

    def said(*strategies: str) -> str:
        gains = {row: tests for row, tests in findings.gains.items() if row.strategy in strategies}
        return sentences_on_distilling(replace(findings, gains=gains))

    assert said("vanilla").startswith(
        f"**Distilling helped.** Better than {than}: Vanilla KD at every bit width. The file"
    )
    assert said("mixup").startswith(
        f"**Distilling did not help.** Worse than {than}: Mixup KD at 2 bits. The best distilled"
    )
    assert said("hint").startswith(
        f"**Whether distilling helped can't be told.** Not distinguishable from {than}: Hints."
    )
    assert said("hint").endswith(", one seed, not distinguishable).")
    assert said() == ""


def test_p_values_never_look_as_if_they_were_on_the_other_side_of_the_level():
    assert [format_p(p) for p in (0.04951, 0.04999, 0.05, 0.0494)] == [
        "p = 0.0495",
        "p = 0.0499",
        "p = 0.050",
        "p = 0.049",
    ]


def test_sizes_that_differ_by_a_name_are_equal():
    """They draw no step into the front and start no range of their own; the next beyond 64 bytes does."""
    assert rounded_sizes([25_410, 25_418, 44_112, 25_354, 25_353]) == [25_418, 25_418, 44_112, 25_418, 25_353]
    assert rounded_sizes([]) == [] and rounded_sizes([7]) == [7]
    chain = [100 + 40 * i for i in range(10)]  # equal to the largest, not to the neighbour
    assert all(large - small <= 64 for small, large in zip(chain, rounded_sizes(chain), strict=True))


def test_gains_are_over_the_control_of_the_same_network_and_codebook(tmp_path: Path):
    """Points by hand from the drawn answers, of the seeds' means; the p-values of a row are adjusted together."""
    runs = {"control": {4: 90, 32: 91}, "vanilla": {4: 90.5, 32: 93, 5: 92}}
    for seed in (0, 1):
        for name, accuracies in runs.items():
            write_run(tmp_path / f"{name}{seed}", name, accuracies, seed=seed)
    write_run(tmp_path / "paper", "control", {4: 50}, run="control_paper", codebook="paper", config_hash="other")
    write_run(tmp_path / "t", "teacher", {4: 95, 32: 96}, network="resnet50")
    write_run(tmp_path / "big", "control", {4: 95, 5: 95, 32: 96}, network="resnet50", config_hash="big")
    findings = _findings(tmp_path)
    header, line = gain_table(findings.gains, findings.rows)
    assert len(line) == 1 and line[0][0].text == "Vanilla KD (resnet18)"
    found = dict(zip(header[1:], (entry.text for entry in line[0][1:]), strict=True))
    expected, vectors = {}, [read_correct(tmp_path / f"{name}{seed}") for name in runs for seed in (0, 1)]
    for bits in (4, 32):
        control, student = (
            np.stack([vector[f"resnet18/test/{bits}"].numpy() for vector in pair])
            for pair in (vectors[:2], vectors[2:])
        )
        expected[bits] = paired_bootstrap(student, control)
        assert expected[bits].points == pytest.approx(100 * (student.mean() - control.mean()))
    adjusted = holm([expected[4].p, expected[32].p])
    for bits, p, name in ((4, adjusted[0], "4 bits"), (32, adjusted[1], "float (32 bits)")):
        assert found[name] == format_difference(expected[bits]._replace(p=p))
    assert found["5 bits"] == found["2 bits"] == "missing"
    assert not find([row for row in findings.rows if row.strategy != "control"]).gains


def test_seeds_are_named_by_row_where_they_differ(tmp_path: Path):
    write_run(tmp_path / "t", "teacher", {4: 90}, network="resnet50")
    for seed in (0, 1):
        write_run(tmp_path / f"v{seed}", "vanilla", {4: 88}, seed=seed)
    write_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Seeds: 0 of Teacher (resnet50); 0, 1 of Vanilla KD (resnet18)." in text


def test_gains_in_words():
    better, worse, neither = (Difference(points, 0, 0, p, 3) for points, p in ((1, 0.049), (-1, 0.01), (9, 0.05)))

    def said(gains: dict[str, dict[int, Difference]]) -> list[str]:
        rows = {name: Row("", name, "", "default", {}, name, appearances([name])[name], False) for name in gains}
        return gains_in_words({rows[name]: tests for name, tests in gains.items()})

    gains = {
        "A": {2: better, 3: neither, 4: better._replace(points=2.5, p=0.01), 32: better},
        "B": {2: worse, 3: worse, 4: worse, 32: worse},
        "C": {2: neither, 32: neither._replace(runs=1)},
        "D": {2: worse, 4: better, 32: neither},
        "E": {2: neither, 32: better},
    }
    assert said(gains) == [
        "**A**: better at 2, 4 bits and float, +1.00 to +2.50 points (p = 0.049 at most).",
        "**B**: worse at every bit width, -1.00 points (p = 0.010 at most).",
        "**C**: not distinguishable; one seed on a side.",
        "**D**: better at 4 bits, +1.00 points (p = 0.049) and worse at 2 bits, -1.00 points (p = 0.010).",
        "**E**: better at float, +1.00 points (p = 0.049).",
    ]


def test_choice_never_looks_at_the_test(tmp_path: Path):
    """The student that is best on validation and worst on the test images stands for its side."""
    write_run(tmp_path / "t", "teacher", {4: 90}, network="resnet50")
    write_run(tmp_path / "a", "vanilla", {4: 95}, val_top1=80.0)
    write_run(tmp_path / "b", "mixup", {4: 60}, val_top1=99.0)
    last = _findings(tmp_path).duels[-1]
    assert last.student.row.strategy == "mixup" and last.winner == "teacher"
    assert choose_measurement(_findings(tmp_path), None, 95)[0].row.strategy == "mixup"
    write_run(tmp_path / "c", "dkd", {4: 95}, val_top1=99.9, partial=True)  # a trial run on a few images
    assert choose_measurement(_findings(tmp_path), None, 95)[0].row.strategy == "mixup"
    write_run(tmp_path / "t", "teacher", {4: 90}, network="resnet50", val_top1=None)
    assert verdict(_findings(tmp_path).duels) is None


def test_file_of_a_least_accuracy(study: Path):
    findings = _findings(study)
    every = [
        (m.record.packed_bytes, m.record.val_top1)
        for row in findings.rows
        for cell in row.cells.values()
        for m in cell.measurements
    ]
    chosen = choose_measurement(findings, None, 90)[1].record
    assert chosen.packed_bytes == min(size for size, value in every if value >= 90)
    assert choose_measurement(findings, 4000, 90) is None
    said = sentence_on_shipping(findings, 4000, 90)
    assert said == "No file has at most 4 kB and at least 90 % on validation."
    assert sentence_on_shipping(findings, None, None) == ""


def test_drops_are_paired_contrasts(study: Path):
    findings = _findings(study)
    found = {(drop.row.strategy, drop.bits): drop for drop in findings.drops}
    assert len(found) == 35
    correct = {
        row.strategy: {bits: np.stack(list(c.correct.values())) for bits, c in row.cells.items()}
        for row in findings.rows
    }
    for strategy in ("vanilla", "teacher"):
        lost = {name: cells[32].mean(1) - cells[3].mean(1) for name, cells in correct.items()}
        drop = found[strategy, 3]
        assert drop.own.points == pytest.approx(100 * lost[strategy].mean())
        assert drop.versus_control.points == pytest.approx(100 * (lost[strategy].mean() - lost["control"].mean()))
    assert found["vanilla", 3].versus_teacher.points < 0 and found["teacher", 3].versus_teacher is None


def test_recovered_bit_widths_are_one_row(tmp_path: Path):
    for bits in (2, 3):
        for seed in (0, 1):
            folder = tmp_path / f"seed{seed}" / f"recover_{bits}bit"
            write_run(folder, "recover", {bits: 80}, seed=seed, run=f"recover_{bits}bit", config_hash=f"hash{bits}")
    write_run(tmp_path / "other", "recover", {2: 70}, run="recover_control_2bit", config_hash="other")
    rows = read_rows([tmp_path])[0]["cifar10"]
    assert sorted((list(row.cells), row.seeds) for row in rows) == [([2], [0]), ([2, 3], [0, 1])]
    assert len({row.label for row in rows}) == 2


def test_methods_stand_side_by_side(tmp_path: Path):
    """A network's methods are rows of their own with one float network; each is compared with its own method."""

    for seed in (0, 1):
        for strategy, network, top1 in (
            ("teacher", "resnet50", 90),
            ("control", "resnet18", 80),
            ("dkd", "resnet18", 84),
        ):
            common = {"seed": seed, "network": network}
            write_run(tmp_path / f"{strategy}{seed}", strategy, {3: top1, 4: top1 + 2, 32: top1 + 4}, **common)
            if strategy != "teacher":
                gpfq = {2: top1 - 20, 4: top1 - 8} | ({3: top1 - 10} if strategy == "dkd" else {})
                write_run(
                    tmp_path / f"{strategy}{seed}_gpfq", strategy, gpfq, method="gpfq", codebook="paper", **common
                )
    findings = _findings(tmp_path)
    rows = {row.label: row for row in findings.rows}
    assert [(row.label, row.method, list(row.cells), row.seeds) for row in findings.rows] == [
        ("Teacher (resnet50)", "default", [3, 4, 32], [0, 1]),
        ("Control (resnet18)", "default", [3, 4, 32], [0, 1]),
        ("Control (resnet18), plain GPFQ", "gpfq", [2, 4, 32], [0, 1]),
        ("DKD (resnet18)", "default", [3, 4, 32], [0, 1]),
        ("DKD (resnet18), plain GPFQ", "gpfq", [2, 3, 4, 32], [0, 1]),
    ]
    assert rows["DKD (resnet18), plain GPFQ"].cells[4].summaries["test_top1"].mean == pytest.approx(76.25)
    assert rows["DKD (resnet18)"].cells[4].summaries["test_top1"].mean == pytest.approx(86.25)

    students, teachers = comparable_files(findings.rows)
    assert (len(students), len(teachers)) == (11, 3)  # a float network is one file
    assert findings.duels[0].student.label == "DKD (resnet18), plain GPFQ, 2 bits"  # the smallest file of all methods
    own = np.stack(list(rows["DKD (resnet18), plain GPFQ"].cells[4].correct.values()))
    control = np.stack(list(rows["Control (resnet18), plain GPFQ"].cells[4].correct.values()))
    gains = findings.gains[rows["DKD (resnet18), plain GPFQ"]]
    assert gains[4].points == pytest.approx(100 * (own.mean() - control.mean()))
    assert list(gains) == [2, 4, 32]  # at 3 bits the control has the default method alone
    drops = {(drop.row.label, drop.bits): drop for drop in findings.drops}
    assert (
        drops["DKD (resnet18), plain GPFQ", 4].versus_control
        and not drops["DKD (resnet18), plain GPFQ", 4].versus_teacher
    )
    assert drops["DKD (resnet18)", 4].versus_teacher
    assert choose_measurement(findings, 3400, None)[0].label == "DKD (resnet18), plain GPFQ, 2 bits"

    text = write_report([tmp_path], tmp_path / "out").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[1:]
    assert "88.25 ± 0.35" in tables[0] and "GPFQ" not in tables[0]
    assert "76.25 ± 0.35" in tables[1] and "86.25" not in tables[1] and "7 bits" not in tables[1]
    assert f"The same with plain GPFQ (method `gpfq`):\n\n{tables[1]}" in text
    with (tmp_path / "out" / "cells_cifar10.csv").open() as file:
        cells = [(row["strategy"], row["method"], row["bits"]) for row in csv.DictReader(file)]
    assert len(cells) == len(set(cells)) == 14 and ("dkd", "", "32") in cells and ("dkd", "gpfq", "2") in cells
    assert "76.25" in (tmp_path / "out" / "accuracy_gpfq_cifar10.csv").read_text()
    figures = draw_figures(findings)
    curves = figures["accuracy_vs_bits"].axes[0].get_legend_handles_labels()[1]
    assert curves == [label for label in rows if "GPFQ" not in label]
    panels = {axes.get_title(): axes.get_legend_handles_labels()[1] for axes in figures["methods"].axes if axes.lines}
    assert panels["DKD (resnet18)"] == ["published (resnet18)", "default", "plain GPFQ"]
    assert panels["Control (resnet18)"] == ["default", "plain GPFQ"]


# --- broken inputs


def test_no_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "there is no quantized.csv below" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_two_runs_with_the_same_key(tmp_path: Path):
    """The newer one counts, the tenth version being newer than the second; equal ones are not worth a word."""
    write_run(tmp_path / "version_2", "control", {4: 80})
    write_run(tmp_path / "version_10", "control", {4: 80}, seconds=77.0)
    assert read_rows([tmp_path])[1] == []
    write_run(tmp_path / "version_10", "control", {4: 85})
    datasets, notes = read_rows([tmp_path])
    assert datasets["cifar10"][0].cells[4].summaries["test_top1"].mean == 85 and len(notes) == 1
    assert "version_2" in notes[0] and "version_10" in notes[0]


def test_other_settings_are_another_row(tmp_path: Path):
    write_run(tmp_path / "a", "control", {4: 80})
    write_run(tmp_path / "b", "control", {4: 85}, config_hash="other", run="control_slow")
    rows = read_rows([tmp_path])[0]["cifar10"]
    assert [row.label for row in rows] == ["Control (resnet18) control", "Control (resnet18) control_slow"]


def test_records_without_vectors(tmp_path: Path):
    """Shown in tables, left out of tests, and said so."""
    write_run(tmp_path / "t", "teacher", {4: 90, 32: 93}, network="resnet50")
    write_run(tmp_path / "s", "control", {4: 88, 32: 91}, vectors=False)
    datasets, notes = read_rows([tmp_path])
    assert len(notes) == 1 and "no images in correct.safetensors at 4, 32 bits" in notes[0]
    assert {drop.row.strategy for drop in find(datasets["cifar10"]).drops} == {"teacher"}
    text = write_report([tmp_path], tmp_path / "out").read_text()
    assert "| Control (resnet18) | missing | missing | 88.00" in text and "The question stays open" in text
    (tmp_path / "s" / CORRECT).write_bytes(b"broken")
    with pytest.raises(UserError, match="damaged"):
        read_rows([tmp_path])


def test_other_versions_and_other_headers(tmp_path: Path):
    write_run(tmp_path / "a", "control", {4: 80})
    write_run(tmp_path / "b", "teacher", {4: 85}, version="0.0.9")
    assert read_rows([tmp_path])[1] == ["The records were written by different releases: 0.0.9, 0.1.0."]
    table = tmp_path / "b" / "quantized.csv"
    table.write_text(table.read_text().replace("flips", "joules").replace("0.0.9", "0.1.0"))
    assert "joules" in read_rows([tmp_path])[1][0] and "doesn't know" in read_rows([tmp_path])[1][0]
    table.write_text("run,accuracy\nx,1\n")
    with pytest.raises(UserError, match="has no column dataset"):
        read_rows([tmp_path])


def test_weights_from_elsewhere(tmp_path: Path):
    write_run(tmp_path / "a", "control", {4: 80})
    assert read_rows([tmp_path])[1] == []
    write_run(tmp_path / "b", "teacher", {4: 85}, network="resnet50", epochs=None)
    (note,) = read_rows([tmp_path])[1]
    assert "teacher (resnet50)" in note and "validation accuracy is too high" in note


def test_other_test_images(tmp_path: Path):
    write_run(tmp_path / "a", "control", {4: 80})
    write_run(tmp_path / "b", "teacher", {4: 85}, images=1000)
    with pytest.raises(UserError, match="different test sets"):
        _findings(tmp_path)
    write_run(tmp_path / "b", "teacher", {4: 85}, images=1000, partial=True)
    rows = read_rows([tmp_path])[0]["cifar10"]
    assert rows[0].label == "Teacher (resnet18), partial"
    assert [len(side) for side in comparable_files(rows)] == [1, 0]


@pytest.mark.parametrize("arguments", [["--max_bytes", "-1"], ["--min_accuracy", "101"], ["--out", "file/report"]])
def test_bad_options(arguments: list[str], study: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    Path("file").write_text("")
    assert main(["report", str(study / "ten" / "seed0" / "control"), *arguments]) == 1
    assert arguments[0] in capsys.readouterr().err or arguments[0] == "--out"


def test_published_values():
    assert all(len(row) == len(BITS) for rows in TOP1.values() for row in rows.values())
    assert published_top1("cifar100", "dkd", 2) == 22.20 and published_top1("cifar100", "control", 2) is None
    assert published_top1("digits", "teacher", 2) is None and published_top1("cifar10", "teacher", 9) is None
    assert published_drop("cifar100", "vanilla", 8) == pytest.approx(75.72 - 70.54)
    assert published_drop("cifar100", "dkd", 2) == pytest.approx(58.01 - 22.20)
    assert published_drop("cifar10", "vanilla", 3) == pytest.approx(90.77 - 82.40)


def test_summary_over_seeds():
    values = [75.1, 75.9, 76.4]
    assert summarize(values) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert summarize([75.0]) == (75.0, None)
