"""Conversion: exact both ways for every family, interrupted, damaged, refused."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_weights_families import FAMILIES, small
from test_weights_files import reference_dequantise
from test_weights_plan import random_tensors
from test_weights_table import tiny_config

from r1mega import cli
from r1mega.weights import convert
from r1mega.weights.architecture import Architecture
from r1mega.weights.audit import inspect
from r1mega.weights.safetensors_out import Encoding, restated, save

CONFIGS = {"deepseek_v3": tiny_config(), **{name: small(config) for name, config in FAMILIES.items() if name != "deepseek_v3"}}


BF16 = Encoding(torch.bfloat16)


def make(folder: Path, config: dict, encoding: Encoding = BF16, shard_bytes: int = 10**9) -> Path:
    arch = Architecture.from_hf(config)
    folder.mkdir()
    save(folder, arch, random_tensors(arch), encoding, shard_bytes)
    (folder / "config.json").write_text(json.dumps(restated(config, encoding)))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def run(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments), "--processes", "1"])


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_to_megatron_and_back_is_bit_exact(name: str, tmp_path: Path) -> None:
    source = make(tmp_path / "hf", CONFIGS[name], shard_bytes=20_000)
    assert run(source, tmp_path / "megatron", "--file-size", 3e-5, "--verify") == 0
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 1
    assert run(tmp_path / "megatron", tmp_path / "back", "--verify") == 0
    before, after = values(source), values(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (tmp_path / "back" / "tokenizer.json").exists() and not (tmp_path / "back" / "modeling.py").exists()
    assert not list(tmp_path.glob(".*"))


def test_chunks_of_a_few_rows_are_put_together_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from r1mega.weights import dist_checkpoint

    source = make(tmp_path / "hf", CONFIGS["deepseek_v3"])
    monkeypatch.setattr(dist_checkpoint, "STRIP_VALUES", 100)
    assert run(source, tmp_path / "megatron") == 0 and run(tmp_path / "megatron", tmp_path / "back") == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_block_fp8_in_and_out(tmp_path: Path) -> None:
    """In: exactly the reference's product. Out again: the same codes, and scales within 2^-8."""
    config = tiny_config(moe_intermediate_size=136, hidden_size=160)
    source = make(tmp_path / "fp8", config, Encoding(torch.bfloat16, block_fp8=True))
    quantised = values(source)
    assert run(source, tmp_path / "f32", "--to", "hf", "--dtype", "float32") == 0
    for name, tensor in values(tmp_path / "f32").items():
        scale = quantised.get(name + "_scale_inv")
        assert torch.equal(tensor, quantised[name].float() if scale is None else reference_dequantise(quantised[name], scale)), name
    assert run(source, tmp_path / "megatron") == 0
    assert run(tmp_path / "megatron", tmp_path / "again", "--fp8") == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    again = values(tmp_path / "again")
    assert again.keys() == quantised.keys()
    for name, tensor in again.items():
        if name.endswith("_scale_inv"):
            assert ((tensor / quantised[name] - 1).abs() <= 2**-8).all()
        else:
            assert torch.equal(tensor.view(torch.uint8), quantised[name].view(torch.uint8)), name
    assert not inspect(tmp_path / "again").lines()


def test_a_killed_conversion_goes_on_and_redoes_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", tiny_config(n_routed_experts=64))
    small_files = ("--file-size", "2e-5")
    assert run(source, tmp_path / "whole", *small_files) == 0
    target, records = tmp_path / "target", tmp_path / ".target.partial" / ".records"
    command = [sys.executable, "-m", "r1mega.cli", "convert", str(source), str(target), *small_files, "--processes", "2", "--verify"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])})
    deadline = time.monotonic() + 120
    while len(list(records.glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    done = {path.name.removesuffix(".json") for path in records.glob("*.json")}
    times = {name: (records.parent / name).stat().st_mtime_ns for name in done}
    assert not target.exists() and len(done) >= 3
    assert subprocess.run(command, env=process_env(), check=False).returncode == 0
    assert {name: (target / name).stat().st_mtime_ns for name in done} == times
    for path in (tmp_path / "whole").glob("__*"):
        assert path.read_bytes() == (target / path.name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def process_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_what_cannot_be_converted_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "hf", CONFIGS["deepseek_v3"])
    assert run(source, tmp_path / "megatron") == 0
    assert "exists already" in refused(capsys, source, tmp_path / "megatron")
    assert "is a Megatron checkpoint already" in refused(capsys, tmp_path / "megatron", tmp_path / "x", "--to", "megatron")
    assert "is not a folder" in refused(capsys, tmp_path / "none", tmp_path / "x")
    assert "is not a folder" in refused(capsys, source, tmp_path / "x", "--model", tmp_path / "none")
    assert "which is only read" in refused(capsys, source, source / "x")
    assert "must be positive" in refused(capsys, source, tmp_path / "x", "--file-size", "nan")
    assert "Megatron quantises for itself" in refused(capsys, source, tmp_path / "x", "--fp8")
    qwen = make(tmp_path / "qwen", CONFIGS["qwen2 tied"])
    assert "a format of DeepSeek's checkpoints" in refused(capsys, qwen, tmp_path / "x", "--to", "hf", "--fp8")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, source, tmp_path / "file" / "x")
    shutil.copytree(tmp_path / "megatron", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    assert "name the Hugging Face folder of this model with --model" in refused(capsys, tmp_path / "bare", tmp_path / "x")
    assert "config.json says" in refused(capsys, tmp_path / "bare", tmp_path / "x", "--model", qwen)
    assert run(tmp_path / "bare", tmp_path / "completed", "--model", source) == 0
    assert run(source, tmp_path / "dry", "--dry-run") == 0 and not (tmp_path / "dry").exists()
    assert not (tmp_path / "x").exists()


def test_another_conversions_remains_are_not_built_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "hf", CONFIGS["deepseek_v3"])
    plan = convert.plan(convert.conversion(source, tmp_path / "out", None, None, False, 5 * 10**9, None))
    with convert._begun(plan) as folder, pytest.raises(convert.UserError, match="another process is converting"), convert._begun(plan):
        pass
    assert "another source or other options; remove it" in refused(capsys, source, tmp_path / "out", "--dtype", "float32")
    assert folder.exists() and run(source, tmp_path / "out") == 0 and not folder.exists()


class Surprise:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_damaged_megatron_checkpoints_are_one_line_and_nothing_in_them_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "hf", CONFIGS["deepseek_v3"])
    whole = tmp_path / "megatron"
    assert run(source, whole, "--file-size", 3e-5) == 0
    first = whole / "__0_0.distcp"
    data, metadata = first.read_bytes(), (whole / ".metadata").read_bytes()
    for path, content, message in [
        (first, data[: len(data) // 2], "__0_0.distcp"),
        (first, data[:200] + bytes([data[200] ^ 255]) * 3000 + data[3200:], "__0_0.distcp"),
        (first, None, "__0_0.distcp: missing"),
        (whole / ".metadata", metadata[:-50], "damaged, or not the metadata"),
        (whole / ".metadata", pickle.dumps(Surprise(tmp_path / "executed")), "it refers to posix.mkdir"),
        (whole / ".metadata", pickle.dumps({}), "not the metadata"),
    ]:
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        error = refused(capsys, whole, tmp_path / "x")
        assert message in error and not (tmp_path / "executed").exists(), error
        assert not (tmp_path / "x").exists()
        path.write_bytes(before)
        shutil.rmtree(tmp_path / ".x.partial", ignore_errors=True)
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    assert "config.json says" in refused(capsys, whole, tmp_path / "x")


def test_a_bit_that_flips_on_the_disk_is_found_by_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "hf", CONFIGS["deepseek_v3"])
    embedding = values(source)["model.embed_tokens.weight"].view(torch.uint8).numpy().tobytes()
    for to, name in (("megatron", "__0_0.distcp"), ("hf", "model.safetensors")):
        target = tmp_path / f"out-{to}"
        plan = convert.plan(convert.conversion(source, target, to, None, False, 10**9, None))
        with convert._begun(plan):
            convert._write(plan.conversion, 0)
        path = plan.conversion.partial / name
        data = bytearray(path.read_bytes())
        data[data.index(embedding) + 100] ^= 1
        path.write_bytes(bytes(data))
        command = (source, target, "--to", to, "--file-size", 1, "--verify")
        assert "reads back differently" in refused(capsys, *command) and not target.exists()
        assert run(*command) == 0


def test_a_finished_file_that_was_cut_is_written_again(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", CONFIGS["deepseek_v3"])
    plan = convert.plan(convert.conversion(source, tmp_path / "out", "hf", None, False, 10**9, None))
    with convert._begun(plan):
        convert._write(plan.conversion, 0)
    os.truncate(plan.conversion.partial / "model.safetensors", 100)
    assert run(source, tmp_path / "out", "--to", "hf", "--file-size", 1) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_bit_that_flipped_in_a_megatron_checkpoint_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "hf", CONFIGS["deepseek_v3"])
    embedding = values(source)["model.embed_tokens.weight"].view(torch.uint8).numpy().tobytes()
    assert run(source, tmp_path / "megatron") == 0
    path = tmp_path / "megatron" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[data.index(embedding) + 100] ^= 1
    path.write_bytes(bytes(data))
    assert "do not have the checksum that they were written with" in refused(capsys, tmp_path / "megatron", tmp_path / "x")
    path.write_bytes(bytes(data[:1000]))
    assert "has 1000 bytes of" in refused(capsys, tmp_path / "megatron", tmp_path / "y", "--dry-run")


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_full_disk_is_one_line_and_what_is_written_is_kept(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on file size stands in for a full disk: the same OSError from the same write."""
    source = make(tmp_path / "hf", CONFIGS["deepseek_v3"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        assert "cannot be written (File too large)" in refused(capsys, source, tmp_path / "x", "--to", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "x").exists()
    assert run(source, tmp_path / "x", "--to", to) == 0


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "hf", CONFIGS["deepseek_v3"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    assert "0.0 GB are needed, 0.0 GB are free" in refused(capsys, source, tmp_path / "x")
    assert not list((tmp_path / ".x.partial").glob("*.distcp"))
