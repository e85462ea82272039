"""A converted directory in mlx-lm: load, prompt, stream, server; with and without mistral_common installed.

The model is small and random, the vocabulary is the real one. What is in the files beside the weights is
tested in `test_sidecars`; here mlx-lm as a whole reads the output of a whole conversion.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer

from magistral_mlx import Magistral, Sampling
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.convert.recipe import named
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.disk.manifest import verify
from magistral_mlx.text import sidecars
from tests import models
from tests.tokenizers import full_tekken

NAME = "mistralai/Magistral-Small-2506"
TEXT = "🙂 naïve ∑x² — 48 더하기 37은 얼마인가요? 꿟뛝뷁 👩‍👩‍👧‍👦\n</think>\n\\boxed{85}。</s"
CHATS = (
    [{"role": "user", "content": "What is 48 + 37?"}],
    [
        {"role": "user", "content": "48 더하기 37은?"},
        {"role": "assistant", "content": "85 🙂"},
        {"role": "user", "content": "Sûr ?\n"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "∑x²?"}],
)
# Uses mlx-lm only: prints the prompts' ids, and the pieces of a stream whose logits are forced to given ids.
MLX_LM_SCRIPT = """
import json, sys

class Blocking:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)

directory, chats, ids, blocked = sys.argv[1], *map(json.loads, sys.argv[2:])
sys.meta_path[:] = map(Blocking, sys.meta_path)

import mlx.core as mx
import mlx_lm

model, tokenizer = mlx_lm.load(directory)
prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
left = iter(ids)

def force(_, logits):
    return mx.where(mx.arange(logits.shape[-1]) == next(left, tokenizer.eos_token_id), 0.0, -1e9)[None]

stream = mlx_lm.stream_generate(model, tokenizer, prompts[0], max_tokens=999, logits_processors=[force])
pieces = [(reply.token, reply.text, reply.finish_reason) for reply in stream]
loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(blocked))
print(json.dumps({"prompts": prompts, "pieces": pieces, "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Converted to four bits, in float32: what a CPU computes well."""
    source = models.write_native(tmp_path_factory.mktemp("source"), models.wide_vocab())
    full_tekken(source, "v11")
    out = tmp_path_factory.mktemp("converted") / "out"
    files = sidecars.files(source, name=NAME, recipe="4bit", context=4096)
    convert(Job(checkpoint=open_checkpoint(source), out=out, recipe=named("4bit"), sidecars=files))
    return out


@pytest.fixture(scope="module")
def magistral(directory):
    with Magistral.load(directory, dtype="float32") as model:
        yield model


def test_directory_is_complete_and_verified(directory):
    assert verify(directory) == []
    root = {file.name for file in directory.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "mistral"} <= root
    assert "tekken.json" not in root


@pytest.mark.parametrize("blocked", [[], ["mistral_common", "magistral_mlx"]], ids=str)
def test_mlx_lm_prompts_and_streams_equal_ours(directory, magistral, tmp_path, blocked):
    ids = magistral.tokenizer.encode(TEXT)
    arguments = [json.dumps(argument) for argument in (CHATS, ids, blocked)]
    command = [sys.executable, "-c", MLX_LM_SCRIPT, str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] == []
    assert found["prompts"] == [
        magistral.tokenizer.encode_chat(chat, think=chat[0]["role"] != "system") for chat in CHATS
    ]
    assert found["prompts"][0] == magistral.encode(CHATS[0]) == magistral.encode("What is 48 + 37?")
    assert [token for token, _, _ in found["pieces"]] == [*ids, 2]
    pieces = [text for _, text, _ in found["pieces"]]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(TEXT.split())  # streamed, not all at the end
    assert found["pieces"][-1][2] == "stop"


def test_greedy_reply_equals_mlx_lms(directory, magistral):
    """Greedy, 24 ids, over the real vocabulary: the same ids from both."""
    model, tokenizer = mlx_lm.load(directory)
    prompt = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True)
    theirs = [reply.token for reply in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=24)]
    ours = magistral.ask(CHATS[0], sampling=Sampling(temperature=0), max_tokens=24).token_ids
    assert list(ours) == theirs
    assert len(theirs) == 24


def test_logits_equal_mlx_lms(directory, magistral):
    prompt = magistral.encode(CHATS[0])[-40:]
    model, _ = mlx_lm.load(directory)
    theirs = np.array(model(mx.array([prompt]))[0, -1])
    mine = load(open_checkpoint(directory), mx.float32)
    ours = np.array(mine.logits(mine(mx.array([prompt]), mine.new_caches())[:, -1]))[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max())


@contextmanager
def mlx_lm_server(directory, log):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(directory), "--port", str(port)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            for _ in range(120):
                with socket.socket() as client:
                    if not client.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            process.kill()


def post(url, **body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=100) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_mlx_lms_server_replies_as_we_do(directory, magistral, tmp_path):
    """It counts the prompt's ids as we do, and its stream adds up to its reply."""
    body = {"model": str(directory), "messages": CHATS[1], "temperature": 0.0, "max_tokens": 16}
    with mlx_lm_server(directory, tmp_path / "log") as url:
        whole = json.loads(post(url, **body))
        streamed = post(url, stream=True, **body)
    assert whole["usage"]["prompt_tokens"] == len(magistral.encode(CHATS[1]))
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    ours = magistral.ask(CHATS[1], sampling=Sampling(temperature=0), max_tokens=16)
    decoder = load_tokenizer(directory)  # a random model samples some; our text leaves them out
    assert "".join(pieces).strip() == decoder.decode(list(ours.token_ids)).strip()
