"""The stages of a recipe, one class a kind."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from r1mega.config.base import Closed, FolderPath, ModelPath
from r1mega.config.corpora import Phase
from r1mega.config.evaluation import Evaluation, Gate, Suite
from r1mega.config.layout import Layout
from r1mega.config.prompts import PromptSet
from r1mega.config.rollout import Reward, Sampling
from r1mega.config.training import GrpoObjective, Optimizer, PretrainTrain, Train


class StageBase(Closed):
    """What every stage has."""

    layout: Layout | None = Field(None, description="layout of this stage; left out: the recipe's")
    seed: int | None = Field(None, description="seed of this stage; left out: the recipe's")


class Pretrain(StageBase):
    """Next-token training of a model from scratch."""

    kind: Literal["pretrain"]
    architecture: FolderPath = Field(description="folder with config.json and the tokenizer's files")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    phases: list[Phase] = Field(min_length=1, description="stretches of training, in order")
    train: PretrainTrain = PretrainTrain()
    evaluation: Evaluation | None = None
    gates: list[Gate] = Field(default_factory=list, description="bounds on the last evaluation, checked before the artifact is finished")
    save_every: int = Field(100, ge=0, description="updates between the checkpoints that a run goes on from; 0: none")
    export_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="dtype of the exported safetensors")


class Grpo(StageBase):
    """Reinforcement learning with group-relative advantages."""

    kind: Literal["grpo"]
    model: ModelPath = Field(description="artifact to start from: a stage's name, or a Hugging Face folder")
    prompts: PromptSet
    rewards: dict[str, Reward] = Field(min_length=1, description="parts of the reward by name; their weighted sum is the reward")
    not_judged_limit: float = Field(0.01, ge=0, le=1, description="the run stops when a larger share of an update's rewards is not judged")
    group_size: int = Field(16, ge=2, description="G, responses per prompt")
    prompts_per_rollout: int = Field(512, ge=1, description="prompts answered before training on them (paper: 512, 8,192 responses)")
    updates_per_rollout: int = Field(16, ge=1, description="minibatches (one optimizer step each) of one rollout (paper: 16)")
    updates: int = Field(ge=1, description="optimizer steps in all")
    reference_refresh: int = Field(400, ge=0, description="updates after which the reference becomes the current policy; 0: never")
    sampling: Sampling = Sampling()
    objective: GrpoObjective = GrpoObjective()
    optimizer: Optimizer
    train: Train = Train()
    evaluation: Evaluation | None = None
    save_every: int = Field(10, ge=0, description="updates between the checkpoints that a run goes on from; 0: none")
    export_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="dtype of the exported safetensors")

    @field_validator("rewards")
    @classmethod
    def _names_are_plain(cls, rewards: dict[str, Reward]) -> dict[str, Reward]:
        bad = [name for name in rewards if not name.replace("_", "").isalnum()]
        if bad:
            raise ValueError(f"reward names are letters, digits and underscores, got {bad[0]!r}")
        return rewards

    @model_validator(mode="after")
    def _samples(self) -> "Grpo":
        temperature = self.sampling.temperature
        if min(temperature.values() if isinstance(temperature, dict) else [temperature]) <= 0:
            raise ValueError("sampling.temperature must be above 0: greedy responses are all alike, so there is nothing to learn from")
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> "Grpo":
        if self.prompts_per_rollout % self.updates_per_rollout:
            raise ValueError(
                f"updates_per_rollout={self.updates_per_rollout} does not divide prompts_per_rollout={self.prompts_per_rollout}"
            )
        return self


class Evaluate(StageBase):
    """Benchmarks of one artifact."""

    kind: Literal["evaluate"]
    model: ModelPath = Field(description="artifact to evaluate: a stage's name, or a Hugging Face folder")
    suites: dict[str, Suite] = Field(min_length=1, description="benchmarks by name")
    gates: list[Gate] = Field(default_factory=list, description="bounds that the metrics must keep, or the stage fails")


Stage = Annotated[Pretrain | Grpo | Evaluate, Field(discriminator="kind")]
