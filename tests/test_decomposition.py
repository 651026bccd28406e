"""The decomposition net: sizes, gradients, weights from files, and stage 1 with physics on and off.

pytest tests/test_decomposition.py
"""

import urllib.error

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from models.decomposition import (
    DecompositionConfig,
    Encoder,
    MultiTaskDecompositionNet,
    pad_to_multiple,
)
from models.stage1 import Stage1


def config(**changes):
    return DecompositionConfig(**{"backbone": "resnet18", "width": 8, **changes})


def photographs(B=2, H=40, W=56):
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("decoder", ["plain", "skips"])
@pytest.mark.parametrize("size", [(64, 64), (33, 70), (5, 3), (1, 1), (1, 200), (96, 31)])
def test_maps_have_the_photographs_size_whatever_it_is(decoder, size):
    net = MultiTaskDecompositionNet(config(decoder=decoder)).eval()
    intensity, material, context = net(photographs(1, *size))
    assert intensity.shape == (1, 1, *size)
    assert material.shape == (1, 32, *size)
    assert context.shape == (1, 8, *size)
    assert intensity.min() > 0 and intensity.max() < 1
    assert all(torch.isfinite(x).all() for x in (intensity, material, context))


@pytest.mark.parametrize("decoder", ["plain", "skips"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50"])
def test_gradient_reaches_every_parameter(backbone, decoder):
    net = MultiTaskDecompositionNet(config(backbone=backbone, decoder=decoder))
    maps = net(photographs())
    (
        maps.intensity.square().mean()
        + maps.material.square().mean()
        + maps.context.square().mean()
    ).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.norm() > 0, name


@pytest.mark.parametrize("decoder", ["plain", "skips"])
def test_the_net_starts_at_chance(decoder):
    torch.manual_seed(0)
    net = MultiTaskDecompositionNet(config(decoder=decoder, width=32))
    maps = net(photographs())
    assert (maps.intensity - 0.5).abs().max() < 0.25
    cross_entropy = -maps.material.log_softmax(1).mean()
    assert abs(cross_entropy - torch.tensor(32.0).log()) < 0.05


def test_padding_changes_nothing_that_is_kept():
    net = MultiTaskDecompositionNet(config()).eval()
    small = photographs(1, 50, 70)
    padded = pad_to_multiple(small, 32)
    assert padded.shape[-2:] == (64, 96)
    for cropped, whole in zip(net(small), net(padded)):
        torch.testing.assert_close(cropped, whole[..., :50, :70], atol=1e-5, rtol=1e-4)


def test_padding_reflects_and_repeats_what_is_too_small():
    row = torch.arange(1.0, 6.0).view(1, 1, 1, 5)
    padded = pad_to_multiple(row, 4)
    assert padded[0, 0, 0].tolist() == [1, 2, 3, 4, 5, 4, 3, 2]
    assert padded.shape == (1, 1, 4, 8) and torch.equal(padded[..., 3, :], padded[..., 0, :])


def test_normalisation_happens_inside():
    """ImageNet's mean colour is what the encoder sees as zero."""
    net = MultiTaskDecompositionNet(config()).eval()
    seen = []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    net(torch.tensor([0.485 + 0.229, 0.456 + 0.224, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(seen[1].mean((0, 2, 3)), torch.tensor([1.0, 1.0, 0.0]))


def test_maps_are_fp32_under_autocast():
    model = Stage1(config())
    with torch.autocast("cpu", torch.bfloat16):
        maps, fused = model(photographs())
    assert {x.dtype for x in (*maps, fused)} == {torch.float32}


def test_bf16_is_close_to_fp32():
    torch.manual_seed(0)
    model = Stage1(config(decoder="skips")).eval()
    maps, fused = model(photographs())
    with torch.autocast("cpu", torch.bfloat16):
        maps16, fused16 = model(photographs())
    assert (maps.intensity - maps16.intensity).abs().max() < 0.02
    assert (fused - fused16).abs().max() < 0.02


def test_channels_last_gives_the_same_maps():
    net = MultiTaskDecompositionNet(config(decoder="skips")).eval()
    before = net(photographs())
    net = net.to(memory_format=torch.channels_last)
    after = net(photographs().contiguous(memory_format=torch.channels_last))
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_one_tiny_image_in_training_is_refused_with_a_remedy():
    net = MultiTaskDecompositionNet(config())
    with pytest.raises(ValueError, match="batch_size"):
        net(photographs(1, 20, 20))
    net(photographs(2, 20, 20))
    net(photographs(1, 20, 40))
    net.eval()(photographs(1, 20, 20))


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32), (2, 4, 32, 32)])
def test_what_is_no_photograph_is_refused(shape):
    with pytest.raises(ValueError, match="visible"):
        MultiTaskDecompositionNet(config()).eval()(torch.rand(shape))


@pytest.mark.parametrize("changes", [{"width": 0}, {"num_materials": 0}])
def test_a_network_without_channels_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        MultiTaskDecompositionNet(config(**changes))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_local_file_are_used_and_the_classifier_ignored(tmp_path, suffix):
    resnet = torchvision.models.resnet18(weights=None)
    path = tmp_path / f"weights{suffix}"
    torch.save(resnet.state_dict(), path) if suffix == ".pth" else save_file(
        resnet.state_dict(), path
    )
    net = MultiTaskDecompositionNet(config(pretrained=str(path))).eval()
    resnet.eval()
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(photographs(1, 64, 64)))))
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        x = layer(x)
    torch.testing.assert_close(net.encoder(photographs(1, 64, 64))[-1], x)


def test_weights_of_another_backbone_are_refused(tmp_path):
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "34.pth")
    with pytest.raises(ValueError, match=r"resnet18.*differ"):
        MultiTaskDecompositionNet(config(pretrained=str(tmp_path / "34.pth")))


def test_weights_of_another_shape_are_refused(tmp_path):
    state = Encoder("resnet18").state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :1].clone()
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(ValueError, match=r"conv1.weight.*\(64, 1, 7, 7\)"):
        MultiTaskDecompositionNet(config(pretrained=str(tmp_path / "grey.pth")))


@pytest.mark.parametrize("content", [None, b"", b"no weights at all", "list", "nested"])
def test_a_file_without_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "list":
        torch.save([1, 2], path)
    elif content == "nested":
        torch.save({"epoch": 3}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.pretrained=.*weights.pth"):
        MultiTaskDecompositionNet(config(pretrained=str(path)))


def test_weights_that_cannot_be_fetched_name_what_to_set(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(OSError, match=r"model\.pretrained=none"):
        MultiTaskDecompositionNet(config(pretrained="imagenet"))


def test_physics_off_draws_the_same_weights_and_leaves_randomness_alone():
    torch.manual_seed(3)
    on, after_on = Stage1(config(), physics=True), torch.rand(4)
    torch.manual_seed(3)
    off, after_off = Stage1(config(), physics=False), torch.rand(4)
    assert off.fusion is None
    assert torch.equal(after_on, after_off)
    state = on.decomposition.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in off.decomposition.state_dict().items())
    for a, b in zip(on(photographs()).maps, off(photographs()).maps):
        assert torch.equal(a, b)


def test_no_layer_works_in_place_on_what_autograd_needs():
    """Two forward passes before one backward pass, as accumulation of two losses does."""
    net = nn.Sequential(nn.Identity(), MultiTaskDecompositionNet(config(decoder="skips")))
    visible = photographs().requires_grad_()
    (net(visible).intensity.mean() + net(visible).context.mean()).backward()
    assert visible.grad.norm() > 0
