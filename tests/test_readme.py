"""The README's numbers are those of the committed records."""

import json
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
BITS = (2, 3, 4, 5, 8)


def test_accuracies_of_the_engine():
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| resnet")]
    assert len(rows) == 7
    for name, network, method, levels, *cells in rows:
        record = json.loads((ROOT / "results" / "engine" / f"{name}.json").read_text())
        found = {(row["method"], row["bits"]): row for row in record["accuracies"]}
        assert network == f"{mean(found['float', 32]['top1']):.2f}"
        assert levels == str(found[method, 2]["levels"])
        expected = [f"{mean(found[method, bits]['top1']):.2f}" if (method, bits) in found else "-" for bits in BITS]
        assert cells == expected
