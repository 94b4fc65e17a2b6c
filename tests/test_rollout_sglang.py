"""The SGLang engine against a real server, one per family and test run."""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sglang_ranks
import sglang_support as support
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from attribution_support import NOW, PLAIN, looked_at
from megatron_support import cpu_platform
from routing_support import chosen
from torch import Tensor

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.errors import UserError
from r1mega.megatron.policy import Policy
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rollout.engine import Request, Sample, SamplingParams, Scoring
from r1mega.rollout.engine import joined as joined_samples
from r1mega.rollout.local import LocalEngine
from r1mega.rollout.sglang import SglangEngine
from r1mega.rollout.sglang_checksums import on_cpu as checksum
from r1mega.rollout.sglang_servers import Started
from r1mega.weights.moving import reader_of
from r1mega.weights.shipping import tensors
from r1mega.weights.source import Mapped
from r1mega.weights.wire import Wire

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.fixture(scope="module", params=support.MODELS)
def served(request, tmp_path_factory) -> Iterator[tuple[Started, Path]]:
    model = support.MODELS[request.param]
    with support.served(model, tmp_path_factory.mktemp("server")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(support.KEY, server.client.key)
        with cpu_platform():
            yield server, model


@pytest.fixture(scope="module")
def joined(served, tmp_path_factory):
    """An engine with weights of seed 0, and `transformers`' model with the same."""
    server, model = served
    folder = tmp_path_factory.mktemp("reference")
    with support.engine(server, model, folder) as engine:
        engine.sync(support.source(model, 0), version=0)
        yield engine, support.reference(model, 0, folder)


def restored(engine, model: Path) -> None:
    engine.sync(support.source(model, 0), version=0)


# ---------------------------------------------------------------- drawing and scoring


@pytest.mark.parametrize("sampling", [PLAIN, SamplingParams(0.6, 0.8), SamplingParams(1.7, 1.0, (2, 9)), SamplingParams(0.0)])
def test_log_probs_are_the_trainers(joined, sampling):
    engine, model = joined
    samples = engine.generate(support.requests(), sampling)
    assert support.gap(model, samples, sampling) <= 1e-4
    assert {sample.finish for sample in samples} <= {"stop", "length"}
    for request, sample in zip(support.requests(), samples, strict=True):
        assert sample.prompt_ids == request.prompt_ids
        assert (sample.weight_version, sample.earlier_versions) == (0, ())
        stops = set(sampling.stop_token_ids) | {2}
        assert (sample.finish == "stop") == (sample.response_ids[-1] in stops)
        assert sample.finish == "stop" or len(sample.response_ids) == request.max_new_tokens
        assert not stops & set(sample.response_ids[:-1])


def test_recorded_experts_are_those_of_the_model(served, joined, tmp_path):
    """Canonical numbers of experts, the same as the embedded engine's, of every token that was fed, many sequences in a batch."""
    (_, folder), (engine, model) = served, joined
    asked = replace(PLAIN, routing=True)
    if not hasattr(model.config, "n_routed_experts"):
        with pytest.raises(UserError, match="needs a model with experts"):
            engine.generate(support.requests(), asked)
        return
    samples = engine.generate(support.requests(), asked)
    fed = [Request((*one.prompt_ids, *one.response_ids)[:-1], 0, 1) for one in samples]
    local = LocalEngine(folder)
    local.sync(support.source(folder, 0), version=0)
    for sample, read in zip(samples, local.generate(fed, asked), strict=True):
        assert sample.routing.dtype == torch.uint8
        found = sample.routing.long().sort(-1).values
        assert torch.equal(found, chosen(model, sample))
        assert torch.equal(found, read.routing.long().sort(-1).values)
    experts = torch.cat([sample.routing.flatten() for sample in samples]).unique()
    print(f"{sum(len(one.prompt_ids) for one in fed)} tokens went through {len(experts)} experts, on both engines and in transformers")
    assert all(one.routing is None for one in engine.generate(support.requests(2), PLAIN))


def test_a_response_that_is_cut_says_so(joined):
    engine, _ = joined
    support.check_cuts(engine, SamplingParams(1.0, 1.0, tuple(range(2, 20))))


def test_a_seed_alone_decides_what_is_drawn(joined):
    engine, _ = joined
    asked = support.requests()
    together = engine.generate(asked, PLAIN)
    assert support.same(engine.generate(asked[::-1], PLAIN), together[::-1])
    assert support.same([sample for request in asked[:3] for sample in engine.generate([request], PLAIN)], together[:3])
    other = engine.generate([replace(request, seed=request.seed + 1) for request in asked], PLAIN)
    assert sum(a.response_ids != b.response_ids for a, b in zip(together, other, strict=True)) >= 10


def test_a_response_drawn_piece_by_piece_is_the_one_drawn_at_once(joined):
    engine, _ = joined
    asked = support.requests()
    whole = engine.generate(asked, PLAIN)
    first = engine.generate([replace(one, max_new_tokens=6) for one in asked], PLAIN)
    cut = [place for place, one in enumerate(first) if one.finish == "length"]
    assert cut
    rest = [
        replace(asked[place], prompt_ids=asked[place].prompt_ids + first[place].response_ids, max_new_tokens=10, begun=6) for place in cut
    ]
    for place, more in zip(cut, engine.start(rest, PLAIN)(), strict=True):
        first[place] = joined_samples(first[place], more)
    assert support.same(first, whole)


def test_a_server_that_shares_the_trainers_gpus_sleeps_and_draws_the_same_afterwards(served, joined, tmp_path, monkeypatch):
    server, model = served
    expected = joined[0].generate(support.requests(), PLAIN)
    # A recipe says so only of servers that the run starts; this one is started for all tests.
    monkeypatch.setattr(SglangEngine, "colocated", True)
    with support.engine(server, model, tmp_path) as engine:
        for version in (1, 2):
            engine.sync(support.source(model, 0), version)
            samples = engine.generate(support.requests(), PLAIN)
            assert support.same([replace(one, weight_version=0) for one in samples], expected)
            engine.sleep()
            engine.sleep()
            with pytest.raises(UserError, match="has no weights"):
                engine.generate(support.requests(), PLAIN)
        engine.sync(support.source(model, 0), version=3)
        engine.generate(support.requests(1), PLAIN)
    restored(joined[0], model)
    assert support.same(joined[0].generate(support.requests(), PLAIN), expected)


def test_nucleus_leaves_out_what_is_beyond_it(joined):
    engine, model = joined
    prompt = support.requests()[0].prompt_ids
    first = [
        sample.response_ids[0] for sample in engine.generate([Request(prompt, seed, 1) for seed in range(200)], SamplingParams(1.0, 0.3))
    ]
    probs = model(input_ids=torch.tensor([prompt])).logits[0, -1].float().softmax(-1)
    ordered = probs.sort(descending=True)
    inside = ordered.indices[ordered.values.cumsum(0) - ordered.values < 0.3].tolist()
    assert set(first) <= set(inside)
    assert len(set(first)) > 1


def test_scores_are_those_of_the_embedded_engine(joined, served, tmp_path):
    engine, _ = joined
    _, model = served
    local = LocalEngine(model)
    local.sync(support.source(model, 0), version=0)
    scorings = [Scoring(tuple(range(3, 40)), 5), Scoring((4, 9, 9, 10), 1), Scoring((7, 8, 9), 2)]
    for found, expected in zip(engine.score(scorings, 5), local.score(scorings, 5), strict=True):
        assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-4)
        assert torch.allclose(found.top_logprobs, expected.top_logprobs, atol=1e-4)
        assert torch.equal(found.top_ids, expected.top_ids)
    assert engine.score(scorings[:1], 0)[0].top_ids.shape == (32, 0)


def test_what_cannot_be_asked_is_refused_and_kills_nobody(joined):
    engine, _ = joined
    for request, reason in [
        (Request((5, 128), 1, 4), "outside the vocabulary"),
        (Request((5,) * 510, 1, 4), "exceed the model's context"),
    ]:
        with pytest.raises(UserError, match=reason):
            engine.generate([request], PLAIN)
    (sample,) = engine.generate([Request((5,) * 500, 1, 12)], SamplingParams(0.0))
    assert len(sample.response_ids) == 12 or sample.finish == "stop"


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("limit", [1, 60_000, 2**28])
@pytest.mark.parametrize("transport", ["tensor", "request", "distributed", "disk"])
def test_every_transport_brings_every_weight(served, tmp_path, transport, limit):
    server, model = served
    (tmp_path / "reference").mkdir()
    seed = {"tensor": 1, "distributed": 2, "disk": 3, "request": 5}[transport]
    expected = support.reference(model, seed, tmp_path / "reference")
    with support.engine(server, model, tmp_path, transport=transport, bucket_bytes=limit) as engine:
        engine.sync(support.source(model, 50), version=49)
        engine.sync(support.source(model, seed), version=seed)
        samples = engine.generate(support.requests(), PLAIN)
        assert {sample.weight_version for sample in samples} == {seed}
        assert support.gap(expected, samples, PLAIN) <= 1e-4
    assert sums(server) == wanted(model, seed)
    assert not list(tmp_path.glob("**/weights/*.safetensors"))


def sums(server: Started) -> dict[str, str]:
    (rank,) = server.client.post("/weights_checker", {"action": "checksum"}, 60)["ranks"]
    return rank["checksums"]


def wanted(model: Path, seed: int) -> dict[str, str]:
    found = support.source(model, seed).params(EngineLayout(device="cpu"), 0, Wire("float32"), 2**28, 0, 0)
    return {name: checksum(value) for bucket, flat in found for name, value in tensors(bucket, flat)}


# By number of trainer ranks.
DENSE = {2: [{"tp": 2}, {"pp": 2}, {}], 4: [{"tp": 2, "pp": 2}]}
MOE = {2: [{"tp": 2, "ep": 2}, {"pp": 2}, {"ep": 2}, {}], 4: [{"tp": 2, "pp": 2, "ep": 2}]}


@pytest.mark.parametrize(("transport", "ranks"), [("tensor", 2), ("distributed", 2), ("disk", 2), ("tensor", 4)])
def test_shards_of_all_ranks_reach_the_server(served, tmp_path, transport, ranks):
    server, model = served
    layouts = (MOE if "base" in model.name else DENSE)[ranks]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = support.settings(server, transport=transport, bucket_bytes=50_000).model_dump_json()
    mp.spawn(sglang_ranks.work, (ranks, store.port, tmp_path, model, settings, layouts), nprocs=ranks)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    for index in range(len(layouts)):
        folder = tmp_path / f"reference-{index}"
        folder.mkdir()
        samples = [Sample(**row) for rank in found for row in rank[index]]
        assert {sample.weight_version for sample in samples} == {100 + index}
        assert support.gap(support.reference(model, 100 + index, folder), samples, PLAIN) <= 1e-4
    assert sums(server) == wanted(model, 100 + len(layouts) - 1)


def test_weights_that_arrive_altered_are_named_and_never_served(served, joined, tmp_path, monkeypatch):
    server, model = served
    with support.engine(server, model, tmp_path) as engine:
        send = engine._transport.send

        def altered(bucket, flat: Tensor) -> None:
            for name, value in tensors(bucket, flat):
                if name == "model.layers.1.self_attn.o_proj.weight":
                    value[3, 5] += 1e-3
            send(bucket, flat)

        monkeypatch.setattr(engine, "_new_transport", lambda here: engine._transport)
        monkeypatch.setattr(engine._transport, "send", altered)
        with pytest.raises(UserError, match=r"tried 2 times; the last time: .*model\.layers\.1\.self_attn\.o_proj\.weight are not the"):
            engine.sync(support.source(model, 4), version=4)
        with ThreadPoolExecutor(1) as thread:
            held = thread.submit(
                engine._pool.clients[0].post, "/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}, 60
            )
            time.sleep(3)
            assert not held.done(), "a server whose weights are not right must stay paused"
            monkeypatch.undo()
            restored(engine, model)
            assert held.result()["meta_info"]["weight_version"] == "0"


def test_a_server_that_was_synced_by_nobody_serves_nothing(served, tmp_path):
    server, model = served
    with support.engine(server, model, tmp_path) as engine, pytest.raises(UserError, match="has no weights"):
        engine.generate(support.requests()[:1], PLAIN)


# ---------------------------------------------------------------- servers that are not as they should be


def test_a_wrong_key_is_one_line(served, tmp_path, monkeypatch):
    server, model = served
    monkeypatch.setenv(support.KEY, "another")
    with (
        pytest.raises(UserError, match=f"the server wants its API key, and {support.KEY} holds another one .*HTTP 401") as error,
        support.engine(server, model, tmp_path),
    ):
        pass
    assert "\n" not in str(error.value)
    assert server.client.key not in str(error.value)


def test_a_server_that_is_not_there_is_one_line(served, tmp_path):
    server, model = served
    with (
        pytest.raises(
            UserError, match=r"no SGLang server answers within rollout.sglang.start_timeout_s=2 \(http://127.0.0.1:9/model_info: .*refused"
        ),
        support.engine(server, model, tmp_path, addresses=["http://127.0.0.1:9"], start_timeout_s=2.0),
    ):
        pass


def test_another_model_on_the_server_is_named(served, tmp_path):
    server, model = served
    other = next(path for path in support.MODELS.values() if path != model)
    with pytest.raises(UserError, match=r"serves .*Causal.*") as error, support.engine(server, other, tmp_path):
        pass
    assert "\n" not in str(error.value)


def test_the_key_is_in_no_log_and_no_list_of_processes(served):
    server, _ = served
    assert server.client.key not in server.log.read_text(errors="replace")
    assert server.client.key not in repr(server.client)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [command for command in commands if server.client.key.encode() in command]


# ---------------------------------------------------------------- what a server did is named

ALTERED = {"base": "model.layers.1.mlp.experts.3.down_proj.weight", "student": "model.layers.1.mlp.down_proj.weight"}
HELD_IN = {"base": "model.layers.1.mlp.experts.w2_weight", "student": "model.layers.1.mlp.down_proj.weight"}


def trainer(model: Path) -> Policy:
    built = Policy(ModelFolder(model).arch, Layout(), Train(chunk_tokens=512), Optimizer(lr=1e-3))
    built.exchange.load(reader_of(support.weights(model, 0)))
    return built


def test_what_a_server_was_done_to_is_named(served, tmp_path):
    server, model = served
    policy = trainer(model)
    earlier = {name: value + 0.01 * torch.randn(value.shape) for name, value in support.weights(model, 0).items()}
    policy.exchange.load(reader_of(earlier))
    previous = policy.host_copy()
    policy.exchange.load(reader_of(support.weights(model, 0)))
    with support.engine(server, model, tmp_path) as engine:
        engine.sync(policy.exchange, version=NOW)
        _, right = looked_at(policy, engine, PLAIN, previous=previous)
        assert right.causes == [] and right.numbers["tensors_differing"] == 0
        found, tempered = looked_at(policy, engine, PLAIN, SamplingParams(0.7, 1.0, (2,)), previous=previous)
        assert [cause.name for cause in tempered.causes] == ["sampling"]
        assert found.fitted_temperature == pytest.approx(0.7, rel=0.01)

        alter(engine, policy, ALTERED[model.name])
        found, altered = looked_at(policy, engine, PLAIN, previous=previous)
        assert [cause.name for cause in altered.causes] == ["weights"]
        assert found.differing.names == (HELD_IN[model.name],)

        engine.sync(Mapped(policy.exchange.arch, earlier), version=NOW)
        _, stale = looked_at(policy, engine, PLAIN, previous=previous)
        assert [cause.name for cause in stale.causes] == ["version"]
        assert "those of the sync before" in stale.line


def alter(engine: SglangEngine, policy: Policy, name: str) -> None:
    """Change one tensor on the server, through the calls of a sync."""
    engine._control.pause()
    engine._transport.begin()
    for bucket, flat in policy.exchange.buckets(engine._wire, 1, None, 0):
        held = dict(tensors(bucket, flat))
        if name in held:
            held[name] += 0.5
            engine._transport.send(bucket, flat)
    engine._transport.end()
    engine._control.resume(NOW)
