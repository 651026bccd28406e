"""The reported inputs that were once prepared wrongly: each script's command, its right outcome.

The kinds behind them are tested in test_ranges, test_splits, test_decoding and test_prepare; here
the scripts themselves run, where they are (THERMAFLUX_CASES names their folder).
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import prepare
from data.pairs import DataConfig, LabelConfig, open_pairs
from tests.conftest import ROOT


@pytest.fixture
def case(tmp_path, capsys):
    """Function: number of a case to (what prepare.py printed, manifest or None, folder)."""
    folder = Path(os.environ.get("THERMAFLUX_CASES", ROOT.parent / "shared" / "cases"))
    if not folder.is_dir():
        pytest.skip(f"no case scripts at {folder}; set THERMAFLUX_CASES to run this test")

    commands: dict[str, str] = {}  # of the inputs that are made

    def run(number: str, *options: str):
        (script,) = folder.glob(f"{number}_*.py")
        if number not in commands:
            made = subprocess.run(
                [sys.executable, script, tmp_path], capture_output=True, text=True, check=True
            )
            commands[number] = made.stdout.splitlines()[0].removeprefix("run:").strip()
        argv = shlex.split(commands[number])
        assert argv[:2] == ["python", "prepare.py"]
        prepare.main([*argv[2:], "--num_workers", "1", *options])
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        return capsys.readouterr().out, manifest, tmp_path

    run.folder = folder
    return run


def pairs_of(manifest) -> dict[str, int]:
    return {split: found["pairs"] for split, found in manifest["splits"].items()}


@pytest.mark.parametrize("number, note", [("01", "the value 0 counts"), ("03", "are constant")])
def test_zeros_that_are_no_measurement_do_not_set_the_window(case, number, note):
    told, manifest, _ = case(number)
    window = manifest["window"]
    assert note in told and 20500 < window["low"] < window["high"] < 24500


def test_one_folder_on_both_sides_is_refused(case, tmp_path):
    with pytest.raises(ValueError, match="is given as visible and as infrared"):
        case("04")
    assert not (tmp_path / "out").exists()


def test_a_published_test_folder_stays_the_test_split(case):
    told, manifest, _ = case("05")
    names = {s: x["names"] for s, x in manifest["splits"].items()}
    assert len(names["test"]) == 6 and all("/test/" in n for n in names["test"])
    assert all("/train/" in n for s in ("train", "val") for n in names[s])
    assert "splits by folder names" in told


def test_both_sides_are_turned_by_one_rule(case):
    _, _, folder = case("06")
    labels = LabelConfig(material_source="none")
    pairs = open_pairs(DataConfig(path=str(folder / "out"), cache="none", labels=labels), "all")
    for index in range(len(pairs)):  # what is flat in the visible is flat in the infrared
        pair = pairs.pair(index)
        grey = pair.visible.astype(int).sum(2)
        flat = (np.diff(grey, axis=0) == 0) & (np.diff(pair.visible, axis=0) == 0).all(2)
        there = np.diff(pair.infrared.astype(int), axis=0) == 0
        assert (there[flat]).mean() > 0.99 > (there[::-1, ::-1][flat]).mean()


@pytest.mark.parametrize("number", ["08", "10", "11"])
def test_only_what_belongs_to_the_set_is_paired(case, number):
    _, manifest, _ = case(number)
    assert sum(pairs_of(manifest).values()) == 12


def test_a_byte_order_mark_is_no_content(case):
    _, manifest, _ = case("12")
    assert pairs_of(manifest) == {"train": 8, "val": 2, "test": 2}


def test_a_squeezed_view_is_noted(case):
    told, _, _ = case("14")
    assert "1.78:1" in told and "1.25:1" in told and "12 of 12" in told


def test_a_hugging_face_set_with_train_alone_has_all_splits(case, tmp_path):
    (script,) = case.folder.glob("17_*.py")
    subprocess.run([sys.executable, script, tmp_path], capture_output=True, check=True)
    labels = LabelConfig(material_source="none")
    config = DataConfig(path=str(tmp_path), cache="none", labels=labels)
    assert all(len(open_pairs(config, split)) for split in ("train", "val", "test"))


def test_a_fixed_camera_can_be_cut_by_time(case):
    with pytest.raises(ValueError, match="4000 pairs form 1 group.*--time_blocks 10 --gap 40"):
        case("18")
    told, manifest, _ = case("18", "--time_blocks", "10", "--gap", "40")
    assert min(pairs_of(manifest).values()) > 300 and "left out as gaps" in told
