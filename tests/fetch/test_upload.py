"""Publishing: a conversion is uploaded to a fake Hub and downloaded again; and errors."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard, constants

from magistral_mlx.cli.app import cli
from magistral_mlx.disk import manifest
from magistral_mlx.errors import HubError
from magistral_mlx.fetch import hub
from tests import fake_hub
from tests.fake_hub import point_at

REPO = "someone/demo-4bit"


@pytest.fixture
def fake(no_hub, monkeypatch, tmp_path):
    with fake_hub.running({}) as running:
        point_at(running.url, monkeypatch)
        running.token = "hf_secret"
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr("time.sleep", lambda _: None)  # between its tries
        monkeypatch.chdir(tmp_path)
        yield running


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The demo model in 4 bit, as the command writes it."""
    out = tmp_path_factory.mktemp("converted") / "out"
    assert run("convert", "demo", "--out", out).exit_code == 0
    return out


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def contents(directory):
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and not file.is_relative_to(directory / ".cache")
    }


def test_a_conversion_is_uploaded_and_can_be_downloaded(fake, tmp_path):
    """One command; the Hub then has what was written, and a download of it works."""
    done = run("convert", "demo", "--out", "out", "--upload", REPO)
    assert done.exit_code == 0, done.stderr
    assert f"published: {fake.url}/{REPO}" in done.stdout
    assert fake.repos[REPO] == contents(tmp_path / "out")
    assert len(fake.commits) == 1
    assert fake.puts == [hashlib.sha256(Path("out/model.safetensors").read_bytes()).hexdigest()]
    assert set(fake.cards) == {Path("out/README.md").read_text()}
    found = hub.resolve(REPO, download=True)
    assert found.weights == found.tokenizer
    assert manifest.verify(found.weights) == []
    fetched = contents(found.weights)
    assert fetched == {name: data for name, data in fake.repos[REPO].items() if name != "README.md"}


def test_uploaded_files_are_not_sent_again(fake, converted):
    hub.upload(converted, REPO)
    hub.upload(converted, REPO)
    assert len(fake.puts) == 1
    assert fake.repos[REPO] == contents(converted)


def test_a_failed_upload_can_be_repeated_by_the_named_command(fake, converted):
    """The conversion is kept; the message's command to publish it works."""
    fake.put_status = [500] * 10
    with pytest.raises(HubError) as caught:
        hub.upload(converted, REPO)
    message = str(caught.value)
    assert message.startswith(f"{converted} is there, but cannot be published as '{REPO}': ")
    command = shlex.split(message.partition("Then: ")[2])
    assert fake.repos[REPO] == {}
    fake.put_status.clear()
    hf = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    env = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(converted.parent / "home")}
    subprocess.run(hf, env=env, check=True, capture_output=True)
    assert fake.repos[REPO] == contents(converted)


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, REPO, "nothing can be published as .*: nobody is logged in here"),
        ("hf_wrong", REPO, "nothing can be published as .*: the Hub does not allow it"),
        ("hf_secret", "demo-4bit", 'Expected a Hub name such as "you/'),
        ("hf_secret", f"{REPO}@main", 'Expected a Hub name such as "you/'),
    ],
)
def test_an_impossible_upload_is_refused_before_the_conversion(fake, monkeypatch, token, repo, message):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    done = run("convert", "demo", "--out", "out", "--upload", repo)
    assert done.exit_code == 1
    assert re.search(message, done.stderr), done.stderr
    assert not Path("out").exists()


def test_an_upload_without_a_network_is_refused(fake, monkeypatch):
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(HubError, match=r"nothing can be published as .*: the Hub was not reached"):
        hub.check_upload(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"nothing can be published as .*: HF_HUB_OFFLINE is set"):
        hub.check_upload(REPO)


def test_an_upload_to_another_owner_is_refused(fake, converted):
    with pytest.raises(
        HubError,
        match=r"cannot be published as .*: the Hub does not allow it .*Then: hf upload mistralai/demo-4bit",
    ):
        hub.upload(converted, "mistralai/demo-4bit")


# The model card -----------------------------------------------------------------------------------------


def test_the_cards_claims_are_true(converted):
    """Recipe and size; and huggingface_hub can read its metadata."""
    text = (converted / "README.md").read_text()
    recorded = manifest.read(converted)
    weights = sum(
        output["bytes"] for name, output in recorded["outputs"].items() if name.endswith(".safetensors")
    )
    parameters = json.loads((converted / "model.safetensors.index.json").read_text())["metadata"]
    bits = 8 * parameters["total_size"] / parameters["total_parameters"]
    assert f"- Size: {weights / 1e6:.1f} MB, {bits:.2f} bits per weight." in text
    assert f"- Conversion: {recorded['recipe']}, by magistral_mlx." in text
    head = ModelCard(text).data
    assert (head.license, head.library_name, head.pipeline_tag) == ("apache-2.0", "mlx", "text-generation")


def test_the_cards_python_runs(converted, capsys):
    [code] = re.findall(r"```python\n(.*?)```", (converted / "README.md").read_text(), re.DOTALL)
    exec(code.replace("path/to/this/directory", str(converted)), {})
    assert "85" in capsys.readouterr().out


@pytest.mark.slow
def test_the_cards_command_runs(converted):
    [code] = re.findall(r"```sh\n(.*?)```", (converted / "README.md").read_text(), re.DOTALL)
    code = code.replace("\\\n", " ").replace("path/to/this/directory", str(converted))
    [name, *arguments] = shlex.split(code)
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "85" in done.stdout
