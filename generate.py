"""Infrared images for photographs: a file or a folder in, images of the same names and sizes out.

    python generate.py --checkpoint runs/train/export --image_path photo.jpg
    python generate.py --checkpoint runs/train/export --image_path photos/ --output_dir infrared/
    python generate.py --checkpoint runs/train/export --image_path photos/ --recursive --format npy

Each photograph is resized to the training size, translated, and the result resized back to its own;
with --keep_aspect, to as many pixels in its own shape, one at a time.
"""

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from assembly import checkpoints
from assembly.inference import infrared_of, same_area
from configs.schema import USE_FLAGS, GenerateConfig
from data import outputs
from data.decoding import decode_visible, read_file
from data.pairs import make_window
from data.photographs import find_photographs, refuse_raw
from data.radiometry import Planck
from models.codec import TOKEN
from utils import config, dist
from utils.files import write_whole
from utils.run import entry


@torch.no_grad()
def main() -> None:
    cfg = config.load(GenerateConfig, flags=USE_FLAGS)
    folder = Path(cfg.output_dir)
    paths, names, notes = find_photographs(cfg.image_path, cfg.recursive, folder)
    check_output(folder, paths, names, outputs.SUFFIXES[cfg.format])
    device = dist.init(cfg.device)
    for note in notes:
        dist.print0(f"note: {note}")
    translator, trained, plan = checkpoints.load_translator(
        cfg.checkpoint, device, sampling=True, sample_fast=cfg.fast
    )
    dist.print0(plan)
    translator.eval()
    sampling = checkpoints.sampling_of(trained, cfg)
    window = trained.window and make_window(*trained.window, trained.unit)
    planck = trained.planck and Planck(*trained.planck)
    to = outputs.make_format(cfg.format, window, planck, whole=cfg.counts)
    folder.mkdir(parents=True, exist_ok=True)

    faults: list[str] = []
    batches = share(len(paths), 1 if cfg.keep_aspect else cfg.batch_size)
    progress = tqdm(total=len(paths), desc="generate", unit="image", disable=not dist.is_main())
    for batch in batches:
        photographs = [read(paths[i % len(paths)]) for i in batch]
        size = trained.data.height_width()
        if cfg.keep_aspect:
            ((only, _),) = photographs
            size = same_area(size, only.shape[0] / only.shape[1])
        made = infrared_of(translator, [x for x, _ in photographs], batch, sampling, size)
        for draw, (_, fault), infrared in zip(batch, photographs, made):
            if draw >= len(paths):
                continue
            if fault:
                faults.append(fault)
                continue
            target = folder / names[draw]
            target.parent.mkdir(parents=True, exist_ok=True)
            for suffix, data in outputs.encode(infrared, to).items():
                write_whole(target.with_name(target.name + suffix), data)
        progress.update(min(len(batch) * dist.world_size(), len(paths) - progress.n))
    progress.close()
    faults = [fault for each in dist.gather(faults) for fault in each]
    dist.print0(f"{len(paths) - len(faults)} infrared images in {folder}")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}")


def share(count: int, batch_size: int) -> list[list[int]]:
    """This rank's batches of `count` photographs, all of one length and on all ranks as many.

    A sharded model's passes are collective, and a compiled one is compiled for one length. So what
    is missing at the end is filled up, with numbers from `count` on.
    """
    each = math.ceil(count / dist.world_size())
    batches = math.ceil(each / batch_size)
    length = math.ceil(each / batches)
    mine = range(dist.rank(), batches * length * dist.world_size(), dist.world_size())
    return [list(mine[i : i + length]) for i in range(0, len(mine), length)]


def read(path: Path) -> tuple[np.ndarray, str | None]:
    """A photograph; or black, and what is wrong with the file: the others are made nevertheless."""
    try:
        refuse_raw(path)
        return decode_visible(read_file(path), str(path)), None
    except Exception as error:  # PIL raises a dozen types on foreign bytes
        if not isinstance(error, (ValueError, OSError)) or str(path) not in str(error):
            error = f"{path}: not a readable image ({type(error).__name__}: {error})"
        return np.zeros((TOKEN, TOKEN, 3), np.uint8), str(error)


def check_output(folder: Path, paths: list[Path], names: list[Path], suffix: str) -> None:
    """Raises: ValueError: an image would be written over a photograph."""
    for p, name in zip(paths, names):
        if (target := folder / f"{name}{suffix}").exists() and target.samefile(p):
            raise ValueError(f"{p} would be overwritten; choose another --output_dir")


if __name__ == "__main__":
    entry(main)
