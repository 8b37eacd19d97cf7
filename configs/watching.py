"""How a run is seen while it trains: the parts `telemetry` and `trackers` of its configuration."""

from typing import Annotated

from pydantic import Field, model_validator

from configs.section import Section


class TelemetryConfig(Section):
    """Prometheus metrics, served by every rank while it trains."""

    port: Annotated[int, Field(ge=0, le=65535)] | None = 0
    """Rank r of a node serves on port + r; 0: on any free port; None: nothing is served. RUN/targets/ says where."""
    address: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets a Prometheus on another machine read the metrics, and everybody else."""
    task_label: bool = True
    """Count an expert's tokens per task; False: per expert only, which makes fewer series."""


class TrackersConfig(Section):
    """Copies of metrics.jsonl and of the evaluations for other programs, written by DeepSpeed's monitor on rank 0."""

    tensorboard: bool = False
    """Write event files to RUN/trackers/tensorboard; needs the extra `tensorboard`."""
    csv: bool = False
    """Write RUN/trackers/csv, one file of steps and values per metric."""
    wandb_project: str | None = None
    """Send to this project of Weights & Biases; needs the extra `wandb`. None: nothing is sent."""
    wandb_team: str | None = None
    """Team that owns the project; None: the user's default."""

    @model_validator(mode="after")
    def _check(self) -> "TrackersConfig":
        if self.wandb_team is not None and self.wandb_project is None:
            raise ValueError("wandb_team needs wandb_project")
        return self
