"""The page: what it shows of a photograph, and the whole of it in a headless Chromium.

pytest tests/test_app.py   the browser's test needs Gradio, Selenium, Chromium and its driver
make test-app              in an environment that has the first two; fails where it cannot run
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

import app
from assembly import views as v
from assembly.views import AppConfig, Named, Viewer
from configs.schema import FlowConfig, TrainConfig
from models.fast.plan import build
from models.sampler import SamplingConfig
from models.translator import TranslatorConfig
from tests.conftest import ROOT, call_main
from tests.tiny_models import stir, tiny_stage1
from utils import checkpoint, config

SECONDS = 20.0  # a photograph in, an infrared image out


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of an untrained demo model that makes the mean and samples."""
    torch.manual_seed(0)
    stage1 = tiny_stage1()
    model = TranslatorConfig(
        preset="demo",
        layout="pixels",
        train_base=True,
        text_tokens=4,
        inject={0: ["intensity"]},
        decomposition=stage1.decomposition.cfg,
    )
    cfg = TrainConfig(
        model=model,
        flow=FlowConfig(start="fused", mean_share=0.5),
        sampling=SamplingConfig(steps=2, guidance_scale=1.0),
        window=[200.0, 4000.0],
    )
    cfg.data.size = 32
    translator, _ = build(model, stage1)
    stir(translator)  # else its last layer is zero, and all samples are equal
    path = tmp_path_factory.mktemp("app") / "best_model.pth"
    state = checkpoint.trained_state(translator)
    checkpoint.save(path, {"model": state, "config": config.to_dict(cfg)})
    return path


@pytest.fixture(scope="module")
def viewer(trained):
    return Viewer(str(trained), torch.device("cpu"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "street corner.png"
    pixels = np.random.default_rng(0).integers(0, 255, (30, 44, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_photograph_has_maps_a_mean_and_samples_that_differ(viewer, photo):
    one = viewer.look(Named(photo, photo.name), samples=3, seed=7)
    assert one.name == "street corner.png" and one.photograph.shape == (30, 44, 3)
    for values in (one.intensity, one.fused, one.mean, *one.samples):
        assert values.shape == (32, 48) and 0 <= values.min() <= values.max() <= 1
    assert one.material.shape == (32, 48) and re.match(r".+ \d+%", v.material_names(one))
    assert one.spread().shape == (32, 48) and one.spread().max() > 0
    assert one.spread() == pytest.approx(np.std(one.samples, axis=0, ddof=1))
    again = viewer.look(Named(photo, photo.name), samples=2, seed=8)
    assert (again.samples[0] == one.samples[1]).all()  # a sample is a function of its seed
    assert (again.mean == one.mean).all() and again.mean_is == "one pass without noise"


def test_the_mean_is_that_of_generate(viewer, photo, trained, tmp_path):
    call_main(
        "generate",
        *("--checkpoint", trained, "--image_path", photo, "--output_dir", tmp_path),
        *("--mode", "mean", "--device", "cpu"),
    )
    one = viewer.look(Named(photo, photo.name), samples=1, seed=0)
    (data,) = viewer.encode(one, "png8").values()
    assert data == (tmp_path / "street corner.png").read_bytes()


def test_files_have_the_size_of_the_photograph_and_16_bits_their_unit(viewer, photo):
    assert viewer.formats() == ["png8", "png16", "tiff"]  # counts are no temperature
    one = viewer.look(Named(photo, photo.name), samples=1, seed=0)
    made = viewer.encode(one, "png16")
    image = Image.open(io.BytesIO(made[".png"]))
    assert image.size == (44, 30) and image.mode.startswith("I;16")
    assert json.loads(made[".json"])["unit"] == "counts"
    assert one.spread() is None  # of one sample


def test_a_model_of_samples_alone_shows_their_average_as_the_mean(viewer, photo, monkeypatch):
    flow = replace(viewer.trained.flow, mean_share=0.0)
    monkeypatch.setattr(viewer, "trained", replace(viewer.trained, flow=flow))
    one = viewer.look(Named(photo, photo.name), samples=2, seed=0)
    assert one.mean == pytest.approx(np.mean(one.samples, axis=0))
    assert one.mean_is == "the average of 2 samples"


def test_a_model_of_the_mean_alone_has_no_samples(viewer, photo, monkeypatch):
    flow, sampling = replace(viewer.trained.flow, mean_share=1.0), SamplingConfig(mode="mean")
    changed = replace(viewer.trained, flow=flow, sampling=sampling)
    monkeypatch.setattr(viewer, "trained", changed)
    one = viewer.look(Named(photo, photo.name), samples=2, seed=0)
    assert one.samples == [] and one.spread() is None
    assert app.draw(one.name, "iron", False, {one.name: one})[-1] == app.NO_SPREAD


class FakeProgress:
    @staticmethod
    def tqdm(items, **_):
        return items


class FakeGradio:
    """What `run` and `write` need of Gradio."""

    @staticmethod
    def update(**changes):
        return changes


def test_one_bad_file_is_one_sentence_and_the_others_are_made(viewer, photo, tmp_path):
    (tmp_path / "b").mkdir()
    same = shutil.copy(photo, tmp_path / "b")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "raw.DNG").write_bytes(b"raw")
    files = [photo, tmp_path / "broken.jpg", tmp_path / "raw.DNG", same]
    found, chosen, said = app.run(FakeGradio, viewer, FakeProgress, list(map(str, files)), 1, 0)
    names = ["street corner.png", "street corner.png (2)"]
    assert list(found) == names and chosen == {"choices": names, "value": names[0]}
    first, bad, raw = said.split("\n\n")
    assert first == "2 translated."
    assert bad.startswith("**broken.jpg: not a readable image") and str(tmp_path) not in said
    assert "camera raw (DNG) is not read" in raw
    _, _, said = app.run(FakeGradio, viewer, FakeProgress, None, 1, 0)
    assert said == "**Nothing to translate: drop a photograph first.**"


def test_several_photographs_are_one_archive(viewer, photo, tmp_path):
    found, _, _ = app.run(FakeGradio, viewer, FakeProgress, [str(photo)], 1, 0)
    one = app.write(FakeGradio, viewer, str(tmp_path), "png8", found)
    assert one["label"] == "Download street corner_infrared.png" and Path(one["value"]).is_file()
    found["b.jpg"] = found[photo.name]
    both = app.write(FakeGradio, viewer, str(tmp_path), "png16", found)
    with zipfile.ZipFile(both["value"]) as archive:
        assert sorted(archive.namelist()) == [
            "b_infrared.json",
            "b_infrared.png",
            "street corner_infrared.json",
            "street corner_infrared.png",
        ]
    assert not app.write(FakeGradio, viewer, str(tmp_path), "png8", {})["interactive"]


def test_colours_change_the_pictures_and_not_the_spread(viewer, photo):
    found, _, _ = app.run(FakeGradio, viewer, FakeProgress, [str(photo)], 2, 0)
    iron, grey = (app.draw(photo.name, c, False, found) for c in ("iron", "grey, white is hot"))
    assert (iron[0][1] != grey[0][1]).any() and (iron[5] == grey[5]).all()
    assert (grey[0][1][..., 0] == grey[0][1][..., 1]).all()
    assert [caption.split(",")[0] for _, caption in iron[2]] == [
        *("intensity", "materials", "fused", "mean"),
    ]
    assert iron[3].startswith("Materials: ") and "2 samples: " in iron[6]
    stretched = app.draw(photo.name, "grey, white is hot", True, found)[0][1]
    assert stretched.max() > grey[0][1].max()
    assert app.draw(None, "iron", False, {}) == (None, "", [], "", [], None, "")


def test_what_the_page_cannot_start_with_is_said_at_once(monkeypatch):
    monkeypatch.setattr(v, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as caught:
        config.load(AppConfig, ["checkpoint=gone", "port=0", "upload_mb=0"])
    assert caught.value.sentences == [
        "the values on the command line: port must be 1 to 65535, got 0",
        "the values on the command line: upload_mb must be 1 or more, got 0",
        'app.py needs Gradio, which is not installed: pip install ".[app]"',
        "checkpoint gone: no such file or folder; train.py writes one",
    ]


# in a browser


def cannot_run(reason: str) -> NoReturn:
    """Skip, or fail where the browser's test must not be left out (make test-app)."""
    (pytest.fail if os.environ.get("BROWSER_TEST") == "required" else pytest.skip)(reason)


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that can reach this machine alone."""
    absent = [name for name in ("gradio", "selenium") if find_spec(name) is None]
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    absent += [] if driver else ["chromedriver (Debian: chromium-driver)"]
    absent += [] if (chromium := shutil.which("chromium")) else ["chromium"]
    if absent:
        cannot_run(f"not installed: {', '.join(absent)}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "disable-gpu", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument("--no-sandbox")  # root may not start Chromium with it
    options.add_argument("--disable-dev-shm-usage")  # 64 MB in a container
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def served(trained, tmp_path):
    """The address of app.py, running."""
    if find_spec("gradio") is None:
        cannot_run('not installed: gradio (pip install ".[app]")')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--checkpoint", str(trained), "--port", str(port)]
    with open(tmp_path / "app.log", "w+") as log:
        page = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stdout=log, stderr=log)
        try:
            wait_for(lambda: "Running on" in (tmp_path / "app.log").read_text(), 300, page)
            yield f"http://127.0.0.1:{port}"
        finally:
            page.terminate()
            page.wait(30)


def wait_for(true, seconds, process=None):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert process is None or process.poll() is None, "the page ended"
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.1)
    return found


def test_a_photograph_becomes_an_infrared_image_in_a_browser(browser, served, photo, tmp_path):
    def css(selector):
        return browser.find_elements("css selector", selector)

    browser.get(served)
    (upload, *_) = wait_for(lambda: css("input[type=file]"), 60)
    upload.send_keys(str(photo))
    wait_for(lambda: photo.stem in browser.page_source, 30)
    button = next(x for x in css("button") if x.text == "Translate")
    started = time.monotonic()
    button.click()
    wait_for(lambda: "1 translated." in browser.page_source, 60)
    images = wait_for(lambda: [x for x in css("#both img") if loaded(browser, x)][1:], 60)
    seconds = time.monotonic() - started
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert loaded(browser, images[0]) == [44, 30]
    save = wait_for(lambda: [x for x in css("button, a") if x.text.startswith("Download str")], 30)
    save[0].click()
    file = wait_for(lambda: list(tmp_path.glob("*_infrared*.png")), 30)[0]
    assert Image.open(file).size == (44, 30)
    foreign = {address for address in asked_for(browser) if not address.startswith("127.0.0.1")}
    assert not foreign, f"the page asks {foreign}"


def loaded(browser, image) -> list[int] | None:
    """[width, height] of a picture, once it is there."""
    script = "return [arguments[0].naturalWidth, arguments[0].naturalHeight]"
    size = browser.execute_script(script, image)
    return size if size[0] else None


def asked_for(browser) -> set[str]:
    """host:port of every request over the network so far."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    return {url.split("/")[2] for url in sent if url.startswith(("http", "ws"))}
