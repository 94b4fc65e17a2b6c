"""The model card of a published artifact, README.md, written from provenance alone: whatever it says, a record said first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1mega.pipeline.artifacts import Provenance

_METHODS = {
    "pretrain": "Next-token training from scratch.",
    "sft": "Supervised training on answered conversations, with loss on the answers only.",
    "grpo": "Reinforcement learning with group-relative advantages (GRPO), as in DeepSeek-R1 (arXiv 2501.12948).",
    "distill": "Distillation: the student learns the teacher's distribution.",
}
_KEYS = {
    "pretrain": ("init_std",),
    "sft": ("epochs", "batch", "template"),
    "grpo": ("updates", "group_size", "prompts_per_rollout", "updates_per_rollout", "reference_refresh"),
    "distill": ("method", "updates", "batch", "top_k"),
}
_PARTS = {
    "optimizer": ("lr", "min_lr", "decay", "warmup"),
    "sampling": ("temperature", "top_p", "max_new_tokens"),
    "objective": ("clip", "kl_coef"),
}


@dataclass(frozen=True)
class Score:
    """What a stage measured on a suite: metrics of the model, and the suite's configuration."""

    stage: str
    suite: str
    metrics: Mapping[str, Any]
    config: Mapping[str, Any]


def card(made: Provenance, ancestors: Sequence[Provenance], scores: Sequence[Score], licence: str | None, base_model: str | None) -> str:
    """README.md with the front matter that the Hugging Face hub reads.

    Args:
        made: the record of the stage that made the model.
        ancestors: the records it goes back to, newest first.
        scores: what was measured of this very model.
        licence: identifier as the hub spells it; None claims none.
        base_model: the hub's name of the model that training began with; None names none.
    """
    chain = [made, *ancestors]
    parts = [
        _front_matter(made, chain, licence, base_model),
        f"# {made.recipe}: {made.name}",
        f"{_METHODS.get(made.kind, made.kind)} Made by r1mega {made.code['r1mega']}, "
        f"stage `{made.name}` of the recipe `{made.recipe}`, seed {made.seed}.",
        "## How to prompt it",
        _prompting(made, scores),
        "## Scores",
        _scores(scores),
        "## How it was made",
        _lineage(chain),
        "## Settings",
        _settings(made),
        "## Limitations",
        _limitations(chain, scores),
        "## Digests",
        _digests(made),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(made: Provenance, chain: Sequence[Provenance], licence: str | None, base_model: str | None) -> str:
    from huggingface_hub import ModelCardData

    tags = ["r1mega", made.kind, *(["reasoning"] if any(stage.kind == "grpo" for stage in chain) else [])]
    data = ModelCardData(license=licence, base_model=base_model, pipeline_tag="text-generation", library_name="transformers", tags=tags)
    return f"---\n{data.to_yaml().rstrip()}\n---"


def _prompting(made: Provenance, scores: Sequence[Score]) -> str:
    templates = {
        "none": "The bare question, as text that the model continues.",
        "r1_zero": "The conversation preamble of DeepSeek-R1 (arXiv 2501.12948, table 1) around the question.",
        "chat": "The tokenizer's chat template, `apply_chat_template(..., add_generation_prompt=True)`.",
    }
    lines = [f"- Template `{template}`: {templates.get(template, '')}" for template in _templates(made)]
    settings = {_sampling(score.config.get("sampling", {})) for score in scores}
    lines += [f"- Its scores were measured at {found}." for found in sorted(settings) if found]
    sampling: Mapping[str, Any] = next((score.config["sampling"] for score in scores if "sampling" in score.config), {})
    flags = [f"--template {template}" for template in _templates(made)[:1]]
    flags += [
        f"--{key.replace('_', '-')} {_plain(sampling[key])}" for key in ("temperature", "top_p") if isinstance(sampling.get(key), float)
    ]
    return "\n".join([*lines, "", "```bash", " ".join(["r1mega sample FOLDER", *flags]), "```"]).lstrip("\n")


def _templates(made: Provenance) -> list[str]:
    """The templates that the model was trained with."""
    prompts = made.config.get("prompts") or {}
    sets = [prompts] if "source" in prompts else [found for found in prompts.values() if isinstance(found, dict)]
    found = [str(one["template"]) for one in sets if "template" in one] + (
        [str(made.config["template"])] if "template" in made.config else []
    )
    return list(dict.fromkeys(found))


def _sampling(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_plain(config[key])}" for key in _PARTS["sampling"] if key in config)


def _scores(scores: Sequence[Score]) -> str:
    rows = []
    for score in scores:
        k, prompts = score.metrics.get("k", "–"), score.metrics.get("n_prompts", "–")
        for name, value in score.metrics.items():
            if isinstance(value, Mapping) and "ci95" in value and value["value"] is not None:
                low, high = value["ci95"]
                rows.append(
                    f"| {score.suite} | {name} | {value['value']:.4g} | {low:.4g} to {high:.4g} | {prompts} | {k} | {score.stage} |"
                )
    if not rows:
        return "None was measured."
    head = "| suite | metric | value | 95 % interval | prompts | samples each | measured by |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *rows, "", "Intervals are bootstrapped over prompts. pass@1 is the mean over all samples."])


def _lineage(chain: Sequence[Provenance]) -> str:
    lines = []
    for stage in reversed(chain):
        inputs = [f"`{key}` {found['reference']} ({found['digest'][:12]})" for key, found in stage.inputs.items()]
        digest = stage.artifact["digest"][:12] if stage.artifact else "no artifact"
        commit = (
            f", commit {stage.code['commit'][:12]}{' with changes' if stage.code.get('modified') else ''}"
            if stage.code.get("commit")
            else ""
        )
        lines.append(
            f"1. **{stage.name}** ({stage.recipe}; {stage.kind}): {_from(inputs)}; seed {stage.seed}, {stage.ranks} ranks on "
            f"{stage.platform}, {stage.wall_s:.0f} s{commit}; artifact {digest}"
        )
    return "\n".join(lines)


def _from(inputs: Sequence[str]) -> str:
    return f"from {', '.join(inputs)}" if inputs else "from nothing but its configuration"


def _settings(made: Provenance) -> str:
    config = made.config
    found = {key: config[key] for key in _KEYS.get(made.kind, ()) if config.get(key) is not None}
    for part, keys in _PARTS.items():
        found |= {f"{part}.{key}": config[part][key] for key in keys if part in config and config[part].get(key) is not None}
    for name, reward in (config.get("rewards") or {}).items():
        found[f"rewards.{name}"] = f"{reward['function']}, weight {_plain(reward['weight'])}"
    for name, reward in (config.get("reward_models") or {}).items():
        found[f"reward_models.{name}"] = f"{reward['model']}, weight {_plain(reward['weight'])}"
    rows = [f"| {key} | {_plain(value)} |" for key, value in found.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows, "", "All of them are in `provenance.json`."])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{_plain(number)} from update {update}" for update, number in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _limitations(chain: Sequence[Provenance], scores: Sequence[Score]) -> str:
    lines = []
    corpora = [phase["corpus"] for stage in chain if stage.kind == "pretrain" for phase in stage.config["phases"]]
    tiny = [corpus for corpus in corpora if corpus["kind"] == "tiny"]
    if tiny:
        last = tiny[-1]
        lines.append("- A toy: it knows the 128 words of r1mega's tiny language and nothing else.")
        if {"long_share", "mixed_share", "corrected_share"} <= last.keys():
            lines.append(
                f"- What its base could do is made by its corpus: in the last phase {last['long_share']:.0%} of the documents reason, "
                f"{last['mixed_share']:.0%} of those mix two languages, and {last['corrected_share']:.0%} of the wrong steps are corrected."
            )
    elif not corpora:
        lines.append("- Nothing is recorded here of how its base was trained.")
    if not scores:
        lines.append("- It was not measured.")
    if any(stage.code.get("modified") for stage in chain):
        lines.append("- Some stages ran on code that differs from the commit that they name.")
    lines.append("- Rule-based rewards judge answers, not thoughts: a thought need not be the reason for its answer.")
    return "\n".join(lines if any(stage.kind == "grpo" for stage in chain) else lines[:-1] or ["- None is recorded."])


def _digests(made: Provenance) -> str:
    assert made.artifact is not None, "a published stage made an artifact"
    rows = "\n".join(f"{digest}  {name}" for name, digest in made.artifact["files"].items())
    return (
        "SHA-256 of what the stage left, in the format of `sha256sum --check`. This card, `provenance.json` and `provenance/` are written "
        f"when the model is published and are not covered.\n\n```\n{rows}\n```"
    )
