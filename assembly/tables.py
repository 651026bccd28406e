"""The results of evaluate.py as tables and files."""

from pathlib import Path
from typing import Any

from assembly import atlas, features, peers, stage1_scores
from assembly.peers import Peer
from assembly.scoring import Found
from utils import bootstrap, calibration, results


def summarise(
    found: Found, own: list[str], not_measured: dict[str, str] | None, peer: Peer | None
) -> dict[str, Any]:
    """Means, intervals, verdicts, objects, warnings; calibration and failures where measured.

    Args: own: the rows of the model. not_measured: see `Atlas`; None: no categories wanted.
        peer: the protocol of another project that was asked for, or None.
    """
    truth = found.pooled.get("truth")
    sets: dict[str, dict[str, Any]] = {}
    if peer:
        plain = results.summarise(found.images, [], [], found.displacement)
        sets = peers.distances(found.pooled, plain["methods"], peer)
    elif truth is not None and len(truth) > 1:
        weights = bootstrap.weights(len(truth))
        for method in (name for name in found.pooled if name != "truth"):
            value, draws = (
                features.kernel_distance(found.pooled[method], truth, w) for w in (None, weights)
            )
            sets[method] = {"kid_like": (value, draws)}
    summary = results.summarise(found.images, found.boxes, own, found.displacement, sets)
    if found.curves:
        summary["calibration"] = calibration.means(found.curves)
    if not_measured is not None:
        indices = sorted({row["index"] for row in found.images})
        summary["failures"] = atlas.summarise(found.regions, indices, not_measured)
    return summary


def write(
    folder: Path, found: Found, whole: dict[str, Any], own: list[str], peer: Peer | None
) -> None:
    """Write results.md, results.json and the CSV files, and print the tables."""
    text = "\n".join(lines(whole, own, peer)) + "\n"
    results.write(folder, found.images, found.boxes, whole, text)
    if found.regions:
        results.write_rows(folder / "per_region.csv", found.regions)
    print(text + f"written to {folder}: results.md, results.json, per_image.csv")


def lines(whole: dict[str, Any], own: list[str], peer: Peer | None) -> list[str]:
    """The tables of results.json in words."""
    run, stage1, (H, W) = whole["run"], whole["stage1"], whole["size"]
    seconds = run["seconds_an_image"]
    text = peers.table(whole, peer, seconds) if peer else results.table(whole, seconds)
    text += ["", f"{whole['pairs']} pairs of `{whole['data']}` ({whole['split']}), {H} x {W},"]
    text[-1] += f" {run['seconds']} s on {run['device']}; checkpoint `{whole['checkpoint']}`;"
    text[-1] += f" protocol {whole['protocol']['id']}; ± half of the 95 % interval over images"
    if peer:
        text.append(f"as {peer.title} measures; from {'; '.join(peer.confirmed)}")
        text.append(f"not confirmed: {'; '.join(peer.unconfirmed)}")
    if sampler := whole["protocol"]["sampler"]:
        text.append("; ".join(f"{k} {v}" for k, v in sampler.items()))
    text += [f"WARNING: {warning}" for warning in whole["warnings"]]
    text += [*filter(None, [whole["note"]])]
    text += calibration.sentences(whole["methods"])
    if stage1:
        text += stage1_scores.sentences(stage1)
    if own:
        text += ["", *results.verdict_table(whole, own[-1])]
    if whole["objects"]:
        shown = [name for name in whole["methods"] if name in ("training mean", *own)]
        text += ["", *results.object_table(whole, shown)]
    if own and "failures" in whole:
        text += ["", *atlas.table(whole["failures"], own), *atlas.sentences(whole["failures"])]
    return text
