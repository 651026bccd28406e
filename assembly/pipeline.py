"""The diffusers pipeline with this repository's own code: nothing in the folder is executed.

from assembly.pipeline import ThermaFluxPipeline
pipeline = ThermaFluxPipeline.from_pretrained("runs/train/export").to("cuda")
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from assembly import carried_pipeline, checkpoints
from assembly.bundle import is_bundle
from assembly.inference import ThermaFluxTranslator, Training
from utils import config


class ThermaFluxPipeline(carried_pipeline.ThermaFluxPipeline):
    """See assembly/carried_pipeline.py."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        torch_dtype: torch.dtype | None = None,
        fast: str = "off",
        device: str | torch.device = "cpu",
        **hub: Any,
    ) -> "ThermaFluxPipeline":
        """A pipeline of an exported folder, a checkpoint, or a hub id.

        Args:
            torch_dtype: float32 or bfloat16, of FLUX and its autoencoder; None: as trained.
            fast: off: the plain model, which can be moved and offloaded; auto: all that
                generate.py does for speed on `device`, where the pipeline then has to stay.
            device: where it is built.
            hub: revision, token, cache_dir and the like, of huggingface_hub.snapshot_download.

        Raises: ValueError: see assembly/checkpoints.py: read; or fast with a torch_dtype.
        """
        if fast != "off" and torch_dtype is not None:
            raise ValueError("fast=auto chooses the precision itself; leave out torch_dtype")
        path = Path(folder)
        if not path.exists():
            path = Path(_fetch(str(folder), hub))
        translator, trained, _ = checkpoints.load_translator(
            path, torch.device(device), sampling=True, sample_fast=fast
        )
        source = path if is_bundle(path) else None
        made = ThermaFluxTranslator(translator, Training.of(config.to_dict(trained)), source)
        if torch_dtype is not None:
            made.to(dtype=torch_dtype)
        return cls(made)


def _fetch(hub_id: str, hub: dict[str, Any]) -> str:
    """The files of a hub id, as a local folder."""
    try:
        return snapshot_download(hub_id, **hub)
    except Exception as error:  # the network, the id, the rights: each has types of its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{hub_id} is no folder here, and the hub does not have it: {reason}"
        ) from error
