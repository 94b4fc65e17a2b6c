"""Layouts and models that are refused, other weights held for a while, steps that are not applied."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")
import megatron_support as support
from megatron_support import LLAMA, MOONLIGHT, QWEN, V2, V3

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.data.packing import TokenSequence
from r1mega.errors import UserError
from r1mega.megatron import platform, topology
from r1mega.megatron.architecture import transformer_config
from r1mega.megatron.platform.kernels import WholeLinear
from r1mega.megatron.policy import LocalBatch, NotFinite, Policy, TokenLoss
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of

pytestmark = pytest.mark.lane


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with support.cpu_platform():
        yield


def policy_of(config: dict = V3, distributed: bool = True, **train) -> Policy:
    arch = Architecture.from_hf(config)
    policy = Policy(arch, Layout(), Train(**{"chunk_tokens": 128, **train}), Optimizer(lr=1e-3, distributed=distributed))
    policy.exchange.load(reader_of(support.random_weights(arch)))
    return policy


# ---------------------------------------------------------------- refusals

SPLIT_HEADS = V3 | {"num_attention_heads": 6, "num_key_value_heads": 6}
REFUSED = {
    "world, dense": (V3, {"tp": 2, "cp": 3}, 4, ["tp x cp x pp = 6", "4 ranks"]),
    "world, experts": (V3, {"ep": 4, "pp": 2}, 4, ["etp x ep x pp = 8", "4 ranks"]),
    "heads": (SPLIT_HEADS, {"tp": 4, "ep": 4}, 4, ["tp=4", "6, attention heads"]),
    "key-value heads": (LLAMA, {"tp": 4}, 4, ["tp=4", "2, key-value heads"]),
    "dense MLP": (V3 | {"intermediate_size": 81}, {"tp": 2, "ep": 2}, 2, ["tp=2", "81, the dense layers"]),
    "shared experts": (V3 | {"moe_intermediate_size": 15}, {"tp": 2, "ep": 2}, 2, ["tp=2", "15, the shared experts"]),
    "experts": (V3, {"ep": 3}, 3, ["ep=3", "8, experts"]),
    "expert MLP": (V3, {"etp": 3, "tp": 1}, 3, ["etp=3", "16, the experts"]),
    "two MTP layers": (V3 | {"num_nextn_predict_layers": 2}, {}, 1, ["num_nextn_predict_layers=2", "one multi-token"]),
    "stages": (V3, {"pp": 4, "vpp": 2}, 4, ["pp x vpp = 8", "4 layers"]),
    "no experts": (QWEN, {"ep": 2}, 2, ["ep=2", "none"]),
    "groups of V3": (V3 | {"num_experts_per_tok": 2}, {}, 1, ["num_experts_per_tok=2", "topk_group=2", "ratio of 2"]),
    "groups of V2": (V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}, {}, 1, ["topk_group=1", "ratio of 1"]),
    "softmax with bias": (V3 | {"scoring_func": "softmax"}, {}, 1, ["softmax", "noaux_tc"]),
    "normalised softmax": (V2 | {"norm_topk_prob": True}, {}, 1, ["norm_topk_prob=True", "softmax"]),
    "plain sigmoid": (MOONLIGHT | {"norm_topk_prob": False}, {}, 1, ["norm_topk_prob=False", "sigmoid"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_layouts_name_the_numbers(name):
    config, layout, world, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        topology.check(Architecture.from_hf(config), Layout(**layout), world)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_interleaving_without_a_pipeline_is_refused():
    with pytest.raises(ValueError, match="vpp=2 needs pp >= 2"):
        Layout(vpp=2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA | {"rope_scaling": LLAMA["rope_scaling"] | {"low_freq_factor": 2.0}}, ["low_freq_factor=2.0", "1, 4 and 8192"]),
        (LLAMA | {"rope_scaling": LLAMA["rope_scaling"] | {"high_freq_factor": 8.0}}, ["high_freq_factor=8.0"]),
        (LLAMA | {"rope_scaling": LLAMA["rope_scaling"] | {"original_max_position_embeddings": 4096}}, ["4096"]),
        (QWEN | {"rope_scaling": support.YARN}, ["yarn", "latent attention"]),
        (V3 | {"rope_scaling": LLAMA["rope_scaling"]}, ["latent attention", "YaRN"]),
    ],
)
def test_rope_that_megatron_would_compute_otherwise_is_refused(config, words):
    with pytest.raises(UserError) as error:
        transformer_config(Architecture.from_hf(config), Layout(), Train())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_a_policy_refuses():
    with pytest.raises(UserError, match=r"mtp_loss=0.3 needs .*num_nextn_predict_layers=1"):
        policy_of(QWEN, mtp_loss=0.3)
    with pytest.raises(UserError, match=r"fp8=blockwise needs run\.platform=cuda"):
        policy_of(fp8="blockwise")
    with pytest.raises(UserError, match="a sequence of 129 tokens does not fit into a chunk of 128"):
        policy_of().microbatches([TokenSequence(torch.zeros(129, dtype=torch.int64), torch.ones(129))])
    reader = Policy(Architecture.from_hf(QWEN), Layout(), Train(chunk_tokens=128), None)
    reader.exchange.initialize(0.02, 1)
    with pytest.raises(RuntimeError, match="without an optimizer"):
        reader.step(reader.microbatches(support.sequences()), support.objective, 1e-3)


def test_trap_down_projections_stand_whole_on_every_rank():
    attention = policy_of().chunks[0].decoder.layers[0].self_attention
    assert isinstance(attention.linear_q_down_proj, WholeLinear) and isinstance(attention.linear_kv_down_proj, WholeLinear)


@pytest.mark.parametrize(
    ("layout", "world", "refused"),
    [({"tp": 2}, 2, True), ({"tp": 4, "ep": 2}, 4, True), ({"tp": 2, "etp": 2}, 2, False), ({"tp": 2, "ep": 4}, 4, False)],
)
def test_trap_experts_replicated_over_tensor_parallel_ranks(layout, world, refused):
    if refused and topology.MEGATRON_VERSION < (0, 19):
        with pytest.raises(UserError, match=f"tp={layout['tp']} with ep x etp = {layout.get('ep', 1)}.*use ep >= tp"):
            topology.check(Architecture.from_hf(V3), Layout(**layout), world)
    else:
        topology.check(Architecture.from_hf(V3), Layout(**layout), world)


def test_trap_interleaved_pipelines_do_not_batch_their_messages():
    interleaved = transformer_config(Architecture.from_hf(V3), Layout(pp=2, vpp=2), Train(mtp_loss=0.3))
    assert interleaved.overlap_p2p_comm and not interleaved.batch_p2p_comm
    plain = transformer_config(Architecture.from_hf(V3), Layout(pp=2), Train(mtp_loss=0.3))
    assert plain.batch_p2p_comm and not plain.overlap_p2p_comm


def test_platform_must_be_started(monkeypatch):
    monkeypatch.setattr(platform, "_active", None)
    with pytest.raises(RuntimeError, match=r"call r1mega\.megatron\.platform\.start first"):
        platform.active()


# ---------------------------------------------------------------- holding


def state(policy: Policy) -> list[Tensor]:
    """Copies of all weights, router biases included, and of everything the optimizer holds."""
    found = policy.host_copy()
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for values in part.optimizer.state.values():
            found += [value.clone() for value in values.values() if isinstance(value, Tensor)]
        found += [parameter.detach().clone() for group in part.optimizer.param_groups for parameter in group["params"]]
    return found


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_holding_puts_everything_back(dtype, distributed):
    policy = policy_of(distributed=distributed, dtype=dtype)
    other_weights = policy.host_copy()
    batches = policy.microbatches(support.sequences())
    of_other = policy.logprobs(batches)
    policy.step(batches, support.objective, 1e-2)
    before, own = state(policy), policy.logprobs(batches)
    with policy.holding(other_weights):
        assert same(policy.logprobs(batches), of_other)
    assert not same(own, of_other)
    assert same(state(policy), before) and same(policy.logprobs(batches), own)
    with pytest.raises(ZeroDivisionError), policy.holding(other_weights):
        raise ZeroDivisionError
    assert same(state(policy), before)


def test_training_goes_on_after_holding_as_if_nothing_had_been():
    results = []
    for holds in (False, True):
        policy = policy_of()
        reference, batches = policy.host_copy(), policy.microbatches(support.sequences())
        for _ in range(2):
            policy.step(batches, support.objective, 1e-2)
            if holds:
                with policy.holding(reference):
                    policy.logprobs(batches)
        results.append(state(policy))
    assert same(*results)


# ---------------------------------------------------------------- steps that are not applied


def nan_loss(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
    return TokenLoss(logprobs * math.nan)


def infinite_loss(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
    return TokenLoss(logprobs - torch.where(batch.mask, math.inf, 0.0))


def nan_gradient(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
    """A loss of 0 whose gradient is infinity times 0."""
    return TokenLoss((0.0 * logprobs).abs().sqrt())


@pytest.mark.parametrize(
    ("objective", "message"),
    [(nan_loss, "the loss is nan"), (infinite_loss, "the loss is -inf"), (nan_gradient, "the gradient norm is nan")],
)
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_is_not_finite_is_not_applied(objective, message, distributed, dtype):
    states = []
    for fails in (False, True):
        policy = policy_of(distributed=distributed, dtype=dtype, router_bias_rate=1e-3)
        batches = policy.microbatches(support.sequences())
        policy.step(batches, support.objective, 1e-3)
        if fails:
            before = state(policy)
            with pytest.raises(NotFinite, match=message):
                policy.step(batches, objective, 1e-3)
            assert same(state(policy), before)
        policy.step(batches, support.objective, 1e-3)
        states.append(state(policy))
    assert same(*states)


def test_router_biases_move_by_their_rate():
    """DeepSeek-V3's balancing without a loss (arXiv 2408.15664): up where an expert got too few tokens, down where too many."""
    policy = policy_of(router_bias_rate=1e-3)
    before = {key: weight.clone() for key, weight in policy.weights.items() if key[1].endswith("expert_bias")}
    policy.step(policy.microbatches(support.sequences()), support.objective, 1e-3)
    for key, bias in before.items():
        moved = policy.weights[key] - bias
        assert moved.abs().max() == pytest.approx(1e-3, rel=1e-3) and moved.min() < 0 < moved.max()
