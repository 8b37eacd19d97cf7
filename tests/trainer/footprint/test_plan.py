"""The planner: memory beside what engines really hold, bytes beside what an exchange sends, and what it recommends."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

from cluster.env import RankEnv
from cluster.groups import Layout
from configs.errors import UserError
from configs.schema import RunConfig
from model.dispatch import ExpertGroup
from model.exchange_plan import exchange_bytes, plan_exchange
from model.expert_layout import ExpertLayout
from model.mod_squad import ModSquad
from model.routing_stats import RoutingLedger
from model.vit import expert_layers
from tests.ranks import run_ranks
from trainer.cli.main import app
from trainer.engine import Engine, expert_group, init_distributed
from trainer.footprint.plan import Cluster, all_to_all_bytes, ep_sizes, memory_per_rank, plan_layouts, recommend

CASES = [(ep_size, stage, dtype) for ep_size in (1, 2) for stage in (0, 1, 2) for dtype in ("fp32", "bf16")]


def config(**parts: dict[str, Any]) -> RunConfig:
    sizes = {"model": {"preset": "tiny", "placement": "every"}, "train": {"images_per_step": 16}}
    return RunConfig.model_validate({**sizes, **parts})


def cluster(**changes: Any) -> Cluster:
    sizes = {"nodes": 1, "gpus_per_node": 8, "memory_gib": 80.0, "bandwidth": 3e11, "network": 25e9, "flops": 4e14}
    return Cluster(**{**sizes, **changes})


class Loss(nn.Module):
    """A loss of every weight, without activations worth mentioning."""

    def __init__(self, run: RunConfig, group: ExpertGroup) -> None:
        super().__init__()
        self.model = ModSquad(run.model, run.task_specs, run.data.image_size, group=group)

    def forward(self, scale: Tensor) -> tuple[Tensor]:
        return (torch.stack([parameter.float().square().sum() for parameter in self.parameters()]).sum() * scale,)


def held_bytes(rank: int, world: int) -> list[tuple[int, int]]:
    """Weights and optimizer (masters and moments) of each case on this rank, after a step."""
    found = []
    for ep_size, stage, dtype in CASES:
        run = config(parallel={"ep_size": ep_size, "zero_stage": stage}, train={"dtype": dtype, "images_per_step": 16})
        init_distributed(RankEnv(rank=rank, world=world, local_rank=rank), run.parallel)
        layout = Layout(world, ep_size)
        engine = Engine(Loss(run, expert_group(layout)), run, layout, accumulation=1, micro_batch=8)
        engine.backward(engine(torch.ones(()))[0])
        engine.step()
        weights = sum(p.numel() * p.element_size() for p in engine.parameters.values())
        own = {p.data_ptr() for p in engine.parameters.values()}
        optimizer = 0
        for held, moments in engine._optimizer.state.items():
            tensors = [moments["exp_avg"], moments["exp_avg_sq"], *([] if held.data_ptr() in own else [held])]
            optimizer += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        found.append((weights, optimizer))
        engine.close()
    return found


def test_memory_is_what_engines_hold() -> None:
    for rank in run_ranks(held_bytes, 2):
        for (ep_size, stage, dtype), (weights, optimizer) in zip(CASES, rank, strict=True):
            run = config(train={"dtype": dtype, "images_per_step": 16})
            planned = memory_per_rank(run, Layout(2, ep_size), stage, 1)
            assert planned.weights == weights, (ep_size, stage, dtype)
            assert planned.optimizer == pytest.approx(optimizer, rel=0.01), (ep_size, stage, dtype)


@pytest.mark.parametrize("ep_size", [2, 4, 8])
def test_bytes_are_those_of_an_exchange(ep_size: int) -> None:
    run = config(train={"images_per_step": 16, "dtype": "bf16"})
    layout, total = Layout(8, ep_size), 0
    tokens = 16 // 8 * 64 * len(run.task_specs)
    generator = torch.Generator().manual_seed(0)
    for layer in expert_layers(run.model):
        chosen = torch.rand(tokens, layer.num_experts, generator=generator).topk(layer.top_k).indices
        heads = run.model.attention_head_width if layer.kind == "attention" else 0
        plan = plan_exchange(chosen, ExpertLayout(layer.num_experts, ep_size))
        total += exchange_bytes(plan, 0, width=run.model.width, item_bytes=2, choice_width=heads).moved
    assert all_to_all_bytes(run, layout) == pytest.approx(total, rel=0.03)
    assert all_to_all_bytes(run, Layout(8, 1)) == 0


def test_every_layout_is_weighed_and_the_fastest_that_fits_wins() -> None:
    layouts = plan_layouts(config(), cluster())
    assert [(x.ep_size, x.zero_stage) for x in layouts] == [(ep, stage) for ep in (1, 2, 4, 8) for stage in (0, 1, 2)]
    best = recommend(layouts)
    assert best.seconds == min(layout.seconds for layout in layouts)
    assert best.ep_size == 1  # many tokens, small experts: exchanging tokens costs more than reducing experts


def test_experts_too_large_for_one_gpu_are_sharded() -> None:
    large = config(model={"preset": "base", "mlp_experts": 512, "attention_experts": 64, "placement": "every"})
    layouts = plan_layouts(large, cluster(memory_gib=40.0))
    assert not any(layout.fits for layout in layouts if layout.ep_size == 1)
    assert recommend(layouts).ep_size > 1


def test_micro_batch_shrinks_with_memory() -> None:
    run = config(model={"preset": "small"}, data={"image_size": 224}, train={"images_per_step": 512})
    sizes = [recommend(plan_layouts(run, cluster(memory_gib=memory))).micro_batch for memory in (12.0, 24.0, 80.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    with pytest.raises(UserError, match=r"no layout fits: the smallest takes .* GiB per GPU"):
        recommend(plan_layouts(run, cluster(memory_gib=2.1)))


def test_recomputation_takes_less_memory() -> None:
    kept = {
        mode: memory_per_rank(
            config(train={"activation_checkpointing": mode, "images_per_step": 16}), Layout(1, 1), 1, 16
        ).activations
        for mode in ("none", "recompute", "recompute_offload")
    }
    assert kept["recompute_offload"] < kept["recompute"] < kept["none"]


def test_ep_sizes_divide_world_and_experts() -> None:
    assert ep_sizes(config(model={"preset": "small"}), 30) == [1]  # 15 and 16 experts have no common divisor
    assert ep_sizes(config(model={"preset": "base"}), 16) == [1, 2, 4, 8]
    assert ep_sizes(config(model={"preset": "tiny", "placement": "dense"}), 16) == [1]


def test_the_command_prints_layouts_and_a_recommendation() -> None:
    done = CliRunner().invoke(app, ["plan", "quickstart", "--nodes", "2", "--gpus-per-node", "4"])
    assert done.exit_code == 0, done.output
    assert "replicated experts (ep_size 1):" in done.output
    assert "MB of all-to-all" in done.output
    assert "recommended: parallel.ep_size=" in done.output
    uneven = CliRunner().invoke(app, ["plan", "quickstart", "--gpus-per-node", "3"])
    assert isinstance(uneven.exception, UserError)
    assert "not divisible by the world of 3" in str(uneven.exception)


FOUR_TASKS = ("depth_zbuffer", "edge_texture", "normal", "reshading")


def write_routing(folder: Path) -> Path:
    """A run's ledger: each of four tasks has two experts of its own in every layer."""
    layers = expert_layers(config().model)
    ledger = RoutingLedger(layers, FOUR_TASKS)
    for layer in layers:
        ledger.tokens[layer.name] += 100
        for task in range(4):
            ledger.counts[layer.name][task, 2 * task : 2 * task + 2] = 100
    (folder / "routing").mkdir()
    (folder / "routing" / "step_00000001.json").write_text(json.dumps(ledger.to_json()))
    return folder


def test_the_command_shows_task_affine_bytes_of_a_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"preset": "tiny", "placement": "every"}, "tasks": list(FOUR_TASKS)}))
    routing = ["--routing", str(write_routing(tmp_path))]
    done = CliRunner().invoke(app, ["plan", str(recipe), "--gpus-per-node", "8", *routing])
    assert done.exit_code == 0, done.output
    moved = {
        int(ranks): (float(even), float(affine))
        for ranks, even, affine in re.findall(
            r"ep_size (\d): ([\d.]+) MB of all-to-all \(([\d.]+) MB task", done.output
        )
    }
    assert moved.keys() == {2, 4, 8}
    assert moved[2][1] == moved[4][1] == 0, "every task has a rank with both of its experts"
    assert 0 < moved[8][1] < moved[8][0]

    other = CliRunner().invoke(app, ["plan", str(recipe), "model.depth=2", *routing])
    assert isinstance(other.exception, UserError)
    assert "are not those of the planned run" in str(other.exception)
    nothing = CliRunner().invoke(app, ["plan", str(recipe), "--routing", str(tmp_path / "routing")])
    assert isinstance(nothing.exception, UserError)
    assert "has no routing ledger: evaluate the run first" in str(nothing.exception)
