"""The benchmark of the step at toy size: every way runs, the table and the JSON are whole.

    pytest tests/test_benchmarks.py
"""

import json

from benchmarks import learning, step

TOY = ["--preset", "demo", "--size", "32", "--device", "cpu", "--text", "8", "--batches", "1",
       "--steps", "1"]  # fmt: skip


def test_every_way_of_the_step_gives_a_row(tmp_path, capsys):
    rows = step.main([*TOY, "--sample", "fp8", "--out", str(tmp_path / "step.json")])
    assert [r.way for r in rows] == ["peer", "peer", "bf16", "fp8", "fp8 sample", "24g"]
    assert all(r.seconds > 0 and r.images_s > 0 for r in rows)
    assert len(json.loads((tmp_path / "step.json").read_text())["rows"]) == len(rows)
    assert "| fp8 sample | 4 | 8 |" in capsys.readouterr().out


def test_fp8_learns_what_bf16_learns(monkeypatch):
    monkeypatch.setattr(learning, "SIZE", 32)
    monkeypatch.setattr(learning, "BATCH", 4)
    gap = learning.learning_gap(8, "cpu", preset="demo")
    assert abs(gap["difference"]) < 0.05
