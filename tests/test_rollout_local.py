"""The embedded engine against plain `transformers`: log-probs, greedy tokens, seeds, batching, stops, nucleus, frequencies, weights."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import DeepseekV3Config, GenerationConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from r1mega.errors import UserError
from r1mega.rollout import cache, local
from r1mega.rollout.cache import RowCache
from r1mega.rollout.engine import Request, Sample, SamplingParams, joined
from r1mega.rollout.local import LocalEngine
from r1mega.rollout.sampling import draw, uniforms

VOCAB = 61
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.8,
}  # fmt: skip


def v3(**changes: object) -> DeepseekV3Config:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 4,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 6, "max_position_embeddings": 128, "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    return DeepseekV3Config(**{**sizes, **changes})


CONFIGS = {
    "v3": v3,
    "v3-yarn": lambda: v3(rope_parameters=YARN, q_lora_rank=None),
    "qwen2-tied": lambda: Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        max_position_embeddings=128,
    ),
}  # fmt: skip


@functools.cache
def reference(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model, its weights large enough for peaked and varied distributions."""
    torch.manual_seed(seed)
    model = Auto.from_config(CONFIGS[kind](), dtype=torch.float32, experts_implementation="eager").eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.normal_(1.0, 0.2)
        else:
            tensor.normal_(0.0, 0.05 if "correction" in name else 0.2)
    return model


def checkpoint(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `model` as a Hugging Face checkpoint names them."""
    for name, tensor in model.state_dict().items():
        prefix, _, stacked = name.rpartition(".experts.")
        for expert, matrix in enumerate(tensor if prefix else ()):
            if stacked == "down_proj":
                yield f"{prefix}.experts.{expert}.down_proj.weight", matrix
            else:
                yield f"{prefix}.experts.{expert}.gate_proj.weight", matrix[: len(matrix) // 2]
                yield f"{prefix}.experts.{expert}.up_proj.weight", matrix[len(matrix) // 2 :]
        if not prefix and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield name, tensor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def engine(folder: Path, kind: str = "v3", max_batch: int = 64, **options: object) -> LocalEngine:
    config: PreTrainedConfig = CONFIGS[kind]()
    config.save_pretrained(folder / kind)
    built = LocalEngine(folder / kind, max_batch=max_batch, **options)
    built.load_weights(checkpoint(reference(kind)), version=7)
    return built


def prompts(count: int, longest: int = 9) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(1)
    return [tuple(rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist()) for _ in range(count)]


def ragged(count: int = 12, siblings: int = 3) -> list[Request]:
    """Prompts of mixed lengths, several samples each, budgets from 1 to 40 tokens."""
    return [
        Request(prompt, seed=100 * index + sibling, max_new_tokens=1 + (7 * index + 13 * sibling) % 40)
        for index, prompt in enumerate(prompts(count))
        for sibling in range(siblings)
    ]


def forward_logprobs(model: PreTrainedModel, sample: Sample, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [response, vocab] from one ordinary forward pass over the whole sequence."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)


def gap(model: PreTrainedModel, samples: list[Sample], temperature: float = 1.0) -> float:
    """Largest difference between the samples' log-probs and those of an ordinary forward pass."""
    worst = 0.0
    for sample in samples:
        expected = forward_logprobs(model, sample, temperature).gather(1, torch.tensor(sample.response_ids)[:, None]).squeeze(1)
        worst = max(worst, float((expected - torch.tensor(sample.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("max_batch", [5, 64])
def test_logprobs_equal_a_full_forward(folder: Path, kind: str, max_batch: int) -> None:
    samples = engine(folder, kind, max_batch).generate(ragged(), SamplingParams())
    worst = gap(reference(kind), samples)
    print(f"{kind}, max_batch {max_batch}: largest log-prob gap {worst:.1e} over {sum(len(s.response_ids) for s in samples)} tokens")
    assert worst <= 1e-5
    assert {len(set(sample.response_ids)) > 5 for sample in samples if len(sample.response_ids) > 20} == {True}


def test_logprobs_are_tempered_and_before_top_p(folder: Path) -> None:
    samples = engine(folder).generate(ragged(), SamplingParams(temperature=0.7, top_p=0.8))
    assert gap(reference("v3"), samples, temperature=0.7) <= 1e-5


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_equals_generate(folder: Path, kind: str) -> None:
    samples = engine(folder, kind).generate([Request(prompt, 0, 30) for prompt in prompts(6)], SamplingParams(temperature=0.0))
    for sample in samples:
        greedy = GenerationConfig(do_sample=False, max_new_tokens=30, pad_token_id=0)
        expected = reference(kind).generate(torch.tensor([sample.prompt_ids]), generation_config=greedy)
        assert sample.response_ids == tuple(expected[0, len(sample.prompt_ids) :].tolist())
    assert gap(reference(kind), samples) <= 1e-5


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, stop_token_ids=(3, 4))])
def test_a_seed_decides_its_sample_whatever_shares_the_batch(folder: Path, sampling: SamplingParams) -> None:
    requests = ragged(8, siblings=2)
    crowd = engine(folder).generate(requests, sampling)
    for max_batch in (3, 7):
        other = engine(folder, max_batch=max_batch).generate(requests[::-1], sampling)[::-1]
        assert [sample.response_ids for sample in other] == [sample.response_ids for sample in crowd]
    alone = engine(folder)
    for request, sample in zip(requests[::5], crowd[::5], strict=True):
        assert alone.generate([request], sampling)[0].response_ids == sample.response_ids
    assert len({sample.response_ids for sample in crowd}) == len(requests)


def test_a_response_drawn_piece_by_piece_is_the_one_drawn_at_once(folder: Path) -> None:
    sampling, asked, drawing = SamplingParams(stop_token_ids=(3, 11)), ragged(), engine(folder)
    whole = drawing.generate(asked, sampling)
    first = drawing.generate([replace(one, max_new_tokens=min(5, one.max_new_tokens)) for one in asked], sampling)
    cut = [len(begun.response_ids) < one.max_new_tokens and begun.finish == "length" for one, begun in zip(asked, first, strict=True)]
    going_on = [place for place, is_cut in enumerate(cut) if is_cut]
    assert 0 < len(going_on) < len(first)
    rest = [
        replace(one, prompt_ids=one.prompt_ids + begun.response_ids, max_new_tokens=one.max_new_tokens - 5, begun=5)
        for one, begun in ((asked[place], first[place]) for place in going_on)
    ]
    wait = drawing.start(rest, sampling)
    for place, more in zip(going_on, wait(), strict=True):
        first[place] = joined(first[place], more)
    for one, other in zip(first, whole, strict=True):
        assert replace(one, logprobs=()) == replace(other, logprobs=())
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_small_passes_and_few_logits_at_a_time_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine(folder).generate(ragged(), SamplingParams())
    monkeypatch.setattr(local, "PREFILL_TOKENS", 20)
    monkeypatch.setattr(local, "LOGITS", 3 * VOCAB)
    parts = engine(folder).generate(ragged(), SamplingParams())
    assert [sample.response_ids for sample in parts] == [sample.response_ids for sample in whole]


def test_long_runs_rewind_the_window(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens pass through two rows than the cache has columns, and single sequences grow beyond it."""
    monkeypatch.setattr(cache, "STEPS", 16)
    monkeypatch.setattr(cache, "FLOOR", 40)
    rewinds = []
    rewind = RowCache.rewind
    monkeypatch.setattr(RowCache, "rewind", lambda self, lengths: (rewinds.append(self.end), rewind(self, lengths)))
    requests = [Request(prompt, seed, 20 + seed % 7) for seed, prompt in enumerate(prompts(12, longest=50))]
    samples = engine(folder, max_batch=2).generate(requests, SamplingParams())
    assert len(rewinds) >= 2 and max(rewinds) > min(rewinds)
    assert gap(reference("v3"), samples) <= 1e-5
    assert max(len(sample.prompt_ids) for sample in samples) > cache.FLOOR


def test_stop_and_length(folder: Path) -> None:
    stops = (3, 11, 42)
    samples = engine(folder).generate(ragged(), SamplingParams(stop_token_ids=stops))
    free = engine(folder).generate(ragged(), SamplingParams())
    for request, sample, unstopped in zip(ragged(), samples, free, strict=True):
        hit = next((i for i, token in enumerate(unstopped.response_ids) if token in stops), None)
        kept = unstopped.response_ids if hit is None else unstopped.response_ids[: hit + 1]
        assert sample.response_ids == kept
        assert sample.finish == ("length" if hit is None else "stop")
        assert unstopped.finish == "length" and len(unstopped.response_ids) == request.max_new_tokens
        assert sample.prompt_ids == request.prompt_ids and len(sample.logprobs) == len(sample.response_ids)
    assert {sample.finish for sample in samples} == {"stop", "length"}


def test_top_p_stays_inside_the_nucleus(folder: Path) -> None:
    samples = engine(folder).generate(ragged(), SamplingParams(top_p=0.6))
    outside = 0
    for sample in samples:
        probs, order = forward_logprobs(reference("v3"), sample).exp().sort(-1, descending=True)
        before = probs.cumsum(-1) - probs
        rank = (order == torch.tensor(sample.response_ids)[:, None]).int().argmax(-1, keepdim=True)
        outside += int((before.gather(1, rank) > 0.6 + 1e-5).sum())
    assert outside == 0


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic and degrees of freedom, rare cells (expected count below 5) pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    return float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.7), SamplingParams(top_p=0.7)])
def test_sampling_frequencies(folder: Path, sampling: SamplingParams) -> None:
    """Sequential seeds; first tokens against the model's distribution, and second tokens given the most frequent first."""
    samples = engine(folder, max_batch=4096).generate([Request((5, 6, 7), seed, 2) for seed in range(4096)], sampling)
    firsts = np.array([sample.response_ids[0] for sample in samples])
    seconds = np.array([sample.response_ids[1] for sample in samples])
    common = int(np.bincount(firsts).argmax())
    logprobs = forward_logprobs(reference("v3"), Sample((5, 6, 7), (common, 0), (), "length", 0), sampling.temperature)
    for drawn, row in ((firsts, logprobs[0]), (seconds[firsts == common], logprobs[1])):
        probs, order = row.exp().sort(descending=True)
        probs = probs.where(probs.cumsum(0) - probs < sampling.top_p, 0.0)
        target = np.zeros(VOCAB)
        target[order.numpy()] = (probs / probs.sum()).numpy()
        statistic, freedom = chi_square(np.bincount(drawn, minlength=VOCAB), target)
        # Mean `freedom`, variance 2 * `freedom`; four deviations.
        assert freedom >= 3 and statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


def test_uniforms_are_uniform_and_independent_of_neighbours() -> None:
    seeds, positions = np.meshgrid(np.arange(512, dtype=np.uint64), np.arange(64), indexing="ij")
    grid = uniforms(seeds.ravel(), positions.ravel()).reshape(512, 64)
    assert grid.min() >= 0 and grid.max() < 1 and len(np.unique(grid)) == grid.size
    counts = np.histogram(grid, bins=64, range=(0, 1))[0]
    statistic, freedom = chi_square(counts, np.full(64, 1 / 64))
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    deviation = grid.size**-0.5
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, :-1], grid[:-1, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 * deviation


def test_draw_never_takes_a_token_of_probability_zero() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    tokens, logprobs = draw(logits, torch.tensor([0.0, 0.49, 0.5, 1 - 2.0**-53], dtype=torch.float64), SamplingParams())
    assert tokens.tolist() == [1, 1, 3, 3]
    assert torch.equal(logprobs, torch.full((4,), 0.5).log())


def test_new_weights_change_samples_and_version(folder: Path) -> None:
    rollout = engine(folder)
    before = rollout.generate(ragged(), SamplingParams())
    source = [(name, tensor.clone()) for name, tensor in checkpoint(reference("v3", 1))]
    rollout.load_weights([*source, ("model.layers.3.eh_proj.weight", torch.zeros(2, 2))], version=8)
    for _, tensor in source:
        tensor.fill_(torch.nan)  # the engine holds copies
    after = rollout.generate(ragged(), SamplingParams())
    assert {sample.weight_version for sample in before} == {7} and {sample.weight_version for sample in after} == {8}
    assert gap(reference("v3", 1), after) <= 1e-5
    rollout.load_weights(checkpoint(reference("v3")), version=9)
    assert [sample.response_ids for sample in rollout.generate(ragged(), SamplingParams())] == [sample.response_ids for sample in before]


def test_bf16_engine_takes_fp32_weights(folder: Path) -> None:
    samples = engine(folder, dtype=torch.bfloat16).generate(ragged(), SamplingParams())
    gaps = [gap(reference("v3"), [sample]) for sample in samples]
    assert np.median(gaps) < 0.5 and len(samples) == len(ragged())


def test_weight_errors(folder: Path) -> None:
    rollout = engine(folder)
    weights = dict(checkpoint(reference("v3")))
    weights.pop("model.norm.weight")
    weights["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(16, 31)
    weights["model.layers.9.extra"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        rollout.load_weights(weights.items(), version=8)
    shape = "experts.3.up_proj.weight is [16, 31] instead of [16, 32]"
    for part in ("model.norm.weight is missing", shape, "model.layers.9.extra is unknown"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no weights"):
        rollout.generate(ragged(), SamplingParams())
    with pytest.raises(UserError, match=r"came twice"):
        rollout.load_weights([*checkpoint(reference("v3")), ("model.norm.weight", torch.ones(32))], version=8)


@pytest.mark.parametrize(
    ("request_", "sampling", "message"),
    [
        (Request((), 0, 4), SamplingParams(), "0 prompt tokens"),
        (Request((1,), 0, 0), SamplingParams(), "max_new_tokens=0"),
        (Request((1, VOCAB), 0, 4), SamplingParams(), f"vocabulary of {VOCAB}"),
        (Request((1,) * 100, 0, 29), SamplingParams(), "context of 128"),
        (Request((1,), 0, 4), SamplingParams(temperature=-1.0), "temperature"),
        (Request((1,), 0, 4), SamplingParams(top_p=0.0), "top_p"),
    ],
)
def test_bad_requests(folder: Path, request_: Request, sampling: SamplingParams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine(folder).generate([request_], sampling)


def test_bad_models(folder: Path) -> None:
    with pytest.raises(UserError, match="no model configuration"):
        LocalEngine(folder / "nowhere")
    Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=0, num_hidden_layers=2).save_pretrained(folder / "sliding")
    with pytest.raises(UserError, match="sliding-window"):
        LocalEngine(folder / "sliding")


def test_nothing_to_do(folder: Path) -> None:
    rollout = engine(folder)
    assert rollout.generate([], SamplingParams()) == []
    rollout.close()
