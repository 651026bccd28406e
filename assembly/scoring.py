"""Computes every metric of every row on held-out pairs, image by image.

Dimension key:  B batch   H, W pixels   n samples of an image
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assembly import atlas, features, peers
from assembly.rows import Row
from utils import alignment, calibration, dist, metrics, objects
from utils.correlation import clearness, peak

MOST_KERNEL = 2000  # images whose features are compared all with all; evenly spaced


@dataclass
class Found:
    """What was measured, in the order of the pairs, whatever ranks and batches there were."""

    images: list[dict] = field(default_factory=list)  # one a method and pair
    boxes: list[dict] = field(default_factory=list)  # one a method and annotated object
    regions: list[dict] = field(default_factory=list)  # one a method, pair and category it shows
    curves: list[dict] = field(default_factory=list)  # one a method that samples, and pair
    pooled: dict[str, Any] = field(default_factory=dict)  # (N, C) by method and "truth"
    displacement: dict[str, dict] = field(default_factory=dict)  # of the whole set, by method
    seconds: dict[str, float] = field(default_factory=dict)  # an image, by method
    absent: list[str] = field(default_factory=list)  # what could not be measured, in words


class Scorer:
    """Collects measures of batches: all of ours, or those of a peer's protocol.

    Raises: ValueError: LPIPS was asked for and cannot be had.
    """

    def __init__(
        self,
        size: tuple[int, int],
        device: torch.device,
        boxes: objects.Boxes | None = None,
        lpips: bool = False,
        where: atlas.Atlas | None = None,
        peer: peers.Peer | None = None,
    ):
        self.device, self.boxes, self.atlas, self.peer = device, boxes, where, peer
        self.absent: list[str] = []
        self.measures: dict[str, Callable[[Tensor, Tensor], Tensor]]
        self.network: Callable[[Tensor], list[Tensor]] | None = None
        if peer:
            self.measures, self.network, self.absent = peers.measures(peer, device)
        else:
            self._measure_all(size, lpips)
        self.found = Found()
        self.times: dict[str, list[float]] = {}
        self.surfaces: dict[str, Tensor] = {}  # sums over images, see alignment.surfaces

    def _measure_all(self, size: tuple[int, int], lpips: bool) -> None:
        self.measures = {
            "psnr": metrics.psnr,
            "ssim": metrics.ssim,
            "mae": metrics.mae,
            "rank": metrics.rank_correlation,
            "edge_sharpness": metrics.edge_sharpness,
            "hot_spot_iou": metrics.hot_spot_iou,
        }
        if min(size) >= metrics.MS_SSIM_SIDE:
            self.measures["ms_ssim"] = metrics.ms_ssim
        else:
            self.absent.append(f"no MS-SSIM: it needs sides of {metrics.MS_SSIM_SIDE} or more")
        if lpips:
            self.measures["lpips"] = metrics.Lpips(self.device)
        try:
            if min(size) >= 32:
                self.network = features.ImageFeatures(self.device)
        except ValueError:
            self.absent.append(features.WITHOUT)

    def score(self, rows: list[Row], batch: dict) -> None:
        """Measure every row of a batch; of one whose `filler` is true, only make the images."""
        true = batch["target"] if self.peer else batch["infrared"][:, :1]
        images = {row.name: self._timed(row, batch) for row in rows}
        if batch["filler"]:
            return
        true_maps = self.network(true) if self.network else None
        self._keep_pooled("truth", true_maps, batch)
        masks = self.atlas.masks(batch) if self.atlas else {}
        for method, drawn in images.items():
            image = drawn.mean(1, keepdim=True)
            image = peers.fitted(image, self.peer) if self.peer else image
            values = {name: f(image, true) for name, f in self.measures.items()}
            agreement = alignment.surfaces(image, true).sum(0).cpu()
            known = self.surfaces.get(method)
            self.surfaces[method] = (
                alignment.added(known, agreement) if known is not None else agreement
            )
            shift = alignment.displacement(image, true)
            values |= {"shift_x": shift[:, 0], "shift_y": shift[:, 1]}
            if self.network and true_maps is not None:
                maps = self.network(image)
                if not self.peer:
                    values["feature_distance"] = features.distance(maps, true_maps)
                self._keep_pooled(method, maps, batch)
            if drawn.shape[1] > 1 and not self.peer:
                values |= uncertainty(drawn, true)
                values |= self._keep_curves(method, drawn, true, batch)
            self._keep(method, values, batch)
            self._keep_boxes(method, image, true, batch)
            for found, where in zip(atlas.errors(image, true, masks), self._places(batch)):
                self.found.regions += [{**where, "method": method, **row} for row in found]

    def result(self) -> Found:
        """All ranks' measures, equal on all of them. Collective."""
        shares = dist.gather((self.found, self.times))
        surfaces = dist.gather(self.surfaces)
        all_found = Found(absent=self.absent)
        times = shares[0][1]
        all_found.seconds = {name: float(np.median(x)) for name, x in times.items()}
        for method in surfaces[0]:
            whole = reduce(alignment.added, (own[method] for own in surfaces if method in own))
            whole = whole.numpy()
            y, x = peak(whole)
            clear = clearness(whole)
            all_found.displacement[method] = {"x": x, "y": y, "clearness": clear}
        for name in ("images", "boxes", "regions", "curves"):
            items = [item for found, _ in shares for item in getattr(found, name)]
            setattr(all_found, name, sorted(items, key=lambda item: item["index"]))
        methods = list(dict.fromkeys(name for found, _ in shares for name in found.pooled))
        for method in methods:
            pairs = [pair for found, _ in shares for pair in found.pooled.get(method, [])]
            vectors = [vector for _, vector in sorted(pairs, key=lambda pair: pair[0])]
            step = 1 if self.peer else -(-len(vectors) // MOST_KERNEL)
            all_found.pooled[method] = np.stack(vectors[::step])
        return all_found

    def _timed(self, row: Row, batch: dict) -> Tensor:
        self._wait()
        started = time.perf_counter()
        image = row.image(batch).float()
        self._wait()
        seconds = (time.perf_counter() - started) / len(image)
        self.times.setdefault(row.name, []).append(seconds)
        return image

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _keep(self, method: str, values: dict[str, Tensor], batch: dict) -> None:
        columns = {name: x.tolist() for name, x in values.items()}
        for i, where in enumerate(self._places(batch)):
            numbers = {name: x[i] for name, x in columns.items()}
            self.found.images.append({**where, "method": method, **numbers})

    def _places(self, batch: dict) -> list[dict[str, Any]]:
        return [
            {"index": index, "source": source, "name": name}
            for index, source, name in zip(batch["draw"], batch["source"], batch["name"])
        ]

    def _keep_curves(
        self, method: str, samples: Tensor, true: Tensor, batch: dict
    ) -> dict[str, Tensor]:
        curve, oracle = calibration.sparsification(*deviation_and_error(samples, true))
        for index, own, best in zip(batch["draw"], curve.tolist(), oracle.tolist()):
            self.found.curves.append(
                {"index": index, "method": method, "curve": own, "oracle": best}
            )
        return calibration.areas(curve, oracle)

    def _keep_boxes(self, method: str, image: Tensor, true: Tensor, batch: dict) -> None:
        if not self.boxes:
            return
        for i, where in enumerate(self._places(batch)):
            pair = where["source"], where["name"]
            light = objects.light_of(*pair)
            for box in objects.contrasts(image[i, 0], true[i, 0], self.boxes.of(*pair)):
                self.found.boxes.append({**where, "method": method, "light": light, **box})

    def _keep_pooled(self, name: str, maps: list[Tensor] | None, batch: dict) -> None:
        if maps:
            vectors = features.pooled(maps).cpu().numpy()
            self.found.pooled.setdefault(name, []).extend(zip(batch["draw"], vectors))


def deviation_and_error(samples: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, H, W) each: standard deviation of a pixel over its samples (B, n, H, W), and the
    absolute error of their mean."""
    deviation = samples.std(1, keepdim=True).clamp(0, 1)
    return deviation, (samples.mean(1, keepdim=True) - target).abs()


def uncertainty(samples: Tensor, target: Tensor) -> dict[str, Tensor]:
    """spread: mean standard deviation of a pixel over its samples (B, n, H, W); spread_rank: its
    rank correlation with the error of their mean, 1 where the least sure pixels are the worst."""
    deviation, error = deviation_and_error(samples, target)
    return {
        "spread": deviation.mean((1, 2, 3)),
        "spread_rank": metrics.rank_correlation(deviation, error),
    }
