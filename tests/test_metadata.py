"""What images say of how they were drawn: ours in two forms, A1111's and ComfyUI's as far as they say."""

import hashlib
import json
import struct

import pytest
from conftest import build_tiny_pipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.sampling.a1111 import infotext, parse_infotext
from effilora_diffusion.diffusion.sampling.metadata import read_image, read_parameters
from effilora_diffusion.diffusion.sampling.png import save_png
from effilora_diffusion.diffusion.sampling.prompt_syntax import fragments, plain
from effilora_diffusion.diffusion.sampling.request import GenerationRequest
from effilora_diffusion.diffusion.sampling.saving import lora_hash, save_image

FORGE = (
    "masterpiece, (red:1.4) cat\non a table <lora:detail tweaker:0.8>\n"
    "Negative prompt: blurry, bad\nhands\n"
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 832x1216, "
    "Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Clip skip: 2, Hires upscale: 1.5, "
    'Lora hashes: "detail tweaker: 7c6bad76eb54", ADetailer prompt: "a, b: c", Version: f2.0.1'
)


def png(path, **texts):
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (64, 48)).save(path, pnginfo=info)
    return path


def graph(**changes):
    """ComfyUI's usual graph with a LoRA, as it was run."""
    nodes = {
        "3": ("KSampler", {"seed": ["40", 0], "steps": 20, "cfg": 7.5, "sampler_name": "euler_ancestral",
                           "scheduler": "normal", "denoise": 1, "model": ["10", 0], "positive": ["6", 0],
                           "negative": ["7", 0], "latent_image": ["5", 0]}),
        "4": ("CheckpointLoaderSimple", {"ckpt_name": "sdxl/base.safetensors"}),
        "5": ("EmptyLatentImage", {"width": 768, "height": 512, "batch_size": 1}),
        "6": ("CLIPTextEncode", {"text": ["41", 0], "clip": ["10", 1]}),
        "7": ("CLIPTextEncode", {"text": "blurry", "clip": ["10", 1]}),
        "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
        "9": ("SaveImage", {"images": ["8", 0]}),
        "10": ("LoraLoader", {"lora_name": "styles\\soft.safetensors", "strength_model": 0.6, "strength_clip": 1.0,
                              "model": ["4", 0], "clip": ["4", 1]}),
        "40": ("Seed (rgthree)", {"seed": 99}),
        "41": ("PrimitiveStringMultiline", {"value": "a (red:1.2) cat [sits]"}),
    }  # fmt: skip
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in {**nodes, **changes}.items()}


# ------------------------------------------------------------------------------------------------------------- ours


def test_an_image_of_ours_is_read_by_us_and_by_a1111(tmp_path):
    pipe, image = build_tiny_pipeline(), Image.new("RGB", (64, 32))
    lora = tmp_path / "soft.safetensors"
    lora.write_bytes(struct.pack("<Q", 2) + b"{}" + b"tensors")
    request = GenerationRequest(
        "a (red:1.2) cat, süß", "blurry", [("soft", 0.5)], 7, None, 64, 32, 1, 11, "DPM++ 2M Karras"
    )
    save_image(image, tmp_path / "a.png", request, 11, "folder/my model.safetensors", pipe, {"soft": lora})
    facts = read_image(tmp_path / "a.png")
    assert (facts.program, facts.notes) == ("EffiLoRA", [])
    assert GenerationRequest.from_parameters(facts.parameters) == request
    with Image.open(tmp_path / "a.png") as opened:
        lines = opened.text["parameters"].split("\n")
    assert lines[:2] == ["a (red:1.2) cat, süß <lora:soft:0.5>", "Negative prompt: blurry"]
    digest = hashlib.sha256(b"tensors").hexdigest()[:12]
    assert lora_hash(lora) == digest
    assert lines[2].startswith(
        "Steps: 7, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 11, Size: 64x32, Model: my model, "
        f'Lora hashes: "soft: {digest}", Version: EffiLoRA '
    )
    again, notes = parse_infotext("\n".join(lines))  # the guidance was left to the model, and is told nonetheless
    expected = {**facts.parameters, "prompt": lines[0], "guidance_scale": 7.5, "adapters": [], "model": "my model"}
    assert (again, notes) == (expected, [])


def test_images_of_earlier_versions_are_read_and_were_literal(tmp_path):
    old = {"prompt": "a (cat)", "negative_prompt": None, "seed": 3, "num_inference_steps": 2, "guidance_scale": 3.0,
           "width": 64, "height": 64, "model": "m", "adapters": []}  # fmt: skip
    assert read_parameters(png(tmp_path / "old.png", parameters=json.dumps(old))) == old
    assert GenerationRequest.from_parameters(old).literal
    assert not GenerationRequest.from_parameters({**old, "prompt": "a cat"}).literal  # the same in both ways


def test_a_literal_prompt_is_literal_in_a1111_s_text_too():
    words = r"a (cat:1.3) [or] {a|b} \ __x__ <lora:y:1>"
    text = infotext({"prompt": words, "literal": True, "seed": 1, "width": 8, "height": 8, "num_inference_steps": 1})
    assert plain(fragments(parse_infotext(text)[0]["prompt"])) == words


# ------------------------------------------------------------------------------------------------------------ A1111


def test_a_text_of_forge_is_taken_over_and_the_rest_is_told(tmp_path):
    facts = read_image(png(tmp_path / "f.png", parameters=FORGE))
    request = GenerationRequest.from_parameters(facts.parameters)
    assert request == GenerationRequest(
        "masterpiece, (red:1.4) cat\non a table <lora:detail tweaker:0.8>", "blurry, bad\nhands",
        [], 28, 6.5, 832, 1216, 1, 1234567890, "DPM++ 2M Karras",
    )  # fmt: skip
    assert facts.program == "A1111"
    assert facts.parameters["model"] == "sd_xl_base_1.0"
    (told,) = facts.notes
    assert told.endswith("Hires upscale 1.5, ADetailer prompt a, b: c, Clip skip 2")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("Sampler: DPM++ SDE Karras", "DPM++ SDE Karras"), ("Sampler: DPM++ 2M, Schedule type: Automatic", "DPM++ 2M Karras"),
        ("Sampler: Euler a, Schedule type: Automatic", "Euler a"), ("Sampler: Euler, Schedule type: Simple", "Euler"),
        ("Sampler: Restart", None), ("", None),
    ],
)  # fmt: skip
def test_samplers_of_a1111_have_our_names(written, found):
    facts, notes = parse_infotext(f"a\nSteps: 2, Seed: 1, {written}")
    assert facts["sampler"] == found
    assert bool(notes) == ("Restart" in written)


def test_distilled_guidance_and_what_is_missing_are_told(tmp_path):
    text = "a\nSteps: 2, CFG scale: 1, Distilled CFG Scale: 3.5, Size: x"
    facts = read_image(png(tmp_path / "a.png", parameters=text))
    request = GenerationRequest.from_parameters(facts.parameters)
    assert (request.guidance_scale, request.width, request.height, request.seed) == (3.5, 64, 48, 0)
    assert any("seed" in note for note in facts.notes)


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_comments_in_exif_are_read(tmp_path, kind, order):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + FORGE.replace("cat", "猫").encode(order)
    Image.new("RGB", (64, 48)).save(tmp_path / "a", kind, exif=exif)
    assert read_image(tmp_path / "a").parameters["prompt"].startswith("masterpiece, (red:1.4) 猫")


# ---------------------------------------------------------------------------------------------------------- ComfyUI


def test_a_graph_is_walked_from_its_sampler(tmp_path):
    facts = read_image(png(tmp_path / "c.png", prompt=json.dumps(graph()), workflow="{}"))
    assert (facts.program, facts.notes) == ("ComfyUI", [])
    assert GenerationRequest.from_parameters(facts.parameters) == GenerationRequest(
        r"a (red:1.2) cat \[sits\]", "blurry", [("soft", 0.6)], 20, 7.5, 768, 512, 1, 99, "Euler a"
    )
    assert facts.parameters["model"] == "base"


def test_a_second_pass_and_what_is_not_known_are_told(tmp_path):
    second = ("KSampler", {"seed": 5, "steps": 9, "latent_image": ["30", 0], "model": ["4", 0], "positive": ["6", 0],
                           "negative": ["7", 0], "sampler_name": "euler", "scheduler": "normal", "cfg": 2})  # fmt: skip
    control = ("ControlNetApplyAdvanced", {"positive": ["6", 0], "negative": ["7", 0], "strength": 1})
    nodes = graph(**{"2": second, "30": ("LatentUpscale", {"samples": ["3", 0], "width": 1536, "height": 1024}),
                     "31": control})  # fmt: skip
    nodes["3"]["inputs"] |= {"positive": ["31", 0], "negative": ["31", 1], "sampler_name": "ipndm"}
    facts = read_image(png(tmp_path / "c.png", prompt=json.dumps(nodes)))
    found = facts.parameters
    assert (found["seed"], found["num_inference_steps"], found["width"]) == (99, 20, 768)
    assert (found["prompt"], found["negative_prompt"]) == (r"a (red:1.2) cat \[sits\]", "blurry")
    said = " ".join(facts.notes)
    for word in ("ipndm", "ControlNet", "second pass"):
        assert word in said


def test_the_graph_of_a_distilled_model_is_read(tmp_path):
    nodes = {
        "1": ("SamplerCustomAdvanced", {"noise": ["2", 0], "guider": ["3", 0], "sampler": ["4", 0], "sigmas": ["5", 0],
                                        "latent_image": ["6", 0]}),
        "2": ("RandomNoise", {"noise_seed": 77}),
        "3": ("BasicGuider", {"model": ["9", 0], "conditioning": ["7", 0]}),
        "4": ("KSamplerSelect", {"sampler_name": "euler"}),
        "5": ("BasicScheduler", {"scheduler": "simple", "steps": 12, "denoise": 1, "model": ["9", 0]}),
        "6": ("EmptySD3LatentImage", {"width": 1024, "height": 768}),
        "7": ("FluxGuidance", {"guidance": 2.5, "conditioning": ["8", 0]}),
        "8": ("CLIPTextEncodeFlux", {"clip_l": "a dog", "t5xxl": "a dog", "guidance": 3}),
        "9": ("Power Lora Loader (rgthree)", {"model": ["10", 0],
                                              "lora_1": {"on": True, "lora": "x.safetensors", "strength": 0.3},
                                              "lora_2": {"on": False, "lora": "y.safetensors", "strength": 1}}),
        "10": ("UNETLoader", {"unet_name": "flux1-dev.safetensors"}),
    }  # fmt: skip
    text = json.dumps({name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()})
    facts = read_image(png(tmp_path / "c.png", prompt=text))
    assert GenerationRequest.from_parameters(facts.parameters) == GenerationRequest(
        "a dog", "", [("x", 0.3)], 12, 2.5, 1024, 768, 1, 77, "Euler"
    )


def test_a_lora_is_named_by_the_node_behind_its_input(tmp_path):
    nodes = {
        "1": ("KSampler", {"seed": 1, "model": ["2", 0]}),
        "2": ("LoraLoader", {"lora_name": ["3", 0], "strength_model": 0.5, "model": ["4", 0]}),
        "3": ("PrimitiveString", {"value": "pets/cat.safetensors"}),
        "4": ("LoraLoader", {"lora_name": ["9", 0], "strength_model": 1.0}),
    }
    text = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    facts = read_image(png(tmp_path / "a.png", prompt=json.dumps(text)))
    assert facts.parameters["adapters"] == [{"file": "cat", "strength": 0.5}]
    assert "the LoRA of LoraLoader, whose name is not said" in facts.notes


def test_a_workflow_alone_is_read_as_far_as_its_nodes_are_known(tmp_path):
    nodes = [
        {"id": 3, "type": "KSampler", "widgets_values": [5, "randomize", 30, 4, "dpmpp_2m", "karras", 1],
         "inputs": [{"name": "model", "link": 1}, {"name": "positive", "link": 2}, {"name": "latent_image", "link": 3}]},
        {"id": 4, "type": "CheckpointLoaderSimple", "widgets_values": ["m.safetensors"]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["a cat"]},
        {"id": 5, "type": "EmptyLatentImage", "widgets_values": [640, 384, 1]},
    ]  # fmt: skip
    links = [[1, 4, 0, 3, 0, "MODEL"], [2, 6, 0, 3, 1, "CONDITIONING"], [3, 5, 0, 3, 3, "LATENT"]]
    facts = read_image(png(tmp_path / "w.png", workflow=json.dumps({"nodes": nodes, "links": links})))
    assert GenerationRequest.from_parameters(facts.parameters) == GenerationRequest(
        "a cat", "", [], 30, 4.0, 640, 384, 1, 5, "DPM++ 2M Karras"
    )


# ---------------------------------------------------------------------------------------------------- hostile files

LOOP = json.dumps(graph(**{"41": ("Text", {"text": ["41", 0]}), "10": ("LoraLoader", {"model": ["10", 0]})}))
HOSTILE = {
    "nothing": {},
    "no settings": {"parameters": "a cat"},
    "too long": {"parameters": "a\n" * 200_000},
    "spaces": {"parameters": " " * 100_000 + "x\n" + " " * 90_000 + "x"},
    "deep": {"parameters": "[" * 90_000},
    "colons": {"parameters": "a:" * 90_000},
    "quotes": {"parameters": 'a: "\\' * 40_000},
    "damaged": {"effilora": "{"},
    "deep graph": {"prompt": "[" * 90_000},
    "no sampler": {"prompt": "{}"},
    "wrong links": {"workflow": '{"nodes": [{"id": 1, "type": "X"}], "links": 5}'},
    "wrong kinds": {
        "prompt": json.dumps({"1": {"class_type": "X", "inputs": 5}, "2": 3}),
        "workflow": '{"nodes": [5]}',
    },
}


@pytest.mark.parametrize("texts", HOSTILE.values(), ids=HOSTILE)
def test_what_says_nothing_is_refused_in_a_sentence(tmp_path, texts):
    with pytest.raises(EffiLoRAError) as caught:
        read_image(png(tmp_path / "a.png", **texts))
    assert str(caught.value).startswith("this image")


def test_programs_whose_json_is_not_read_are_named(tmp_path):
    for text, program in (
        ({"sui_image_params": {"prompt": "a"}}, "SwarmUI"),
        ({"prompt": "a", "base_model": "x", "steps": 30}, "Fooocus"),
    ):
        with pytest.raises(EffiLoRAError, match=f"are those of {program}, which are not read here"):
            read_image(png(tmp_path / "a.png", parameters=json.dumps(text)))


def test_graphs_that_go_in_circles_end(tmp_path):
    facts = read_image(png(tmp_path / "a.png", prompt=LOOP))
    assert facts.parameters["prompt"] == ""


def test_files_that_are_no_images_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    whole = png(tmp_path / "whole.png", parameters=FORGE).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:40])
    beyond = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\x7f\xff\xff\xff\0\0\0\0"
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.jpg", exif=beyond)
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.bmp")
    for name in ("text.png", "cut.png", "odd.jpg", "bare.bmp", "absent.png"):
        with pytest.raises(EffiLoRAError):
            read_image(tmp_path / name)


def test_letters_that_no_file_can_hold_are_replaced(tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": "a \ud800"}, "a \ud800")
    assert read_parameters(tmp_path / "a.png") == {"prompt": "a ?"}
