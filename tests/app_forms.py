"""Tabs of the web UI without a browser, and the values of their forms."""

import gradio as gr
from PIL import Image

from effilora_diffusion.studio.train_form import component_of, shown_fields, usual_settings


def built(kind, session):
    with gr.Blocks():
        tab = kind(session)
        tab.build()
    return tab


def by_hand(session, **changes):
    """The advanced section as it is shown, with some fields changed."""
    usual = usual_settings(session)
    with gr.Blocks():
        return [changes.get(entry.name, component_of(entry, usual[entry.name]).value) for entry in shown_fields()]


def image_size(path):
    with Image.open(path) as opened:
        return opened.size
