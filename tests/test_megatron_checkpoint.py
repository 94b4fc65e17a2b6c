"""Checkpoints: saved under one layout and gone on from under another, and what is said of one that does not fit."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

pytest.importorskip("megatron.core")
import checkpoint_ranks as ranks
import megatron_support as support
from checkpoint_ranks import KILLED, Job

from r1mega.errors import UserError
from r1mega.megatron.checkpoint import Checkpoints, newest

pytestmark = pytest.mark.lane

MTP = {"mtp_loss": 0.3}
PRETRAIN = MTP | {"router_bias_rate": 1e-3}
ONE, EP2, TP2, PP2, VPP2, DP2 = {}, {"ep": 2}, {"tp": 2, "ep": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {}
# The empty layout is one process, or two data-parallel ones.
FROM_ONE = [
    Job("v3", ONE, (EP2, PP2), PRETRAIN, distributed=True),
    Job("qwen", ONE, ({"tp": 2},), reference=True),
]
FROM_TWO = [
    Job("v3", TP2, (PP2,), PRETRAIN),
    Job("v3", PP2, (EP2, TP2), reference=True),
    Job("v3", EP2, (VPP2,), MTP, distributed=True, reference=True),
    Job("v3", VPP2, (EP2,), MTP, distributed=True),
    Job("v3", DP2, (TP2,), MTP | {"dtype": "bfloat16"}, distributed=True),
    Job("qwen", {"tp": 2}, (PP2,), distributed=True),
]
TO_ONE = [job for job in FROM_TWO if job.saved]
RESUMED = [(job, layout) for job in FROM_ONE + FROM_TWO for layout in job.resumed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that the jobs leave: one process saves, two processes save and go on, one process goes on."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with support.cpu_platform():
        for job in FROM_ONE:
            ranks.run_and_save(job, folder)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(ranks.work, (2, store.port, folder, FROM_TWO, RESUMED), nprocs=2)
    with support.cpu_platform():
        for job in TO_ONE:
            ranks.resume(job, ONE, folder)
    return folder


CASES = [pytest.param(job, layout, id=job.resumed_name(layout)) for job, layout in RESUMED + [(job, ONE) for job in TO_ONE]]


@pytest.mark.parametrize(("job", "layout"), CASES)
def test_a_run_goes_on_under_another_layout(job, layout, folder):
    for rank in range(2):
        errors = json.loads((folder / f"rank-{rank}.json").read_text())
        for name in (job.name, job.resumed_name(layout)):
            assert name not in errors, errors[name]
    name = job.resumed_name(layout)
    for what in ["saved"] + ["reference"] * job.reference:
        before, after = (load_file(folder / f"{run}.{what}.safetensors") for run in (job.name, name))
        assert all(torch.equal(before[key], after[key]) for key in before), what
    straight, moved = (load_file(folder / f"{run}.safetensors") for run in (job.name, name))
    loose = job.train.get("dtype") == "bfloat16"
    torch.testing.assert_close(moved.pop("losses"), straight.pop("losses"), rtol=1e-2 if loose else 1e-5, atol=0)
    differences = {key: ((moved[key] - straight[key]).norm() / straight[key].norm()).item() for key in straight}
    worst = max(differences, key=differences.__getitem__)
    print(name, worst, differences[worst])
    # Softmax all but cancels a key's bias: its gradient is mostly rounding, which Adam scales up to the size of any other.
    assert differences[worst] < (1e-2 if loose else 1e-5 if worst.endswith("k_proj.bias") else 1e-6), worst
    assert loose or all(value < 1e-6 for key, value in differences.items() if not key.endswith("k_proj.bias"))


@pytest.fixture
def cpu():
    with support.cpu_platform():
        yield


def stepped(job=KILLED):
    policy, reference = ranks.policy_of(job, {})
    ranks.steps(policy, 0, 1)
    return policy, reference


def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(cpu, tmp_path):
    program = "import sys, pathlib, checkpoint_ranks; checkpoint_ranks.be_killed(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program, str(tmp_path / "kept")]
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout.readline() == "writing\n"
    run.kill()
    run.wait()
    assert {folder.name.rsplit(".", 2)[0] for folder in (tmp_path / "kept").iterdir()} == {"first", ".second"}
    policy, _ = ranks.policy_of(KILLED, {})
    checkpoints = Checkpoints(policy, tmp_path / "kept")
    assert checkpoints.restore(None) == {"update": 1}
    ranks.leave(policy, tmp_path / "restored.safetensors")
    before, after = load_file(tmp_path / "first.safetensors"), load_file(tmp_path / "restored.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    ranks.steps(policy, 1, 1)
    checkpoints.save("second", {"update": 2}, None)  # while the killed run's writer is still at it
    checkpoints.wait()
    os.killpg(run.pid, signal.SIGKILL)
    assert [folder.name for folder in (tmp_path / "kept").iterdir()] == ["second"]


def test_a_writer_that_fails_is_an_error_and_no_checkpoint(cpu, tmp_path):
    policy, _ = stepped()
    checkpoints = Checkpoints(policy, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        checkpoints.save("large", {}, None)
        with pytest.raises(UserError, match=r"large: the checkpoint could not be written: .*; [\d,]+ bytes are free there"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest(tmp_path) is None


def test_what_is_saved_is_what_was_there_at_the_call(cpu, tmp_path):
    policy, _ = stepped()
    checkpoints = Checkpoints(policy, tmp_path)
    before = policy.host_copy()
    checkpoints.save("one", {}, None)
    ranks.steps(policy, 1, 2)
    checkpoints.wait()
    checkpoints.restore(None)
    assert policy.steps == 1
    assert all(torch.equal(old, new) for old, new in zip(before, policy.weights.values(), strict=True))


def _truncate(folder):
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)


UNREADABLE = r"only/\.metadata: (cannot be read|damaged)"
DAMAGE = {
    "truncated": (_truncate, r"only/__0_\d\.distcp: has \d+ bytes of \d+; the checkpoint is not whole"),
    "without a file": (lambda folder: next(folder.glob("*.distcp")).unlink(), r"only/__0_\d\.distcp: missing; the checkpoint is not whole"),
    "with half an index": (lambda folder: os.truncate(folder / ".metadata", 100), UNREADABLE),
    "without an index": (lambda folder: (folder / ".metadata").unlink(), UNREADABLE),
    "with half a state": (lambda folder: os.truncate(folder / "state.json", 3), r"only/state\.json: damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(damage, cpu, tmp_path):
    policy, _ = stepped()
    checkpoints = Checkpoints(policy, tmp_path)
    checkpoints.save("only", {}, None)
    checkpoints.wait()
    spoil, message = DAMAGE[damage]
    spoil(tmp_path / "only")
    with pytest.raises(UserError, match=message) as error:
        checkpoints.restore(None)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_named(cpu, tmp_path, monkeypatch):
    def config(**changes):
        monkeypatch.setitem(support.CONFIGS, "other", support.QWEN | changes)
        return stepped(Job("other", {}))[0]

    checkpoints = Checkpoints(config(), tmp_path)
    checkpoints.save("only", {}, None)
    checkpoints.wait()
    other = "only: not a checkpoint of this model: "
    for changes, message in [
        ({"intermediate_size": 96}, r"decoder\.layers\.mlp\.linear_fc1\.weight is \[4, 160, 48\], the model's \[4, 192, 48\]"),
        ({"num_hidden_layers": 3}, r"decoder\.layers\.\S+ is \[4, .*\], the model's \[3, "),
        ({"tie_word_embeddings": False}, r"it has no optimizer\.state\.exp_avg\.output_layer\.weight and 2 more tensors"),
    ]:
        with pytest.raises(UserError, match=other + message):
            Checkpoints(config(**changes), tmp_path).restore(None)


def test_a_checkpoint_of_a_larger_model_is_named(cpu, tmp_path, monkeypatch):
    monkeypatch.setitem(support.CONFIGS, "untied", support.QWEN | {"tie_word_embeddings": False})
    checkpoints = Checkpoints(stepped(Job("untied", {}))[0], tmp_path)
    checkpoints.save("only", {}, None)
    checkpoints.wait()
    with pytest.raises(UserError, match=r"only: not a checkpoint of this model, which has no optimizer\S+ and 2 more tensors"):
        Checkpoints(stepped()[0], tmp_path).restore(None)


@pytest.mark.parametrize("model", ["v3", "moonlight", "qwen"])
def test_what_a_cpu_saved_opens_in_transformer_engines_modules(model, cpu, tmp_path):
    policy, _ = stepped(Job(model, {}, train=PRETRAIN if model == "v3" else {}, distributed=True))
    checkpoints = Checkpoints(policy, tmp_path / "kept")
    checkpoints.save("only", {}, None)
    checkpoints.wait()
    ranks.leave(policy, tmp_path / "cpu.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(support.CONFIGS[model]))
    arguments = [tmp_path / "config.json", tmp_path / "kept", tmp_path / "te.safetensors"]
    command = [sys.executable, "-m", "tests.te_standins", *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    saved, opened = load_file(tmp_path / "cpu.safetensors"), load_file(tmp_path / "te.safetensors")
    assert saved.keys() - opened.keys() == {"losses"}
    assert all(torch.equal(saved[name], value) for name, value in opened.items())


def test_the_process_that_collects_what_writers_report_ends_with_a_rank_that_is_killed():
    code = (
        "import multiprocessing, time; from r1mega.megatron.checkpoint import start_results_process; start_results_process()\n"
        "print(multiprocessing.active_children()[0].pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as rank:
        process = Path("/proc", rank.stdout.readline().strip(), "stat")
        assert process.exists()
        rank.kill()
    deadline = time.monotonic() + 60
    # A zombie has ended; whoever inherited it has not asked yet.
    while process.exists() and process.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
