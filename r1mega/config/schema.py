"""Everything a recipe can say. One class per thing, closed: an unknown key is an error.

Fields carry their unit and meaning in `description`, which is what `r1mega explain KEY` prints.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from r1mega.config.base import Closed, ExtractFunction, FilePath, FolderPath, ModelPath, RewardFunction, Schedule
from r1mega.config.layout import Layout

# ---------------------------------------------------------------- prompts


class JsonlPrompts(Closed):
    """One JSON object a line."""

    kind: Literal["jsonl"]
    path: FilePath = Field(description="file of JSON lines; relative paths are relative to the recipe")
    prompt: str = Field("prompt", description="field that holds the question, a string or a list of chat messages")
    answer: str = Field("answer", description="field that holds the reference answer; may be absent from rows whose reward needs none")


class ParquetPrompts(Closed):
    """Rows of a Parquet file."""

    kind: Literal["parquet"]
    path: FilePath = Field(description="Parquet file")
    prompt: str = Field("prompt", description="column that holds the question")
    answer: str = Field("answer", description="column that holds the reference answer")


class DatasetPrompts(Closed):
    """A Hugging Face dataset saved on disk (`Dataset.save_to_disk`)."""

    kind: Literal["dataset"]
    path: FolderPath = Field(description="folder of the saved dataset")
    split: str | None = Field(None, description="split to read when the folder holds a DatasetDict")
    prompt: str = Field("prompt", description="column that holds the question")
    answer: str = Field("answer", description="column that holds the reference answer")


class GymPrompts(Closed):
    """A procedural task of the `reasoning-gym` package."""

    kind: Literal["reasoning_gym"]
    task: str = Field(description="name of the reasoning-gym dataset, such as 'chain_sum'")
    size: int = Field(10_000, ge=1, description="how many problems to draw")
    seed: int = Field(0, description="seed of the problems")
    options: dict[str, Any] = Field(default_factory=dict, description="options handed to reasoning_gym.create_dataset")


class TinyPrompts(Closed):
    """A procedural task of r1mega's own tiny language."""

    kind: Literal["tiny"]
    task: Literal["running_sum"] = Field(description="running_sum: add six digits modulo ten, in one of two languages")
    size: int = Field(20_000, ge=1, description="how many problems to draw")
    seed: int = Field(0, description="seed of the problems")


Prompts = Annotated[JsonlPrompts | ParquetPrompts | DatasetPrompts | GymPrompts | TinyPrompts, Field(discriminator="kind")]


class PromptSet(Closed):
    """Prompts, the part of them to use, and how they are shown to the model."""

    source: Prompts = Field(description="where the questions come from")
    split: Literal["train", "heldout", "all"] = Field(
        "train", description="prompts are divided by a hash of their text, so train and heldout never share a question"
    )
    heldout_fraction: float = Field(0.1, ge=0, lt=1, description="share of the questions that belong to heldout")
    template: Literal["none", "r1_zero", "chat"] = Field(
        "none", description="none: the bare text; r1_zero: the conversation preamble of the R1 paper; chat: the tokenizer's chat template"
    )
    limit: int | None = Field(None, ge=1, description="use only the first so many prompts")


# ---------------------------------------------------------------- sampling and rollouts


class Sampling(Closed):
    """How responses are drawn."""

    temperature: Schedule = Field(1.0, description="softmax temperature; log-probs are those of the tempered distribution on both sides")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus mass; 1 keeps the whole vocabulary")
    max_new_tokens: Schedule = Field(1024, description="length cap of a response in tokens; a schedule over updates")


class Rollout(Closed):
    """The engine that generates."""

    engine: Literal["local", "sglang"] = Field("local", description="local: in the trainer's processes, on CPU; sglang: servers")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the engine's weights")
    batch: int = Field(512, ge=1, description="most sequences decoded at once by one embedded engine")


class Reward(Closed):
    """One part of the reward: a function and its weight."""

    function: RewardFunction = Field(
        description="import path of `f(prompt, response) -> float`, such as 'r1mega.rewards.math:accuracy', "
        "or 'my_task:reward' for my_task.py beside the recipe"
    )
    weight: Schedule = Field(1.0, description="factor in the sum of rewards; a schedule over updates")
    deadline_s: float = Field(10.0, gt=0, description="seconds for one response; then its judge is killed and the response is not judged")


# ---------------------------------------------------------------- objective and optimizer


class GrpoObjective(Closed):
    """Group-relative policy optimisation and its published variants (DeepSeekMath, DeepSeek-R1, Dr.GRPO, DAPO)."""

    clip: float = Field(10.0, gt=0, description="eps of the ratio clip on both sides; the R1 paper uses 10")
    clip_high: float | None = Field(None, gt=0, description="upper eps when it differs from `clip` (DAPO: clip 0.2, clip_high 0.28)")
    kl_coef: float = Field(1e-3, ge=0, description="beta, weight of the KL to the reference; 0 needs no reference model")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="KL estimator; k3 = exp(d) - d - 1 with d = log pi_ref - log pi")
    aggregation: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="sequence: mean over a response's tokens, then over responses (GRPO); token: mean over all tokens (DAPO); "
        "constant: sum over tokens divided by responses x `constant_length` (Dr.GRPO)",
    )
    constant_length: int | None = Field(None, ge=1, description="divisor of aggregation `constant`, usually the length cap")
    normalize_std: bool = Field(True, description="divide advantages by the group's standard deviation (Dr.GRPO: false)")
    mask_truncated: bool = Field(False, description="leave responses that hit the length cap out of the loss (DAPO)")
    drop_uniform_groups: bool = Field(False, description="leave out groups whose rewards are all equal (DAPO's dynamic sampling)")

    @model_validator(mode="after")
    def _constant_needs_its_length(self) -> "GrpoObjective":
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError("aggregation 'constant' needs constant_length")
        return self


class Optimizer(Closed):
    """AdamW with a warm-up and a decay, through Megatron-Core's optimizer."""

    lr: float = Field(gt=0, description="peak learning rate")
    min_lr: float | None = Field(None, ge=0, description="learning rate at the end of the decay; left out: no decay")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="shape of the decay from lr to min_lr")
    warmup: int = Field(0, ge=0, description="updates of linear warm-up from 0")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    eps: float = Field(1e-8, gt=0, description="added to the root of the mean of squared gradients")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; norms and biases are exempt")
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0 does not clip")
    distributed: bool = Field(True, description="shard optimizer states over data-parallel ranks (ZeRO-1)")


class Train(Closed):
    """How a training step is executed."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of parameters and activations; gradients are float32")
    fp8: Literal["none", "blockwise", "tensorwise", "mxfp8"] = Field("none", description="Transformer Engine's FP8 recipe; CUDA only")
    chunk_tokens: int = Field(4096, ge=8, description="tokens of one packed micro-batch; the longest sequence must fit")
    recompute: Literal["none", "selective", "full"] = Field("none", description="activation recomputation")
    logprob_chunk: int = Field(2048, ge=1, description="tokens whose logits exist at once when log-probs are computed")
    router_bias_rate: float = Field(0.0, ge=0, description="update rate of the router's expert bias (V3: 1e-3 in pre-training, 0 in RL)")
    aux_loss: float = Field(0.0, ge=0, description="weight of the sequence-wise expert-balance loss (V3: 1e-4 in pre-training)")
    mtp_loss: float = Field(0.0, ge=0, description="weight of the multi-token-prediction loss; 0 leaves the MTP weights as they are")
    async_save: bool = Field(True, description="go on training while a checkpoint's files are written")


class PretrainTrain(Train):
    """How a pre-training step is executed: Train with the balance and MTP losses of DeepSeek-V3 on."""

    router_bias_rate: float = Field(1e-3, ge=0, description="update rate of the router's expert bias")
    aux_loss: float = Field(1e-4, ge=0, description="weight of the sequence-wise expert-balance loss")
    mtp_loss: float = Field(0.3, ge=0, description="weight of the multi-token-prediction loss; 0 leaves the MTP weights as they are")


# ---------------------------------------------------------------- evaluation


class Suite(Closed):
    """A benchmark: prompts, the function that judges, and how often each prompt is asked."""

    prompts: PromptSet
    judge: RewardFunction = Field(description="import path of the function whose value above 0.5 counts as correct")
    extract: ExtractFunction | None = Field(
        None, description="import path of `f(response) -> str | None`, the answer that consensus votes on"
    )
    k: int = Field(16, ge=1, description="samples per prompt")
    sampling: Sampling = Sampling()
    measures: dict[str, RewardFunction] = Field(
        default_factory=dict,
        description="further means: name -> import path of `f(prompt, response) -> float`; None or NaN: nothing to measure",
    )
    not_judged_limit: float = Field(0.01, ge=0, le=1, description="the run stops when a larger share of the answers is not judged")


class Gate(Closed):
    """A bound that an evaluation metric must keep, or the stage fails."""

    metric: str = Field(description="metric name, such as 'pass@1'")
    min: float | None = Field(None, description="smallest value that passes")
    max: float | None = Field(None, description="largest value that passes")


class Evaluation(Closed):
    """Evaluations inside a training stage."""

    suites: dict[str, Suite] = Field(min_length=1, description="benchmarks by name")
    every: int = Field(0, ge=0, description="updates between evaluations; 0: only after the last update")
    at_start: bool = Field(False, description="also evaluate before the first update")


# ---------------------------------------------------------------- stages


class TinyCorpus(Closed):
    """Documents of the tiny language: problems with long or short answers."""

    kind: Literal["tiny"]
    task: Literal["running_sum"] = Field(description="running_sum: add six digits modulo ten, in one of two languages")
    long_share: float = Field(ge=0, le=1, description="share of documents with a chain of thought; the others guess")
    mixed_share: float = Field(0.5, ge=0, le=1, description="share of the long documents that mix the two languages")
    tagged_share: float = Field(1.0, ge=0, le=1, description="share of the documents with all tags; the others lose think or answer tags")
    error_rate: tuple[float, float] = Field((0.08, 0.02), description="probability of a wrong step in English and in Chinese")
    corrected_share: float = Field(0.5, ge=0, le=1, description="share of the wrong steps that are corrected at once, after a `wait`")
    heldout_fraction: float = Field(0.1, ge=0, lt=1, description="share of the questions that no document holds; the same as the prompts'")
    seed: int = Field(0, description="seed of the documents")


class JsonlCorpus(Closed):
    """Plain documents, one JSON object a line."""

    kind: Literal["jsonl"]
    path: FilePath = Field(description="file of JSON lines")
    text: str = Field("text", description="field that holds the document")


Corpus = Annotated[TinyCorpus | JsonlCorpus, Field(discriminator="kind")]


class Phase(Closed):
    """A stretch of pre-training on one corpus with one learning rate schedule."""

    corpus: Corpus = Field(description="the documents")
    updates: int = Field(ge=1, description="optimizer steps of this phase")
    documents_per_update: int = Field(64, ge=1, description="documents of one optimizer step")
    optimizer: Optimizer


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


class Run(Closed):
    """The processes of a run."""

    platform: Literal["cpu", "cuda"] = Field("cpu", description="what ranks compute on")
    ranks: int = Field(1, ge=1, description="processes that r1mega run starts on this machine")
    threads_per_rank: int = Field(1, ge=1, description="BLAS threads of each process on a CPU")


class Recipe(Closed):
    """A whole run: a graph of stages that exchange artifacts."""

    name: str = Field(description="name of the run: letters, digits, '-' and '_'")
    description: str = Field("", description="a line for people")
    seed: int = Field(1, description="seed of everything random; a stage may have its own")
    run: Run = Run()
    layout: Layout = Layout()
    rollout: Rollout = Rollout()
    stages: dict[str, Stage] = Field(min_length=1, description="stages by name, run in this order; a stage reads what earlier ones made")
