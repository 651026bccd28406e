"""Processes: the calls on one, and on two that torchrun starts (gloo).

pytest tests/test_dist.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.fast.attention_kernel import choose_kernel
from utils import dist

ROOT = Path(__file__).resolve().parent.parent


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        nn.BatchNorm2d(2, affine=False, momentum=None),
    )


def batch():
    return torch.randn(6, 3, 5, 7, generator=torch.Generator().manual_seed(1)) * 2 + 1


def outcome(model, x, share):
    """Output, gradient of the input and parameters of one step."""
    x = x.clone().requires_grad_()
    for _ in range(2):  # twice: the running statistics must move in the same way
        out = model(x)
    weight = torch.arange(out[0].numel(), dtype=torch.float32).view_as(out[0]).sin()
    (out.square() * weight).sum(dim=(1, 2, 3)).mean().mul(share).backward()
    result = {"output": out, "input": x.grad}
    result.update({f"grad {name}": p.grad for name, p in model.named_parameters()})
    result.update({name: buffer for name, buffer in model.named_buffers()})
    return {name: value.detach() for name, value in result.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks saw."""
    directory = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            __file__,
            str(directory),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [
        (
            json.loads((directory / f"{rank}.json").read_text()),
            torch.load(directory / f"{rank}.pt", weights_only=True),
        )
        for rank in (0, 1)
    ]


def test_batch_norm_over_two_ranks_equals_one_on_the_whole_batch(two_ranks):
    whole = outcome(net(), batch(), share=1.0)
    ranks = [tensors for _, tensors in two_ranks[1]]
    for name, expected in whole.items():
        if name in ("output", "input"):
            found = torch.cat([rank[name] for rank in ranks])
        elif name.startswith("grad"):
            found = ranks[0][name] + ranks[1][name]
        else:
            found = ranks[0][name]
            assert torch.equal(found, ranks[1][name]), name
        torch.testing.assert_close(found, expected, msg=lambda text, n=name: f"{n}: {text}")


def test_batch_norm_in_eval_uses_the_running_statistics(two_ranks):
    for _, tensors in two_ranks[1]:
        torch.testing.assert_close(tensors["eval"], tensors["eval_plain"], rtol=0, atol=0)


def test_means_count_only_the_ranks_that_have_the_value(two_ranks):
    for plain, _ in two_ranks[1]:
        assert plain["mean"] == {"both": 2.0, "first": 5.0, "second": 7.0}
        assert plain["weighted"] == {"x": 2.5}  # 1 sample of 1.0 and 3 of 3.0


def test_a_flag_on_one_rank_is_seen_by_all(two_ranks):
    for plain, _ in two_ranks[1]:
        assert plain["any"] == [True, False] and plain["flags"] == [True, False, True]
        assert plain["sum"] == [3, 30] and plain["gather"] == [0, 1]


def test_only_rank_0_prints(two_ranks):
    assert two_ranks[0].splitlines() == ["from 0 of 2"]


def test_one_process_needs_no_group():
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.init("cpu") == torch.device("cpu")
    assert dist.all_reduce_mean({"a": torch.tensor(2.0), "b": 3}) == {"a": 2.0, "b": 3.0}
    assert dist.any_rank(torch.tensor(True)) is True and dist.any_rank(False) is False
    counts = torch.tensor([1, 2])
    total = dist.sum_over_ranks(counts)
    total += 1
    assert counts.tolist() == [1, 2]
    model = net()
    assert dist.sync_batchnorm(model) is model and type(model[1]) is nn.BatchNorm2d
    dist.barrier(), dist.close()


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs 1 GPU.* finds 0; use --device cpu"):
        dist.init("cuda")
    with pytest.raises(ValueError, match="auto, cpu or cuda, got 'tpu'"):
        dist.init("tpu")
    assert dist.init("auto") == torch.device("cpu")


def test_a_deterministic_run_forbids_kernels_that_are_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        device = dist.init("cuda")
        assert not torch.are_deterministic_algorithms_enabled()
        assert dist.init("cuda", deterministic=True) == device
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
        assert choose_kernel(device, 1, 64, 2, 16)[0] == "flash, deterministic"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cuda.enable_cudnn_sdp(before)


def script(directory):
    """What each rank of `two_ranks` does."""
    dist.init("cpu")
    rank = dist.rank()
    dist.print0(f"from {rank} of {dist.world_size()}")
    model = dist.sync_batchnorm(net())
    tensors = outcome(model, batch()[:2] if rank == 0 else batch()[2:], share=(1 / 3, 2 / 3)[rank])
    plain_model = net().eval()
    plain_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        tensors["eval"], tensors["eval_plain"] = model.eval()(batch()), plain_model(batch())
    plain = {
        "mean": dist.all_reduce_mean(
            {
                "both": 1.0 + 2 * rank,
                **({"first": 5.0} if rank == 0 else {"first": float("nan"), "second": 7.0}),
            }
        ),
        "weighted": dist.all_reduce_mean({"x": 1.0 + 2 * rank}, weight=1.0 + 2 * rank),
        "any": [dist.any_rank(rank == 1), dist.any_rank(False)],
        "flags": dist.any_ranks(torch.tensor([rank == 0, False, rank == 1])),
        "sum": dist.sum_over_ranks(torch.tensor([1 + rank, 10 + 10 * rank])).tolist(),
        "gather": dist.gather(rank),
    }
    Path(directory, f"{rank}.json").write_text(json.dumps(plain))
    torch.save(tensors, Path(directory, f"{rank}.pt"))
    dist.barrier()
    dist.close()


if __name__ == "__main__":
    script(sys.argv[1])


@pytest.mark.parametrize(
    "nodes, shared, said", [("2", "True", 1), ("2", "False", 0), ("1", "True", 0)]
)
def test_a_store_that_a_replaced_node_cannot_find_is_said(monkeypatch, capsys, nodes, shared, said):
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    dist._warn_of_a_shared_store()
    assert capsys.readouterr().out.count("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == said
