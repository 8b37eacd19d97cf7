"""The matching loss: exact at its edges, equal to plain NumPy, and the same on any number of ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.func import functional_call

from configs.schema import MatchingConfig
from model.layer_routing import ExpertLayerInfo, LayerRouting, routing_sums
from model.matching import Matching, MatchingResult, conditional_entropy, load_balance, mutual_information
from model.router import TaskRouter
from tests.ranks import run_ranks

TASKS, EXPERTS, TOP_K, WIDTH, TOKENS = 3, 5, 2, 4, 6
LAYERS = [
    ExpertLayerInfo(name="shared", kind="mlp", block=0, num_experts=EXPERTS, top_k=TOP_K, sees_task=False),
    ExpertLayerInfo(name="one", kind="mlp", block=1, num_experts=EXPERTS, top_k=TOP_K, sees_task=True),
    ExpertLayerInfo(name="two", kind="attention", block=2, num_experts=EXPERTS, top_k=TOP_K, sees_task=True),
]


def uniform(tasks: int) -> Tensor:
    return torch.full((tasks,), 1 / tasks, dtype=torch.float64)


def numpy_information(S: np.ndarray, prior: np.ndarray) -> float:
    joint = prior[:, None] * S
    marginal = joint.sum(0)
    total = 0.0
    for t, e in zip(*np.nonzero(joint > 1e-300), strict=True):
        total += joint[t, e] * math.log(joint[t, e] / (prior[t] * marginal[e]))
    return total


@st.composite
def distributions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    tasks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    # Integers: zeros are common, and every row has some mass.
    mass = draw(hnp.arrays(np.int64, (tasks, experts), elements=st.integers(0, 9))).astype(float)
    mass[:, 0] += mass.sum(1) == 0
    prior = draw(hnp.arrays(np.int64, tasks, elements=st.integers(1, 9))).astype(float)
    return mass / mass.sum(1, keepdims=True), prior / prior.sum()


@given(distributions())
def test_mutual_information_equals_its_definition(case: tuple[np.ndarray, np.ndarray]) -> None:
    S, prior = case
    value = mutual_information(torch.from_numpy(S), torch.from_numpy(prior)).item()
    assert value == pytest.approx(numpy_information(S, prior), abs=1e-12)
    assert -1e-12 <= value <= min(math.log(S.shape[0]), math.log(S.shape[1])) + 1e-12


@given(distributions())
def test_information_and_conditional_entropy_add_up_to_the_entropy_of_experts(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    S, prior = map(torch.from_numpy, case)
    whole = torch.special.entr(prior @ S).sum()
    assert torch.allclose(mutual_information(S, prior) + conditional_entropy(S, prior), whole, atol=1e-12)


@given(distributions())
def test_gradients_are_finite_also_at_zero(case: tuple[np.ndarray, np.ndarray]) -> None:
    S = torch.from_numpy(case[0]).requires_grad_()
    prior = torch.from_numpy(case[1])
    (gradient,) = torch.autograd.grad(mutual_information(S, prior) + conditional_entropy(S, prior), S)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("tasks", [2, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_routers_have_exactly_no_information(tasks: int, dtype: torch.dtype) -> None:
    S = torch.full((tasks, 15), 1 / 15, dtype=dtype)
    assert mutual_information(S, uniform(tasks).to(dtype)).item() == 0.0


def test_tasks_that_share_one_uneven_row_have_exactly_no_information() -> None:
    row = torch.rand(9, dtype=torch.float64).softmax(0)
    assert mutual_information(row.expand(13, 9), uniform(13)).item() == 0.0


@pytest.mark.parametrize("tasks", [2, 4, 13])
def test_private_experts_reach_the_bound(tasks: int) -> None:
    value = mutual_information(torch.eye(tasks, tasks + 2, dtype=torch.float64), uniform(tasks))
    assert value.item() == pytest.approx(math.log(tasks), abs=1e-12)


def test_finite_differences_agree() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return mutual_information(x.softmax(-1), prior)

    assert torch.autograd.gradcheck(loss, logits)


def test_load_balance_is_one_when_even_and_rises_with_collapse() -> None:
    tokens = torch.tensor([8.0])
    even = load_balance(torch.full((1, 4), 2.0), torch.full((1, 4), 2.0), tokens, 1)
    collapsed = load_balance(torch.tensor([[8.0, 0, 0, 0]]), torch.tensor([[8.0, 0, 0, 0]]), tokens, 1)
    assert even.item() == 1.0
    assert collapsed.item() == 4.0


def test_load_balance_over_tasks_sees_a_private_expert_per_task() -> None:
    counts_TE = 6 * torch.eye(4)[:3]
    tokens_T = torch.tensor([6.0, 6.0, 6.0])
    even_TE = torch.full((3, 4), 1.5)
    assert load_balance(counts_TE, counts_TE, tokens_T, 1, over="task") == pytest.approx(4.0)
    assert load_balance(counts_TE, counts_TE, tokens_T, 1) == pytest.approx(4 / 3)
    assert load_balance(even_TE, even_TE, tokens_T, 1, over="task") == pytest.approx(1.0)
    absent_T = torch.tensor([6.0, 0.0, 0.0])
    assert load_balance(counts_TE * absent_T[:, None] / 6, counts_TE, absent_T, 1, over="task") == pytest.approx(4.0)


def layer_routing(info: ExpertLayerInfo, weight_TDE: Tensor, x_RND: Tensor, task_R: Tensor) -> LayerRouting:
    """What a layer with these routers reports."""
    router = TaskRouter(width=WIDTH, num_experts=EXPERTS, num_tasks=TASKS, top_k=TOP_K)
    routing = functional_call(router, {"weight": weight_TDE}, (x_RND, task_R))
    member = torch.nn.functional.one_hot(task_R, TASKS).T.float()
    prob, tokens, counts, z, entropy = routing_sums(routing, member, None)
    return LayerRouting(info=info, prob_sum_TE=prob, tokens_T=tokens, counts_TE=counts, z_sum=z, entropy_sum_T=entropy)


def route(weights: Tensor, x_RND: Tensor, task_R: Tensor) -> list[LayerRouting]:
    """Routing of all layers; weights (layers, T, D, E)."""
    return [layer_routing(info, weight, x_RND, task_R) for info, weight in zip(LAYERS, weights, strict=True)]


def example(seed: int, tasks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(LAYERS), TASKS, WIDTH, EXPERTS, generator=source)
    return weights, torch.randn(len(tasks), TOKENS, WIDTH, generator=source), torch.tensor(tasks)


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    weights, x, tasks = example(0, [0, 0, 1, 2])
    config = MatchingConfig(weight=0.5, load_balance_weight=0.25, z_loss_weight=0.125)
    routing = route(weights, x, tasks)
    result = Matching(config, LAYERS, TASKS)(routing, None)

    S = torch.stack([torch.bmm(x, weights[1][tasks])[tasks == t].softmax(-1).mean((0, 1)) for t in range(TASKS)])
    assert result.mutual_information["one"].item() == pytest.approx(
        numpy_information(S.double().numpy(), np.full(TASKS, 1 / TASKS)), rel=1e-5
    )
    z = sum((layer.z_sum / (len(tasks) * TOKENS)).item() for layer in routing)
    expected = 0.25 * sum(result.load_balance.values()) - 0.5 * sum(result.mutual_information.values()) + 0.125 * z
    assert result.loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert set(result.mutual_information) == set(result.conditional_entropy) == {"one", "two"}
    assert set(result.load_balance) == {"shared", "one", "two"}


def numpy_loss(config: MatchingConfig, weights: np.ndarray, x: np.ndarray, tasks: np.ndarray) -> float:
    """The definition, token by token in float64."""
    total = 0.0
    for info, weight in zip(LAYERS, weights, strict=True):
        logits = np.einsum("rnd,rde->rne", x, weight[tasks])
        partition = np.log(np.exp(logits).sum(-1, keepdims=True))
        probs = np.exp(logits - partition)
        chosen = np.argsort(-logits, axis=-1)[..., :TOP_K]
        share = np.bincount(chosen.ravel(), minlength=EXPERTS) / chosen.size
        total += config.load_balance_weight * EXPERTS * (share * probs.mean((0, 1))).sum()
        total += config.z_loss_weight * np.square(partition).mean()
        if info.sees_task:
            S = np.stack([probs[tasks == task].mean((0, 1)) for task in range(TASKS)])
            total -= config.weight * numpy_information(S, np.full(TASKS, 1 / TASKS))
    return total


def test_loss_and_gradient_through_real_routers_equal_numpy_and_its_finite_differences() -> None:
    weights, x, tasks = example(6, [0, 0, 1, 2])
    config = MatchingConfig(weight=0.5, load_balance_weight=0.25, z_loss_weight=0.125)
    weights.requires_grad_()
    loss = Matching(config, LAYERS, TASKS)(route(weights, x, tasks), None).loss
    loss.backward()
    plain = [array.detach().double().numpy() for array in (weights, x)]
    assert loss.item() == pytest.approx(numpy_loss(config, *plain, tasks.numpy()), rel=1e-6)

    numeric = np.zeros_like(plain[0])
    for place in np.ndindex(numeric.shape):
        step = np.zeros_like(numeric)
        step[place] = 1e-5
        ends = [numpy_loss(config, plain[0] + sign * step, plain[1], tasks.numpy()) for sign in (1, -1)]
        numeric[place] = (ends[0] - ends[1]) / 2e-5
    assert weights.grad is not None
    assert np.allclose(weights.grad.numpy(), numeric, rtol=1e-4, atol=1e-6)


def information_of(weights_TDE: Tensor, x_RND: Tensor, task_R: Tensor) -> float:
    """I(T;E) of a layer with these routers."""
    routing = [layer_routing(LAYERS[1], weights_TDE, x_RND, task_R)]
    return Matching(MatchingConfig(), LAYERS[1:2], TASKS)(routing, None).mutual_information["one"].item()


def test_real_routers_give_the_known_answers() -> None:
    x, tasks = torch.ones(TASKS, TOKENS, WIDTH), torch.arange(TASKS)
    assert information_of(torch.zeros(TASKS, WIDTH, EXPERTS), x, tasks) == 0.0
    private = 100.0 * torch.eye(TASKS, EXPERTS)[:, None].expand(TASKS, WIDTH, EXPERTS)
    assert information_of(private, x, tasks) == pytest.approx(math.log(TASKS), rel=1e-6)
    # One router for all tasks, and the same tokens: which task it is says nothing about the expert.
    source = torch.Generator().manual_seed(8)
    one = torch.randn(WIDTH, EXPERTS, generator=source).expand(TASKS, WIDTH, EXPERTS)
    same = torch.randn(TOKENS, WIDTH, generator=source).expand(TASKS, TOKENS, WIDTH)
    assert information_of(one, same, tasks) == 0.0


def test_unseen_tasks_are_left_out_then_remembered() -> None:
    matching = Matching(MatchingConfig(ema_decay=0.75), LAYERS, TASKS)
    weights, x, tasks = example(1, [0, 0, 1])
    first = matching(route(weights, x, tasks), None)

    def S_of(task: int, rows: Tensor, names: Tensor) -> np.ndarray:
        return torch.bmm(rows, weights[1][names])[names == task].softmax(-1).mean((0, 1)).double().numpy()

    met = np.stack([S_of(t, x, tasks) for t in (0, 1)])
    assert first.mutual_information["one"].item() == pytest.approx(numpy_information(met, np.full(2, 0.5)), rel=1e-5)
    assert matching.state_dict()["one"][2].abs().sum() == 0

    _, x2, tasks2 = example(2, [1, 2, 2])
    second = matching(route(weights, x2, tasks2), None)
    mixed = np.stack([met[0], S_of(1, x2, tasks2), S_of(2, x2, tasks2)])
    assert second.mutual_information["one"].item() == pytest.approx(
        numpy_information(mixed, np.full(3, 1 / 3)), rel=1e-5
    )
    running = matching.state_dict()["one"].numpy()
    assert np.allclose(running[0], met[0], atol=1e-6)
    assert np.allclose(running[1], 0.75 * met[1] + 0.25 * mixed[1], atol=1e-6)
    assert np.allclose(running[2], mixed[2], atol=1e-6)


def test_state_travels() -> None:
    weights, x, tasks = example(3, [0, 1])
    matching = Matching(MatchingConfig(), LAYERS, TASKS)
    matching(route(weights, x, tasks), None)
    state = matching.state_dict()
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in state.values())
    copy = Matching(MatchingConfig(), LAYERS, TASKS)
    copy.load_state_dict(state)
    _, x2, tasks2 = example(4, [2])
    again = [m(route(weights, x2, tasks2), None).loss for m in (matching, copy)]
    assert again[0] == again[1]
    with pytest.raises(ValueError, match="another model"):
        Matching(MatchingConfig(), LAYERS[:2], TASKS).load_state_dict(state)


def test_a_prior_weighs_tasks() -> None:
    weights, x, tasks = example(5, [0, 1, 2])
    result = Matching(MatchingConfig(), LAYERS, TASKS, prior=[6, 3, 1])(route(weights, x, tasks), None)
    S = torch.bmm(x, weights[1][tasks]).softmax(-1).mean(1).double().numpy()
    assert result.mutual_information["one"].item() == pytest.approx(
        numpy_information(S, np.array([0.6, 0.3, 0.1])), rel=1e-5
    )
    with pytest.raises(ValueError, match="one per task"):
        Matching(MatchingConfig(), LAYERS, TASKS, prior=[1, 0, 1])


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), size=st.sampled_from([0.0, 1.0, 1e4]), tasks=st.lists(st.integers(0, 2), max_size=5))
def test_any_logits_and_any_pairs_give_finite_losses_and_gradients(seed: int, size: float, tasks: list[int]) -> None:
    weights, x, task_R = example(seed, sorted(tasks))
    weights = (weights.sign() * size).requires_grad_()
    config = MatchingConfig(load_balance_weight=0.1, z_loss_weight=0.1)
    result = Matching(config, LAYERS, TASKS)(route(weights, x, task_R.long()), None)
    (gradient,) = torch.autograd.grad(result.loss, weights)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(gradient).all()


STEPS = 3
EVERY = MatchingConfig(weight=1.0, load_balance_weight=0.3, z_loss_weight=0.1, ema_decay=0.5)


def steps_on(rank: int, world: int) -> tuple[list[MatchingResult], Tensor, dict[str, Tensor]]:
    """Three passes whose pairs are dealt to the ranks; the second one misses a task. Their gradients accumulate."""
    weights = example(7, [0])[0].requires_grad_()
    gradient = torch.zeros_like(weights)
    matching = Matching(EVERY, LAYERS, TASKS)
    results = []
    for step in range(STEPS):
        _, x, tasks = example(10 + step, [0, 0, 0, 1, 1] if step == 1 else [0, 1, 1, 2, 2])
        result = matching(route(weights, x[rank::world], tasks[rank::world]), None)
        # Divided by the world, and summed over ranks by the caller: the average that data parallelism takes.
        gradient += torch.autograd.grad(result.loss / world, weights)[0]
        results.append(result)
    for result in results:
        result.loss.detach_()
    return results, gradient, matching.state_dict()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_one_process(world: int) -> None:
    alone, gradient, state = steps_on(0, 1)
    ranks = run_ranks(steps_on, world)
    for results, _, rank_state in ranks:
        for mine, reference in zip(results, alone, strict=True):
            assert torch.allclose(mine.loss, reference.loss, rtol=1e-6, atol=1e-7)
            for name, value in reference.mutual_information.items():
                assert torch.allclose(mine.mutual_information[name], value, rtol=1e-5)
        assert all(torch.allclose(rank_state[name], state[name], atol=1e-7) for name in state)
        assert all(torch.equal(rank_state[name], ranks[0][2][name]) for name in state)
    assert torch.allclose(sum(rank[1] for rank in ranks), gradient, rtol=1e-5, atol=1e-6)


def test_passes_with_the_same_statistics_average_to_one_pass_over_all_of_them() -> None:
    weights, x, tasks = example(9, [0, 1, 1, 2])
    weights.requires_grad_()
    whole = Matching(EVERY, LAYERS, TASKS)(route(weights, torch.cat([x, x]), torch.cat([tasks, tasks])), None).loss
    matching = Matching(EVERY, LAYERS, TASKS)
    passes = [matching(route(weights, x, tasks), None).loss for _ in range(2)]
    assert torch.allclose(sum(passes) / 2, whole, rtol=1e-6)
    expected, averaged = (torch.autograd.grad(loss, weights)[0] for loss in (whole, sum(passes) / 2))
    assert torch.allclose(averaged, expected, rtol=1e-5, atol=1e-7)


@given(seed=st.integers(0, 2**16))
def test_passes_over_parts_have_at_least_the_information_of_the_whole(seed: int) -> None:
    """I(T;E) is convex in P(e | t), so what accumulation averages is never below that of the whole batch."""
    weights, x, tasks = example(seed, [0, 1, 2, 0, 1, 2])
    whole = information_of(weights[0], x, tasks)
    parts = [information_of(weights[0], x[part], tasks[part]) for part in (slice(0, 3), slice(3, 6))]
    assert sum(parts) / 2 >= whole - 1e-6
