import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.router import TaskRouter


def router_and_input(num_tasks: int = 3, rows: int = 4, **options: object) -> tuple[TaskRouter, torch.Tensor]:
    settings = {"width": 8, "num_experts": 6, "top_k": 2, "seed": 1, **options}
    router = TaskRouter(num_tasks=num_tasks, **settings)  # type: ignore[arg-type]
    return router, torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(0))


def streams(rows: int, epoch: int) -> torch.Tensor:
    return torch.tensor([(row, epoch, 1) for row in range(rows)])


def test_each_row_takes_its_tasks_router() -> None:
    router, x = router_and_input()
    task = torch.tensor([2, 0, 2, 1])
    routing = router(x, task)
    for row, t in enumerate(task):
        logits = x[row] @ router.weight[t]
        torch.testing.assert_close(routing.logits_SE.view(4, 5, 6)[row], logits)
    torch.testing.assert_close(routing.probs_SE, routing.logits_SE.softmax(-1))
    top = routing.probs_SE.topk(2)
    torch.testing.assert_close(routing.gates_SK, top.values)
    assert torch.equal(routing.experts_SK, top.indices)


def test_one_router_for_all_when_no_task_is_seen() -> None:
    router, x = router_and_input(num_tasks=1)
    without = router(x, None)
    with_task = router(x, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(without.logits_SE, with_task.logits_SE)
    torch.testing.assert_close(without.logits_SE, x.flatten(0, 1) @ router.weight[0])


def test_every_router_gets_its_own_gradient_and_absent_tasks_get_zero() -> None:
    router, x = router_and_input()
    task = torch.tensor([2, 0, 2, 0])
    upstream = torch.randn(20, 6)
    (router(x, task).logits_SE * upstream).sum().backward()
    expected = torch.zeros(3, 8, 6).index_add(0, task, x.transpose(1, 2) @ upstream.view(4, 5, 6))
    assert router.weight.grad is not None
    torch.testing.assert_close(router.weight.grad, expected)
    assert not router.weight.grad[1].any()


def test_no_rows_still_give_a_zero_gradient() -> None:
    router, x = router_and_input()
    routing = router(x[:0], torch.zeros(0, dtype=torch.int64))
    routing.gates_SK.sum().backward()
    assert routing.experts_SK.shape == (0, 2)
    assert router.weight.grad is not None
    assert not router.weight.grad.any()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=8), st.integers(1, 6))
def test_ties_break_by_the_lower_index(logits: list[list[int]], top_k: int) -> None:
    router = TaskRouter(width=6, num_experts=6, num_tasks=1, top_k=top_k)
    router.weight.data.copy_(torch.eye(6)[None])
    experts = router(torch.tensor([logits], dtype=torch.float32), None).experts_SK
    assert experts.tolist() == [sorted(range(6), key=lambda e: (-row[e], e))[:top_k] for row in logits]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("kept", [None, [0, 3, 5]])
def test_extreme_logits_stay_finite(renormalize: bool, kept: list[int] | None) -> None:
    kept_experts = None if kept is None else torch.tensor(kept)
    router, _ = router_and_input(num_tasks=1, width=6, renormalize_gates=renormalize, kept=kept_experts)
    router.weight.data.copy_(torch.eye(6)[None])
    x = torch.tensor([[[1e4, 1e4, 0, -1e4, 0, -1e4], [-1e4, 1e4, -1e4, -1e4, -1e4, -1e4]]], requires_grad=True)
    routing = router(x, None)
    (routing.gates_SK.square().sum() + routing.probs_SE.square().sum()).backward()
    assert routing.gates_SK.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    if renormalize:
        torch.testing.assert_close(routing.gates_SK.sum(1), torch.ones(2))


def test_renormalized_gates_are_the_chosen_probabilities_over_their_sum() -> None:
    router, x = router_and_input(renormalize_gates=True)
    routing = router(x, torch.tensor([0, 1, 2, 0]))
    chosen = routing.probs_SE.gather(1, routing.experts_SK)
    torch.testing.assert_close(routing.gates_SK, chosen / chosen.sum(1, keepdim=True))


def test_kept_experts_restrict_the_choice_but_not_the_softmax() -> None:
    full, x = router_and_input(num_tasks=1, top_k=4)
    kept = torch.tensor([1, 2, 5])
    small, _ = router_and_input(num_tasks=1, kept=kept)
    small.weight.data.copy_(full.weight)
    everything, routing = full(x, None), small(x, None)
    torch.testing.assert_close(routing.probs_SE, everything.probs_SE)
    torch.testing.assert_close(routing.gates_SK, everything.probs_SE[:, kept].topk(2).values)
    assert torch.equal(routing.experts_SK, everything.probs_SE[:, kept].topk(2).indices)
    assert torch.equal(small.state_dict()["kept"], kept)


def test_noise_is_for_training_only() -> None:
    router, x = router_and_input(noise=True)
    task = torch.tensor([0, 1, 2, 0])
    router.eval()
    clean = router(x, task, streams(4, 0)).logits_SE
    assert torch.equal(clean, router(x, task).logits_SE)
    router.train()
    noisy = torch.stack([router(x, task, streams(4, epoch)).logits_SE for epoch in range(400)])
    # Wn = 0: deviation softplus(0) = log 2 around the clean logits
    torch.testing.assert_close(noisy.mean(0), clean, atol=0.2, rtol=0)
    assert (noisy - clean).std().item() == pytest.approx(0.6931, rel=0.02)
    torch.autograd.backward(noisy.sum())
    assert router.noise_weight is not None
    assert router.noise_weight.grad is not None
    assert router.noise_weight.grad.any()


def test_noise_depends_on_the_seed_and_the_row_s_stream_alone() -> None:
    router, x = router_and_input(noise=True)
    task, stream = torch.tensor([0, 1, 2, 0]), streams(4, 7)
    noisy = router(x, task, stream).logits_SE.unflatten(0, (4, 5))
    torch.manual_seed(1)
    for row in range(4):
        rows = slice(row, row + 1)
        torch.testing.assert_close(router(x[rows], task[rows], stream[rows]).logits_SE, noisy[row])
    noise = noisy - router.eval()(x, task).logits_SE.unflatten(0, (4, 5))
    other, _ = router_and_input(noise=True, seed=2)
    other.load_state_dict(router.state_dict())
    assert (noise[0] - noise[3]).abs().min() > 0
    assert (other(x, task, stream).logits_SE.unflatten(0, (4, 5)) - noisy).abs().min() > 0


def test_noise_without_streams_is_refused() -> None:
    router, x = router_and_input(noise=True)
    with pytest.raises(ValueError, match="turns of the images"):
        router(x, torch.tensor([0, 1, 2, 0]))


def test_routing_is_float32_under_bfloat16_weights() -> None:
    router, x = router_and_input()
    router.to(torch.bfloat16)
    x = x.bfloat16()
    task = torch.tensor([2, 0, 2, 1])
    routing = router(x, task)
    exact = torch.bmm(x.double(), router.weight.double()[task]).flatten(0, 1)
    assert routing.logits_SE.dtype == routing.gates_SK.dtype == torch.float32
    torch.testing.assert_close(routing.logits_SE.double(), exact, atol=1e-6, rtol=1e-6)


def test_initial_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(0)
    first, _ = router_and_input(seed=7)
    torch.manual_seed(1)
    again, _ = router_and_input(seed=7)
    other, _ = router_and_input(seed=8)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_top_k_beyond_the_choosable_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k 3"):
        TaskRouter(width=8, num_experts=6, num_tasks=1, top_k=3, kept=torch.tensor([0, 1]))


def test_bfloat16_tokens_are_kept_as_they_are_for_backward() -> None:
    router, x = router_and_input()
    x = x.bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        routing = router(x, torch.tensor([2, 0, 2, 1]))
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept)
    assert not any(tensor.dtype == torch.float32 and tensor.numel() == x.numel() for tensor in kept)
    routing.logits_SE.sum().backward()
    exact = router.weight[[2, 0, 2, 1]].sum(-1)[:, None].expand_as(x)
    torch.testing.assert_close(x.grad, exact.bfloat16())
