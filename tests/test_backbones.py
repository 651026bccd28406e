"""Layouts of a scene, the start of the flow, the mean, and the discriminator.

pytest tests/test_backbones.py
"""

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from assembly.checkpoints import sampling_of
from assembly.translator_step import adversarial_loss, make_predict
from configs.schema import FlowConfig, ModelUseConfig, TrainConfig
from models.backbones import LAYOUTS
from models.backbones.fill import FillDiptych
from models.backbones.reference import Reference
from models.discriminator import Discriminator
from models.sampler import SamplingConfig, noise_for, predict_mean, sample, translate
from models.translator import PathConfig, TranslatorConfig, contradictions, make_translator
from tests.tiny_models import INJECT, LoraConfig, stir, tiny_stage1, write_flux_fill

H, W = 32, 48
G = torch.Generator().manual_seed(3)
AVAILABLE = [
    name for name in LAYOUTS if name != "flux2" or hasattr(diffusers, "Flux2KleinPipeline")
]
VISIBLE = torch.rand(2, 3, H, W, generator=G)
INFRARED = torch.rand(2, 1, H, W, generator=G).expand(-1, 3, -1, -1)
T = torch.tensor([0.3, 0.8])
RANDOM = dict(preset="demo", train_base=True, text_tokens=4, inject=INJECT)


def translator(start="fused", moved=True, **changes):
    torch.manual_seed(0)
    cfg = TranslatorConfig(**{**RANDOM, "lora_config": LoraConfig(r=0), **changes})
    model = make_translator(cfg, tiny_stage1(), path=PathConfig(start=start, sigma=0.1))
    if moved:
        stir(model.flux), stir(model.guidance), stir(model.backbone)
    return model


def noise(model, seed=0):
    return noise_for([0, 1], model.backbone.state_shape(H, W), seed, "cpu")


@pytest.mark.parametrize("start", ["noise", "fused"])
@pytest.mark.parametrize("layout", AVAILABLE)
def test_every_layout_trains_all_that_it_has_and_samples(layout, start):
    model = translator(start, layout=layout).train()
    out = model(VISIBLE, INFRARED, noise(model), T, mean=torch.tensor([True, False]))
    assert out.velocity.shape == out.data.shape == (2, *model.backbone.state_shape(H, W))
    (out.velocity - (out.end - out.data)).square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.any(), name
        else:
            assert p.grad is None, name
    image = sample(model.eval(), VISIBLE, noise(model), SamplingConfig(steps=2))
    assert image.shape == (2, 1, H, W) and image.min() >= 0 and image.max() <= 1
    assert image.std() > 0.003
    assert not torch.equal(image, sample(model, VISIBLE, noise(model, 1), SamplingConfig(steps=2)))


@pytest.mark.parametrize("layout", AVAILABLE)
def test_a_state_is_encoded_and_decoded(layout):
    model = translator(layout=layout)
    flat = torch.full_like(VISIBLE, 0.4)
    flat[..., : W // 2] = 0.7
    back = model.decode(model.encode(VISIBLE, flat), (H, W))
    torch.testing.assert_close(back[..., 4:20], flat[:, :1, :, 4:20], atol=0.02, rtol=0)
    assert len(model.backbone.painted(H, W)) == model.backbone.state_shape(H, W)[0]
    assert len(model.backbone.places(H, W)) == len(model.backbone.ids(H, W))


@pytest.mark.parametrize("layout", AVAILABLE)
def test_an_untrained_model_that_starts_at_the_fused_image_returns_it(layout):
    model = translator(moved=False, layout=layout).eval()
    fused = model.decompose(VISIBLE).fused
    start = model.decode(model.backbone.encode(VISIBLE, fused), (H, W))
    torch.testing.assert_close(predict_mean(model, VISIBLE), start)
    cfg = SamplingConfig(steps=3)
    torch.testing.assert_close(sample(model, VISIBLE, noise(model), cfg), start)


def test_the_true_clean_image_leads_back_to_the_data():
    model = translator(layout="pixels").eval()
    data = model.encode(VISIBLE, INFRARED)

    def found(tokens, kept, condition):
        return condition.start - data  # the network's answer is what the start has too much

    model.backbone.output = found
    for steps in (1, 3):
        image = sample(model, VISIBLE, noise(model), SamplingConfig(steps=steps))
        torch.testing.assert_close(image, INFRARED[:, :1], atol=1e-5, rtol=0)


def test_stage_3_carries_the_gradient_of_the_start_into_the_decomposition():
    model = translator(layout="pixels", inject={}, freeze_decomposition=False)
    model(VISIBLE, INFRARED, noise(model), T).velocity.square().mean().backward()
    assert model.stage1.fusion.alpha.grad.abs() > 0
    assert model.stage1.decomposition.encoder.conv1.weight.grad.any()


def test_the_mean_has_no_noise_and_no_time_of_its_own():
    model = translator(layout="pixels").eval()
    ask = torch.tensor([True, True])
    with torch.no_grad():
        one = model(VISIBLE, INFRARED, noise(model), T, mean=ask, with_image=True)
        other = model(VISIBLE, INFRARED, noise(model, 5), T.flip(0), mean=ask, with_image=True)
    assert torch.equal(one.image, other.image)
    expected = predict_mean(model, VISIBLE)
    torch.testing.assert_close(one.image.clamp(0, 1), expected, atol=1e-5, rtol=0)
    asked = translate(model, VISIBLE, [3, 4], SamplingConfig(mode="mean", seed=9))
    assert torch.equal(asked, expected)


def test_a_mirrored_prediction_is_the_mean_of_both_and_mirrors_with_the_photograph():
    model = translator(layout="pixels").eval()
    cfg = SamplingConfig(mode="mean", mirror=True)
    found = translate(model, VISIBLE, [0, 1], cfg)
    alone = [predict_mean(model, x) for x in (VISIBLE, VISIBLE.flip(-1))]
    torch.testing.assert_close(found, (alone[0] + alone[1].flip(-1)) / 2)
    torch.testing.assert_close(translate(model, VISIBLE.flip(-1), [0, 1], cfg), found.flip(-1))


def test_noise_of_the_pixels_is_normal_at_every_scale_and_a_function_of_the_draw():
    shape = LAYOUTS["pixels"](nn.Identity()).shape_noise
    white = noise_for(list(range(16)), (64 * 64, 1), 0, "cpu")
    shaped = shape(white, (64, 64))
    assert shaped.std() == pytest.approx(1, abs=0.35) and abs(shaped.mean()) < 0.05
    coarse = nn.functional.avg_pool2d(shaped.view(16, 1, 64, 64), 8).std()
    assert coarse > 2.5 * nn.functional.avg_pool2d(white.view(16, 1, 64, 64), 8).std()


@pytest.mark.parametrize("layout", ["channels", "reference"])
def test_flux_folders_in_the_real_format_are_read_by_their_layout(layout, tmp_path):
    folder = write_flux_fill(tmp_path)
    cfg = dict(flux_fill_id=str(folder), layout=layout, text_tokens=16, inject=INJECT)
    cfg = TranslatorConfig(**cfg, base_dtype="fp32", lora_config=LoraConfig(r=2))
    if layout == "reference":
        with pytest.raises(ValueError, match="has 384 input channels, model.layout needs 64"):
            make_translator(cfg, tiny_stage1())
        path = folder / "transformer"
        fill = FluxTransformer2DModel.from_pretrained(path)
        FluxTransformer2DModel.from_config({**fill.config, "in_channels": 64}).save_pretrained(path)
    model = make_translator(cfg, tiny_stage1(), path=PathConfig(start="fused"))
    model.train()
    out = model(VISIBLE, INFRARED, noise(model), T)
    (out.velocity - (out.end - out.data)).square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and g.any() for g in grads)
    assert sample(model.eval(), VISIBLE, noise(model), SamplingConfig(steps=1)).shape[-1] == W


def test_reference_tokens_have_the_places_of_the_photograph_under_another_image():
    ids, places = Reference(nn.Identity()).ids(H, W), Reference(nn.Identity()).places(H, W)
    first, second = ids.chunk(2)
    assert first[:, 0].eq(0).all() and second[:, 0].eq(1).all()
    assert torch.equal(first[:, 1:], second[:, 1:])
    assert torch.equal(places, ids[:, 1:])


def test_pixels_are_refused_for_a_base_that_is_not_trained():
    for wrong in (dict(train_base=False), dict(preset=None, flux_fill_id="x")):
        cfg = TranslatorConfig(**{**RANDOM, "layout": "pixels", **wrong})
        (sentence,) = contradictions(cfg)
        assert sentence.startswith("model.layout=pixels is for a model trained from scratch")


def test_a_backbone_that_lacks_an_answer_is_refused_when_it_is_made():
    class Half(FillDiptych.__base__):
        def known(self, visible):
            return visible

    with pytest.raises(TypeError, match="abstract.*encode.*tokens"):
        Half(nn.Identity())


@pytest.mark.parametrize("share, mode", [(0.0, "mean"), (1.0, "sample")])
def test_a_mode_that_is_not_trained_for_is_refused(share, mode):
    with pytest.raises(ValueError, match=f"not trained for mode {mode}"):
        TrainConfig(flow=FlowConfig(mean_share=share), sampling=SamplingConfig(mode=mode))
    trained = TrainConfig(
        flow=FlowConfig(mean_share=share),
        sampling=SamplingConfig(mode="mean" if share else "sample"),
    )
    with pytest.raises(ValueError, match=f"not trained for mode {mode}"):
        sampling_of(trained, ModelUseConfig(mode=mode))


def test_an_evaluation_has_no_game():
    model = translator(layout="pixels", discriminator=True)
    cfg = TrainConfig(model=model.cfg, flow=FlowConfig(start="fused", adversarial_weight=1.0))
    predict = make_predict(cfg, model, torch.device("cpu"))
    batch = {"visible": VISIBLE, "infrared": INFRARED, "draw": [0, 1]}
    training, *_ = predict(model, batch, 2, seed=0)
    with torch.no_grad():
        evaluation, _, out, _ = predict(model, batch, 2, seed=0)
    expected = training - adversarial_loss(out.verdict)
    torch.testing.assert_close(evaluation, expected.detach(), atol=1e-4, rtol=0)
    assert (adversarial_loss(out.verdict) > 0.5).all()


def test_each_side_of_the_game_gets_its_own_gradient_alone():
    torch.manual_seed(0)
    critic, generated = Discriminator(), torch.rand(2, 1, H, W, requires_grad=True)
    verdict = critic.judge(VISIBLE, INFRARED[:, :1], generated)
    (verdict.persuasion.mean() + verdict.feature_distance.mean()).backward(retain_graph=True)
    assert generated.grad.any() and all(p.grad is None for p in critic.parameters())
    generated.grad = None
    (verdict.real.mean() - verdict.generated.mean()).backward()
    assert generated.grad is None and all(p.grad.any() for p in critic.parameters() if p.ndim > 1)
