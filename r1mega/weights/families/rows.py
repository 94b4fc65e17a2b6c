"""Rows that families share."""

from r1mega.weights.architecture import Architecture
from r1mega.weights.table import Fused, Row, Shard, Storage


def embedding(arch: Architecture) -> Row:
    """The token embedding."""
    name = "embedding.word_embeddings.weight"
    return Row("model.embed_tokens.weight", (arch.vocab, arch.hidden), name, name, Shard.VOCABULARY)


def final_norm(arch: Architecture) -> Row:
    """The norm after the last decoder layer."""
    return norm("model.norm.weight", arch.hidden, "decoder.final_layernorm.weight")


def head(arch: Architecture) -> Row | None:
    """The output layer, None when it is the embedding; of a reward model the score's projection."""
    if arch.head == "score":
        return Row("score.weight", (1, arch.hidden), "score.weight", "score.weight")
    name = "output_layer.weight"
    return None if arch.tied else Row("lm_head.weight", (arch.vocab, arch.hidden), name, name, Shard.VOCABULARY)


def norm(tensor: str, width: int, local: str, te: str | None = None) -> Row:
    """A norm's weight; Transformer Engine fuses some norms into the linear that follows, which renames them."""
    return Row(tensor, (width,), local, te or local)


def linear(tensor: str, shape: tuple[int, int], param: str, shard: Shard = Shard.WHOLE) -> Row:
    """A linear layer's weight, (out, in)."""
    return Row(tensor, shape, param, param, shard, storage=Storage.BLOCK_FP8)


def gated_mlp(tensor: str, local: str, te: str, hidden: int, width: int, experts: int = 0) -> tuple[Row, ...]:
    """gate, up and down of one gated MLP. `local` and `te` are the parameter's name with `{fc}` for linear_fc1 or linear_fc2."""
    rows = []
    for index, name in enumerate(("gate", "up")):
        rows.append(Row(
            tensor.format(proj=f"{name}_proj", e="{e}"), (width, hidden),
            local.format(fc="linear_fc1", e="{e}"), te.format(fc="linear_fc1", e="{e}"),
            Shard.ROWS, Fused(index, (width, width)), experts, Storage.BLOCK_FP8,
        ))  # fmt: skip
    rows.append(Row(
        tensor.format(proj="down_proj", e="{e}"), (hidden, width),
        local.format(fc="linear_fc2", e="{e}"), te.format(fc="linear_fc2", e="{e}"),
        Shard.COLUMNS, None, experts, Storage.BLOCK_FP8,
    ))  # fmt: skip
    return tuple(rows)
