"""Labels for intensity, material and context."""

import pytest
import torch

from data.materials import MATERIALS, NUM_MATERIALS, TABLES
from data.pseudo_labels import (
    CONTEXT_CHANNELS,
    LabelConfig,
    context_labels,
    intensity_labels,
    prepare_pseudo_labels,
)
from data.synthetic import render_scene
from utils.labels import IGNORE

ID = {m.name: i for i, m in enumerate(MATERIALS)}


def batch(size=(8, 10), count=2):
    g = torch.Generator().manual_seed(0)
    visible = torch.rand(count, 3, *size, generator=g)
    infrared = torch.rand(count, 1, *size, generator=g).expand(-1, 3, -1, -1)
    semantic = torch.randint(0, 9, (count, *size), generator=g)
    return visible, infrared, semantic


def test_labels_have_the_promised_shapes_and_ranges():
    labels = prepare_pseudo_labels(*batch(), LabelConfig(material_source="msrs"))
    assert labels.intensity.shape == (2, 1, 8, 10) and labels.intensity.dtype == torch.float32
    assert labels.material.shape == (2, 8, 10) and labels.material.dtype == torch.int64
    assert labels.context.shape == (2, 8, 8, 10) and labels.context.dtype == torch.float32
    known = labels.material != IGNORE
    assert known.any() and (labels.material[known] < NUM_MATERIALS).all()
    for image in (labels.intensity, labels.context):
        assert image.min() >= 0 and image.max() <= 1


def test_material_ids_mean_the_same_in_every_image():
    """Ids counted per image say nothing across images: such a loss stays at ln 32 for ever."""
    visible, infrared, _ = batch()
    semantic = torch.zeros(2, 8, 10, dtype=torch.int64)
    semantic[0, 0, 0] = 2  # one person; most of image 1 is people and cars
    semantic[1, :4], semantic[1, 4:] = 2, 1
    cfg = LabelConfig(material_source="msrs")
    material = prepare_pseudo_labels(visible, infrared, semantic, cfg).material
    assert material[0, 0, 0] == material[1, 0, 0] == ID["textile"]
    assert (material[1, 4:] == ID["painted metal"]).all()
    assert (material[0].flatten()[1:] == IGNORE).all()
    for i in range(2):  # nor do they depend on what else is in the batch
        alone = prepare_pseudo_labels(
            visible[i : i + 1], infrared[i : i + 1], semantic[i : i + 1], cfg
        )
        torch.testing.assert_close(alone.material[0], material[i])


def test_every_table_is_applied_and_255_stays_ignored():
    visible, infrared, _ = batch(size=(4, 64), count=1)
    for name, table in TABLES.items():
        semantic = torch.full((1, 4, 64), IGNORE)
        semantic.view(-1)[: len(table)] = torch.arange(len(table))
        cfg = LabelConfig(material_source=name)
        material = prepare_pseudo_labels(visible, infrared, semantic, cfg).material.flatten()
        torch.testing.assert_close(material[: len(table)], torch.from_numpy(table).long())
        assert (material[len(table) :] == IGNORE).all()


def test_synthetic_classes_become_the_scene_s_own_materials():
    scene = render_scene(0, 0, 32)
    visible = torch.from_numpy(scene.visible).permute(2, 0, 1)[None]
    infrared = torch.from_numpy(scene.infrared)[None, None]
    semantic = torch.from_numpy(scene.semantic).long()[None]
    labels = prepare_pseudo_labels(visible, infrared, semantic, LabelConfig(intensity="window"))
    torch.testing.assert_close(labels.material[0], torch.from_numpy(scene.material).long())
    torch.testing.assert_close(labels.intensity, infrared)


def test_minmax_stretches_each_image_and_survives_a_flat_one():
    infrared = torch.stack(
        [torch.linspace(0.4, 0.6, 12).reshape(1, 3, 4), torch.full((1, 3, 4), 0.7)]
    )
    intensity = intensity_labels(infrared, LabelConfig(intensity="minmax"))
    torch.testing.assert_close(intensity[0].flatten(), torch.linspace(0, 1, 12))
    assert (intensity[1] == 0).all()


def test_window_keeps_the_level_and_the_fourth_root_comes_last():
    infrared = torch.full((1, 3, 2, 2), 0.0625)
    assert (intensity_labels(infrared, LabelConfig(intensity="window")) == 0.0625).all()
    rooted = intensity_labels(infrared, LabelConfig(intensity="window", fourth_root=True))
    torch.testing.assert_close(rooted, torch.full((1, 1, 2, 2), 0.5))
    ramp = torch.linspace(0.2, 0.4, 5).reshape(1, 1, 1, 5)
    both = intensity_labels(ramp, LabelConfig(intensity="minmax", fourth_root=True))
    torch.testing.assert_close(both.flatten(), torch.linspace(0, 1, 5) ** 0.25)


def test_infrared_channels_are_averaged():
    infrared = torch.tensor([0.1, 0.2, 0.6]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    intensity = intensity_labels(infrared, LabelConfig(intensity="window"))
    torch.testing.assert_close(intensity, torch.full((1, 1, 2, 2), 0.3))


def test_context_channels_are_what_their_names_say():
    visible = torch.tensor(
        [[[0.0, 0.9], [0.2, 0.2]], [[0.3, 0.9], [0.2, 0.4]], [[0.6, 0.9], [0.2, 0.3]]]
    )[None]
    context = dict(zip(CONTEXT_CHANNELS, context_labels(visible)[0]))
    assert len(context) == 8
    expected = {
        "brightness": [[0.3, 0.9], [0.2, 0.3]],
        "contrast": [[0.06**0.5, 0.0], [0.0, (0.02 / 3) ** 0.5]],
        "red": [[0.0, 0.9], [0.2, 0.2]],
        "green": [[0.3, 0.9], [0.2, 0.4]],
        "|dx|": [[0.6, 0.0], [0.1, 0.0]],
        "|dy|": [[0.1, 0.6], [0.0, 0.0]],
        "texture": [[0.35, 0.3], [0.05, 0.0]],
    }
    for name, values in expected.items():
        torch.testing.assert_close(context[name], torch.tensor(values), msg=name)
    assert context["shadow"][1, 0] == 1 and context["shadow"][0, 1] == 0


def test_quantized_makes_32_grey_levels_and_none_ignores_everything():
    ramp = torch.linspace(0, 1, 64).reshape(1, 1, 1, 64).expand(1, 3, 2, 64)
    infrared, semantic = torch.rand(1, 3, 2, 64), torch.zeros(1, 2, 64, dtype=torch.int64)
    levels = prepare_pseudo_labels(
        ramp, infrared, semantic, LabelConfig(material_source="quantized")
    ).material[0, 0]
    assert levels.unique().tolist() == list(range(32)) and (levels.diff() >= 0).all()
    nothing = prepare_pseudo_labels(ramp, infrared, semantic, LabelConfig(material_source="none"))
    assert (nothing.material == IGNORE).all()


def test_no_gradient_flows_through_labels():
    visible, infrared, semantic = batch()
    visible.requires_grad_()
    infrared = infrared.clone().requires_grad_()
    for label in prepare_pseudo_labels(visible, infrared, semantic, LabelConfig()):
        assert not label.requires_grad


def test_wrong_shapes_and_unknown_choices_are_refused():
    visible, infrared, semantic = batch()
    with pytest.raises(ValueError, match=r"\(2, 8, 9\)"):
        prepare_pseudo_labels(visible, infrared, semantic[..., :9], LabelConfig())
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 10\)"):
        prepare_pseudo_labels(visible, infrared[:, :2], semantic, LabelConfig())
    with pytest.raises(ValueError, match="material_source is 'ade'"):
        LabelConfig(material_source="ade")
    with pytest.raises(ValueError, match="intensity is 'max'"):
        LabelConfig(intensity="max")
