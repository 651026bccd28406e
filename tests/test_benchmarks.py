"""The benchmarks at toy size: every way runs, the table and the JSON are whole.

pytest tests/test_benchmarks.py
"""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compiled, learning, loader, step
from benchmarks import pretrain as benchmark

TOY = [
    "--preset",
    "demo",
    "--size",
    "32",
    "--device",
    "cpu",
    "--text",
    "8",
    "--batches",
    "1",
    "--steps",
    "1",
]


def test_every_way_of_the_step_gives_a_row(tmp_path, capsys):
    rows = step.main([*TOY, "--sample", "fp8", "--out", str(tmp_path / "step.json")])
    assert [r.way for r in rows] == ["peer", "peer", "bf16", "fp8", "fp8 sample", "24g", "48g"]
    assert all(r.seconds > 0 and r.images_s > 0 for r in rows)
    assert len(json.loads((tmp_path / "step.json").read_text())["rows"]) == len(rows)
    assert "| fp8 sample | 4 | 8 |" in capsys.readouterr().out


def test_fp8_learns_what_bf16_learns(monkeypatch):
    monkeypatch.setattr(learning, "SIZE", 32)
    monkeypatch.setattr(learning, "BATCH", 4)
    gap = learning.learning_gap(8, "cpu", preset="demo")
    assert abs(gap["fp8_difference"]) < 0.05


def test_stage_1_by_every_way_has_the_same_loss(monkeypatch, tmp_path):
    real = torch.compile

    def traced(function, options=None, **how):
        return real(function, backend="aot_eager", **how)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(
        benchmark,
        "OURS",
        {
            "fp32": dict(mixed_precision="no", compile=False),
            "compiled": dict(mixed_precision="no", compile=True),
        },
    )
    out = tmp_path / "pretrain.json"
    rows = benchmark.main(
        [
            "--backbone",
            "resnet18",
            "--size",
            "32",
            "--batch",
            "2",
            "--steps",
            "3",
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
    )
    assert [r.way for r in rows] == ["peer", "peer, plain decoder", "fp32", "compiled"]
    same = [rows[0].loss, rows[2].loss, rows[3].loss]  # of one network
    assert same == pytest.approx([rows[0].loss] * 3, rel=1e-2)
    assert rows[2].times_peer == rows[2].images_s / rows[0].images_s
    assert len(json.loads(out.read_text())["rows"]) == 4


TINY_STEP = [
    "--backbone",
    "resnet18",
    "--size",
    "32",
    "--batch",
    "2",
    "--steps",
    "1",
    "--device",
    "cpu",
]


def test_the_compiled_step_has_the_gradients_of_the_other(monkeypatch, capsys):
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, options=None, **how: real(f, backend="aot_eager", **how)
    )
    found = compiled.main(TINY_STEP)
    assert list(found) == list(compiled.PARTS)
    # of few pixels, BatchNorm leaves the encoder a gradient of noise
    heads = compiled.PARTS[2:]
    assert all(0 < found[part][0] < 0.1 for part in heads)
    assert "| material_head |" in capsys.readouterr().out


def test_another_gradient_is_told(monkeypatch):
    def wrong(function, **how):
        def step(*args):
            loss, parts = function(*args)
            return loss + 0.5 * (loss - loss.detach()), parts  # the same value

        return step

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(SystemExit, match="gradient of .*material_head.*compile=false"):
        compiled.main(TINY_STEP)


def test_every_way_of_the_loader_gives_a_row(tmp_path, capsys):
    out = tmp_path / "loader.json"
    rows = loader.main(
        [
            "--size",
            "32",
            "--scenes",
            "6",
            "--batches",
            "3",
            "--workers",
            "0",
            "1",
            "--step_seconds",
            "0.01",
            "--out",
            str(out),
        ]
    )
    ways = [(way, workers) for way in ("parquet", "cached", "latents") for workers in (0, 1)]
    assert [(r.way, r.workers) for r in rows] == ways
    assert all(r.pairs_s > 0 and 0 <= r.wait < 1 for r in rows)
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 6
    assert [part["part"] for part in found["parts"]] == ["decode", "sample", "latents"]
    assert all(part["cpu_ms"] > 0 for part in found["parts"])
    assert "| latents | 1 |" in capsys.readouterr().out


def test_the_loader_opens_sets_of_as_many_rows_as_asked(tmp_path):
    out = tmp_path / "rows.json"
    found = loader.main(["--rows", "300", "--batches", "2", "--out", str(out)])
    assert [f.rows for f in found] == [f["rows"] for f in json.loads(out.read_text())] == [300]
    assert found[0].draws_s > 0 and found[0].seconds > 0


def test_the_wait_is_what_the_loader_lacks_of_a_step(monkeypatch):
    clock = [0.0]

    def passes(seconds):
        clock[0] += seconds

    class Slow:
        """Pairs that take 20 ms each."""

        shapes = None

        def __len__(self):
            return 8

        def order(self, seed, epoch):
            return range(8)

        def get(self, index, rng, shape):
            passes(0.02)
            zero = torch.zeros(1)
            return dict(visible=zero, infrared=zero, semantic=zero, name="", source="")

    ours = SimpleNamespace(perf_counter=lambda: clock[0], sleep=passes)
    monkeypatch.setattr(loader, "time", ours)
    args = loader.parse(["--batch", "2", "--batches", "5", "--step_seconds", "0.06"])
    row = loader.measure(args, "parquet", Slow(), workers=0)
    assert (row.pairs_s, row.wait) == (pytest.approx(50), pytest.approx(0.4))  # 40 of 100 ms
