"""What the loop keeps track of: the run's state, averages and rates, and non-finite steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils import checkpoint, config, dist
from utils.ema import Ema
from utils.run import Run
from utils.stopping import Clock, StopSignal

if TYPE_CHECKING:
    from utils.loop import FitConfig


@dataclass
class State:
    """All of a run that is not weights, optimizer or EMA."""

    step: int = 0  # optimizer steps taken
    position: int = 0  # samples drawn by all ranks together
    skipped: int = 0  # steps skipped because they were not finite
    evaluated: int = 0  # the step of the last evaluation
    best: float | None = None  # of best_metric, lower is better
    seconds: float = 0.0  # of training; counted only under training.max_seconds

    def resume(self, cfg: FitConfig, model: nn.Module, optimizer: Any, ema: Ema, run: Run) -> None:
        """Continue from cfg.run.resume, or from the newest intact checkpoint of the run, if any.

        Raises:
            ValueError: no such checkpoint, another model, or ranks that see different files.
        """
        path, parts = _checkpoint_of(cfg.run.resume, run.dir) or (None, {"state": asdict(self)})
        if len(set(dist.gather(str(parts.get("state"))))) > 1:
            raise ValueError(
                f"the ranks find different checkpoints in {run.dir}; "
                "run.output_dir must be on storage that all machines see"
            )
        if path is None:
            return
        if "optimizer" not in parts:
            raise ValueError(
                f"run.resume is {path}, which holds only weights (as a best model does);"
                f" name a {checkpoint.PATTERN} beside it"
            )
        if wrong := incomplete(parts):
            raise ValueError(f"{path} cannot be resumed from: {wrong}")
        may_change = getattr(cfg, "MAY_CHANGE", {})  # section -> fields; see FitConfig
        _check_same_model(parts["config"], config.to_dict(cfg), path, may_change.get("model", ()))
        checkpoint.load_into(model, parts["model"], path)
        # today's values of lr, decay and betas take precedence over the saved ones
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": parts["optimizer"]["state"], "param_groups": groups})
        ema.load_state_dict(parts["ema"])
        for name in asdict(self):
            setattr(self, name, parts["state"].get(name, getattr(self, name)))
        dist.print0(f"resumed from {path} at step {self.step}")
        if self.best is not None and not self._best_stands(parts["config"], cfg, run):
            self.best = None
            dist.print0("the best model is chosen anew: its file, metric, data or loss is another")
        _tell_changes(parts["config"]["training"], parts["world_size"], cfg.training)

    @staticmethod
    def _best_stands(saved: dict, cfg: FitConfig, run: Run) -> bool:
        """Whether `best` is the value of a best_model.pth here, and comparable with new ones."""
        now = config.to_dict(cfg)
        same = [saved["training"]["best_metric"] == cfg.training.best_metric]
        for section in ("data", "loss", "flow"):
            there, here = (c.get(section, {}) for c in (saved, now))
            compared = here.keys() - set(getattr(cfg, "MAY_CHANGE", {}).get(section, ()))
            same += [there.get(key) == here[key] for key in compared]
        return all(same) and not checkpoint.damaged(run.dir / "best_model.pth")

    def save(self, cfg: FitConfig, model: nn.Module, optimizer: Any, ema: Ema, run: Run) -> Path:
        """Begin to write this step's checkpoint (rank 0). Returns its path."""
        path = run.dir / f"checkpoint_{self.step:08d}.pth"
        if dist.is_main():
            checkpoint.save(
                path,
                {
                    "model": checkpoint.trained_state(model),
                    "optimizer": optimizer.state_dict(),
                    "ema": ema.state_dict(),
                    "state": asdict(self),
                    "config": config.to_dict(cfg),
                    "world_size": dist.world_size(),
                },
                background=True,
                keep=cfg.training.keep_last,
            )
        return path

    def save_if_best(self, cfg: FitConfig, model: nn.Module, values: dict, run: Run) -> None:
        """Write best_model.pth with the weights as they are now, if `values` beats all before.

        Raises:
            ValueError: training.best_metric is not among the values.
        """
        wanted = cfg.training.best_metric
        if (name := wanted.removeprefix("-")) not in values:
            raise ValueError(
                f"training.best_metric is {wanted}, but the evaluation gives {', '.join(values)}"
            )
        score = -values[name] if wanted.startswith("-") else values[name]
        if not math.isfinite(score) or (self.best is not None and score >= self.best):
            return
        self.best = score
        if dist.is_main():
            checkpoint.save(
                run.dir / "best_model.pth",
                {
                    "model": checkpoint.trained_state(model),
                    "state": asdict(self),
                    "metrics": values,
                    "config": config.to_dict(cfg),
                },
                background=True,
            )


def _checkpoint_of(resume: str | None, directory: Path) -> tuple[Path, dict] | None:
    if resume is None:
        return checkpoint.newest(directory, incomplete)
    path = Path(resume)
    if path.is_dir():
        found = checkpoint.newest(path, incomplete)
    else:
        found = (path, checkpoint.load(path)) if path.is_file() else None
    if found is None:
        raise ValueError(f"run.resume is {resume}, but there is no intact checkpoint")
    path, parts = found
    if "optimizer" in parts and (wrong := incomplete(parts)):
        raise ValueError(f"{path} cannot be resumed from: {wrong}")
    own = checkpoint.newest(directory, incomplete)
    if own and checkpoint.step_of(own[0]) > checkpoint.step_of(path):
        raise ValueError(
            f"run.resume is {resume}, but {own[0]} is newer: leave out --resume to continue "
            "from it, or choose another run.output_dir"
        )
    return path, parts


def incomplete(parts: dict[str, Any]) -> str | None:
    """What a checkpoint lacks for a run to continue from it, or None."""
    for name in ("optimizer", "ema", "state", "config"):
        if not isinstance(parts.get(name), dict):
            return f"it has no entry `{name}`"
    kinds = {"best": int | float | None, "seconds": int | float}
    for field in asdict(State()):
        # checkpoints older than training.max_seconds lack them
        found = parts["state"].get(field, 0.0 if field == "seconds" else "absent")
        if not isinstance(found, kinds.get(field, int)) or isinstance(found, bool):
            return f"state.{field} is {found!r}"
    ema, moments = parts["ema"], parts["optimizer"].get("state")
    average = ema.get("average")
    if not isinstance(ema.get("updates"), int) or not isinstance(average, dict):
        return "its EMA has no `updates` or no `average`"
    if not all(isinstance(x, Tensor) for x in average.values()):
        return "its EMA holds other things than tensors"
    if not isinstance(moments, dict):
        return "its optimizer has no `state`"
    for number, own in moments.items():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            if not isinstance(own, dict) or not isinstance(own.get(name), Tensor):
                return f"its optimizer has no tensor `{name}` of parameter {number}"
        if own["exp_avg"].shape != own["exp_avg_sq"].shape:
            return f"its optimizer's moments of parameter {number} differ in shape"
    training = parts["config"].get("training")
    wanted = ("seed", "batch_size", "gradient_accumulation_steps", "best_metric")
    if not isinstance(training, dict) or any(name not in training for name in wanted):
        return "its configuration has no complete section `training`"
    return None if isinstance(parts.get("world_size"), int) else "it has no entry `world_size`"


def _check_same_model(saved: dict, current: dict, path: Path, free: tuple[str, ...]) -> None:
    if "model" not in saved or "model" not in current:
        return
    if not saved["model"].keys() & current["model"].keys():
        raise ValueError(
            f"{path} holds a model that another script trains; choose another run.output_dir"
        )
    there, here = (
        {key: x for key, x in _leaves(cfg["model"], "model") if key.split(".")[1] not in free}
        for cfg in (saved, current)
    )
    differ = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]
    if differ:
        raise ValueError(
            f"{path} holds another model: {'; '.join(differ)}; "
            "restore the value, or choose another run.output_dir"
        )


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}")
    else:
        yield key, value


def _tell_changes(saved: dict, world: int, training: Any) -> None:
    """Notes on a changed batch or seed: allowed, but then the run is no longer bit-equal."""
    if saved["seed"] != training.seed:
        dist.print0(
            f"training.seed was {saved['seed']}, is now {training.seed}: order,"
            " augmentation and noise differ from here on"
        )
    before = (world, saved["batch_size"], saved["gradient_accumulation_steps"])
    now = (dist.world_size(), training.batch_size, training.gradient_accumulation_steps)
    if before != now:
        dist.print0(
            f"processes x batch x accumulation was {' x '.join(map(str, before))}, is now "
            f"{' x '.join(map(str, now))}: the data continue where they were, the rest "
            "no longer equals the uninterrupted run"
        )


class Meter:
    """Means of scalars and rates since the last report. Adding to it never waits for the device."""

    RECENT = 0.3  # weight of the latest report in `pace`

    def __init__(self):
        self.values: dict[str, list] = {}
        self.evaluations: list[float] = []  # seconds of each
        self.born = time.perf_counter()
        self.pace = 0.0  # seconds of a step, averaged over the reports
        self.begin()

    def begin(self) -> None:
        """Start the clock; compilation or an evaluation before it does not count."""
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation."""
        start = time.perf_counter()
        yield
        self.evaluations.append(time.perf_counter() - start)

    def cost(self, state: State, steps: int | None, training: Any) -> dict[str, float]:
        """What is known of eval_s, mean seconds of an evaluation; eval_share of all time so far;
        and left_s, seconds to the end with the evaluations to come. Call it after `rates`.

        Args: steps: the last; None: only the seconds of `training` end the run.
        """
        known, ends = {}, []
        if self.evaluations:
            known["eval_s"] = sum(self.evaluations) / len(self.evaluations)
            known["eval_share"] = sum(self.evaluations) / (time.perf_counter() - self.born)
        if steps is not None:
            every = training.eval_every or steps  # and one after the last step in any case
            coming = math.ceil(steps / every) - (state.step - 1) // every  # this step's follows
            ends.append((steps - state.step) * self.pace + coming * known.get("eval_s", 0.0))
        if training.max_seconds:
            ends.append(max(0.0, training.max_seconds - state.seconds))
        return {**known, "left_s": min(ends)} if ends else known

    def add(self, scalars: dict[str, Tensor | float]) -> None:
        for name, value in scalars.items():
            value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.values.setdefault(name, []).append(value.reshape(()).float())

    def means(self) -> dict[str, float]:
        """Mean of every name over the finite values of all ranks; forgets them. Collective."""
        own = {}
        for name, values in self.values.items():
            finite = [x for x in torch.stack(values).tolist() if math.isfinite(x)]
            own[name] = (sum(finite), len(finite))
        self.values = {}
        total: dict[str, tuple[float, int]] = {}
        for share in dist.gather(own):
            for name, (value, count) in share.items():
                before = total.get(name, (0.0, 0))
                total[name] = (before[0] + value, before[1] + count)
        return {name: value / count for name, (value, count) in total.items() if count}

    def rates(self, images_per_step: int, sample_flops: float, device: torch.device) -> dict:
        """images/s of all ranks, s/step, share of waiting for data; on GPUs GiB and TFLOP/s."""
        seconds = time.perf_counter() - self.started
        latest = seconds / max(self.steps, 1)
        self.pace += (self.RECENT if self.pace else 1.0) * (latest - self.pace)
        rates = {
            "images_per_s": images_per_step * self.steps / seconds,
            "step_s": latest,
            "data_wait": self.waited / seconds,
        }
        if sample_flops:
            per_device = rates["images_per_s"] / dist.world_size()
            rates["model_tflops"] = sample_flops * per_device / 1e12
        if device.type == "cuda":
            rates["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return rates


class Checks:
    """Is the step finite, did a signal come, how late is it? One answer for all ranks, read later.

    Only reading waits for the device. A host that launches the next step before it reads the
    answers about this one leaves no gap on the device.
    """

    def __init__(self, stop: StopSignal, clock: Clock):
        self.stop, self.clock = stop, clock
        self.unread: list[tuple] = []  # oldest first

    def launch(self, step: int, norm: Tensor, seen: list[tuple[Tensor, dict, list]]) -> None:
        """Ask about a step; `norm` and `seen` as in `nonfinite_report`. Collective."""
        broken = ~torch.isfinite(norm + sum(loss for loss, _, _ in seen))
        # filled on the device: copying a number there would wait for it
        signal_came = torch.full_like(broken, self.stop.received is not None)
        read = dist.any_ranks_later(torch.stack([broken, signal_came]))
        self.unread.append((step, norm, seen, read, self.clock.launch(norm.device)))

    def read(self, leave: int = 0) -> str | None:
        """Read all but the last `leave` steps: why one of them is not finite, or None. Collective.

        Sets stop.agreed if a signal came, and the clock.
        """
        while len(self.unread) > leave:
            step, norm, seen, read, read_clock = self.unread.pop(0)
            broken, signal_came = read()
            read_clock()
            self.stop.agreed |= signal_came
            if broken:
                return nonfinite_report(step, norm, seen)
        return None


def nonfinite_report(step: int, norm: Tensor, seen: list[tuple[Tensor, dict, list]]) -> str:
    """One line about a step that is not finite, the same on all ranks. Collective.

    Args:
        seen: loss, parts and sample names of this rank's micro-batches. Named are those of the
            ranks whose own loss is at fault, or all if only the gradient is.
    """
    parts = Meter()
    for loss, named, _ in seen:
        parts.add({"loss": loss, **named})
    own = {name: [x.item() for x in values] for name, values in parts.values.items()}
    names = [str(name) for _, _, batch_names in seen for name in batch_names]
    ranks = dist.gather((own, names))
    at_fault = [r for r in ranks if not all(map(math.isfinite, r[0]["loss"]))]
    text = [
        f"{name}={','.join(f'{x:.4g}' for x in values)}"
        for own, _ in at_fault or ranks
        for name, values in own.items()
    ]
    samples = [name for _, names in at_fault or ranks for name in names]
    return (
        f"non-finite {'loss' if at_fault else 'gradient'} at step {step}; gradient norm: "
        f"{norm.item():.4g}; parts: {' '.join(text)}; samples: {' '.join(samples)}"
    )


def detached(scalars: dict[str, Tensor | float]) -> dict[str, Tensor | float]:
    """The same numbers without the graph that they came from."""
    return {n: x.detach() if isinstance(x, Tensor) else x for n, x in scalars.items()}


def buffers_before(model: nn.Module, training: Any, state: State) -> list[Tensor]:
    """Copies of the buffers if the step may be skipped: NaN would stay in BatchNorm's means."""
    if state.skipped >= training.skip_nonfinite:
        return []
    return [buffer.clone() for buffer in model.buffers()]


@torch.no_grad()
def skip(state: State, training: Any, why: str, buffers: list[Tensor], model: nn.Module) -> None:
    """Skip a step. Raises: RuntimeError: the allowed number has already been skipped."""
    if state.skipped >= training.skip_nonfinite:
        raise RuntimeError(why)
    state.skipped += 1
    dist.print0(f"skipped ({state.skipped} of {training.skip_nonfinite}): {why}")
    for buffer, before in zip(model.buffers(), buffers):
        buffer.copy_(before)
