"""What the parts compare is comparable: same work, same gradients, the loads they claim."""

import pytest
import torch

from trainer.bench import scaling, training_step
from trainer.bench.comparison import Settings, token_batches
from trainer.bench.expert_layers import MultiQueryAttention, expert_attention, expert_mlp
from trainer.bench.training_step import image_batches, mod_squad, pairs_case

QUICK = Settings(quick=True)


def test_dense_attention_has_the_weights_that_one_token_uses() -> None:
    config = QUICK.model
    dense = MultiQueryAttention(
        width=config.width, heads=config.attention_top_k, head_width=config.attention_head_width
    )
    experts = expert_attention(QUICK, "fp32").experts
    share = config.attention_top_k / config.attention_experts
    used = sum(
        parameter.numel() * (share if hasattr(parameter, "is_expert") else 1) for parameter in experts.parameters()
    )
    assert sum(parameter.numel() for parameter in dense.parameters()) == used


def test_task_by_task_has_the_gradients_of_all_pairs_at_once() -> None:
    model = mod_squad(QUICK, "fp32")
    batch = image_batches(QUICK)(0)
    gradients = []
    for case in (pairs_case("", model), training_step.task_by_task(model)):
        case.step(batch)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    at_once, by_task = gradients
    assert at_once.keys() == by_task.keys()
    for name, gradient in at_once.items():
        torch.testing.assert_close(by_task[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_dense_model_has_no_experts_but_attention_of_the_same_work() -> None:
    model = mod_squad(QUICK, "fp32")
    dense = training_step.dense_counterpart(model, QUICK, "fp32")
    assert not dense.expert_layers
    assert [type(block.attention).__name__ for block in dense.blocks] == ["MultiQueryAttention", "DenseAttention"] * 2


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_forced_loads(share: float) -> None:
    layer = expert_mlp(QUICK, "fp32")
    scaling.prefer_first_expert(layer.router.weight[:, :, 0].T)
    batch = token_batches(QUICK, "fp32")(0)
    scaling.forced_case("", layer, share).step(batch)
    first = (layer.route(batch.x).experts_SK == 0).sum()
    assert first == round(share * batch.x.shape[0] * batch.x.shape[1])
