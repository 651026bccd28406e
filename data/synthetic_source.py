"""Rendered scenes as a source of pairs, as the rows of parquet files are."""

import numpy as np

from data.manifest import SPLITS, sha256
from data.synthetic import render_scene, renderer_hash
from data.transforms import Pair, Window

# Scene numbers of the splits never meet, however many scenes are asked for.
SCENES_PER_SPLIT = 10**9
SYNTHETIC_WINDOW = Window(0.0, 1.0, "normalised radiance")


class SyntheticSource:
    """Rendered scenes of one split: quantised to 8 bit as a camera's visible image is."""

    table = "synthetic"
    has_semantic = True
    manifests: list[dict] = []  # noqa: RUF012 (read only)
    groups = None
    planck = None

    def __init__(self, scenes: dict[str, int], seed: int, size: tuple[int, int], split: str):
        unknown = sorted(set(scenes) - set(SPLITS))
        count = scenes.get(split, 0)
        if unknown or not 0 < count <= SCENES_PER_SPLIT:
            raise ValueError(
                f"data.synthetic_scenes needs a positive number for {split} and keys among "
                f"{', '.join(SPLITS)}; got {scenes}"
            )
        self.first = SPLITS.index(split) * SCENES_PER_SPLIT
        self.seed, self.size = seed, size
        self.window = SYNTHETIC_WINDOW
        self.names = [f"scene_{self.seed}_{self.first + i:010d}" for i in range(count)]
        self.sources = ["synthetic"] * count
        self.notes: list[str] = []

    def where(self, index: int) -> str:
        return f"synthetic scene {self.names[index]}"

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every scene."""
        return [self.size] * len(self.names)

    def check(self, index: int) -> None:
        """Nothing is stored."""

    def content(self, index: int) -> str:
        """Hash of the scene's number and of the code that draws it: quicker than to draw it."""
        return sha256(f"{renderer_hash()} {self.names[index]} {self.size}".encode())

    def pair(self, index: int) -> Pair:
        scene = render_scene(self.seed, self.first + index, self.size)
        visible = np.rint(scene.visible * 255.0).astype(np.uint8)
        return Pair(visible, scene.infrared.astype(np.float32), scene.semantic)
