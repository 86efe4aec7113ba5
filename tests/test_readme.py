"""The numbers of the README and of docs/ are those of the committed records; their links lead somewhere."""

import json
import re
import shlex
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
import yaml

from kdq_lightning.bench.mixed_figure import draw_choices
from kdq_lightning.cli import main
from kdq_lightning.commands.running import read_settings
from kdq_lightning.quantization.codebooks import CODEBOOKS
from kdq_lightning.quantization.methods import CUSTOM_METHOD, METHODS, MIXED_METHOD
from kdq_lightning.quantization.solvers import SOLVERS
from kdq_lightning.report.figures import render
from kdq_lightning.report.published import BITS as PUBLISHED_BITS
from kdq_lightning.report.published import TOP1
from kdq_lightning.runs.records import FLOAT_BITS, Record, find_records
from kdq_lightning.strategies import APPEARANCES
from kdq_lightning.study.plan import read_study

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
BITS = (2, 3, 4, 5, 8)
BIT_WIDTHS = PUBLISHED_BITS[:-1]  # of the published study's quantized networks


def test_accuracies_of_the_engine():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| resnet\d+-", line)]
    assert len(rows) == 7
    for name, network, method, levels, *cells in rows:
        record = json.loads((RESULTS / "engine" / f"{name}.json").read_text())
        found = {(row["method"], row["bits"]): row for row in record["accuracies"]}
        assert network == f"{mean(found['float', 32]['top1']):.2f}"
        assert levels == str(found[method, 2]["levels"])
        expected = [f"{mean(found[method, bits]['top1']):.2f}" if (method, bits) in found else "-" for bits in BITS]
        assert cells == expected
    five = next(cells[3] for name, _, method, _, *cells in rows if (name, method) == ("resnet20-cifar10", "default"))
    readme = (ROOT / "README.md").read_text()
    assert f"has {five} % in the file of 5 bits" in readme  # said of the study's students, too


def test_accuracies_and_seconds_beside_a_peer():
    """The table of docs/benchmarks.md, and what the README says of it."""
    record = json.loads((RESULTS / "engine" / "peers-resnet20-cifar10.json").read_text())
    top = {(row["method"], row["bits"]): f"{mean(row['top1']):.2f}" for row in record["accuracies"]}
    seconds = defaultdict(list)
    for cost in record["costs"]:
        seconds[cost["method"]].append(cost["seconds"])
    text, readme = (ROOT / "docs" / "benchmarks.md").read_text(), (ROOT / "README.md").read_text()
    for name in ("Brevitas `brevitas_gpfq`", "this project `gpfq`", "this project `default`"):
        method = name.split("`")[1]
        levels = next(row["levels"] for row in record["accuracies"] if (row["method"], row["bits"]) == (method, 2))
        cells = [str(levels), *(top[method, bits] for bits in (2, 3, 4)), f"{mean(seconds[method]):.0f}"]
        assert f"| {name} | {' | '.join(cells)} |" in text
    ratio = mean(seconds["brevitas_gpfq"]) / mean(seconds["default"])
    ours, theirs = top["default", 3], top["brevitas_gpfq", 3]
    words = f"3 bits has {ours} % here and {theirs} % there, and is quantized {ratio:.0f} times as fast"
    assert words in " ".join(readme.split())


def test_seconds_of_wide_layers():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in sorted((RESULTS / "engine").glob("speed-*.json")):
        record = json.loads(path.read_text())
        floor, walk = record["speeds"]
        limit = re.search(r"--max_memory_gb (\S+)", record["command"])[1]
        seconds = f"{floor['seconds']:.0f} | {walk['seconds']:.0f} | {walk['seconds'] / floor['seconds']:.2f}"
        assert f"| {record['network']} | {limit} | {seconds} | {walk['peak_gb']:.1f} |\n" in text, path


def test_every_method_solver_and_codebook_is_explained():
    """A row each, in the table of its kind."""
    lines = [line for line in (ROOT / "docs" / "methods.md").read_text().splitlines() if line.startswith("| ")]
    for kind, names in (
        ("method", [*METHODS, CUSTOM_METHOD, MIXED_METHOD]),
        ("solver", SOLVERS),
        ("codebook", CODEBOOKS),
    ):
        rows = " ".join(line.split(" | ")[0] for line in lines if line.startswith(f"| {kind}"))
        assert sorted(rows.split("`")[1::2]) == sorted(names)


def test_hours_and_gaps_of_the_study():
    """What is said in words: core hours, how much validation flatters who had the teacher, mixup's distance."""
    folder = RESULTS / "cpu_cifar10"
    text = (folder / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    hours = sum(float(row[4]) for row in rows if row[4] not in ("hours", "-"))
    assert f"  # {hours:.0f} core hours of training;" in (ROOT / "README.md").read_text()
    assert {(name, seed) for name, seed, *_ in rows} == {("run", "seed"), ("teacher", "-")} | {
        (path.parent.name, path.parent.parent.name.removeprefix("seed"))
        for path in folder.glob("seed*/*/quantized.csv")
        if path.parent.name != "teacher"
    }
    floats, first = defaultdict(list), {}
    for records in find_records(folder).values():
        for record in records:
            if record.bits == FLOAT_BITS:
                floats[record.strategy].append((record.val_top1 - record.test_top1, record.test_top1))
            if record.seed == 0:
                first[record.strategy, record.bits] = record.test_top1
    above = {strategy: mean(gap for gap, _ in found) for strategy, found in floats.items()}
    further = [above[strategy] - above["control"] for strategy in ("vanilla", "dkd", "hint", "mixup")]
    assert f"they are {min(further):.1f} to {max(further):.1f} points" in text
    gained = [f"{first['recover', bits] - first['vanilla', bits]:.2f}" for bits in (2, 3, 4)]
    assert "gain on them {}, {} and {} points".format(*gained) in text
    behind = mean(test for _, test in floats["control"]) - mean(test for _, test in floats["mixup"])
    assert f"is {behind:.1f} points behind the control" in text


def test_projection_of_the_published_study():
    plan = yaml.safe_load((RESULTS / "published_cifar10" / "plan.yaml").read_text())
    text = " ".join((ROOT / "docs" / "studies.md").read_text().split())
    epochs = plan["runs"]["teacher"]["options"]["trainer.max_epochs"]
    assert all(plan["runs"][name]["options"]["trainer.max_epochs"] == epochs for name in ("control", "dml", "hint"))
    assert f"{epochs} epochs a run on two cores of a CPU" in text
    assert f"projected {plan['projected_minutes'] / 60:.0f} hours" in text
    assert f"--budget_minutes {plan['budget_minutes']:.0f} --dry_run" in text


def test_what_has_been_run_of_the_published_study():
    """The control beside the published students: how many of their accuracies it is above, what each loses."""
    readme, page, own = (
        " ".join(path.read_text().split())
        for path in (ROOT / "README.md", ROOT / "docs" / "studies.md", RESULTS / "published_cifar10" / "README.md")
    )
    assert published_table() in (ROOT / "docs" / "studies.md").read_text()
    found = published_control()
    whole, default = found["", FLOAT_BITS], {bits: found["default", bits].test_top1 for bits in BIT_WIDTHS}
    for text in (readme, page):
        assert f"{whole.epochs} epochs" in text
        assert f"{whole.test_top1:.2f} %" in text and f"{default[2]:.2f} %" in text
    assert f"{whole.epochs} epochs on 45,000 images" in own
    above = {name: sum(default[bits] > row[bits - 2] for bits in BIT_WIDTHS) for name, row in published_students()}
    words = ", ".join(f"{count} of {name}" for name, count in above.items())
    widths = len(BIT_WIDTHS)
    assert f"above {sum(above.values())} of the {widths * len(above)} quantized ones ({words}; {widths} each)" in page
    lost = ", ".join(f"{row[-1] - row[0]:.1f} ({name})" for name, row in published_students())
    control = [f"{whole.test_top1 - value:.1f}" for value in (default[2], found["gpfq", 2].test_top1)]
    words = "the control {} (by `gpfq`, with as many levels as theirs, {})".format(*control)
    assert f"those students lose {lost} points, {words}" in page
    assert f"none of the {sum(len(row) for rows in TOP1.values() for row in rows.values())} published cells" in page


def test_the_command_of_the_control(monkeypatch: pytest.MonkeyPatch):
    """What stands beside its records trains the same thing again."""
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(
        r"```sh\nkdq (.*?)```", (RESULTS / "published_cifar10" / "README.md").read_text(), re.DOTALL
    )
    (recorded,) = {record.config_hash for record in published_control().values()}
    assert read_settings(shlex.split(command.replace("\\\n", " "))).config_hash == recorded


def published_students() -> list[tuple[str, tuple[float, ...]]]:
    """Return title and accuracies at `PUBLISHED_BITS` of the published students of CIFAR-10, percent."""
    return [(APPEARANCES[name].title, row) for name, row in TOP1["cifar10"].items() if name != "teacher"]


def published_control() -> dict[tuple[str, float], Record]:
    """Return the records in results/published_cifar10, all of which are of one control, by method and bit width."""
    (records,) = find_records(RESULTS / "published_cifar10").values()
    assert {record.strategy for record in records} == {"control"}  # with another run, the words that quote this are old
    return {(record.method, record.bits): record for record in records}


def published_table() -> str:
    """Return the published accuracies of CIFAR-10's students and those measured here as a Markdown table, percent."""
    lines = ["| | levels | " + " | ".join(f"{bits} bits" for bits in PUBLISHED_BITS) + " |"]
    lines.append("|---|---|" + "---:|" * len(PUBLISHED_BITS))
    for name, row in published_students():
        lines.append(f"| {name}, published | 2^b + 1 | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    found = published_control()
    for method, levels in (("gpfq", "2^b + 1"), ("default", "2^b")):
        own = [found[method, bits] for bits in BIT_WIDTHS] + [found["", FLOAT_BITS]]
        lines.append(f"| Control, `{method}` | {levels} | " + " | ".join(f"{row.test_top1:.2f}" for row in own) + " |")
    return "\n".join(lines)


def test_report_of_the_study(tmp_path: Path, without_pictures: None):
    """The committed report is what the records give today, and the README quotes it."""
    assert main(["report", str(RESULTS / "cpu_cifar10"), "--out", str(tmp_path)]) == 0
    report = RESULTS / "cpu_cifar10" / "report"
    texts = [path for path in sorted(report.iterdir()) if path.suffix in (".md", ".csv", ".tex")]
    assert [path.name for path in texts] == sorted(
        path.name for path in tmp_path.iterdir() if path.suffix in (".md", ".csv", ".tex")
    )
    for path in texts:
        assert path.read_text() == (tmp_path / path.name).read_text(), path.name
    assert len([line for line in quoted("study_cpu") if line.startswith("|")]) >= 4
    assert set(quoted("study_cpu")) <= set((report / "report.md").read_text().splitlines())


def quoted(study: str) -> list[str]:
    """Return the lines of the README between the marks of a study."""
    text = (ROOT / "README.md").read_text().split(f"<!-- {study} -->")[1].split("<!-- end -->")[0]
    return [line for line in text.splitlines() if line]


def test_report_of_the_quickstart(tmp_path: Path):
    """The README quotes what the report says of the committed records, those of the study as it is shipped."""
    folder = RESULTS / "quickstart_digits"
    assert main(["report", str(folder), "--out", str(tmp_path)]) == 0
    assert len(quoted("study_quickstart")) >= 4
    assert set(quoted("study_quickstart")) <= set((tmp_path / "report.md").read_text().splitlines())
    hashes = {(record.run, record.seed): record.config_hash for own in find_records(folder).values() for record in own}
    runs = read_study(ROOT / "configs" / "study_quickstart.yaml", Path("runs"))
    assert {(run.name, run.seed) for run in runs} == hashes.keys()
    for run in runs:
        if run.seed == 0:
            assert read_settings(run.settings_arguments).config_hash == hashes[run.name, 0], run.name


def test_bytes_of_the_files():
    """The table of docs/standard_files.md is that of the records."""
    assert files_table((2, 3, 4, 8)) in (ROOT / "docs" / "standard_files.md").read_text()


def test_onnx_files_are_hardly_larger_than_packed_ones():
    """At most 3 % and 1 kB a layer, as the page says."""
    for network, layers in (("resnet20", 20), ("resnet56", 56), ("resnet18", 21)):
        files = json.loads((RESULTS / "files" / f"{network}.json").read_text())["files"]
        for bits in (2, 3, 4, 8):
            packed = files[f"torch, {bits}-bit file"]
            assert packed < files[f"onnxruntime planes, {bits} bits"] <= 1.03 * packed + 1000 * layers


def test_accuracies_of_mixed_bits():
    """The table of docs/mixed_bits.md is that of the records."""
    text = (ROOT / "docs" / "mixed_bits.md").read_text()
    assert mixed_table() in text


@pytest.mark.parametrize("path", sorted((RESULTS / "engine").glob("mixed-*.json")), ids=lambda path: path.stem)
def test_a_third_is_won_back(path: Path):
    """As docs/mixed_bits.md says: a third at 2 and at 3 bits, and half-way a place above the line between them."""
    top = {(row["method"], row["size"]): mean(row["top1"]) for row in json.loads(path.read_text())["choices"]}
    for size in ("2 bits", "3 bits"):
        lost = top["float", ""] - top["uniform", size]
        assert top["mixed", size] - top["uniform", size] >= lost / 3
    line = (top["uniform", "2 bits"] + top["uniform", "3 bits"]) / 2
    assert top["mixed", "half-way from 2 to 3 bits"] > line


def test_figure_of_mixed_bits():
    """The figure of docs/mixed_bits.md is that of the records: its words and ticks, and all of it by one Matplotlib."""
    drawn, committed = mixed_figure(), (ROOT / "docs" / "mixed_bits.svg").read_text()
    words, version = re.compile(r"<!-- (.*?) -->"), re.compile(r"Matplotlib v[\d.]+")
    assert words.findall(committed) == words.findall(drawn)
    if version.findall(committed) == version.findall(drawn):
        assert committed == drawn


def mixed_figure() -> str:
    """Return the figure of the records in results/engine/mixed-*.json as SVG."""
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / "engine").glob("mixed-*.json"))]
    return render(draw_choices(records), "svg").decode()


def mixed_table() -> str:
    """Return the accuracies in results/engine/mixed-*.json as a Markdown table, percent."""
    lines = [
        "| network | draws | bytes of | kB | uniform | random | mixed | won back |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for path in sorted((RESULTS / "engine").glob("mixed-*.json")):
        record = json.loads(path.read_text())
        found = {(row["method"], row["size"]): row for row in record["choices"]}
        top = {key: mean(row["top1"]) for key, row in found.items()}
        whole = top["float", ""]
        for (method, size), row in found.items():
            if method != "mixed":
                continue
            other = "uniform" if ("uniform", size) in top else "first and last at 8 bits"
            name = size.removesuffix(", first and last at 8") if other != "uniform" else size
            rival = top.get((other, name))
            won = (
                "-"
                if rival is None or rival >= whole
                else f"{100 * (top[method, size] - rival) / (whole - rival):.0f} %"
            )
            kilobytes = mean(row["file_bytes"]) / 1000
            cells = [f"{value:.2f}" if value is not None else "-" for value in (rival, top.get(("random", size)))]
            cells += [f"{top[method, size]:.2f}", won]
            label = f"{record['network']}, float {whole:.2f}"
            lines.append(f"| {label} | {record['draws']} | {size} | {kilobytes:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_what_bits_layer_by_layer_win_back():
    lines = [line.strip("| ").split(" | ") for line in mixed_table().splitlines() if "resnet20" in line]
    won = {cells[2]: cells[-1] for cells in lines}
    words = f"{won['2 bits']} of what a resnet20 loses at 2 bits, and {won['3 bits']} of what it loses at 3"
    assert words in " ".join((ROOT / "README.md").read_text().split())


def files_table(widths: tuple[int, ...]) -> str:
    """Return the sizes in results/files at some bit widths as a Markdown table, kB."""
    lines = ["| network | bits | packed | `planes` | `qdq` | float32 |", "|---|---|---:|---:|---:|---:|"]
    for network in ("resnet20", "resnet56", "resnet18"):
        files = json.loads((RESULTS / "files" / f"{network}.json").read_text())["files"]
        for bits in widths:
            names = (
                f"torch, {bits}-bit file",
                f"onnxruntime planes, {bits} bits",
                f"onnxruntime qdq, {bits} bits",
                "onnxruntime float32",
            )
            cells = " | ".join(f"{files[name] / 1e3:,.0f}" for name in names)
            lines.append(f"| {network} | {bits} | {cells} |")
    return "\n".join(lines)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *RESULTS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"
