"""The stages of a recipe, one class a kind."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1mega.config.base import (
    Closed,
    FolderPath,
    ModelPath,
    NonNegativeSchedule,
    RewardFunction,
    RewardModelPath,
    RewriteFunction,
    Schedule,
    smallest,
)
from r1mega.config.chats import Chats, Decontamination, Endpoint, Filters, Preferences
from r1mega.config.corpora import Phase
from r1mega.config.evaluation import Evaluation, Gate, Suite
from r1mega.config.layout import Layout
from r1mega.config.prompts import PromptSet
from r1mega.config.rollout import Reward, Sampling
from r1mega.config.training import GrpoObjective, Optimizer, PretrainTrain, Train
from r1mega.config.trust import Trust


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


class PromptShare(PromptSet):
    """Prompts of one kind, and their part in every rollout."""

    share: NonNegativeSchedule = Field(1.0, description="part of a rollout's prompts, relative to the other sets'; a schedule over updates")


class RuleReward(Reward):
    """A function that judges the responses to some of the prompt sets."""

    prompts: list[str] | None = Field(None, description="names of the prompt sets whose responses it judges; left out: all")
    truncated: float | None = Field(
        0.0, description="value of a response that the length cap cut, which is not finished however it reads; null: judge its text"
    )


class ModelReward(Closed):
    """A reward model that judges the responses to some of the prompt sets. It must share the policy's shapes and layout."""

    model: RewardModelPath = Field(description="a preference stage's name, or a folder that one left")
    prompts: list[str] | None = Field(None, description="names of the prompt sets whose responses it judges; left out: all")
    weight: Schedule = Field(
        1.0, description="factor in the sum of rewards; a schedule over updates (paper: 0 until the last 400 of 1,700)"
    )
    scale: Literal["probability", "logit"] = Field(
        "probability", description="probability: the sigmoid of the score; logit: the score itself"
    )
    truncated: float | None = Field(
        0.0, description="value of a response that the length cap cut, which is not finished however it reads; null: score its text"
    )


class PartialRollouts(Closed):
    """Responses drawn over several rollouts, so that the longest ones hold up no update (Kimi k1.5, arXiv 2501.12599)."""

    segment: int = Field(
        ge=1, description="tokens of a response drawn at a time; a longer one goes on in the next rollout, with its weights"
    )
    extra_prompts: int = Field(ge=1, description="prompts under way beyond prompts_per_rollout: so many may be unfinished at an update")
    rollouts: int = Field(2, ge=2, description="rollouts over which a response is drawn at most; in the last one it is drawn to its end")


class Grpo(StageBase):
    """Reinforcement learning with group-relative advantages."""

    kind: Literal["grpo"]
    model: ModelPath = Field(description="artifact to start from: a stage's name, or a Hugging Face folder")
    prompts: dict[str, PromptShare] = Field(min_length=1, description="prompts by the name of their kind")
    rewards: dict[str, RuleReward] = Field(min_length=1, description="rules by name; the weighted sum of all rewards is the reward")
    reward_models: dict[str, ModelReward] = Field(default_factory=dict, description="reward models by name, added to the rules")
    correct: str | None = Field(
        None, description="the rule whose value above 0.5 counts as correct in the metrics; left out: the first rule"
    )
    difficulty: str = Field("level", description="field of the prompts that says how hard they are, for the pass rate by difficulty")
    measures: dict[str, RewardFunction] = Field(
        default_factory=lambda: {"reflection": "r1mega.rewards.reflection:words", "language": "r1mega.rewards.language:share"},
        description="what else is logged of every update's responses: name -> import path of `f(prompt, response) -> float`",
    )
    not_judged_limit: float = Field(0.01, ge=0, le=1, description="the run stops when a larger share of an update's rewards is not judged")
    group_size: int = Field(16, ge=2, description="G, responses per prompt")
    prompts_per_rollout: int = Field(512, ge=1, description="prompts answered before training on them (paper: 512, 8,192 responses)")
    updates_per_rollout: int = Field(16, ge=1, description="minibatches (one optimizer step each) of one rollout (paper: 16)")
    updates: int = Field(ge=1, description="optimizer steps in all")
    partial: PartialRollouts | None = Field(
        None, description="responses drawn over several rollouts; left out: every rollout waits for its longest response"
    )
    staleness: Literal[0, 1] = Field(
        0,
        description="rollouts by which drawing is ahead of training; 1: servers draw the next rollout, with weights one rollout old, while "
        "the trainer trains on this one",
    )
    reference_refresh: int = Field(400, ge=0, description="updates after which the reference becomes the current policy; 0: never")
    sampling: Sampling = Sampling()
    objective: GrpoObjective = GrpoObjective()
    trust: Trust = Trust()
    optimizer: Optimizer
    train: Train = Train()
    evaluation: Evaluation | None = None
    save_every: int = Field(10, ge=0, description="updates between the checkpoints that a run goes on from; 0: none")
    export_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="dtype of the exported safetensors")

    @model_validator(mode="after")
    def _names_agree(self) -> "Grpo":
        names = [*self.rewards, *self.reward_models]
        bad = [name for name in [*names, *self.prompts] if not name.replace("_", "").isalnum()]
        if bad:
            raise ValueError(f"names of rewards and prompts are letters, digits and underscores, got {bad[0]!r}")
        twice = self.rewards.keys() & self.reward_models.keys()
        if twice:
            raise ValueError(f"{min(twice)!r} names a rule and a reward model; give one of them another name")
        if self.correct is not None and self.correct not in self.rewards:
            raise ValueError(f"correct names no rule: {self.correct!r}; there are {', '.join(self.rewards)}")
        rewards: dict[str, RuleReward | ModelReward] = {**self.rewards, **self.reward_models}
        for name, reward in rewards.items():
            unknown = [prompts for prompts in reward.prompts or () if prompts not in self.prompts]
            if unknown:
                raise ValueError(f"the reward {name!r} judges the prompts {unknown[0]!r}; there are {', '.join(self.prompts)}")
        return self

    @model_validator(mode="after")
    def _samples(self) -> "Grpo":
        if smallest(self.sampling.temperature) <= 0:
            raise ValueError("sampling.temperature must be above 0: greedy responses are all alike, so there is nothing to learn from")
        return self

    @model_validator(mode="after")
    def _budget_can_correct(self) -> "Grpo":
        asked = any(limit.then == "correct" for limit in self.trust.budget)
        if asked and self.objective.mismatch.when != "over_budget":
            raise ValueError("trust.budget asks to correct: set objective.mismatch.when to over_budget, and what corrects")
        if not asked and self.objective.mismatch.when == "over_budget":
            raise ValueError("objective.mismatch.when is over_budget, and no limit of trust.budget has `then: correct`")
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> "Grpo":
        if self.prompts_per_rollout % self.updates_per_rollout:
            raise ValueError(
                f"updates_per_rollout={self.updates_per_rollout} does not divide prompts_per_rollout={self.prompts_per_rollout}"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_overlap(self) -> "Grpo":
        if self.partial and self.partial.extra_prompts > self.prompts_per_rollout:
            raise ValueError(
                f"partial.extra_prompts={self.partial.extra_prompts} is more than prompts_per_rollout={self.prompts_per_rollout}: some "
                "prompts would wait for several rollouts"
            )
        if (self.partial or self.staleness) and 0 < self.save_every < 2 * self.updates_per_rollout:
            raise ValueError(
                f"nothing is being drawn when a checkpoint is written, so with save_every={self.save_every} rollouts would never overlap; "
                f"partial and staleness need at least 2 x updates_per_rollout = {2 * self.updates_per_rollout}, or 0"
            )
        return self


class Sft(StageBase):
    """Supervised training on answered conversations, with loss on the answers only."""

    kind: Literal["sft"]
    model: ModelPath = Field(description="artifact to start from: a stage's name, or a Hugging Face folder")
    data: dict[str, Chats] = Field(min_length=1, description="conversations by name; an epoch has all of them, shuffled")
    template: Literal["none", "r1_zero", "chat"] = Field(
        "chat",
        description="how conversations become tokens; chat: the tokenizer's chat template, the others hold one question and its answer",
    )
    too_long: Literal["refuse", "drop"] = Field("drop", description="what happens to conversations of more than train.chunk_tokens tokens")
    epochs: int = Field(2, ge=1, description="times that every conversation is trained on (paper: 2 to 3)")
    batch: int = Field(128, ge=1, description="conversations of one optimizer step (paper: 128; distillation: 64)")
    optimizer: Optimizer
    train: Train = Train()
    evaluation: Evaluation | None = None
    save_every: int = Field(100, ge=0, description="updates between the checkpoints that a run goes on from; 0: none")
    export_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="dtype of the exported safetensors")


class Rejection(StageBase):
    """Many samples a prompt, judged; the correct and readable ones become a dataset of conversations."""

    kind: Literal["rejection"]
    model: ModelPath | None = Field(None, description="model that answers: a stage's name, or a Hugging Face folder")
    endpoint: Endpoint | None = Field(None, description="server that answers, instead of `model`")
    prompts: PromptSet
    k: int = Field(16, ge=1, description="samples per prompt")
    keep: int = Field(1, ge=1, description="most samples kept of one prompt")
    sampling: Sampling = Sampling()
    judge: RewardFunction | None = Field(
        None, description="import path of the function whose value above 0.5 is kept; left out: all are correct"
    )
    judge_endpoint: Endpoint | None = Field(
        None, description="model that is asked whether the answer agrees with the reference, of the responses that `judge` returns None for"
    )
    filters: Filters = Filters()
    rewrite: RewriteFunction | None = Field(
        None, description="import path of `f(prompt, response) -> str | None`, the response as it is to be learned; None drops it"
    )
    deadline_s: float = Field(
        10.0, gt=0, description="seconds for one call of judge, rewrite or filters.language; then its process is killed, without an answer"
    )
    near_duplicates: float | None = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of 5-word shingles from which the later sample is dropped; null: all are kept"
    )
    decontamination: Decontamination | None = None
    chunk: int = Field(256, ge=1, description="prompts between two entries of the ledger that an interrupted stage goes on from")
    format: Literal["jsonl", "parquet"] = Field("jsonl", description="file format of the dataset")
    not_judged_limit: float = Field(0.01, ge=0, le=1, description="the run stops when a larger share of the samples is not judged")

    @model_validator(mode="after")
    def _one_teacher(self) -> "Rejection":
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("name what answers: either model or endpoint")
        return self


class Preference(StageBase):
    """A reward model: the architecture of a language model with one score in place of the vocabulary."""

    kind: Literal["preference"]
    model: ModelPath = Field(description="artifact to start from: a stage's name, or a Hugging Face folder")
    loss: Literal["pairwise", "pointwise"] = Field(
        description="pairwise: the better of two answers scores higher (paper: helpful); pointwise: safe or not (paper: safety)"
    )
    data: Preferences = Field(description="judged answers")
    sees: Literal["summary", "all"] = Field(
        description="summary: what follows the thought (paper: helpful); all: thought and summary (paper: safety)"
    )
    template: Literal["none", "r1_zero", "chat"] = Field("chat", description="how the question is shown")
    too_long: Literal["refuse", "drop"] = Field("drop", description="what happens to answers of more than train.chunk_tokens tokens")
    test_share: float = Field(0.1, gt=0, lt=1, description="share of the questions that are kept back to measure the accuracy")
    epochs: int = Field(1, ge=1, description="times that every answer is trained on (paper: 1)")
    batch: int = Field(256, ge=1, description="pairs, or answers, of one optimizer step (paper: 256)")
    init_std: float = Field(0.01, ge=0, description="standard deviation of the score's initial weights")
    optimizer: Optimizer
    train: Train = Train()
    save_every: int = Field(100, ge=0, description="updates between the checkpoints that a run goes on from; 0: none")
    export_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="dtype of the exported safetensors")


class Distill(StageBase):
    """A student learns a teacher's distribution instead of its samples alone. The two share a tokenizer."""

    kind: Literal["distill"]
    model: ModelPath = Field(description="the student: a stage's name, or a Hugging Face folder")
    teacher: ModelPath = Field(description="the teacher: a stage's name, or a Hugging Face folder")
    method: Literal["on_policy", "logits"] = Field(
        description="on_policy: the student answers and the reverse KL to the teacher is the (negative) advantage of each token; "
        "logits: forward KL over the teacher's most likely tokens, on conversations"
    )
    prompts: PromptSet | None = Field(None, description="questions that the student answers (on_policy)")
    data: dict[str, Chats] = Field(default_factory=dict, description="conversations by name (logits)")
    template: Literal["none", "r1_zero", "chat"] = Field("chat", description="how conversations become tokens (logits)")
    too_long: Literal["refuse", "drop"] = Field(
        "drop", description="what happens to conversations of more than train.chunk_tokens tokens (logits)"
    )
    top_k: int = Field(
        64, ge=1, description="most likely tokens of the teacher at each position, beside which all others count as one (logits)"
    )
    updates: int = Field(ge=1, description="optimizer steps in all")
    batch: int = Field(64, ge=1, description="responses, or conversations, of one optimizer step")
    samples_per_prompt: int = Field(4, ge=1, description="responses per question (on_policy)")
    sampling: Sampling = Sampling()
    optimizer: Optimizer
    train: Train = Train()
    evaluation: Evaluation | None = None
    save_every: int = Field(100, ge=0, description="updates between the checkpoints that a run goes on from; 0: none")
    export_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="dtype of the exported safetensors")

    @model_validator(mode="after")
    def _has_what_it_learns_from(self) -> "Distill":
        if self.method == "on_policy" and self.prompts is None:
            raise ValueError("method on_policy needs prompts")
        if self.method == "logits" and not self.data:
            raise ValueError("method logits needs data")
        return self

    @model_validator(mode="after")
    def _divergence_is_defined(self) -> "Distill":
        if self.method == "on_policy" and (self.sampling.temperature != 1 or self.sampling.top_p != 1):
            raise ValueError("method on_policy compares the student with the teacher as they are: sampling.temperature and top_p must be 1")
        if self.method == "on_policy" and self.batch % self.samples_per_prompt:
            raise ValueError(f"samples_per_prompt={self.samples_per_prompt} does not divide batch={self.batch}")
        if self.train.mtp_loss:
            raise ValueError("distillation does not train multi-token prediction: train.mtp_loss must be 0")
        return self


class Evaluate(StageBase):
    """Benchmarks of one or several artifacts, the same for all."""

    kind: Literal["evaluate"]
    models: dict[str, ModelPath] = Field(min_length=1, description="artifacts by label: each a stage's name, or a Hugging Face folder")
    suites: dict[str, Suite] = Field(min_length=1, description="benchmarks by name")
    gates: list[Gate] = Field(default_factory=list, description="bounds that the metrics must keep, or the stage fails")


Stage = Annotated[Pretrain | Sft | Grpo | Rejection | Preference | Distill | Evaluate, Field(discriminator="kind")]
