"""Text encoders that are trained: in every family that has CLIP, through files, exports, resumption and removal."""

import json
import shutil

import pytest
import torch
from helpers import make_subject, metrics, same_content, settings, trainer
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import build

from effilora_diffusion import (
    EffiLoRAConfig,
    attach,
    create_adapter,
    detach,
    export_lora,
    load_adapter,
    merge,
    remove_adapter,
    save_adapter,
    unmerge,
)
from effilora_diffusion.core import AdapterFile, EffiLoRAError, load_adapter_file, save_adapter_file
from effilora_diffusion.core.attachment import adapters_of
from effilora_diffusion.diffusion.adapters.active_adapters import ActiveAdapters, AdapterRef
from effilora_diffusion.diffusion.adapters.encoders import add_encoders
from effilora_diffusion.diffusion.training.loss import batch_loss
from effilora_diffusion.diffusion.training.text import Remembering

PROMPT = "a photo of sks cat"
ENCODERS = {
    "sd15": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "sd3": ["text_encoder", "text_encoder_2"],
    "flux": ["text_encoder"],
}
RUN = {
    "resolution": 64,
    "instance_prompt": PROMPT,
    "train_text_encoder": True,
    "text_encoder_lr": 2e-3,
    "heads": 1,
    "routing": "static",
    "checkpointing_steps": 1,
    "num_validation_images": 0,
}


def states(pipe, prompt=PROMPT):
    """What the denoiser reads of a prompt."""
    known = pipe.encode_prompt.__code__.co_varnames
    given = {"prompt": prompt, "prompt_2": prompt, "prompt_3": prompt, "device": "cpu", "num_images_per_prompt": 1}
    given["do_classifier_free_guidance"] = False
    with torch.no_grad():
        found = pipe.encode_prompt(**{name: value for name, value in given.items() if name in known})
    return [value for value in found if value is not None and value.numel() and value.any()]


def same(one, other):
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def image(pipe):
    start = torch.Generator().manual_seed(1)
    return pipe(PROMPT, height=64, width=64, num_inference_steps=2, output_type="latent", generator=start).images[0]


def trained_adapter(pipe, folder, heads=1):
    """The file of an adapter on the denoiser and the text encoders of ``pipe`` that changes both."""
    adapter = create_adapter(pipe, EffiLoRAConfig(heads=heads))
    add_encoders(adapter, pipe, 0, "gaussian")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapter.named_parameters():
        if "B." in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    save_adapter(adapter, folder / "a.safetensors", pipe)
    return folder / "a.safetensors"


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 2, size=(64, 64))


@pytest.fixture(scope="module", params=ENCODERS)
def run(request, subject, tmp_path_factory):
    """A family's pipeline and the folder of a run of two steps."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(folder / "model")
    prior = {"with_prior_preservation": True, "class_prompt": ["a cat"]}
    one = trainer(folder / "model", subject, folder / "out", **RUN, **prior)
    one.run()
    again = trainer(
        folder / "model", subject, shutil.copytree(folder / "out", folder / "again"), **RUN, **prior,
        resume_from_checkpoint="checkpoint-1",
    )  # fmt: skip
    again.run()
    return request.param, folder


def test_a_run_trains_the_encoders_and_resumes_exactly(run):
    family, folder = run
    content = load_adapter_file(folder / "out" / "effilora.safetensors")
    assert list(content.adapter.encoders) == ENCODERS[family]
    assert all(any(heads.any() for heads in part.B) for part in content.adapter.encoders.values())
    assert all(part.config.heads == 1 for part in content.adapter.encoders.values())
    assert metrics(folder / "again") == metrics(folder / "out")
    assert same_content(folder / "again" / "effilora.safetensors", folder / "out" / "effilora.safetensors")


def test_the_folder_loads_here_and_in_stock_diffusers_alike(run):
    family, folder = run
    pipe, stock = build(family), build(family)
    before = states(pipe)
    adapter = load_adapter(pipe, folder / "out")
    own = states(pipe)
    assert not any(torch.equal(*pair) for pair in zip(before, own, strict=True) if family != "flux")
    stock.load_lora_weights(str(folder / "out"))
    assert [part for part in stock.get_list_adapters() if part.startswith("text")] == ENCODERS[family]
    torch.testing.assert_close(states(stock), own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image(stock), image(pipe), rtol=1e-3, atol=1e-3)
    assert (image(build(family)) - image(pipe)).abs().max() > 1e-2
    adapter.strength = 0.5
    half = states(pipe)
    assert not same(half, own)
    assert not same(half, before)
    adapter.strength = 0
    assert same(states(pipe), before)
    adapter.strength = 1
    with adapter.disabled():
        assert same(states(pipe), before)
    assert same(states(pipe), own)
    remove_adapter(pipe, adapter)
    assert same(states(pipe), before)
    assert not any("effilora" in name for part in ENCODERS[family] for name in getattr(pipe, part).state_dict())


def test_kohya_s_file_has_its_names_and_loads(run):
    family, folder = run
    file = folder / "out" / "pytorch_lora_weights_kohya.safetensors"
    if not file.exists():
        assert family in ("sd3", "flux")  # other programs read the diffusers format there
        return
    prefixes = {name.split("text_model")[0] for name in load_file(file) if name.startswith("lora_te")}
    assert prefixes == ({"lora_te_"} if family == "sd15" else {"lora_te1_", "lora_te2_"})
    pipe, stock = build(family), build(family)
    load_adapter(pipe, folder / "out")
    stock.load_lora_weights(str(file))
    torch.testing.assert_close(states(stock), states(pipe), rtol=1e-5, atol=1e-5)


def test_encoders_merge_and_are_exported_merged(tmp_path):
    pipe = build("sdxl")
    pipe.save_pretrained(tmp_path / "model")
    file, before = trained_adapter(pipe, tmp_path), states(pipe)
    load_adapter(pipe, file, name="cat")
    own = states(pipe)
    merge(pipe, "cat")
    torch.testing.assert_close(states(pipe), own, rtol=1e-3, atol=1e-4)
    assert adapters_of(pipe.text_encoder_2)["cat"].merged
    unmerge(pipe, "cat")
    assert same(states(pipe), own)
    detach(pipe)
    assert same(states(pipe), before)
    export_lora(file, tmp_path / "merged", format="merged", model=str(tmp_path / "model"))
    merged = type(pipe).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(states(merged), own, rtol=1e-3, atol=1e-4)
    with pytest.raises(EffiLoRAError, match="PEFT folder holds one model"):
        export_lora(file, tmp_path / "peft", format="peft")


def test_a_merge_that_fails_at_an_encoder_leaves_what_was_merged_before(tmp_path):
    pipe = build("sd15")
    load_adapter(pipe, trained_adapter(pipe, tmp_path), name="cat")
    merge(pipe.unet, "cat")
    with torch.no_grad():
        next(iter(adapters_of(pipe.text_encoder)["cat"].B)).fill_(float("inf"))
    with pytest.raises(EffiLoRAError, match="infinite or NaN"):
        merge(pipe, "cat")
    assert adapters_of(pipe.unet)["cat"].merged
    assert not adapters_of(pipe.text_encoder)["cat"].merged


def test_the_active_adapters_of_a_pipeline_take_the_encoders_along(tmp_path):
    pipe = build("sd15")
    before, active = states(pipe), ActiveAdapters(pipe)
    file = trained_adapter(pipe, tmp_path, heads=2)
    active.use([AdapterRef(file, 0.7)])
    found = states(pipe)
    assert not same(found, before)
    active.use([AdapterRef(file, 0.7, head=1)])
    assert same(states(pipe), found)  # the encoder's part has no heads to choose from
    active.use([])
    assert same(states(pipe), before)


def test_a_model_alone_cannot_take_an_adapter_of_encoders(tmp_path):
    pipe = build("sd15")
    file = trained_adapter(pipe, tmp_path)
    with pytest.raises(EffiLoRAError, match="also acts on text_encoder, which a UNet2DConditionModel does not have"):
        load_adapter(pipe.unet, file)
    pipe.text_encoder = build("sdxl").text_encoder  # narrower
    with pytest.raises(EffiLoRAError, match="made for another base model"):
        load_adapter(pipe, file)
    assert not adapters_of(pipe.unet)


def test_a_file_that_claims_other_parts_is_refused(tmp_path):
    file = trained_adapter(build("sd15"), tmp_path)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["effilora"])
    assert list(header["encoders"]) == ["text_encoder"]
    assert any(name.startswith("text_encoder/") for name in tensors)
    content = load_adapter_file(file)
    content.adapter.encoders["vae"] = content.adapter.encoders.pop("text_encoder")
    save_adapter_file(tmp_path / "b.safetensors", content)
    with pytest.raises(EffiLoRAError, match="parts that no pipeline has"):
        load_adapter_file(tmp_path / "b.safetensors")


@pytest.mark.parametrize("family", ["pixart-sigma", "chroma", "hunyuandit"])
def test_families_without_clip_are_refused_before_their_weights_are_read(family, subject, tmp_path):
    build(family).save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(EffiLoRAError, match=r"text encoders of .* can't be trained: leave --train_text_encoder and"):
        trainer(tmp_path / "model", subject, tmp_path / "out", **RUN)


def test_concept_routing_is_refused(subject, tmp_path):
    with pytest.raises(EffiLoRAError, match="leave one of them out"):
        settings("model", subject, tmp_path, **{**RUN, "routing": "concept"})


@pytest.mark.parametrize("changes", [{}, {"text_encoder_lr": None}], ids=["own rate", "learning rate"])
def test_encoders_have_their_own_rate_and_decay(tiny_pipeline, subject, tmp_path, changes):
    given = {**RUN, "resolution": 32, "max_train_steps": 1, "learning_rate": 5e-4, "adam_weight_decay": 0.0, **changes}
    one = trainer(tiny_pipeline, subject, tmp_path / "out", **given, adam_weight_decay_text_encoder=100.0)
    start = next(one.adapter.encoders["text_encoder"].A.values().__iter__()).detach().clone()
    one.run()
    part, rate = one.adapter.encoders["text_encoder"], given["text_encoder_lr"] or 5e-4
    assert float(max(heads.detach().abs().max() for heads in part.B)) == pytest.approx(rate, rel=1e-2)
    assert float(max(heads.detach().abs().max() for heads in one.adapter.B)) == pytest.approx(5e-4, rel=1e-2)
    (moved,) = part.A.values()
    torch.testing.assert_close(moved.detach(), start * (1 - 100 * rate))  # heads are zero: A has decay alone


def test_encoders_are_frozen_after_their_share_of_the_steps(tiny_pipeline, subject, tmp_path):
    given = {**RUN, "resolution": 32, "max_train_steps": 4}
    half = trainer(tiny_pipeline, subject, tmp_path / "half", **given, train_text_encoder_frac=0.5)
    half.run()
    parts = [
        load_adapter_file(tmp_path / "half" / f"checkpoint-{step}" / "adapter.safetensors").adapter for step in (2, 4)
    ]
    for one, other in zip(*(part.encoders.parameters() for part in parts), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(parts[0].B[0], parts[1].B[0])
    out = shutil.copytree(tmp_path / "half", tmp_path / "again")
    trainer(
        tiny_pipeline, subject, out, **given, train_text_encoder_frac=0.5, resume_from_checkpoint="checkpoint-3"
    ).run()
    assert same_content(out / "effilora.safetensors", tmp_path / "half" / "effilora.safetensors")
    with pytest.raises(EffiLoRAError, match=r"train_text_encoder_frac was 0\.5 and is 1\.0"):
        trainer(tiny_pipeline, subject, out, **given, resume_from_checkpoint="checkpoint-3").run()
    longer = {**given, "max_train_steps": 8, "train_text_encoder_frac": 0.5}  # its encoders would be trained in step 3
    with pytest.raises(EffiLoRAError, match="max_train_steps was 4 and is 8"):
        trainer(tiny_pipeline, subject, out, **longer, resume_from_checkpoint="checkpoint-3").run()


def test_the_class_is_held_to_what_the_base_predicts_for_its_own_text_states(tiny_pipeline, subject, tmp_path):
    given = {**RUN, "resolution": 32, "with_prior_preservation": True, "class_prompt": ["a cat"], "prior_interval": 1}
    one = trainer(tiny_pipeline, subject, tmp_path / "out", **given)
    batch = one._batch(0, 0)
    for heads in one.adapter.encoders["text_encoder"].B:
        heads.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    live = one.text.encoded(batch)
    name = "encoder_hidden_states"
    with one.adapter.disabled():
        assert torch.equal(live.frozen[name][0], one.family.encode_prompt("a cat")[name])
    assert torch.equal(live.conditions[name][1], one.family.encode_prompt("a cat")[name])
    assert not torch.equal(live.conditions[name][1], live.frozen[name][0])
    prior, noisy = one.parts.prior, one.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        loss = batch_loss(one.family, one.objective, live, torch.device("cpu"), prior, one.adapter.disabled)
        found = one.family.predict(noisy, batch.timesteps, live.conditions)
        with one.adapter.disabled():
            wanted = one.family.predict(noisy, batch.timesteps, batch.conditions)[1]
    own = one.objective.target(batch.latents, batch.noise, batch.timesteps)[0]
    expected = (found[0] - own).square().mean() + prior.factor(1, 1) * (found[1] - wanted).square().mean()
    torch.testing.assert_close(loss, expected)
    one.folder.release()


def test_a_frozen_t5_reads_a_prompt_once(subject, tmp_path):
    build("sd3").save_pretrained(tmp_path / "model")
    one = trainer(tmp_path / "model", subject, tmp_path / "out", **{**RUN, "max_train_steps": 3})
    calls = []
    one.family.pipe.text_encoder_3.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    one.run()
    assert len(calls) == 1  # the prompt of everything else; that of the images was read when it was cached
    assert "forward" not in vars(one.family.pipe.text_encoder_3)


def test_what_a_frozen_encoder_keeps_is_limited():
    encoder = build("sd3").text_encoder_3
    plain, prompts = encoder.forward, torch.arange(12).reshape(4, 1, 3) + 5
    states = [plain(prompt)[0] for prompt in prompts]
    remembering = Remembering(encoder, limit=2 * states[0].nbytes)
    for order in (0, 1, 2, 0, 3, 1):
        torch.testing.assert_close(remembering(prompts[order]).last_hidden_state, states[order])
        assert remembering.size == sum(one.nbytes for one in remembering.known.values()) <= remembering.limit
    assert len(remembering.known) == 2


def test_a_run_goes_on_with_the_encoders_of_an_adapter(tiny_pipeline, subject, tmp_path):
    given = {**RUN, "resolution": 32}
    trainer(tiny_pipeline, subject, tmp_path / "first", **given).run()
    first = load_adapter_file(tmp_path / "first" / "effilora.safetensors").adapter.encoders
    new = trainer(tiny_pipeline, subject, tmp_path / "second", **given, init_from=str(tmp_path / "first"))
    for one, other in zip(first.parameters(), new.adapter.encoders.parameters(), strict=True):
        assert torch.equal(one, other)
    new.run()
    assert not torch.equal(first["text_encoder"].B[0], new.adapter.encoders["text_encoder"].B[0])
    given["train_text_encoder"] = False
    with pytest.raises(EffiLoRAError, match="also acts on text_encoder: give --train_text_encoder"):
        trainer(tiny_pipeline, subject, tmp_path / "third", **given, init_from=str(tmp_path / "first"))


def test_an_adapter_that_is_made_by_hand_is_attached_with_its_encoders(tmp_path):
    pipe = build("sd15")
    before = states(pipe)
    adapter = create_adapter(pipe, EffiLoRAConfig(heads=2))
    add_encoders(adapter, pipe, 0, "kaiming")
    attach(pipe, adapter)
    states(pipe)  # no gradient is asked for
    assert adapters_of(pipe.text_encoder)["default"] is adapter.encoders["text_encoder"]
    content = AdapterFile(adapter)
    save_adapter_file(tmp_path / "a.safetensors", content, torch.float16)
    assert list(load_adapter_file(tmp_path / "a.safetensors").adapter.encoders) == ["text_encoder"]
    detach(pipe, "default")
    assert same(states(pipe), before)
