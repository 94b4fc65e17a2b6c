"""A filter of system calls for sandboxed programs, as the kernel's classic BPF (Linux, Documentation/userspace-api/seccomp_filter.rst).

It closes what namespaces and resource limits leave open: memory that no limit counts (System V segments and memory files that are not
mapped), user namespaces where bubblewrap cannot forbid them, and parts of the kernel that judged programs have no use for.
"""

import errno
import struct

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`; of an argument the lower half, both machines being little-endian."""

_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_NEW_USER = 0x10000000
_X32 = 0x40000000
"""Bit of x86-64's second set of numbers, which would go around the first."""

_REFUSED = {
    "x86_64": {
        **{"shmget": 29, "memfd_create": 319, "memfd_secret": 447, "unshare": 272, "setns": 308, "mount": 165, "fsopen": 430},
        **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "add_key": 248, "request_key": 249, "keyctl": 250},
        **{"bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425},
    },
    "aarch64": {
        **{"shmget": 194, "memfd_create": 279, "memfd_secret": 447, "unshare": 97, "setns": 268, "mount": 40, "fsopen": 430},
        **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "add_key": 217, "request_key": 218, "keyctl": 219},
        **{"bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425},
    },
}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def program(machine: str) -> bytes | None:
    """The filter for a machine as `platform.machine()` names it, 8 bytes an instruction; None for one whose numbers are not known here."""
    if machine not in _REFUSED:
        return None
    refused = list(_REFUSED[machine].values())
    size = 4 + len(refused) + 2 + 2 + 3
    allow, refuse, unknown = size - 3, size - 2, size - 1
    code: list[tuple[int, int, int, int]] = []

    def jump(kind: int, value: int, met: int | None = None, unmet: int | None = None) -> None:
        """To an instruction, or on to the next."""
        here = len(code) + 1
        code.append((kind, 0 if met is None else met - here, 0 if unmet is None else unmet - here, value))

    code.append((_LOAD, 0, 0, _ARCHITECTURE))
    jump(_IF_EQUAL, _AUDIT[machine], unmet=refuse)
    code.append((_LOAD, 0, 0, _NUMBER))
    jump(_IF_AT_LEAST, _X32, met=refuse)
    for number in refused:
        jump(_IF_EQUAL, number, met=refuse)
    # clone3's flags lie behind a pointer, out of a filter's sight; told that there is no such call, the C library takes clone.
    jump(_IF_EQUAL, _CLONE3, met=unknown)
    jump(_IF_EQUAL, _CLONE[machine], unmet=allow)
    code.append((_LOAD, 0, 0, _FIRST_ARGUMENT))
    jump(_IF_ANY_BIT, _NEW_USER, met=refuse, unmet=allow)
    code += [(_RETURN, 0, 0, value) for value in (_ALLOW, _FAIL | errno.EPERM, _FAIL | errno.ENOSYS)]
    assert len(code) == size
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
