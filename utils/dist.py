"""Processes: one or many, CPU (gloo) or GPU (nccl), through the same calls.

Under torchrun there are many; without it one process is rank 0 of 1 and every call still works.
"""

import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
import torch.distributed.nn  # before there is a group: see `close`
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
JOIN = 300.0  # seconds, at least, for all ranks to start Python and find each other
_limit = {"seconds": math.inf}  # of `init`, for the sentence when it is over


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print0(*values: Any) -> None:
    """Print from rank 0 only."""
    if is_main():
        print(*values, flush=True)


def init(
    device: str = "auto", deterministic: bool = False, timeout: float = 1800.0
) -> torch.device:
    """Join the other processes, if torchrun started any, and return the device of this one.

    Args:
        device: auto (cuda where there is a GPU for every process), cpu or cuda.
        deterministic: only kernels that give the same bits every time; torch says which operation
            has none. A CPU's are so anyway.
        timeout: seconds that a rank waits for the others before the run ends; rank 0 may be busy
            alone for long: a first compilation, a checkpoint on a slow disk.

    Raises:
        ValueError: no such device here.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and gpus < local_world:
        raise ValueError(
            f"device cuda needs {local_world} GPU(s) for the processes on this machine"
            f", but PyTorch finds {gpus}; use --device cpu or start fewer"
        )
    use_cuda = device == "cuda" or (device == "auto" and 0 < local_world <= gpus)
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if deterministic and use_cuda:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch asks for it
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
        torch.use_deterministic_algorithms(True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch_dist.is_initialized():
        joining = timedelta(seconds=max(timeout, JOIN))
        store, own, count = next(torch_dist.rendezvous("env://", timeout=joining))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # it outlives a restart; in it are the addresses of processes now dead
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = torch_dist.PrefixStore(f"attempt{attempt}", store)
        torch_dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            store=store,
            rank=own,
            world_size=count,
            timeout=joining,
            device_id=chosen if use_cuda else None,
        )
        older = torch_dist.distributed_c10d._set_pg_timeout  # its name before torch 2.14
        getattr(torch_dist, "set_timeout", older)(timedelta(seconds=timeout))
        _limit["seconds"] = timeout
        _warn_of_a_shared_store()
    return chosen


def _warn_of_a_shared_store() -> None:
    """Print a note if a replaced node could not join the others.

    With one store for all rounds the survivors' launchers do not announce it again, and processes
    of launchers that count their restarts differently would look in different places.
    """
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if nodes > 1 and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        print0(
            "note: a node that is replaced cannot join again; set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node (docs/cluster.md)"
        )


def together(work: Callable[[], None]) -> None:
    """Do `work` on every rank; an OSError or ValueError on one rank is raised on all of them."""
    wrong: OSError | ValueError | None = None
    try:
        work()
    except (OSError, ValueError) as error:
        wrong = error
    for number, text in enumerate(gather(str(wrong) if wrong else "")):
        if text and not wrong:
            raise ValueError(f"{text} (on rank {number})")
    if wrong:
        raise wrong


def lost_ranks(error: Exception) -> str | None:
    """A sentence if `error` comes from a collective that other ranks did not join, else None.

    Each rank that waited in vain notes it in the store; a rank without a note after a few seconds
    hangs.
    """
    text = str(error)
    if world_size() == 1 or not ("gloo" in text or isinstance(error, torch_dist.DistError)):
        return None
    if any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer")):
        return "another rank has ended; its message gives the reason"
    if not any(sign in text for sign in ("Timed out waiting", "timed out", "timeout")):
        return None
    store = torch_dist.distributed_c10d._get_default_store()
    store.set(f"waited/{rank()}", "yes")
    time.sleep(min(5.0, _limit["seconds"] / 2))  # the others' waits began and end about now
    missing = [r for r in range(world_size()) if not store.check([f"waited/{r}"])]
    who = f"rank {', '.join(map(str, missing))} did" if missing else "a rank did"
    return (
        f"{who} not arrive within {_limit['seconds']:g} s (run.timeout): it hangs, or does"
        " something that takes longer"
    )


def close() -> None:
    """Leave the group and end its threads; harmless if there is none.

    gloo's threads end with the last reference to the group. One that outlives it may be about to
    free the tensors of the last collective; if Python shuts down meanwhile, the process aborts
    (pytorch issue 190489). DDP imports torch.distributed.nn, whose functions take the group of that
    moment as their default and keep it for ever; imported above, before any group, they take None.
    With a sharded model (DTensor) caches of torch still keep the group, and gloo's threads.
    """
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        torch_dist.barrier()


def gather(value: Any) -> list[Any]:
    """The plain value of every rank, by rank. Waits for the device: not for use in every step."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def all_reduce_mean(values: dict[str, Any], weight: float = 1.0) -> dict[str, float]:
    """Mean over the ranks that have the value, each counted `weight` times (say, its samples).

    A rank lacks a value if the name is absent or its number is NaN. Collective: call on all ranks.
    """
    own = {name: float(value) for name, value in values.items()}
    found: dict[str, list] = {}
    for share, share_weight in gather((own, float(weight))):
        for name, value in share.items():
            if value == value and share_weight > 0:  # not NaN
                found.setdefault(name, []).append((value, share_weight))
            else:
                found.setdefault(name, [])
    return {
        name: sum(x * w for x, w in pairs) / sum(w for _, w in pairs) if pairs else math.nan
        for name, pairs in found.items()
    }


def any_rank(flag: bool | Tensor) -> bool:
    """Whether the flag is set on any rank, the same answer on all of them."""
    return any_ranks(torch.as_tensor(flag).reshape(1))[0]


def any_ranks(flags: Tensor) -> list[bool]:
    """`any_rank` of several flags (n,) at once: one collective, one wait for the device."""
    return any_ranks_later(flags)()


def any_ranks_later(flags: Tensor) -> Callable[[], list[bool]]:
    """`any_ranks` launched now, without waiting for the device; calling the result waits.

    The wait is for the flags alone, not for work that the device was given after them.
    """
    read = most_of_ranks_later(flags)
    return lambda: [bool(flag) for flag in read()]


def most_of_ranks_later(numbers: Tensor) -> Callable[[], list[int]]:
    """The element-wise maximum of all ranks' numbers, (n,) int32; launched and read as above."""
    if world_size() > 1:
        numbers = numbers.to(_collective_device(), torch.int32)
        torch_dist.all_reduce(numbers, torch_dist.ReduceOp.MAX)  # nccl only launches it
    on_host = numbers.to("cpu", non_blocking=True)  # from a GPU: into pinned memory
    copied = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None

    def read() -> list[int]:
        if copied:
            copied.synchronize()
        return on_host.tolist()

    return read


def sum_over_ranks(counts: Tensor) -> Tensor:
    """Sum of a tensor over the ranks, as a new tensor on the same device."""
    if world_size() == 1:
        return counts.clone()
    total = counts.to(_collective_device(), copy=True)
    torch_dist.all_reduce(total)
    return total.to(counts.device)


def _collective_device() -> torch.device:
    if torch_dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# batch normalisation over all ranks


def sync_batchnorm(model: Model) -> Model:
    """Make every BatchNorm of `model` normalise over the batches of all ranks together.

    Two ranks of batch b then equal one of 2b. One process: nothing changes. On GPUs this is
    torch.nn.SyncBatchNorm, which knows no CPU; there the layers become `GroupBatchNorm2d` in place.
    """
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GroupBatchNorm2d  # same parameters, buffers and names
    return model


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all ranks, on any backend; plain BatchNorm2d in eval."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        wide = x.float()  # (B, C, H, W)
        count = _SumOverRanks.apply(wide.new_tensor(float(x.numel() // x.shape[1])))
        mean = _SumOverRanks.apply(wide.sum(dim=(0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _SumOverRanks.apply(centred.square().sum(dim=(0, 2, 3))) / count
        if self.track_running_stats:
            self._update_running(mean.detach(), variance.detach() * count / (count - 1))
        out = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(x.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _SumOverRanks(torch.autograd.Function):
    """y = sum of x over ranks; the gradient of x is the sum of the ranks' gradients of y."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        torch_dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch_dist.all_reduce(total)
        return total
