"""Checkpoint files: whole or absent, nothing but what is trained, nothing but plain values.

pytest tests/test_checkpoint.py
"""

import os
import pickle
import threading

import pytest
import torch
from torch import nn

from utils import checkpoint


def write(path, value=1.0, **kwargs):
    checkpoint.save(path, {"model": {"weight": torch.full((50,), value)}}, **kwargs)


def value_in(path):
    return checkpoint.load(path)["model"]["weight"][0].item()


class Net(nn.Module):
    """A frozen base, a trained adapter with and without buffers, a frozen part that is kept."""

    def __init__(self, width=3):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
        self.adapter = nn.Sequential(
            nn.Linear(3, width),
            nn.BatchNorm1d(width),
            nn.Linear(width, 3),
            nn.BatchNorm1d(3, affine=False),
        )
        self.kept = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
        self.kept.saved_when_frozen = True


def test_only_trained_kept_and_their_buffers_are_saved():
    state = checkpoint.trained_state(Net())
    assert not any(name.startswith("base") for name in state)
    assert {
        "adapter.0.weight",
        "adapter.1.running_mean",
        "adapter.3.running_var",
        "kept.0.weight",
        "kept.1.running_mean",
        "kept.1.num_batches_tracked",
    } <= set(state)
    assert len(state) == 2 + 5 + 2 + 3 + 2 + 5


def test_what_was_saved_loads_into_an_equal_model_and_leaves_the_base_alone(tmp_path):
    torch.manual_seed(0)
    source, target = Net(), Net()
    base = target.base[0].weight.clone()
    checkpoint.save(tmp_path / "a.pth", {"model": checkpoint.trained_state(source)})
    checkpoint.load_into(target, checkpoint.load(tmp_path / "a.pth")["model"], "a.pth")
    assert torch.equal(source.adapter[0].weight, target.adapter[0].weight)
    assert torch.equal(source.kept[0].weight, target.kept[0].weight)
    assert torch.equal(base, target.base[0].weight)


def test_a_compiled_model_is_saved_under_its_plain_names():
    net = Net()
    plain = checkpoint.trained_state(net)
    net.adapter = torch.compile(net.adapter)
    assert set(checkpoint.trained_state(net)) == set(plain)
    checkpoint.load_into(net, plain, "plain")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.pop("adapter.0.weight"), "it lacks 'adapter.0.weight'"),
        (lambda s: s.update(strange=torch.zeros(1)), "this model has no 'strange'"),
        (
            lambda s: s.update({"adapter.0.bias": torch.zeros(9)}),
            r"'adapter.0.bias' is \(9,\) there and \(3,\) here",
        ),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_by_name_and_shape(change, said):
    net = Net()
    state, before = checkpoint.trained_state(net), net.adapter[0].weight.clone()
    state["adapter.0.weight"] = state["adapter.0.weight"] + 1
    change(state)
    with pytest.raises(ValueError, match=f"old.pth does not fit: {said}"):
        checkpoint.load_into(net, state, "old.pth")
    assert torch.equal(net.adapter[0].weight, before)  # nothing was half loaded


def test_a_failure_between_writing_and_renaming_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_00000001.pth"
    write(path, 1.0)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(path, 2.0)
    assert value_in(path) == 1.0
    assert checkpoint.latest(tmp_path) == path
    next_path = tmp_path / "checkpoint_00000002.pth"
    write(next_path, 3.0)
    assert value_in(next_path) == 3.0  # and the half-written one is gone
    assert sorted(os.listdir(tmp_path)) == [path.name, next_path.name]


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_named_with_the_file_and_leaves_the_last_one(
    tmp_path, monkeypatch, background
):
    path = tmp_path / "checkpoint_00000001.pth"
    write(path, 1.0)

    def save(parts, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")  # torch's words for a full disk

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"checkpoint_00000001.pth was not written, \d+ MiB are free"):
        checkpoint.save(path, {"model": {}}, background=background)
        checkpoint.wait()
    assert value_in(path) == 1.0 and os.listdir(tmp_path) == [path.name]


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=original, n=name: (calls.append(n), f(*a))[1])
    write(tmp_path / "a.pth")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_latest_passes_over_a_damaged_file_and_names_it(tmp_path, capsys, damage):
    old, new = (tmp_path / f"checkpoint_{step:08d}.pth" for step in (9, 10))
    write(old), write(new)
    whole = new.read_bytes()
    middle = whole.index(torch.full((50,), 1.0).numpy().tobytes()) + 20
    new.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"not found",
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[damage]
    )
    assert checkpoint.latest(tmp_path) == old
    assert f"passing over {new}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"checkpoint_00000010.pth is damaged"):
        checkpoint.load(new)


def test_latest_counts_steps_as_numbers(tmp_path):
    for step in ("99999999", "100000000"):
        write(tmp_path / f"checkpoint_{step}.pth")
    assert checkpoint.latest(tmp_path).name == "checkpoint_100000000.pth"
    assert checkpoint.latest(tmp_path / "empty") is None


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": {}, "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        checkpoint.load(tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(tmp_path / "raw.pth")
    assert not (tmp_path / "ran").exists()


def test_a_file_without_a_model_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no entry `model`"):
        checkpoint.load(tmp_path / "other.pth")


def test_a_background_save_holds_the_values_of_its_moment(tmp_path, monkeypatch):
    gate, original = threading.Event(), os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (gate.wait(10), original(*a)))
    weight = torch.zeros(50)
    checkpoint.save(tmp_path / "a.pth", {"model": {"weight": weight}}, background=True)
    weight += 1  # training goes on
    assert not (tmp_path / "a.pth").exists()
    gate.set()
    checkpoint.wait()
    assert value_in(tmp_path / "a.pth") == 0.0


def test_an_error_of_a_background_save_is_raised_at_the_next_wait(tmp_path):
    (tmp_path / "file").write_text("")
    write(tmp_path / "file/a.pth", background=True)
    with pytest.raises(OSError, match="could not be written"):
        checkpoint.wait()
    checkpoint.wait()


def test_prune_never_counts_a_damaged_later_one_as_the_newest(tmp_path):
    (tmp_path / "checkpoint_00000020.pth").write_bytes(b"half of it")  # passed over on resuming
    for step in (3, 4):
        write(tmp_path / f"checkpoint_{step:08d}.pth", keep=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint_00000004.pth"
    assert not (tmp_path / "checkpoint_00000003.pth").exists()


def test_prune_keeps_the_newest(tmp_path):
    for step in range(1, 5):
        write(tmp_path / f"checkpoint_{step:08d}.pth", keep=2)
    write(tmp_path / "best_model.pth", keep=2)
    assert sorted(os.listdir(tmp_path)) == [
        "best_model.pth",
        "checkpoint_00000003.pth",
        "checkpoint_00000004.pth",
    ]
