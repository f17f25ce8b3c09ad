"""The page: composes the tabs, the theme and the queue. Nothing is computed here."""

from html import escape
from pathlib import Path

import gradio as gr

from bapo.inference.engine import LocalEngine
from bapo.ui.compare_tab import build_compare_tab

STYLE = Path(__file__).parent / "style.css"
# System fonts: the page asks no other server for anything.
THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


def build_interface(engine: LocalEngine) -> gr.Blocks:
    """The whole page over one engine."""
    with gr.Blocks(title="BAPO: keep the taste, stop the forgetting", analytics_enabled=False) as page:
        gr.HTML(
            "<header class='bapo-header'><h1>BAPO</h1><p>Fine-tune a model to a taste, and see what it forgets.</p>"
            f"<p class='bapo-faint'>base: {escape(engine.base_name)} · {engine.base.numerics}</p></header>"
        )
        with gr.Tab("Compare"):
            build_compare_tab(engine, page)
    return page.queue(max_size=64)


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until the process is stopped."""
    page.launch(
        server_name=host,
        server_port=port,
        theme=THEME,
        css_paths=STYLE,
        footer_links=["gradio"],
        run_history=False,  # the browser would keep every prompt
        ssr_mode=False,
        max_file_size="1mb",  # nothing is uploaded here
    )
