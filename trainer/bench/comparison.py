"""One table of the benchmark: alternatives of a layer or model, forward and backward, beside a reference.

Memory is exact: the bytes of all distinct storages that autograd saves in the forward pass, without parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from trainer.bench.harness import Timing, clock_for, interleave

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the benchmark runs.

    Attributes:
        threads: of torch.
        rounds: of every comparison; None: each comparison's own number.
        quick: sizes of a test instead of those that the limits are about.
        run: whose routing the part `comm` replays; None: that of a model trained for the purpose.
    """

    threads: int = 1
    rounds: int | None = None
    quick: bool = False
    run: Path | None = None

    @property
    def model(self) -> ModelConfig:
        """The model whose layers are measured."""
        return ModelConfig.model_validate({"preset": "tiny" if self.quick else "small"})

    @property
    def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return 32 if self.quick else 224

    @property
    def tokens(self) -> int:
        """Tokens of an image: 196 in full size."""
        return (self.image_size // self.model.patch_size) ** 2

    @property
    def layer_rows(self) -> int:
        """Images in the batch of a single layer: 32, which makes 6272 tokens."""
        return 2 if self.quick else 32


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one round of a comparison works on.

    Attributes:
        x: the input.
        grad: the gradient of the output, where backward starts from a tensor like `x`.
    """

    x: Tensor
    grad: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One alternative.

    Attributes:
        name: its row in the table.
        module: owns the parameters.
        passes: forward passes, each followed by its backward pass before the next one starts. Each returns the tensor
            from which backward starts and the gradient there; None for a scalar.
        backward: False for inference: no backward pass, nothing saved for one.
        note: what a reader should know about it.
    """

    name: str
    module: nn.Module
    passes: Sequence[Callable[[Batch], tuple[Tensor, Tensor | None]]]
    backward: bool = True
    note: str = ""

    def step(self, batch: Batch) -> None:
        """Run all passes, forward and backward, into fresh gradients."""
        batch.x.grad = None
        self.module.zero_grad(set_to_none=True)
        with torch.inference_mode(not self.backward):
            for forward in self.passes:
                y, grad = forward(batch)
                if self.backward:
                    torch.autograd.backward(y, grad)

    def saved_bytes(self, batch: Batch) -> int | None:
        """Return the bytes that autograd keeps for backward at one time; None without backward."""
        if not self.backward:
            return None
        return max(saved_bytes(lambda: forward(batch), self.module.parameters()) for forward in self.passes)  # noqa: B023


def layer_case(name: str, layer: nn.Module, note: str = "") -> Case:
    """Return the case of a layer that maps `Batch.x` to a tensor of the same shape."""
    return Case(name=name, module=layer, passes=[lambda batch: (layer(batch.x), batch.grad)], note=note)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one alternative; None where that was not, or could not run (see `note`).

    Attributes:
        name: of the alternative.
        timing: how long it takes.
        saved_bytes: what autograd keeps for backward.
        note: what a reader should know about it.
        moved_bytes: what all ranks send each other.
        held_bytes: what stays in memory.
        busiest: work of the busiest rank in any layer, over an even share.
    """

    name: str
    timing: Timing | None
    saved_bytes: int | None
    note: str = ""
    moved_bytes: int | None = None
    held_bytes: int | None = None
    busiest: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measured table.

    Attributes:
        name: of the comparison; limits refer to it.
        title: what is compared, with sizes.
        dtype: of weights and activations: fp32 or bf16.
        reference: the row that ratios refer to.
        rows: the others.
    """

    name: str
    title: str
    dtype: str
    reference: Row
    rows: tuple[Row, ...]


def compare(
    name: str,
    title: str,
    dtype: str,
    settings: Settings,
    reference: Case,
    candidates: Sequence[Case | Row],
    draw: Callable[[int], Batch],
    *,
    rounds: int,
) -> Comparison:
    """Measure the cases against the reference.

    Args:
        name, title, dtype: of the comparison.
        settings: threads, and the rounds that override `rounds`.
        reference: what ratios refer to.
        candidates: the others; a `Row` stands for one that cannot run here, and stays as it is.
        draw: number of the round -> its input.
        rounds: where `settings` says nothing.
    """
    cases = [case for case in candidates if isinstance(case, Case)]
    batch = draw(0)
    saved = {case.name: case.saved_bytes(batch) for case in (reference, *cases)}
    of_reference, timings = interleave(
        reference.step,
        {case.name: case.step for case in cases},
        draw,
        rounds=settings.rounds or rounds,
        clock=clock_for(settings.threads),
    )

    def row(case: Case, timing: Timing) -> Row:
        return Row(name=case.name, timing=timing, saved_bytes=saved[case.name], note=case.note)

    return Comparison(
        name=name,
        title=title,
        dtype=dtype,
        reference=row(reference, of_reference),
        rows=tuple(row(case, timings[case.name]) if isinstance(case, Case) else case for case in candidates),
    )


def token_batches(settings: Settings, dtype: str, *, rows: int | None = None) -> Callable[[int], Batch]:
    """Return the draw of new normal tokens and gradients (rows, N, D) for every round, so that routing is new too."""
    shape = (rows or settings.layer_rows, settings.tokens, settings.model.width)

    def draw(number: int) -> Batch:
        generator = torch.Generator().manual_seed(1 + number)
        x, grad = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(2))
        return Batch(x=x.requires_grad_(), grad=grad)

    return draw


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages that autograd saves in `forward`, other than those of `parameters`."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, torch.UntypedStorage] = {}  # keeps what was saved alive, so that no address occurs twice

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage

    def refuse(_: None) -> Tensor:
        raise AssertionError("nothing was kept: this forward pass has no backward")

    with torch.autograd.graph.saved_tensors_hooks(note, refuse):
        forward()
    return sum(storage.nbytes() for storage in saved.values())
