"""``python full_disk.py MODEL IMAGES FOLDER CASES``: train on file systems that are really too small, then give them room.

Runs in a mount namespace of its own. Prints a line of JSON per case: what the run said, what it left, what resuming made of it.
"""

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

from effilora_diffusion.cli import train
from effilora_diffusion.core.run_folder import checkpoints
from effilora_diffusion.diffusion.training.checkpoints import fault_of

PAGE = 4096
ROOM = 64 << 20


def tmpfs(folder, size, remount=False):
    kind = ["remount,"] if remount else [""]
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{kind[0]}size={size}", "tmpfs", str(folder)], check=True)


def command(words):
    """Exit code and standard error of a training command."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = train.main(words)
    return code, [line for line in said.getvalue().splitlines() if line.startswith("error: ")]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def case(words, folder, size):
    """One run on ``size`` bytes, and the same with room afterwards."""
    tmpfs(folder, size)
    try:
        output = folder / "out"
        code, said = command([*words, f"--output_dir={output}"])
        left = {
            "code": code,
            "said": said,
            "temporary": [path.name for path in output.rglob("*") if "tmp" in path.name or ".old" in path.name],
            "faults": [fault_of(path) for path in checkpoints(output) if fault_of(path)],
            "checkpoints": len(checkpoints(output)),
        }
        tmpfs(folder, ROOM, remount=True)
        way = "--resume_from_checkpoint=latest" if left["checkpoints"] else "--overwrite_output_dir"
        again = [0, []] if code == 0 else command([*words, f"--output_dir={output}", way])
        used = sum(-(-path.stat().st_size // PAGE) * PAGE for path in output.rglob("*") if path.is_file())
        return {**left, "again": again, "adapter": sha256(output / "effilora.safetensors"), "bytes": used}
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main(model, images, folder, cases):
    folder = Path(folder)
    words = [
        f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={images}", "--instance_prompt=a sks cat",
        "--resolution=32", "--center_crop", "--train_batch_size=1", "--max_train_steps=3", "--checkpointing_steps=1",
        "--reducer=importance", "--reducer_warmup=0", "--reducer_interval=1", "--num_validation_images=1",
        "--validation_inference_steps=1", "--export_distillation_steps=1",
    ]  # fmt: skip
    whole = case(words, folder, ROOM)
    print(json.dumps({"size": ROOM, **whole}), flush=True)
    for index in range(cases):
        size = max(PAGE, round(whole["bytes"] * (index + 1) / (cases + 1)) // PAGE * PAGE)
        print(json.dumps({"size": size, **case(words, folder, size)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
