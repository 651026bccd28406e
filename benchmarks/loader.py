"""How fast pairs come, and how long the GPU would wait for them: the data path of one rank.

    python benchmarks/loader.py                                synthetic scenes, several minutes
    python benchmarks/loader.py --data_path datasets/mine --workers 4 --out loader.json
    python benchmarks/loader.py --size 32 --scenes 8 --batches 4 --workers 0 --step_seconds 0.01
    python benchmarks/loader.py --rows 1000 100000 1000000     what a set's rows cost, a minute

Ways: `parquet` decodes every pair (the first epoch), `cached` has the decoded pairs in memory
(data.cache=ram), `latents` adds the codec's results from disk (data.latents=FOLDER; no crops, no
exposure, as there). pairs/s is what comes when nothing else is done. Wait is the share of a
training step that the loop would spend in next(), measured with a consumer that sleeps
`--step_seconds` a batch. Where there is a GPU a thread takes batches over from the workers and pins
them; without one next() itself does that. Prints markdown, writes JSON.

Parts, in one thread: `decode` makes the arrays of a pair from its bytes, `sample` the tensors of
training (crop and exposure too), `latents` reads the stored ones and adds them up. Visible and
infrared are JPEG. CPU time counts where other programs share the machine.

With --rows nothing of this, but sets of so many rows of 8 x 8 pixels, written in shards of 2,000:
time and memory to open one, private memory of a worker that has drawn from it, and its draws/s.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import latents, writing
from data.decoding import decode_infrared, decode_visible, encode_png
from data.manifest import sha256
from data.pairs import DataConfig, Pairs, open_pairs
from data.pseudo_labels import LabelConfig
from data.stream import stream
from data.transforms import AugmentConfig, Pair, Window, augment, to_tensors
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


@dataclass
class Part:
    part: str
    cpu_ms: float  # a pair, in one thread
    pairs_s: float  # a core, by CPU time


@dataclass
class Opened:
    rows: int
    seconds: float
    cpu_s: float
    mib: float  # that opening adds to a process
    worker_mib: float  # a worker's own, not shared with the others
    draws_s: float  # of one worker


def main(argv: list[str] | None = None) -> list[Row] | list[Opened]:
    args = parse(argv)
    if args.rows:
        return open_sets(args)
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
        parts = measure_parts(pairs, args.batches)
    print(table(rows))
    print(markdown(parts))
    if args.out:
        result = dict(vars(args), cores=os.cpu_count(), rows=[asdict(r) for r in rows])
        result["parts"] = [asdict(part) for part in parts]
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
    parser.add_argument("--rows", nargs="+", type=int, default=[], help="sizes of sets to open")
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


# ---------------------------------------------------------------------------- parts


def measure_parts(pairs: Pairs, count: int) -> list[Part]:
    """CPU time of decoding, of a whole sample and of reading latents; `pairs` has latents."""
    encoded = [as_jpeg(pairs.pair(i)) for i in range(min(len(pairs), 16))]
    rng, window, crops = np.random.default_rng(0), Window(0.0, 255.0), AugmentConfig()
    assert pairs.latents is not None
    stored = pairs.latents

    def decode(i: int) -> Pair:
        visible, infrared = encoded[i % len(encoded)]
        return Pair(decode_visible(visible, "visible"), decode_infrared(infrared, "infrared"))

    def sample(i: int) -> None:
        to_tensors(augment(decode(i), crops, rng, pairs.size), window)

    def read(i: int) -> None:
        for tensor in stored.get(i % len(pairs), flipped=bool(i % 2)).values():
            tensor.sum()  # the file is mapped: pages are read when they are used

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = [timed("decode", decode, count), timed("sample", sample, count)]
    parts.append(timed("latents", read, count))
    torch.set_num_threads(threads)
    return parts


def as_jpeg(pair: Pair) -> tuple[bytes, bytes]:
    """Visible and infrared, stretched to 8 bits."""
    values = pair.infrared.astype(np.float64)
    values = (values - values.min()) / max(np.ptp(values), 1e-9) * 255
    images, files = (pair.visible, np.rint(values).astype(np.uint8)), []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    return files[0], files[1]


def timed(part: str, function: Callable[[int], object], count: int) -> Part:
    function(0)
    start = time.process_time()
    for i in range(count):
        function(i)
    seconds = max(time.process_time() - start, 1e-9) / count
    return Part(part, 1000 * seconds, 1 / seconds)


# ---------------------------------------------------------------------------- rows


def open_sets(args: argparse.Namespace) -> list[Opened]:
    """Each set is opened in a process of its own, whose memory is that set's alone."""
    found = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = small_rows(Path(folder) / "rows", rows)
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
                found.append(process.submit(open_set, path, args.batches).result())
        print(json.dumps(asdict(found[-1])), flush=True)
    print(markdown(found))
    if args.out:
        Path(args.out).write_text(json.dumps([asdict(f) for f in found], indent=1))
    return found


def small_rows(folder: Path, count: int) -> str:
    """A prepared set of `count` rows of one image, a hundredth of them to validate and to test."""
    image = encode_png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    counts = encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8))
    rows = (
        {
            "visible": image,
            "infrared": counts,
            "semantic": None,
            "name": f"frame_{i:09d}",
            "source": "small",
            "split": {0: "val", 1: "test"}.get(i % 100, "train"),
            "sha256": sha256(str(i).encode()),
            "ir_unit": "counts",
            "ir_scale": None,
            "ir_offset": None,
            "height": 8,
            "width": 8,
            "classes": None,
        }
        for i in range(count)
    )
    window = dict(low=0.0, high=255.0, unit="counts")
    writing.write(folder, rows, {"window": window, "table": None})
    return str(folder)


def open_set(path: str, batches: int) -> Opened:
    labels = LabelConfig(material_source="none")
    before, wall, cpu = memory("self", "Rss"), time.perf_counter(), time.process_time()
    pairs = open_pairs(DataConfig(path=path, size=8, cache="none", labels=labels), "train")
    seconds, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    mib = memory("self", "Rss") - before
    drawn = stream(pairs, 64, seed=0, num_workers=1)
    next(drawn)
    start = time.perf_counter()
    for _ in itertools.islice(drawn, batches):
        pass
    draws_s = 64 * batches / (time.perf_counter() - start)
    worker = multiprocessing.active_children()[0].pid
    own = memory(worker, "Private_Clean") + memory(worker, "Private_Dirty")
    return Opened(len(pairs.source.rows.splits), seconds, cpu_s, mib, own, draws_s)


def memory(process: int | str, kind: str) -> float:
    """MiB, by Linux's account of a process; not a number elsewhere."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:"))


def markdown(rows: list[Part] | list[Opened]) -> str:
    names = list(asdict(rows[0]))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        values = [f"{x:.1f}" if isinstance(x, float) else f"{x}" for x in asdict(row).values()]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
