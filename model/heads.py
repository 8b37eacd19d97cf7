"""Task heads: from a pair's patch tokens to the raw prediction of its task.

Dense tasks: layer norm and one linear map per patch to its p x p pixels (the decoder of arXiv 2212.08066). Vector
tasks: mean of the patch tokens, layer norm, linear map. There is no activation: class tasks give logits, normals are
not normalised, and results are float32 whatever the precision of the weights.

Shape legend: P pairs of the head's task, N = G * G patch tokens, D width, C channels, S image side, p patch side.
"""

from torch import Tensor, nn

from configs.schema import Init
from configs.tasks import TaskSpec
from model.vit import NORM_EPS


class DenseHead(nn.Module):
    """A linear decoder per patch: (P, N, D) -> (P, C, S, S) float32."""

    def __init__(self, *, width: int, channels: int, patch_size: int, grid: int, init: Init) -> None:
        """Build the head for images of `grid` x `grid` patches."""
        super().__init__()
        self.channels, self.patch_size, self.grid = channels, patch_size, grid
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        # Near zero: every pixel has weights of its own, and a short training would leave their first values as grain.
        std = 0.001 if init == "standard" else 0.02
        self.linear = _linear(width, channels * patch_size**2, std=std)

    def forward(self, x_PND: Tensor) -> Tensor:
        """Return the prediction (P, C, S, S) of the tokens (P, N, D); P may be 0."""
        G, p = self.grid, self.patch_size
        # Not F.pixel_shuffle: its backward rejects P = 0.
        y_PGGCpp = self.linear(self.norm(x_PND)).view(len(x_PND), G, G, self.channels, p, p)
        y_PCGpGp: Tensor = y_PGGCpp.permute(0, 3, 1, 4, 2, 5)
        return y_PCGpGp.reshape(len(x_PND), self.channels, G * p, G * p).float()


class VectorHead(nn.Module):
    """A linear map of the mean token: (P, N, D) -> (P, C) float32."""

    def __init__(self, *, width: int, channels: int) -> None:
        """Build the head."""
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.linear = _linear(width, channels, std=0.02)

    def forward(self, x_PND: Tensor) -> Tensor:
        """Return the prediction (P, C) of the tokens (P, N, D); P may be 0."""
        y_PC: Tensor = self.linear(self.norm(x_PND.mean(1)))
        return y_PC.float()


def make_head(
    spec: TaskSpec, *, width: int, patch_size: int, grid: int, init: Init = "standard"
) -> DenseHead | VectorHead:
    """Return the head of a task for images of `grid` x `grid` patches."""
    if spec.dense:
        return DenseHead(width=width, channels=spec.channels, patch_size=patch_size, grid=grid, init=init)
    return VectorHead(width=width, channels=spec.channels)


def _linear(width: int, out_features: int, *, std: float) -> nn.Linear:
    linear = nn.Linear(width, out_features)
    nn.init.trunc_normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
