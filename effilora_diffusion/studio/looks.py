"""How the page looks: its colours, light and dark, and what only style sheets and scripts can do."""

from __future__ import annotations

from typing import Any

import gradio as gr

STYLE = """
.gradio-container { width: 100% !important; max-width: 1480px !important; margin: 0 auto !important; }
#title h1 { font-size: 20px; letter-spacing: -.01em; margin: 0; }
#bar { align-items: center; gap: 8px 20px; }
#bar > #title { flex: 0 0 auto; width: auto; min-width: 0; }
#bar > #model { flex: 1 1 220px; max-width: 420px; }
#bar > #facts { flex: 2 1 260px; }
#facts .facts { display: flex; flex-wrap: wrap; gap: 2px 18px; font-variant-numeric: tabular-nums; font-size: 14px; }
#images .grid-container { align-items: center; }
#images .grid-wrap { max-height: none !important; overflow: visible; }
#images .thumbnail-lg, #images .gallery-item { aspect-ratio: auto !important; height: auto !important; }
#images .grid-wrap img { width: 100%; height: auto !important; max-height: 78vh; object-fit: contain; }
#images .preview { min-height: 60vh; }
#acting p, #other-adapters p { font-size: 14px; }
:is(#tokens, #other-adapters, #no-start, #model-status):not(:has(p)) { display: none; }
#slider { max-width: 460px; }
[id$="status"] p { font-variant-numeric: tabular-nums; }
.refused, .refused strong { color: var(--error-text-color); }
.refused {
  border-left: 4px solid var(--error-border-color); background: var(--error-background-fill); padding: 8px 12px;
  border-radius: 6px;
}
.subject-note { padding: 4px 12px; background: var(--block-background-fill); }
.trigger { align-self: center; padding-left: 4px; font-size: 14px; }
textarea[readonly], textarea:disabled { font-family: var(--font-mono); font-size: 13px; }
:is(button, input, textarea, select, a, summary, [role="tab"], [tabindex="0"]):focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 2px;
}
input[type="range"]:focus-visible { outline-offset: 6px; border-radius: 4px; }
@media (max-width: 640px) {
  #bar > #title { display: none; }
  #actions { position: sticky; bottom: 0; z-index: 20; padding: 6px 0; background: var(--body-background-fill); }
}
@media (max-width: 480px) {
  .tab-container button { padding: 6px 7px !important; font-size: 13px !important; }
}
"""

HEAD = """<style>
@media (max-width: 480px) { .gradio-container .app { padding: 10px !important; } }
.dark .tab-container button[aria-selected="true"] { color: var(--primary-300) !important; }
</style>
<script>
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  const shown = ["draw", "compare", "draw-heads"].map((id) => document.getElementById(id));
  const button = shown.find((found) => found && found.offsetParent !== null && !found.disabled);
  if (button) { event.preventDefault(); event.stopPropagation(); button.click(); }
}, true);
const below = { draw: "status", compare: "compare-status", "draw-grid": "compare-status",
  "draw-leakage": "compare-status", "draw-heads": "inspect-status" };
document.addEventListener("click", (event) => {
  const button = event.target.closest && event.target.closest("button");
  if (button && below[button.id] && window.innerWidth <= 640)
    document.getElementById(below[button.id]).scrollIntoView({ behavior: "smooth" });
});
const mend = () => {
  for (const found of document.querySelectorAll("div[aria-label]:not([role])")) found.setAttribute("role", "group");
  for (const found of document.querySelectorAll(':is([id$="status"], [id$="note"], #acting):not([aria-live])')) {
    found.setAttribute("role", "status");
    found.setAttribute("aria-live", "polite");
  }
  for (const found of document.querySelectorAll('[id$="status"] p, [id$="note"] p'))
    found.classList.toggle("refused", found.firstChild?.nodeName === "STRONG");
  for (const found of document.querySelectorAll('#images img[alt^="Seed"]')) found.alt = `Generated image, ${found.alt}`;
  const facts = document.querySelector("#facts .facts");
  if (facts && facts.dataset.title !== document.title) document.title = facts.dataset.title;
};
let waits = false;
new MutationObserver(() => {
  if (waits) return;
  waits = true;
  setTimeout(() => { waits = false; mend(); }, 100);
}).observe(document.documentElement, { childList: true, subtree: true });
const tabs = () => [...document.querySelectorAll('[role="tab"]')];
const named = (tab) => "#" + tab.textContent.trim().toLowerCase();
const open = () => {
  const tab = tabs().find((one) => named(one) === (location.hash || "#generate"));
  if (tab && tab.getAttribute("aria-selected") !== "true") tab.click();
  return tab;
};
document.addEventListener("click", (event) => {
  const tab = event.target.closest && event.target.closest('[role="tab"]');
  if (tab && event.isTrusted && named(tab) !== (location.hash || "#generate")) history.pushState(null, "", named(tab));
});
addEventListener("popstate", open);
const first = setInterval(() => { if (open()) clearInterval(first); }, 50);
</script>"""
"""What ``css`` of Gradio can't reach (the page's frame on phones, the dark mode), and what only scripts do:
Ctrl+Enter (or Cmd+Enter) presses the visible tab's main button; on phones the images are below the form, and a click on
the button goes there. Gradio labels plain ``div`` elements, which screen readers pass over unless they have a role, and reads
no change of a text out; images are named by their captions, which must not be read twice. What could not be done begins in
bold, and looks like it. The page's title says what runs. Every tab has an address: it opens there, and the browser's Back
goes to the tab before."""

PLAIN: dict[str, Any] = {
    "block_title_background_fill": "none",
    "block_title_padding": "0",
    "block_title_text_weight": "600",
    "block_title_text_color": "*neutral_700",
    "block_title_text_color_dark": "*neutral_200",
    "block_label_background_fill": "*background_fill_primary",
    "block_label_background_fill_dark": "*block_background_fill",
    "block_label_text_color": "*neutral_600",
    "block_label_text_color_dark": "*neutral_300",
    "block_label_border_width": "0",
    "block_label_shadow": "none",
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_400",
    "block_border_width": "1px",
    "block_border_color": "*neutral_200",
    "block_border_color_dark": "*neutral_800",
    "block_shadow": "none",
    "block_radius": "10px",
}
"""Blocks are told apart by a thin line; their titles are words, not buttons."""

COLOURS: dict[str, Any] = {
    "body_background_fill": "*neutral_50",
    "body_background_fill_dark": "*neutral_950",
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_400",
    "background_fill_primary": "white",
    "block_background_fill": "white",
    "block_background_fill_dark": "*neutral_900",
    "color_accent": "*primary_700",
    "slider_color": "*primary_700",
    "slider_color_dark": "*primary_500",
    "input_background_fill": "white",
    "input_background_fill_dark": "*neutral_950",
    "input_border_color": "*neutral_300",
    "input_border_color_dark": "*neutral_700",
    "error_background_fill": "#fef2f2",
    "error_background_fill_dark": "#450a0a",
    "error_border_color": "#b91c1c",
    "error_border_color_dark": "#f87171",
    "error_text_color": "#7f1d1d",
    "error_text_color_dark": "#fecaca",
    "input_border_width": "1px",
    "input_shadow": "none",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_600",
    "button_primary_text_color": "white",
    "button_secondary_background_fill": "white",
    "button_secondary_background_fill_hover": "*neutral_100",
    "button_secondary_background_fill_dark": "*neutral_800",
    "button_secondary_background_fill_hover_dark": "*neutral_700",
    "button_secondary_border_color": "*neutral_300",
    "button_secondary_border_color_dark": "*neutral_700",
    "button_border_width": "1px",
    "button_large_radius": "8px",
    "button_small_radius": "6px",
    "button_cancel_background_fill": "#b91c1c",
    "button_cancel_background_fill_hover": "#991b1b",
    "button_cancel_background_fill_dark": "#b91c1c",
    "button_cancel_background_fill_hover_dark": "#991b1b",
    "button_cancel_border_color": "#b91c1c",
    "button_cancel_border_color_dark": "#b91c1c",
    "button_cancel_text_color": "white",
    "button_cancel_text_color_dark": "white",
    "checkbox_label_background_fill_selected": "*primary_700",
    "checkbox_label_text_color_selected": "white",
    "checkbox_background_color_selected": "*primary_800",
}
"""A quiet grey around images, one colour for what is chosen; every pair is dark enough to be read (WCAG AA)."""


def theme() -> gr.Theme:
    """The page's theme, with fonts of the system."""
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    base = gr.themes.Base(primary_hue="teal", neutral_hue="zinc", radius_size="md", **fonts)
    return base.set(**PLAIN, **COLOURS)
