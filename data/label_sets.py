"""The label sets we can read: class names in order, the material of each, and palettes.

A class is a thing, a material what most of its visible surface is made of: buildings may be of
brick, people are mostly clothing. Where a label set's class can be anything, the choice below is
the commonest material, one guess per class, the same in every image.

Entries are class:material, `_` for a blank, `-` for no material (those pixels are ignored).
Class ids are positions, counted from 0. ADE20K's own annotation files count from 1, with 0 for
"other"; networks trained on it count from 0, as here.

Source: ADE20K (SceneParse150), Zhou et al., 2017; Cityscapes' 19 training classes, Cordts et al.,
2016; MFNet, Ha et al., 2017, which MSRS took over; palettes as those projects draw them.
"""

import numpy as np

_CLASSES = {
    "ade20k": """
    wall:plaster building:concrete sky:sky floor:wood tree:foliage ceiling:plaster road:asphalt
    bed:textile windowpane:glass grass:grass cabinet:wood sidewalk:concrete person:textile
    earth:soil door:wood table:wood mountain:stone plant:foliage curtain:textile chair:wood
    car:painted_metal water:water painting:textile sofa:textile shelf:wood house:brick sea:water
    mirror:glass rug:carpet field:grass armchair:textile seat:plastic fence:wood desk:wood
    rock:stone wardrobe:wood lamp:lamp bathtub:ceramic railing:bare_metal cushion:textile
    base:stone box:paper column:stone signboard:painted_metal chest_of_drawers:wood counter:wood
    sand:sand sink:ceramic skyscraper:glass fireplace:brick refrigerator:painted_metal
    grandstand:concrete path:gravel stairs:concrete runway:asphalt case:glass pool_table:textile
    pillow:textile screen_door:glass stairway:concrete river:water bridge:concrete bookcase:wood
    blind:textile coffee_table:wood toilet:ceramic flower:foliage book:paper hill:grass
    bench:wood countertop:stone stove:painted_metal palm:foliage kitchen_island:wood
    computer:plastic swivel_chair:textile boat:plastic bar:wood arcade_machine:mixed_object
    hovel:wood bus:painted_metal towel:textile light:lamp truck:painted_metal tower:concrete
    chandelier:lamp awning:textile streetlight:bare_metal booth:wood television_receiver:screen
    airplane:painted_metal dirt_track:soil apparel:textile pole:bare_metal land:soil
    bannister:wood escalator:bare_metal ottoman:leather bottle:glass buffet:wood poster:paper
    stage:wood van:painted_metal ship:painted_metal fountain:stone conveyer_belt:rubber
    canopy:textile washer:painted_metal plaything:plastic swimming_pool:water stool:wood
    barrel:wood basket:wood waterfall:water tent:textile bag:leather minibike:painted_metal
    cradle:wood oven:painted_metal ball:leather food:food step:concrete tank:painted_metal
    trade_name:plastic microwave:painted_metal pot:ceramic animal:animal_coat
    bicycle:mixed_object lake:water dishwasher:painted_metal screen:screen blanket:textile
    sculpture:stone hood:bare_metal sconce:lamp vase:ceramic traffic_light:painted_metal
    tray:plastic ashcan:plastic fan:plastic pier:wood crt_screen:screen plate:ceramic
    monitor:screen bulletin_board:paper shower:bare_metal radiator:painted_metal glass:glass
    clock:mixed_object flag:textile
    """,
    "cityscapes": """
    road:asphalt sidewalk:concrete building:concrete wall:concrete fence:bare_metal
    pole:bare_metal traffic_light:painted_metal traffic_sign:painted_metal vegetation:foliage
    terrain:grass sky:sky person:textile rider:textile car:painted_metal truck:painted_metal
    bus:painted_metal train:painted_metal motorcycle:painted_metal bicycle:mixed_object
    """,
    "msrs": """
    unlabelled:- car:painted_metal person:textile bike:mixed_object curve:concrete
    car_stop:concrete guardrail:bare_metal color_cone:plastic bump:rubber
    """,
    "synthetic": """
    sky:sky road:asphalt road_marking:asphalt pavement:concrete brick_wall:brick
    plaster_wall:plaster concrete_wall:concrete window:glass door:wood roof:roof_tile
    grass:grass tree_crown:foliage trunk:bark soil:soil water:water car_body:painted_metal
    car_window:glass tyre:rubber skin:skin clothing:textile steelwork:bare_metal
    """,
}

# one rrggbb per class, in order
_PALETTES = {
    "ade20k": """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d
    787846 08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0
    0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06
    ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00
    ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70
    00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99
    ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52
    000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00
    08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff
    9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00
    00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8
    005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
    """,
    "cityscapes": """
    804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000
    00008e 000046 003c64 005064 0000e6 770b20
    """,
    "msrs": """
    000000 400080 404000 0080c0 0000c0 808000 404080 c08080 c04000
    """,
    "synthetic": """
    4682b4 5a5a64 f5f5f5 bebebe b23c28 fadcaa 8c8c8c 00c8e6 c88c46 e65a14 78e63c 146e1e 5a3214
    825032 143cff 0000a0 0078a0 1e1e1e ffaa8c ff005a dc00dc
    """,
}


def _parse_classes(text: str) -> tuple[tuple[str, str | None], ...]:
    pairs = (entry.replace("_", " ").split(":") for entry in text.split())
    return tuple((name, None if material == "-" else material) for name, material in pairs)


def _parse_palette(text: str) -> np.ndarray:
    return np.array([tuple(bytes.fromhex(color)) for color in text.split()], dtype=np.uint8)


# label set -> ((class, material or None), ...) by class id
CLASSES = {name: _parse_classes(text) for name, text in _CLASSES.items()}

# label set -> (classes, 3) uint8 RGB
PALETTES = {name: _parse_palette(text) for name, text in _PALETTES.items()}
