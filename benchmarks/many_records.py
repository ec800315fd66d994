"""A large set of conversations: the time to tokenise it, bytes a token, and memory while it is tokenised and trained on.

    python -m benchmarks.many_records --work /tmp/records --counts 1000 100000 1000000

makes a byte-pair tokenizer with a chat template, a small LLaMA, and for each count a JSONL file of conversations with one or two
answers of random words. Each file is trained on for some steps by ``effilora train-llm``, twice: the second start tokenises
nothing. Memory is that of every process of the command, without the pages of mapped files, which the system takes back when it
needs them; those of the first process are told beside it. What has been measured is kept in ``WORK/many_records.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYLLABLES = ("ka", "lo", "mi", "ter", "an", "vo", "shu", "re", "pi", "ton", "el", "gra", "ne", "du", "sta", "or")
WORDS = 20_000
VOCABULARY = 8_000
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words_of(rng: random.Random) -> list[str]:
    """Words of two to four syllables."""
    return ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(WORDS)]


def make_model(folder: Path) -> Path:
    """A tokenizer trained on such words, and a LLaMA of two layers."""
    if (folder / "config.json").exists():
        return folder
    rng = random.Random(0)
    words = words_of(rng)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    inner.train_from_iterator((" ".join(rng.choices(words, k=30)) for _ in range(5000)), trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHAT, **names)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)).save_pretrained(
        folder
    )
    return folder


def make_records(path: Path, count: int) -> Path:
    """So many conversations, as far as they are not there."""
    if path.exists():
        return path
    rng = random.Random(1)
    words = words_of(random.Random(0))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = []
            for _ in range(rng.randint(1, 2)):
                question, answer = (" ".join(rng.choices(words, k=rng.randint(3, most))) for most in (20, 40))
                messages += [
                    {"role": "user", "content": f"{number}: {question}?"},
                    {"role": "assistant", "content": answer},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def watch(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; seconds, seconds of CPU, and peaks of memory of its first process and of the others, in megabytes."""
    began, busy, peaks = time.perf_counter(), _busy(), {"first": 0.0, "mapped": 0.0, "others": 0.0}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as running:
        first = psutil.Process(running.pid)
        while running.poll() is None:
            try:
                own, others = first.memory_info(), [child.memory_info() for child in first.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            peaks["first"] = max(peaks["first"], own.rss - own.shared)
            peaks["mapped"] = max(peaks["mapped"], own.shared)
            peaks["others"] = max([peaks["others"], *(one.rss - one.shared for one in others)])
            time.sleep(0.2)
    if running.returncode:
        raise SystemExit(f"the run ended with {running.returncode}")
    seconds = {"seconds": round(time.perf_counter() - began, 1), "seconds of CPU": round(_busy() - busy, 1)}
    return {**seconds, **{name: round(value / 1e6) for name, value in peaks.items()}}


def _busy() -> float:
    """Seconds of CPU of all processes that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def measure(work: Path, count: int, steps: int, workers: int | None) -> dict[str, Any]:
    """One count: the file, the run that tokenises it and the one that finds its tokens."""
    data, home = make_records(work / f"{count}.jsonl", count), work / f"home-{count}"
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = {
        "model_name_or_path": make_model(work / "model"), "train_file": data, "max_steps": steps, "save_strategy": "no",
        "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "output_dir": work / f"out-{count}", "overwrite_output_dir": True, "rank": 2,
    }  # fmt: skip
    if workers is not None:
        options["preprocessing_num_workers"] = workers
    command = [
        sys.executable,
        "-m",
        "effilora_diffusion",
        "train-llm",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    found: dict[str, Any] = {"records": count, "megabytes": round(data.stat().st_size / 1e6, 1), "steps": steps}
    found["first start"] = watch(command, environment)
    found["second start"] = watch(command, environment)
    files = list((home / "effilora" / "tokens").glob("*/*.bin"))
    if files:  # small sets are not kept
        tokens = sum(path.stat().st_size for path in files if path.name == "tokens.bin") // 4
        found |= {"tokens": tokens, "bytes a token": round(sum(path.stat().st_size for path in files) / tokens, 2)}
    return found


def main() -> None:
    """Measure what is missing; prints a line of JSON for each count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, help="processes that tokenise (default: one per core)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    log = arguments.work / "many_records.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for count in arguments.counts:
        if any(line["records"] == count for line in done):
            continue
        found = measure(arguments.work, count, arguments.steps, arguments.workers)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    print(log.read_text(), end="")


if __name__ == "__main__":
    main()
