"""The loss of stages 2 and 3: the prediction for a batch, and its error."""

import torch

from configs.schema import FlowConfig, TrainConfig, objective_problems
from data.pseudo_labels import prepare_pseudo_labels
from losses import flow
from losses.adversarial import discriminator_loss, generator_loss
from losses.image import image_loss
from losses.pretrain import MultiTaskPretrainLoss
from models.discriminator import Verdict
from models.sampler import noise_for
from models.translator import Translator
from utils import dist
from utils.problems import refuse


def make_predict(cfg: TrainConfig, model: Translator, device):
    """predict(model, batch, group, seed) -> loss (B,), t (B,), prediction, mean (B,) bool: whether
    the mean is predicted. The model may be wrapped in DDP.

    Times and noise are functions of (seed, draw), so that ranks, accumulation and resuming agree.
    """
    backbone, round_time, cfg_flow = model.backbone, model.round_time, cfg.flow
    infrared_only, with_image = cfg_flow.visible_weight == 0, needs_image(cfg_flow)

    def predict(model, batch: dict, group: int, seed: int):
        draws = batch["draw"]
        times = flow.sample_times(draws, group, seed, cfg_flow.mean, cfg_flow.std, cfg_flow.shift)
        mean = torch.tensor(flow.predicts_mean(draws, cfg_flow.mean_share))
        times = torch.where(mean, 1.0, times)
        t, mean = (x.to(device, non_blocking=True) for x in (times, mean))
        t = round_time(t)
        H, W = batch["visible"].shape[-2:]
        noise = noise_for(draws, backbone.state_shape(H, W), seed, device)
        encoded = (batch["latents"], batch["masked"]) if "latents" in batch else None
        images = batch["visible"], batch["infrared"]
        prediction = model(*images, noise, t, encoded, infrared_only, mean, with_image)
        error = flow.velocity_error(prediction.velocity, prediction.data, prediction.end)
        painted_S = backbone.painted(H, W, device)
        loss_B = flow.flow_loss(error, painted_S, cfg_flow.visible_weight)
        if cfg_flow.start == "fused":
            loss_B = loss_B * flow.clean_image_weight(t)
        if cfg_flow.image_weight:
            image_B = image_loss(prediction.image, batch["infrared"][:, :1])
            loss_B = loss_B + cfg_flow.image_weight * torch.where(mean, image_B, 0.0)
        if prediction.verdict and torch.is_grad_enabled():  # not in an evaluation
            game_B = adversarial_loss(prediction.verdict)
            loss_B = loss_B + cfg_flow.adversarial_weight * torch.where(mean, 0.0, game_B)
        return loss_B, t, prediction, mean

    return predict


def needs_image(cfg: FlowConfig) -> bool:
    """Whether a step needs the clean image that its velocity points to."""
    return cfg.image_weight > 0 or cfg.adversarial_weight > 0


def adversarial_loss(verdict: Verdict) -> torch.Tensor:
    """(B,): the losses of generator and discriminator; each receives only its own gradient."""
    generator = generator_loss(verdict.persuasion, verdict.feature_distance)
    return generator + discriminator_loss(verdict.real, verdict.generated)


def make_loss(cfg: TrainConfig, predict):
    """The loss of a step: the velocity error, and in stage 3 stage 1's loss on the maps."""
    training, weight = cfg.training, cfg.training.lambda_decomposition_consistency
    refuse(objective_problems(cfg))  # in stage 3 the model is known only now
    group = training.batch_size * training.gradient_accumulation_steps * dist.world_size()
    stage1_loss = MultiTaskPretrainLoss(cfg.loss)

    def loss_fn(model, batch: dict):
        loss_B, t, prediction, mean = predict(model, batch, group, training.seed)
        loss = training.lambda_generation * loss_B.mean()
        parts = {"generation": loss_B.detach().mean(), **by_time(loss_B, t, mean)}
        if not cfg.model.freeze_decomposition:  # even with weight 0: DDP expects all gradients
            labels = prepare_pseudo_labels(
                batch["visible"], batch["infrared"], batch["semantic"], cfg.data.labels
            )
            maps, fused = prediction.stage1
            intensity, material, context = maps
            consistency, terms = stage1_loss(
                intensity, material, context, fused, labels, batch["infrared"][:, :1]
            )
            loss = loss + weight * consistency
            parts["consistency"] = consistency.detach()
            parts |= {f"stage1_{name}": value for name, value in terms.items()}
        return loss, parts

    return loss_fn


def by_time(loss_B: torch.Tensor, t: torch.Tensor, mean: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss averaged over ten bins of t, and over the samples that predict the mean; NaN (which
    is not logged) where there is no sample."""
    sums, counts = flow.loss_by_time_bin(loss_B, t, mean)
    return dict(zip(flow.BIN_NAMES, sums / counts))
