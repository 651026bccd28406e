"""Export a trained model as a folder for generate.py, diffusers and ComfyUI, or push it to a hub.

    python export.py --checkpoint runs/train --output_dir exported --results runs/train/report
    python export.py --checkpoint runs/train --panels runs/panels --push_to_hub me/thermal --dry_run
    python export.py --checkpoint runs/train --push_to_hub me/thermal

train.py and finetune.py write the same folder, without results and pictures. What is pushed is
private unless --public is given; --dry_run lists it and pushes nothing. docs/pipeline.md
"""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from assembly.export import ExportConfig, find_pictures, read_results, upload, write_export
from configs.schema import USE_FLAGS
from utils import config
from utils.run import entry


def main() -> None:
    cfg = config.load(ExportConfig, flags=USE_FLAGS)
    check(cfg)
    results, pictures = read_results(cfg.results), find_pictures(cfg.panels)
    names = write_export(
        cfg.checkpoint, cfg.output_dir, results, pictures, cfg.base_model, cfg.push_to_hub
    )
    if cfg.push_to_hub is None:
        return
    kind = "public" if cfg.public else "private"
    if cfg.dry_run:
        print(f"would be pushed to {cfg.push_to_hub} ({kind}):")
        for name in names:
            print(f"{(Path(cfg.output_dir) / name).stat().st_size:>15,} {name}")
        return
    url = upload(cfg.output_dir, names, cfg.push_to_hub, private=not cfg.public)
    print(f"pushed to {url} (a new repository is {kind})")


def check(cfg: ExportConfig) -> None:
    """Raises: ValueError: a wrong repository name, or flags that make no sense without one."""
    if cfg.push_to_hub is None:
        if cfg.public or cfg.dry_run:
            raise ValueError("--public and --dry_run are for --push_to_hub")
        return
    try:
        validate_repo_id(cfg.push_to_hub)
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub: {error}") from None


if __name__ == "__main__":
    entry(main)
