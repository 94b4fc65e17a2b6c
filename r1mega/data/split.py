"""The one rule that divides questions into train and held-out."""

import unicodedata
from hashlib import blake2b


def normalised(text: str) -> str:
    """A question's text as it is compared: case folded, one Unicode spelling (NFC), runs of white space made one space."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a question belongs to the held-out side.

    The question's normalised text is hashed with an 8-byte BLAKE2b; the digest, read as a big-endian integer over 2**64,
    is below `fraction` for held-out questions. A question is therefore always on the same side, whatever its source, its
    seed or the machine, and a larger fraction only ever adds questions.
    """
    digest = blake2b(normalised(text).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction
