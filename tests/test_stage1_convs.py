"""Convolutions over cells against those over pixels, and doubling against torch's.

pytest tests/test_stage1_convs.py
"""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.decomposition import DecompositionConfig
from models.fast.stage1_convs import SpaceToDepthKernels, speed_up, strided_space_to_depth
from models.fast.upsample_concat import double_beside
from models.stage1 import Stage1


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def kernels():
    return SpaceToDepthKernels().double()


def test_a_kernel_of_doubled_maps_is_one_of_the_map_itself(kernels):
    x, weight = normal(2, 5, 4, 6), normal(3, 5, 3, 3)
    with_zeros = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear")
    wanted = F.conv2d(with_zeros[..., 1:-1, 1:-1], weight)
    found = F.pixel_shuffle(F.conv2d(x, kernels.of_doubled(weight), padding=1), 2)
    torch.testing.assert_close(found, wanted)


def test_a_kernel_of_pixels_is_one_of_cells(kernels):
    x, weight = normal(2, 5, 8, 12), normal(3, 5, 3, 3)
    over_cells = F.conv2d(F.pixel_unshuffle(x, 2), kernels.of_pixels(weight), padding=1)
    torch.testing.assert_close(F.pixel_shuffle(over_cells, 2), F.conv2d(x, weight, padding=1))


def test_layers_over_cells_are_those_over_pixels(kernels):
    image = normal(2, 3, 32, 64)
    small = nn.Conv2d(3, 4, 3, padding=1).double()
    found = F.pixel_shuffle(kernels.convolve(small, image), 2)
    torch.testing.assert_close(found, small(image))
    first = nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False).double()
    torch.testing.assert_close(strided_space_to_depth(first, image), first(image))


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite2"])
@pytest.mark.parametrize("decoder", ["skips", "plain"])
@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_the_fast_network_is_the_plain_one_and_so_are_its_gradients(backbone, decoder, size):
    cfg = DecompositionConfig(backbone=backbone, width=8, decoder=decoder)
    plain = Stage1(cfg)
    net = plain.decomposition
    for head in (net.intensity_head, net.material_head, net.context_head):
        nn.init.normal_(head.last.weight, std=0.2)
    fast = deepcopy(plain)
    speed_up(fast)
    image = torch.rand(2, 3, *size)
    results = []
    for model in (plain, fast):
        maps, fused = model.eval()(image)
        out = torch.cat([*maps, fused], dim=1)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append({"out": out, **{n: p.grad for n, p in model.named_parameters()}})
    if (backbone, decoder) != ("efficientnet_lite2", "plain"):  # there the order of sums is equal
        assert not torch.equal(results[0]["out"], results[1]["out"])
    for name, x in results[0].items():
        assert (results[1][name] - x).norm() < 2e-3 * x.norm(), name
    assert plain.state_dict().keys() == fast.state_dict().keys()


def test_doubling_beside_another_map():
    x, other = normal(2, 3, 5, 4).requires_grad_(), normal(2, 2, 10, 8).requires_grad_()
    found = double_beside(x, other)
    assert torch.equal(found[:, 3:], other)
    assert torch.equal(found[:, :3], F.interpolate(x, scale_factor=2, mode="bilinear"))
    assert torch.autograd.gradcheck(double_beside, (x, other))


class LayoutsOfConvolutions(TorchDispatchMode):
    """Collects, of every convolution, the inputs and kernels whose channels are not last."""

    def __init__(self):
        super().__init__()
        self.count, self.others = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.count += 1
            # a slice of channels has strides of its own; what counts is that channels are next
            self.others += [x.shape for x in args[:2] if x.stride(1) != 1 and x.shape[1] > 1]
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA knows no such device")
def test_on_a_gpu_every_convolution_of_stage_1_has_its_channels_last():
    """Traced without a GPU: one convolution that converts its layout costs 0.4 ms of a step."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = Stage1(DecompositionConfig(backbone="resnet18"))
        speed_up(model)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # as model.to(memory_format=...) would
                last = torch.empty(module.weight.shape, memory_format=torch.channels_last)
                module.weight = nn.Parameter(last)
        with LayoutsOfConvolutions() as layouts:
            model(torch.rand(2, 3, 64, 64))
    assert layouts.count > 20 and not layouts.others
