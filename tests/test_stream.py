"""Drawing with a view: the same images as without, honest counters, and a stop that leaves the next drawing clean."""

import threading

import numpy as np
import pytest
from tiny_families import FAMILIES, build, sampling

from effilora_diffusion.core.load import host_model
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.sampling.stream import _WORKERS, Stop, draw_live, settle

PROMPT = "a red cat"


def options(name, steps=4):
    size = {"width": 64, "height": 64, "steps": steps, "guidance_scale": 3.0}
    return size | {key: value for key, value in sampling(name).items() if key == "max_sequence_length"}


def array(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_those_drawn_without_a_view(name):
    pipe = build(name)
    expected = draw_images(pipe, [PROMPT, PROMPT], [3, 4], batch_size=1, **options(name))
    seen = list(draw_live(pipe, PROMPT, [3, 4], preview_every=2, **options(name)))
    images = [progress for progress in seen if progress.image is not None]
    assert [progress.seed for progress in images] == [3, 4]
    assert [progress.index for progress in images] == [0, 1]
    for progress, image in zip(images, expected, strict=True):
        assert np.array_equal(array(progress.image), array(image))


def test_steps_are_counted_and_previews_become_the_image():
    pipe = build("sd15")
    seen = list(draw_live(pipe, PROMPT, [0], preview_every=1, **options("sd15", 6)))
    assert [(progress.step, progress.steps) for progress in seen[:-1]] == [(step, 6) for step in range(1, 7)]
    assert all(progress.seconds >= 0 for progress in seen[:-1])
    assert seen[5].seconds == 0
    distances = [np.abs(array(p.preview) - array(seen[-1].image)).mean() for p in seen[:5]]
    assert distances[-1] < distances[0]


@pytest.mark.parametrize("name", ["sd15", "flux", "z-image"])
def test_a_stop_ends_within_a_step_and_the_next_drawing_is_clean(name):
    pipe = build(name)
    expected = draw_images(pipe, [PROMPT], [3], **options(name, 30))[0]
    stop, steps = Stop(), []
    allowed = threading.Semaphore(2)
    slow = host_model(pipe).register_forward_pre_hook(lambda module, args: allowed.acquire(timeout=600) and None)
    for progress in draw_live(pipe, PROMPT, [3, 4, 5], stop, **options(name, 30)):
        steps.append(progress.step)
        assert progress.image is None
        if len(steps) == 2:
            stop.set()
            allowed.release(100)
    assert len(steps) <= 3
    slow.remove()
    found = [p.image for p in draw_live(pipe, PROMPT, [3], **options(name, 30)) if p.image is not None]
    assert np.array_equal(array(found[0]), array(expected))


def test_leaving_the_loop_stops_the_pipeline():
    pipe = build("sd15")
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    drawing = draw_live(pipe, PROMPT, [3], **options("sd15", 50))
    next(drawing)
    drawing.close()
    settle(pipe)
    assert not _WORKERS[pipe].is_alive()
    assert len(calls) < 50


def test_a_mistake_in_the_pipeline_reaches_the_caller():
    pipe = build("sd15")
    pipe.unet.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        list(draw_live(pipe, PROMPT, [3], **options("sd15")))
