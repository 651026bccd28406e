"""Ways to arrange a scene for a transformer: `model.layout` names one of them.

To add one, write a subclass of `base.Backbone` in a file of its own and name it here.
"""

from models.backbones.base import Backbone
from models.backbones.fill import FillChannels, FillDiptych
from models.backbones.flux2 import Flux2
from models.backbones.pixels import Pixels
from models.backbones.reference import Reference

LAYOUTS: dict[str, type[Backbone]] = {
    "diptych": FillDiptych,
    "channels": FillChannels,
    "reference": Reference,
    "flux2": Flux2,
    "pixels": Pixels,
}
