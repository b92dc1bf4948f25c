import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from dsv2_local.errors import InputError
from dsv2_local.quant.hub import is_repository, resolve
from tests.hub_server import Hub, serving

WEIGHTS = os.urandom(24_000_000)  # several of the 10 MB pieces that huggingface_hub writes, so that some can be resumed
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "training.bin": b"not wanted"}
CODE = """
import json, sys
from dsv2_local.errors import HubError
from dsv2_local.quant.hub import fetch
try:
    path = fetch(sys.argv[1], **json.loads(sys.argv[2]))
    print(json.dumps({"path": str(path)}))
except HubError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.mark.parametrize("token", ["hf_“x”", "hf_a\nb", "hf_a b"])
def test_what_no_token_has_is_refused_before_the_hub_is_asked(token):
    with pytest.raises(InputError, match="characters that no token has"):
        resolve("org/model", token=token)


@pytest.fixture
def hub():
    with serving(Hub("org/model", {"main": FILES, "old": {**FILES, "config.json": b'{"old": 1}'}})) as hub:
        yield hub


@pytest.fixture
def fetch(hub, tmp_path):
    """Run `fetch` in a separate process, because huggingface_hub reads its environment once, on import."""

    def call(repository="org/model", endpoint=None, env=None, code=CODE, **options):
        settings = {"HF_ENDPOINT": endpoint or hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", code, repository, json.dumps(options)],
            env={**clean, **settings, **(env or {})}, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # fails if anything else is on stdout

    return call


def read(answer, name):
    return (Path(answer["path"]) / name).read_bytes()


@pytest.mark.slow
def test_fetches_what_a_model_needs_and_no_more(hub, fetch):
    answer = fetch()
    assert read(answer, "model.safetensors") == WEIGHTS
    assert not any("training.bin" in path for _, path, _ in hub.log)
    assert answer["path"].endswith(hub.commit("main"))


@pytest.mark.slow
def test_revision_and_cache_when_offline(fetch):
    assert read(fetch(revision="old"), "config.json") == b'{"old": 1}'
    assert read(fetch(revision="old", env={"HF_HUB_OFFLINE": "1"}), "config.json") == b'{"old": 1}'


@pytest.mark.slow
def test_resumes_after_a_cut_connection(hub, fetch):
    hub.cut["model.safetensors"] = 15_000_000
    answer = fetch()
    if "error" in answer:
        answer = fetch()
    assert read(answer, "model.safetensors") == WEIGHTS
    ranges = [given for method, path, given in hub.log if method == "GET" and path.endswith("model.safetensors")]
    assert any(given and int(given.removeprefix("bytes=").split("-")[0]) > 0 for given in ranges)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({}, {"repository": "org/none"}, "no repository org/none"),
        ({}, {"revision": "none"}, "no revision 'none'"),
        ({"token": "secret"}, {}, "token"),
        ({"gated": True}, {}, "gated"),
        ({}, {"endpoint": "http://127.0.0.1:9"}, "cannot be reached"),
        ({}, {"env": {"HF_HUB_OFFLINE": "1"}}, "not in the cache"),
    ],
)
def test_failures_are_one_line_errors(hub, fetch, change, options, text):
    for name, value in change.items():
        setattr(hub, name, value)
    error = fetch(**options)["error"]
    assert text in error
    assert "\n" not in error


@pytest.mark.slow
def test_the_token_is_sent(hub, fetch):
    hub.token = "secret"
    assert read(fetch(token="secret\n"), "config.json") == b"{}"


@pytest.mark.slow
def test_a_connection_that_always_breaks_is_a_one_line_error(hub, fetch):
    hub.cut["model.safetensors"], hub.always_cut = 1_000_000, True
    error = fetch()["error"]
    assert "run the same command again to resume" in error
    assert "\n" not in error


@pytest.mark.slow
def test_a_release_is_refused_before_its_weights_are_fetched(hub, fetch, tmp_path):
    code = CODE.replace("import fetch", "import resolve_converted as fetch")
    assert "dsv2 quantize org/model" in fetch(code=code)["error"]
    assert not any("safetensors" in path for method, path, _ in hub.log if method == "GET")
    home = {"HF_HOME": str(tmp_path / "other"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    hub.revisions["main"] = {**FILES, "manifest.json": manifest()}
    assert read(fetch(code=code, env=home), "model.safetensors") == WEIGHTS


@pytest.mark.slow
def test_a_download_that_differs_from_its_checksum_is_refused(hub, fetch, tmp_path):
    code = CODE.replace("import fetch", "import resolve_converted as fetch").replace("HubError", "Dsv2Error")
    damaged = {**FILES, "model.safetensors": WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]), "manifest.json": manifest()}
    hub.revisions["main"] = damaged
    error = fetch(code=code, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})["error"]
    assert "model.safetensors differs from its checksum; download" in error


def manifest() -> bytes:
    """The manifest of a converted checkpoint that has FILES."""
    names = ("config.json", "model.safetensors")
    files = {name: {"bytes": len(FILES[name]), "sha256": sha256(FILES[name]).hexdigest()} for name in names}
    return json.dumps({"recipe": "nf4", "source": "x", "files": files, "format_version": 1}).encode()


def test_resolve(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    assert is_repository("org/name")
    assert not is_repository("/org/name")
    with pytest.raises(InputError, match="neither a directory nor a hub repository"):
        resolve("no-such-thing")
