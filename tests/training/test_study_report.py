import csv
import itertools
import json

import numpy as np
import pytest

from training.study_report import findings, flat, table, write_report

EPISODES = 200


def cell(
    method="original", ratio=0.0, quantization="none", rate=0.9, latency=1.0, memory=1.0, **more
):
    kind = {"original": "original", "Wanda": "sparse"}.get(method, "structured")
    success = [bool(i < rate * EPISODES) for i in range(EPISODES)]
    return {
        "cell": f"{method}-{ratio:g}-{quantization}",
        "method": method,
        "kind": kind,
        "ratio": ratio,
        "quantization": quantization,
        "removed_of_layers": ratio if kind == "structured" else 0.0,
        "removed_of_llm": 0.8 * ratio if kind == "structured" else 0.0,
        "zeros_of_layers": ratio if kind == "sparse" else 0.0,
        "zeros_of_llm": 0.0,
        "latency_ms": {"p50": 10 * latency, "p99": 12 * latency},
        "latency_of_original": latency,
        "latency_of_original_ci95": [0.98 * latency, 1.02 * latency],
        "memory_bytes": {"llm": int(1e6 * memory), "total": int(2e6 * memory)},
        "memory_of_original": {"llm": memory, "total": memory},
        "environments": {
            "tabletop": {
                "episodes": EPISODES,
                "successes": sum(success),
                "success_rate": np.mean(success),
                "ci95": [max(0, rate - 0.04), min(1, rate + 0.04)],
                "success": success,
            }
        },
    }


def grid(loss=0.0, structured_rate=0.6, gains=(0.9, 0.95), latency=0.5):
    """The original and two methods at one ratio, with NF4; what quantization does to each."""
    rates = {"original": 0.9, "Wanda": 0.85, "Taylor": structured_rate}
    cells = []
    for method, quantized in itertools.product(rates, (False, True)):
        structured = method == "Taylor"
        base = latency if structured else 1.0
        cells.append(
            cell(
                method,
                0.0 if method == "original" else 0.5,
                "nf4" if quantized else "none",
                rates[method] - (loss if quantized else 0),
                base * (gains[structured] if quantized else 1),
                (0.5 if structured else 1.0) * (0.3 if quantized else 1),
            )
        )
    return cells


def verdicts(results):
    return [finding["verdict"] for finding in findings(results)]


def test_what_the_paper_found_is_confirmed_where_it_holds():
    assert verdicts(grid()) == ["confirmed"] * 4


def test_a_loss_of_success_by_quantization_contradicts():
    found = findings(grid(loss=0.2))
    assert found[0]["verdict"] == found[2]["verdict"] == "contradicted"
    assert "-20.0 points" in found[0]["numbers"]


def test_structured_pruning_that_hurts_less_or_is_no_faster_contradicts():
    assert verdicts(grid(structured_rate=0.9))[1] == "contradicted"
    assert verdicts(grid(latency=1.1))[1] == "contradicted"


def test_a_gain_that_grows_contradicts():
    found = findings(grid(gains=(0.9, 0.7)))[3]
    assert found["verdict"] == "contradicted"
    assert (
        found["numbers"] == "Taylor nf4: 1.11× as fast with 0% of the LLM removed, 1.43× with 40%"
    )


def test_what_the_grid_does_not_hold_stays_open():
    assert verdicts([cell()]) == ["open"] * 4
    assert verdicts([cell(), cell("Taylor", 0.5)]) == ["open"] * 4


def test_reports_hold_every_cell_and_say_what_was_not_reachable(tmp_path):
    lost = {k: v for k, v in cell("Taylor", 0.9).items() if k in ("method", "kind", "ratio")}
    lost |= {"cell": "taylor-0.9", "quantization": "none", "unreachable": "prune: at most 80%"}
    results = [*grid(), lost]
    summary = write_report(tmp_path, results)
    with (tmp_path / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == [result["cell"] for result in results]
    assert float(rows[0]["success_rate"]) == pytest.approx(0.9) and rows[0]["episodes"] == "200"
    assert rows[-1]["unreachable"] == "prune: at most 80%" and rows[-1]["success_rate"] == ""
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    text = (tmp_path / "table.txt").read_text()
    assert text.count("\n") == 1 + len(results) and "not reachable" in text
    for name in ("success", "latency-and-memory", "quantization-gain"):
        picture = (tmp_path / f"{name}.svg").read_text()
        assert picture.startswith("<?xml") and ("Taylor" in picture or "removed" in picture)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_report(tmp_path, results)
    assert first == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_grid_of_the_original_alone_can_be_reported(tmp_path):
    write_report(tmp_path, [cell()])
    assert "original" in table(flat(cell()))
