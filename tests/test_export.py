"""Exports: LoRA and workflow as ComfyUI reads them, the model card, pushing to a hub.

pytest tests/test_export.py
"""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from assembly import carried_code, checkpoints
from assembly import export as exporting
from assembly.bundle import FILES, read_bundle
from assembly.export import write_export
from models.lora import LORA_FILE, LoraConfig
from tests.conftest import ROOT, call_main
from tests.tiny_models import PIXELS, tiny_flux, tiny_translator, write_checkpoint, write_flux_fill

HUB_ID = "black-forest-labs/FLUX.1-Fill-dev"
LORA = LoraConfig(r=2, lora_alpha=6, target_modules=r".*\.(to_[qkv]|to_out\.0|proj_mlp|add_k_proj)")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with checkpoints of a guided diptych model and of one like the demo's."""
    folder = tmp_path_factory.mktemp("made")
    base = str(write_flux_fill(folder / "flux"))
    model = dict(preset=None, flux_fill_id=base, lora_config=LORA)
    write_checkpoint(folder / "diptych.pth", model)
    write_checkpoint(folder / "pixels.pth", PIXELS, window=None)
    return folder


@pytest.fixture(scope="module")
def diptych(made) -> Path:
    write_export(made / "diptych.pth", made / "exported", base_model=HUB_ID)
    return made / "exported"


# ---- the adapters


def comfyui_layers(double: int, single: int, width: int) -> dict[str, tuple[str, int, int]]:
    """What ComfyUI looks for in a LoRA of diffusers' FLUX (comfy/utils.py: flux_to_diffusers).

    `transformer.<name>`: the fused matrix of the original FLUX, and the rows that it changes.
    """
    found = {}
    for i in range(double):
        ours, theirs = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for k, part in enumerate("qkv"):
            rows = (k * width, (k + 1) * width)
            found[f"{ours}attn.to_{part}"] = (f"{theirs}img_attn.qkv", *rows)
            found[f"{ours}attn.add_{part}_proj"] = (f"{theirs}txt_attn.qkv", *rows)
        found[f"{ours}attn.to_out.0"] = (f"{theirs}img_attn.proj", 0, width)
        found[f"{ours}attn.to_add_out"] = (f"{theirs}txt_attn.proj", 0, width)
        for own, other in (("ff", "img_mlp"), ("ff_context", "txt_mlp")):
            found[f"{ours}{own}.net.0.proj"] = (f"{theirs}{other}.0", 0, 4 * width)
            found[f"{ours}{own}.net.2"] = (f"{theirs}{other}.2", 0, width)
    for i in range(single):
        ours, theirs = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        for k, part in enumerate("qkv"):
            found[f"{ours}attn.to_{part}"] = (f"{theirs}linear1", k * width, (k + 1) * width)
        found[f"{ours}proj_mlp"] = (f"{theirs}linear1", 3 * width, 7 * width)
        found[f"{ours}proj_out"] = (f"{theirs}linear2", 0, width)
    return found


def test_comfyui_finds_every_adapter_and_applies_what_was_trained(made, diptych):
    """Its rule: W[rows] += strength * up @ down; alpha / rank only where the file has an alpha."""
    adapters = load_file(diptych / LORA_FILE)
    flux = tiny_flux()
    layers = comfyui_layers(len(flux.transformer_blocks), len(flux.single_transformer_blocks), 32)
    fused = {}
    for name, (matrix, first, end) in layers.items():
        weight = flux.get_submodule(name).weight.detach()
        assert len(weight) == end - first
        fused.setdefault(matrix, {})[first, end] = weight.clone()
    used = set()
    for name, (matrix, first, end) in layers.items():
        keys = [f"transformer.{name}.lora_{x}.weight" for x in "AB"]
        if keys[1] in adapters:
            down, up = (adapters[key] for key in keys)
            fused[matrix][first, end] += up @ down
            used |= set(keys)
    assert used == set(adapters) and len(used) == 2 * (2 * 5 + 2 * 4)
    _, state = read_bundle(diptych)
    for name, (matrix, first, end) in layers.items():
        if f"flux.{name}.lora_A.weight" in state:
            down, up = (state[f"flux.{name}.lora_{x}.weight"] for x in "AB")
            expected = flux.get_submodule(name).weight + 6 / 2 * up @ down
            torch.testing.assert_close(fused[matrix][first, end], expected)


def test_the_header_holds_rank_and_alpha(diptych):
    with safe_open(diptych / LORA_FILE, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["transformer.r"] == header["transformer.lora_alpha"] == 2
    assert len(header["transformer.target_modules"]) == 2 * 5 + 2 * 4


# required inputs of ComfyUI's nodes (nodes.py, comfy_extras), and how many outputs they have
NODES = {
    "LoadImage": ({"image"}, 2),
    "ImageScale": ({"image", "upscale_method", "width", "height", "crop"}, 1),
    "ImagePadForOutpaint": ({"image", "left", "top", "right", "bottom", "feathering"}, 2),
    "UNETLoader": ({"unet_name", "weight_dtype"}, 1),
    "LoraLoaderModelOnly": ({"model", "lora_name", "strength_model"}, 1),
    "DualCLIPLoader": ({"clip_name1", "clip_name2", "type"}, 1),
    "VAELoader": ({"vae_name"}, 1),
    "CLIPTextEncode": ({"text", "clip"}, 1),
    "FluxGuidance": ({"conditioning", "guidance"}, 1),
    "ConditioningZeroOut": ({"conditioning"}, 1),
    "InpaintModelConditioning": (
        {"positive", "negative", "vae", "pixels", "mask", "noise_mask"},
        3,
    ),
    "KSampler": (
        {
            *("model", "positive", "negative", "latent_image", "seed", "steps", "cfg"),
            *("sampler_name", "scheduler", "denoise"),
        },
        1,
    ),
    "VAEDecode": ({"samples", "vae"}, 1),
    "ImageCrop": ({"image", "width", "height", "x", "y"}, 1),
    "SaveImage": ({"images", "filename_prefix"}, 0),
}


def test_the_workflow_has_comfyuis_nodes_and_every_one_leads_to_the_image(diptych):
    nodes = json.loads((diptych / "comfyui_workflow.json").read_text())
    reached, left = set(), [n for n, node in nodes.items() if node["class_type"] == "SaveImage"]
    while left:
        number = left.pop()
        reached.add(number)
        inputs = nodes[number]["inputs"]
        assert set(inputs) == NODES[nodes[number]["class_type"]][0]
        for source, output in (x for x in inputs.values() if isinstance(x, list)):
            assert output < NODES[nodes[source]["class_type"]][1]
            left.append(source)
    assert reached == set(nodes)
    by_kind = {node["class_type"]: node["inputs"] for node in nodes.values()}
    pad, crop, scale = (by_kind[k] for k in ("ImagePadForOutpaint", "ImageCrop", "ImageScale"))
    assert (scale["height"], scale["width"]) == (32, 48)  # of the training
    assert (pad["right"], pad["left"], pad["feathering"]) == (48, 0, 0)
    assert (crop["x"], crop["width"], crop["height"]) == (48, 48, 32)
    assert by_kind["LoraLoaderModelOnly"]["lora_name"] == LORA_FILE
    assert by_kind["CLIPTextEncode"]["text"] == "a thermal infrared photograph of the same scene"


def test_only_a_diptych_with_a_base_has_a_workflow(made):
    write_export(made / "pixels.pth", made / "demo")
    files = {path.name for path in (made / "demo").iterdir()}
    assert not files & {"comfyui_workflow.json", LORA_FILE} and files <= set(FILES)


# ---- the model card


def front_matter(folder: Path) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def results(folder: Path) -> Path:
    """results.json as evaluate.py writes it, of two methods."""
    values = {"psnr": 21.23, "ssim": 0.693, "mae": 0.083}
    intervals = {name: [x - 0.1, x + 0.1] for name, x in values.items()}
    methods = {"grey": values, "sample": values}
    found = {
        "methods": methods,
        "intervals": dict.fromkeys(methods, intervals),
        "warnings": ["sample: few images"],
        "data": "/data/sets/toy",
        "split": "test",
        "pairs": 7,
        "run": {"seconds_an_image": {"sample": 0.5}},
    }
    (folder / "results.json").write_text(json.dumps(found))
    return folder / "results.json"


def test_the_card_says_base_licence_data_measures_and_limits(made, tmp_path, capsys):
    results(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "scene.png")
    argv = ["--checkpoint", made / "diptych.pth", "--output_dir", tmp_path / "out"]
    argv += ["--results", tmp_path, "--panels", tmp_path, "--base_model", HUB_ID]
    call_main("export", *argv)
    assert "pytorch_lora_weights.safetensors alone is the unguided model" in capsys.readouterr().out
    front, text = front_matter(tmp_path / "out")
    assert front["base_model"] == HUB_ID and front["base_model_relation"] == "adapter"
    assert front["license"] == "other" and "non-commercial" in front["license_name"]
    assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "image-to-image")
    assert {"thermal-infrared", "lora"} <= set(front["tags"])
    (entry,) = front["model-index"][0]["results"]
    assert entry["dataset"]["name"] == "toy" and entry["metrics"][0]["value"] == 21.23
    assert front["widget"][0]["output"]["url"] == "pictures/scene.png"
    assert (tmp_path / "out" / "pictures" / "scene.png").is_file()
    for words in (
        "| sample | 21.23 ± 0.10 | 0.693 ± 0.100 | 0.083 ± 0.100 | 0.5 |",
        "7 pairs of `toy`",
        "alone is the unguided model",
        "Data: `toy`",
        "0 and 1 celsius",
        "not a measurement",
        "trust_remote_code=True",
    ):
        assert words in text, words
    assert checkpoints.read(tmp_path / "out")[0].model.flux_fill_id == HUB_ID


def test_the_card_of_a_model_from_scratch_has_no_base_and_no_foreign_licence(made, tmp_path):
    write_export(made / "pixels.pth", tmp_path / "out")
    front, text = front_matter(tmp_path / "out")
    assert not {"base_model", "license", "model-index", "widget"} & set(front)
    assert "Not radiometric" in text and "unguided" not in text


# ---- what is wrong, and a hub


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--results", "missing.json"], "missing.json is not a results.json"),
        (["--results", "setup.py"], "setup.py is not a results.json"),
        (["--panels", "configs"], "no PNG"),
        (["--base_model", HUB_ID], "has no base model"),
        (["--push_to_hub", "a/b/c"], "--push_to_hub: "),
        (["--public", "--dry_run"], "are for --push_to_hub"),
        (["--checkpoint", "missing.pth"], "missing.pth"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_writes_nothing(made, tmp_path, argv, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        defaults = ["--checkpoint", made / "pixels.pth", "--output_dir", tmp_path / "out"]
        call_main("export", *defaults, *argv)
    assert not (tmp_path / "out").exists()


def test_a_foreign_readme_is_not_replaced(made, tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    with pytest.raises(ValueError, match="README.md is not one of our model cards"):
        write_export(made / "pixels.pth", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_dry_run_lists_every_file_and_asks_no_network(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exporting, "HfApi", None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "private.txt").write_text("not for the hub")
    argv = ["--checkpoint", made / "pixels.pth", "--output_dir", out]
    call_main("export", *argv, "--push_to_hub", "me/thermal", "--dry_run")
    said = capsys.readouterr().out
    listed = dict(line.split()[::-1] for line in said.split("(private):\n")[1].splitlines())
    files = [p for p in out.rglob("*") if p.is_file() and p.name != "private.txt"]
    assert listed == {str(p.relative_to(out)): f"{p.stat().st_size:,}" for p in files}
    assert "model_index.json" in listed and "would be pushed to me/thermal" in said
    assert 'from_pretrained("me/thermal", trust' in (out / "README.md").read_text()


def test_a_push_makes_a_private_repository_and_uploads_the_folder(made, tmp_path, monkeypatch):
    asked, out = [], tmp_path / "out"

    class Hub:
        def create_repo(self, name, **more):
            asked.append((name, more["private"], more["exist_ok"]))
            return f"https://hub/{name}"

        def upload_folder(self, **more):
            names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
            assert more["folder_path"] == str(out) and set(more["allow_patterns"]) == names
            asked.append(more["repo_id"])

    monkeypatch.setattr(exporting, "HfApi", Hub)
    argv = ["--checkpoint", made / "pixels.pth", "--output_dir", out]
    call_main("export", *argv, "--push_to_hub", "me/thermal")
    assert asked == [("me/thermal", True, True), "me/thermal"]


def test_a_network_that_fails_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(ValueError, match="^not pushed to me/thermal: .*the export is in"):
        exporting.upload(tmp_path, [], "me/thermal", private=True)


# ---- the code that an export carries


def test_the_carried_code_imports_nothing_of_this_repository():
    main, files = carried_code.carried_code()
    ours = {p.stem for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert {"models", "data", "utils", "assembly"} <= ours | {"configs"}
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in ours, f"{name}: {node.module}"
            if isinstance(node, ast.ImportFrom) and node.level:
                named = [node.module] if node.module else [a.name for a in node.names]
                assert all(f"{x}.py" in files for x in named)
    named = set(re.findall(r"^from \.(\S+) import", files[f"{main}.py"], re.MULTILINE))
    assert {f"{x}.py" for x in named} == {n for n in files if n.endswith(".py")} - {f"{main}.py"}
    assert "Permission is hereby granted" in files["LICENSE"]
    assert not any("models_fast" in name or "schema" in name for name in files)


def test_other_sources_have_other_module_names(monkeypatch):
    before = carried_code.carried_code()[0]
    monkeypatch.setattr(carried_code, "ENTRY", "models.sampler")
    assert carried_code.carried_code()[0] != before


def test_a_random_base_that_was_not_trained_is_stored(tmp_path):
    write_checkpoint(tmp_path / "a.pth", {})
    write_export(tmp_path / "a.pth", tmp_path / "out")
    _, state = read_bundle(tmp_path / "out")
    torch.manual_seed(0)
    again = tiny_translator().flux.x_embedder.weight
    assert torch.equal(state["flux.x_embedder.weight"], again)


def test_a_folder_exported_by_an_earlier_version_is_named_as_such(tmp_path):
    (tmp_path / "thermaflux.json").write_text("{}")
    with pytest.raises(ValueError, match="exported by an earlier version; export its run again"):
        checkpoints.read(tmp_path)
