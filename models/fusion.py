"""The rendering equation as an inductive bias: three proxy maps to an infrared image.

    infrared = sigmoid(alpha) intensity^power weight(material) + sigmoid(beta) term(context)

A thermal camera sees emissivity * emission + (1 - emissivity) * what is reflected; total emission
grows with T^4 (Stefan-Boltzmann); in the 8-14 um band and for normalised values the power is
learnt. `weight` stands for emissivity, the context's term for reflection; neither is measured.

Dimension key:  B batch   H, W pixels   M materials   C context channels
"""

import torch
from torch import Tensor, nn

from models.decomposition import DecompositionConfig

# where the learnt scalars start; alpha and beta before their sigmoid
POWER, ALPHA, BETA = 2.5, 0.7, 0.3
DARKEST = 1e-6  # intensity is clamped to it: nearer to 0 the derivative of its power is unbounded


class PhysicsInspiredFusion(nn.Module):
    """Intensity, material probabilities and context of a scene -> its infrared image.

    The output is not clamped to [0, 1]: a clamp would leave pixels without gradient.
    """

    def __init__(
        self,
        num_materials: int = DecompositionConfig.num_materials,
        num_context_channels: int = DecompositionConfig.num_context_channels,
    ):
        super().__init__()
        self.num_materials = num_materials
        self.power = nn.Parameter(torch.tensor(POWER))
        self.alpha = nn.Parameter(torch.tensor(ALPHA))
        self.beta = nn.Parameter(torch.tensor(BETA))
        # smooth activations: no unit can die, every pixel has a gradient
        self.weight = nn.Sequential(
            nn.Conv2d(num_materials, 64, 1), nn.GELU(), nn.Conv2d(64, 1, 1), nn.Sigmoid()
        )
        self.term = nn.Sequential(
            nn.Conv2d(num_context_channels, 16, 1), nn.GELU(), nn.Conv2d(16, 3, 1)
        )

    def forward(self, intensity: Tensor, material: Tensor, context: Tensor) -> Tensor:
        """The fused infrared image, (B, 3, H, W) fp32, about [0, 1].

        Args:
            intensity: (B, 1, H, W) in [0, 1].
            material: (B, M, H, W) probabilities, not logits.
            context: (B, C, H, W).
        Raises: ValueError: other shapes.
        """
        B, _, H, W = intensity.shape
        wanted = (B, 1, H, W), (B, self.num_materials, H, W), (B, self.term[0].in_channels, H, W)
        found = tuple(intensity.shape), tuple(material.shape), tuple(context.shape)
        if found != wanted:
            raise ValueError(f"intensity, material, context must be {wanted}, got {found}")
        weight, term = self.weight(material).float(), self.term(context).float()
        base = intensity.float().clamp(min=DARKEST) ** self.power
        return self.alpha.sigmoid() * base * weight + self.beta.sigmoid() * term

    @torch.no_grad()
    def material_weights(self) -> Tensor:
        """The emissivity-like weight of each pure material: (M,) fp32 in (0, 1)."""
        pure = torch.eye(self.num_materials, device=self.power.device)  # (M, M)
        with torch.autocast(pure.device.type, enabled=False):
            return self.weight(pure[:, :, None, None]).float().flatten()

    @torch.no_grad()
    def scalars(self) -> dict[str, Tensor]:
        """The learnt scalars by name, as they enter the formula."""
        return {
            "power": self.power.clone(),
            "alpha": self.alpha.sigmoid(),
            "beta": self.beta.sigmoid(),
        }
