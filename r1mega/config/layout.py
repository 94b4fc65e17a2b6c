"""How a model is laid out over ranks: sizes, divisibility, and the coordinates of a rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from pydantic import Field, model_validator

from r1mega.config.base import Closed


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands. Dense layers see (tp, cp, dp, pp), experts see (etp, ep, edp, pp)."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


class Layout(Closed):
    """Parallel sizes of one model. Rank order is Megatron-Core's default, tp-cp-ep-dp-pp: tp varies fastest, pp slowest."""

    tp: int = Field(1, ge=1, description="tensor-parallel size of the dense layers")
    pp: int = Field(1, ge=1, description="pipeline-parallel size")
    vpp: int = Field(1, ge=1, description="model chunks per pipeline rank (interleaved schedule when above 1)")
    ep: int = Field(1, ge=1, description="expert-parallel size")
    etp: int = Field(1, ge=1, description="tensor-parallel size inside each expert")
    cp: int = Field(1, ge=1, description="context-parallel size")
    pipeline: str | None = Field(
        None,
        description="Megatron-Core's pipeline layout string, such as 'Et|(tt|)*30mL' (E embedding, t layer, m MTP layer, L loss); "
        "left out: layers are spread evenly, remainders to the front stages",
    )

    @model_validator(mode="after")
    def _interleaving_needs_a_pipeline(self) -> "Layout":
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp={self.vpp} needs pp >= 2, got pp=1")
        return self

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the dense layers."""
        return self.tp * self.cp * self.pp

    def dp(self, world_size: int) -> int:
        """Data-parallel size of the dense layers; ValueError when the world does not divide."""
        if world_size % self.model_ranks:
            raise ValueError(
                f"tp x cp x pp = {self.model_ranks} does not divide the {world_size} ranks; {self._nearest(world_size)} would do"
            )
        return world_size // self.model_ranks

    def edp(self, world_size: int) -> int:
        """Data-parallel size of the experts; ValueError when the world does not divide."""
        expert_ranks = self.etp * self.ep * self.pp
        if world_size % expert_ranks:
            raise ValueError(f"etp x ep x pp = {expert_ranks} does not divide the {world_size} ranks; {self._nearest(world_size)} would do")
        return world_size // expert_ranks

    def _nearest(self, world_size: int) -> str:
        """The numbers of ranks next to this one that both dense layers and experts divide."""
        unit = lcm(self.model_ranks, self.etp * self.ep * self.pp)
        below = world_size // unit * unit
        return f"{below} or {below + unit}" if below else str(unit)

    def pipeline_string(self, layers: int, mtp_layers: int) -> str:
        """Megatron-Core's layout string: the one given, or layers spread evenly with remainders on the front stages.

        The embedding stands on the first stage, MTP layers and the loss on the last.
        """
        if self.pipeline is not None:
            return self.pipeline
        stages = self.pp * self.vpp
        counts = [layers // stages + (stage < layers % stages) for stage in range(stages)]
        return "E" + "|".join("t" * count for count in counts) + "m" * mtp_layers + "L"

    def coordinates(self, rank: int, world_size: int) -> Coordinates:
        """Coordinates of a rank, as `megatron.core.parallel_state` assigns them."""
        dp, edp = self.dp(world_size), self.edp(world_size)
        dense, expert = rank, rank
        tp, dense = dense % self.tp, dense // self.tp
        cp, dense = dense % self.cp, dense // self.cp
        dp_rank, pp = dense % dp, dense // dp
        etp, expert = expert % self.etp, expert // self.etp
        ep, expert = expert % self.ep, expert // self.ep
        return Coordinates(tp=tp, cp=cp, dp=dp_rank, pp=pp, etp=etp, ep=ep, edp=expert % edp)

    def all_coordinates(self, world_size: int) -> Iterator[Coordinates]:
        """Coordinates of every rank in rank order."""
        return (self.coordinates(rank, world_size) for rank in range(world_size))


class LayoutFile(Closed):
    """A layout and the number of ranks that it is for: one YAML file, such as those in `configs/layouts`."""

    model: str = Field("", description="the model that the layout was made for")
    source: str = Field("", description="where the layout was published")
    ranks: int = Field(ge=1, description="ranks that train, one GPU each")
    layout: Layout

    @model_validator(mode="after")
    def _the_world_divides(self) -> "LayoutFile":
        self.layout.dp(self.ranks), self.layout.edp(self.ranks)
        return self
