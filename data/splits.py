"""Which split each pair goes to: by a file, by folders named train, val and test, or by blocks."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data import folders
from data.folders import Item
from data.manifest import SPLIT_ALIASES, SPLITS

ROWS = 2048  # pairs compared at once: memory grows with the pairs, not with their square


class Rule(NamedTuple):
    """What the user asked for: see prepare.py --help."""

    sequences: str = "auto"
    by_folder: str = "auto"
    fractions: tuple[float, ...] = folders.FRACTIONS
    blocks: int = 0
    gap: int = 0


def rule_of(args) -> Rule:
    """The rule of prepare.py's arguments. Raises: ValueError: one that cannot be followed."""
    shares = tuple(args.split_fractions)
    rule = Rule(args.sequences, args.split_folders, shares, args.time_blocks, args.gap)
    check_rule(rule)
    return rule


def check_rule(rule: Rule) -> None:
    """Raises: ValueError: a rule that cannot be followed."""
    folders.check_rule(rule.sequences)
    shares = rule.fractions
    if not (len(shares) == 3 and all(0 < x < 1e9 for x in shares)):
        raise ValueError(f"--split_fractions takes three shares above 0, got {list(shares)}")
    if (rule.blocks and rule.blocks < len(SPLITS)) or rule.gap < 0:
        raise ValueError(
            f"--time_blocks takes 3 or more, --gap 0 or more: got {rule.blocks} and {rule.gap}"
        )
    if rule.gap and not rule.blocks:
        raise ValueError("--gap is the number of pairs left out between --time_blocks: give both")


def near_blocks(visible: np.ndarray, infrared: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Blocks (first row, first column, bool matrix) of pairs i < j that look alike on both sides.

    visible, infrared: thumbnails (N,256).
    """
    for first in range(0, len(visible), ROWS):
        part = slice(first, first + ROWS)
        for other in range(first, len(visible), ROWS):
            against = slice(other, other + ROWS)
            near = visible[part] @ visible[against].T > folders.SIMILAR
            if near.any():
                near &= infrared[part] @ infrared[against].T > folders.SIMILAR
                yield first, other, np.triu(near, 1) if first == other else near


def similar_links(visible: np.ndarray, infrared: np.ndarray) -> list[tuple[int, int]]:
    """Fewer than N links (i < j) that join all near-duplicates, directly or through others."""
    label, links = np.arange(len(visible)), []
    for first, other, near in near_blocks(visible, infrared):
        here = label[other : other + near.shape[1]]  # a view: follows every change of `label`
        for row in np.flatnonzero(near.any(axis=1)):
            i = first + int(row)
            columns = np.flatnonzero(near[row] & (here != label[i]))
            if len(columns):
                joined, places = np.unique(here[columns], return_index=True)
                links += [(i, other + int(j)) for j in columns[places]]
                label[np.isin(label, joined)] = label[i]
    return links


def torn_pairs(
    visible: np.ndarray, infrared: np.ndarray, splits: list[str]
) -> tuple[int, list[tuple[int, int]]]:
    """Number of near-duplicate pairs in two splits, and the first three; "" is in no split."""
    number = np.array([SPLITS.index(s) if s else -1 for s in splits])
    count = 0
    shown: list[tuple[int, int]] = []
    for first, other, near in near_blocks(visible, infrared):
        rows, columns = (number[x : x + n] for x, n in zip((first, other), near.shape))
        near = near & (rows[:, None] != columns) & (rows[:, None] >= 0) & (columns >= 0)
        count += int(near.sum())
        for i in np.flatnonzero(near.any(axis=1))[: 3 - len(shown)]:
            shown.append((first + int(i), other + int(near[i].argmax())))
    return count, shown


def torn_notes(
    names: list[str], visible: np.ndarray, infrared: np.ndarray, splits: list[str]
) -> tuple[int, list[str]]:
    """Number of near-duplicate pairs in two splits, and notes that name the first of them."""
    count, shown = torn_pairs(visible, infrared, splits)
    notes = [f"{count} pairs of near-duplicates are in two splits"] if count else []
    notes += [
        f"near-duplicates {names[i]} ({splits[i]}), {names[j]} ({splits[j]})" for i, j in shown
    ]
    return count, notes


# ---------------------------------------------------------------------------- folder names


def split_of_path(item: Item) -> str | None:
    """The split that the folders of a name say, at any depth and in any case, or None.

    Raises: ValueError: they say two.
    """
    words = [word.lower() for word in item.name.split("/")[:-1]]
    found = {SPLIT_ALIASES[word] for word in words if word in SPLIT_ALIASES}
    if len(found) > 1:
        raise ValueError(
            f"{item.source}/{item.name}: its folders name the splits {' and '.join(sorted(found))};"
            " give --splits, or --split_folders off"
        )
    return found.pop() if found else None


def folder_splits(items: list[Item]) -> list[str | None]:
    """The split of every item by its folders; None for all of a source that has no such folders.

    Raises: ValueError: some pairs of a source are in such folders and some are not.
    """
    splits = [split_of_path(item) for item in items]
    for source in dict.fromkeys(item.source for item in items):
        own = [i for i, item in enumerate(items) if item.source == source]
        outside = [i for i in own if splits[i] is None]
        if 0 < len(outside) < len(own):
            named = ", ".join(sorted({split for i in own if (split := splits[i])}))
            raise ValueError(
                f"source '{source}': {len(outside)} of {len(own)} pairs are outside its folders of "
                f"{named} (first: {items[outside[0]].name}); give --splits, or --split_folders off"
            )
    return splits


def fill(items: list[Item], splits: list, groups: np.ndarray, fractions) -> list[str]:
    """Splits that no folder names, cut in whole groups from train (else from the largest split).

    Items of split None are shared out by `fractions` in contiguous blocks, train first.
    """
    share, splits = dict(zip(SPLITS, fractions)), list(splits)
    for source in dict.fromkeys(item.source for item in items):
        own = [i for i, item in enumerate(items) if item.source == source]
        present = {splits[i] for i in own}
        missing = [s for s in SPLITS if s not in present]
        if not missing:
            continue
        sizes = {s: sum(splits[i] == s for i in own) for s in present}
        donor = "train" if "train" in present else max(sizes, key=sizes.__getitem__)
        wanted = [s for s in SPLITS if s in missing or s == donor]
        members: dict[int, list[int]] = {}
        for i in own:
            if splits[i] == donor:
                members.setdefault(int(groups[i]), []).append(i)
        blocks = list(members.values())
        chosen = assign([len(b) for b in blocks], [share[s] for s in wanted], wanted)
        for block, split in zip(blocks, chosen):
            for i in block:
                splits[i] = split
    empty = [split for split in SPLITS if split not in splits]
    if empty:
        count = len(set(groups.tolist()))
        raise ValueError(
            f"{len(items)} pairs form {count} group{'s' * (count != 1)} (sequences and "
            f"near-duplicates stay together), so {' and '.join(empty)} would be empty; for a fixed "
            f"camera or one video, --time_blocks 10 --gap {max(1, len(items) // 100)} cuts by time "
            f"anyway; or give --splits, or --sequences if the names were misread"
        )
    return splits


def assign(sizes: list[int], fractions: list[float], names: list[str]) -> list[str]:
    """Split of each block by where its middle falls; none stays empty if the blocks suffice."""
    middles = (np.cumsum(sizes) - np.array(sizes) / 2) / sum(sizes)
    ends = (np.cumsum(fractions) / sum(fractions))[:-1]
    chosen = [names[int(np.searchsorted(ends, m, side="right"))] for m in middles]
    for split in reversed(names):
        if split not in chosen and len(sizes) >= len(names):
            spare = [i for i, c in enumerate(chosen) if chosen.count(c) > 1]
            chosen[min(spare, key=lambda i: (sizes[i], -i))] = split
    return chosen


def time_blocks(items: list[Item], rule: Rule) -> list[str]:
    """Splits by contiguous blocks of frames in natural order; "" for pairs left out as a gap.

    The gap is left out where the split changes, from the block that follows.
    Raises: ValueError: a source has too few pairs for the blocks and gaps.
    """
    splits = [""] * len(items)
    for source in dict.fromkeys(item.source for item in items):
        own = [i for i, item in enumerate(items) if item.source == source]
        parts = np.array_split(np.array(own), rule.blocks)
        if min(map(len, parts)) <= rule.gap:
            raise ValueError(
                f"source '{source}': {len(own)} pairs in {rule.blocks} blocks leave "
                f"{min(map(len, parts))} a block, but the gap is {rule.gap}; fewer --time_blocks "
                f"or a smaller --gap"
            )
        names = assign([len(p) for p in parts], list(rule.fractions), list(SPLITS))
        for number, (part, name) in enumerate(zip(parts, names)):
            changed = number > 0 and names[number - 1] != name
            for i in part[rule.gap if changed else 0 :]:
                splits[i] = name
    return splits


# ---------------------------------------------------------------------------- all together


def choose(rule: Rule, given, items: list[Item], found: list) -> tuple[list[str], int, list[str]]:
    """One split an item ("" is left out), near-duplicate pairs in two splits, and notes.

    given: (splits, notes) of a file of splits, or None. found: what inspection knows of each pair.
    """
    visible = np.stack([f.visible_thumbnail for f in found])
    infrared = np.stack([f.infrared_thumbnail for f in found])
    hashes = [(f.visible_hash, f.infrared_hash) for f in found]
    folders.refuse_identical(items, hashes)
    named: list[str | None] = [None] * len(items)
    if rule.by_folder == "auto" and not given:
        named = folder_splits(items)
    if given:
        splits, notes = given
    elif rule.blocks:
        splits = time_blocks(items, rule)
        notes = [f"{splits.count('')} of {len(items)} pairs are left out as gaps between splits"]
    else:
        first: dict[str, int] = {}
        links = similar_links(visible, infrared)
        for i, pair in enumerate(hashes):
            links += [(first.setdefault(value, i), i) for value in pair]
        groups = folders.group(items, links, rule.sequences)
        splits, notes = fill(items, named, groups, rule.fractions), []
        if not any(named):
            return splits, 0, notes
        kept = {s: sum(n == s for n in named) for s in SPLITS if s in named}
        notes.append(
            f"splits by folder names ({', '.join(f'{s} {n}' for s, n in kept.items())})"
            + "".join(f"; {s} is cut from the rest" for s in SPLITS if s not in kept)
        )
    if not rule.blocks or given:
        folders.check_contents(items, splits, hashes)
    count, torn = torn_notes([item.name for item in items], visible, infrared, splits)
    return splits, count, notes + torn
