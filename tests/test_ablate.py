"""ablate.py: what it runs, what it does not run again, its table, and what it refuses.

    pytest tests/test_ablate.py

The scripts are stand-ins that log known numbers, but for one test that trains in earnest.
"""

import json
import re
import statistics
import sys

import pytest

import ablate
import pretrain
from assembly.ablation import AblateConfig, StageConfig
from tests.conftest import ROOT
from utils import config
from utils.run import entry

DEMO = "configs/demo/pretrain.yaml"
# logs three rows; fails, or stops as after a signal, where the learning rate says so
FAKE_TRAINING = """
import json, pathlib, sys
given = dict(x.split("=", 1) for x in sys.argv[1:] if "=" in x and not x.startswith("--"))
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
lr = float(given.get("optimizer.params.lr", 1))
if lr == 5:
    sys.exit("error: the learning rate is 5")
if lr == 6:
    sys.exit(print("stopped by a signal after step 1 of 2"))
with open(folder / "metrics.jsonl", "w") as file:
    for step, rate in ((1, 1.0), (2, 30.0), (3, 32.0)):
        row = dict(step=step, images_per_s=rate, val_psnr=lr * step + int(given["training.seed"]))
        file.write(json.dumps({**row, "val_miou": None}) + "\\n")
with open(folder / "runs.txt", "a") as file:
    file.write("once\\n")
print("done")
"""
FAKE_EVALUATION = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
checkpoint = pathlib.Path(sys.argv[1].partition("=")[2])
last = json.loads((checkpoint.parent / "metrics.jsonl").read_text().splitlines()[-1])
ours = {"ours": {"psnr": last["val_psnr"] + 100}}
(folder / "results.json").write_text(json.dumps({"methods": ours, "stage1": {"miou": 0.5}}))
"""
GRID = """
stages:
  pretrain: {script: pretrain.py, overrides: [physics=off]}
variants:
  low: []
  high: [optimizer.params.lr=10]
seeds: [1, 2, 4]
"""
CHAIN = """
stages:
  first: {script: pretrain.py}
  second: {script: train.py, overrides: ["model.decomposition_checkpoint={first}/best_model.pth"]}
  last: {script: evaluate.py, overrides: ["checkpoint={second}/best_model.pth"]}
variants:
  guided: []
  unguided: {second: ["model.inject={}", optimizer.params.lr=10]}
  without: [physics=off]
seeds: [0]
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """ablate.py with stand-ins for the scripts beside it; gives the grid's output folder."""
    monkeypatch.chdir(ROOT)  # the scripts' own default files are read from here
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("pretrain", "train"):
        (folder / f"{name}.py").write_text(FAKE_TRAINING)
    (folder / "evaluate.py").write_text(FAKE_EVALUATION)
    monkeypatch.setattr(ablate, "__file__", str(folder / "ablate.py"))
    return tmp_path / "out"


def call(monkeypatch, out, text: str, *more: str) -> int:
    """The exit code of `python ablate.py` on a file with this text."""
    file = out.parent / "grid.yaml"
    file.write_text(text)
    arguments = ["ablate.py", "--config", str(file), "--output_dir", str(out), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        entry(ablate.main)
    except SystemExit as stop:
        return stop.code
    return 0


def table(out) -> dict:
    return json.loads((out / "table.json").read_text())["variants"]


def test_the_table_has_mean_and_deviation_of_the_runs_own_last_values(scripts, monkeypatch, capsys):
    assert call(monkeypatch, scripts, GRID) == 0
    found = table(scripts)
    for name, lr in (("low", 1), ("high", 10)):
        each = [3 * lr + seed for seed in (1, 2, 4)]
        assert found[name]["seeds"] == [1, 2, 4]
        psnr = found[name]["metrics"]["val_psnr"]
        assert psnr["values"] == each
        assert psnr["mean"] == pytest.approx(statistics.mean(each))
        assert psnr["std"] == pytest.approx(statistics.stdev(each))
        # the median, as the first row has the start-up
        assert found[name]["metrics"]["images_per_s"]["values"] == [30.0] * 3
        assert "val_miou" not in found[name]["metrics"]  # never a number
    text = (scripts / "table.md").read_text()
    assert "| low | 3 | 5.333 ± 1.528 | 30.00 ± 0.00 |" in text
    assert text in capsys.readouterr().out


def test_finished_runs_are_not_run_again_and_others_are(scripts, monkeypatch):
    def times() -> list[int]:
        files = sorted(scripts.glob("*/*/*/runs.txt"))
        return [len(file.read_text().splitlines()) for file in files]

    call(monkeypatch, scripts, GRID)
    assert times() == [1] * 6
    marker = scripts / "high/seed_2/pretrain/ablate.json"
    marker.write_text(marker.read_text().replace("true", "false"))  # as if it had been killed
    call(monkeypatch, scripts, GRID)
    assert sorted(times()) == [1] * 5 + [2]
    assert (scripts / "high/seed_2/pretrain/runs.txt").read_text() == "once\nonce\n"


def test_a_failed_run_is_named_and_the_others_finish(scripts, monkeypatch, capsys):
    bad = GRID.replace("seeds", "  bad: [optimizer.params.lr=5]\nseeds")
    assert call(monkeypatch, scripts, bad, "--jobs", "3") == 1
    said = capsys.readouterr()
    assert "3 failed" in said.err and "bad, seed 4, pretrain (exit code 1" in said.err
    assert "error: the learning rate is 5" in said.err
    found = table(scripts)
    assert found["low"]["seeds"] == found["high"]["seeds"] == [1, 2, 4]
    assert found["bad"]["seeds"] == [] and "| bad | 0 | - | - |" in said.out
    assert "3 runs shared the machine" in said.out


def test_a_run_that_a_signal_stopped_does_not_count_as_finished(scripts, monkeypatch, capsys):
    stopped = GRID.replace("lr=10", "lr=6")
    assert call(monkeypatch, scripts, stopped, "seeds=[0]") == 1
    assert "stopped by a signal after step 1 of 2" in capsys.readouterr().err
    marker = json.loads((scripts / "high/seed_0/pretrain/ablate.json").read_text())
    assert not marker["finished"]


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_stages_follow_each_other_and_what_is_common_runs_once(scripts, monkeypatch, jobs):
    assert call(monkeypatch, scripts, CHAIN, "--jobs", jobs) == 0
    found = {name: row["metrics"] for name, row in table(scripts).items()}
    assert found["guided"]["ours/psnr"]["mean"] == 103  # of the run that it names
    assert found["unguided"]["ours/psnr"]["mean"] == 130
    made = {str(p.parent.relative_to(scripts)) for p in scripts.glob("*/*/*/runs.txt")}
    assert made == {
        "guided/seed_0/first",
        "guided/seed_0/second",
        "unguided/seed_0/second",
        "without/seed_0/first",
        "without/seed_0/second",
    }


def test_what_waits_for_a_failed_stage_is_not_run(scripts, monkeypatch, capsys):
    assert call(monkeypatch, scripts, CHAIN.replace("physics=off", "optimizer.params.lr=5")) == 1
    said = capsys.readouterr().err
    assert "without, seed 0, second: not run, as without, seed 0, first failed" in said
    assert not (scripts / "without/seed_0/second").exists()
    assert table(scripts)["guided"]["seeds"] == [0]


def test_a_dry_run_prints_the_commands_and_leaves_nothing(scripts, monkeypatch, capsys):
    assert call(monkeypatch, scripts, CHAIN, "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and not scripts.exists()
    assert "training.seed=0 'model.inject={}' optimizer.params.lr=10" in "\n".join(lines)


def test_a_folder_with_other_values_is_refused(scripts, monkeypatch, capsys):
    call(monkeypatch, scripts, GRID)
    assert call(monkeypatch, scripts, GRID.replace("lr=10", "lr=11")) == 2
    said = capsys.readouterr().err
    assert "high/seed_1/pretrain was made with other values (optimizer.params.lr=11" in said


def test_an_edited_config_of_a_stage_and_a_damaged_note_are_named(
    scripts, monkeypatch, capsys, tmp_path
):
    file = tmp_path / "stage.yaml"
    file.write_text("training: {steps: 1}")
    grid = GRID.replace("pretrain.py,", f"pretrain.py, config: {file},")
    assert call(monkeypatch, scripts, grid) == 0
    assert call(monkeypatch, scripts, grid) == 0
    file.write_text("training: {steps: 3}")
    assert call(monkeypatch, scripts, grid) == 2
    assert re.search(r"made with other values \(\S*stage.yaml with sha256", capsys.readouterr().err)
    file.write_text("training: {steps: 1}")
    note = next(scripts.rglob("ablate.json"))
    note.write_text('{"comm')
    assert call(monkeypatch, scripts, grid) == 2
    assert f"{note} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        (("stages:", "stage:"), "unknown key stage in .*did you mean stages"),
        (("low: []\n  high: [optimizer.params.lr=10]", "{}"), "need at least one entry"),
        (
            ("pretrain.py", "pretain.py"),
            "script is 'pretain.py', must be one of pretrain.py, train.py",
        ),
        (("physics=off", "'run.output_dir={dir}'"), r"\{dir\} in .* is no placeholder; known are"),
        (("optimizer.params.lr=10", "optimiser=1"), "variant high, stage pretrain: unknown key"),
        (("[1, 2, 4]", "[1, 1]"), "different numbers"),
        (("low: []", "low: {train: []}"), "changes the stage 'train'; the stages are pretrain"),
        (("low", "a b"), "'a b' becomes a folder"),
        (("physics=off", "--config=none.yaml"), "none.yaml"),
        (("low: []", "low: [training.seed=7]"), "sets training.seed; use `seeds`"),
        (("physics=off", "run.output_dir=x"), "sets the folder; use --output_dir"),
    ],
)
def test_a_wrong_file_is_one_sentence_and_nothing_runs(scripts, monkeypatch, capsys, change, said):
    assert call(monkeypatch, scripts, GRID.replace(*change)) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert error.count("\n") == 1 and not scripts.exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablate").glob("*.yaml")), ids=str)
def test_the_files_that_we_ship_are_accepted_by_the_scripts_they_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = config.load(AblateConfig, ["--config", str(path), f"output_dir={tmp_path}"])
    runs = ablate.plan(cfg)
    assert len(runs) == len(cfg.variants) * 3
    commands = {name: runs[name, 0][-1].arguments[:-1] for name in cfg.variants}
    assert len({str(x) for x in commands.values()}) == len(commands)  # no two are the same run


def test_two_variants_trained_in_earnest_have_the_numbers_of_their_logs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = [
        "data.size=32",
        "model.width=8",
        "training.batch_size=2",
        "training.steps=1",
        "run.images=0",
        "run.device=cpu",
        "training.save_every=0",
        "data.synthetic_scenes={train: 2, val: 1, test: 1}",
    ]
    text = config.to_yaml(
        AblateConfig(
            stages={"pretrain": StageConfig(script="pretrain.py", config=DEMO)},
            variants={"skips": ["model.decoder=skips"], "plain": ["model.decoder=plain"]},
            overrides=small,
            seeds=[3],
        )
    )

    def here(command: list[str], **_) -> int:
        """In this process, as starting two others takes most of a minute on a busy machine."""
        monkeypatch.setattr(sys, "argv", command[1:])
        return pretrain.main() or 0

    monkeypatch.setattr(ablate.subprocess, "call", here)
    out = tmp_path / "out"
    assert call(monkeypatch, out, text) == 0
    for name in ("skips", "plain"):
        folder = out / name / "seed_3" / "pretrain"
        rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        for metric in ("val_miou", "val_edge_sharpness", "val_pearson", "val_psnr"):
            found = table(out)[name]["metrics"][metric]
            assert found == {"mean": rows[-1][metric], "std": None, "values": [rows[-1][metric]]}
        resolved = (folder / "config.yaml").read_text()
        assert f"decoder: {name}" in resolved and "seed: 3" in resolved
