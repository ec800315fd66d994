"""``python docs/targets_page.py > docs/targets.md``: the meaning of each group of ``--target_modules``."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.weights import paths_of
from effilora_diffusion.language.coverage import parts_of_blocks
from effilora_diffusion.language.targets import ALL_LINEAR, EXPERTS, GROUPS, find_sites

DENSE = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "smollm3",
        "granite",
        "glm4",
        "cohere",
        "olmo2",
    ),
    *("starcoder2", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon"),
)
MIXED = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "olmoe", "phimoe", "glm4_moe"),
    *("qwen3_next", "jamba", "llama4_text"),
)

HEAD = """# Targets

What `--target_modules` means in transformers' models, with the share of the blocks' weights it adapts. Embeddings, the output
embedding and norms are never adapted, routers of mixtures only where they are linears. Groups may be combined, and names of
layers (`o_proj`) be added to them.

Every share is that of the model which `transformers` builds from the defaults of the architecture's configuration; a run
says its own before the first step. `python docs/targets_page.py` makes this page.
"""

NOTES = """
`experts` are the weights of a mixture's experts, which transformers keeps as parameters of several matrices; linears of shared
experts are in the other groups, and the experts of Llama 4, which are kept in another form, are refused. They take one head or
`--routing static`, see [language.md](language.md#experts).
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for title, names in (("Models", DENSE), ("Mixtures of experts", MIXED)):
        groups = (*GROUPS, ALL_LINEAR, *((EXPERTS,) if names is MIXED else ()))
        parts.append(f"\n## {title}\n\n| `model_type` | {' | '.join(f'`{group}`' for group in groups)} |\n")
        parts.append("|---" * (len(groups) + 1) + "|\n")
        for name in names:
            model = meta_model(name)
            parts.append(f"| {name} | {' | '.join(_cell(model, group) for group in groups)} |\n")
    return "".join(parts) + NOTES


def meta_model(name: str) -> nn.Module:
    """The causal language model of an architecture at its defaults, without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name]())
    return model


def _cell(model: nn.Module, group: str) -> str:
    try:
        paths = paths_of(find_sites(model, [group]))
    except EffiLoRAError:
        return "refused" if group == EXPERTS else "none"
    parts = parts_of_blocks(model, set(paths))
    share = sum(part.numbers for part in parts if part.adapted) / sum(part.numbers for part in parts)
    names = " ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return f"{names}: {share:.1%}"


if __name__ == "__main__":
    print(page(), end="")
