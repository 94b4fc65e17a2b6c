"""How long ranks may stay in a phase before the run is taken to hang."""

from pydantic import Field

from r1mega.config.base import Closed


class Deadlines(Closed):
    """Seconds in one phase after which a run is taken to hang: stacks of all ranks are kept, one line says who is stuck, and it ends."""

    setup: float = Field(3600.0, gt=0, description="all that is no other phase: starting, data, weights, models, servers, artifacts")
    generate: float = Field(3600.0, gt=0, description="drawing responses; servers: until the next response is there, however many follow")
    judge: float = Field(3600.0, gt=0, description="rewards of one rollout or chunk; a single one has deadline_s of its own")
    logprobs: float = Field(1800.0, gt=0, description="log-probs of one rollout by policy and reference, or by a teacher")
    train: float = Field(1800.0, gt=0, description="one optimizer step: forward, backward and update")
    sync: float = Field(1800.0, gt=0, description="giving an engine new weights, further attempts included")
    save: float = Field(1800.0, gt=0, description="a checkpoint, as far as ranks wait for it, or the model that a stage leaves")
    evaluate: float = Field(3600.0, gt=0, description="judging and counting one benchmark; its responses are drawn in `generate`")

    @property
    def longest(self) -> float:
        """The largest of all."""
        return max(self.model_dump().values())
