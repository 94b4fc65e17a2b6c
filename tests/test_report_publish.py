import json
from pathlib import Path

import pytest
import torch
import yaml
from run_fixture import make_run, write_again
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1mega import cli
from r1mega.pipeline import files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("publish") / "run"
    make_run(path)
    return path


def front_matter(card: str) -> dict[str, object]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_a_published_folder_is_the_artifact_and_says_what_made_it(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "models/r1"
    assert cli.main(["publish", str(run), "r1", str(target), "--license", "apache-2.0", "--base-model", "org/base"]) == 0
    artifact = run / "stages/05-r1/artifact"
    assert {name: digest for name, digest in files.digests(target).items() if (artifact / name).is_file()} == files.digests(artifact)
    ancestors = {json.loads(path.read_text())["name"] for path in (target / "provenance").iterdir()}
    assert ancestors == {"dev1", "helpful", "cold-start", "zero", "base"}
    card = (target / "README.md").read_text()
    assert front_matter(card) == {
        **{"license": "apache-2.0", "base_model": "org/base", "pipeline_tag": "text-generation", "library_name": "transformers"},
        "tags": ["r1mega", "grpo", "reasoning"],
    }
    assert "| heldout | pass@1 | 0.95 | 0.9 to 1 | 8 | 4 | table |" in card
    assert "| reward_models.helpful | helpful, weight 1 |" in card
    assert "r1mega sample FOLDER --template none --temperature 1 --top-p 1" in card
    assert "12% of the documents reason" in card and "A toy" in card
    assert card.index("**base**") < card.index("**zero**") < card.index("**r1**")


def test_transformers_opens_it_and_generates(run: Path, tmp_path: Path) -> None:
    assert cli.main(["publish", str(run), "zero", str(tmp_path / "zero")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "zero", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "zero")
    ids = tokenizer("<bos> en 3 + 1 + 4 + 1 + 5 + 9 :", add_special_tokens=False, return_tensors="pt").input_ids
    drawn = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
    assert 0 < len(drawn) <= 24 and tokenizer.decode(drawn).strip()


def test_a_card_is_written_again_with_what_was_measured_since(run: Path, tmp_path: Path) -> None:
    arguments = ["publish", str(run), "zero", str(tmp_path / "zero")]
    assert cli.main(arguments) == 0
    before = (tmp_path / "zero/README.md").read_text()
    rows = run / "stages/06-table/metrics.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace('"value": 0.9,', '"value": 0.8765,'))
    try:
        assert cli.main(arguments) == 0
    finally:
        rows.write_text(text)
    after = (tmp_path / "zero/README.md").read_text()
    assert "| 0.8765 |" in after and "| 0.8765 |" not in before
    # The base was measured by the same stage, which says nothing of this model.
    assert (
        "| 0.1 |" not in after and front_matter(after)["tags"] == ["r1mega", "grpo", "reasoning"] and "license" not in front_matter(after)
    )


def test_scores_of_another_model_of_that_name_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    inputs = files.read_json(run.stage_dirs["table"] / "provenance.json")["inputs"]
    write_again(run, "table", {"inputs": inputs | {"models.R1": {"reference": "r1", "digest": "0" * 64}}})
    assert cli.main(["publish", str(run.path), "r1", str(tmp_path / "r1")]) == 0
    card = (tmp_path / "r1/README.md").read_text()
    assert "| table |" not in card and "| 0.9 | 0.85 to 0.95 | 8 | 4 | r1, update 400 |" in card


def test_what_cannot_be_published_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", finished=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    for stage, target, message in [
        ("zoro", "new", "has no stage 'zoro'; it has zero, cold-start"),
        ("cold-start", "new", "makes no language model"),
        ("table", "new", "makes no language model"),
        ("zero", "mine", "holds something else; name a new folder"),
    ]:
        assert cli.main(["publish", str(run.path), stage, str(tmp_path / target)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    (run.stage_dirs["zero"] / "artifact/config.json").write_text("{}")
    assert cli.main(["publish", str(run.path), "zero", str(tmp_path / "new")]) == 2
    assert "is not what the stage left; run the stage again (first difference: config.json)" in capsys.readouterr().err
    (run.stage_dirs["dev1"] / "provenance.json").unlink()
    assert cli.main(["publish", str(run.path), "dev1", str(tmp_path / "new")]) == 2
    assert "'dev1' is not finished" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
