"""GPUs and the links between them, as their vendors state them. Rates are peaks; what is reached of them stands in `constants`.

Sources: NVIDIA's data sheets of H100, H200, H20, B200, B300 and of the GB200 and GB300 NVL72 racks, without sparsity; NVLink of H800 from
DeepSeek-V3 (arXiv 2412.19437, section 3.1). NICs are those of the reference systems, one a GPU.
Host memory is what such nodes are sold with.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, TypeVar

from r1mega.errors import UserError


@dataclass(frozen=True)
class Device:
    """One GPU with its share of a node.

    `bf16`, `fp8`: dense FLOP/s. `hbm`: bytes; `hbm_rate`: bytes/s. `nvlink`, `network`, `host_link`: bytes/s in one direction.
    `generation` and `ultra` choose what is reached of the peaks (`constants`).
    `domain`: GPUs that NVLink joins. `per_node`: GPUs of one host, `host`: bytes of its memory.
    """

    name: str
    bf16: float
    fp8: float
    hbm: float
    hbm_rate: float
    nvlink: float
    network: float
    host_link: float
    domain: int = 8
    per_node: int = 8
    host: float = 2.0e12
    generation: Literal["hopper", "blackwell"] = "hopper"
    ultra: bool = False


T = TypeVar("T")
_GB, _T = 1e9, 1e12

DEVICES = {
    device.name: device
    for device in (
        Device("h100", 989.4 * _T, 1978.9 * _T, 80 * _GB, 3.35 * _T, 450 * _GB, 50 * _GB, 64 * _GB),
        Device("h800", 989.4 * _T, 1978.9 * _T, 80 * _GB, 3.35 * _T, 200 * _GB, 50 * _GB, 64 * _GB),
        Device("h200", 989.4 * _T, 1978.9 * _T, 141 * _GB, 4.8 * _T, 450 * _GB, 50 * _GB, 64 * _GB),
        Device("h20", 148 * _T, 296 * _T, 96 * _GB, 4.0 * _T, 450 * _GB, 50 * _GB, 64 * _GB),
        Device("b200", 2250 * _T, 4500 * _T, 180 * _GB, 7.7 * _T, 900 * _GB, 50 * _GB, 64 * _GB, host=3.0e12, generation="blackwell"),
        Device(
            "b300",
            2250 * _T,
            4500 * _T,
            270 * _GB,
            7.7 * _T,
            900 * _GB,
            100 * _GB,
            64 * _GB,
            host=3.0e12,
            generation="blackwell",
            ultra=True,
        ),
        Device(
            "gb200",
            2500 * _T,
            5000 * _T,
            186 * _GB,
            8.0 * _T,
            900 * _GB,
            50 * _GB,
            225 * _GB,
            domain=72,
            per_node=4,
            host=0.96e12,
            generation="blackwell",
        ),
        Device(
            "gb300",
            2500 * _T,
            5000 * _T,
            279 * _GB,
            8.0 * _T,
            900 * _GB,
            100 * _GB,
            225 * _GB,
            domain=72,
            per_node=4,
            host=0.96e12,
            generation="blackwell",
            ultra=True,
        ),
    )
}

LINKS = {"ndr": 50 * _GB, "hdr": 25 * _GB, "xdr": 100 * _GB, "roce400": 50 * _GB, "roce200": 25 * _GB}
"""Bytes/s in one direction of a GPU's network port, by what people call it."""


def device(name: str, link: str | None = None, host_gb: float | None = None) -> Device:
    """A GPU by its name, with another network or another host memory than usual.

    Raises:
        UserError: no such GPU or link; the nearest name is said.
    """
    found = _known("device", name.lower(), DEVICES)
    network = found.network if link is None else _known("link", link.lower(), LINKS)
    host = found.host if host_gb is None else host_gb * _GB
    return Device(**{**vars(found), "network": network, "host": host})


def _known(what: str, name: str, known: dict[str, T]) -> T:
    if name in known:
        return known[name]
    near = get_close_matches(name, known, 1, 0.0)
    raise UserError(f"--{what} {name}: not known; there are {', '.join(known)} (nearest: {near[0] if near else next(iter(known))})")
