"""Safetensors folders and block FP8: exact both ways, and one clear line for every kind of damage."""

import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights_plan import random_tensors
from test_weights_table import tiny

from r1mega.config.layout import Layout
from r1mega.errors import UserError
from r1mega.weights import fp8
from r1mega.weights.boxes import Box
from r1mega.weights.canonical import canonical
from r1mega.weights.moving import load_local
from r1mega.weights.placement import Spelling, placement
from r1mega.weights.safetensors_in import INDEX, Reader
from r1mega.weights.safetensors_out import Encoding, new_folder, save
from r1mega.weights.table import Storage


def reference_dequantise(codes, scale):
    """DeepSeek's definition, element by element."""
    rows, columns = torch.meshgrid(torch.arange(codes.shape[0]), torch.arange(codes.shape[1]), indexing="ij")
    return codes.float() * scale[rows // 128, columns // 128]


@pytest.mark.parametrize("shape", [(128, 128), (300, 129), (1, 700), (576, 40)])
def test_fp8_is_exact_on_the_way_in_and_stable_on_the_way_out(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    codes, scale = fp8.quantise(weight)
    assert scale.shape == fp8.scale_shape(shape)
    values = fp8.dequantise(codes, scale)
    assert torch.equal(values, reference_dequantise(codes, scale))
    # e4m3 has 3 mantissa bits above 2^-6, and a spacing of 2^-9 below.
    assert ((values - weight).abs() <= weight.abs() * 2**-4 * 1.001 + scale.max() * 2**-10).all()
    again, scale_again = fp8.quantise(values.bfloat16())
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert ((scale_again / scale - 1).abs() <= 2**-8).all()


def test_fp8_regions_and_zero_blocks():
    weight = torch.randn(300, 260)
    weight[128:256, :128] = 0
    codes, scale = fp8.quantise(weight)
    assert scale[1, 0] == 1 and fp8.dequantise(codes, scale).isfinite().all()
    whole = fp8.dequantise(codes, scale)
    for (r0, r1), (c0, c1) in [((0, 300), (0, 260)), ((100, 140), (250, 260)), ((256, 300), (1, 129)), ((5, 6), (127, 128))]:
        touched = scale[r0 // 128 : -(-r1 // 128), c0 // 128 : -(-c1 // 128)]
        assert torch.equal(fp8.dequantise(codes[r0:r1, c0:c1], touched, (r0, c0)), whole[r0:r1, c0:c1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_save_and_load(tmp_path, dtype, shard_bytes):
    arch = tiny()
    tensors = random_tensors(arch)
    with new_folder(tmp_path / "model") as folder:
        save(folder, arch, tensors, Encoding(dtype), shard_bytes=shard_bytes)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert (len(shards) > 1) == (tmp_path / "model" / INDEX).exists() == (shard_bytes < 10**9)
    # The safetensors library reads the same: it checks the header, and that offsets cover the file.
    by_library = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert by_library.keys() == {t.name for t in canonical(arch)}
    with Reader(tmp_path / "model") as reader:
        reader.check(canonical(arch))
        for tensor in canonical(arch):
            source = tensors[tensor.copy_of or tensor.name]
            expected = source if tensor.storage is Storage.FLOAT32 else source.to(dtype)
            assert torch.equal(by_library[tensor.name], expected), tensor.name
            assert torch.equal(reader.read(tensor.name, Box.whole(tensor.shape)), expected)


def test_load_a_block_fp8_checkpoint_into_a_sharded_model(tmp_path):
    """Regions of quantised tensors dequantise to the same values as the whole tensor."""
    arch = tiny(hidden_size=140, intermediate_size=260, moe_intermediate_size=132)
    tensors = random_tensors(arch)
    save(tmp_path, arch, tensors, Encoding(torch.bfloat16, block_fp8=True))
    quantised = {t.name for t in canonical(arch) if t.storage is Storage.BLOCK_FP8}
    files = load_file(tmp_path / "model.safetensors")
    assert {name.removesuffix("_scale_inv") for name in files if name.endswith("_scale_inv")} == quantised
    with Reader(tmp_path) as reader:
        for rank in range(4):
            placed = placement(arch, Layout(tp=2, etp=4), 4, rank, Spelling())
            params = {(p.chunk, p.name): torch.empty(p.shape) for p in placed}
            load_local(params, placed, reader.read)
            for piece in (piece for p in placed for piece in p.pieces):
                name = piece.tensor
                whole = reference_dequantise(files[name], files[name + "_scale_inv"]) if name in quantised else files[name].float()
                assert torch.equal(params[piece.chunk, piece.param][piece.box.slices], whole[piece.source.slices]), name


@pytest.fixture
def sharded(tmp_path):
    arch = tiny()
    save(tmp_path, arch, random_tensors(arch), Encoding(torch.bfloat16), shard_bytes=20_000)
    return tmp_path


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refuses(folder, message):
    with pytest.raises(UserError, match=message) as caught, Reader(folder) as reader:
        reader.check(canonical(tiny()))
        for tensor in canonical(tiny()):
            reader.read(tensor.name, Box.whole(tensor.shape))
    assert "\n" not in str(caught.value)


def test_damage_is_named(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    whole = first.read_bytes()
    for cut in (4, 100, len(whole) // 2, len(whole) - 1):
        first.write_bytes(whole[:cut])
        refuses(sharded, f"{first.name}: truncated or damaged")
    first.write_bytes(b"\x7f" + whole[1:])
    refuses(sharded, f"{first.name}: truncated or damaged")
    first.write_bytes(whole)
    second.rename(second.with_suffix(".gone"))
    refuses(sharded, f"{second.name} is missing, but {INDEX} names it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("lm_head.weight"), "lm_head.weight is not in model.safetensors.index.json"),
        (lambda m: m.update(extra=m["lm_head.weight"]), "puts extra in model-.*, but no shard has it"),
        (lambda m: m.update({"lm_head.weight": m["model.embed_tokens.weight"]}), "puts lm_head.weight in model-00001.* has it"),
        (lambda m: m.update({"lm_head.weight": "../x.safetensors"}), "must be the name of a file in the same folder"),
        (lambda m: m.update({"lm_head.weight": 3}), "must be the name of a file in the same folder"),
    ],
)
def test_index_that_disagrees(sharded, change, message):
    edit_index(sharded, change)
    refuses(sharded, message)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    refuses(sharded, "expected JSON with a weight_map")


def test_tensors_that_do_not_fit(tmp_path):
    arch = tiny()
    save(tmp_path, arch, random_tensors(arch), Encoding(torch.bfloat16))
    files = load_file(tmp_path / "model.safetensors")
    norm, gate = "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.experts.0.gate_proj.weight"
    for changed, message in [
        ({k: v for k, v in files.items() if k != norm}, f"tensor {norm} is missing"),
        ({**files, norm: torch.zeros(7)}, rf"{norm} has shape \[7\], config.json says \[24\]"),
        ({**files, norm: torch.zeros(24, dtype=torch.int64)}, f"{norm} has dtype I64"),
        ({**files, gate: torch.zeros(16, 24).to(torch.float8_e4m3fn)}, f"{gate}_scale_inv is missing"),
        ({**files, norm: torch.zeros(24).to(torch.float8_e4m3fn), norm + "_scale_inv": torch.ones(1)}, f"{norm} is float8 but no matrix"),
        (
            {**files, gate: torch.zeros(16, 24).to(torch.float8_e4m3fn), gate + "_scale_inv": torch.ones(2, 1)},
            r"has shape \[2, 1\], expected \[1, 1\]",
        ),
    ]:
        save_file(changed, tmp_path / "model.safetensors")
        refuses(tmp_path, message)
    save_file({k: v for k, v in files.items() if "layers.5.embed_tokens" not in k}, tmp_path / "model.safetensors")
    with Reader(tmp_path) as reader:
        reader.check(canonical(arch))


def test_folders_that_cannot_be(tmp_path):
    refuses(tmp_path / "nowhere", "is not a folder")
    refuses(tmp_path, "model.safetensors is missing")
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), new_folder(tmp_path / "file" / "model"):
        pass


def test_an_interrupted_write_leaves_nothing(tmp_path):
    arch = tiny()
    tensors = random_tensors(arch)
    del tensors["lm_head.weight"]
    with pytest.raises(KeyError), new_folder(tmp_path / "model") as folder:
        save(folder, arch, tensors, Encoding(torch.bfloat16), shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_one_line(tmp_path):
    """A limit on file size stands in for a full disk: the same OSError from the same write."""
    arch = tiny()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"model.safetensors: cannot be written \(File too large\)"):
            save(tmp_path, arch, random_tensors(arch), Encoding(torch.bfloat16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
