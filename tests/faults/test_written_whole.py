"""Exports, images and tables appear whole or not at all, also on a full disk.

pytest tests/faults/test_written_whole.py
"""

import os

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import generate
from assembly import bundle
from utils import panels


def export(folder, value):
    bundle.save_bundle(folder, {"w": torch.full((3,), value)}, {"model": {}}, {})


def test_an_export_on_a_full_disk_leaves_the_old_one_and_nothing_half(tmp_path, monkeypatch):
    export(tmp_path / "export", 1.0)

    def full(tensors, path, metadata):
        open(path, "wb").close()
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "save_file", full)
        with pytest.raises(OSError, match="export was not written: .*No space left"):
            export(tmp_path / "export", 2.0)
    assert bundle.read_bundle(tmp_path / "export")[1]["w"][0] == 1
    assert os.listdir(tmp_path) == ["export"]
    export(tmp_path / "export", 3.0)
    assert bundle.read_bundle(tmp_path / "export")[1]["w"][0] == 3
    assert os.listdir(tmp_path) == ["export"]


def test_an_export_leaves_other_files_of_its_folder_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    export(tmp_path, 1.0), export(tmp_path, 2.0)
    assert bundle.read_bundle(tmp_path)[1]["w"][0] == 2
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_an_image_on_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="a.png was not written: No space left on device"):
        panels.save_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [TypeError, SyntaxError, KeyError, OverflowError])
def test_whatever_a_damaged_photograph_raises_is_its_own_fault(tmp_path, monkeypatch, error):
    def decode(data, where):
        raise error("frames")

    (tmp_path / "a.tif").write_bytes(b"II*\0")
    monkeypatch.setattr(generate, "decode_visible", decode)
    image, fault = generate.read(tmp_path / "a.tif")
    assert not image.any() and "a.tif" in fault and error.__name__ in fault
