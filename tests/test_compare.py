"""Methods at equal seconds: the table of commands, what is run, and the table of what is there.

pytest tests/test_compare.py
"""

import json
import sys
from pathlib import Path

import pytest

import compare
from assembly.comparison import CompareConfig, commands_of
from tests.conftest import ROOT
from tests.test_evaluation import summarised
from tests.test_measures import scenes
from utils import config, results

TOY = """
methods:
  unet:
    - 1.0 baselines/unet.py model.width=4 model.levels=2 training.warmup_steps=0
  broken:
    - 1.0 baselines/unet.py model.levels=99
common: [data.size=32, "data.synthetic_scenes={train: 6, val: 2, test: 3}", data.num_workers=0,
         training.batch_size=2, training.mixed_precision=no, training.eval_every=0, run.images=0]
seeds: [0, 1]
seconds: 1
evaluate: ["--num_workers", "0"]
"""


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, argv), "--device", "cpu"])
    compare.main()


def write_run(folder: Path, name: str, seed: int, images: dict, protocol="p") -> None:
    """What compare.py leaves of a finished run, with rows of the given images."""
    summary, found = summarised(scenes(8, 64), **images)
    out = folder / name / f"seed_{seed}" / "results"
    out.mkdir(parents=True)
    whole = {**summary, "protocol": {"id": protocol}, "run": {"seconds_an_image": {}}}
    results.write(out, found.images, found.boxes, whole, "")
    (out.parent / "compare.json").write_text(json.dumps({"commands": [], "finished": True}))


def test_every_step_gets_its_share_its_seed_and_the_folder_before():
    cfg = config.from_dict(
        CompareConfig,
        {
            "methods": {"a": ["0.25 x.py", "0.75 y.py --from {before}/best_model.pth"]},
            "seconds": 80,
            "output_dir": "out",
            "common": ["data.size=32"],
            "boxes": "b",
        },
    )
    first, second, last = commands_of(cfg, "a", 3)
    assert first[:2] == ["x.py", "data.size=32"] and "training.max_seconds=20" in first
    assert "training.max_seconds=60" in second and "out/a/seed_3/1_x/best_model.pth" in second
    assert all("training.seed=3" in x and "training.steps=0" in x for x in (first, second))
    assert last[:3] == ["evaluate.py", "--checkpoint", "out/a/seed_3/2_y"] and "b" in last


@pytest.mark.parametrize(
    "change, said",
    [
        ({"methods": {"a": ["0.5 x.py"]}}, "must add up to 1"),
        ({"methods": {"a": ["x.py"]}}, "a step is"),
        ({"methods": {"../a": ["1 x.py"]}}, "becomes a folder"),
        ({"methods": {}}, "methods names none"),
        ({"only": "b"}, "only is b, methods are a"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"seconds": 0}, "above 0"),
    ],
)
def test_a_table_of_commands_that_cannot_work_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        config.from_dict(CompareConfig, {"methods": {"a": ["1 x.py"]}, **change})


def test_the_repositorys_own_table_is_read():
    cfg = config.load(CompareConfig, ["--config", str(ROOT / "configs/compare.yaml")])
    assert list(cfg.methods) == ["stage1", "unet", "pix2pix", "ours"]
    for name in cfg.methods:
        for command in commands_of(cfg, name, 0):
            assert (ROOT / command[0]).is_file()


def test_runs_are_started_one_by_one_and_the_table_is_made_of_what_is_there(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "toy.yaml").write_text(TOY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    common = ["--config", tmp_path / "toy.yaml", "--output_dir", tmp_path / "out"]
    call(monkeypatch, *common, "--only", "unet", "--seed", 1)
    out = capsys.readouterr().out
    assert "| unet: U-Net |" in out and "finished seeds: unet 1, broken 0" in out
    steps = (tmp_path / "out/unet/seed_1/1_unet/metrics.jsonl").read_text().splitlines()
    assert json.loads(steps[-1])["step"] > 1
    call(monkeypatch, *common, "--only", "unet", "--seed", 1)
    assert "unet, seed 1: finished before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with other values"):
        call(monkeypatch, *common, "--only", "unet", "--seed", 1, "--seconds", 2)
    # a run that fails is named, and what is there is still shown
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, *common, "--only", "broken", "--seed", 0)
    found = capsys.readouterr()
    assert end.value.code == 1 and "| unet: U-Net |" in found.out
    assert "broken, seed 0: baselines/unet.py ended with 2, see" in found.err


def test_the_table_averages_over_seeds_and_doubts_what_seeds_contradict(tmp_path):
    true = scenes(8, 64)
    noise = scenes(8, 64, 9, 0) - 0.5
    good, bad = (true + 0.1 * noise).clamp(0, 1), (true + 0.4 * noise).clamp(0, 1)
    for seed, (a, b, c) in enumerate([(good, bad, bad), (good, bad, bad), (good, bad, true)]):
        write_run(tmp_path, "a", seed, {"grey": bad, "A": a})
        write_run(tmp_path, "b", seed, {"grey": bad, "B": b})
        write_run(tmp_path, "c", seed, {"grey": bad, "C": c})
    cfg = CompareConfig(methods={x: ["1 x.py"] for x in "abc"}, output_dir=str(tmp_path))
    compare.write_table(cfg)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert list(found["methods"]) == ["grey", "a: A", "b: B", "c: C"]
    assert list(found["seeds"]["a: A"]["mae"]) == ["0", "1", "2"]
    assert found["methods"]["b: B"]["mae"] == pytest.approx(found["seeds"]["b: B"]["mae"]["0"])
    assert found["differences"]["a: A"]["b: B"]["mae"]["verdict"] == "ahead"
    c = found["differences"]["c: C"]["a: A"]["mae"]
    assert c["interval"][0] > 0 and c["verdict"] == "cannot be told"  # one seed is nearer
    assert "finished seeds: a 3, b 3, c 3" in (tmp_path / "compare.md").read_text()


def test_runs_on_other_pairs_are_not_put_into_one_table(tmp_path):
    write_run(tmp_path, "a", 0, {"A": scenes(8, 64)}, "p")
    write_run(tmp_path, "b", 0, {"B": scenes(8, 64)}, "q")
    cfg = CompareConfig(methods={x: ["1 x.py"] for x in "ab"}, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"different pairs or sizes \(a 0: p, b 0: q\)"):
        compare.write_table(cfg)
