"""A teacher's cache written by a Ray cluster: Ray Data, with a teacher in each of its actors.

pip install fusedkd[train,ray]
python examples/ray_cache.py --teacher ./teacher --data text/ --output cache/ --actors 8 --gpus 1

The folders are ones that every machine of the cluster sees. An actor writes the shards that it is
given; one that dies is started anew, and Ray hands its shard out again. If everything dies, the
same command goes on. What comes out is what ``fusedkd cache`` writes in one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedkd.cache.build import answer_shard, begun
from fusedkd.cache.of_model import job_of, sequences_of
from fusedkd.cache.policy import Policy
from fusedkd.data.arguments import DataArguments
from fusedkd.data.loading import load_rows
from fusedkd.teachers import LiveTeacher


class Teacher:
    """An actor: it has the teacher, on a GPU if it was given one."""

    def __init__(self, teacher: str, output: Path, batch_size: int) -> None:
        self.output, self.batch_size = output, batch_size
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self.run = live(teacher, self.device)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        answer_shard(
            self.output,
            int(shard["number"]),
            np.split(shard["ids"], np.cumsum(shard["lengths"])[:-1]),
            lambda ids: self.run({"input_ids": ids.to(self.device)}),
            self.batch_size,
        )
        return {"tokens": len(shard["ids"])}


def live(teacher: str, device: torch.device) -> LiveTeacher:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    return LiveTeacher(model.eval().requires_grad_(False).to(device))


def main(words: list[str] | None = None) -> int:
    """The number of tokens that were asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--hidden", choices=("bf16", "int8"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shard-mb", type=float, default=64)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1, help="of each actor")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    args = parser.parse_args(words)
    if args.actors * args.cpus >= (there := ray.cluster_resources().get("CPU", 0)):
        parser.error(
            f"{args.actors} actors of {args.cpus:g} CPUs leave none of {there:g} for Ray Data's "
            "own tasks, and all would wait for ever: expected fewer --actors, or --cpus 0.5."
        )

    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    rows = load_rows(DataArguments(data=args.data, max_length=args.max_length), tokenizer)
    job = job_of(
        live(args.teacher, torch.device("cpu")),  # its weights are hashed, and its head is kept
        tokenizer,
        sequences_of([*rows.train, *(rows.test or ())]),
        Policy.of(args.top_k, sample=args.sample, hidden=args.hidden),
        name=args.teacher,
        batch_size=args.batch_size,
        shard_bytes=int(args.shard_mb * 2**20),
    )
    output = args.output.resolve()
    with begun(output, job) as missing:
        shards = [
            {"number": n, "ids": np.concatenate(ids), "lengths": [len(row) for row in ids]}
            for n, ids in missing
        ]
        if not shards:
            return 0
        written = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
            Teacher,
            fn_constructor_args=(args.teacher, output, args.batch_size),
            compute=ray.data.ActorPoolStrategy(size=args.actors),
            num_cpus=args.cpus,
            num_gpus=args.gpus,
        )
        return int(written.sum("tokens"))


if __name__ == "__main__":
    ray.init(include_dashboard=False)
    print(f"{main():,} tokens")
