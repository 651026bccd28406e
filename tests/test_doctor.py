"""The doctor: planted shifts and constant frames are measured and named; the page is whole."""

import numpy as np
import pytest
from PIL import Image

import prepare
from data import doctor


def real_pair(real_data, name):
    folder = real_data / name
    visible = sorted((folder / "visible").iterdir())[0]
    infrared = sorted((folder / "infrared").iterdir())[0]
    return np.array(Image.open(visible).convert("RGB")), np.array(Image.open(infrared).convert("L"))


@pytest.mark.parametrize("name", ["m3svd", "roadscene", "llvip"])
@pytest.mark.parametrize("rows, columns", [(0, 3), (3, 0), (-2, 3), (0, 0)])
def test_a_planted_shift_is_measured_within_half_a_pixel(real_data, name, rows, columns):
    visible, infrared = real_pair(real_data, name)
    plain, score = doctor.registration(visible[8:-8, 8:-8], infrared[8:-8, 8:-8])
    height, width = infrared.shape
    moved = infrared[8 - rows : height - 8 - rows, 8 - columns : width - 8 - columns]
    shift, _ = doctor.registration(visible[8:-8, 8:-8], moved)
    assert score > doctor.SURE
    assert abs(shift[0] - plain[0] - rows) < 0.5 and abs(shift[1] - plain[1] - columns) < 0.5


def test_inverted_polarity_does_not_change_the_shift(real_data):
    visible, infrared = real_pair(real_data, "m3svd")
    shift, _ = doctor.registration(visible, infrared)
    assert np.allclose(doctor.registration(visible, 255 - infrared)[0], shift, atol=0.1)


def test_unrelated_and_constant_images_are_not_measured():
    noise = np.random.default_rng(0)
    visible = noise.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    other = noise.integers(0, 256, (96, 128), dtype=np.uint8)
    assert not doctor.examine("a", visible, other).suspect()
    dead = doctor.examine("b", visible, np.full((96, 128), 7, np.uint16))
    assert dead.constant and dead.suspect() and np.isfinite(dead.score)


def test_check_names_the_shifted_pair_and_writes_one_page(tmp_path, capsys):
    noise = np.random.default_rng(0)
    for i in range(6):
        blocks = Image.fromarray(noise.integers(0, 256, (16, 20), dtype=np.uint8))
        scene = np.array(blocks.resize((200, 160), Image.Resampling.NEAREST))
        moved = np.roll(scene, 5, axis=1) if i == 2 else scene
        for kind, image in (("rgb", np.stack([scene] * 3, -1)), ("ir", 255 - moved)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / kind / f"<b>{i}x.png")
    out, page = tmp_path / "out", tmp_path / "page.html"
    argv = ["--visible", tmp_path / "rgb", "--infrared", tmp_path / "ir", "--out", out]
    prepare.main([str(a) for a in [*argv, "--num_workers", 1]])
    prepare.main(["--check", str(out), "--report", str(page)])
    told = capsys.readouterr().out
    assert "1 pairs are shifted by 3 pixels or more" in told and "2x, 5.0 pixels" in told
    text = page.read_text()
    assert text.count("<img") == 2 and "&lt;b&gt;2x" in text and "<b>" not in text
    with pytest.raises(ValueError, match="no folder"):
        prepare.main(["--check", str(out), "--report", str(tmp_path / "none" / "page.html")])
