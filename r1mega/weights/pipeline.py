"""Which layers a pipeline stage holds, read from Megatron-Core's pipeline layout string."""

import re
from dataclasses import dataclass

from r1mega.config.layout import Layout
from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture


@dataclass(frozen=True)
class Stage:
    """What one model chunk holds. `layers` and `mtp` number decoder and MTP layers over the whole model, from 0."""

    pp: int
    chunk: int
    embedding: bool
    layers: range
    mtp: range
    loss: bool


def stages(arch: Architecture, layout: Layout) -> tuple[tuple[Stage, ...], ...]:
    """Stages by pipeline rank, then by model chunk. Chunk c of rank p is the (c * pp + p)-th stage of the model.

    UserError when the layout does not fit the model.
    """
    symbols = _symbols(arch, layout)
    result: list[list[Stage]] = [[] for _ in range(layout.pp)]
    layer, mtp = 0, 0
    for index, row in enumerate(symbols):
        layers, depths = row.count("t"), row.count("m")
        result[index % layout.pp].append(
            Stage(
                pp=index % layout.pp,
                chunk=index // layout.pp,
                embedding="E" in row,
                layers=range(layer, layer + layers),
                mtp=range(mtp, mtp + depths),
                loss="L" in row,
            )
        )
        layer, mtp = layer + layers, mtp + depths
    return tuple(map(tuple, result))


def _symbols(arch: Architecture, layout: Layout) -> list[str]:
    """One string of E, t, m and L per stage, in model order."""
    count = layout.pp * layout.vpp
    if layout.pipeline is None and arch.layers < count:
        raise UserError(f"layout: pp x vpp = {count} stages for {arch.layers} layers; every stage needs one, or say `pipeline`")
    rows = _parse(layout.pipeline_string(arch.layers, arch.mtp_layers))
    if len(rows) != count:
        raise UserError(f"layout: pipeline {layout.pipeline!r} has {len(rows)} stages, but pp x vpp = {layout.pp} x {layout.vpp}")
    _validate(rows, arch, layout)
    return rows


def _parse(text: str) -> list[str]:
    """Unroll `(tt|)*3` and `t*3`, drop cosmetic commas, cut at `|`. A multiplied group may span stages."""
    text = re.sub(r"[,\s]", "", text)
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([EtmL|])\*(\d+)"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    unknown = set(text) - set("EtmL|")
    if unknown:
        raise UserError(f"layout: pipeline has {min(unknown)!r}; it is made of E, t, m, L, |, (..)*n and x*n")
    return text.split("|")


def _validate(rows: list[str], arch: Architecture, layout: Layout) -> None:
    """The conditions of Megatron's `validate_layer_layout`, as user errors."""
    flat = "".join(rows)
    if not re.fullmatch("Et*m*L", flat):
        raise UserError("layout: pipeline must be one E, then t for every layer, then m for every MTP layer, then one L")
    for symbol, have, what in (("t", arch.layers, "layers"), ("m", arch.mtp_layers, "MTP layers")):
        if flat.count(symbol) != have:
            raise UserError(f"layout: pipeline places {flat.count(symbol)} {what} ({symbol}), the model has {have}")
    with_mtp = [index for index, row in enumerate(rows) if "m" in row]
    if len(with_mtp) > 1:
        raise UserError("layout: pipeline must place all MTP layers (m) in one stage")
    if with_mtp and with_mtp[0] // layout.pp != layout.vpp - 1:
        raise UserError("layout: pipeline must place the MTP layers (m) in the last model chunk of their rank")
