"""Turn folders of image pairs, or rendered scenes, into parquet shards with a manifest.

    python prepare.py --synthetic 200 --size 128 --out datasets/synthetic
    python prepare.py --visible photos/rgb --infrared photos/ir --out datasets/mine
    python prepare.py --visible a/rgb --infrared a/ir --source a \\
                      --visible b/rgb --infrared b/ir --source b --splits s.json --out datasets/ab
    python prepare.py --check datasets/mine

Every pair is decoded and checked before anything is written; names must be equal in the folders.
Without --splits, 80/10/10 in blocks: frames of one sequence and near-duplicates stay together.
"""

import argparse
import shlex
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from data import (
    boxes,
    doctor,
    folders,
    infrared_files,
    inspection,
    layouts,
    ranges,
    repair,
    writing,
)
from data import splits as splitting
from data.manifest import SPLITS
from data.materials import PALETTES, TABLES
from data.synthetic_source import SCENES_PER_SPLIT
from utils.run import entry


class PlainParser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage: `--help` has that."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists every flag")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PlainParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, help="a whole data set as downloaded, instead of --visible ...")
    text = f"how --folder is laid out: auto, {', '.join(layouts.LAYOUTS)}"
    add("--layout", default="auto", help=text)
    add("--visible", type=Path, action="append", default=[], help="folder of RGB images (repeat)")
    add("--infrared", type=Path, action="append", default=[], help="folder of infrared images")
    add("--semantic", action="append", default=[], help="folder of class images, or 'none'")
    add("--source", action="append", default=[], help="name of this pair of folders")
    add("--palette", default="", help=f"{', '.join(PALETTES)} (of class images); jet (of infrared)")
    add("--table", default="", help=f"what class ids mean: {', '.join(TABLES)} (default: palette)")
    add("--splits", type=Path, help="JSON {train: [names], val: .., test: ..} or {source: {..}}")
    add("--sequences", default="auto", help="auto, off, or a pattern: group 1 is the sequence")
    text = "auto: folders named train, val, test (any depth) are the splits; off"
    add("--split_folders", choices=("auto", "off"), default="auto", help=text)
    text = "shares of train, val and test where no folder or file names the splits"
    names, shares = ("TRAIN", "VAL", "TEST"), folders.FRACTIONS
    add("--split_fractions", type=float, nargs=3, default=shares, metavar=names, help=text)
    text = "fixed camera or one video: cut each source into N blocks of time"
    add("--time_blocks", type=int, default=0, metavar="N", help=text)
    text = "pairs left out between two splits with --time_blocks"
    add("--gap", type=int, default=0, metavar="M", help=text)
    text = "endings of the names that differ between the folders: --suffixes=_rgb,_ir,"
    add("--suffixes", default=",,", metavar="VISIBLE,INFRARED,SEMANTIC", help=text)
    text = "values that become 0 and 1; auto: 0 255 for 8 bit, else from the train split"
    add("--window", nargs="+", default=["auto"], metavar="LOW HIGH", help=text)
    add("--nodata", type=float, action="append", default=[], help="infrared value for no data")
    add("--unit", help="unit of count * scale + offset (counts); converts radiometric JPEGs")
    add("--scale", type=float, default=1.0, help="unit per count")
    add("--offset", type=float, default=0.0, help="unit at count 0")
    add("--resize_visible", action="store_true", help="visible to the infrared's size")
    text = "a source displaced as a whole: crop by whole pixels, or also turn and scale the visible"
    add("--align", choices=("off", "translation", "affine"), default="off", help=text)
    add("--allow_unmatched", action="store_true", help="leave out names without a partner")
    add("--synthetic", type=int, metavar="N", help="render N scenes instead of reading folders")
    add("--size", type=int, nargs="+", default=[256], help="of rendered scenes: side or H W")
    add("--seed", type=int, default=0, help="of rendered scenes")
    add("--out", type=Path, help="folder to write, such as datasets/mine")
    add("--check", metavar="PATH", help="only decode a prepared data set and compare its hashes")
    add("--report", type=Path, help="HTML page that --check writes")
    add("--overwrite", action="store_true", help="replace a data set that is there")
    add("--num_workers", type=int, default=inspection.available(), help="processes that decode")
    return parser.parse_args(argv)


def prepare_synthetic(args: argparse.Namespace) -> dict:
    """The same scenes as data.path=synthetic renders, 80/10/10."""
    plain, own = vars(parse([])), ("synthetic", "size", "seed", "out", "overwrite", "num_workers")
    if given := [f"--{k}" for k, x in vars(args).items() if k not in own and x != plain[k]]:
        raise ValueError(f"--synthetic renders its own scenes; leave out {', '.join(given)}")
    if args.synthetic < len(SPLITS) or len(args.size) > 2:
        raise ValueError("--synthetic needs at least 3 scenes, --size a side or height and width")
    small = max(1, args.synthetic // 10)
    counts = {"train": args.synthetic - 2 * small, "val": small, "test": small}
    size = (args.size[0], args.size[-1])
    tasks = []
    for number, split in enumerate(SPLITS):
        first = number * SCENES_PER_SPLIT
        for index in range(first, first + counts[split]):
            tasks.append((args.seed, index, size, split, f"scene_{args.seed}_{index:010d}"))
    made = inspection.in_workers(writing.synthetic_row, tasks, args.num_workers)
    rows = tqdm(made, total=len(tasks), desc="render", unit="scene")
    manifest = {
        "window": {"low": 0.0, "high": float(writing.SYNTHETIC_COUNTS), "unit": "counts"},
        "table": "synthetic",
        "synthetic": {"seed": args.seed, "size": list(size)},
        "sizes": {f"{size[1]}x{size[0]}": len(tasks)},
    }
    return writing.write(args.out, rows, manifest, args.overwrite)


def prepare_folders(args: argparse.Namespace) -> dict:
    window = ranges.given_window(args.window, args.scale, args.offset)
    if not np.isfinite(args.nodata).all():
        raise ValueError(f"--nodata takes finite numbers, got {args.nodata}")
    rule = splitting.rule_of(args)
    args.palette, colours = infrared_files.split_palettes(args.palette)
    args.table = args.table or args.palette
    items, notes = layouts.find_items(args)
    for note in notes:
        print(f"note: {note}")
    meaning = infrared_files.given_radiometry(args, items)
    given = args.splits and folders.read_splits(args.splits, items, args.allow_unmatched)
    wanted = tuple(args.nodata), colours, meaning.unit
    options = inspection.Options(args.resize_visible, args.palette, args.table, *wanted)
    tasks = list(zip(items, [options] * len(items), doctor.sample([i.source for i in items])))
    looked = inspection.in_workers(inspection.inspect_or_fault, tasks, args.num_workers)
    progress = tqdm(looked, total=len(tasks), desc="check", unit="pair")
    found = inspection.collected(items, progress)
    splits, torn, notes = splitting.choose(rule, given, items, found)
    notes += [*inspection.aspect_notes(items, found), *boxes.notes(items)]
    findings, moves, moved_boxes = [f.finding for f in found], {}, {}
    heat = np.stack([f.infrared_thumbnail for f in found])
    names, sources = [i.name for i in items], [i.source for i in items]
    inverted = doctor.inversions(sources, heat)
    notes += doctor.summary(findings)
    notes += doctor.polarity_notes(names, sources, heat, inverted)
    if args.align != "off":
        affine = args.align == "affine"
        sizes = [f.size for f in found]
        found, moves, more = repair.aligned(items, found, options, affine, args.num_workers)
        moved_boxes, more_notes = boxes.moved(items, sizes, [f.move for f in found])
        notes += [*more, *more_notes]
    kept = [i for i, split in enumerate(splits) if split]
    items, found, splits = ([x[i] for i in kept] for x in (items, found, splits))
    meaning = infrared_files.agreed_radiometry(meaning, items, found)
    choice = ranges.choose_window(items, found, splits, window, *meaning[:3])
    for note in [*notes, *choice.notes]:
        print(f"note: {note}")
    manifest = {
        "window": choice.window._asdict(),
        "table": args.table or None,
        "infrared": choice.facts,
        "planck": meaning.planck and meaning.planck._asdict(),
        "sizes": inspection.sizes(found),
        "aligned": moves,
        "sources": {s: sum(i.source == s for i in items) for s in {i.source: 0 for i in items}},
        "near_duplicates_in_two_splits": torn,
    }
    tasks = [(*each, options, meaning.columns()) for each in zip(items, found, splits)]
    rows = inspection.in_workers(writing.folder_row, tasks, args.num_workers)
    rows = tqdm(rows, total=len(tasks), desc="write", unit="pair")
    return writing.write(args.out, rows, manifest, args.overwrite, moved_boxes)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.check:
        return writing.check(args.check, args.report)
    if args.out is None:
        raise ValueError("say where to write (--out datasets/mine) or what to --check")
    writing.check_out(args.out, args.overwrite)
    manifest = prepare_folders(args) if args.synthetic is None else prepare_synthetic(args)
    pairs = ", ".join(f"{split} {manifest['splits'][split]['pairs']}" for split in SPLITS)
    window = manifest["window"]
    print(f"pairs    {pairs}")
    print(f"sizes    {', '.join(f'{s} ({n})' for s, n in list(manifest['sizes'].items())[:5])}")
    print(f"window   {ranges.describe(window, manifest.get('infrared'))}")
    for split, found in manifest["balance"].items():
        top = [f"{m} {share['pixels']:.1%}" for m, share in found["materials"].items()][:5]
        print(f"labels   {split}: {found['images']} images, pixels {', '.join(top)}, ...")
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(f"written  {args.out} ({len(manifest['shards'])} shards, {size / 2**20:.1f} MiB)")
    labels = f"data.labels.material_source={manifest['table'] or 'none'}"
    print(f"next     python pretrain.py --data_path {shlex.quote(str(args.out))} {labels}")


if __name__ == "__main__":
    entry(main)
