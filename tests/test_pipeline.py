"""The diffusers pipeline: in this repository, and from an exported folder without it.

pytest tests/test_pipeline.py
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from PIL import Image

import generate
from assembly.export import write_export
from assembly.pipeline import ThermaFluxPipeline
from data.transforms import to_8_bits
from tests.conftest import call_main
from tests.tiny_models import PIXELS, write_checkpoint, write_flux_fill


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """Exported folders by layout; pixels is the demo's kind, the others have a base on disk."""
    folder = tmp_path_factory.mktemp("exports")
    base = dict(preset=None, flux_fill_id=str(write_flux_fill(folder / "flux")))
    kinds = {
        "pixels": PIXELS,
        "diptych": {**base, "layout": "diptych"},
        "channels": {**base, "layout": "channels"},
    }
    for name, model in kinds.items():
        write_export(write_checkpoint(folder / f"{name}.pth", model), folder / name)
    return {name: folder / name for name in kinds}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder with two photographs of different sizes."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, size in (("a", (40, 61, 3)), ("b", (30, 50, 3))):
        Image.fromarray(random.integers(0, 256, size, np.uint8)).save(folder / f"{name}.png")
    return folder


def opened(folder: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module")
def generated(exports, photographs, tmp_path_factory):
    """layout -> what generate.py computes before it rounds to 8 bits, of both photographs."""
    kept: list[np.ndarray] = []
    encode = generate.outputs.encode
    patch = pytest.MonkeyPatch()
    patch.setattr(generate.outputs, "encode", lambda x, to: kept.append(x) or encode(x, to))

    def run(layout: str, *more) -> list[np.ndarray]:
        kept.clear()
        out = tmp_path_factory.mktemp("generated")
        argv = ["--checkpoint", exports[layout], "--image_path", photographs, "--device", "cpu"]
        call_main("generate", *argv, "--output_dir", out, *more)
        return list(kept)

    yield run
    patch.undo()


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(x.std() > 0 and np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("fast", ["off", "auto"])
def test_the_pipeline_equals_generate_to_the_bit(exports, photographs, generated, fast):
    pipeline = ThermaFluxPipeline.from_pretrained(exports["pixels"], fast=fast)
    pipeline.set_progress_bar_config(disable=True)
    for asked, flags in (
        (dict(mode="sample", seed=3), ["--mode", "sample", "--seed", 3]),
        (dict(mode="mean", mirror=True), ["--mode", "mean", "--mirror", "true"]),
        (dict(samples=2, keep_aspect=True), ["--samples", 2, "--keep_aspect"]),
    ):
        found = pipeline(opened(photographs), output_type="np", **asked).images
        assert same(found, generated("pixels", "--fast", fast, *flags))
        assert [x.shape for x in found] == [(40, 61), (30, 50)]


ELSEWHERE = """
import importlib.util, json, sys
import numpy as np, torch
from PIL import Image

assert all(importlib.util.find_spec(name) is None for name in ("models", "assembly", "generate"))
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils

photographs, made = [Image.open(path) for path in json.loads(sys.argv[1])], {}
for name, folder in json.loads(sys.argv[2]).items():
    for more in ({}, {"custom_pipeline": folder}) if name == "pixels" else ({},):
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **more)
        made[name + str(len(more))] = pipeline(photographs, output_type="np").images

# from a hub: only what diffusers decides to download is there
import fnmatch, pathlib, shutil
from types import SimpleNamespace
folder, cache = pathlib.Path(json.loads(sys.argv[2])["diptych"]), pathlib.Path("hub")
files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
pipeline_utils.model_info = lambda *a, **k: SimpleNamespace(
    siblings=[SimpleNamespace(rfilename=name) for name in files], sha="0")
from diffusers.utils import dynamic_modules_utils as dynamic

def get(name):
    (cache / name).parent.mkdir(parents=True, exist_ok=True)
    return str(shutil.copy(folder / name, cache / name))

def fetch(_, allow_patterns, ignore_patterns, **unused):
    match = lambda name, patterns: any(fnmatch.fnmatch(name, p) for p in patterns)
    for name in files:
        if match(name, allow_patterns) and not match(name, ignore_patterns):
            get(name)
    return str(cache)

dynamic.model_info = pipeline_utils.model_info
dynamic.hf_hub_download = pipeline_utils.hf_hub_download = lambda _, name, **k: get(name)
pipeline_utils.snapshot_download = fetch
pipeline = DiffusionPipeline.from_pretrained("someone/thermal", trust_remote_code=True)
assert (cache / "translator" / "config.json").is_file() and not (cache / "README.md").exists()
made["hub"] = pipeline(photographs, output_type="np").images
np.savez("made.npz", **{f"{k}.{i}": x for k, images in made.items() for i, x in enumerate(images)})

readme = (folder.parent / "pixels" / "README.md").read_text()
snippet = readme.split("```python")[1].split("```")[0]
snippet = snippet.replace('"."', repr(str(folder.parent / "pixels")))
photographs[0].save("photograph.png")
exec(snippet)
"""


def test_an_exported_folder_needs_diffusers_alone(exports, photographs, generated, tmp_path):
    """Another process, another folder, this repository not on its path."""
    paths = [str(path) for path in sorted(photographs.glob("*.png"))]
    folders = {name: str(path) for name, path in exports.items()}
    code = [sys.executable, "-I", "-c", ELSEWHERE, json.dumps(paths), json.dumps(folders)]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    clean |= {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(code, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = np.load(tmp_path / "made.npz")
    for layout in exports:
        wanted = generated(layout, "--fast", "off")
        assert same([made[f"{layout}0.{i}"] for i in (0, 1)], wanted)
        if layout == "pixels":
            assert same([made[f"pixels1.{i}"] for i in (0, 1)], wanted)
            assert np.array_equal(
                np.asarray(Image.open(tmp_path / "infrared.png")), to_8_bits(wanted[0])
            )
        if layout == "diptych":
            assert same([made[f"hub.{i}"] for i in (0, 1)], wanted)


@pytest.fixture(scope="module")
def pipeline(exports) -> ThermaFluxPipeline:
    found = ThermaFluxPipeline.from_pretrained(exports["pixels"])
    found.set_progress_bar_config(disable=True)
    return found


def test_every_output_type_shows_the_same_numbers(pipeline, photographs):
    images = opened(photographs)
    (values, _), meanings = pipeline(images, output_type="np", return_dict=False)
    assert meanings is None
    assert np.array_equal(pipeline(images, output_type="pt").images[0][0].numpy(), values)
    grey = pipeline(images[0]).images[0]
    assert grey.mode == "L" and np.array_equal(np.asarray(grey), np.rint(values * 255.0))
    wide = pipeline(images, output_type="png16")
    number, facts = np.asarray(wide.images[0]).astype(float), wide.meanings[0]
    assert wide.images[0].mode == "I;16" and facts["unit"] == "celsius"
    assert np.abs(number * facts["scale"] + facts["offset"] - values).max() < 1e-5


def test_a_photograph_may_be_an_array_or_a_tensor_or_turned(pipeline, photographs, tmp_path):
    image = opened(photographs)[0]
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    turned = Image.Exif()
    turned[0x0112] = 6  # as a phone held upright
    image.save(tmp_path / "turned.png", exif=turned)
    given = [image, array, tensor, Image.open(tmp_path / "turned.png")]
    found = [pipeline(x, output_type="np").images[0] for x in given]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    assert found[3].shape == (61, 40)
    for stacked in (array[None], tensor[None]):
        assert np.array_equal(pipeline(stacked, output_type="np").images[0], found[0])


def test_noise_comes_from_a_generator_where_one_is_given(pipeline, photographs):
    image = opened(photographs)[0]

    def made(number, **more):
        generator = torch.Generator().manual_seed(number)
        return pipeline(image, generator=generator, output_type="np", **more).images[0]

    assert np.array_equal(made(1), made(1)) and not np.array_equal(made(1), made(2))
    assert np.array_equal(made(1, mode="mean"), made(2, mode="mean"))
    each = [torch.Generator().manual_seed(n) for n in (1, 2)]
    both = pipeline([image, image], generator=each, output_type="np").images
    assert np.allclose(both[0], made(1), atol=1e-5) and np.allclose(both[1], made(2), atol=1e-5)


def test_a_callback_sees_and_changes_every_step(pipeline, photographs):
    seen = []

    def watch(own, step, time, given):
        seen.append((step, time, given["latents"].shape))
        return {"latents": torch.zeros_like(given["latents"])}

    asked = dict(num_inference_steps=4, batch_size=1, output_type="np", mirror=True)
    found = pipeline(opened(photographs), callback_on_step_end=watch, **asked).images
    assert [step for step, _, _ in seen] == list(range(2 * 2 * 4))
    assert [time for _, time, _ in seen[:4]] == [1, 0.75, 0.5, 0.25]
    assert seen[0][2] == (1, 32 * 48, 1) and np.allclose(found[0], 0.5)


def test_the_bar_counts_all_steps(pipeline, photographs, capsys):
    pipeline.set_progress_bar_config(disable=False)
    pipeline(opened(photographs), num_inference_steps=3, samples=2, batch_size=1)
    pipeline.set_progress_bar_config(disable=True)
    assert "12/12" in capsys.readouterr().err


def test_offloaded_parts_are_fetched_when_they_work(exports, photographs, monkeypatch):
    """On the CPU nothing moves, but who is asked to, and that nothing changes, is the same."""
    images = opened(photographs)
    pipeline = ThermaFluxPipeline.from_pretrained(exports["diptych"])
    pipeline.set_progress_bar_config(disable=True)
    before = pipeline(images, output_type="np").images
    pipeline.enable_model_cpu_offload(device="cpu")
    model = pipeline.translator.translator
    assert [hook.model for hook in pipeline._all_hooks] == [
        model.stage1,
        model.codec.vae,
        model.flux,
    ]
    fetched, fetch = [], CpuOffload.pre_forward
    monkeypatch.setattr(
        CpuOffload,
        "pre_forward",
        lambda self, x, *a, **k: fetched.append(x) or fetch(self, x, *a, **k),
    )
    assert same(pipeline(images, output_type="np").images, before)
    order = [
        model.stage1,
        model.codec.vae,
        model.flux,
        model.flux,
        model.codec.vae,
        model.codec.vae,
    ]
    assert fetched == order  # known, two steps, and two images decoded one by one
    assert len(pipeline._all_hooks) == 3  # hooked again for the next call
    with pytest.raises(NotImplementedError, match="enable_model_cpu_offload"):
        pipeline.enable_sequential_cpu_offload()


def test_a_dtype_is_that_of_flux_and_its_autoencoder(exports, photographs):
    image = opened(photographs)[0]
    for layout in ("diptych", "pixels"):
        exact, rounded = (
            ThermaFluxPipeline.from_pretrained(exports[layout], torch_dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
        a, b = (p(image, output_type="np").images[0] for p in (exact, rounded))
        assert 0 < np.abs(a - b).mean() < 0.05
        model = rounded.translator.translator
        assert next(model.stage1.parameters()).dtype == torch.float32
        assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} <= {torch.float32}
        rounded.to(torch.float32)
        if layout == "pixels":  # its weights were never rounded
            assert np.array_equal(rounded(image, output_type="np").images[0], a)
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got torch.float16"):
        exact.to(torch.float16)


@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(image=[]), "empty list"),
        (dict(image="a.png"), "image 0 is str"),
        (dict(image=[Image.new("RGB", (9, 9)), Image.new("F", (9, 9))]), "image 1 is in F"),
        (dict(image=np.zeros((4, 4, 3), np.float32)), r"image 0 is \(4, 4, 3\) float32"),
        (dict(output_type="jpg", batch_size=0), "output_type is 'jpg'.*batch_size"),
        (dict(seed=1, generator=torch.Generator()), "seed or generator, not both"),
        (dict(generator=[torch.Generator()] * 2), "2 generators for 1 photographs"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "latents, not noise"),
        (dict(num_inference_steps=0), "steps >= 1"),
    ],
)
def test_what_is_wrong_with_a_call_is_one_sentence(pipeline, asked, words):
    with pytest.raises(ValueError, match=words):
        pipeline(**{"image": np.zeros((16, 16, 3), np.uint8), **asked})


@pytest.mark.parametrize("share, mode", [(0.0, "mean"), (1.0, "sample")])
def test_an_untrained_mode_is_one_sentence(pipeline, monkeypatch, share, mode):
    facts = replace(pipeline.translator.training_facts, mean_share=share, window=None)
    monkeypatch.setattr(pipeline.translator, "training_facts", facts)
    photograph = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(
        ValueError, match=f"not trained for mode {mode}: flow.mean_share is {share:g}"
    ):
        pipeline(photograph, mode=mode)
    trained = "sample" if mode == "mean" else "mean"
    with pytest.raises(ValueError, match="16-bit numbers need the window"):
        pipeline(photograph, mode=trained, output_type="png16")


def test_a_saved_pipeline_is_the_export_again(pipeline, exports, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "again")
    files = [p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*")]
    assert set(files) == {p.relative_to(exports["pixels"]) for p in exports["pixels"].rglob("*")}
    with pytest.raises(ValueError, match="push the folder"):
        pipeline.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    monkeypatch.setattr(pipeline.translator, "source", None)
    with pytest.raises(ValueError, match=r"from a checkpoint; export\.py"):
        pipeline.save_pretrained(tmp_path / "third")


def test_a_folder_that_is_none_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=re.escape("nobody/nothing is no folder here, and the hub")
    ):
        ThermaFluxPipeline.from_pretrained("nobody/nothing")
