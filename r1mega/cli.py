"""The command line: parse, call, print."""

import argparse
import errno
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1mega.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 input that cannot be used, 1 anything else.

    `audit` returns 1 when it found something wrong, `plan` when something does not fit.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="r1mega", description="Reasoning models by reinforcement learning, on Megatron-Core.")
    parser.add_argument("command", choices=_COMMANDS, help="; ".join(f"{name}: {text}" for name, (text, _, _) in _COMMANDS.items()))
    name = parser.parse_args(given[:1]).command
    text, declare, call = _COMMANDS[name]
    command = argparse.ArgumentParser(prog=f"r1mega {name}", description=text)
    declare(command)
    try:
        # Intermixed, so that `key=value` may stand before, between and after options.
        return call(command.parse_intermixed_args(given[1:]))
    except UserError as error:
        print(f"r1mega: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output (`| head`) has had enough. Python would say so again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"r1mega: {error}: a disk or a quota is full; make room", file=sys.stderr)
        return 2


def _declare_overrides(parser: argparse.ArgumentParser) -> None:
    what = "change a key of the recipe, such as stages.zero.updates=100, or those of a YAML file laid over it"
    parser.add_argument("overrides", nargs="*", metavar="OVERLAY.yaml | key=value", help=what)


def _declare_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file")
    parser.add_argument("-o", "--output", type=Path, metavar="RUN_DIR", help="folder of the run (default: runs/<recipe name>)")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in that folder first")
    parser.add_argument("--stage", metavar="NAME", help="run this stage alone; in a Slurm step, on all of its nodes (docs/cluster.md)")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="with --stage: restarts of its ranks in place (default: 0)")
    parser.add_argument(
        "--grace", type=float, default=60.0, metavar="S", help="with --stage: seconds that it has for saving after a signal (default: 60)"
    )
    parser.add_argument(
        "--engine-nodes", type=int, default=0, metavar="N", help="with --stage: the step's last nodes, for servers alone (default: 0)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="with --stage: for ranks and servers (default: enough)")
    _declare_overrides(parser)


def _run(options: argparse.Namespace) -> int:
    from r1mega.pipeline import launcher

    if options.stage:
        from r1mega.pipeline import stage_task

        if options.fresh:
            raise UserError("--fresh deletes a whole run; leave it out with --stage")
        alone = stage_task.Alone(options.stage, options.restarts, options.grace, options.engine_nodes, options.gpus_per_node)
        return stage_task.run_stage(options.recipe, options.overrides, options.output, alone)
    return launcher.run(options.recipe, options.overrides, options.output, options.fresh)


def _declare_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file")
    parser.add_argument("--cluster", required=True, type=Path, metavar="FILE", help="YAML file, such as those in configs/clusters")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="RUN_DIR", help="folder of the run, which all nodes see (default: as r1mega run)"
    )
    parser.add_argument("--dry-run", action="store_true", help="write the scripts to RUN_DIR/scripts and submit nothing")
    _declare_overrides(parser)


def _submit(options: argparse.Namespace) -> int:
    from r1mega.launch.submit import submit

    print(*submit(options.recipe, options.cluster, options.overrides, options.output, options.dry_run), sep="\n")
    return 0


def _declare_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run whose stages run alone")


def _status(options: argparse.Namespace) -> int:
    from r1mega.launch.status import status

    print(*status(options.run), sep="\n")
    return 0


def _declare_logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run whose stages run alone")
    parser.add_argument("stage", nargs="?", metavar="STAGE", help="name of a stage (default: all)")
    parser.add_argument("--rank", type=int, metavar="R", help="what that rank printed, instead of the progress")
    parser.add_argument("--all", action="store_true", help="every line, not the last 40 of each attempt")


def _logs(options: argparse.Namespace) -> int:
    from r1mega.launch.status import logs

    for line in logs(options.run, options.stage, options.rank, options.all):
        print(line)
    return 0


def _declare_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="whether this recipe can run here")
    parser.add_argument("--quick", action="store_true", help="do not start the two ranks that time their link")
    _declare_overrides(parser)


def _doctor(options: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")
    from r1mega.launch import doctor

    found = doctor.examine(options.recipe, options.overrides, options.quick)
    print(*doctor.lines(found), sep="\n")
    return 0 if doctor.able(found) else 1


def _declare_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file")
    _declare_overrides(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="resolve every stage without the recipe's weights and data, and list what is not here"
    )


def _check(options: argparse.Namespace) -> int:
    from r1mega.config.loading import dump_resolved, load_recipe
    from r1mega.pipeline.preflight import check_contents, check_references
    from r1mega.report.overview import overview

    recipe = load_recipe(options.recipe, options.overrides, inputs=not options.dry_run)
    missing = check_references(recipe, options.recipe.parent.absolute(), inputs=not options.dry_run)
    if options.dry_run:
        print(*overview(recipe), sep="\n")
        print("needs, and this machine lacks:" if missing else "all of its inputs are here", *missing, sep="\n  ")
        return 0
    check_contents(recipe)
    print(dump_resolved(recipe), end="")
    print(f"{options.recipe} can run here", file=sys.stderr)
    return 0


def _declare_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="Hugging Face model folder")
    parser.add_argument("--suite", required=True, metavar="NAME", help="name of a benchmark that ships with r1mega, or a YAML file")
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows of a published benchmark, a file or a folder (docs/benchmarks.md)")
    parser.add_argument("--samples", type=int, metavar="K", help="samples per prompt (default: the suite's)")
    parser.add_argument("--judges", type=int, default=1, metavar="N", help="processes that judge the answers (default: 1)")
    parser.add_argument("--responses", type=Path, metavar="FILE", help="write every response there, gzipped JSON lines")
    parser.add_argument("--seed", type=int, default=1, help="seed of the samples (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the benchmark, such as prompts.limit=10")


def _eval(options: argparse.Namespace) -> int:
    from r1mega.config.base import FunctionMark, PathMark
    from r1mega.config.loading import load_suite
    from r1mega.config.tree import marked
    from r1mega.pipeline.artifacts import check_model
    from r1mega.pipeline.files import check_writable, write_json
    from r1mega.rewards.imports import load_function

    if options.json:
        check_writable(options.json, "--json")
    if options.responses:
        check_writable(options.responses, "--responses")
    suite = load_suite(options.suite, options.data, options.overrides)
    for key, _, path in marked(suite, PathMark):
        if not Path(path).exists():
            raise UserError(f"'{key}': no file or folder {path}")
    if Path(options.suite).is_file():
        # Functions of a user's own lie beside the suite, as they lie beside a recipe; last, so that they never shadow a library.
        sys.path.append(str(Path(options.suite).parent.absolute()))
    for _, mark, function in marked(suite, FunctionMark):
        load_function(function, arguments=mark.arguments, called=mark.called)
    for name in ("samples", "judges"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.samples:
        suite = suite.model_copy(update={"k": options.samples})
    folder = check_model(options.model, "MODEL_DIR")
    # Megatron-Core warns of every library that a CPU has no use for.
    warnings.simplefilter("ignore")
    from r1mega.stages.evaluate import evaluate_directory

    metrics = evaluate_directory(folder, suite, options.seed, options.threads, options.judges, options.responses)
    print(json.dumps(metrics, indent=2))
    if options.json:
        write_json(options.json, metrics)
    return 0


def _declare_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run, finished or not")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="HTML file to write (default: RUN_DIR/report.html)")


def _report(options: argparse.Namespace) -> int:
    from r1mega.report.page import write_page

    print(write_page(options.run, options.output))
    return 0


def _declare_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("stage", metavar="STAGE", help="name of a finished stage that made a model")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to make; one that holds this very model gets a new card")
    parser.add_argument("--license", metavar="ID", help="licence as the hub spells it, such as apache-2.0 (default: none is claimed)")
    parser.add_argument("--base-model", metavar="ID", help="the hub's name of the model that training began with, such as org/name")


def _publish(options: argparse.Namespace) -> int:
    from r1mega.report.publish import publish

    print(publish(options.run, options.stage, options.target, options.license, options.base_model))
    return 0


def _declare_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="Hugging Face model folder")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the question (default: every line of the input)")
    parser.add_argument(
        "--template", choices=("none", "r1_zero", "chat"), help="how the question is shown (default: chat where the tokenizer has it)"
    )
    parser.add_argument("--temperature", type=float, default=0.6, help="0 takes the likeliest token (default: 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus mass (default: 0.95)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest response (default: what the context leaves, at most 32768)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the responses (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default: 1)")


def _sample(options: argparse.Namespace) -> int:
    from r1mega.pipeline.artifacts import check_model

    if (options.max_new_tokens is not None and options.max_new_tokens < 1) or options.threads < 1:
        raise UserError("--max-new-tokens and --threads must be at least 1")
    if not options.temperature >= 0 or not 0 < options.top_p <= 1:
        raise UserError("--temperature must be at least 0, --top-p above 0 and at most 1")
    folder = check_model(options.model, "MODEL_DIR")
    from r1mega import sample

    settings = sample.Settings(options.template, options.temperature, options.top_p, options.max_new_tokens, options.seed)
    sample.run(folder, options.prompt, settings, options.threads)
    return 0


def _declare_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="Hugging Face folder, or Megatron distributed checkpoint")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to make")
    parser.add_argument("--to", choices=("hf", "megatron"), help="format of DST (default: the one that SRC does not have)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights (default: the one in config.json)")
    parser.add_argument("--fp8", action="store_true", help="quantise what DeepSeek's checkpoints quantise, in blocks of 128 x 128")
    parser.add_argument("--file-size", type=float, default=5.0, metavar="GB", help="largest file of DST (default: 5; 0.5 is 500 MB)")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face folder with the config.json, tokenizer or tensors SRC lacks"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="files that are written at a time (default: one per core, at most 8)")
    parser.add_argument("--verify", action="store_true", help="read DST again before it gets its name, and compare checksums")
    parser.add_argument("--dry-run", action="store_true", help="check SRC and say what would be written")


def _convert(options: argparse.Namespace) -> int:
    from rich.filesize import decimal

    from r1mega.report.progress import bytes_bar
    from r1mega.weights import convert

    if not 0 < options.file_size < math.inf or (options.processes is not None and options.processes < 1):
        raise UserError("--file-size and --processes must be positive")
    settings = (options.to, options.dtype, options.fp8, int(options.file_size * 1e9), options.model)
    plan = convert.plan(convert.conversion(options.source, options.target, *settings))
    print(f"{options.target}: {plan.conversion.to}, {plan.conversion.stored_as}, {decimal(plan.nbytes)} in {len(plan.files)} files")
    if options.dry_run:
        print(*(f"  {file.name}  {decimal(plan.size(file))}" for file in plan.files), sep="\n")
        return 0
    begin = time.monotonic()
    with bytes_bar("converting", plan.nbytes) as report:
        convert.convert(plan, options.processes or convert.cores(), options.verify, report)
    print(f"done in {time.monotonic() - begin:.1f} s")
    return 0


def _declare_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="folder with a config.json, with or without safetensors")
    parser.add_argument(
        "--layout", type=Path, metavar="FILE", help="say what the ranks of a layout hold instead, such as configs/layouts/*.yaml"
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="build that rank of the layout with Megatron-Core, without values, and compare"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same there")


def _audit(options: argparse.Namespace) -> int:
    from r1mega.pipeline.files import write_json

    if options.rank is not None and options.layout is None:
        raise UserError("--rank needs --layout: it says which ranks there are")
    if options.layout is None:
        lines, record, clean = _audit_folder(options.model)
    elif options.rank is None:
        lines, record, clean = _audit_layout(options.model, options.layout)
    else:
        lines, record, clean = _audit_rank(options.model, options.layout, options.rank)
    print(*lines, sep="\n")
    if options.json:
        try:
            write_json(options.json, record)
        except OSError as error:
            raise UserError(f"--json {options.json}: cannot be written ({error.strerror})") from None
    return 0 if clean else 1


def _audit_folder(folder: Path) -> tuple[list[str], dict[str, Any], bool]:
    from r1mega.report.audit import described, inspected
    from r1mega.weights.architecture import read_config
    from r1mega.weights.audit import figures, has_weights, inspect, stored_figures

    expected = figures(read_config(folder))
    if not has_weights(folder):
        return described(folder, expected), {"config": asdict(expected)}, True
    found, findings = stored_figures(folder), inspect(folder)
    record = {"config": asdict(expected), "found": asdict(found), "findings": asdict(findings)}
    return inspected(folder, expected, found, findings), record, not findings.lines()


def _audit_layout(folder: Path, path: Path) -> tuple[list[str], dict[str, Any], bool]:
    from r1mega.config.loading import load_layout
    from r1mega.report.audit import fitted
    from r1mega.weights.architecture import Architecture, read_config
    from r1mega.weights.placement import Spelling
    from r1mega.weights.ranks import rank_classes

    file = load_layout(path)
    classes = rank_classes(Architecture.from_hf(read_config(folder)), file.layout, file.ranks, Spelling())
    record = {**file.model_dump(), "classes": [{**asdict(found), "bytes_in_bf16": found.bytes_in_bf16} for found in classes]}
    return fitted(path, file, classes), record, True


def _audit_rank(folder: Path, path: Path, rank: int) -> tuple[list[str], dict[str, Any], bool]:
    from r1mega.config.loading import load_layout
    from r1mega.report.audit import built
    from r1mega.weights.architecture import Architecture, read_config
    from r1mega.weights.placement import placement

    file, arch = load_layout(path), Architecture.from_hf(read_config(folder))
    if not 0 <= rank < file.ranks:
        raise UserError(f"--rank {rank}: {path} has the ranks 0 to {file.ranks - 1}")
    # Megatron-Core warns of every library that a CPU has no use for.
    warnings.simplefilter("ignore")
    from r1mega.megatron import shapes

    found = shapes.build_rank(arch, file.layout, file.ranks, rank)
    params = placement(arch, file.layout, file.ranks, rank, shapes.spelling())
    wrong = shapes.differences(params, found)
    record = {
        **file.model_dump(),
        "rank": rank,
        "parameters": [{"chunk": param.chunk, "name": param.name, "shape": param.shape} for param in params],
        "differences": wrong,
    }
    return built(rank, file, params, wrong, shapes.LIBRARY), record, not wrong


def _declare_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs that train (default: run.ranks)")
    parser.add_argument(
        "--device", default="h100", metavar="NAME", help="h100, h800, h200, h20, b200, b300, gb200 or gb300 (default: h100)"
    )
    parser.add_argument(
        "--link", metavar="NAME", help="network of a GPU: ndr, hdr, xdr, roce400 or roce200 (default: the device's usual one)"
    )
    parser.add_argument("--host-memory", type=float, metavar="GB", help="of a node (default: what such nodes usually have)")
    parser.add_argument("--response", type=float, metavar="TOKENS", help="mean length of responses (default: 0.3 of max_new_tokens)")
    parser.add_argument("--engine-tp", type=int, metavar="N", help="GPUs of a server (default: the fewest that leave room for its cache)")
    parser.add_argument("--engine-fp8", action="store_true", help="servers hold block FP8")
    parser.add_argument("--search", action="store_true", help="rank all layouts for a stage's training instead")
    parser.add_argument("--stage", metavar="NAME", help="the stage that --search is for (default: the first that trains)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts that --search shows (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same there")
    _declare_overrides(parser)


def _plan(options: argparse.Namespace) -> int:
    from r1mega.config.loading import load_recipe
    from r1mega.pipeline.files import check_writable, write_json
    from r1mega.pipeline.preflight import architectures
    from r1mega.planner.devices import device
    from r1mega.planner.plan import Settings, plan, searched
    from r1mega.report.plan import described, ranked, verdict

    if options.json:
        check_writable(options.json, "--json")
    for name in ("gpus", "response", "engine_tp", "host_memory", "top"):
        if getattr(options, name) is not None and not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name):g}: expected more than 0")
    found = device(options.device, options.link, options.host_memory)
    changes = [] if options.gpus is None else [f"run.ranks={options.gpus}"]
    # A search has no use for the recipe's layout, which need not divide these GPUs.
    changes += ["layout={}"] if options.search else []
    recipe = load_recipe(options.recipe, [*options.overrides, *changes], inputs=False)
    settings = Settings(
        found,
        recipe.run.ranks,
        other_gpus=options.gpus is not None,
        response=options.response,
        engine_tp=options.engine_tp,
        engine_fp8=options.engine_fp8,
    )
    if options.search:
        name, ranking = searched(recipe, options.stage, architectures(recipe), settings)
        print(*ranked(name, ranking, found, recipe.run.ranks, options.top), sep="\n")
        if options.json:
            write_json(options.json, ranking.record())
        return 0
    stages = plan(recipe, architectures(recipe), settings)
    print(*described(stages, found), sep="\n")
    if options.json:
        record = {
            "recipe": recipe.name,
            "device": asdict(found),
            "verdict": verdict(stages),
            "stages": [stage.record() for stage in stages],
        }
        write_json(options.json, record)
    return 1 if any(stage.problems for stage in stages) else 0


def _declare_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", default="", metavar="KEY", help="such as stages.zero.objective.clip, or grpo.objective.clip")


def _explain(options: argparse.Namespace) -> int:
    from r1mega.config.explain import explain

    print(explain(options.key))
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "run": ("run a recipe, or go on with it where it stopped", _declare_run, _run),
    "submit": ("queue a recipe's stages on a cluster, one job each", _declare_submit, _submit),
    "status": ("where a run's stages stand, with every attempt at them", _declare_status, _status),
    "logs": ("what the attempts at a run's stages have printed", _declare_logs, _logs),
    "doctor": ("what this machine has and lacks, for a recipe or at all", _declare_doctor, _doctor),
    "check": ("check a recipe and print it with every default filled in", _declare_check, _check),
    "eval": ("measure a Hugging Face model on a benchmark", _declare_eval, _eval),
    "report": ("write a run as one page of HTML", _declare_report, _report),
    "publish": ("copy a model of a run with a card of what made it", _declare_publish, _publish),
    "sample": ("ask a model something in the terminal", _declare_sample, _sample),
    "convert": ("from Hugging Face to Megatron and back, to another dtype or to block FP8", _declare_convert, _convert),
    "audit": ("what a model folder holds and what is wrong with it, or what the ranks of a layout hold", _declare_audit, _audit),
    "plan": ("what a recipe needs of a cluster, where its time goes, and what does not fit", _declare_plan, _plan),
    "explain": ("what a key of a recipe means, or the keys below it", _declare_explain, _explain),
}


if __name__ == "__main__":
    raise SystemExit(main())
