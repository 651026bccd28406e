"""The training loop shared by pretrain.py, train.py and finetune.py.

A stage brings a model and a `loss_fn`; the loop does what all stages share. It is one plain
function on purpose: to try another loop, copy it into your script and edit the copy.

Randomness is a function of (seed, rank, step), and the data are a function of their position, so
the state of a run is weights, optimizer, EMA and one integer. To resume, run the same command
again. With training.max_seconds the learning rate follows the clock, and no two runs are bit-equal.
"""

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils import checkpoint, dist
from utils.ema import Ema
from utils.optimizer import OptimizerConfig, learning_rate, make_optimizer
from utils.problems import Checked
from utils.progress import Checks, Meter, State, buffers_before, detached, skip
from utils.run import Run, RunConfig
from utils.stopping import MOST_SECONDS, Clock, StopSignal

UNLIMITED = 2**62  # steps of a run that only the clock ends
# tqdm's time left does not count the evaluations to come; that of `report` does
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
Scalars = dict[str, Tensor | float]
Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch", bound=Mapping[str, Any])  # a bad loss is reported with its "name"s


@dataclass(kw_only=True)
class TrainingConfig(Checked):
    batch_size: int = 8  # samples per micro-batch and process
    epochs: int = 50
    steps: int = 0  # optimizer steps; 0: as many as `epochs` need or max_seconds allows
    max_seconds: float | None = None  # wall-clock time from the first step; null: no limit
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    mixed_precision: Literal["bf16", "no"] = "bf16"
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    lr_min: float = 1e-6  # where the cosine ends
    ema_decay: float = 0.0  # 0: no averaged weights
    log_every: int = 10  # optimizer steps between log rows
    eval_every: int = 500  # optimizer steps between evaluations; 0: only after the last step
    save_every: int = 500  # optimizer steps between checkpoints; 0: only after the last step
    keep_last: int = 0  # number of checkpoints to keep; 0: all
    best_metric: str = "val_loss"  # chooses the best checkpoint: lowest; "-name": highest
    seed: int = 0
    skip_nonfinite: int = 0  # steps with non-finite loss or gradient to skip before a run stops

    def problems(self) -> Iterator[str]:
        for name in ("batch_size", "gradient_accumulation_steps", "log_every"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, got {getattr(self, name)}"
        for name in (
            "epochs",
            "steps",
            "warmup_steps",
            "grad_clip",
            "eval_every",
            "save_every",
            "keep_last",
            "seed",
            "skip_nonfinite",
            "lr_min",
        ):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, got {getattr(self, name)}"
        if self.max_seconds is not None and not 0 < self.max_seconds <= MOST_SECONDS:
            yield (
                f"max_seconds must be above 0 and at most {MOST_SECONDS}, or null, got"
                f" {self.max_seconds}"
            )
        if self.seed >= 2**63:
            yield f"seed must be below 2**63, got {self.seed}"
        if not 0 <= self.ema_decay < 1:
            yield f"ema_decay must be in [0, 1), got {self.ema_decay}"


class FitConfig(Protocol):
    """What `fit` reads from a stage's configuration.

    `resume` compares its other fields (model, data, loss, ...) with the checkpoint's; the class
    variable MAY_CHANGE (configs/schema.py) names those that may differ, by section.
    """

    @property
    def training(self) -> TrainingConfig: ...

    @property
    def optimizer(self) -> OptimizerConfig: ...

    @property
    def run(self) -> RunConfig: ...


def fit(
    cfg: FitConfig,
    model: Model,
    loss_fn: Callable[[nn.Module, Batch], tuple[Tensor, Scalars]],
    batches: Callable[[int], Iterator[Batch]],
    run: Run,
    eval_fn: Callable[[Model], Mapping[str, Any]] | None = None,
    samples: int = 0,
    sample_flops: float = 0.0,
) -> None:
    """Train the parameters of `model` that require grad, on the device where the model is.

    Args:
        cfg: its .model, if it has one, must be equal when resuming.
        loss_fn: (model, batch) -> (scalar mean over the samples, parts to log). A part that a
            batch cannot measure is left out or NaN. Runs under autocast.
        batches: n -> iterator over this rank's micro-batches, starting with the n-th.
        eval_fn: (model) -> numbers of this rank, whose mean over ranks is logged, and pictures
            (H, W, 3) uint8. Runs on every rank with the averaged weights, in eval(), without
            gradient, with the same random draws each time.
        samples: items in an epoch; needed where cfg.training.steps is 0.
        sample_flops: model FLOPs of one sample's step; 0: their rate is not logged.

    Raises:
        RuntimeError: loss or gradient is not finite, on all ranks alike; `model` may be damaged.
        ValueError: the checkpoint does not fit. SystemExit(0): stopped by a signal, and saved.
    """
    training, micros = cfg.training, cfg.training.gradient_accumulation_steps
    device = next(model.parameters()).device
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = list(named.values())
    optimizer, ema, state = make_optimizer(cfg, named), Ema(model, training.ema_decay), State()
    total_steps(training, samples)  # raises at once if something is missing
    state.resume(cfg, model, optimizer, ema, run)
    steps, clock = total_steps(training, samples, state), Clock(training.max_seconds, state.seconds)
    if clock.over:
        steps = min(steps, state.step)
    if state.step >= steps and not (eval_fn and state.evaluated < state.step == steps):
        return dist.print0(
            f"{cfg.run.resume or run.dir} is finished: step {state.step} of {steps};"
            " raise training.epochs, training.steps or training.max_seconds to continue"
        )
    if training.steps or training.max_seconds:
        dist.print0(f"{what_ends(training)}; training.epochs does not count")
    dist.together(lambda: run.start(state.step))
    ddp: Any = distributed(model, device)
    meter = Meter()
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=training.mixed_precision == "bf16"
    )

    def time_for(every: int) -> bool:
        return state.step == steps or (every > 0 and state.step > 0 and state.step % every == 0)

    with (
        StopSignal() as stop,
        closing(run),
        checkpoint.finished_on_exit(),
        progress_bar(state.step, steps, format=BAR) as bar,
    ):
        if eval_fn and time_for(training.eval_every) and state.evaluated < state.step:
            evaluate(cfg, model, eval_fn, autocast, ema, state, run, meter)  # after a signal
            if state.step == steps:
                state.save(cfg, model, optimizer, ema, run)
        stream = batches(state.position // (training.batch_size * dist.world_size()))
        model.train()
        meter.begin()
        checks = Checks(stop, clock)
        clock.start()
        while state.step < steps and not stop.agreed:
            # the gradient of one step
            seed_step(training.seed, dist.rank(), state.step)
            buffers, seen = buffers_before(model, training, state), []
            for micro in range(micros):
                with meter.waiting():
                    batch = to_device(next(stream), device)
                with ddp.no_sync() if ddp is not model and micro < micros - 1 else nullcontext():
                    with autocast():
                        loss, parts = loss_fn(ddp, batch)
                    (loss / micros).backward()
                loss, parts = loss.detach(), detached(parts)  # no graph outlives its step
                seen.append((loss, parts, batch.get("name", [])))
                meter.add({"loss": loss, **parts})

            # the update. A step that may be skipped is checked before it, any other one step
            # later, so that the device works on the next step while the host waits for the answer
            norm = nn.utils.clip_grad_norm_(trained, training.grad_clip or math.inf)
            checks.launch(state.step + 1, norm, seen)
            lr = learning_rate(cfg, state.step, steps, clock.agreed)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            lag = 0 if state.skipped < training.skip_nonfinite else 1
            if why := checks.read(leave=lag):
                skip(state, training, why, buffers, model)
            else:
                optimizer.step()
                ema.update()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.position += global_batch(training)
            meter.add({"grad_norm": norm})
            meter.steps += 1
            bar.update()
            state.seconds = clock.agreed
            if clock.over:  # known one step late, like everything the ranks agree on
                steps = state.step

            # now and then: report, evaluate, save what is known to be finite
            every = training.log_every, training.eval_every, training.save_every
            if why := checks.read(leave=0 if stop.agreed or any(map(time_for, every)) else lag):
                raise RuntimeError(why)
            if time_for(training.log_every):
                report(run, bar, state, meter, lr, training, sample_flops, device)
            may_evaluate = not stop.agreed or state.step == steps
            if eval_fn and time_for(training.eval_every) and may_evaluate:
                try:
                    evaluate(cfg, model, eval_fn, autocast, ema, state, run, meter)
                except Exception:  # a damaged pair, no memory: do not lose the steps as well
                    state.save(cfg, model, optimizer, ema, run)
                    raise
                meter.begin()
            if time_for(training.save_every) or stop.agreed:
                path = state.save(cfg, model, optimizer, ema, run)
    if stop.agreed and state.step < steps:
        dist.print0(
            f"stopped by a signal after step {state.step} of {steps}; saved {path}; "
            "to continue, run the same command again"
            f"{' without --resume' if cfg.run.resume else ''}"
        )
        raise SystemExit(0)


# the parts of a step


def distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with gradients averaged over the ranks; `model` itself with one process.

    DDP must ignore sharded parameters (DTensor, frozen): it would try to send them to all ranks.
    """
    if dist.world_size() == 1:
        return model
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    with warnings.catch_warnings():  # torch 2.14 renames broadcast_buffers, 2.11 has no other
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def global_batch(training: TrainingConfig) -> int:
    """Samples per optimizer step over all ranks."""
    return training.batch_size * training.gradient_accumulation_steps * dist.world_size()


def total_steps(training: TrainingConfig, samples: int, state: State | None = None) -> int:
    """training.steps, or the steps that training.epochs of `samples` items take, rounded up.

    With training.max_seconds and no training.steps: UNLIMITED.

    Steps that a resumed run (`state`) took with another batch size count as their samples.
    """
    if training.steps:
        return training.steps
    if training.max_seconds:
        return UNLIMITED
    if not samples:
        raise ValueError("training.steps is 0 and the number of samples in an epoch is not known")
    state = state or State()
    left = training.epochs * samples - state.position
    return state.step + max(0, math.ceil(left / global_batch(training)))


def what_ends(training: TrainingConfig) -> str:
    """The limits that the configuration sets, in words."""
    limits = [f"{training.steps} steps, as training.steps says"] if training.steps else []
    if training.max_seconds:
        limits.append(f"at most {training.max_seconds:g} s, as training.max_seconds says")
    return " and ".join(limits)


def seed_step(seed: int, rank: int, step: int) -> None:
    """Make all randomness of a step a function of (seed, rank, step)."""
    words = np.random.SeedSequence([seed, rank, step]).generate_state(3)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[2]))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move tensors to the device; lists stay on the host, which would wait to fetch them back."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    return cast(Batch, moved)


# now and then


def progress_bar(step: int, steps: int, unit: str = "step", format: str | None = None) -> tqdm:
    """Shown on rank 0; in a log file, a line every ten seconds instead of a moving bar."""
    return tqdm(
        initial=step,
        total=steps if steps < UNLIMITED else None,
        unit=unit,
        bar_format=format if steps < UNLIMITED else None,
        disable=not dist.is_main(),
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )


def report(
    run: Run,
    bar: tqdm,
    state: State,
    meter: Meter,
    lr: float,
    training: TrainingConfig,
    sample_flops: float,
    device: torch.device,
) -> None:
    """Log what the meter gathered since the last report."""
    means, rates = meter.means(), meter.rates(global_batch(training), sample_flops, device)
    cost = meter.cost(state, bar.total, training)
    run.log(state.step, **means, lr=lr, skipped=state.skipped, **rates, **cost)
    words = [f"loss {means.get('loss', math.nan):.4g}", f"lr {lr:.2g}"]
    words.append(f"{rates['images_per_s']:.3g} img/s")
    if "eval_s" in cost:
        words.append(f"evaluation {cost['eval_s']:.3g} s, {cost['eval_share']:.0%} of the time")
    if "left_s" in cost:
        words.append(f"{tqdm.format_interval(cost['left_s'])} left")
    bar.set_postfix_str(", ".join(words), refresh=False)
    meter.begin()


def evaluate(
    cfg: FitConfig,
    model: Model,
    eval_fn: Callable[[Model], Mapping[str, Any]],
    autocast: Callable,
    ema: Ema,
    state: State,
    run: Run,
    meter: Meter,
) -> None:
    """Log `eval_fn` with the averaged weights, and save them if they are the best so far."""
    seed_step(cfg.training.seed, dist.rank(), 2**32)  # the same draws at every evaluation
    model.eval()
    with meter.evaluating(), ema.swapped_in(), torch.no_grad():
        with autocast():
            results = eval_fn(model)
        pictures = {tag: x for tag, x in results.items() if isinstance(x, np.ndarray)}
        values = dist.all_reduce_mean({n: x for n, x in results.items() if n not in pictures})
        run.log(state.step, **values)
        for tag, picture in pictures.items():
            run.image(state.step, tag, picture)
        state.save_if_best(cfg, model, values, run)
        state.evaluated = state.step
    model.train()
