"""Cluster files, and what becomes of a recipe under them, without NeMo-Run or Slurm."""

from pathlib import Path

import pytest

from r1mega.config.cluster import Cluster, Container, seconds
from r1mega.config.graph import waits_for
from r1mega.config.loading import load_cluster, load_recipe
from r1mega.errors import UserError
from r1mega.launch.plan import check_container, tasks

CONFIGS = Path(__file__).parent.parent / "configs"
SLURM = "name: lab\nexecutor: {kind: slurm, account: research}\n"


def cluster(tmp_path: Path, text: str = SLURM) -> Cluster:
    (tmp_path / "cluster.yaml").write_text(text)
    return load_cluster(tmp_path / "cluster.yaml")


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as error:
        cluster(tmp_path, text)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("path", sorted((CONFIGS / "clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_clusters_that_ship_load_and_take_the_tiny_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(CONFIGS / "tiny/r1.yaml")
    found = tasks(recipe, load_cluster(path), tmp_path / "run")
    assert [task.stage for task in found] == list(recipe.stages)
    assert {(task.nodes, task.ranks_per_node) for task in found} == {(1, 2)}


def test_a_stage_waits_for_those_that_it_reads() -> None:
    waits = waits_for(load_recipe(CONFIGS / "tiny/r1.yaml"))
    assert waits["zero"] == [] and waits["cold-start"] == ["zero"] and waits["r1"] == ["dev3", "helpful", "safe"]
    assert "zero" in waits["table"] and "table" not in waits["table"]


def test_the_published_recipe_fills_64_nodes_and_waits_in_order(tmp_path: Path) -> None:
    published, cluster = CONFIGS / "deepseek_v3/r1.yaml", load_cluster(CONFIGS / "clusters/h100_pyxis.yaml")
    recipe = load_recipe(published, [str(CONFIGS / "deepseek_v3/overlays/h100_512.yaml")], inputs=False)
    found = {task.stage: task for task in tasks(recipe, cluster, tmp_path / "run")}
    assert (found["zero"].nodes, found["zero"].ranks_per_node, found["zero"].engine_nodes, found["zero"].gpus_per_node) == (64, 8, 0, 8)
    assert found["dev3"].after == ("reasoning",)
    assert found["zero"].arguments == (
        *("run", str(tmp_path / "run/resolved.yaml"), "run.ranks=512", "--stage", "zero", "-o", str(tmp_path / "run")),
        *("--restarts", "1", "--grace", "580", "--engine-nodes", "0", "--gpus-per-node", "8"),
    )


def test_servers_that_do_not_share_the_ranks_nodes_get_their_own(tmp_path: Path) -> None:
    published, cluster = CONFIGS / "deepseek_v3/r1_zero.yaml", load_cluster(CONFIGS / "clusters/h100_pyxis.yaml")
    engines = [
        "rollout.sglang.placement=disaggregated",
        "rollout.sglang.layout={servers: 3, tp: 32, ep: 32, dense_tp: whole, shared_experts: whole}",
    ]
    found = tasks(load_recipe(published, engines, inputs=False), cluster, tmp_path / "run")[0]
    assert (found.nodes, found.ranks_per_node, found.engine_nodes, found.gpus_per_node) == (64, 8, 12, 8)
    assert found.arguments[-4:] == ("--engine-nodes", "12", "--gpus-per-node", "8")


def test_servers_beside_the_ranks_get_their_gpus(tmp_path: Path) -> None:
    engine = ["rollout.engine=sglang", "rollout.sglang.first_gpu=2", "rollout.sglang.layout={servers: 2, tp: 2}"]
    recipe = load_recipe(CONFIGS / "tiny/r1_zero.yaml", engine)
    found = tasks(recipe, cluster(tmp_path), tmp_path / "run")[0]
    assert (found.ranks_per_node, found.gpus_per_node) == (2, 6)
    with pytest.raises(UserError, match="servers=2 of tp=2 take 2 nodes with 2 GPUs for servers, and there are 1; make them smaller"):
        tasks(recipe, cluster(tmp_path, SLURM + "gpus_per_node: 4\n"), tmp_path / "run")
    elsewhere = load_recipe(CONFIGS / "tiny/r1_zero.yaml", [*engine, "rollout.sglang.addresses=['http://a:1', 'http://b:1']"])
    assert tasks(elsewhere, cluster(tmp_path), tmp_path / "run")[0].gpus_per_node == 2


def test_finished_stages_are_neither_run_nor_waited_for(tmp_path: Path) -> None:
    found = tasks(load_recipe(CONFIGS / "tiny/r1.yaml"), cluster(tmp_path), tmp_path / "run", skip={"zero": None})
    assert found[0].stage != "zero" and next(task for task in found if task.stage == "cold-start").after == ()


def test_a_stage_may_have_its_own_nodes_and_time(tmp_path: Path) -> None:
    mine = cluster(tmp_path, SLURM + "stages: {zero: {nodes: 2, ranks_per_node: 2, time: '1-00:00:00'}}\n")
    found = tasks(load_recipe(CONFIGS / "tiny/r1_zero.yaml"), mine, tmp_path / "run")[0]
    assert (found.nodes, found.ranks_per_node, found.time) == (2, 2, "1-00:00:00") and "run.ranks=4" in found.arguments


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SLURM.replace("account", "acount"), ["unknown key 'executor.acount'", "'executor.account'"]),
        (SLURM + "ranks: 8\n", ["unknown key 'ranks'", "'ranks_per_node'"]),
        (SLURM + "time: '4h'\n", ["'time'", "[days-]hours:minutes:seconds", "'4h'"]),
        (SLURM + "time: '00:05:00'\n", ["signal_s=300"]),
        (SLURM + "environment: {nccl_debug: INFO}\n", ["nccl_debug", "capitals"]),
        (SLURM + "environment: {WANDB_API_KEY: x}\n", ["WANDB_API_KEY", "secret"]),
        ("name: lab\nexecutor: {kind: pbs}\n", ["'executor.kind' is 'pbs'", "slurm, local, other"]),
        ("name: lab\nexecutor: {kind: slurm}\n", ["missing key 'executor.account'"]),
    ],
)
def test_a_cluster_file_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    found = refusal(tmp_path, text)
    assert all(word in found for word in words), found


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (SLURM + "max_nodes: 1\nranks_per_node: 1\n", [], ["'zero' needs 2 nodes (2 ranks, 1 a node)", "max_nodes=1"]),
        (SLURM + "stages: {zro: {nodes: 2}}\n", [], ["'stages.zro'", "stages are zero"]),
        (SLURM, ["run.ranks=12", "layout.ep=4"], ["run.ranks=12", "nodes of 8", "stages.zero.nodes"]),
        (SLURM + "stages: {zero: {nodes: 1, ranks_per_node: 3}}\n", [], ["etp x ep x pp = 2", "3 ranks"]),
        ("name: mine\nexecutor: {kind: local}\nranks_per_node: 1\n", [], ["needs 2 nodes", "'local' has one"]),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path, text: str, overrides: list[str], words: list[str]) -> None:
    recipe = load_recipe(CONFIGS / "tiny/r1_zero.yaml", overrides)
    with pytest.raises(UserError) as error:
        tasks(recipe, cluster(tmp_path, text), tmp_path / "run")
    assert all(word in str(error.value) for word in words), error.value


def test_images_and_mounts_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    image = tmp_path / "shared/r1mega.sqsh"
    needed = {"the run directory": tmp_path / "shared/run"}
    for container, word in (
        (Container(image=str(image)), str(image)),
        (Container(image="nvcr.io#r1mega", mounts=["/nowhere:/data"]), "/nowhere"),
        (Container(image="nvcr.io#r1mega", mounts=[f"{tmp_path}/shared:/data"]), "lacks the run directory"),
    ):
        with pytest.raises(UserError, match=word):
            check_container(container, needed)
    image.touch()
    check_container(Container(image=str(image), mounts=[f"{tmp_path}/shared:{tmp_path}/shared:rw"]), needed)


def test_times_are_slurms() -> None:
    assert seconds("04:00:00") == 14_400 and seconds("1-00:00:30") == 86_430
