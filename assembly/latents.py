"""Fill the cache of latents with what a run still needs, before it trains."""

from typing import Any

from configs.schema import TrainConfig, latents_without_codec
from data import latents
from data.pairs import Pairs
from data.stream import in_workers
from models.translator import Translator
from utils import dist
from utils.loop import progress_bar
from utils.problems import refuse


def attach_latents(cfg: TrainConfig, model: Translator, sets: tuple[Pairs, ...], device) -> None:
    """Add latents to the samples of every set, encoding those not in `cfg.data.latents`.

    Ranks share the work by shard. A run killed here goes on with the shards it finished. Losses are
    those of a run that encodes in every step if the codec gives an image the same bits in any
    batch: the cosine codec does (on a CPU), the FLUX autoencoder may differ in the last ones.

    Raises: ValueError: the layout has no latents; the folder cannot be made, is too small, or not
        the same on all machines.
    """
    if cfg.data.latents is None:
        return
    refuse(latents_without_codec(cfg))  # in stage 3 the layout is known only now
    if cfg.run.dry_run:
        return
    rank, world = dist.rank(), dist.world_size()
    folder = latents.make_folder(cfg.data.latents)
    for names in dist.gather(latents.remove_damaged(folder, rank, world)):
        for name in names:
            dist.print0(f"data.latents: {folder / name} is damaged; its pairs are encoded again")
    model_codec: Any = model.codec
    codec = f"{cfg.model.layout} {model_codec.identity()}"
    keys = [_keys(pairs, codec, cfg.data.num_workers) for pairs in sets]
    found = latents.find(folder)
    missing = {
        key: (s, i) for s, own in enumerate(keys) for i, key in enumerate(own) if key not in found
    }
    latents.check_room(folder, len(missing), model.backbone.state_shape(*sets[0].size))
    dist.barrier()  # nobody writes before everybody has looked
    if missing:
        dist.print0(f"data.latents: encoding {len(missing)} pairs into {folder}")
        shards = [
            list(missing)[i : i + latents.SHARD] for i in range(0, len(missing), latents.SHARD)
        ]
        _build(shards[rank::world], missing, model, sets, folder, device, cfg.data.num_workers)
    dist.barrier()
    for pairs, own in zip(sets, keys):
        pairs.latents = latents.Latents(folder, own)


def _keys(pairs: Pairs, codec: str, num_workers: int) -> list[str]:
    """The key of every pair, in order; each rank decodes its share."""
    rank, world = dist.rank(), dist.world_size()
    share = list(in_workers(pairs.fingerprint, range(len(pairs))[rank::world], num_workers))
    keys = [""] * len(pairs)
    for r, prints in enumerate(dist.gather(share)):
        keys[r::world] = [latents.key_of(one, codec) for one in prints]
    return keys


def _build(shards, missing, model, sets, folder, device, num_workers: int) -> None:
    items = [missing[key] for shard in shards for key in shard]
    samples = in_workers(lambda item: sets[item[0]].both_flips(item[1]), items, num_workers)
    with progress_bar(0, len(items), "pair") as bar:
        for shard in shards:
            entries = {}
            for key in shard:
                visible, infrared = (x.to(device) for x in next(samples))
                entries[key] = model.encode(visible, infrared).cpu(), model.known(visible).cpu()
                bar.update()
            latents.write_shard(folder, entries)
