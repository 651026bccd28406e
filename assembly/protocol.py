"""What a table was measured on and how, with an id: tables with equal ids may be compared."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from assembly.bundle import CONFIG_FILE, STATE_FILE, is_bundle
from assembly.checkpoints import Opened, file_of
from assembly.peers import PEERS
from configs.schema import HeldOutConfig
from data.manifest import digest, sha256
from data.stream import evenly_spaced
from utils import bootstrap

WORDS = ("title", "confirmed", "unconfirmed")  # of a peer's protocol; they decide no number
VERSION = 1  # of the metrics; raised when one of them changes its values


def describe(cfg: HeldOutConfig, opened: Opened, peer_name: str | None = None) -> dict:
    """The frozen facts. `id` is the hash of those in `frozen`: pairs, pixels and metrics; model,
    seeds and sampler stand beside it."""
    pairs = opened.pairs
    window = pairs.window
    indices = evenly_spaced(len(pairs), cfg.limit)
    content = [(pairs.sources[i], pairs.names[i], pairs.source.content(i)) for i in indices]
    frozen: dict[str, Any] = {
        "metrics_version": VERSION,
        "channel": "first channel of the stored infrared",
        "range": f"{window.low:g} to {window.high:g} {window.unit} become 0 to 1, cut off beyond"
        if window
        else "each image's own least and greatest value become 0 and 1",
        **_resizing(pairs.cfg.aspect, *pairs.size),
        "split": cfg.split,
        "pairs": len(indices),
        "split_hash": digest(content),
    }
    if peer_name:
        peer = PEERS[peer_name]
        frozen |= {
            "name": peer_name,
            "resize": f"to {peer.side} x {peer.side}, {peer.resize}, antialiased",
            "crop": peer.crop,
            "measured": {key: value for key, value in peer._asdict().items() if key not in WORDS},
        }
    return {
        "id": sha256(json.dumps(frozen, sort_keys=True).encode())[:12],
        "frozen": frozen,
        "checkpoint_hash": checkpoint_hash(cfg.checkpoint),
        "seeds": {"training": opened.trained.training.seed, "bootstrap": 0},
        "bootstrap": {"resamples": bootstrap.RESAMPLES, "level": bootstrap.LEVEL},
        "sampler": opened.sampling and asdict(opened.sampling),
        **({"peer": {key: getattr(PEERS[peer_name], key) for key in WORDS}} if peer_name else {}),
    }


def _resizing(aspect: str, height: int, width: int) -> dict[str, str]:
    """How images come to the size at which they are compared, in words."""
    how = "bilinear, antialiased, aspect "
    size = f"to {height} x {width}, {how}"
    if aspect == "squash":
        return {"resize": f"the whole image {size}not kept", "crop": "none"}
    if aspect == "crop":
        return {"resize": f"{size}kept", "crop": f"the largest {height} : {width} of the middle"}
    area = f"to about {height * width} pixels, sides multiples of 16, {how}kept"
    return {"resize": area, "crop": "the largest part of the middle that has the nearest aspect"}


def checkpoint_hash(path: str) -> str:
    """SHA-256 of the file that `path` leads to; of an exported folder, of weights and values."""
    if is_bundle(path):
        files = [Path(path) / name for name in (STATE_FILE, CONFIG_FILE)]
        return sha256("".join(f"{sha256(p.read_bytes())}\n" for p in files).encode())
    return sha256(file_of(path).read_bytes())
