"""A dense vision transformer as timm builds it, without class token, trained here for a moment."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, PATCH, GRID = 16, 4, 4
WIDTH, DEPTH, HEADS = 32, 3, 4
STEPS = 400

_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class SmallViT(nn.Module):
    """Its state dict has timm's names; reads images that are normalised as ImageNet's are."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.pos_embed = nn.Parameter(torch.randn(1, GRID**2, WIDTH))
        self.blocks = nn.ModuleList(_block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> (B, N, D) before the last norm."""
        normalised = (images - _MEAN.view(3, 1, 1)) / _STD.view(3, 1, 1)
        x = self.patch_embed["proj"](normalised).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            x = x + attention(block["attn"], block["norm1"](x))
            x = x + mlp(block["mlp"], block["norm2"](x))
        return x

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.tokens(images)))


def attention(part: nn.ModuleDict, x: Tensor) -> Tensor:
    q, k, v = part["qkv"](x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT / (WIDTH // HEADS) ** 0.5
    return part["proj"]((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def mlp(part: nn.ModuleDict, x: Tensor) -> Tensor:
    return part["fc2"](F.gelu(part["fc1"](x)))


def batch(images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mosaics of random colours, and for each patch its right neighbour's colour, which only attention can tell."""
    mosaic = torch.rand(images, 3, GRID, GRID, generator=generator)
    return F.interpolate(mosaic, scale_factor=PATCH), mosaic.roll(-1, 3).flatten(2).mT


@functools.cache
@torch.enable_grad()
def trained() -> SmallViT:
    """The transformer after some hundred steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallViT()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, STEPS)
    for _ in range(STEPS):
        images, target = batch(16, generator)
        optimizer.zero_grad()
        F.mse_loss(model(images), target).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def _block() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "norm1": nn.LayerNorm(WIDTH),
            "attn": nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)}),
            "norm2": nn.LayerNorm(WIDTH),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)}),
        }
    )
