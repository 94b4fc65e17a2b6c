"""`r1mega eval`, several times in one process, with an engine that answers a question with what a job says of a piece of it.

    scripted_eval.py JOBS RESULTS

JOBS: a JSON list of {"said": {piece: [response, ...]}, "arguments": [...]}; RESULTS: a JSON list of {"metrics": ..., "asked": [...]}.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from r1mega import cli
from r1mega.rollout.engine import Sample
from r1mega.stages import evaluate

JOB: dict[str, Any] = {}


class Scripted:
    def __init__(self, settings: Any, model_dir: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def sync(self, source: Any, version: int) -> None:
        assert sum(tensor.numel() for _, tensor in source.tensors(torch.float32))

    def generate(self, requests: Any, sampling: Any) -> list[Sample]:
        counts: Counter[str] = Counter()
        samples = []
        for request in requests:
            text = self.tokenizer.decode(list(request.prompt_ids))
            (piece,) = [piece for piece in JOB["said"] if piece in text]
            response = JOB["said"][piece][counts[piece] % len(JOB["said"][piece])]
            counts[piece] += 1
            ids = tuple(self.tokenizer(response, add_special_tokens=False)["input_ids"])
            samples.append(Sample(request.prompt_ids, ids, (0.0,) * len(ids), "stop", 0))
            JOB["asked"].append([text, request.max_new_tokens, sampling.temperature, sampling.top_p])
        return samples

    def close(self) -> None:
        pass


evaluate.open_engine = Scripted
jobs, results = (Path(argument) for argument in sys.argv[1:])
found = []
for job in json.loads(jobs.read_text()):
    JOB.update(job, asked=[])
    assert cli.main(["eval", *job["arguments"], "--json", f"{results}.metrics"]) == 0
    found.append({"metrics": json.loads(Path(f"{results}.metrics").read_text()), "asked": JOB["asked"]})
results.write_text(json.dumps(found))
