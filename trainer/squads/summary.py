"""What an extraction measured: the numbers of squad.json, for tables and the report."""

from typing import Literal

from pydantic import Field

from trainer.run_files import Number, Record

RoutingSource = Literal["ledger", "validation"]
"""Whose counts decide which experts stay: those of the run's latest evaluation, or of a new pass over the validation
images."""


class SquadLayer(Record):
    """One expert layer of a squad.

    `kept` are the experts that stay, by their numbers in the whole model. `unaffected_share` is the share of the tokens
    in this layer, of all the squad's tasks, whose chosen experts all stay.
    """

    name: str
    kind: Literal["attention", "mlp"]
    num_experts: int
    kept: tuple[int, ...]
    unaffected_share: Number


class SquadScore(Record):
    """One task of a squad beside the whole model, on the same validation images.

    `before` is the whole model, `after` the squad. `unaffected_tokens` is the share of the task's tokens whose chosen
    experts all stay in every layer, `unaffected_images` that of images whose tokens all do: their predictions are the
    same.
    """

    task: str
    metric: str
    higher_is_better: bool
    before: Number
    after: Number
    unaffected_tokens: Number
    unaffected_images: Number

    @property
    def relative_change(self) -> float:
        """Return (after - before) / |before|; NaN when the metric before is 0 or unknown."""
        if self.before == 0:
            return float("nan")
        return (self.after - self.before) / abs(self.before)


class SquadSummary(Record):
    """A squad beside the whole model.

    `before` is the whole model, `after` the squad. MACs are those of one image for the squad's tasks; they stay, since
    every token still uses K experts. `image_size` is the model input's side in pixels, `images` how many were measured
    on.
    """

    step: int
    threshold: float
    routing: RoutingSource
    image_size: int
    images: int
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    scores: tuple[SquadScore, ...] = Field(min_length=1)
    layers: tuple[SquadLayer, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the names of the squad's tasks."""
        return tuple(score.task for score in self.scores)

    @property
    def experts(self) -> tuple[int, int]:
        """Return the experts kept and those of the whole model, over all layers."""
        return sum(len(layer.kept) for layer in self.layers), sum(layer.num_experts for layer in self.layers)
