"""A trained model as a folder for generate.py, diffusers, ComfyUI and a hub; and its upload."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import HfApi
from torch import Tensor

from assembly import carried_pipeline, checkpoints, comfyui
from assembly.bundle import CARD_FILE, COMPONENT, has_adapters, save_bundle
from assembly.carried_code import CLASS, carried_code
from assembly.model_card import ALONE, model_card
from configs.schema import TrainConfig
from utils import checkpoint, config
from utils.problems import Checked

PICTURES = 6  # at most, in the card
MOST_BYTES = 5 * 2**20  # of one picture


@dataclass(kw_only=True)
class ExportConfig(Checked):
    """export.py: a trained model as a folder, and on a hub."""

    checkpoint: str = "runs/train/best_model.pth"  # a file, a run's folder or an exported one
    output_dir: str = "exported"
    results: str | None = None  # results.json of evaluate.py, or its folder: for the model card
    panels: str | None = None  # folder of visualize.py: its first pictures, for the model card
    base_model: str | None = None  # hub id of FLUX.1, if training read it from a folder
    push_to_hub: str | None = None  # user/name of the repository to upload to
    public: bool = False  # make a new repository public; an existing one stays as it is
    dry_run: bool = False  # list what would be pushed, and push nothing


def write_export(
    path: str | Path,
    folder: str | Path,
    results: dict[str, Any] | None = None,
    pictures: list[Path] | None = None,
    base_model: str | None = None,
    hub_id: str | None = None,
) -> list[str]:
    """Export the checkpoint `path`, whole or not at all, and say so; returns the files' names.

    Args:
        results: see `read_results`. pictures: see `find_pictures`.
        base_model: the hub id of FLUX.1, instead of the one used in training.
        hub_id: where the folder will be, for the card's own example.

    Raises: ValueError: see checkpoints.read; or base_model for a model without one.
    """
    cfg, state = checkpoints.read(path)
    if not isinstance(cfg, TrainConfig):
        raise ValueError(
            f"{path} is a checkpoint of {checkpoints.script_of(cfg)}; exported are those of"
            " train.py and finetune.py"
        )
    if base_model and not cfg.model.flux_fill_id:
        raise ValueError(f"{path} has no base model (preset {cfg.model.preset}): leave base_model")
    cfg.model.flux_fill_id = base_model or cfg.model.flux_fill_id
    state |= _random_base(path, cfg)
    shown = {f"pictures/{p.name}": p.read_bytes() for p in pictures or []}
    values = config.to_dict(cfg)
    adapters, more = has_adapters(state, values), _code() | shown
    if adapters and cfg.model.layout == "diptych" and cfg.flow.mean_share < 1:
        more["comfyui_workflow.json"] = _workflow(cfg)
    more[CARD_FILE] = model_card(
        cfg, adapters, "comfyui_workflow.json" in more, results, sorted(shown), hub_id
    ).encode()
    names = save_bundle(folder, state, values, checkpoint.versions(), more)
    print(f"exported to {folder}")
    if adapters:
        print(f"note: {ALONE}")
    return names


def _random_base(path: str | Path, cfg: TrainConfig) -> dict[str, Tensor]:
    """The weights of a random FLUX that was not trained: another torch may draw others."""
    if not cfg.model.preset or cfg.model.preset == "full-random" or cfg.model.train_base:
        return {}
    cpu = torch.device("cpu")  # and whole: other ranks are not here to share it
    plain = checkpoints.load_translator(path, cpu, sample_fast="off", shard_base=False).translator
    return {f"flux.{name}": x for name, x in plain.flux.state_dict().items()}


def _code() -> dict[str, bytes]:
    """What diffusers needs to run the model: pipeline, modules, and the list of components."""
    main, files = carried_code()
    index = {
        "_class_name": ["pipeline", "ThermaFluxPipeline"],
        "_diffusers_version": diffusers.__version__,
        COMPONENT: [main, CLASS],
    }
    return {
        "pipeline.py": Path(carried_pipeline.__file__).read_bytes(),
        "model_index.json": (json.dumps(index, indent=2) + "\n").encode(),
        **{f"{COMPONENT}/{name}": text.encode() for name, text in files.items()},
    }


def _workflow(cfg: TrainConfig) -> bytes:
    nodes = comfyui.workflow(cfg.data.height_width(), cfg.model.prompt, cfg.sampling)
    return (json.dumps(nodes, indent=1) + "\n").encode()


def read_results(path: str | None) -> dict[str, Any] | None:
    """results.json of evaluate.py, or of its folder; None for None. Raises: ValueError: neither."""
    if path is None:
        return None
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a results.json of evaluate.py: {error}") from error
    needed = {"methods", "intervals", "warnings", "data", "split", "pairs", "run"}
    if not isinstance(found, dict) or (lacks := sorted(needed - set(found))):
        lacks = sorted(needed) if not isinstance(found, dict) else lacks
        raise ValueError(f"{file} is not a results.json of evaluate.py: no {', '.join(lacks)}")
    return found


def find_pictures(path: str | None) -> list[Path]:
    """The first PNG files of a folder, as visualize.py writes them; [] for None.

    Raises: ValueError: the folder has none that is small enough.
    """
    if path is None:
        return []
    found = sorted(Path(path).glob("*.png"))
    small = [p for p in found if p.stat().st_size <= MOST_BYTES]
    if not small:
        raise ValueError(f"--panels {path}: no PNG of at most {MOST_BYTES >> 20} MiB there")
    return small[:PICTURES]


def upload(folder: str | Path, names: list[str], hub_id: str, private: bool) -> str:
    """Upload files of a folder to a model repository, made where there is none.

    Returns its address.

    Raises: ValueError: one sentence, whatever the network or the hub says.
    """
    try:
        api = HfApi()
        url = api.create_repo(hub_id, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            folder_path=str(folder),
            repo_id=hub_id,
            repo_type="model",
            commit_message="ThermaFlux export",
            allow_patterns=names,  # the folder may have other files too
            delete_patterns=[f"{COMPONENT}/thermaflux_*.py"],  # of another version of the code
        )
        return str(url)
    except Exception as error:  # httpx, requests and the hub raise types of their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"not pushed to {hub_id}: {reason}; the export is in {folder}, and"
            f" `hf upload {hub_id} {folder}` does the same"
        ) from error
