"""Order and augmentation are functions of (seed, position): ranks, workers and resuming agree."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from data.pairs import DataConfig, LabelConfig, open_pairs
from data.stream import evenly_spaced, in_step, sequential, stream
from tests import tiny_data as tiny
from tests.conftest import ROOT


@pytest.fixture(scope="module", params=["ram", "none"])
def pairs(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("stream") / "pairs.parquet"
    tiny.write(file, tiny.rows(11, split=lambda i: "train"), row_group_size=3)
    labels = LabelConfig(material_source="none")
    return open_pairs(
        DataConfig(path=str(file), size=16, cache=request.param, labels=labels), "train"
    )


def take(batches, count: int) -> list[dict]:
    taken = [next(batches) for _ in range(count)]
    del batches
    return taken


def same(a: dict, b: dict) -> bool:
    tensors = ("visible", "infrared", "semantic")
    return a["name"] == b["name"] and all(torch.equal(a[k], b[k]) for k in tensors)


def joined(*batches: dict) -> dict:
    out = {k: torch.cat([b[k] for b in batches]) for k in ("visible", "infrared", "semantic")}
    out["draw"] = [d for b in batches for d in b["draw"]]
    return {**out, "name": [n for b in batches for n in b["name"]]}


def test_two_ranks_see_together_what_one_rank_sees(pairs):
    whole = take(stream(pairs, 4, seed=3), 6)
    halves = [take(stream(pairs, 2, seed=3, rank=r, world_size=2), 6) for r in (0, 1)]
    for batch, left, right in zip(whole, *halves):
        assert same(batch, joined(left, right))


def test_a_stream_begun_later_continues_the_first(pairs):
    whole = take(stream(pairs, 3, seed=1), 9)
    assert all(same(a, b) for a, b in zip(whole[5:], take(stream(pairs, 3, seed=1, first=5), 4)))


def test_workers_change_nothing(pairs):
    alone = take(stream(pairs, 3, seed=2), 8)
    helped = take(stream(pairs, 3, seed=2, num_workers=2), 8)
    assert all(same(a, b) for a, b in zip(alone, helped))


def test_workers_outlive_the_signal_that_the_run_answers_by_saving(pairs):
    """SLURM, timeout and a terminal's Ctrl-C reach every process of the group."""
    alone = take(stream(pairs, 3, seed=2), 20)
    batches = stream(pairs, 3, seed=2, num_workers=2)
    helped = take(batches, 2)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    helped += take(batches, 18)  # more than the workers had prepared
    assert all(same(a, b) for a, b in zip(alone, helped))


def test_an_error_ends_the_process_although_workers_ignore_sigterm():
    program = """
from data.pairs import DataConfig, open_pairs
from data.stream import stream
scenes = {"train": 40, "val": 1, "test": 1}
batches = stream(open_pairs(DataConfig(size=32, synthetic_scenes=scenes), "train"), 2, 0,
                 num_workers=2)
next(batches)
raise RuntimeError("in the loop")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: in the loop"


def test_an_epoch_holds_every_pair_once_and_epochs_differ(pairs):
    names = [n for b in take(stream(pairs, 1, seed=0), 22) for n in b["name"]]
    assert sorted(names[:11]) == sorted(names[11:]) == sorted(pairs.names)
    assert names[:11] != names[11:] != pairs.names


def test_order_follows_the_permutation_of_seed_and_epoch(pairs):
    batches = take(stream(pairs, 11, seed=5), 2)
    order = np.concatenate([np.random.default_rng([5, e]).permutation(11) for e in (0, 1)])
    assert [n for b in batches for n in b["name"]] == [pairs.names[i] for i in order]
    sample = pairs.get(order[15], np.random.default_rng([5, 15, 1]))
    assert torch.equal(batches[1]["visible"][4], sample["visible"])


def test_draw_is_the_position_and_the_seed_matters(pairs):
    batches = take(stream(pairs, 2, seed=0, rank=1, world_size=2), 3)
    assert [d for b in batches for d in b["draw"]] == [2, 3, 6, 7, 10, 11]
    assert not same(take(stream(pairs, 4, seed=0), 1)[0], take(stream(pairs, 4, seed=1), 1)[0])


def test_one_pair_is_augmented_anew_at_every_draw(pairs):
    batches = take(stream(pairs, 11, seed=0), 2)
    place = batches[1]["name"].index(batches[0]["name"][0])
    assert not torch.equal(batches[0]["visible"][0], batches[1]["visible"][place])
    still = take(stream(pairs, 11, seed=0, augment=False), 1)[0]
    index = pairs.names.index(still["name"][4])
    assert torch.equal(still["visible"][4], pairs.get(index)["visible"])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (2, 3), (3, 2), (4, 11)])
def test_evaluation_sees_every_pair_once_over_all_ranks(pairs, world_size, batch_size, num_workers):
    seen = []
    for rank in range(world_size):
        for batch in sequential(pairs, batch_size, rank, world_size, num_workers):
            assert 0 < len(batch["name"]) <= batch_size
            for i, draw in enumerate(batch["draw"]):
                assert torch.equal(batch["infrared"][i], pairs.get(draw)["infrared"])
            seen += batch["draw"]
    assert sorted(seen) == list(range(11))


@pytest.mark.parametrize(
    "world_size, batch_size, fillers", [(1, 4, 0), (2, 1, 1), (2, 5, 1), (3, 2, 0), (12, 4, 1)]
)
def test_in_step_every_rank_has_as_many_batches(pairs, world_size, batch_size, fillers):
    ranks = [list(in_step(pairs, batch_size, r, world_size)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    own = [b for batches in ranks for b in batches if not b["filler"]]
    assert sorted(d for b in own for d in b["draw"]) == list(range(11))
    assert sum(b["filler"] for batches in ranks for b in batches) == fillers


def test_a_limit_takes_evenly_spaced_pairs_once_over_all_ranks(pairs):
    for limit, wanted in ((0, range(11)), (3, (0, 3, 7)), (50, range(11))):
        assert evenly_spaced(11, limit) == list(wanted)
        draws = [
            d
            for rank in (0, 1)
            for batch in sequential(pairs, 2, rank, 2, 0, limit)
            for d in batch["draw"]
        ]
        assert sorted(draws) == list(wanted)


def test_streaming_leaves_the_global_randomness_alone(pairs):
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    take(stream(pairs, 2, seed=0, num_workers=2), 2)
    assert torch.equal(torch.rand(1), wanted)


def test_damage_found_by_a_worker_is_named(tmp_path):
    columns = tiny.rows(6, split=lambda i: "train")
    columns["infrared"][4] = columns["infrared"][4][:-30]
    file = tiny.write(tmp_path / "a.parquet", columns)
    labels = LabelConfig(material_source="none")
    pairs = open_pairs(DataConfig(path=str(file), size=16, labels=labels), "train")
    with pytest.raises(ValueError, match="row 4, 'pair_0004', infrared"):
        take(stream(pairs, 2, seed=0, num_workers=1), 3)
    for batches in (stream(pairs, 2, seed=0, num_workers=1), sequential(pairs, 2, num_workers=1)):
        with pytest.raises(ValueError) as raised:
            list(batches)
        assert "Traceback" not in str(raised.value) and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"seed": -1}, {"first": -1}]
)
def test_bad_options_are_refused_at_once(pairs, options):
    with pytest.raises(ValueError, match="-1|0"):
        stream(**{"dataset": pairs, "batch_size": 2, "seed": 0, **options})
