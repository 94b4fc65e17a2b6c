"""Megatron-Core's GPTModel for an `Architecture`, and the places where r1mega's differs from it."""

import inspect
from dataclasses import replace
from typing import Any, Literal

from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from r1mega.config.layout import Layout
from r1mega.megatron import platform
from r1mega.weights.architecture import Architecture, Llama3Rope


class LanguageModel(GPTModel):
    """A GPTModel whose last stage returns hidden states instead of logits.

    Log-probs are then computed chunk by chunk (`head.token_logprobs`), for the trunk and for the MTP layer alike.
    The last stage of a reward model has a `score`, the same on every tensor-parallel rank, and no output layer.
    """

    def _postprocess(self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """[tokens, 1, hidden] of the trunk, followed by as many rows of the MTP layer when there is one."""
        if not self.mtp_process:
            return hidden_states
        return self.mtp(
            # The MTP layer at position t sees the embedding of token t + 1, which is the label at t.
            input_ids=labels,
            position_ids=position_ids,
            hidden_states=hidden_states,
            attention_mask=None,
            packed_seq_params=kwargs["packed_seq_params"],
            embedding=self.embedding,
        )


class NextTokenLayer(MultiTokenPredictionLayer):
    """An MTP layer that is handed the next tokens instead of rolling its input to find them.

    Packed labels already stop at sequence boundaries and are cut for context parallelism, so nothing is left to communicate;
    Megatron-Core's roll walks the sequences one by one and exchanges every boundary.
    """

    def _get_embeddings(
        self, input_ids: Tensor, position_ids: Tensor, embedding: Any, hidden_states: Tensor, padding_mask: Any = None, **_: Any
    ) -> tuple[Any, ...]:
        embedded = embedding(input_ids=input_ids, position_ids=position_ids)
        if _MTP_CARRIES_PADDING:
            return input_ids, position_ids, padding_mask, embedded, hidden_states
        return input_ids, position_ids, embedded, hidden_states

    def _checkpointed_forward(self, *forward: Any, hidden_states: Tensor, decoder_input: Tensor, **rest: Any) -> Tensor:
        if self.config.fp8:
            return super()._checkpointed_forward(*forward, hidden_states=hidden_states, decoder_input=decoder_input, **rest)
        # 0.16.1 hands the packing to autograd among the tensors to save, which refuses it.
        return tensor_parallel.checkpoint(
            lambda hidden, embedded: self._proj_and_transformer_layer(hidden, embedded, **rest),
            self.config.distribute_saved_activations,
            hidden_states,
            decoder_input,
        )


_MTP_CARRIES_PADDING = "padding_mask" in inspect.signature(MultiTokenPredictionLayer._get_embeddings).parameters


def build(arch: Architecture, layout: Layout, config: TransformerConfig) -> list[LanguageModel]:
    """This rank's model chunks, one per virtual pipeline stage, with uninitialised weights on the platform's device."""
    return [_chunk(arch, config, chunk if layout.vpp > 1 else None) for chunk in range(layout.vpp)]


def _chunk(arch: Architecture, config: TransformerConfig, vp_stage: int | None) -> LanguageModel:
    block = _decoder_spec(arch, config, vp_stage)
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    model = LanguageModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=padded_vocab(arch.vocab, config.tensor_model_parallel_size),
        max_sequence_length=arch.max_positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        rope_scaling=isinstance(arch.rope, Llama3Rope),
        rope_scaling_factor=arch.rope.factor if isinstance(arch.rope, Llama3Rope) else 1.0,
        mtp_block_spec=_mtp_spec(arch, config, vp_stage) if last else None,
        vp_stage=vp_stage,
    )
    if last and arch.head == "score":
        # For GPTModel this is the word for an output layer, which it looks for in checkpoints and when it offloads.
        model.post_process = False
        del model.output_layer
        model.score = nn.Linear(arch.hidden, 1, bias=False, dtype=config.params_dtype)
    return model.to(platform.active().device())


def padded_vocab(vocab: int, tp: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds as many rows."""
    return -(-vocab // tp) * tp


def _decoder_spec(arch: Architecture, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    chosen = platform.active()
    dense_layers = arch.layers if arch.moe is None else arch.moe.first_dense_layers
    dense = chosen.layer_spec(config, None)
    sparse = None if arch.moe is None else chosen.layer_spec(config, arch.moe.experts)
    start = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    specs = [dense if layer < dense_layers else sparse for layer in range(start, start + count)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=chosen.kernels().layer_norm(rms_norm=True))


def _mtp_spec(arch: Architecture, config: TransformerConfig, vp_stage: int | None) -> Any:
    if not config.mtp_num_layers:
        return None
    chosen = platform.active()
    # DeepSeek-V3's MTP layer is a full MoE layer, whatever the pipeline stage it stands on holds besides.
    layer = chosen.layer_spec(config, arch.moe.experts if arch.moe else None)
    block = get_gpt_mtp_block_spec_for_backend(config, layer, chosen.kernels(), vp_stage=vp_stage)
    if block is not None:
        block.layer_specs = [replace(spec, module=NextTokenLayer) for spec in block.layer_specs]
    return block


def mtp_layer_name() -> Literal["transformer_layer", "mtp_model_layer"]:
    """Attribute of an MTP layer that holds its transformer layer; megatron-core 0.19 renamed it."""
    fields = inspect.signature(MultiTokenPredictionLayer.__init__).parameters
    return "mtp_model_layer" if "mtp_layer_pattern" in fields else "transformer_layer"


def named_weights(chunks: list[LanguageModel]) -> dict[tuple[int, str], Tensor]:
    """Parameters and persistent buffers of this rank by (chunk, name)."""
    weights: dict[tuple[int, str], Tensor] = {}
    for index, chunk in enumerate(chunks):
        weights |= {(index, name): parameter for name, parameter in chunk.named_parameters()}
        weights |= {(index, name): buffer for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")}
    return weights
