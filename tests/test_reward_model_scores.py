"""Reward models score and learn like transformers' `...ForSequenceClassification`, from its folders and back."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")
transformers = pytest.importorskip("transformers")
import megatron_support as support
from megatron_support import LLAMA, QWEN, V3
from safetensors.torch import load_file

from r1mega import cli
from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.errors import UserError
from r1mega.megatron import checkpoint, reward_model
from r1mega.megatron.policy import NotFinite, Policy
from r1mega.megatron.reward_model import RewardModel
from r1mega.objectives import preference
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.weights.architecture import Architecture, read_config, scored_config
from r1mega.weights.dist_checkpoint import stored_shapes
from r1mega.weights.moving import reader_of
from r1mega.weights.safetensors_in import Reader
from r1mega.weights.safetensors_out import Encoding, save

pytestmark = pytest.mark.lane
TOLERANCE = 1e-5
MODELS = {"v3": V3, "qwen": QWEN, "llama": LLAMA}
IDS = [sequence.tokens.tolist() for sequence in support.sequences()]


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with support.cpu_platform():
        yield


def classifier(config: dict, folder: Path, seed: int = 0) -> torch.nn.Module:
    """A random reward model of transformers, saved."""
    torch.manual_seed(seed)
    config = {**scored_config(config), "pad_token_id": None}
    model = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**config)).float().eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("weight", "bias", "proj")):
                value.add_(torch.randn(value.shape) * 0.08)
    model.save_pretrained(folder)
    return model


def scores_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in IDS])


def opened(folder: Path, optimizer: Optimizer | None = None) -> Policy:
    arch = Architecture.from_hf(read_config(folder))
    policy = Policy(arch, Layout(), Train(chunk_tokens=64, logprob_chunk=50), optimizer)
    with Reader(folder) as reader:
        policy.exchange.load(reader.read)
    return policy


def pairs_loss(scores: Tensor) -> Tensor:
    return preference.pairwise(scores[0::2], scores[1::2]).mean()


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_transformers(name, tmp_path):
    model = classifier(MODELS[name], tmp_path)
    policy = opened(tmp_path)
    batches = policy.microbatches(reward_model.as_sequences(IDS))
    assert len(batches) > 3
    found = reward_model.scores(policy, batches, len(IDS))
    with torch.no_grad():
        expected = scores_of(model)
    worst = (found - expected).abs().max().item()
    print(f"{name}: scores from {expected.min():.2f} to {expected.max():.2f}, largest difference {worst:.2e}")
    assert worst <= TOLERANCE and expected.std() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_pairwise_loss_are_those_of_transformers(name, tmp_path):
    model = classifier(MODELS[name], tmp_path)
    expected_loss = pairs_loss(scores_of(model))
    expected_loss.backward()
    policy = opened(tmp_path, Optimizer(lr=1e-3, clip_grad=0.0, distributed=False))
    result, before = reward_model.step(policy, policy.microbatches(reward_model.as_sequences(IDS)), len(IDS), pairs_loss, 0.0)
    assert result.loss == pytest.approx(expected_loss.item(), rel=1e-5)
    gradients = {key: weight.main_grad.clone() for key, weight in policy.weights.items() if hasattr(weight, "main_grad")}
    found = support.canonical_values(support.Outcome(policy, {}, {}, gradients))
    expected = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() >= {"score.weight", "model.embed_tokens.weight"}
    worst = 0.0
    for key, value in found.items():
        gradient = gradient_of(key, expected)
        if gradient is not None:
            worst = max(worst, ((value - gradient).norm() / gradient.norm().clamp_min(1e-12)).item())
    norm = sum(gradient.square().sum() for gradient in expected.values()).sqrt().item()
    print(f"{name}: largest relative difference of a gradient {worst:.2e}")
    assert worst < 2e-5 and result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert torch.equal(before, reward_model.scores(policy, policy.microbatches(reward_model.as_sequences(IDS)), len(IDS)))  # lr 0


def gradient_of(tensor: str, gradients: dict[str, Tensor]) -> Tensor | None:
    """That of a canonical tensor: transformers keeps the experts of a layer in one parameter. None for biases that have none."""
    if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", tensor):
        folder, expert, part = match.groups()
        if part == "down":
            return gradients[f"{folder}.down_proj"][int(expert)]
        return gradients[f"{folder}.gate_up_proj"][int(expert)].chunk(2)[part == "up"]
    return gradients.get(tensor)


# ---------------------------------------------------------------- scored on a policy


def policy_of(config: dict, **train) -> Policy:
    arch = Architecture.from_hf(config)
    policy = Policy(arch, Layout(), Train(chunk_tokens=64, **train), Optimizer(lr=1e-3))
    policy.exchange.load(reader_of(support.random_weights(arch, seed=1)))
    return policy


@pytest.mark.parametrize(("name", "train"), [("v3", {}), ("v3", {"mtp_loss": 0.3}), ("qwen", {}), ("llama", {})])
def test_a_policy_lends_its_model_and_gets_it_back(name, train, tmp_path):
    models = [classifier(MODELS[name], tmp_path / str(seed), seed) for seed in range(2)]
    policy = policy_of(MODELS[name], **train)
    batches = policy.microbatches(support.sequences())
    policy.step(batches, support.objective, 1e-3)
    before, logprobs, reference = policy.host_copy(), policy.logprobs(batches), [weight * 2 for weight in policy.host_copy()]
    reward_models = [RewardModel(policy, tmp_path / str(seed)) for seed in range(2)]
    for model, lent in [*zip(models, reward_models, strict=True)] * 2:
        with policy.holding(reference):
            policy.logprobs(batches)
        with torch.no_grad():
            assert (lent.scores(IDS) - scores_of(model)).abs().max() <= TOLERANCE
    assert all(torch.equal(old, new) for old, new in zip(before, policy.weights.values(), strict=True))
    assert all(torch.equal(old, new) for old, new in zip(logprobs, policy.logprobs(batches), strict=True))
    policy.step(batches, support.objective, 1e-3)
    assert reward_models[0].scores([]).shape == (0,)


def test_folders_that_are_no_reward_model_of_the_policy(tmp_path):
    policy = policy_of(QWEN)
    classifier(QWEN | {"num_hidden_layers": 3}, tmp_path / "shallow")
    with pytest.raises(UserError, match=r"shallow: a reward model .* must have its shapes, but its layers is 3, the policy's 4$"):
        RewardModel(policy, tmp_path / "shallow")
    classifier(LLAMA, tmp_path / "llama")
    with pytest.raises(UserError, match=r"its family is llama, the policy's qwen2$"):
        RewardModel(policy, tmp_path / "llama")
    classifier(QWEN, tmp_path / "whole")
    folder = language_model(QWEN, tmp_path / "language")
    with pytest.raises(UserError, match=r"language: not a reward model"):
        RewardModel(policy, folder)
    with pytest.raises(UserError, match=r"a sequence of 65 tokens does not fit into a chunk of 64"):
        RewardModel(policy, tmp_path / "whole").scores([[1] * 65])
    with pytest.raises(UserError, match=r"whole: a reward model, which scores text and writes none"):
        ModelFolder(tmp_path / "whole")


def test_labels_are_counted():
    names = {"architectures": ["Qwen2ForSequenceClassification"]}
    assert Architecture.from_hf(QWEN | names | {"num_labels": 1}) == Architecture.from_hf(QWEN).scored()
    assert Architecture.from_hf(QWEN | names | {"id2label": {"0": "good"}}).head == "score"
    for wrong, labels in (({}, 2), ({"num_labels": 5}, 5), ({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3)):
        with pytest.raises(UserError, match=rf"Qwen2ForSequenceClassification with {labels} labels; a reward model has one"):
            Architecture.from_hf(QWEN | names | wrong)


# ---------------------------------------------------------------- from language models, and as files


def language_model(config: dict, folder: Path) -> Path:
    arch = Architecture.from_hf(config)
    folder.mkdir()
    save(folder, arch, support.random_weights(arch), Encoding(torch.float32))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


def test_a_language_model_gives_everything_but_the_score(tmp_path):
    folder, arch = language_model(V3, tmp_path / "language"), Architecture.from_hf(V3)
    drawn = []
    for seed in (0, 0, 1):
        policy = Policy(arch.scored(), Layout(), Train(), None)
        with Reader(folder) as reader:
            reward_model.initialize(policy, reader, 0.01, seed)
        found = {name: value.clone() for name, value in policy.exchange.gather(torch.float32).items()}
        drawn.append(found.pop("score.weight"))
        given = load_file(folder / "model.safetensors")
        assert found.keys() == {name for name in given if not name.startswith(("model.layers.4.", "lm_head."))}  # layer 4 is the MTP layer
        assert all(torch.equal(value, given[name]) for name, value in found.items())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (1, 48) and 0.005 < drawn[0].std() < 0.02


def test_a_reward_model_is_audited_and_converted(tmp_path, capsys):
    classifier(V3, tmp_path / "hf")
    assert cli.main(["audit", str(tmp_path / "hf")]) == 0 and "no findings" in capsys.readouterr().out
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "megatron"), "--processes", "1"]) == 0
    policy = Policy(Architecture.from_hf(V3).scored(), Layout(), Train(), None)
    wanted = policy.chunks[0].sharded_state_dict(metadata=checkpoint.metadata())
    checkpoint.check(tmp_path / "megatron", {name: state for name, state in wanted.items() if not name.endswith("_extra_state")})
    assert stored_shapes(tmp_path / "megatron")["score.weight"] == (1, 48)
    assert cli.main(["convert", str(tmp_path / "megatron"), str(tmp_path / "back"), "--processes", "1"]) == 0
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")
    assert type(again).__name__ == "DeepseekV3ForSequenceClassification" and again.num_labels == 1


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    classifier(V3, tmp_path)
    policy = opened(tmp_path, Optimizer(lr=1e-3))
    batches, before = policy.microbatches(reward_model.as_sequences(IDS)), policy.host_copy()
    for factor in (float("nan"), 1e38):  # the loss itself, or its gradient only
        with pytest.raises(NotFinite):
            reward_model.step(policy, batches, len(IDS), lambda scores, factor=factor: (scores * factor).square().mean(), 1e-3)
    assert all(torch.equal(old, new) for old, new in zip(before, policy.weights.values(), strict=True))
