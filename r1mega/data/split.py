"""The one rule that divides questions into train and held-out."""

from hashlib import blake2b


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a question belongs to the held-out side.

    The question's text, runs of white space made one space, is hashed with an 8-byte BLAKE2b; the digest, read as a
    big-endian integer over 2**64, is below `fraction` for held-out questions. A question is therefore always on the
    same side, whatever its source, its seed or the machine, and a larger fraction only ever adds questions.
    """
    digest = blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction
