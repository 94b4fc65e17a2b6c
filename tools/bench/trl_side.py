"""TRL's side of `grpo_vs_trl.py`: one GRPOTrainer in its own process, driven over stdin and stdout, one JSON object a line.

    {"op": "check", "completion_ids": [[...], ...]}  -> {"loss", "grad_norm", ...} of exactly these samples
    {"op": "update"}                                 -> {"update": seconds, "phases": {...}, "cpu": seconds} of the next update

An update runs inside `trainer.train()`, from the moment the command is read to `on_step_end`: data loading, generation, reward, reference
log-probs, forward, backward, clipping, step and logging are all TRL's own. The only thing put in is a logits processor that decides when a
row ends, so that both sides generate the same lengths. It imports nothing of r1mega.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer


def rewards(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of odd token ids."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


class ForcedLengths(LogitsProcessor):
    """Row i ends with EOS as its `lengths[i]`-th new token, and nowhere before."""

    def __init__(self, lengths: Tensor, prompt_length: int, eos: int) -> None:
        self.rows = {int(n): (lengths == n).nonzero().squeeze(1) for n in lengths.unique()}
        self.prompt_length, self.eos = prompt_length, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.eos] = -torch.inf
        ending = self.rows.get(input_ids.shape[1] - self.prompt_length + 1)
        if ending is not None:
            scores[ending] = -torch.inf
            scores[ending, self.eos] = 0.0
        return scores


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer whose phases are timed; nothing else is changed."""

    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def _generate(self, *args: Any) -> Any:
        with self.clock("generate"):
            return super()._generate(*args)

    def _calculate_rewards(self, *args: Any) -> Any:
        with self.clock("reward"):
            return super()._calculate_rewards(*args)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("forward" if torch.is_grad_enabled() else "reference"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _prepare_inputs(self, *args: Any) -> Any:
        with self.clock("prepare"):
            return super()._prepare_inputs(*args)

    def training_step(self, *args: Any) -> Any:
        with self.clock("training_step"):
            return super().training_step(*args)


class Driver(TrainerCallback):
    """Answers commands between updates."""

    trainer: TimedTrainer

    def __init__(self, commands: TextIO, answers: TextIO) -> None:
        self.commands, self.answers = commands, answers
        self.started = self.cpu_started = self.clipped = 0.0

    def serve(self, control: Any) -> None:
        """Answer until an update is asked for, or nothing more."""
        for line in self.commands:
            command = json.loads(line)
            if command["op"] == "update":
                self.trainer.seconds.clear()
                self.started, self.cpu_started = time.perf_counter(), time.process_time()
                return
            self.answer(check(self.trainer, command["completion_ids"]))
        control.should_training_stop = True

    def answer(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self.answers, flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.serve(control)
        if control.should_training_stop:
            sys.exit(0)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:  # after clipping
        self.clipped = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.seconds["step"] += time.perf_counter() - self.clipped

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        total, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        seconds = self.trainer.seconds
        phases = {name: seconds[name] for name in ("generate", "reward", "reference")}
        phases["train"] = seconds["training_step"] - seconds["prepare"] + seconds["step"]
        self.answer({"update": total, "phases": phases, "cpu": cpu})
        self.serve(control)


def check(trainer: TimedTrainer, completion_ids: list[list[int]]) -> dict[str, Any]:
    """Loss and gradient norm of given samples through TRL's own scoring and loss.

    The reference's log-probs stand in for the old policy's, so that ratio, clip and KL all matter.
    """
    prompts = [row["prompt"] for row in trainer.train_dataset for _ in range(trainer.num_generations)]
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    trainer.rollout_func = lambda *_: {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    trainer.rollout_func = None
    inputs["old_per_token_logps"] = inputs["ref_per_token_logps"]
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), torch.inf)
    trainer.model.zero_grad()
    means = {name: trainer._metrics["train"][name][-1] for name in ("kl", "entropy")}
    return {"loss": loss.item(), "grad_norm": norm.item(), "prompt_ids": prompt_ids[:: trainer.num_generations], **means}


def config(options: argparse.Namespace, samples: int, group: int, longest: int, output: str) -> GRPOConfig:
    """The published objective; attention and experts are the fastest that transformers has on a CPU."""
    return GRPOConfig(
        output_dir=output, use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=options.micro_batch, gradient_accumulation_steps=samples // options.micro_batch,
        num_generations=group, max_completion_length=longest, shuffle_dataset=False, dataloader_pin_memory=False,
        temperature=1.0, top_k=0, beta=1e-3, epsilon=10.0, loss_type="grpo", scale_rewards="group", mask_truncated_completions=False,
        use_bias_correction_kl=False,  # on by default; multiplies the published k3 term by the ratio
        learning_rate=1e-4, lr_scheduler_type="constant", optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0,
        max_grad_norm=1.0, max_steps=1_000_000, save_strategy="no", logging_steps=1_000_000, report_to=[], disable_tqdm=True, seed=1,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa", "experts_implementation": "grouped_mm"},
    )  # fmt: skip


def build(options: argparse.Namespace, driver: Driver, output: str) -> TimedTrainer:
    work = json.loads(options.workload.read_text())
    lengths = torch.tensor(work["lengths"])
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = TimedTrainer(
        model=str(options.model),
        reward_funcs=rewards,
        args=config(options, len(lengths), work["group"], int(lengths.max()), output),
        processing_class=tokenizer,
        callbacks=[driver],
        train_dataset=Dataset.from_dict({"prompt": work["prompts"]}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.ref_model.load_state_dict(AutoModelForCausalLM.from_pretrained(options.reference, dtype=torch.float32).state_dict())
    plain = trainer.model.generate

    def generate(input_ids: Tensor, **kwargs: Any) -> Any:
        processor = ForcedLengths(lengths, input_ids.shape[1], tokenizer.eos_token_id)
        return plain(input_ids=input_ids, logits_processor=LogitsProcessorList([processor]), **kwargs)

    trainer.model.generate = generate
    driver.trainer = trainer
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the policy")
    parser.add_argument("--reference", type=Path, required=True, help="Hugging Face folder of the reference")
    parser.add_argument("--workload", type=Path, required=True, help="JSON: prompts, group, lengths")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=256)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not an answer
    with tempfile.TemporaryDirectory() as output:
        build(options, Driver(sys.stdin, answers), output).train()


if __name__ == "__main__":
    main()
