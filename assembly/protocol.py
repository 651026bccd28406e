"""What a table was measured on and how, as plain values with an id: equal ids may be compared."""

import json
from dataclasses import asdict
from pathlib import Path

from assembly.bundle import CONFIG_FILE, STATE_FILE, is_bundle
from assembly.checkpoints import Opened, file_of
from assembly.peers import PEERS
from configs.schema import EvaluateConfig
from data.manifest import digest, sha256
from data.stream import evenly_spaced
from utils import bootstrap

WORDS = ("title", "confirmed", "unconfirmed")  # of a peer's protocol; they decide no number
VERSION = 1  # of the metrics; raised when one of them changes its values


def describe(cfg: EvaluateConfig, opened: Opened) -> dict:
    """The frozen facts. `id` is the hash of those in `frozen`: pairs, pixels and metrics; model,
    seeds and sampler stand beside it."""
    pairs = opened.pairs
    height, width = pairs.size
    window = pairs.window
    indices = evenly_spaced(len(pairs), cfg.limit)
    content = [(pairs.sources[i], pairs.names[i], pairs.source.content(i)) for i in indices]
    frozen = {
        "metrics_version": VERSION,
        "channel": "first channel of the stored infrared",
        "range": f"{window.low:g} to {window.high:g} {window.unit} become 0 to 1, cut off beyond"
        if window
        else "each image's own least and greatest value become 0 and 1",
        "resize": f"the whole image to {height} x {width}, bilinear, antialiased, aspect not kept",
        "crop": "none",
        "split": cfg.split,
        "pairs": len(indices),
        "split_hash": digest(content),
    }
    if cfg.protocol:
        peer = PEERS[cfg.protocol]
        frozen |= {
            "name": cfg.protocol,
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
        **(
            {"peer": {key: getattr(PEERS[cfg.protocol], key) for key in WORDS}}
            if cfg.protocol
            else {}
        ),
    }


def checkpoint_hash(path: str) -> str:
    """SHA-256 of the file that `path` leads to; of an exported folder, of weights and values."""
    if is_bundle(path):
        files = [Path(path) / name for name in (STATE_FILE, CONFIG_FILE)]
        return sha256("".join(f"{sha256(p.read_bytes())}\n" for p in files).encode())
    return sha256(file_of(path).read_bytes())
