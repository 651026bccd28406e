"""Protocols of other projects against second implementations; the leaderboard.

pytest tests/test_peers.py
"""

import json
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from assembly import features, peers
from assembly.peers import PEERS, PeerPairs
from configs.schema import EvaluateConfig
from data.pairs import DataConfig, open_pairs
from tests import tiny_data
from tests.conftest import ROOT, call_main
from tests.test_measures import scenes
from utils import metrics


def test_every_protocol_has_a_flag_value_and_says_what_is_sure():
    names = get_args(get_args(get_type_hints(EvaluateConfig)["protocol"])[0])
    assert names == tuple(PEERS)
    for peer in PEERS.values():
        assert peer.confirmed and peer.unconfirmed
        with pytest.raises(AttributeError):
            peer.side = 128


# metrics


@pytest.mark.parametrize("uniform", [False, True])
def test_ssim_inside_is_the_one_of_scikit_image(uniform):
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    a, b = scenes(seed=1), (scenes(seed=1) + 0.2 * scenes(seed=2)).clamp(0, 1)
    for x, y, found in zip(a, b, metrics.ssim_inside(a, b, uniform)):
        pair = x[0].double().numpy(), y[0].double().numpy()
        other = skimage.structural_similarity(*pair, data_range=1.0, **({} if uniform else how))
        assert found.item() == pytest.approx(other, abs=1e-6)
    with pytest.raises(ValueError, match="SSIM needs sides of"):
        metrics.ssim_inside(a[..., :6], b[..., :6], uniform)


def test_the_ssim_of_f_vita_is_that_of_bytes_in_the_upper_half():
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = scenes(1, seed=1), scenes(1, seed=2)
    pair = [((x[0, 0].numpy() + 1) * 127.5).astype(np.uint8).astype(float) for x in (a, b)]
    other = skimage.structural_similarity(*pair, data_range=255.0)
    assert peers.upper_half_ssim(a, b).item() == pytest.approx(other, abs=1e-4)
    assert other > metrics.ssim(a, b).item()  # it flatters


def test_the_frechet_distance_is_the_one_of_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)), rng.normal(0.3, 1.4, size=(50, 6))
    moments = [torch.from_numpy(m) for x in (a, b) for m in (x.mean(0), np.cov(x.T))]
    assert features.frechet_distance(a, b) == pytest.approx(_compute_fid(*moments).item(), rel=1e-8)
    assert features.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    few = features.frechet_distance(a[:3], a[:3])  # fewer images than features
    assert few == pytest.approx(0, abs=1e-10)


# images


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Pairs of 24 x 32 pixels with 8-bit infrared."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_data.write(folder / "a.parquet", tiny_data.rows(10, split=tiny_data.by_tens))
    cfg = DataConfig(path=str(folder), size=16)
    cfg.labels.material_source = "none"
    return open_pairs(cfg, "test")


def test_pid_measures_the_centre_square_in_bytes(wide):
    peer = PEERS["pid"]._replace(side=48)
    sample = PeerPairs(wide, peer)[0]
    counts = tiny_data.infrared(9)[:, 4:28]
    found = sample["target"][0].numpy() * 255
    assert np.abs(found - found.round()).max() < 1e-4
    other = np.asarray(Image.fromarray(counts).resize((48, 48), Image.Resampling.BICUBIC), float)
    assert np.abs(found - other).max() <= 1
    assert sample["visible"].shape == (3, 16, 16)  # the model sees its own size, cropped the same
    alone = np.asarray(Image.fromarray(tiny_data.visible(9)[:, 4:28]).resize((16, 16)), float)
    assert np.abs(sample["visible"].permute(1, 2, 0).numpy() * 255 - alone).mean() < 8


def test_a_generated_image_is_brought_to_the_published_size(wide):
    peer = PEERS["thermalgen"]._replace(side=32)
    image = scenes(2, 16)
    assert peers.fitted(image, peer).shape == (2, 1, 32, 32)
    assert PeerPairs(wide, peer)[0]["target"].shape == (1, 32, 32)
    same = peers.fitted(scenes(1, 32), peer)
    assert torch.equal(same, scenes(1, 32))  # nothing is rounded
    assert peers.note_of(wide.window) == []
    assert "stretched by itself" in peers.note_of(None)[0]


# the leaderboard


def found(identity, psnr, grey=10.0, **more):
    methods = {"grey": {"psnr": grey, "ssim": 0.2}, "ours": {"psnr": psnr, "ssim": None}}
    frozen = {"split": "test", "split_hash": "0" * 64, "range": "r", "resize": "s", "crop": "none"}
    return {
        "methods": methods,
        "intervals": {m: {k: [None, None] for k in x} for m, x in methods.items()},
        "differences": {"ours": {}},
        "protocol": {"id": identity, "frozen": frozen | more, "checkpoint_hash": "c" * 64},
        "pairs": 9,
        "size": [64, 64],
        "note": "no LPIPS (<urlopen error>)",
        "run": {
            "command": f"python evaluate.py {identity}",
            "commit": "d" * 40,
            "device": "cpu",
            "seconds_an_image": {"grey": 0.1, "ours": 0.2},
        },
    }


def board(folder, entries):
    for name, whole in entries.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(whole))
    call_main("leaderboard", "--results", folder, "--output", folder.parent / "board.md")
    return (folder.parent / "board.md").read_text()


def test_the_leaderboard_keeps_protocols_apart_and_rows_in_order(tmp_path):
    entries = {"b/x": found("one", 20.0), "a": found("one", 15.0), "c": found("two", 30.0)}
    entries |= {"d": found("two", 31.0, grey=11.0), "e": found("three", 1.0, name="fvita")}
    text = board(tmp_path / "board", entries)
    one, two, three = text.split("\n## ")[1:]
    assert [line.split(" | ")[0] for line in one.splitlines() if line.startswith("| ")] == [
        "| method",
        "| b/x: ours",
        "| a: ours",
        "| grey",
    ]
    assert "d: grey" in two and "| grey |" in two  # they differ, so both stand
    assert three.startswith("As F-ViTA") and "| not measured | not measured |" in three
    assert one.count("python evaluate.py one") == 2 and "evaluate.py two" not in one


def test_the_leaderboard_is_a_function_of_its_files(tmp_path):
    entries = {"a": found("one", 15.0), "b": found("one", 16.0)}
    text = board(tmp_path / "x" / "board", entries)
    again = board(tmp_path / "y" / "board", dict(reversed(entries.items())))
    assert text == again
    (tmp_path / "x" / "board" / "a" / "commands.txt").write_text("# A toy.\npython train.py\n")
    call_main("leaderboard", "--results", tmp_path / "x" / "board", "--output", tmp_path / "z.md")
    text = (tmp_path / "z.md").read_text()
    assert "No LPIPS (&lt;urlopen error&gt;)." in text and "**a** A toy." in text
    assert "python train.py\npython evaluate.py one\n```" in text


def test_the_leaderboard_names_a_file_that_it_cannot_read(tmp_path):
    with pytest.raises(ValueError, match=r"no results\.json below"):
        call_main("leaderboard", "--results", tmp_path, "--output", tmp_path / "a.md")
    for text in ("{", "[]", '{"run": {}}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"results\.json is not a results\.json of this version"
        ):
            call_main("leaderboard", "--results", tmp_path, "--output", tmp_path / "a.md")


def test_the_page_in_docs_is_the_one_of_its_files(tmp_path):
    call_main("leaderboard", "--output", tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text() == (ROOT / "docs/leaderboard.md").read_text()
