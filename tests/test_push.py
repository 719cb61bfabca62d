"""Versions on a Hub: what arrives, what stays, and what is left when something goes wrong.

The client is the real one, over real HTTP, to a server in a process of its own.
"""

import base64
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
import time
import traceback
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from urllib.parse import quote

import huggingface_hub.constants
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import are_progress_bars_disabled

import merge_callback.hub
from merge_callback import CorruptVersion, MergeRefused, MergeStore, PushError, PushRefused
from merge_callback import push_version as push_in_public
from merge_callback.hub import Hub, Target, preflight
from merge_callback.locks import lock
from merge_callback.push import _Remote
from merge_callback.store import push_marker
from merge_callback.uploads import Uploads, pending

pytestmark = pytest.mark.usefixtures("hub_client")

REPO = "me/model"
CARD = '---\nlibrary_name: transformers\n---\n\n```python\npath = "path/to/this/directory"\n```\n'
ONE = {"model-00001-of-00002.safetensors": b"1" * 3000, "model-00002-of-00002.safetensors": b"2"}
ONE |= {"model.safetensors.index.json": b"{}", "config.json": b"{}", "README.md": CARD.encode()}
TWO = {"model.safetensors": b"3" * 4000, "config.json": b'{"a": 1}', "README.md": CARD.encode()}


def push_version(*args, **settings):
    return push_in_public(*args, progress=False, **settings)


def make(root, files=TWO, name="step-1", **manifest):
    """A version, without a model."""
    store = MergeStore(root)
    with store.draft(name) as draft:
        for path, content in files.items():
            (draft.path / path).parent.mkdir(exist_ok=True)
            (draft.path / path).write_bytes(content)
        draft.seal()
        created = f"2026-01-01T00:00:{len(store.versions()):02}.000000+00:00"
        said = {"kind": "merged", "created": created, "step": 1, "best_step": None} | manifest
        return store.publish(draft, name, said)


def state(server, repo=REPO):
    return server.state()["repos"][repo]


def tree(server, revision, repo=REPO):
    """Path -> what identifies the content, at a branch or tag."""
    found = state(server, repo)
    commit = {**found["branches"], **found["tags"]}[revision]
    entries = found["commits"][commit]["tree"].items()
    return {p: e.get("sha256") or e["oid"] for p, e in entries if p != ".gitattributes"}


def sent(server):
    return [sha256 for _, sha256, _ in server.state()["blobs"]]


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_a_version_arrives_whole_on_a_branch_of_its_own_under_a_tag_and_on_main(tmp_path, server):
    version = make(tmp_path / "store", ONE)
    done = push_version(version.path, "model")
    assert (done.version, done.repo_id, done.tag, done.newest) == ("step-1", REPO, "step-1", True)
    assert done.url == f"{server.url}/me/model/tree/step-1"
    found = state(server)
    assert found["private"] is True
    assert found["tags"] == {"step-1": found["branches"]["merge/step-1"]} == {"step-1": done.commit}
    expected = {*ONE, "merge_manifest.json"}
    for revision in ("main", "merge/step-1", "step-1"):
        assert tree(server, revision).keys() == expected
    assert tree(server, "main") == tree(server, "step-1")
    for path, content in ONE.items():
        if path.endswith(".safetensors"):
            assert tree(server, "main")[path] == sha(content)
    assert not push_marker(version.path).exists()
    # What is downloaded is a version, and its sha256 are right.
    HfApi().snapshot_download(REPO, revision="step-1", local_dir=tmp_path / "down" / "step-1")
    MergeStore(tmp_path / "down").verify("step-1")


def test_the_next_version_drops_stale_shards_of_ours_and_nothing_else(tmp_path, server):
    one = push_version(make(tmp_path, ONE).path, REPO)
    before = tree(server, "step-1")
    theirs = {"notes.md": "mine", "eval/scores.json": "{}"}
    server.commit(REPO, "main", theirs)
    two = push_version(make(tmp_path, TWO, "step-2").path, REPO)
    assert (one.tag, two.tag, two.newest) == ("step-1", "step-2", True)
    assert tree(server, "step-1") == before
    assert tree(server, "step-2").keys() == {*TWO, "merge_manifest.json"}
    assert tree(server, "main").keys() == {*TWO, "merge_manifest.json", *theirs}
    assert tree(server, "main") | tree(server, "step-2") == tree(server, "main")
    assert len(sent(server)) == len(set(sent(server))) == 3  # main took no blob again


def test_a_shard_that_somebody_replaced_on_main_is_theirs(tmp_path, server):
    push_version(make(tmp_path, ONE).path, REPO)
    server.commit(REPO, "main", {"model.safetensors.index.json": "mine", "config.json": "mine"})
    push_version(make(tmp_path, TWO, "step-2").path, REPO)
    assert server.file(REPO, "main", "model.safetensors.index.json") == b"mine"
    assert server.file(REPO, "main", "config.json") == TWO["config.json"]  # the model needs it


def test_a_card_that_was_edited_on_main_stays_there(tmp_path, server, caplog):
    push_version(make(tmp_path, ONE).path, REPO)
    server.commit(REPO, "main", {"README.md": "mine"})
    for step in (2, 3):
        files = TWO | {"config.json": b"%d" % step}
        push_version(make(tmp_path, files, f"step-{step}").path, REPO)
        assert server.file(REPO, "main", "README.md") == b"mine"
        assert b"library_name" in server.file(REPO, f"step-{step}", "README.md")
        assert server.file(REPO, "main", "config.json") == b"%d" % step


def test_a_gitignore_on_main_that_leaves_out_our_files_is_said(tmp_path, server):
    push_version(make(tmp_path, ONE).path, REPO)
    version = make(tmp_path, TWO, "step-2")
    server.fault("/commit/main", "status", status=403)
    with pytest.raises(PushError):
        push_version(version.path, REPO)
    server.commit(REPO, "main", {".gitignore": "config.json"})
    with pytest.raises(PushError, match=r"main lacks config\.json: does a \.gitignore"):
        push_version(version.path)
    assert tree(server, "step-2").keys() == {*TWO, "merge_manifest.json"}
    server.commit(REPO, "main", {".gitignore": "nothing"})
    assert push_version(version.path).newest
    whole = tree(server, "step-2")
    assert {path: tree(server, "main")[path] for path in whole} == whole


def test_a_lock_ends_with_the_push_though_a_forked_process_lives_on(tmp_path, server):
    version = make(tmp_path)
    held = ExitStack()
    assert lock(version.path, held=held)
    child = os.fork()
    if child == 0:
        time.sleep(3000)  # of which the tests' clock makes 30 s
        os._exit(0)
    held.close()
    try:
        assert push_version(version.path, REPO).tag == "step-1"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_model_of_others_that_would_be_loaded_in_place_of_ours_is_named(tmp_path, server, caplog):
    HfApi().create_repo(REPO)
    server.commit(REPO, "main", {"model.safetensors": "theirs", "config.json": "{}"})
    push_version(make(tmp_path, ONE).path, REPO)
    assert server.file(REPO, "main", "model.safetensors") == b"theirs"
    assert "model.safetensors on main of me/model was not written by us" in caplog.text


def test_pushing_again_changes_nothing_and_sends_nothing(tmp_path, server):
    version = make(tmp_path, ONE)
    first = push_version(version.path, REPO)
    before = state(server), sent(server)
    assert push_version(version.path, REPO) == first
    assert (state(server), sent(server)) == before


def test_two_runs_of_one_name_have_tags_of_their_own(tmp_path, server):
    one = make(tmp_path / "a", ONE)
    two = make(tmp_path / "b", TWO, created="2027-01-01T00:00:00.000000+00:00")
    assert [push_version(v.path, REPO).tag for v in (one, two)] == ["step-1", "step-1-v2"]
    assert tree(server, "step-1").keys() == {*ONE, "merge_manifest.json"}
    assert tree(server, "main") == tree(server, "step-1-v2") == tree(server, "merge/step-1-v2")
    assert [push_version(v.path, REPO).tag for v in (one, two)] == ["step-1", "step-1-v2"]


def test_runs_that_race_have_tags_of_their_own_and_main_is_the_newest(
    tmp_path, server, monkeypatch
):
    monkeypatch.setattr(merge_callback.hub, "DELAYS", (0.01, 0.02, 0.05, 0.1) * 5)
    HfApi().create_repo(REPO)
    versions = [
        make(tmp_path / str(i), TWO | {"config.json": b"%d" % i}, created=f"2026-01-0{i + 1}")
        for i in range(4)
    ]
    done = {}

    def run(i, version):
        done[i] = push_version(version.path, REPO)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(versions)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert {push.tag for push in done.values()} == {
        "step-1",
        "step-1-v2",
        "step-1-v3",
        "step-1-v4",
    }
    for i, push in done.items():
        assert server.file(REPO, push.tag, "config.json") == b"%d" % i
    assert tree(server, "main") == tree(server, done[3].tag)


def test_a_newer_version_that_comes_between_is_not_replaced(tmp_path, server, monkeypatch):
    HfApi().create_repo(REPO)
    old, new = make(tmp_path, ONE), make(tmp_path, TWO, "step-2")
    commit, between = _Remote._commit, [new]

    def late(self, branch, *args):
        if branch == "main" and between:
            assert push_version(between.pop().path, REPO).newest
        return commit(self, branch, *args)

    monkeypatch.setattr(_Remote, "_commit", late)
    assert not push_version(old.path, REPO).newest
    assert tree(server, "main") == tree(server, "step-2")


def test_an_older_version_does_not_take_the_place_of_a_newer_one(tmp_path, server):
    old, new = make(tmp_path, ONE), make(tmp_path, TWO, "step-2")
    assert push_version(new.path, REPO).newest
    done = push_version(old.path, REPO)
    assert (done.tag, done.newest) == ("step-1", False)
    assert tree(server, "main") == tree(server, "step-2")


def test_a_revision_is_a_branch_that_is_made_and_main_stays(tmp_path, server):
    push_version(make(tmp_path, ONE).path, REPO)
    push_version(make(tmp_path, TWO, "step-2").path, REPO, revision="next")
    assert tree(server, "main") == tree(server, "step-1")
    assert tree(server, "next") == tree(server, "step-2")


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_made_as_it_was_asked_for(tmp_path, server, private):
    push_version(make(tmp_path).path, REPO, private=private)
    assert state(server)["private"] is private


# Cards


def test_a_card_loads_from_the_hub_there_and_from_the_disk_on_the_disk(tmp_path, server):
    card = CARD.replace('directory"', 'directory/merged_16bit"')
    card = card.replace("\n```\n", "\nmodel = Auto.from_pretrained(path, device_map=1)\n```\n")
    inner = card.replace("/merged_16bit", "")
    files = {"README.md": card, "merged_16bit/README.md": inner, "merged_16bit/config.json": "{}"}
    version = make(tmp_path, {path: text.encode() for path, text in files.items()})
    push_version(version.path, REPO)
    for path in ("README.md", "merged_16bit/README.md"):
        text = server.file(REPO, "main", path).decode()
        assert "path/to" not in text
        assert 'Auto.from_pretrained("me/model", subfolder="merged_16bit", device_map=1)' in text
    assert (version.path / "README.md").read_text() == card
    MergeStore(tmp_path).verify(version)
    HfApi().snapshot_download(REPO, revision="step-1", local_dir=tmp_path / "down" / "step-1")
    MergeStore(tmp_path / "down").verify("step-1")


def test_a_base_model_that_is_a_path_is_left_out_of_the_card(tmp_path, server):
    card = "---\nbase_model: /data/base\nlibrary_name: peft\n---\ntext\n"
    push_version(make(tmp_path, {"README.md": card.encode(), "config.json": b"{}"}).path, REPO)
    assert server.file(REPO, "main", "README.md").decode() == card.replace(
        "base_model: /data/base\n", ""
    )


@pytest.mark.parametrize("header", ["tags: 3", "base_model: [", "license: [mit"])
def test_a_card_that_the_hub_refuses_is_left_out_and_the_model_arrives(
    tmp_path, server, caplog, header
):
    card = f"---\n{header}\n---\ntext\n".encode()
    version = make(tmp_path, TWO | {"README.md": card})
    push_version(version.path, REPO)
    assert tree(server, "main").keys() == {*TWO, "merge_manifest.json"} - {"README.md"}
    assert "README.md is left out of the push, its header is not valid" in caplog.text
    before = state(server)
    push_version(version.path, REPO)
    assert state(server) == before


def test_a_card_that_was_edited_on_the_disk_is_pushed_as_it_stands(tmp_path, server):
    version = make(tmp_path)
    (version.path / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    push_version(version.path, REPO)
    assert server.file(REPO, "main", "README.md").endswith(b"mine\n")
    HfApi().snapshot_download(REPO, revision="step-1", local_dir=tmp_path / "down" / "step-1")
    MergeStore(tmp_path / "down").verify("step-1")


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_file_that_rotted_on_the_disk_is_not_tagged(tmp_path, server, path):
    version = make(tmp_path, ONE)
    push_version(version.path, REPO)
    before = tree(server, "main")
    broken = make(tmp_path, TWO, "step-2")
    content = (broken.path / path).read_bytes()
    (broken.path / path).write_bytes(content[:-1] + b"x")
    with pytest.raises(CorruptVersion, match="is not what was written"):
        push_version(broken.path, REPO)
    assert tree(server, "main") == before and state(server)["tags"].keys() == {"step-1"}
    assert "merge/step-2" not in state(server)["branches"]
    assert "Nothing was sent" in push_marker(broken.path).read_text()
    (broken.path / path).write_bytes(content)
    assert push_version(broken.path).tag == "step-2"


def test_a_link_that_leads_out_of_the_version_is_not_uploaded(tmp_path, server):
    version = make(tmp_path / "store")
    (tmp_path / "secret").write_bytes(TWO["config.json"])
    (version.path / "config.json").unlink()
    (version.path / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptVersion, match="leads out of the version"):
        push_version(version.path, REPO)
    assert sent(server) == [] and server.state()["repos"] == {}


def test_a_hub_that_asks_for_a_long_wait_is_asked_again_by_the_next_push(tmp_path, server):
    server.fault("/tag/", "status", status=429, headers={"Retry-After": "3600"}, times=1)
    version = make(tmp_path)
    with pytest.raises(PushError, match="wait some minutes"):
        push_version(version.path, REPO)
    assert push_version(version.path).tag == "step-1"


# Faults

ENDPOINTS = {
    "create": "POST /api/repos/create",
    "whoami": "GET /api/whoami-v2",
    "validate": "POST /api/validate-yaml",
    "refs": "GET .*/refs",
    "tree": "GET .*/tree/",
    "commits": "GET .*/commits/",
    "branch": "POST .*/branch/",
    "preupload": "POST .*/preupload/",
    "batch": "POST .*/objects/batch",
    "blob": "PUT /lfs-up/",
    "verify": "POST /lfs-verify",
    "commit": "POST .*/commit/merge",
    "tag": "POST .*/tag/",
    "manifest": "(HEAD|GET) .*/resolve/",
    "newest": "POST .*/commit/main",
}
CURES = {
    401: "hf auth login",
    403: "give it write access",
    404: "check hub_model_id",
    409: "try later",
    429: "wait some minutes",
    500: "try later",
    502: "try later",
    504: "try later",
    "reset": "try later",
    "lost": "try later",
    "lie": "is not what was sent",
    "slow": "stopped answering",
}
FAULTS = [*CURES]
PASSING = {409, 429, 500, 502, 504, "reset", "lost", "lie"}


def put_fault(server, endpoint, fault, times):
    settings = {"times": times}
    if isinstance(fault, int):
        settings |= {"status": fault, "headers": {"Retry-After": "1"} if fault == 429 else {}}
        fault = "status"
    server.fault(ENDPOINTS[endpoint], fault, **settings)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("times", [1, -1])
def test_a_fault_loses_nothing_and_the_push_goes_on_from_there(
    tmp_path, server, monkeypatch, endpoint, fault, times
):
    monkeypatch.setattr(merge_callback.hub, "SILENCE", 0.6)
    monkeypatch.setattr(merge_callback.hub, "SLOWEST", 1e9)
    push_version(make(tmp_path, ONE).path, REPO)
    old = {revision: tree(server, revision) for revision in ("main", "step-1")}
    version = make(tmp_path, TWO, "step-2")
    put_fault(server, endpoint, fault, times)
    failed = None
    try:
        push_version(version.path, "model")
    except PushError as error:
        failed = str(error)
    server.clear()
    MergeStore(tmp_path).verify(version)
    assert tree(server, "step-1") == old["step-1"]
    tags = state(server)["tags"].keys() - {"step-1"}
    assert tags <= {"step-2"}
    new = {"config.json", "model.safetensors", "README.md", "merge_manifest.json"}
    for tag in tags:
        assert tree(server, tag).keys() == new
    assert tree(server, "main") in ([old["main"], *(tree(server, tag) for tag in tags)])
    if failed is None:
        assert tags and tree(server, "main").keys() == new
        assert not push_marker(version.path).exists()
        return
    assert times == -1 or fault not in PASSING
    assert CURES[fault] in failed, failed
    assert f"push_version('{version.path}')" in failed
    marker = json.loads(push_marker(version.path).read_text())
    assert marker["push"] == "pending" and marker["repo_id"] == "model"
    wait_for_the_thread()
    held = {*server.state()["stored"]}
    before = len(sent(server))
    done = push_version(version.path)
    assert (done.tag, done.newest) == ("step-2", True)
    assert tree(server, "main") == tree(server, "step-2") and tree(server, "main").keys() == new
    assert not held & {*sent(server)[before:]}
    assert tree(server, "step-1") == old["step-1"]
    assert not push_marker(version.path).exists()


def test_a_hub_that_is_down_is_not_asked_for_each_version(tmp_path, server):
    server.fault("/refs", "reset", times=-1)
    versions = [make(tmp_path, name=name) for name in ("step-1", "step-2", "step-3")]
    uploads = Uploads(Hub(delays=(2.0,)))  # seconds, in which all three are added
    for version in versions:
        uploads.add(version, Target(REPO))
    uploads.join(progress=False)
    assert [failure.version.name for failure in uploads.failures] == ["step-1", "step-2", "step-3"]
    asked = [path for _, path, _ in server.state()["requests"]]
    assert asked.count("/api/repos/create") == 1
    server.clear()
    uploads.add(make(tmp_path, name="step-4"), Target(REPO))
    uploads.join(progress=False)
    assert [p.tag for p in uploads.pushes] == ["step-1", "step-2", "step-3", "step-4"]
    assert uploads.failures == [] and tree(server, "main") == tree(server, "step-4")


def test_a_version_that_another_process_pushes_is_left_to_it(tmp_path, server):
    version = make(tmp_path)
    with ExitStack() as held, pytest.raises(PushError, match="another process is pushing"):
        assert lock(version.path, held=held)
        push_version(version.path, REPO)
    assert push_version(version.path).tag == "step-1"


def test_a_push_that_is_pending_stays_so_when_the_version_goes_elsewhere(tmp_path, server):
    version = make(tmp_path)
    server.fault("/preupload/", "status", status=403, times=1)
    with pytest.raises(PushError, match="the push is pending"):
        push_version(version.path, "me/first")
    push_version(version.path, "me/second")
    assert json.loads(push_marker(version.path).read_text())["repo_id"] == "me/first"
    assert push_version(version.path).repo_id == "me/first"
    assert MergeStore(tmp_path).pending() == []


def test_a_new_version_is_not_pushed_to_where_a_lost_one_was_going(tmp_path):
    version = make(tmp_path)
    push_marker(version.path).write_text(
        '{"repo_id": "me/m", "private": false, "revision": "main"}'
    )
    shutil.rmtree(version.path)
    assert make(tmp_path).path == version.path
    assert MergeStore(tmp_path).pending() == []


def test_what_is_no_version_is_said(tmp_path, server):
    with pytest.raises(CorruptVersion, match="it is not a published version"):
        push_version(tmp_path, REPO)
    version = make(tmp_path, {"lora/config.json": b"{}"})
    with pytest.raises(MergeRefused, match="give a repo_id"):
        push_version(version.path)
    assert push_version(version.path / "lora", REPO).tag == "step-1"


def test_bars_are_as_they_were_after_a_push(tmp_path, server, capsys):
    assert not are_progress_bars_disabled()
    push_version(make(tmp_path).path, REPO)
    assert "model.safetensors" not in capsys.readouterr().err  # a bar of the client's
    assert not are_progress_bars_disabled()
    push_in_public(make(tmp_path, ONE, "step-2").path, REPO)
    assert not are_progress_bars_disabled()
    assert "push: 100%" in capsys.readouterr().err


def wait_for_the_thread():
    for thread in threading.enumerate():
        if thread.name == "push":
            thread.join(10)
            assert not thread.is_alive()


# Secrets

SECRETS = ["key.of-me_42", "a+b/c=d e", "hf_with.dots-and+more", "ключ-1234", "hf_writer"]


def everything_of(error):
    """All that an error shows, its causes and what they hold too."""
    told = ["".join(traceback.format_exception(error))]
    while error is not None:
        told += [str(error), repr(error.args), repr(vars(error))]
        for holder in (error, getattr(error, "response", None)):
            request = getattr(holder, "request", None)
            told.append(repr(getattr(request, "headers", None)))
        if hasattr(error, "response"):
            told += [repr(error.response.headers), error.response.text]
        error = error.__cause__ or error.__context__
    return "\n".join(told)


def forms(secret):
    encoded = base64.b64encode(secret.encode()).decode()
    return {secret, quote(secret, safe=""), quote(secret), encoded, *secret.split()} - {"e"}


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("given", ["argument", "variable", "login"])
@pytest.mark.parametrize("fault", [{"status": 403}, {"status": 503}, {"status": 401}, None])
def test_a_token_is_shown_by_nothing_that_reaches_a_user(
    tmp_path, server, monkeypatch, caplog, secret, given, fault
):
    caplog.set_level(logging.DEBUG)
    login = tmp_path / "token"
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(login))
    monkeypatch.delenv("HF_TOKEN")
    if given == "variable":
        monkeypatch.setenv("HF_TOKEN", secret)
    elif given == "login":
        login.write_text(secret)
    if fault is not None:
        said = " ".join([*sorted(forms(secret)), f"Authorization: Bearer {secret}"])
        server.fault(".", "status", body={"error": said}, times=-1, **fault)
    elif secret == "hf_writer":
        server.fault("/commit/", "reset", times=-1)
    version = make(tmp_path / "store")
    token = secret if given == "argument" else None
    with pytest.raises(PushError) as failed:
        push_version(version.path, REPO, token=token)
    with pytest.raises(PushRefused) as refused:
        server.fault("whoami", "status", status=500, body={"error": secret}, times=-1)
        preflight(Hub(token, (0.01,)), REPO, True)
    told = [everything_of(failed.value), everything_of(refused.value), caplog.text]
    told.append(push_marker(version.path).read_text())
    for form in forms(secret):
        assert not any(form in text for text in told), form


def test_what_failed_is_still_said_without_its_cause(tmp_path, server):
    server.fault("/tag/", "status", status=403, body={"error": "not \x1b[2Jyours"}, times=-1)
    with pytest.raises(PushError) as failed:
        push_version(make(tmp_path).path, REPO)
    told = str(failed.value)
    assert failed.value.__cause__ is None and failed.value.__context__ is None
    assert "403" in told and "/tag/" in told and "give it write access" in told
    assert r"not \x1b[2Jyours" in told


# A remote, or a directory, that others have written to


def rewritten(server, branch="main", **values):
    """The manifest on a branch, as somebody has edited it."""
    found = json.loads(server.file(REPO, branch, "merge_manifest.json")) | values
    server.commit(REPO, branch, {"merge_manifest.json": json.dumps(found)})


def test_what_a_manifest_there_names_is_deleted_only_if_we_wrote_it(tmp_path, server):
    push_version(make(tmp_path, ONE).path, REPO)
    attributes = server.file(REPO, "main", ".gitattributes")
    theirs = {"notes.md": "mine", "README.md": "mine"}
    server.commit(REPO, "main", theirs)
    contents = {".gitattributes": attributes} | {p: c.encode() for p, c in theirs.items()}
    named = {p: {"size": len(c), "sha256": sha(c)} for p, c in contents.items()}
    rewritten(server, files=named)
    push_version(make(tmp_path, TWO, "step-2").path, REPO)
    assert server.file(REPO, "main", ".gitattributes") == attributes
    for path, content in theirs.items():
        assert server.file(REPO, "main", path) == content.encode()
    # Our own stale shards go all the same.
    assert tree(server, "main").keys() == {*TWO, "merge_manifest.json", "notes.md"}


def test_a_commit_of_others_that_is_titled_like_ours_deletes_nothing(tmp_path, server):
    push_version(make(tmp_path, ONE).path, REPO)
    operations = [CommitOperationAdd("notes.md", b"mine")]
    HfApi().create_commit(REPO, operations, commit_message="step-1 is the newest version")
    push_version(make(tmp_path, TWO, "step-2").path, REPO)
    assert server.file(REPO, "main", "notes.md") == b"mine"
    assert server.file(REPO, "main", "config.json") == TWO["config.json"]


NOW = datetime.now(timezone.utc)
FUTURE, PAST = (NOW + timedelta(days=2)).isoformat(), (NOW - timedelta(days=900)).isoformat()
HERE = NOW.isoformat()
# (there, here): whether what is there stays. Here the sequence is 2, the second in its directory.
NEWER = {
    "made later": ({"created": HERE}, {"created": PAST}, True),
    "made earlier": ({"created": PAST}, {"created": HERE}, False),
    "of a clock an hour fast": (
        {"created": (NOW + timedelta(hours=1)).isoformat()}, {"created": HERE}, True,
    ),
    "still to come": ({"created": FUTURE}, {"created": HERE}, False),
    "another zone": (
        {"created": "2026-01-01T12:00:00+05:00"}, {"created": "2026-01-01T08:00:00+00:00"}, False,
    ),
    "one run": (
        {"created": PAST, "run": "a", "sequence": 3}, {"created": HERE, "run": "a"}, True,
    ),
    "one run, in order": (
        {"created": HERE, "run": "a", "sequence": 1}, {"created": PAST, "run": "a"},
        False,
    ),
    "one run, from the future": (
        {"created": FUTURE, "run": "a", "sequence": 3}, {"created": HERE, "run": "a"}, True,
    ),
    "two runs": (
        {"created": HERE, "run": "a", "sequence": 1}, {"created": PAST, "run": "b"}, True,
    ),
    "no runs": (
        {"created": HERE, "run": None, "sequence": 1}, {"created": PAST, "run": None}, True,
    ),
    "no numbers": (
        {"created": HERE, "run": "a", "sequence": "9"}, {"created": PAST, "run": "a"}, True,
    ),
    "a bool": (
        {"created": PAST, "run": "a", "sequence": True}, {"created": HERE, "run": "a"}, False,
    ),
    "lists": ({"created": [], "run": [], "sequence": {}}, {"created": PAST, "run": "a"}, False),
    "no date": ({"created": "soon"}, {"created": PAST}, False),
    "the first": ({"created": "0001-01-01T00:00:00+23:59"}, {"created": PAST}, False),
    "the last": ({"created": "9999-12-31T23:59:59-23:59"}, {"created": PAST}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", NEWER)
def test_a_branch_is_held_back_by_what_is_newer_and_that_is_said(tmp_path, server, caplog, case):
    there, here, stays = NEWER[case]
    push_version(make(tmp_path, ONE).path, REPO)
    rewritten(server, **there)
    version = make(tmp_path, TWO, "step-2", **here)
    caplog.clear()
    done = push_version(version.path, REPO)
    assert done.newest is not stays
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    if stays:
        (told,) = warned
        assert "holds a newer version" in told and "by its tag, step-2, or delete" in told
        HfApi().delete_file("merge_manifest.json", REPO)  # the cure
        assert push_version(version.path, REPO).newest
    elif there["created"] == FUTURE or case == "the last":
        assert "which is still to come" in warned[0]
    else:
        assert warned == []


@pytest.mark.parametrize(
    "content",
    ["[]", "[" * 100_000, '{"a":' * 50_000, "\ufeff{}", "5", "", '{"created": 5, "files": []}',
     '{"created": "2036", "sequence": 1e400, "run": NaN, "files": {"..": 1}}'],
)  # fmt: skip
def test_any_manifest_may_stand_there(tmp_path, server, content):
    push_version(make(tmp_path, ONE).path, REPO)
    server.commit(REPO, "main", {"merge_manifest.json": content})
    assert push_version(make(tmp_path, TWO, "step-2").path, REPO).newest


@pytest.mark.parametrize("value", ["²", "-1", "1e3", "soon", "٣", "9" * 400, "Wed, 21 Oct 2036"])
def test_any_wait_may_be_asked_for(tmp_path, server, value):
    header = {"Retry-After": value.encode().decode("latin-1") if value == "²" else value}
    if not value.isascii() and value != "²":
        header = {"Retry-After": quote(value)}
    server.fault("/tag/", "status", status=429, headers=header, times=1)
    version = make(tmp_path)
    if value == "9" * 400:
        with pytest.raises(PushError, match="wait some minutes"):
            push_version(version.path, REPO)
    assert push_version(version.path, REPO).tag == "step-1"


def test_an_answer_that_cannot_be_used_is_no_busy_hub(tmp_path, server):
    server.fault("GET .*/refs", "status", status=200, body=[[[]]], times=-1)
    with pytest.raises(PushError, match="the Hub's answer cannot be used"):
        push_version(make(tmp_path).path, REPO)


# Marks


def mark_of(version):
    return json.loads(push_marker(version.path).read_text())


def pending_push(server, root, repo=REPO):
    """A version whose push to a repository was cut off."""
    version = make(root)
    server.fault("/repos/create", "status", status=403, times=1)
    with pytest.raises(PushError):
        push_version(version.path, repo)
    return version


def test_a_mark_that_was_copied_sends_nothing(tmp_path, server):
    version = pending_push(server, tmp_path / "a")
    assert pending(version).ours
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copied = MergeStore(tmp_path / "b").version("step-1")
    with pytest.raises(MergeRefused, match=f"merge-callback push {copied.path} me/model"):
        push_version(copied.path)
    shutil.rmtree(tmp_path / "a")  # nor where the copy takes the place of what it was copied from
    (tmp_path / "a").mkdir()
    (tmp_path / "b").rename(tmp_path / "a.new")
    (tmp_path / "a").rmdir()
    (tmp_path / "a.new").rename(tmp_path / "a")
    with pytest.raises(MergeRefused, match="was marked in another directory and is ignored"):
        push_version(version.path)
    assert server.state()["repos"] == {}
    assert push_version(version.path, REPO).tag == "step-1"  # by name it goes, and is marked anew
    assert not push_marker(version.path).exists()


@pytest.mark.parametrize("private", [False, None])
def test_a_mark_makes_nothing_public(tmp_path, server, private):
    version = make(tmp_path)
    server.fault("/repos/create", "status", status=403, times=1)
    with pytest.raises(PushError):
        push_version(version.path, REPO, private=private)
    change = mark_of(version) | {"private": False}
    push_marker(version.path).write_text(json.dumps(change))
    push_version(version.path)
    assert state(server)["private"] is True


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, "[]", "5", "{}", '{"repo_id": 5, "revision": 1}', '{"repo_id": "a/b"}',
     '{"repo_id": "a/b", "revision": "main", "directory": [[]]}', "\ud800"],
)  # fmt: skip
def test_any_mark_may_lie_beside_a_version(tmp_path, server, text):
    version = make(tmp_path)
    push_marker(version.path).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(MergeRefused, match=r"is pending; give a repo_id|in another directory"):
        push_version(version.path)
    assert push_version(version.path, REPO).tag == "step-1"
    assert MergeStore(tmp_path).pending() == []


@pytest.mark.parametrize("suffix", [".push", ".push-draft"])
def test_a_mark_is_written_beside_the_version_and_nowhere_else(tmp_path, server, suffix):
    version = make(tmp_path / "store")
    (tmp_path / "mine").write_text("mine")
    push_marker(version.path).with_suffix(suffix).symlink_to(tmp_path / "mine")
    server.fault("/repos/create", "status", status=403, times=1)
    with pytest.raises(PushError):
        push_version(version.path, REPO)
    assert (tmp_path / "mine").read_text() == "mine"
    assert mark_of(version)["repo_id"] == REPO and not push_marker(version.path).is_symlink()


def test_a_pipe_for_a_mark_is_not_waited_for(tmp_path, server):
    version = make(tmp_path)
    os.mkfifo(push_marker(version.path))
    with pytest.raises(MergeRefused, match="is pending; give a repo_id"):
        push_version(version.path)
