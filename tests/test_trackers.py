"""Where curves and pictures go: TensorBoard's charts and tables, and Weights & Biases.

pytest tests/test_trackers.py
"""

import re
import sys
import types
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from assembly.ablation import AblateConfig, StageConfig, write_board
from configs.schema import OF_FUSED, OF_MAPS, OF_SAMPLES, FlowConfig, of_velocity
from utils import config, trackers
from utils.run import Run, RunConfig

RATES = ["loss", "lr", "grad_norm", "skipped", "images_per_s", "step_s", "data_wait", "eval_s"]
LOGGED = {
    "stage 1": [*RATES, *OF_MAPS, *OF_FUSED, "intensity", "material_ce"],
    "stage 2": [*RATES, *of_velocity(FlowConfig(mean_share=0.5)), *OF_SAMPLES, "generation"],
}


@dataclass(kw_only=True)
class ToyConfig:
    run: RunConfig = field(default_factory=RunConfig)
    lr: float = 1e-4


def make_run(folder, *report_to):
    return Run(folder, ToyConfig(run=RunConfig(report_to=list(report_to))))


def log_some(run, step=3):
    run.start(step - 1)
    run.log(step, loss=0.5)
    run.image(step, "panel", np.zeros((4, 6, 3), np.uint8))
    run.close()


def test_tensorboard_has_a_layout_of_charts(tmp_path):
    log_some(make_run(tmp_path, "tensorboard"))
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    (event,) = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    titles = [chart.title for category in layout.category for chart in category.chart]
    assert titles[0] == "loss" and len(titles) == sum(map(len, trackers.CHARTS.values()))
    assert list(layout.category[0].chart[0].multiline.tag) == ["^loss$", "^val_loss$"]
    assert [picture.step for picture in board.Images("panel")] == [3]


@pytest.mark.parametrize("stage", LOGGED)
def test_every_chart_draws_something_and_no_rate_is_taken_for_a_loss(stage):
    drawn = {
        title: [name for name in LOGGED[stage] if any(re.match(p, name) for p in patterns)]
        for charts in trackers.CHARTS.values()
        for title, patterns in charts.items()
    }
    assert all(drawn.values()), drawn
    assert not set(drawn["parts of the loss"]) & set(RATES)
    left_out = set(LOGGED[stage]) - {name for names in drawn.values() for name in names}
    assert not left_out


def test_without_trackers_only_the_file_is_written(tmp_path):
    log_some(make_run(tmp_path))
    assert (tmp_path / "metrics.jsonl").is_file()
    assert not list(tmp_path.glob("events*"))


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module in wandb's place that records its calls."""
    calls = []

    class FakeRun:
        def __getattr__(self, name):
            return lambda *a, **k: calls.append((name, a, k))

    def init(**arguments):
        calls.append(("init", (), arguments))
        return FakeRun()

    module = types.ModuleType("wandb")
    module.init, module.Image = init, lambda array: ("image", array.shape)
    module.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_configuration_rows_and_pictures(fake_wandb, tmp_path):
    log_some(make_run(tmp_path / "runs/x", "wandb"))
    (_, _, told), *rest = fake_wandb
    assert told["config"]["lr"] == 1e-4 and told["name"] == "runs/x" and told["resume"] == "allow"
    assert rest == [
        ("define_metric", ("*",), {"step_metric": "step"}),
        ("log", ({"step": 3, "loss": 0.5},), {}),
        ("log", ({"step": 3, "panel": ("image", (4, 6, 3))},), {}),
        ("finish", (), {}),
    ]


def test_a_resumed_run_keeps_its_wandb_id_and_one_from_the_start_gets_another(fake_wandb, tmp_path):
    for step in (1, 5, 1):  # begun, resumed, begun again
        log_some(make_run(tmp_path, "wandb"), step)
    first, resumed, again = [k["id"] for name, _, k in fake_wandb if name == "init"]
    assert first == resumed != again


def test_wandb_works_offline(tmp_path, monkeypatch):
    if find_spec("wandb") is None:
        pytest.skip('wandb is not installed: pip install ".[wandb]"')
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_some(make_run(tmp_path, "wandb"))
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (offline / f"run-{(tmp_path / 'wandb_id.txt').read_text()}.wandb").stat().st_size > 100
    assert list(offline.glob("files/media/images/panel*.png"))


def test_wandb_that_is_not_installed_is_known_at_the_start(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'run.report_to names wandb, .*pip install ".\[wandb\]"'):
        config.load(ToyConfig, ["run.report_to=[wandb]"])
    with pytest.raises(ValueError, match="expected 'tensorboard' or 'wandb', got 'mlflow'"):
        config.load(ToyConfig, ["run.report_to=[mlflow]"])


def test_the_runs_of_a_comparison_are_rows_of_a_table_in_tensorboard(tmp_path):
    cfg = AblateConfig(
        stages={"pretrain": StageConfig(script="pretrain.py")},
        variants={"low": [], "high": ["optimizer.params.lr=10"]},
        output_dir=str(tmp_path),
    )
    values = {("low", 0): {"val_loss": 0.5, "other": 1.0}, ("high", 0): {"val_loss": 2.5}}
    for _ in range(2):  # again: nothing is left of the earlier call
        write_board(cfg, values, ["val_loss"])
    found = {}
    for folder in (tmp_path / "tensorboard").iterdir():
        if folder.is_dir():
            board = EventAccumulator(str(folder))
            board.Reload()
            content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
            told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
            lr = told["pretrain/optimizer.params.lr"].string_value
            (result,) = board.Scalars("result/val_loss")
            found[folder.name] = told["variant"].string_value, lr, result.value
    assert found == {"low_seed_0": ("low", "", 0.5), "high_seed_0": ("high", "10", 2.5)}
