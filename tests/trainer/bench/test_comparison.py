"""Cases as they are measured: exact memory, fresh gradients, rows in order."""

import torch
from torch import Tensor, nn

from trainer.bench.comparison import Batch, Case, Row, Settings, compare, layer_case, saved_bytes, token_batches

QUICK = Settings(quick=True)


def test_saved_bytes_are_those_of_distinct_storages_without_parameters() -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    own = 16 * 8 * 4
    # A product saves its input and the weight; tanh saves its output.
    assert saved_bytes(lambda: layer(x), layer.parameters()) == own
    assert saved_bytes(lambda: layer(x), []) == own + 8 * 8 * 4
    assert saved_bytes(lambda: layer(x).tanh(), layer.parameters()) == 2 * own
    assert saved_bytes(lambda: layer(x) + layer(x[:4]).sum(), layer.parameters()) == own


def test_saved_bytes_count_what_our_own_functions_save() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.repeat(2))
            return x.clone()

    x = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: Twice.apply(x), []) == 2 * 10 * 4


def test_a_step_does_not_add_to_the_gradients_of_the_last() -> None:
    layer = nn.Linear(128, 128)
    case = layer_case("linear", layer)
    batch = token_batches(QUICK, "fp32")(0)
    case.step(batch)
    assert layer.weight.grad is not None
    assert batch.x.grad is not None
    first = layer.weight.grad.clone(), batch.x.grad.clone()
    case.step(batch)
    assert torch.equal(layer.weight.grad, first[0])
    assert torch.equal(batch.x.grad, first[1])


def test_several_passes_add_their_gradients_and_keep_one_graph_at_a_time() -> None:
    layer = nn.Linear(128, 128)

    def forward(batch: Batch) -> tuple[Tensor, Tensor | None]:
        return layer(batch.x), batch.grad

    once, twice = (Case(name="", module=layer, passes=[forward] * count) for count in (1, 2))
    batch = token_batches(QUICK, "fp32")(0)
    once.step(batch)
    assert layer.weight.grad is not None
    first = layer.weight.grad.clone()
    twice.step(batch)
    torch.testing.assert_close(layer.weight.grad, 2 * first)
    assert once.saved_bytes(batch) == twice.saved_bytes(batch)


def test_inference_builds_no_graph() -> None:
    layer = nn.Linear(128, 128)

    def forward(batch: Batch) -> tuple[Tensor, None]:
        y = layer(batch.x)
        assert not y.requires_grad
        return y, None

    case = Case(name="", module=layer, passes=[forward], backward=False)
    batch = token_batches(QUICK, "fp32")(0)
    case.step(batch)
    assert layer.weight.grad is None
    assert case.saved_bytes(batch) is None


def test_every_round_has_new_tokens_the_same_in_every_run() -> None:
    draw = token_batches(QUICK, "bf16")
    assert draw(0).x.dtype == torch.bfloat16
    assert torch.equal(draw(0).x, token_batches(QUICK, "bf16")(0).x)
    assert not torch.equal(draw(0).x, draw(1).x)


def test_rows_keep_their_order_and_what_cannot_run_stays() -> None:
    absent = Row(name="absent", timing=None, saved_bytes=None, note="not installed")
    cases = {name: layer_case(name, nn.Linear(128, 128), note=f"about {name}") for name in ("reference", "a", "b")}
    comparison = compare(
        "name",
        "title",
        "fp32",
        Settings(quick=True, rounds=2),
        cases["reference"],
        [cases["a"], absent, cases["b"]],
        token_batches(QUICK, "fp32"),
        rounds=99,
    )
    assert [row.name for row in comparison.rows] == ["a", "absent", "b"]
    assert comparison.rows[1] == absent
    assert comparison.rows[2].note == "about b"
    assert comparison.rows[0].timing is not None
    assert comparison.rows[0].timing.runs == 2
