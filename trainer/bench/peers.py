"""Expert layers of other libraries, at the sizes of ours, and the plain loops that one writes first.

DeepSpeed's layer has its own router. Hugging Face's experts and the loops stand behind our task routers.

Shape legend: P rows (image, task pairs), N tokens of a row, S = P * N tokens, D width, H hidden width, K chosen
experts, A (token, choice) pairs, E experts, d head width.
"""

import importlib
import os
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.router import Routing
from trainer.bench.comparison import Case, Row, layer_case
from trainer.bench.routed import Routed, attention_router, mlp_router

# Read when deepspeed is imported: without it a line about the missing GPU goes to the terminal.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from deepspeed.moe.layer import MoE


class DeepSpeedMLP(nn.Module):
    """DeepSpeed's MoE layer of ordinary MLPs, whose gates sum to 1.

    Args:
        config: sizes of the expert MLP.
        capacity: expert buffers hold this many times the mean load, and routes beyond it are dropped; None: buffers as
            large as the fullest expert needs, nothing is dropped.
    """

    def __init__(self, config: ModelConfig, *, capacity: float | None) -> None:
        super().__init__()
        width, hidden = config.width, config.expert_hidden
        self.moe = MoE(
            width,
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)),
            num_experts=config.mlp_experts,
            k=config.mlp_top_k,
            capacity_factor=capacity or 1.0,
            drop_tokens=capacity is not None,
        )

    def forward(self, x_PND: Tensor) -> Tensor:
        """Return (P, N, D)."""
        y_PND: Tensor = self.moe(x_PND)[0]
        return y_PND


class HuggingFaceExperts(nn.Module):
    """The experts of transformers without a gated unit and without biases, those of its Nemotron-H model.

    Args:
        config: sizes of the expert MLP.
        implementation: `grouped_mm` or `eager`, a loop over experts.

    Raises:
        ImportError: transformers is not installed, or has no such experts.
    """

    def __init__(self, config: ModelConfig, implementation: str) -> None:
        super().__init__()
        library: Any = importlib.import_module("transformers.models.nemotron_h.modeling_nemotron_h")
        sizes = SimpleNamespace(
            hidden_size=config.width,
            moe_intermediate_size=config.expert_hidden,
            n_routed_experts=config.mlp_experts,
            moe_latent_size=None,
            mlp_hidden_act="gelu",
            _experts_implementation=implementation,
        )
        self.experts = library.NemotronHExperts(sizes)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x_SD: Tensor, routing: Routing) -> Tensor:
        """Return (S, D)."""
        y_SD: Tensor = self.experts(x_SD, routing.experts_SK, routing.gates_SK.to(x_SD.dtype))
        return y_SD


class LoopMLP(nn.Module):
    """Every expert in turn: pick its tokens, run it, add what it says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.expert_hidden
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(config.mlp_experts)
        )

    def forward(self, x_SD: Tensor, routing: Routing) -> Tensor:
        """Return (S, D)."""
        gates_SK = routing.gates_SK.to(x_SD.dtype)
        y_SD = torch.zeros_like(x_SD)
        for number, expert in enumerate(self.experts):
            token, slot = (routing.experts_SK == number).nonzero(as_tuple=True)
            y_SD.index_add_(0, token, expert(x_SD[token]) * gates_SK[token, slot, None])
        return y_SD


class LoopAttention(nn.Module):
    """Mixture of attention heads with two such loops, around the same attention as ours."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, d = config.width, config.attention_head_width
        self.queries = nn.ModuleList(nn.Linear(width, d, bias=False) for _ in range(config.attention_experts))
        self.outputs = nn.ModuleList(nn.Linear(d, width, bias=False) for _ in range(config.attention_experts))
        self.kv = nn.Linear(width, 2 * d)

    def forward(self, x_PND: Tensor, routing: Routing) -> Tensor:
        """Return (P, N, D)."""
        x_SD = x_PND.flatten(0, 1)
        key_PNd, value_PNd = self.kv(x_PND).chunk(2, dim=-1)
        gates_SK = routing.gates_SK.to(x_SD.dtype)
        chosen = [(routing.experts_SK == number).nonzero(as_tuple=True) for number in range(len(self.queries))]
        q_SKd = x_SD.new_zeros(*gates_SK.shape, key_PNd.shape[-1])
        for query, (token, slot) in zip(self.queries, chosen, strict=True):
            q_SKd[token, slot] = query(x_SD[token])
        q = q_SKd.view(len(x_PND), 1, -1, key_PNd.shape[-1])
        a_SKd = F.scaled_dot_product_attention(q, key_PNd.unsqueeze(1), value_PNd.unsqueeze(1)).reshape(q_SKd.shape)
        y_SD = torch.zeros_like(x_SD)
        for output, (token, slot) in zip(self.outputs, chosen, strict=True):
            y_SD.index_add_(0, token, output(a_SKd[token, slot]) * gates_SK[token, slot, None])
        return y_SD.view_as(x_PND)


def mlp_peers(config: ModelConfig, dtype: torch.dtype) -> list[Case | Row]:
    """Return the expert MLP layers of others; those that cannot run here as empty rows."""
    peers: list[Case | Row] = [
        layer_case("DeepSpeed, no drops", DeepSpeedMLP(config, capacity=None).to(dtype)),
        layer_case("DeepSpeed, capacity 1", DeepSpeedMLP(config, capacity=1.0).to(dtype), note="drops routes"),
        layer_case("DeepSpeed, capacity 2", DeepSpeedMLP(config, capacity=2.0).to(dtype), note="drops routes"),
    ]
    for name, implementation in (("Hugging Face, grouped", "grouped_mm"), ("Hugging Face, loop", "eager")):
        try:
            experts = HuggingFaceExperts(config, implementation)
        except ImportError as error:
            note = f"cannot run: {error}" if find_spec("transformers") else "not installed"
            peers.append(Row(name=name, timing=None, saved_bytes=None, note=note))
        else:
            peers.append(layer_case(name, Routed(mlp_router(config), experts, flat=True).to(dtype), note="no biases"))
    loop = Routed(mlp_router(config), LoopMLP(config), flat=True)
    return [*peers, layer_case("plain loop", loop.to(dtype))]


def attention_peers(config: ModelConfig, dtype: torch.dtype) -> list[Case | Row]:
    """Return the plain loop; no other library has such a layer."""
    loop = Routed(attention_router(config), LoopAttention(config), flat=False)
    return [layer_case("plain loop", loop.to(dtype))]
