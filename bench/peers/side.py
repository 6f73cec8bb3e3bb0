"""One side of `bench.peers`, a process of its own: a model is loaded, then each line of stdin is a task.

    python side.py KIND FOLDER THREADS      KIND: helexa-f32, helexa-bf16, helexa-int8, transformers, vllm

-> {"streams": 4, "prompt": 64, "tokens": 32, "seed": 1}    <- {"wall_s": 1.7, "processor_s": 3.3}

Every stream has a prompt of its own, random ids that no round repeats; the end-of-text token does not end an answer;
greedy. Imports nothing of this repository but for our own sides, so that it runs in the environment of the peer.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

Task = Callable[[list[list[int]], int], None]
CONTEXT = 2048
STREAMS = 8


def main() -> None:
    kind, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    run, settings = SIDES[kind.partition("-")[0]](kind, folder, threads)
    print(json.dumps({"settings": settings}), file=out, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        rng = random.Random(task["seed"])
        prompts = [[rng.randrange(100, 40_000) for _ in range(task["prompt"])] for _ in range(task["streams"])]
        wall, processor = time.perf_counter(), time.process_time()
        run(prompts, task["tokens"])
        took = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
        print(json.dumps(took), file=out, flush=True)


def helexa(kind: str, folder: str, threads: int) -> tuple[Task, str]:
    import queue
    from pathlib import Path

    from tokenizers import Tokenizer

    from helexa.neuron.harness.torch.engine import Engine
    from helexa.neuron.harness.torch.request import Failed, Finished, Limits, Request, Sampling
    from helexa.neuron.harness.torch.shard import LocalRunner, load_shard, whole_model

    dtype = kind.partition("-")[2]
    shard = load_shard(whole_model(Path(folder), dtype=dtype, threads=threads), None)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    limits = Limits(CONTEXT, STREAMS, 512, CONTEXT * STREAMS, shard.config.vocabulary)
    engine = Engine(LocalRunner(shard), tokenizer, limits, name="bench", eos=())
    greedy = Sampling(temperature=0.0)

    def run(prompts: list[list[int]], tokens: int) -> None:
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for prompt in prompts:
            engine.submit(Request(tuple(prompt), max_tokens=tokens, sampling=greedy), events.put)
        left = len(prompts)
        while left:
            event = events.get()
            if isinstance(event, Failed):
                raise SystemExit(f"our engine failed: {event}")
            if isinstance(event, Finished):
                if event.usage.completion != tokens:
                    raise SystemExit(f"{event.usage.completion} tokens in place of {tokens}")
                left -= 1

    return run, f"helexa {version('helexa')}, torch {version('torch')}, {dtype}, chunk 512"


def transformers(kind: str, folder: str, threads: int) -> tuple[Task, str]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    dtype = kind.partition("-")[2] or "f32"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype], attn_implementation="sdpa"
    ).eval()

    def run(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            got = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        if got.shape[1] != ids.shape[1] + tokens:
            raise SystemExit("transformers gave another number of tokens")

    names = f"transformers {version('transformers')}, torch {version('torch')}"
    return run, f"{names}, {dtype}, sdpa, generate with its dynamic cache, one batch"


def vllm(kind: str, folder: str, threads: int) -> tuple[Task, str]:
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1" if threads > 1 else "0")
    from vllm import LLM, SamplingParams

    dtype = {"f32": "float32", "bf16": "bfloat16"}[kind.partition("-")[2] or "f32"]
    llm: Any = LLM(
        model=folder,
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=CONTEXT,
        max_num_seqs=STREAMS,
    )

    def run(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        got = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        if any(len(one.outputs[0].token_ids) != tokens for one in got):
            raise SystemExit("vllm gave another number of tokens")

    name = next((n for n in ("vllm-cpu", "vllm") if _has(n)), "vllm")
    return run, f"{name} {version(name)}, torch {version('torch')}, {dtype}, enforce_eager, no prefix cache"


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except ModuleNotFoundError:
        return False


SIDES: dict[str, Callable[[str, str, int], tuple[Task, str]]] = {
    "helexa": helexa,
    "transformers": transformers,
    "vllm": vllm,
}

if __name__ == "__main__":
    main()
