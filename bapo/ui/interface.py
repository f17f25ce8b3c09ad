"""The page: composes the tabs, the theme and the queue. Nothing is computed here."""

import secrets
from html import escape
from pathlib import Path

import gradio as gr

from bapo.inference.engine import LocalEngine
from bapo.jobs.service import Jobs
from bapo.settings import HUGGING_FACE, Settings
from bapo.ui.adapters_tab import build_adapters_tab
from bapo.ui.api import build_api
from bapo.ui.compare_tab import build_compare_tab
from bapo.ui.train_tab import build_train_tab
from bapo.ui.visitors import STORAGE_KEY, Visitors

STYLE = Path(__file__).parent / "style.css"
# System fonts: the page asks no other server for anything.
THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
KEEP_SECONDS = 3600  # uploads and downloads that gradio has cached are deleted when they are older


def build_interface(engine: LocalEngine, jobs: Jobs) -> gr.Blocks:
    """The whole page over one engine and one queue of jobs."""
    with gr.Blocks(
        title="BAPO: keep the taste, stop the forgetting",
        analytics_enabled=False,
        delete_cache=(KEEP_SECONDS, KEEP_SECONDS),
    ) as page:
        visitors = Visitors(jobs)
        token = gr.BrowserState("", storage_key=STORAGE_KEY, secret=_browser_secret(jobs.settings))
        gr.HTML(
            "<header class='bapo-header'><h1>BAPO</h1><p>Fine-tune a model to a taste, and see what it forgets.</p>"
            f"<p class='bapo-faint'>base: {escape(engine.base_name)} · {engine.base.numerics}</p></header>"
        )
        if jobs.settings.sign_in == HUGGING_FACE:
            gr.LoginButton(min_width=200)
        with gr.Tabs(selected="compare") as tabs:
            with gr.Tab("Compare", id="compare") as compare_tab:
                compare = build_compare_tab(engine, visitors, token)
            with gr.Tab("Train", id="train"):
                train = build_train_tab(engine, jobs, visitors, token, tabs, compare)
            with gr.Tab("Adapters", id="adapters") as adapters_tab:
                adapters = build_adapters_tab(engine, jobs, visitors, token)
        build_api(engine, jobs, visitors)
        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        known = page.load(lambda value: value or visitors.new_token(), token, token, **quiet)

        def offered(value, request: gr.Request):
            return compare.offered(value, request)

        known.then(offered, token, compare.preference, **quiet)
        compare_tab.select(offered, token, compare.preference, **quiet)  # what has been trained since
        known.then(train.refresh, train.inputs, train.outputs, **quiet)
        adapters_tab.select(adapters.refresh, adapters.inputs, adapters.outputs, **quiet)
    return page.queue(max_size=64)


def launch(page: gr.Blocks, settings: Settings) -> None:
    """Serve the page until the process is stopped."""
    page.launch(
        server_name=settings.host,
        server_port=settings.port,
        theme=THEME,
        css_paths=STYLE,
        footer_links=["api", "gradio"],
        run_history=False,  # the browser would keep every prompt
        ssr_mode=False,
        max_file_size=settings.max_upload_mb * 2**20,
        auth=settings.users or None,
        mcp_server=True,
    )


def _browser_secret(settings: Settings) -> str:
    """What browsers' tokens are encrypted with in their storage; the same after a restart."""
    file = settings.data / "browser-secret"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.write_text(secrets.token_hex(8))
        file.chmod(0o600)
    return file.read_text()
