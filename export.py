"""A trained model as a folder for generate.py, diffusers and ComfyUI, with a model card; to a hub.

    python export.py --checkpoint runs/train --output_dir exported --results runs/train/report
    python export.py --checkpoint runs/train --panels runs/panels --push_to_hub me/thermal --dry_run
    python export.py --checkpoint runs/train --push_to_hub me/thermal

train.py and finetune.py write the same folder, without results and pictures. What is pushed is
private unless --public is given; --dry_run lists it and pushes nothing. docs/pipeline.md
"""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from assembly.export import find_pictures, read_results, upload, write_export
from configs.schema import USE_FLAGS, ExportConfig
from utils import config
from utils.run import entry


def main() -> None:
    cfg = config.load(ExportConfig, flags=USE_FLAGS)
    check(cfg)
    for sentence in write_export(
        cfg.checkpoint,
        cfg.output_dir,
        read_results(cfg.results),
        find_pictures(cfg.panels),
        cfg.base_model,
        cfg.push_to_hub,
    ):
        print(sentence)
    if cfg.push_to_hub is None:
        return
    kind = "public" if cfg.public else "private"
    if cfg.dry_run:
        print(f"would be pushed to {cfg.push_to_hub} ({kind}):")
        for path in sorted(p for p in Path(cfg.output_dir).rglob("*") if p.is_file()):
            print(f"{path.stat().st_size:>15,} {path.relative_to(cfg.output_dir)}")
        return
    url = upload(cfg.output_dir, cfg.push_to_hub, private=not cfg.public)
    print(f"pushed to {url} (a new repository is {kind})")


def check(cfg: ExportConfig) -> None:
    """Raises: ValueError: all that is wrong with what was asked for."""
    wrong = []
    if cfg.push_to_hub is not None:
        try:
            validate_repo_id(cfg.push_to_hub)
        except HFValidationError as error:
            wrong.append(f"--push_to_hub: {error}")
    elif cfg.public or cfg.dry_run:
        wrong.append("--public and --dry_run are for --push_to_hub")
    folder = Path(cfg.output_dir)
    if cfg.push_to_hub and folder.is_dir() and any(p.name == ".git" for p in folder.iterdir()):
        wrong.append(f"--output_dir {folder} is a git repository: not all of it is an export")
    if wrong:
        raise ValueError("; ".join(wrong))


if __name__ == "__main__":
    entry(main)
