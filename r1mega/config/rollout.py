"""How responses are drawn, and judged by functions."""

from typing import Literal

from pydantic import Field

from r1mega.config.base import Closed, NonNegativeSchedule, PositiveSchedule, RewardFunction, Schedule, ShareSchedule


class Sampling(Closed):
    """How responses are drawn."""

    temperature: NonNegativeSchedule = Field(
        1.0, description="softmax temperature; log-probs are those of the tempered distribution on both sides"
    )
    top_p: ShareSchedule = Field(1.0, description="nucleus mass; 1 keeps the whole vocabulary")
    max_new_tokens: PositiveSchedule = Field(1024, description="length cap of a response in tokens; a schedule over updates")


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
