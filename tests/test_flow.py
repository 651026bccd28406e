"""The rectified-flow objective: path, times, noise and their reproducibility.

pytest tests/test_flow.py
"""

import pytest
import torch

from losses import flow
from models.sampler import noise_for

DATA, NOISE = torch.randn(3, 5, 4), torch.randn(3, 5, 4)


def test_the_velocity_is_the_derivative_of_the_path():
    a, b = (torch.lerp(DATA, NOISE, t) for t in (0.3, 0.4))
    assert flow.velocity_error((b - a) / 0.1, DATA, NOISE).max() < 1e-8


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        flow.velocity_error(DATA, DATA[..., :1], NOISE)
    with pytest.raises(ValueError, match="shapes differ"):
        flow.flow_loss(torch.zeros(3, 5), torch.ones(4, dtype=torch.bool))


def test_times_hit_each_stratum_of_the_global_batch_once():
    t = flow.sample_times(list(range(8, 16)), group=8, seed=0)
    quantile = torch.special.ndtr(torch.logit(t.double()))
    assert (quantile * 8).long().sort().values.tolist() == list(range(8))


def test_times_are_logit_normal_with_the_given_mean():
    t = flow.sample_times(list(range(4000)), group=16, seed=0, mean=0.5, std=0.8)
    z = torch.logit(t.double())
    assert abs(z.mean() - 0.5) < 0.02 and abs(z.std() - 0.8) < 0.02
    assert t.min() > 0 and t.max() < 1


def test_the_shift_moves_times_towards_noise_and_keeps_the_ends():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert flow.shifted(t, 3.0).tolist() == [0.0, 0.75, 1.0]


def test_noise_and_times_are_functions_of_the_draw_alone():
    both = noise_for([4, 5], (6, 2), 7, "cpu")
    alone = noise_for([5], (6, 2), 7, "cpu")
    assert torch.equal(both[1], alone[0]) and not torch.equal(both[0], both[1])
    assert not torch.equal(alone, noise_for([5], (6, 2), 8, "cpu"))
    times = flow.sample_times([4, 5], 4, 7)
    assert torch.equal(times[1:], flow.sample_times([5], 4, 7))


def test_the_loss_counts_the_infrared_panel_unless_asked():
    error = torch.tensor([[1.0, 10.0, 3.0, 30.0]])
    infrared = torch.tensor([True, False, True, False])
    assert flow.flow_loss(error, infrared).tolist() == [2.0]
    assert flow.flow_loss(error, infrared, visible_weight=0.5).tolist() == [12.0]


def test_time_bins_add_up_to_the_loss():
    loss, t = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.05, 0.06, 1.0])
    sums, counts = flow.loss_by_time_bin(loss, t, torch.zeros(3, dtype=torch.bool))
    assert sums[0] == 3 and counts[0] == 2 and sums[9] == 4 and counts.sum() == 3
    mean = torch.tensor([False, False, True])
    sums, counts = flow.loss_by_time_bin(loss, t, mean)
    assert sums.tolist() == [3, *[0] * 9, 4] and counts.tolist() == [2, *[0] * 9, 1]
