"""The Adapters tab: what there is, what it does, and its coming and going."""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from bapo.adapter_files import export_zip, import_adapter
from bapo.adapters import Adapter, AdapterStore
from bapo.errors import BapoError
from bapo.inference.engine import LocalEngine
from bapo.jobs.service import Jobs
from bapo.ui import texts, train_texts
from bapo.ui.visitors import Visitors

QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
UNDO_SECONDS = 3600  # how long a deleted adapter can be brought back
KEEP_SECONDS = 3600  # and how long a download stays


@dataclass(frozen=True, slots=True)
class AdaptersTab:
    """What the page needs of this tab."""

    refresh: Callable
    inputs: list
    outputs: list


def build_adapters_tab(engine: LocalEngine, jobs: Jobs, visitors: Visitors, token: gr.BrowserState) -> AdaptersTab:
    cards = gr.HTML(train_texts.adapter_cards(engine.store.adapters(), set()), elem_id="adapter-cards")
    deleted = gr.State("")
    message = gr.HTML(elem_id="adapters-message")
    with gr.Row(elem_classes="bapo-actions"):
        picker = gr.Dropdown([], label="Adapter", elem_id="adapter-picker", scale=2)
        new_name = gr.Textbox(label="New name", placeholder="my-taste", elem_id="new-name", scale=2)
        rename = gr.Button("Rename", min_width=90, elem_id="rename-adapter")
        delete = gr.Button("Delete", variant="stop", min_width=90, elem_id="delete-adapter")
        undo = gr.Button("Undo", visible=False, min_width=90, elem_id="undo-delete")
        publish = gr.Button(
            "Share with everyone here", min_width=160, visible=jobs.settings.publishing, elem_id="publish-adapter"
        )
        download = gr.DownloadButton("Download", min_width=110, elem_id="download-adapter")
    with gr.Accordion("Upload an adapter", open=False):
        gr.HTML(
            '<p class="bapo-faint">A zip with a LoRA adapter in PEFT\'s format for this very base: '
            "adapter_config.json and adapter_model.safetensors. Anything else is refused.</p>"
        )
        with gr.Row():
            file = gr.File(label="A zip", file_types=[".zip"], height=120, elem_id="adapter-file")
            upload_name = gr.Textbox(label="Name", placeholder="my-taste", elem_id="upload-name")
            upload_method = gr.Radio([("BAPO", "bapo"), ("DPO", "dpo")], value="bapo", label="Method")
            take = gr.Button("Take it in", min_width=110, elem_id="take-adapter")

    outputs = [cards, picker]

    def shown(store: AdapterStore) -> tuple:
        store.empty_bin(UNDO_SECONDS)
        found = store.adapters()
        own = {adapter.key for adapter in found if store.owns(adapter)}
        names = [adapter.folder.name for adapter in found]
        return train_texts.adapter_cards(found, own), gr.update(choices=names)

    def refresh(known, request: gr.Request):
        try:
            return shown(jobs.adapters_of(visitors.owner(known, request)))
        except BapoError:
            return gr.skip(), gr.skip()

    def act(known, request: gr.Request, what: Callable[[AdapterStore], str], undoable: str = ""):
        """One change and what is there afterwards: (message, cards, picker)."""
        try:
            store = jobs.adapters_of(visitors.owner(known, request))
            told = what(store)
            return texts.notice(told), *shown(store)
        except BapoError as error:
            return texts.notice(str(error), "alert"), gr.skip(), gr.skip()

    def on_rename(known, name, new, request: gr.Request):
        def change(store: AdapterStore) -> str:
            return f"{store.rename(store.named(name or ''), (new or '').strip()).name} is its name now."

        return act(known, request, change)

    def on_delete(known, name, request: gr.Request):
        held = ""

        def change(store: AdapterStore) -> str:
            nonlocal held
            held = store.remove(store.named(name or ""))
            return f"{name} is deleted."

        told = act(known, request, change)
        return *told, held, gr.update(visible=bool(held))

    def on_undo(known, held, request: gr.Request):
        told = act(known, request, lambda store: f"{store.restore(held).name} is back.")
        return *told, gr.update(visible=False)

    def on_publish(known, name, request: gr.Request):
        def change(store: AdapterStore) -> str:
            if not jobs.settings.publishing:
                raise BapoError("Only the operator shares adapters here.")
            return f"{store.publish(store.named(name or ''), jobs.shared).name} can be used by everyone here."

        return act(known, request, change)

    def on_download(known, name, request: gr.Request):
        try:
            adapter = jobs.adapters_of(visitors.owner(known, request)).named(name or "")
        except BapoError:
            return None
        return str(_exported(adapter))

    def on_upload(known, path, name, method, request: gr.Request):
        def change(store: AdapterStore) -> str:
            if not path:
                raise BapoError("Choose a zip first.")
            try:
                return (
                    f"{import_adapter(Path(path), store, engine.base.folder, (name or '').strip(), method).name} is in."
                )
            finally:
                Path(path).unlink(missing_ok=True)

        return act(known, request, change)

    changed = [message, *outputs]
    rename.click(on_rename, [token, picker, new_name], changed, **QUIET)
    delete.click(on_delete, [token, picker], [*changed, deleted, undo], **QUIET)
    undo.click(on_undo, [token, deleted], [*changed, undo], **QUIET)
    publish.click(on_publish, [token, picker], changed, **QUIET)
    picker.change(on_download, [token, picker], download, **QUIET)
    take.click(on_upload, [token, file, upload_name, upload_method], changed, api_visibility="private")
    return AdaptersTab(refresh, [token], outputs)


def _exported(adapter: Adapter) -> Path:
    """A fresh zip of an adapter where gradio may serve it from; those of an hour ago are removed."""
    downloads = Path(tempfile.gettempdir()) / f"bapo-downloads-{os.getuid()}"
    downloads.mkdir(mode=0o700, exist_ok=True)
    for former in downloads.iterdir():
        if time.time() - former.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(former, ignore_errors=True)
    # Whoever knows the address of a file can fetch it: nobody can guess this one.
    folder = downloads / secrets.token_hex(16)
    folder.mkdir()
    export_zip(adapter, folder / f"{adapter.name}.zip")
    return folder / f"{adapter.name}.zip"
