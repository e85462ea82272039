"""The example notebook, and interrupting one, in a real kernel."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

from magistral_mlx import AnswerToken, Finished, Stats, ThinkToken
from magistral_mlx.talk.notebook import _View

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def test_the_example_runs_and_shows_its_streams():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    folded = [html for data in shown if "<details>" in (html := data.get("text/html", ""))]
    assert len(folded) >= 3
    assert all(re.search(r"Thought for (\d+ s|a moment) · [\d,]+ tokens", html) for html in folded)
    assert sum("text/markdown" in data and "**" in data["text/markdown"] for data in shown) >= 3
    assert not any("<think>" in str(data) for data in shown)


@pytest.fixture
def kernel() -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def reply_to(client: BlockingKernelClient, message_id: str) -> dict[str, Any]:
    while (reply := client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != message_id:
        pass
    return reply["content"]


def test_reply_and_model_remain_usable_after_an_interrupt(kernel: tuple[KernelManager, BlockingKernelClient]):
    manager, client = kernel
    setup = "from magistral_mlx import Magistral, Sampling; model = Magistral.load('demo')"
    assert reply_to(client, client.execute(setup))["status"] == "ok"
    noise = "sampling=Sampling(temperature=9, top_p=1), seed=4"  # a seed with a long reply
    endless = f"stream = model.stream('hm', {noise}, think=False); stream"
    message_id = client.execute(endless, stop_on_error=False)
    while client.get_iopub_msg(timeout=60)["msg_type"] != "update_display_data":
        pass
    time.sleep(0.3)
    manager.interrupt_kernel()
    reply_to(client, message_id)
    check = """
assert stream.reply.finish_reason == "cancelled" and stream.reply.token_ids
assert model.ask("What is 2 + 3?", max_tokens=3).token_ids
"""
    assert reply_to(client, client.execute(check))["status"] == "ok"


def test_the_block_is_open_while_thinking_and_folds_for_the_answer():
    view = _View()
    assert view.thinking() == "<i>thinking …</i>"
    view.take(ThinkToken(text="a < b", token_ids=(5, 6)))
    assert view.thinking().startswith("<details open><summary>Thinking …")
    assert "a &lt; b" in view.thinking()
    view.take(AnswerToken(text="yes", token_ids=(7,)))
    assert view.thinking().startswith("<details><summary>Thought for a moment · 2 tokens")
    view.take(Finished(reason="stop", stats=Stats(thinking_tokens=1234, thinking_seconds=41.2)))
    assert "Thought for 41 s · 1,234 tokens" in view.thinking()


def test_an_answer_without_thinking_has_no_block():
    view = _View()
    view.take(AnswerToken(text="yes"))
    assert (view.thinking(), view.answer) == ("", "yes")
