"""The shared loop, on a linear model: what must hold for every stage.

pytest tests/test_loop.py
"""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from utils import checkpoint, config, dist, progress
from utils.ema import Ema
from utils.loop import TrainingConfig, fit, total_steps
from utils.optimizer import AdamWParams, OptimizerConfig, learning_rate, make_optimizer
from utils.progress import State
from utils.run import Run, RunConfig

ROOT = Path(__file__).resolve().parent.parent
QUIET = ("training.log_every=100", "training.save_every=0")  # nothing to tell before the end


@dataclass(kw_only=True)
class ModelConfig:
    width: int = 4


@dataclass(kw_only=True)
class ToyConfig:
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            batch_size=8,
            steps=6,
            warmup_steps=2,
            lr_min=1e-3,
            mixed_precision="no",
            log_every=1,
            eval_every=0,
            save_every=3,
            grad_clip=100.0,
            ema_decay=0.9,
        )
    )
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(params=AdamWParams(lr=1e-2))
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    noise: float = 0.0  # random input noise, from the global generator
    poison: str = ""  # "rank:micro-batch" of a NaN
    poisoned: str = "input"  # or only the loss, or only the gradient
    pause: float = 0.0  # seconds a step takes
    batch_norm: bool = False
    killed_in_save: int = 0  # SIGKILL when half of the n-th checkpoint is written; 0: never


def train(directory, *overrides, eval_fn=None, on_loss=lambda micro: None):
    """Fit y = sum(x); return the model and the rows of metrics.jsonl."""
    cfg = config.load(ToyConfig, [f"run.output_dir={directory}", *overrides])
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(4)] if cfg.batch_norm else []
    model = nn.Sequential(
        *layers, nn.Linear(4, cfg.model.width), nn.Tanh(), nn.Linear(cfg.model.width, 1)
    )
    size, rank, world = cfg.training.batch_size, dist.rank(), dist.world_size()

    def batches(first):
        for micro in range(first, 10**6):
            items = range((micro * world + rank) * size, (micro * world + rank + 1) * size)
            x = [torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in items]
            yield {"x": torch.stack(x), "name": [f"scene{i}" for i in items], "micro": micro}

    def loss_fn(model, batch):
        on_loss(batch["micro"])
        time.sleep(cfg.pause)
        x = batch["x"]
        noisy = x + cfg.noise * torch.randn_like(x)
        poisoned = cfg.poisoned if cfg.poison == f"{rank}:{batch['micro']}" else ""
        if poisoned == "input":
            noisy = noisy * float("nan")
        loss = F.mse_loss(model(noisy), x.sum(1, keepdim=True))
        if poisoned == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
        if poisoned == "loss":
            loss = loss + float("nan")
        return loss, {"spread": x.std(), "sometimes": float("nan") if batch["micro"] % 2 else 1.0}

    if cfg.killed_in_save:
        torch.save = partial(write_half_and_die, torch.save, [cfg.killed_in_save])
    run = Run(cfg.run.output_dir, cfg)
    model.eval()  # fit must not rely on the mode it finds
    fit(cfg, model, loss_fn, batches, run, eval_fn)
    return model, rows_of(run.dir)


def write_half_and_die(write, left, parts, file):
    left[0] -= 1
    if left[0]:
        return write(parts, file)
    write(parts, memory := io.BytesIO())
    file.write(memory.getvalue()[: len(memory.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def rows_of(directory):
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def column(rows, name):
    return torch.tensor([row[name] for row in rows if name in row])


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def saved(directory, step):
    return checkpoint.load(Path(directory) / f"checkpoint_{step:08d}.pth")


def signal_at(micro):
    """Send SIGTERM to this process when the loss of that micro-batch is asked for."""
    return lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == micro else None


def launch(directory, *overrides, processes=1):
    """Run this file as a script, under torchrun where there is more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [
        sys.executable,
        *(torchrun if processes > 1 else []),
        __file__,
        f"run.output_dir={directory}",
        *overrides,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


# resuming


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, whole_rows = train(tmp_path / "whole", "noise=1")
    train(tmp_path / "parts", "noise=1")
    (tmp_path / "parts/checkpoint_00000006.pth").unlink()  # as if killed after step 3
    resumed, rows = train(tmp_path / "parts", "noise=1")
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(column(whole_rows, "loss"), column(rows, "loss"))  # and no doubled row
    for name in ("model", "ema", "optimizer", "state"):
        torch.testing.assert_close(
            saved(tmp_path / "whole", 6)[name], saved(tmp_path / "parts", 6)[name], rtol=0, atol=0
        )


def test_a_run_stopped_by_sigterm_saves_exits_0_and_goes_on_to_the_same_weights(tmp_path):
    process = launch(tmp_path / "parts", "noise=1", "pause=0.1", "training.steps=60")
    for _ in range(600):
        time.sleep(0.1)
        if (tmp_path / "parts/metrics.jsonl").exists():
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "to continue, run the same command again" in out
    step = checkpoint.step_of(checkpoint.latest(tmp_path / "parts"))
    assert 0 < step < 60

    resumed, _ = train(tmp_path / "parts", "noise=1", "training.steps=60")
    whole, _ = train(tmp_path / "whole", "noise=1", "training.steps=60")
    assert torch.equal(weights(whole), weights(resumed))


def test_a_signal_stops_one_step_later_and_the_run_goes_on_to_the_same_weights(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "parts", "noise=1", *QUIET, on_loss=signal_at(2))
    assert stop.value.code == 0
    assert f"after step 4 of 6; saved {tmp_path}/parts/checkpoint_00000004.pth" in " ".join(
        capsys.readouterr().out.split()
    )
    assert saved(tmp_path / "parts", 4)["state"]["step"] == 4

    resumed, _ = train(tmp_path / "parts", "noise=1", *QUIET)
    whole, _ = train(tmp_path / "whole", "noise=1", *QUIET)
    assert torch.equal(weights(whole), weights(resumed))


def test_signals_that_follow_at_once_are_one_and_a_much_later_one_interrupts(tmp_path, monkeypatch):
    def as_torchrun_sends_them(micro):
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM) if micro == 2 else ():
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "one", *QUIET, on_loss=as_torchrun_sends_them)
    assert stop.value.code == 0 and saved(tmp_path / "one", 4)["state"]["step"] == 4

    monkeypatch.setattr(progress.StopSignal, "GRACE", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "two", *QUIET, on_loss=as_torchrun_sends_them)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_killed_while_it_saves_loses_only_the_steps_since_the_save_before(tmp_path):
    process = launch(tmp_path / "parts", "noise=1", "killed_in_save=2")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "parts/checkpoint_00000006.pth.tmp").exists()
    assert checkpoint.latest(tmp_path / "parts").name == "checkpoint_00000003.pth"

    resumed, rows = train(tmp_path / "parts", "noise=1")
    whole, whole_rows = train(tmp_path / "whole", "noise=1")
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(column(whole_rows, "loss"), column(rows, "loss"))
    assert not list((tmp_path / "parts").glob("*.tmp"))


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    whole, _ = train(tmp_path, "noise=1")
    newest = tmp_path / "checkpoint_00000006.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed, _ = train(tmp_path, "noise=1")
    out = capsys.readouterr().out
    assert f"passing over {newest}" in out
    assert f"resumed from {tmp_path}/checkpoint_00000003.pth at step 3" in out
    assert torch.equal(weights(whole), weights(resumed))


def test_a_finished_run_says_so_and_trains_no_further(tmp_path, capsys):
    train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    train(tmp_path)
    assert f"{tmp_path} is finished: step 6 of 6" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_resuming_names_what_differs_in_the_model(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"model.width is 4 there and 5 here"):
        train(tmp_path, "model.width=5")


def test_the_best_model_of_another_metric_or_folder_is_none_of_this_run(tmp_path, capsys):
    def score(model):
        return {"val_loss": 1.0, "val_psnr": 20.0}

    train(tmp_path / "a", "training.best_metric=-val_psnr", eval_fn=score)
    best = tmp_path / "a" / "best_model.pth"
    first = checkpoint.load(best)["state"]
    train(tmp_path / "a", "training.steps=9", eval_fn=score)  # 1.0 is no better than -20.0
    assert first["best"] == -20.0 and checkpoint.load(best)["state"]["step"] == 9
    train(tmp_path / "b", f"run.resume={tmp_path / 'a'}", "training.steps=12", eval_fn=score)
    assert checkpoint.load(tmp_path / "b" / "best_model.pth")["state"]["step"] == 12
    assert capsys.readouterr().out.count("the best model is chosen anew") == 2
    train(tmp_path / "b", "training.steps=15", eval_fn=score)  # nothing else changed: kept
    assert checkpoint.load(tmp_path / "b" / "best_model.pth")["state"]["step"] == 12


def test_a_resumed_run_may_run_otherwise_but_not_be_another_model():
    there = {"model": {"memory": None, "gradient_checkpointing": 0, "width": 4}}
    here = {"model": {"memory": "24g", "gradient_checkpointing": 1, "width": 4}}
    free = "memory", "gradient_checkpointing"
    progress._check_same_model(there, here, Path("x.pth"), free)
    wider = {"model": here["model"] | {"width": 5}}
    with pytest.raises(ValueError, match="model.width is 4 there and 5 here; restore"):
        progress._check_same_model(there, wider, Path("x.pth"), free)


def test_resuming_takes_the_named_checkpoint_and_the_new_weight_decay(tmp_path):
    train(tmp_path / "first")
    path = tmp_path / "first/checkpoint_00000003.pth"
    train(tmp_path / "second", f"run.resume={path}", "optimizer.params.weight_decay=0.5")
    assert [row["step"] for row in rows_of(tmp_path / "second")] == [4, 5, 6]
    assert saved(tmp_path / "second", 6)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    with pytest.raises(ValueError, match="run.resume is nowhere.pth, but there is no such file"):
        train(tmp_path / "third", "run.resume=nowhere.pth")


def test_resuming_from_weights_alone_or_from_before_what_was_saved_is_refused(tmp_path, capsys):
    train(tmp_path / "a", "training.eval_every=3", eval_fn=lambda model: {"val_loss": 1.0})
    with pytest.raises(ValueError, match=r"best_model.pth, which holds only weights"):
        train(tmp_path / "b", f"run.resume={tmp_path}/a/best_model.pth")
    # the same command twice: the second time it would lose what the first one saved
    resumed = f"run.resume={tmp_path}/a/checkpoint_00000003.pth"
    with pytest.raises(SystemExit):
        train(tmp_path / "b", resumed, *QUIET, on_loss=signal_at(3))
    assert "run the same command again without --resume" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"checkpoint_00000005.pth is newer: leave out --resume"):
        train(tmp_path / "b", resumed, *QUIET)
    train(tmp_path / "b", *QUIET)
    assert saved(tmp_path / "b", 6)["state"]["step"] == 6


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("weight_decay=nan", "weight_decay .*expected a finite number"),
        ("lr=-1", "lr must not be"),
        ("weight_decay=-1", "weight_decay >= 0 and eps > 0"),
        ("eps=0", "and eps > 0"),
    ],
)
def test_values_that_no_optimizer_can_use_are_refused_at_start(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, f"optimizer.params.{wrong}")


def test_only_the_last_checkpoints_are_kept_if_asked(tmp_path):
    train(tmp_path, "training.save_every=1", "training.keep_last=2")
    names = sorted(path.name for path in tmp_path.glob("*.pth*"))
    assert names == ["checkpoint_00000005.pth", "checkpoint_00000006.pth"]


# the step


def test_accumulation_equals_a_larger_batch(tmp_path):
    large, large_rows = train(tmp_path / "large")
    small, small_rows = train(
        tmp_path / "small", "training.batch_size=2", "training.gradient_accumulation_steps=4"
    )
    torch.testing.assert_close(weights(large), weights(small))
    # AdamW hides a gradient of the wrong scale
    torch.testing.assert_close(column(large_rows, "grad_norm"), column(small_rows, "grad_norm"))
    torch.testing.assert_close(column(large_rows, "loss"), column(small_rows, "loss"))


def test_the_gradient_is_clipped_before_the_update(tmp_path):
    free, rows = train(tmp_path / "free", "training.grad_clip=0")
    tight, _ = train(
        tmp_path / "tight",
        "training.grad_clip=1e-12",
        "training.steps=1",
        "training.warmup_steps=0",
    )
    assert column(rows, "grad_norm").min() > 0.1
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    assert (weights(tight) - weights(start)).abs().max() < 1e-4  # below AdamW's eps: hardly moves
    assert (weights(free) - weights(start)).abs().max() > 1e-2


def test_bf16_is_close_to_fp32_and_not_equal(tmp_path):
    exact, exact_rows = train(tmp_path / "fp32")
    half, half_rows = train(tmp_path / "bf16", "training.mixed_precision=bf16")
    assert not torch.equal(weights(exact), weights(half))
    torch.testing.assert_close(
        column(exact_rows, "loss"), column(half_rows, "loss"), rtol=0.02, atol=0
    )
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    decay = {
        id(p): group["weight_decay"]
        for group in make_optimizer(ToyConfig(), dict(model.named_parameters())).param_groups
        for p in group["params"]
    }
    assert [decay[id(p)] > 0 for p in model.parameters()] == [True, False, False, False]


def test_the_learning_rate_warms_up_and_falls_to_its_end():
    cfg = ToyConfig()
    rates = [learning_rate(cfg, step, 100) for step in range(101)]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01])
    assert rates[100] == pytest.approx(1e-3) and rates[51] == pytest.approx(0.0055)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    cfg.training.schedule = "constant"
    assert learning_rate(cfg, 99, 100) == 0.01


def test_epochs_become_steps_rounded_up():
    training = TrainingConfig(epochs=3, batch_size=4, gradient_accumulation_steps=2)
    assert total_steps(training, samples=11) == 5  # 33 samples, 8 a step
    with pytest.raises(ValueError, match="number of samples"):
        total_steps(training, samples=0)


def test_epochs_count_samples_where_a_resumed_run_has_another_batch():
    before = State(step=8, position=32)  # 2 epochs of 16, 4 a step
    assert (
        total_steps(
            TrainingConfig(epochs=4, batch_size=8, gradient_accumulation_steps=1), 16, before
        )
        == 12
    )
    assert (
        total_steps(
            TrainingConfig(epochs=2, batch_size=8, gradient_accumulation_steps=1), 16, before
        )
        == 8
    )


@pytest.mark.parametrize(
    "value", [{"batch_size": 0}, {"ema_decay": 1.0}, {"seed": -1}, {"seed": 2**63}]
)
def test_impossible_training_values_are_refused(value):
    with pytest.raises(ValueError, match=next(iter(value))):
        TrainingConfig(**value)


# waiting for the device


def test_a_step_is_judged_after_the_next_one_is_launched(tmp_path, monkeypatch):
    events, launch_flags = [], dist.any_ranks_later

    def recorded(flags):
        read = launch_flags(flags)
        step = sum(event.startswith("launch") for event in events) + 1
        events.append(f"launch {step}")
        return lambda: events.append(f"read {step}") or read()

    monkeypatch.setattr(dist, "any_ranks_later", recorded)
    train(tmp_path, "training.steps=4", *QUIET, on_loss=lambda n: events.append(f"loss {n + 1}"))
    assert events == [
        "loss 1",
        "launch 1",
        "loss 2",
        "launch 2",
        "read 1",
        "loss 3",
        "launch 3",
        "read 2",
        "loss 4",
        "launch 4",
        "read 3",
        "read 4",
    ]


class NoWaits(TorchDispatchMode):
    """Refuses a copy from the host to the meta device that waits for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        copied = function is torch.ops.aten._to_copy.default and not args[0].is_meta and out.is_meta
        assert not copied or kwargs.get("non_blocking"), "a copy to the device, with a wait"
        return out


def host_tensor(value, device="cpu", make=torch.tensor, **how):
    """torch.tensor; it refuses the device, because the mode above does not see such a copy."""
    assert torch.device(device or "cpu").type == "cpu", "a number was copied to the device"
    return make(value, **how)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nothing_else_in_a_step_waits_for_the_device(tmp_path, monkeypatch, accumulation):
    """On the meta device: reading a value from it raises."""
    monkeypatch.setattr(dist, "any_ranks_later", lambda flags: lambda: [False] * len(flags))
    monkeypatch.setattr(torch, "autocast", lambda *where, enabled: nullcontext())  # not on meta
    monkeypatch.setattr(torch, "tensor", host_tensor)
    cfg = config.load(
        ToyConfig,
        [
            f"run.output_dir={tmp_path}",
            *QUIET,
            "training.steps=50",
            f"training.gradient_accumulation_steps={accumulation}",
        ],
    )
    model, steps = nn.Linear(4, 1, device="meta"), []
    batches = [{"x": torch.randn(8, 4), "draw": [n]} for n in range(8)]

    def loss_fn(model, batch):
        steps.extend(batch["draw"])
        loss = model(batch["x"]).square().mean()
        return loss, {"part": loss, "constant": 1.0}

    with pytest.raises(StopIteration), NoWaits():  # at the end of the batches
        fit(cfg, model, loss_fn, lambda first: iter(batches), Run(tmp_path, cfg))
    assert steps == list(range(8))


def test_no_graph_outlives_its_step(tmp_path):
    """Else its activations would take memory in the next one. A part need not be detached."""

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # else it would hold the graph that holds it
            kept.add(self)

    kept, cfg = weakref.WeakSet(), config.load(ToyConfig, [f"run.output_dir={tmp_path}", *QUIET])

    def loss_fn(model, batch):
        assert not kept
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            part = model(batch["x"]).square().mean()  # not in the loss
        assert kept
        return model(batch["x"]).square().mean(), {"part": part}

    batches = itertools.repeat({"x": torch.ones(8, 4)})
    fit(cfg, nn.Linear(4, 1), loss_fn, lambda first: batches, Run(tmp_path, cfg))


# logging


def test_a_part_that_is_sometimes_absent_is_averaged_over_where_it_is(tmp_path):
    _, rows = train(tmp_path, "training.log_every=2")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["sometimes"] for row in rows] == [1.0, 1.0, 1.0]
    assert {"loss", "spread", "grad_norm", "lr", "images_per_s", "step_s", "data_wait"} <= set(
        rows[0]
    )


# evaluation


def disturbing(model):
    """An evaluation that does what it should not matter to do."""
    assert not model.training and not torch.is_grad_enabled()
    torch.randn(7), torch.manual_seed(123)
    return {"val_loss": weights(model).square().sum()}


def test_evaluation_leaves_training_as_it_was(tmp_path):
    without, _ = train(tmp_path / "without", "noise=1", "batch_norm=true")
    evaluated, rows = train(
        tmp_path / "with", "noise=1", "batch_norm=true", "training.eval_every=1", eval_fn=disturbing
    )
    assert torch.equal(weights(without), weights(evaluated))
    assert evaluated.training and len(column(rows, "val_loss")) == 6
    assert torch.equal(without[0].running_mean, evaluated[0].running_mean)
    assert without[0].num_batches_tracked == 6


def test_evaluation_sees_the_averaged_weights_and_the_same_draws_each_time(tmp_path):
    draws, seen = [], []

    def eval_fn(model):
        draws.append(torch.rand(1).item())
        seen.append(weights(model).clone())
        return {"val_loss": 0.0}

    model, _ = train(tmp_path, "training.eval_every=2", eval_fn=eval_fn)
    average = saved(tmp_path, 6)["ema"]["average"]
    assert torch.equal(seen[-1], torch.cat([x.flatten() for x in average.values()]))
    assert not torch.equal(seen[-1], weights(model))
    assert len(set(draws)) == 1 and len(draws) == 3


@pytest.mark.parametrize("metric, step", [("val_loss", 4), ("-val_loss", 6)])
def test_the_best_model_is_that_of_the_best_evaluation(tmp_path, metric, step):
    values, seen = iter([3.0, 1.0, 5.0]), {}

    def eval_fn(model):
        seen[2 * len(seen) + 2] = {n: p.clone() for n, p in model.state_dict().items()}
        return {"val_loss": next(values)}

    train(tmp_path, "training.eval_every=2", f"training.best_metric={metric}", eval_fn=eval_fn)
    best = checkpoint.load(tmp_path / "best_model.pth")
    assert best["state"]["step"] == step
    torch.testing.assert_close(best["model"], seen[step], rtol=0, atol=0)


def test_a_best_metric_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="best_metric is psnr, but the evaluation gives val_loss"):
        train(tmp_path, "training.best_metric=psnr", eval_fn=lambda model: {"val_loss": 1.0})


def test_the_steps_outlive_an_evaluation_that_fails_and_it_is_made_up_for(tmp_path, capsys):
    def broken(model):
        raise ValueError("row 3 is damaged")

    never = "training.save_every=0", "training.eval_every=0", "training.ema_decay=0"
    with pytest.raises(ValueError, match="row 3"):
        train(tmp_path, *never, eval_fn=broken)
    whole = saved(tmp_path, 6)["model"]
    train(tmp_path, *never, eval_fn=lambda model: {"val_loss": 1.0})
    best = checkpoint.load(tmp_path / "best_model.pth")
    torch.testing.assert_close(best["model"], whole, rtol=0, atol=0)
    train(tmp_path, *never, eval_fn=broken)
    assert "is finished" in capsys.readouterr().out
    assert len([row for row in rows_of(tmp_path) if "val_loss" in row]) == 1


def test_ema_follows_its_formula_and_swaps_back():
    model = nn.Linear(2, 1)
    ema, expected = Ema(model, 0.5), weights(model).clone()
    for n in range(12):
        with torch.no_grad():
            model.weight += 1.0
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights(model)
    live = weights(model).clone()
    with pytest.raises(KeyError), ema.swapped_in():
        torch.testing.assert_close(weights(model), expected)
        raise KeyError
    assert torch.equal(weights(model), live)


# what is not finite


@pytest.mark.parametrize(
    "where, said", [("input", "loss"), ("loss", "loss"), ("gradient", "gradient")]
)
def test_a_nonfinite_step_stops_the_run_and_names_the_samples(tmp_path, where, said):
    with pytest.raises(RuntimeError, match=rf"non-finite {said} at step 3;.*spread=.*scene16 "):
        train(tmp_path, "poison=0:2", f"poisoned={where}", "training.save_every=1")
    assert all(t.isfinite().all() for t in saved(tmp_path, 2)["model"].values())
    assert not (tmp_path / "checkpoint_00000003.pth").exists()


def test_a_skipped_step_changes_neither_weights_nor_statistics(tmp_path, capsys):
    model, rows = train(
        tmp_path,
        "poison=0:2",
        "training.skip_nonfinite=1",
        "batch_norm=true",
        "training.save_every=1",
    )
    before, after = saved(tmp_path, 2), saved(tmp_path, 3)
    torch.testing.assert_close(before["model"], after["model"], rtol=0, atol=0)
    torch.testing.assert_close(before["ema"], after["ema"], rtol=0, atol=0)
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert "skipped (1 of 1): non-finite loss at step 3" in capsys.readouterr().out


@pytest.mark.parametrize("told", ["save", "eval", "log", "end", "nothing"])
def test_a_nonfinite_step_is_found_before_it_is_saved_evaluated_or_reported(tmp_path, told):
    """At step 3, of 3 for `end`; with nothing to tell, one more loss is computed and no second."""

    def eval_fn(model):
        raise AssertionError("evaluated")

    seen = []
    steps = "training.steps=3" if told == "end" else f"training.{told}_every=3"
    with pytest.raises(RuntimeError, match=r"non-finite loss at step 3;.*spread=.*scene16 .*23$"):
        train(
            tmp_path,
            "poison=0:2",
            "batch_norm=true",
            *QUIET,
            *([] if told == "nothing" else [steps]),
            eval_fn=eval_fn,
            on_loss=seen.append,
        )
    assert seen == ([0, 1, 2, 3] if told == "nothing" else [0, 1, 2])
    assert not list(tmp_path.glob("*.pth*"))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_nonfinite_step_after_a_signal_is_not_saved(tmp_path):
    with pytest.raises(RuntimeError, match="non-finite loss at step 4"):  # where it would stop
        train(tmp_path, "poison=0:3", *QUIET, on_loss=signal_at(2))
    assert not list(tmp_path.glob("*.pth*"))


def test_a_step_that_may_be_skipped_is_judged_before_its_update(tmp_path):
    skip = ("poison=0:2", "training.skip_nonfinite=1", "batch_norm=true")
    told, _ = train(tmp_path / "told", *skip, "training.save_every=1")
    quiet, _ = train(tmp_path / "quiet", *skip, *QUIET)
    torch.testing.assert_close(quiet.state_dict(), told.state_dict(), rtol=0, atol=0)
    assert all(t.isfinite().all() for t in quiet.state_dict().values())


# a budget of seconds

SECONDS = ("training.steps=0", "training.warmup_steps=0", "pause=0.02", "training.save_every=0")


def test_training_ends_with_its_seconds_as_it_ends_with_its_steps(tmp_path, capsys):
    started = time.perf_counter()
    _, rows = train(
        tmp_path, *SECONDS, "training.max_seconds=0.6", eval_fn=lambda model: {"val_loss": 1.0}
    )
    assert 0.6 < time.perf_counter() - started < 3
    step = rows[-1]["step"]
    assert 5 < step < 31
    state = saved(tmp_path, step)["state"]
    assert state["evaluated"] == step and state["seconds"] >= 0.6
    assert (tmp_path / "best_model.pth").is_file()
    rates = column(rows, "lr")  # along the cosine from one end to the other
    assert rates[0] == pytest.approx(1e-2) and rates[-1] < 1.5e-3
    assert rates.tolist() == sorted(rates.tolist(), reverse=True)
    assert "at most 0.6 s, as training.max_seconds says" in capsys.readouterr().out


def test_the_seconds_of_a_run_go_on_where_it_was_resumed(tmp_path, capsys):
    train(tmp_path, *SECONDS, "training.max_seconds=0.3")
    first = checkpoint.step_of(checkpoint.latest(tmp_path))
    _, rows = train(tmp_path, *SECONDS, "training.max_seconds=0.3")
    assert "is finished" in capsys.readouterr().out and rows[-1]["step"] == first
    started = time.perf_counter()
    _, rows = train(tmp_path, *SECONDS, "training.max_seconds=0.7")
    assert 0.35 < time.perf_counter() - started < 0.69
    assert next(row["lr"] for row in rows if row["step"] == first + 1) < 8e-3  # 0.3 of 0.7
    assert rows[-1]["step"] > first


def test_steps_may_end_before_the_seconds_and_the_learning_rate_is_then_theirs(tmp_path):
    _, rows = train(tmp_path / "timed", "training.max_seconds=600")
    _, plain = train(tmp_path / "plain")
    assert rows[-1]["step"] == 6
    torch.testing.assert_close(column(rows, "lr"), column(plain, "lr"))
    assert saved(tmp_path / "plain", 6)["state"]["seconds"] == 0.0  # nothing of the clock


@pytest.mark.parametrize("value", [0, -1, 1e9, float("nan")])
def test_a_budget_that_is_no_budget_is_refused(value):
    with pytest.raises(ValueError, match="max_seconds must be above 0"):
        TrainingConfig(max_seconds=value)


def test_checkpoints_of_before_there_was_a_budget_can_be_resumed(tmp_path):
    train(tmp_path)
    parts = saved(tmp_path, 6)
    del parts["state"]["seconds"]
    checkpoint.save(tmp_path / "checkpoint_00000006.pth", parts)
    _, rows = train(tmp_path, "training.steps=8")
    assert rows[-1]["step"] == 8


# two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """One launch of two ranks: a normal run; only rank 1 meets a NaN; only rank 1 gets a signal."""
    directory = tmp_path_factory.mktemp("two")
    process = launch(directory / "run", "training.batch_size=4", "stopped_runs_too", processes=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return directory, out


def test_two_ranks_equal_one(tmp_path, two_processes):
    directory, _ = two_processes
    one, one_rows = train(tmp_path, "training.gradient_accumulation_steps=2", "noise=0")
    two = saved(directory / "run", 6)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two["model"][name], tensor)
    rows = rows_of(directory / "run")
    for name in ("grad_norm", "loss"):
        torch.testing.assert_close(column(one_rows, name), column(rows, name))


def test_a_nan_on_one_rank_stops_all_ranks_at_the_same_step(two_processes):
    _, out = two_processes
    stopped = [line for line in out.splitlines() if "stopped:" in line]
    assert len(stopped) == 2
    assert all("non-finite loss at step 2" in line and "scene12" in line for line in stopped)
    assert all("scene8 " not in line and line.count("loss=") == 1 for line in stopped)


def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_step(two_processes):
    directory, out = two_processes
    assert sorted(line for line in out.splitlines() if "losses:" in line) == [
        "rank 0 losses: [0, 1, 2, 3]",
        "rank 1 losses: [0, 1, 2, 3]",
    ]
    assert "stopped by a signal after step 4 of 6" in out
    names = sorted(path.name for path in (directory / "run-signal").glob("*.pth*"))
    assert names == ["checkpoint_00000004.pth"]
    assert saved(directory / "run-signal", 4)["state"]["step"] == 4


def test_ranks_of_unequal_speed_end_together_with_equal_weights(two_processes):
    """Each would else follow its own clock: another learning rate, another last step."""
    lines = sorted(x.partition(" ends ")[2] for x in two_processes[1].splitlines() if " ends " in x)
    assert len(lines) == 2 and lines[0] == lines[1], lines
    assert int(lines[0].split()[0]) > 3


def test_no_thread_of_the_group_outlives_it(two_processes):
    """Else the process may abort while Python shuts down, see `dist.close`."""
    lines = sorted(line for line in two_processes[1].splitlines() if "gloo threads:" in line)
    if not lines:
        pytest.skip("this system does not name threads in /proc")
    assert lines == ["gloo threads: 0"] * 2


def gloo_threads() -> int:
    """How many threads of this process are the group's, as Linux names them."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # a thread that ended meanwhile
            names.append(path.read_text())
    return sum("gloo" in name for name in names)


def script() -> None:
    """What `launch` runs: the toy, and with `stopped_runs_too` two more that must stop."""
    arguments = [a for a in sys.argv[1:] if "=" in a]
    dist.init("cpu")
    accumulation = "training.gradient_accumulation_steps=2"
    more, directory = "stopped_runs_too" in sys.argv, arguments[0].partition("=")[2]
    train(directory, *arguments[1:], *([accumulation] if more else []))
    if more:
        try:
            train(
                f"{directory}-nan", *arguments[1:], "poison=1:1", "poisoned=loss", *QUIET
            )  # the gradient is finite: rank 0 cannot know by itself
        except RuntimeError as error:
            sys.stdout.write(f"rank {dist.rank()} stopped: {error}\n")
            sys.stdout.flush()
        losses, send = [], signal_at(2 if dist.rank() == 1 else None)
        try:
            train(
                f"{directory}-signal",
                *arguments[1:],
                *QUIET,
                on_loss=lambda micro: losses.append(micro) or send(micro),
            )
        except SystemExit:
            sys.stdout.write(f"rank {dist.rank()} losses: {losses}\n")
            sys.stdout.flush()
        seen, pause = [], f"pause={0.02 + 0.02 * dist.rank()}"
        budget = [*SECONDS, "training.max_seconds=0.4", pause, "training.ema_decay=0"]
        model, _ = train(f"{directory}-seconds", *arguments[1:], *budget, on_loss=seen.append)
        sys.stdout.write(f"rank {dist.rank()} ends {len(seen)} {weights(model).tolist()}\n")
        sys.stdout.flush()
    before = gloo_threads()
    dist.close()
    if before:
        sys.stdout.write(f"gloo threads: {gloo_threads()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    script()


def test_the_time_left_counts_the_evaluations_to_come(tmp_path, capsys):
    def eval_fn(model):
        time.sleep(0.2)
        return {"val_loss": 1.0}

    steps = ("training.steps=8", "training.eval_every=2", "training.save_every=0")
    _, rows = train(tmp_path, *steps, eval_fn=eval_fn)
    reports = [row for row in rows if "loss" in row]
    assert "eval_s" not in reports[0] and "eval_s" not in reports[1]  # none was made yet
    assert all(row["eval_s"] >= 0.2 and 0 < row["eval_share"] < 1 for row in reports[2:])
    assert reports[-1]["left_s"] == reports[-1]["eval_s"]  # the one after the last step
    last = capsys.readouterr().err.splitlines()[-1]
    assert "% of the time, 00:00 left]" in last and "evaluation 0." in last and "<" not in last


def test_the_time_left_is_that_of_the_first_limit():
    meter, state = progress.Meter(), State(step=5, seconds=40.0)
    meter.pace = 2.0
    assert meter.cost(state, None, TrainingConfig(max_seconds=100)) == {"left_s": 60.0}
    assert meter.cost(state, 10, TrainingConfig(max_seconds=100)) == {"left_s": 10.0}
    assert meter.cost(state, None, TrainingConfig()) == {}


@pytest.mark.parametrize("step, coming", [(1, 4), (2, 4), (3, 3), (6, 2), (7, 1), (8, 1), (9, 1)])
def test_the_evaluations_to_come_are_those_after_this_report(step, coming):
    meter, training = progress.Meter(), TrainingConfig(eval_every=2)
    meter.evaluations, meter.pace = [10.0, 20.0], 1.0
    steps = 9 if step == 9 else 8
    assert meter.cost(State(step=step), steps, training)["left_s"] == steps - step + 15 * coming
