"""The scripts that NeMo-Run makes of a recipe, and the recipe run by its local executor."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1mega.config.loading import load_cluster, load_recipe
from r1mega.errors import UserError

pytest.importorskip("nemo_run")
from r1mega.launch import nemo
from r1mega.launch.plan import tasks
from r1mega.launch.status import status
from r1mega.launch.submit import submit
from r1mega.pipeline.files import read_json

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPE = """
name: short
stages:
  zero:
    kind: grpo
    model: {base}
    prompts: {{sums: {{source: {{kind: tiny, task: running_sum}}}}}}
    rewards: {{accuracy: {{function: "r1mega.rewards.exact:accuracy"}}}}
    group_size: 2
    prompts_per_rollout: 2
    updates_per_rollout: 1
    updates: 1
    sampling: {{max_new_tokens: 4}}
    optimizer: {{lr: 1.0e-4}}
  check:
    kind: evaluate
    models: {{zero: zero}}
    suites:
      sums:
        prompts: {{source: {{kind: tiny, task: running_sum}}, limit: 2}}
        judge: r1mega.rewards.exact:accuracy
        k: 1
        sampling: {{max_new_tokens: 4}}
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home of NeMo-Run's own, and an empty input: the library that it runs commands with reads that."""
    from nemo_run.config import set_nemorun_home

    set_nemorun_home(str(tmp_path / "nemo"))
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


def scripts(tmp_path: Path, cluster: Path, overrides: tuple[str, ...] = ()) -> dict[str, str]:
    recipe, loaded = load_recipe(CONFIGS / "tiny/r1_zero.yaml", overrides), load_cluster(cluster)
    return nemo.scripts(recipe.name, tasks(recipe, loaded, tmp_path / "run"), loaded, [tmp_path / "own modules"])


def test_a_script_says_what_the_cluster_file_does(tmp_path: Path) -> None:
    text = scripts(tmp_path, CONFIGS / "clusters/h100_pyxis.yaml")["zero"]
    flags = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    wanted = {"account": "research", "partition": "batch", "exclusive": "", "gpus-per-node": "2", "mem": "0", "nodes": "1"}
    wanted |= {"ntasks-per-node": "1", "signal": "USR1@600", "time": "04:00:00", "kill-on-invalid-dep": "yes"}
    assert wanted.items() <= flags.items()
    assert "export TORCHX_MAX_RETRIES=100" in text
    assert f"export PYTHONPATH=${{PYTHONPATH:+$PYTHONPATH:}}'{tmp_path}/own modules'" in text
    command = next(line for line in text.splitlines() if line.startswith("srun --output"))
    assert "--container-image /shared/images/r1mega.sqsh --container-mounts /shared:/shared," in command
    assert command.endswith(
        f"/opt/r1mega/bin/python -m r1mega.cli run {tmp_path}/run/resolved.yaml run.ranks=2 --stage zero -o {tmp_path}/run "
        "--restarts 1 --grace 580"
    )


def test_the_published_recipe_and_its_servers_are_one_job(tmp_path: Path) -> None:
    """64 nodes of ranks and 32 of servers, 8 of 32 GPUs: every node starts the same command, and its number says what it is for."""
    engines = [f"rollout.sglang.{change}" for change in ("placement=disaggregated", "layout.servers=8", "transport=distributed")]
    recipe, cluster = CONFIGS / "deepseek_v3/r1.yaml", CONFIGS / "clusters/h100_pyxis.yaml"
    lines = submit(recipe, cluster, engines, tmp_path / "run", dry_run=True)
    assert "zero: 64 nodes x 8 ranks, 32 more for servers, 04:00:00" in lines
    assert "dev1: 64 nodes x 8 ranks, 04:00:00" in lines
    text = (tmp_path / "run/scripts/zero.sh").read_text()
    assert "#SBATCH --nodes=96\n" in text and "#SBATCH --gpus-per-node=8\n" in text and text.count("\nsrun --output") == 1
    assert text.count("run.ranks=512 --stage zero") == 1 and "--engine-nodes 32 --gpus-per-node 8" in text
    assert "#SBATCH --nodes=64\n" in (tmp_path / "run/scripts/dev1.sh").read_text()
    colocated = submit(recipe, cluster, [str(CONFIGS / "deepseek_v3/overlays/h100_256.yaml")], tmp_path / "shared", dry_run=True)
    assert "zero: 32 nodes x 8 ranks, 04:00:00" in colocated


def test_gpus_come_as_generic_resources_and_setup_before_the_stage(tmp_path: Path) -> None:
    text = scripts(tmp_path, CONFIGS / "clusters/h100.yaml")["zero"]
    assert "#SBATCH --gres=gpu:2" in text and "--container-image" not in text and "gpus-per-node" not in text
    assert 0 < text.index("module load cuda") < text.index("srun --output")


def test_a_dry_run_writes_the_scripts_and_submits_nothing(tmp_path: Path) -> None:
    lines = submit(CONFIGS / "tiny/r1.yaml", CONFIGS / "clusters/h100.yaml", [], tmp_path / "run", dry_run=True)
    assert lines[-1] == f"nothing is submitted; the scripts are in {tmp_path}/run/scripts"
    assert "cold-start: 1 node x 2 ranks, 04:00:00, after zero" in lines
    assert {path.stem for path in (tmp_path / "run/scripts").iterdir()} == set(load_recipe(CONFIGS / "tiny/r1.yaml").stages)
    assert not (tmp_path / "run/submitted.json").exists()
    assert not list((tmp_path / "nemo").glob("experiments/*/*/*"))


@pytest.mark.slow
def test_the_local_executor_runs_the_stages_in_order(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("name: here\nexecutor: {kind: local}\nranks_per_node: 1\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=CONFIGS / "tiny/base"))
    lines = submit(tmp_path / "recipe.yaml", tmp_path / "cluster.yaml", [], tmp_path / "run", dry_run=False)
    assert lines[0].startswith("here: NeMo-Run's experiment short_")
    assert [line.split()[:2] for line in status(tmp_path / "run")[1::2]] == [["zero", "finished"], ["check", "finished"]]
    assert read_json(tmp_path / "run/summary.json")["status"] == "finished"
    assert submit(tmp_path / "recipe.yaml", tmp_path / "cluster.yaml", [], tmp_path / "run", False) == [
        f"all stages are finished: {tmp_path}/run"
    ]


def test_other_executors_come_by_name_with_their_arguments(tmp_path: Path) -> None:
    import nemo_run

    (tmp_path / "cluster.yaml").write_text(
        "name: lab\nranks_per_node: 2\nenvironment: {NCCL_DEBUG: WARN}\n"
        "executor: {kind: other, executor: DockerExecutor, ranks_argument: num_gpus, arguments: {container_image: r1mega, shm_size: 32g}}\n"
    )
    recipe, cluster = load_recipe(CONFIGS / "tiny/r1_zero.yaml"), load_cluster(tmp_path / "cluster.yaml")
    made = nemo._executor(nemo_run, tasks(recipe, cluster, tmp_path / "run")[0], cluster, [])
    assert isinstance(made, nemo_run.DockerExecutor)
    assert (made.container_image, made.shm_size, made.num_gpus, made.env_vars) == ("r1mega", "32g", 2, {"NCCL_DEBUG": "WARN"})


def test_another_executor_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("name: lab\nexecutor: {kind: other, executor: PbsExecutor}\nranks_per_node: 2\n")
    recipe, cluster = load_recipe(CONFIGS / "tiny/r1_zero.yaml"), load_cluster(tmp_path / "cluster.yaml")
    with pytest.raises(UserError, match="nemo_run has no PbsExecutor"):
        nemo.submit(recipe.name, tasks(recipe, cluster, tmp_path / "run"), cluster, [])
