"""The label sets we can read: class names in order, the material of each, and palettes."""

# --- the synthetic scenes; a class is a thing, its material what the thing is made of
_SYNTHETIC = (
    ("sky", "sky"),
    ("road", "asphalt"),
    ("road marking", "asphalt"),     # a coat of paint takes the road's temperature
    ("pavement", "concrete"),
    ("brick wall", "brick"),
    ("plaster wall", "plaster"),
    ("concrete wall", "concrete"),
    ("window", "glass"),
    ("door", "wood"),
    ("roof", "roof tile"),
    ("grass", "grass"),
    ("tree crown", "foliage"),
    ("trunk", "bark"),
    ("soil", "soil"),
    ("water", "water"),
    ("car body", "painted metal"),
    ("car window", "glass"),
    ("tyre", "rubber"),
    ("skin", "skin"),
    ("clothing", "textile"),
    ("steelwork", "bare metal"),
)

CLASSES = {"synthetic": _SYNTHETIC}
PALETTES = {}
