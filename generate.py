"""Infrared images for photographs: a file or a folder in, images with the same names and sizes out.

    python generate.py --checkpoint runs/train/export --image_path photo.jpg
    python generate.py --checkpoint runs/train/export --image_path photos/ --output_dir infrared/
    python generate.py --checkpoint runs/train/export --image_path photos/ --recursive --format npy

Each photograph is resized, in its own aspect, to about as many pixels as a training image has,
translated, and the result resized back. For a model trained with data.aspect=squash it is squashed
to the training size, unless --keep_aspect is given. With --tile auto (or a side in
pixels) larger photographs are translated at their own resolution, tile by tile: assembly/tiles.py.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from assembly import checkpoints
from assembly.inference import infrared_of
from assembly.tiles import TiledTranslator, fits, share
from configs.schema import USE_FLAGS, GenerateConfig
from data import outputs
from data.aspect import Shape, same_area
from data.decoding import decode_visible, read_file, size_of
from data.photographs import find_photographs, refuse_raw
from data.radiometry import Planck
from data.transforms import make_window
from models.codec import TOKEN
from utils import config, dist
from utils.files import write_whole
from utils.problems import refuse
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
    size = trained.data.height_width()
    tile = {"auto": size, "off": None}.get(cfg.tile, (cfg.tile, cfg.tile))
    keep = cfg.keep_aspect or trained.data.aspect != "squash"
    folder.mkdir(parents=True, exist_ok=True)

    faults: list[str] = []
    progress = tqdm(total=len(paths), desc="generate", unit="image", disable=not dist.is_main())
    shapes = shapes_of(paths, size, keep, tile)
    for shape, numbers in shapes.items():
        if shape is None:
            continue
        for batch in share(len(numbers), cfg.batch_size):
            draws = [
                numbers[i] if i < len(numbers) else len(paths) + i - len(numbers) for i in batch
            ]
            photographs = [read(paths[numbers[i % len(numbers)]]) for i in batch]
            made = infrared_of(translator, [x for x, _ in photographs], draws, sampling, shape)
            for draw, (_, fault), infrared in zip(draws, photographs, made):
                if fault and draw < len(paths):
                    faults.append(fault)
                elif draw < len(paths):
                    write(folder / names[draw], infrared, to)
            progress.update(min(len(batch) * dist.world_size(), len(paths) - progress.n))
    if tile:
        tiled = TiledTranslator(translator, sampling, tile, size, cfg.batch_size)
        for draw in shapes.get(None, []):
            photograph, fault = read(paths[draw])
            if not fault:
                infrared = tiled.translate(photograph, draw)  # all ranks together
            if dist.is_main() and fault:
                faults.append(fault)
            elif dist.is_main():
                write(folder / names[draw], infrared, to)
            progress.update()
    progress.close()
    faults = [fault for each in dist.gather(faults) for fault in each]
    written = len(paths) - len(faults)
    dist.print0(f"{written} infrared image{'s' * (written != 1)} in {folder}")
    refuse(sorted(faults))


def shapes_of(
    paths: list[Path], size: Shape, keep_aspect: bool, tile: Shape | None
) -> dict[Shape | None, list[int]]:
    """The photographs' numbers by the shape in which they are translated; None: in tiles.

    What cannot be read is among those of the training size, where it is going to be named.
    """
    found: dict[Shape | None, list[int]] = {}
    for number, path in enumerate(paths):
        shape: Shape | None = size
        if keep_aspect or tile:
            try:
                refuse_raw(path)
                own = size_of(read_file(path), str(path))
            except (ValueError, OSError):
                own = size
            if tile and not fits(own, tile):
                shape = None
            elif keep_aspect:
                shape = same_area(size, own[0] / own[1])
        found.setdefault(shape, []).append(number)
    return found


def write(target: Path, infrared: np.ndarray, to: outputs.Format) -> None:
    """Write the files of one image (H, W), which is cut off beyond [0, 1]."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix, data in outputs.encode(infrared, to).items():
        write_whole(target.with_name(target.name + suffix), data)


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
