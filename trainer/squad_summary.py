"""What an extraction measured: the numbers of squad.json, for tables and the report."""

from typing import Literal

from trainer.run_files import Number, Record


class SquadLayer(Record):
    """One expert layer of a squad.

    `kept` are the experts that stay, by their numbers in the whole model. `unaffected_share` is the share of the task's
    tokens in this layer whose chosen experts all stay.
    """

    name: str
    kind: Literal["attention", "mlp"]
    num_experts: int
    kept: tuple[int, ...]
    unaffected_share: Number


class SquadSummary(Record):
    """A squad beside the whole model, on the same validation images.

    `before` is the whole model, `after` the squad. MACs are those of one image for this one task; they stay, since
    every token still uses K experts. `unaffected_tokens` is the share of tokens whose chosen experts all stay in every
    layer, `unaffected_images` that of images whose tokens all do: their predictions are the same. `image_size` is the
    model input's side in pixels.
    """

    task: str
    step: int
    threshold: float
    image_size: int
    images: int
    metric: str
    higher_is_better: bool
    value_before: Number
    value_after: Number
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    unaffected_tokens: Number
    unaffected_images: Number
    layers: tuple[SquadLayer, ...]

    @property
    def relative_change(self) -> float:
        """Return (after - before) / |before|; NaN when the metric before is 0 or unknown."""
        if self.value_before == 0:
            return float("nan")
        return (self.value_after - self.value_before) / abs(self.value_before)

    @property
    def experts(self) -> tuple[int, int]:
        """Return the experts kept and those of the whole model, over all layers."""
        return sum(len(layer.kept) for layer in self.layers), sum(layer.num_experts for layer in self.layers)
