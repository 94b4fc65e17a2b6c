"""Own shards into servers of two ranks, held against full tensors: the same parameters on both ranks, the same log-probs.

The two paths share the trainer's shards and nothing else: full tensors are cut by SGLang's own loaders.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sglang_ranks
import sglang_support as support
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron_support import cpu_platform
from torch import Tensor

from r1mega.errors import UserError
from r1mega.rollout import sglang_servers, sglang_shards
from r1mega.rollout.engine import Sample, SamplingParams
from r1mega.rollout.sglang_servers import Started
from r1mega.rollout.sglang_sync import Control
from r1mega.weights.sync import Bucket

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
PLAIN = SamplingParams(stop_token_ids=(2,))
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 128, "hidden_size": 96, "intermediate_size": 288,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True, "use_sliding_window": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SHARDS = {"path": "shards", "layout": {"tp": 2}}


@pytest.fixture(scope="module", params=["deepseek", "llama", "qwen2"])
def served(request, tmp_path_factory) -> Iterator[tuple[Started, Path]]:
    folder = tmp_path_factory.mktemp("server")
    model = support.MODELS.get(request.param, folder / "model")
    if request.param == "qwen2":
        model.mkdir()
        (model / "config.json").write_text(json.dumps(QWEN))
    with support.served(model, folder, tp=2) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(support.KEY, server.client.key)
        with cpu_platform():
            yield server, model


@pytest.fixture(scope="module")
def by_full_tensors(served, tmp_path_factory) -> tuple[list[dict[str, str]], list[Sample]]:
    """What both ranks hold, and what is drawn, after a sync of seed 1 with full tensors."""
    server, model = served
    with support.engine(server, model, tmp_path_factory.mktemp("full"), layout={"tp": 2}) as engine:
        engine.sync(support.source(model, 1), version=1)
        return sums(server), engine.generate(support.requests(), PLAIN)


def sums(server: Started) -> list[dict[str, str]]:
    return [rank["checksums"] for rank in server.client.post("/weights_checker", {"action": "checksum"}, 60)["ranks"]]


@pytest.mark.parametrize(
    ("transport", "limit"), [("tensor", 2**28), ("tensor", 30_000), ("request", 100_000), ("distributed", 2**28), ("distributed", 30_000)]
)
def test_own_shards_are_what_the_servers_loader_cuts(served, by_full_tensors, tmp_path, transport, limit):
    server, model = served
    with support.engine(server, model, tmp_path, **SHARDS, transport=transport, bucket_bytes=limit) as engine:
        engine.sync(support.source(model, 50), version=0)
        found, samples = by_full_tensors
        assert all(a[name] != b[name] for a, b in zip(sums(server), found, strict=True) for name in b if not name.endswith("norm.weight"))
        engine.sync(support.source(model, 1), version=1)
        assert sums(server) == found and len(found) == 2 and found[0].keys() == found[1].keys()
        assert support.same(engine.generate(support.requests(), PLAIN), samples)


def test_derived_weights_are_stale_without_a_session_of_its_own(served, by_full_tensors, tmp_path, monkeypatch):
    """A direct load alone leaves MLA's w_kc and w_vc behind, and no checksum tells."""
    server, model = served
    _, samples = by_full_tensors
    with support.engine(server, model, tmp_path, **SHARDS) as engine:
        engine.sync(support.source(model, 50), version=0)
        with monkeypatch.context() as without:
            without.setattr(Control, "derive", lambda self: None)
            engine.sync(support.source(model, 1), version=1)  # all checksums agree, or it would fail
            stale = engine.generate(support.requests(), PLAIN)
        reference = tmp_path / "reference"
        reference.mkdir()
        expected = support.reference(model, 1, reference)
        if "self_attn.kv_b_proj.weight" in "".join(sums(server)[0]):
            assert support.gap(expected, stale, PLAIN) > 0.1
        else:
            assert support.same(stale, samples)
        engine.sync(support.source(model, 1), version=1)
        fresh = engine.generate(support.requests(), PLAIN)
        assert support.gap(expected, fresh, PLAIN) <= 1e-4
        assert support.same(fresh, samples)


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_shards_of_trainer_ranks_reach_the_ranks_of_the_server(served, tmp_path, transport):
    server, model = served
    layouts = [{"tp": 2, "ep": 2}, {"pp": 2}, {"ep": 2}] if "base" in model.name else [{"tp": 2}, {"pp": 2}]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = support.settings(server, **SHARDS, transport=transport, bucket_bytes=50_000).model_dump_json()
    mp.spawn(sglang_ranks.work, (2, store.port, tmp_path, model, settings, layouts), nprocs=2)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for index in range(len(layouts)):
        folder = tmp_path / f"reference-{index}"
        folder.mkdir()
        samples = [Sample(**row) for rank in found for row in rank[index]]
        assert {sample.weight_version for sample in samples} == {100 + index}
        assert support.gap(support.reference(model, 100 + index, folder), samples, PLAIN) <= 1e-4


@pytest.mark.parametrize("checksums", ["all", "sampled"])
def test_shards_that_arrive_altered_are_named_and_not_served(served, tmp_path, monkeypatch, checksums):
    server, model = served
    wrong = "model.layers.1.self_attn.o_proj.weight"

    def altered(bucket: Bucket, flat: Tensor) -> list[tuple[str, Tensor]]:
        found = named(bucket, flat)
        for name, value in found:
            if name == wrong:
                value[0, 0] += 1e-3
        return found

    named = sglang_shards.named
    with support.engine(server, model, tmp_path, **SHARDS, checksums=checksums) as engine:
        with monkeypatch.context() as patch, pytest.raises(UserError, match=rf"tried 2 times; .*{wrong} are not the trainer's") as error:
            patch.setattr(sglang_shards, "named", altered)
            engine.sync(support.source(model, 4), version=4)
        assert "\n" not in str(error.value)
        engine.sync(support.source(model, 1), version=1)


def test_a_server_that_is_cut_otherwise_is_refused(served, tmp_path):
    server, model = served
    with (
        pytest.raises(UserError, match=rf"{server.client.address} serves .* on 2 ranks, and rollout.sglang.layout.tp is 1; make them the"),
        support.engine(server, model, tmp_path),
    ):
        pass


def test_a_server_without_our_loader_is_told_how_to_start(served, tmp_path, monkeypatch):
    server, model = served
    monkeypatch.setattr(sglang_servers, "LOADER", "another.load")
    with (
        pytest.raises(UserError, match=rf"{server.client.address} cannot take .*start it with --custom-weight-loader another.load and /"),
        support.engine(server, model, tmp_path, **SHARDS, transport="distributed"),
    ):
        pass
