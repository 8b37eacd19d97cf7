"""The configuration of a run: typed, frozen, validated on load.

One class per subject, one field per decision; units stand in the names. `configs.load` fills these classes from YAML
and dotted overrides. Numbers that depend on the world size (accumulation, shards of experts) are checked where the
world is known, in `cluster.groups`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.augmentation import AugmentConfig
from configs.errors import UserError
from configs.section import NonNegative, Positive, Section
from configs.task_definitions import Definitions, derive_tasks
from configs.tasks import TaskSpec, TaskTable, resolve_tasks, unknown_task
from configs.watching import TelemetryConfig, TrackersConfig
from configs.zero_stage import ZeroStage

Init = Literal["standard", "published"]
Weights = dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]]

# Sizes of the published models (arXiv 2212.08066, official configuration), and one for CPUs.
MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "width": 128,
        "depth": 4,
        "heads": 4,
        "patch_size": 8,
        "attention_experts": 8,
        "attention_top_k": 2,
        "mlp_experts": 8,
        "mlp_top_k": 2,
    },
    "small": {
        "width": 384,
        "depth": 12,
        "heads": 6,
        "patch_size": 16,
        "attention_experts": 15,
        "attention_top_k": 6,
        "mlp_experts": 16,
        "mlp_top_k": 4,
    },
    "base": {
        "width": 768,
        "depth": 12,
        "heads": 12,
        "patch_size": 16,
        "attention_experts": 24,
        "attention_top_k": 12,
        "mlp_experts": 16,
        "mlp_top_k": 4,
    },
}


class ModelConfig(Section):
    """The vision transformer and its expert layers (DESIGN 3)."""

    preset: Literal["tiny", "small", "base"] | None = "tiny"
    """Fills every size that is not given."""
    width: Positive
    """Token width D."""
    depth: Positive
    """Number of blocks."""
    heads: Positive
    """Heads of a dense attention layer; also fixes the default head width."""
    head_width: Positive | None = None
    """Width d_h of one attention head, dense or expert; None: 2 * width / heads, as published."""
    patch_size: Positive
    """Side of a square patch in pixels."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of a dense MLP over `width`; an expert's hidden width is mlp_ratio * width / mlp_top_k."""
    placement: Literal["alternate", "every", "mlp", "attention", "dense"] = "alternate"
    """alternate: expert attention in even blocks, expert MLP in odd ones (published); every: both in every block;
    mlp, attention: only that kind, in every block; dense: no experts at all, an ordinary vision transformer."""
    attention_experts: Positive
    """Experts E of an expert attention layer."""
    attention_top_k: Positive
    """Experts K chosen per token in an expert attention layer."""
    mlp_experts: Positive
    """Experts E of an expert MLP layer."""
    mlp_top_k: Positive
    """Experts K chosen per token in an expert MLP layer."""
    routers: Literal["task", "shared"] = "task"
    """task: one router per task in every expert layer that sees the task; shared: one router for all tasks."""
    shared_blocks: NonNegative = 0
    """The first s blocks run once per image; their routers see no task. 0: the published model. All `depth` blocks may
    be shared (task_embedding: none): only the heads then differ between tasks."""
    task_embedding: Literal["every_block", "first", "none"] = "every_block"
    """Where the task's vector is added to its tokens: before every task-dependent block, before the first, or never."""
    renormalize_gates: bool = False
    """Scale the K chosen gates to sum 1; False: use the full softmax's values as they are (published)."""
    router_noise: bool = False
    """Noisy top-k gating (arXiv 1701.06538), in training only."""
    init: Init = "standard"
    """standard: experts keep the variance of what passes them; published: experts start near zero and task embeddings
    at deviation 1, as in the published model."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", cls.model_fields["preset"].default)
        sizes = MODEL_PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        return {**sizes, **values}

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.attention_top_k > self.attention_experts:
            raise ValueError(
                f"attention_top_k {self.attention_top_k} exceeds attention_experts {self.attention_experts}"
            )
        if self.mlp_top_k > self.mlp_experts:
            raise ValueError(f"mlp_top_k {self.mlp_top_k} exceeds mlp_experts {self.mlp_experts}")
        if (hidden := self.mlp_ratio * self.width / self.mlp_top_k) != int(hidden):
            raise ValueError(f"mlp_ratio * width / mlp_top_k = {hidden:g} is not whole: change one of the three")
        if self.shared_blocks > self.depth:
            raise ValueError(f"shared_blocks {self.shared_blocks} exceeds depth {self.depth}")
        if self.shared_blocks == self.depth and self.task_embedding != "none":
            raise ValueError(f"task_embedding '{self.task_embedding}' needs a block that is not shared: set it to none")
        if self.head_width is None and (2 * self.width) % self.heads:
            raise ValueError(f"2 * width {self.width} is not divisible by heads {self.heads}: set head_width")
        return self

    @property
    def attention_head_width(self) -> int:
        """Width d_h of one attention head."""
        return self.head_width or 2 * self.width // self.heads

    @property
    def expert_hidden(self) -> int:
        """Hidden width H of one expert MLP."""
        return int(self.mlp_ratio * self.width / self.mlp_top_k)

    @property
    def dense_hidden(self) -> int:
        """Hidden width of a dense MLP."""
        return int(self.mlp_ratio * self.width)

    def has_expert_attention(self, block: int) -> bool:
        """Whether the attention of block `block` (from 0) is made of experts."""
        return self.placement in ("every", "attention") or (self.placement == "alternate" and block % 2 == 0)

    def has_expert_mlp(self, block: int) -> bool:
        """Whether the MLP of block `block` (from 0) is made of experts."""
        return self.placement in ("every", "mlp") or (self.placement == "alternate" and block % 2 == 1)


class MatchingConfig(Section):
    """Losses on routing statistics (DESIGN 3): what matches experts with tasks."""

    weight: float = Field(0.005, ge=0)
    """w_mi: weight of the mutual information I(T;E), summed over expert layers."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Decay of the running S[t, e] that stands in for tasks which a step does not see."""
    task_prior: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """P(t) up to a factor, per task, of the run or not; 1 where not given."""
    load_balance_weight: float = Field(0.0, ge=0)
    """Weight of the switch load-balance loss (arXiv 2101.03961)."""
    load_balance_over: Literal["batch", "task"] = "batch"
    """batch: experts shall be used evenly by all tokens together; task: by the tokens of every task on its own."""
    z_loss_weight: float = Field(0.0, ge=0)
    """Weight of the router z-loss (arXiv 2202.08906)."""


class DataConfig(Section):
    """Shards, the plan over them, and augmentation."""

    train: str = "data/rooms/train"
    """Folder of training shards with its index.json, or its URL: http, https, s3, gs or any other of fsspec."""
    val: str = "data/rooms/val"
    """Folder of validation shards with its index.json, or its URL."""
    cache_dir: str | None = None
    """Folder on a disk of the node that keeps shards from URLs; None: in TMPDIR, or else in the user's cache folder."""
    cache_gib: float = Field(20.0, gt=0)
    """Size in GiB that the shards kept there never exceed, whichever runs and processes of the node use the folder."""
    image_size: Positive = 64
    """Side of the square model input in pixels."""
    tasks_per_image: Positive | None = None
    """Tasks that each image serves in a step; None: every task whose label it has."""
    task_shares: Weights = Field(default_factory=dict)
    """Relative number of pairs per task in a global batch, of the run or not; 1 where not given. Matters with
    tasks_per_image, and with balance: quota."""
    balance: Literal["once", "quota"] = "once"
    """once: each sample once per epoch, tasks as even as its labels allow; quota: every task has its share of every
    batch (one task per image), to within one image if shares are equal and two if not, and walks its own passes over
    the samples that have its label."""
    shuffle_window_shards: Positive = 8
    """Samples are shuffled within a sliding window of about this many shards; bounds the shards open at once."""
    workers: NonNegative = 1
    """Loader processes per rank; 0 loads in the training process."""
    max_bad_samples: NonNegative = 0
    """Training samples with a damaged image or label that a run may leave out, over all ranks, before it stops; 0 stops
    at the first. What is left out is listed in RUN/skipped.jsonl; evaluations leave nothing out."""
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.balance == "quota" and self.tasks_per_image not in (None, 1):
            raise ValueError(
                f"tasks_per_image {self.tasks_per_image} does not go with balance: quota, where an image serves one "
                "task: leave it out or choose balance: once"
            )
        return self


class OptimConfig(Section):
    """AdamW with warm-up and cosine decay."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the last step."""
    warmup_steps: NonNegative = 20
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's betas."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay of matrices; biases, norms, embeddings and task weights are never decayed."""
    clip_norm: float = Field(1.0, ge=0)
    """Global gradient norm limit; 0 switches clipping off."""


class TrainConfig(Section):
    """How long, how much at a time, in which precision."""

    init_from: str | None = None
    """File of weights to start from: what `modsquad export` wrote, or a dense ViT (names of timm, DeiT or MAE;
    safetensors or torch); None: random."""
    steps: Positive = 100
    """Optimizer steps."""
    images_per_step: Positive = 8
    """Images of a global batch: all ranks, all accumulation steps."""
    micro_batch: Positive | None = None
    """Images per rank and forward pass; None: no accumulation."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and activations; master weights and routing are fp32 always."""
    activation_checkpointing: Literal["none", "recompute", "recompute_offload"] = "none"
    """recompute: keep only block inputs and run blocks again in backward; recompute_offload: keep those on the CPU."""
    task_weighting: Literal["fixed", "uncertainty"] = "fixed"
    """fixed: `task_weights`; uncertainty: learned homoscedastic weights (arXiv 1705.07115)."""
    task_weights: Weights = Field(default_factory=dict)
    """Loss weight per task, of the run or not; 1 where not given."""
    log_every_steps: Positive = 10
    """Steps between lines of metrics.jsonl."""
    max_bad_steps: Positive = 10
    """Consecutive steps with a non-finite gradient before the run stops."""


class ParallelConfig(Section):
    """How a world of ranks shares the work."""

    ep_size: Positive = 1
    """Ranks over which every expert layer is sharded; must divide the world and the number of experts."""
    zero_stage: ZeroStage = 1
    """DeepSpeed ZeRO stage. Stage 3 does not take expert layers; `ep_size` shards them, stages 1 and 2 the moments."""
    bucket_elements: Positive = 50_000_000
    """Gradients that ZeRO reduces at a time, and weights that it gathers; they take 8 bytes of memory each."""
    overlap_communication: bool = False
    """Reduce gradients on the GPU while backward goes on (ZeRO 1 and 2)."""
    expert_placement: Literal["in_order", "task_affine"] = "in_order"
    """in_order: experts lie on the ranks in order, tasks are dealt alike; task_affine: at start and at checkpoints,
    experts and pairs move to where few tokens leave their rank. Losses are the same."""
    shadowed_experts: NonNegative = 2
    """With task_affine: up to so many experts of a layer are computed on every rank, where that saves bytes or relieves
    busy ranks; weights travel instead of tokens. Takes memory: the layer's present experts once more, per layer."""
    timeout_seconds: float = Field(600.0, gt=0)
    """A collective that takes longer ends the run with an error rather than a hang."""


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    every_steps: Positive = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Positive = 2
    """Intact checkpoints kept; older ones go after a newer one is safe."""
    keep_every: Positive | None = None
    """Checkpoints of steps divisible by this stay for good, beside the last ones; None: none."""
    async_save: bool = True
    """Write in the background while training goes on; False: wait until each checkpoint is complete."""


class EvaluateConfig(Section):
    """Evaluation on the validation shards."""

    every_steps: NonNegative = 0
    """Steps between evaluations during training; 0: only at the end."""
    images: Positive | None = None
    """Images to evaluate, from the start of the validation index; None: all."""
    batch_size: Positive = 8
    """Images per rank and forward pass."""


class RunConfig(Section):
    """Everything about one run."""

    run_dir: str = "runs/modsquad"
    """Folder of the run: config, metrics, checkpoints, evaluation, report."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of initialisation, order, task assignment and augmentation."""
    define_tasks: Definitions = Field(default_factory=dict)
    """Tasks beside those of the table, each by how it differs from a row of it; those that the training shards define
    need not be repeated."""
    tasks: tuple[str, ...] | str = "taskonomy"
    """Names of tasks or of groups (taskonomy, pascal_context)."""
    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({}))
    matching: MatchingConfig = MatchingConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    trackers: TrackersConfig = TrackersConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        table = self.task_table
        try:
            resolve_tasks(self.tasks, table)
        except UserError as error:
            raise ValueError(f"tasks: {error}") from None
        for field, given in (
            ("train.task_weights", self.train.task_weights),
            ("data.task_shares", self.data.task_shares),
            ("matching.task_prior", self.matching.task_prior),
        ):
            if unknown := [task for task in given if task not in table]:
                raise ValueError(f"{field}.{unknown[0]}: {unknown_task(unknown[0], table)}")
        if self.data.image_size % self.model.patch_size:
            raise ValueError(
                f"data.image_size {self.data.image_size} is not a multiple of model.patch_size {self.model.patch_size}"
            )
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(f"optim.warmup_steps {self.optim.warmup_steps} exceeds train.steps {self.train.steps}")
        return self

    @property
    def task_table(self) -> TaskTable:
        """All tasks that the configuration knows."""
        return derive_tasks(self.define_tasks)

    @property
    def task_specs(self) -> tuple[TaskSpec, ...]:
        """The run's tasks, in the order that defines task ids."""
        return resolve_tasks(self.tasks, self.task_table)
