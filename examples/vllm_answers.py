"""A teacher asked in vLLM's offline engine, without a server: in an environment with vLLM,

fusedkd data --tokenizer ./teacher --data text/ --output blocks.jsonl
python examples/vllm_answers.py ./teacher blocks.jsonl answers.jsonl --top-k 64
fusedkd cache import answers.jsonl --tokenizer ./teacher --output cache/
fusedkd distill --teacher_cache cache/ --student ./student --data text/ --output_dir out
"""

import argparse
import json
from itertools import islice

from vllm import LLM, SamplingParams

AT_A_TIME = 1000  # sequences, whose answers are in memory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher")
    parser.add_argument("questions", help="of fusedkd data --output")
    parser.add_argument("answers")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--max-model-len", type=int)
    args = parser.parse_args()
    # prompts alone are read, for which CUDA graphs bring nothing
    limits = {"max_logprobs": args.top_k, "max_model_len": args.max_model_len}
    engine = LLM(args.teacher, enforce_eager=True, **limits)
    law = SamplingParams(max_tokens=1, prompt_logprobs=args.top_k, detokenize=False)
    with open(args.questions) as questions, open(args.answers, "w") as answers:
        while prompts := [json.loads(line) for line in islice(questions, AT_A_TIME)]:
            for answer in engine.generate(prompts, law, use_tqdm=False):
                steps = [
                    step and {i: entry.logprob for i, entry in step.items()}
                    for step in answer.prompt_logprobs
                ]
                row = {"prompt_token_ids": answer.prompt_token_ids, "prompt_logprobs": steps}
                answers.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
