"""The guided model as a whole: frozen parts, gradients, precision, sampling.

pytest tests/test_translator.py
"""

import pytest
import torch

from assembly import translator_step
from configs.schema import TrainConfig
from losses import flow
from models.backbones.fill import FillDiptych, in_infrared_panel
from models.fast.plan import build
from models.sampler import SamplingConfig, sample, step_times
from models.translator import Prediction, TranslatorConfig
from tests.tiny_models import stir, tiny_stage1, tiny_translator, write_flux_fill

H, W = 32, 48
N = 2 * (H // 16) * (W // 16)
G = torch.Generator().manual_seed(3)
VISIBLE, INFRARED = torch.rand(2, 3, H, W, generator=G), torch.rand(2, 1, H, W, generator=G)
INFRARED = INFRARED.expand(-1, 3, -1, -1)
NOISE, T = torch.randn(2, N, 64, generator=G), torch.tensor([0.3, 0.8])


def loss_of(model):
    out = model(VISIBLE, INFRARED, NOISE, T)
    error = flow.velocity_error(out.velocity, out.data, NOISE)
    loss = flow.flow_loss(error, in_infrared_panel(H, W)).mean()
    if not model.cfg.freeze_decomposition:
        loss = loss + out.stage1.fused.square().mean()
    return loss


def stirred(**changes):
    model = tiny_translator(**changes)
    stir(model.flux)
    stir(model.guidance)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("train_base", [False, True])
def test_gradients_reach_what_is_trained_and_nothing_frozen(train_base, frozen, checkpointing):
    model = stirred(
        train_base=train_base, freeze_decomposition=frozen, gradient_checkpointing=checkpointing
    )
    loss_of(model.train()).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
        else:
            assert p.grad is None, name
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"flux", "guidance"} | (set() if frozen else {"stage1"})
    adapters = [n for n, p in model.named_parameters() if "lora" in n]
    assert adapters and all(model.get_parameter(n).requires_grad for n in adapters)


def test_frozen_nets_stay_in_eval_mode_and_batchnorm_keeps_its_statistics():
    for frozen in (True, False):
        model = stirred(freeze_decomposition=frozen)
        model.train()
        assert model.flux.training and not model.codec.training and not model.stage1.training
        before = model.stage1.decomposition.encoder.bn1.running_mean.clone()
        loss_of(model).backward()
        assert torch.equal(before, model.stage1.decomposition.encoder.bn1.running_mean)
    assert stirred(freeze_decomposition=False, train_batchnorm=True).train().stage1.training


def test_bf16_loss_is_close_to_fp32():
    single, half = stirred(), tiny_translator(base_dtype="bf16")
    half.load_state_dict(single.state_dict())
    assert half.base_dtype == torch.bfloat16
    assert half.guidance.attention["0"]["intensity"].to_q.weight.dtype == torch.float32
    with torch.no_grad():
        assert abs(loss_of(half) / loss_of(single) - 1) < 0.02
        autocast = stirred(train_base=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert abs(loss_of(autocast) / loss_of(single) - 1) < 0.02


def test_time_zero_is_data_and_time_one_is_noise(monkeypatch):
    model, seen = tiny_translator(), []
    monkeypatch.setattr(model, "velocity", lambda noisy, *rest: seen.append(noisy) or noisy)
    data = model.encode(VISIBLE, INFRARED)
    for t in (0.0, 1.0, 0.25):
        model(VISIBLE, INFRARED, NOISE, torch.full((2,), t))
    assert torch.equal(seen[0], data) and torch.equal(seen[1], NOISE)
    torch.testing.assert_close(seen[2], 0.75 * data + 0.25 * NOISE)


def test_time_is_rounded_as_flux_rounds_it():
    half = tiny_translator(base_dtype="bf16")
    t = half.round_time(torch.tensor([0.9991]))
    assert t.dtype == torch.float32 and t.item() == 1.0
    assert tiny_translator().round_time(torch.tensor([0.9991])).item() == pytest.approx(0.9991)


def test_guidance_off_is_an_empty_inject():
    model = tiny_translator(inject={})
    assert not list(model.guidance.parameters())
    assert loss_of(model).isfinite()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_visible_panel_is_left_out_where_its_error_has_no_weight(weight):
    seen = []

    class Model:
        backbone = FillDiptych(torch.nn.Identity())
        round_time = staticmethod(lambda t: t)

        def __call__(self, visible, infrared, noise, t, encoded, infrared_only, *rest):
            seen.append(infrared_only)
            return Prediction(NOISE, NOISE, NOISE, None)

    cfg = TrainConfig()
    cfg.flow.visible_weight = weight
    batch = {"visible": VISIBLE, "infrared": INFRARED, "draw": [0, 1]}
    translator_step.make_predict(cfg, model := Model(), VISIBLE.device)(model, batch, 2, 0)
    assert seen == [weight == 0]


def test_the_masked_half_of_the_condition_knows_nothing_of_the_infrared():
    model = tiny_translator()
    infrared = in_infrared_panel(H, W)
    condition, grey = model.known(VISIBLE), model.encode(VISIBLE, torch.full_like(VISIBLE, 0.5))
    assert torch.equal(condition, grey)
    full = model.encode(VISIBLE, INFRARED)
    assert torch.equal(condition[:, ~infrared], full[:, ~infrared])


def test_neither_and_both_backbones_are_refused():
    for preset, folder in ((None, None), ("demo", "x")):
        with pytest.raises(ValueError, match="exactly one of model.preset"):
            build(TranslatorConfig(preset=preset, flux_fill_id=folder), tiny_stage1())[0]


def test_a_flux_fill_folder_trains_and_samples(tmp_path):
    folder = write_flux_fill(tmp_path)
    model = tiny_translator(preset=None, flux_fill_id=str(folder), text_tokens=16)
    loss_of(model.train()).backward()
    out = sample(model.eval(), VISIBLE, NOISE, SamplingConfig(steps=2))
    assert out.shape == (2, 1, H, W) and out.min() >= 0 and out.max() <= 1


class Oracle:
    """A translator whose velocity is the true one: the sampler must recover the data exactly."""

    def __init__(self, model):
        self.model, self.data = model, model.encode(VISIBLE, INFRARED)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def velocity(self, latents, t, *_, **__):
        expected = torch.lerp(self.data, NOISE, t.view(-1, 1, 1))
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)  # on the path, both halves
        return NOISE - self.data


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (4, 3.0)])
def test_the_true_velocity_leads_back_to_the_data(steps, shift):
    model = tiny_translator()
    oracle = Oracle(model)
    out = sample(oracle, VISIBLE, NOISE, SamplingConfig(steps=steps, shift=shift))
    torch.testing.assert_close(out, model.decode(oracle.data, (H, W)), atol=1e-4, rtol=0)


def test_sampling_is_a_function_of_the_noise():
    model = stirred().eval()
    cfg = SamplingConfig(steps=3, guidance_scale=1.0)
    a, b = sample(model, VISIBLE, NOISE, cfg), sample(model, VISIBLE, NOISE, cfg)
    assert torch.equal(a, b)
    assert not torch.equal(a, sample(model, VISIBLE, -NOISE, cfg))


def test_step_times_run_from_noise_to_data():
    t = step_times(5, 2.0)
    assert t[0] == 1 and t[-1] == 0 and (t.diff() < 0).all()
    for wrong in (
        {"steps": 0},
        {"shift": float("nan")},
        {"samples": 0},
        {"guidance_scale": float("nan")},
    ):
        with pytest.raises(ValueError, match="sampling needs"):
            SamplingConfig(**wrong)  # at start, not at the first evaluation
    with pytest.raises(ValueError, match="steps >= 1"):
        step_times(0, 1.0)
