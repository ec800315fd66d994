"""Pipelines as single checkpoint files with the names of the original Stable Diffusion code, as model sites offer them."""

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name, layers, attentive):
    """The original name of a UNet's weight; ``attentive`` are the up blocks that have attentions."""
    for ours, theirs in ENDS.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs, 1)
    kind, rest = name.split(".", 1)
    if kind == "mid_block":
        part, index, rest = rest.split(".", 2)
        place = f"middle_block.{1 if part == 'attentions' else 2 * int(index)}"
    else:
        block, part, index, rest = rest.split(".", 3)
        block, index, width = int(block), int(index), layers + 1
        if kind == "down_blocks":
            place = f"input_blocks.{1 + block * width + index}.{int(part == 'attentions')}"
            if part == "downsamplers":
                return f"input_blocks.{(block + 1) * width}.0.op.{rest.removeprefix('conv.')}"
        else:
            place = f"output_blocks.{block * width + index}.{int(part == 'attentions')}"
            if part == "upsamplers":
                return f"output_blocks.{block * width + width - 1}.{1 + (block in attentive)}.{rest}"
    if part == "resnets":
        layer, _, end = rest.partition(".")
        rest = f"{RESNET[layer]}.{end}"
    return f"{place}.{rest}"


def vae_name(name, blocks):
    """The original name of an autoencoder's weight."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{ours}", f"attn_1.{theirs}")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)


def open_clip(state):
    """The weights of SDXL's second text encoder in OpenCLIP's form: q, k and v in one, the projection transposed."""
    found = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if name.endswith("position_ids"):
            continue
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if ".self_attn.q_proj." in name:
            parts = [state["text_model." + name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            value, name = torch.cat(parts), name.replace(".q_proj.", ".in_proj_")
        for ours, theirs in {
            "embeddings.position_embedding.weight": "positional_embedding",
            "embeddings.token_embedding": "token_embedding",
            "final_layer_norm": "ln_final",
            "encoder.layers.": "transformer.resblocks.",
            "layer_norm": "ln_",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
            "self_attn": "attn",
        }.items():
            name = name.replace(ours, theirs)
        found[name] = value
    found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    return found


def write_single_file(pipe, path):
    """Write a tiny Stable Diffusion 1.x or XL pipeline as one file."""
    config = pipe.unet.config
    attentive = {index for index, kind in enumerate(config.up_block_types) if "Attn" in kind}
    tensors = {}
    for name, value in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, config.layers_per_block, attentive)}"] = value
    for name, value in pipe.vae.state_dict().items():
        tensors[f"first_stage_model.{vae_name(name, len(pipe.vae.config.block_out_channels))}"] = value
    prefix = "conditioner.embedders.0" if hasattr(pipe, "text_encoder_2") else "cond_stage_model"
    for name, value in pipe.text_encoder.state_dict().items():
        tensors[f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    if hasattr(pipe, "text_encoder_2"):
        state = {f"text_model.{name}": value for name, value in pipe.text_encoder_2.state_dict().items()}
        state = {name.replace("text_model.text_model.", "text_model."): value for name, value in state.items()}
        for name, value in open_clip(state).items():
            tensors[f"conditioner.embedders.1.model.{name}"] = value
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return path
