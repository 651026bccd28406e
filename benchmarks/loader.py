"""How fast pairs come, and how long the GPU would wait for them: the data path of one rank.

    python benchmarks/loader.py                                synthetic scenes, several minutes
    python benchmarks/loader.py --data_path datasets/mine --workers 4 --out loader.json
    python benchmarks/loader.py --size 32 --scenes 8 --batches 4 --workers 0 --step_seconds 0.01

Ways: `parquet` decodes every pair (the first epoch), `cached` has the decoded pairs in memory
(data.cache=ram), `latents` adds the codec's results from disk (data.latents=FOLDER; no crops, no
exposure, as there). pairs/s is what comes when nothing else is done. Wait is the share of a
training step that the loop would spend in next(), measured with a consumer that sleeps
`--step_seconds` a batch. Where there is a GPU a thread takes batches over from the workers and pins
them; without one next() itself does that. Prints markdown, writes JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import latents, writing
from data.pairs import DataConfig, Pairs, open_pairs
from data.pseudo_labels import LabelConfig
from data.stream import stream
from data.transforms import AugmentConfig
from models import codec as codecs
from models.backbones import fill

FLIPS = AugmentConfig(crop_scale=[1, 1], brightness=0, contrast=0)
WAYS = {
    "parquet": dict(cache="none"),
    "cached": dict(cache="ram"),
    "latents": dict(cache="ram", augment=FLIPS),
}


@dataclass
class Row:
    way: str
    workers: int
    pairs_s: float
    wait: float  # share of a step


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    print(
        f"{os.cpu_count()} CPU cores, torch {torch.__version__}, {args.size} px, batch"
        f" {args.batch}, step {args.step_seconds} s",
        flush=True,
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = args.data_path or render(Path(folder) / "scenes", args.scenes, args.size)
        for way, options in WAYS.items():
            labels = LabelConfig(material_source="none")
            cfg = replace(DataConfig(path=path, size=args.size, labels=labels), **options)
            pairs = open_pairs(cfg, "train")
            if way != "parquet":
                for index in range(len(pairs)):  # fills data.cache as a first epoch does
                    pairs.get(index)
            if way == "latents":
                pairs.latents = make_latents(pairs, Path(folder) / "latents")
            for workers in args.workers:
                rows.append(measure(args, way, pairs, workers))
                print(json.dumps(asdict(rows[-1])), flush=True)
    print(table(rows))
    if args.out:
        result = dict(vars(args), cores=os.cpu_count(), rows=[asdict(r) for r in rows])
        Path(args.out).write_text(json.dumps(result, indent=1))
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", help="prepared pairs; default: scenes rendered for the run")
    parser.add_argument("--scenes", type=int, default=64, help="to render, at --size")
    parser.add_argument("--size", type=int, default=512, help="pixels of a sample's side")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--batches", type=int, default=64, help="timed, of each kind")
    parser.add_argument(
        "--step_seconds",
        type=float,
        default=0.46,
        help="of a training step; default: 12 B, fp8, batch 4",
    )
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args(argv)


def render(folder: Path, scenes: int, size: int) -> str:
    """Parquet as prepare.py writes it: `scenes` to train with, one of each other split."""
    splits = ["train"] * scenes + ["val", "test"]
    rows = (
        writing.synthetic_row((0, i, (size, size), split, f"scene_{i}"))
        for i, split in enumerate(splits)
    )
    window = dict(low=0.0, high=float(writing.SYNTHETIC_COUNTS), unit="counts")
    writing.write(folder, rows, {"window": window, "table": "synthetic"})
    return str(folder)


def make_latents(pairs: Pairs, folder: Path) -> latents.Latents:
    """The cache of both flips; which codec made it does not matter to its reader."""
    codec, folder = codecs.DctCodec(), latents.make_folder(str(folder))

    def encode(visible, infrared):
        return codecs.pack(codec.encode(fill.compose_diptych(visible, infrared)))

    keys = [latents.key_of(pairs.fingerprint(i), codec.identity()) for i in range(len(pairs))]
    for i, key in enumerate(keys):
        visible, infrared = pairs.both_flips(i)
        entry = encode(visible, infrared), encode(visible, torch.full_like(visible, 0.5))
        latents.write_shard(folder, {key: entry})
    return latents.Latents(folder, keys)


def measure(args: argparse.Namespace, way: str, pairs: Pairs, workers: int) -> Row:
    """Two runs over `args.batches` batches after the first: at full speed, and beside a step."""
    seconds = waiting(args, pairs, workers, step_seconds=0.0)
    waited = waiting(args, pairs, workers, args.step_seconds)
    wait = waited / (waited + args.batches * args.step_seconds)
    return Row(way, workers, args.batches * args.batch / seconds, wait)


def waiting(args: argparse.Namespace, pairs: Pairs, workers: int, step_seconds: float) -> float:
    """Seconds spent in next(), where a step takes so long beside it."""
    waited, batches = 0.0, stream(pairs, args.batch, seed=0, num_workers=workers)
    next(batches)
    for _ in range(args.batches):
        time.sleep(step_seconds)
        start = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - start
    return waited


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| way | workers | pairs/s | wait, share of a step |", "|---|---|---|---|"]
    lines += [f"| {r.way} | {r.workers} | {r.pairs_s:.1f} | {100 * r.wait:.1f} % |" for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
