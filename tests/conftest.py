"""Offline, quiet and deterministic: set before anything is imported that looks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import time

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from hub_server import HubServer

import merge_callback.hub
import merge_callback.publisher

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def server():
    """A Hub in a process of its own."""
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture
def hub_client(server, monkeypatch):
    """A client that talks to the server, and waits a hundredth of what it would."""
    server.reset()
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 100))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    # Made once in a process, it keeps the endpoint of the test that happened to be first.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(merge_callback.hub, "DELAYS", (0.01, 0.02))
    monkeypatch.setattr(merge_callback.publisher, "QUICK", (0.01, 0.02))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


CELLS = pytest.StashKey()


class Support:
    """Notes cells of a row in a matrix of docs/: they hold if the test that they are for passes."""

    def __init__(self, request):
        self._request = request

    def __call__(self, table, row, *columns):
        self._request.node.stash[CELLS] = [table, row, columns, ["yes"] * len(columns)]

    def found(self, *what):
        self._request.node.stash[CELLS][3] = what

    refused = found


@pytest.fixture
def support(request):
    return Support(request)


def pytest_addoption(parser):
    parser.addoption("--support", help="write the matrix of what merges to this file")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    cell = item.stash.get(CELLS, None)
    if cell is not None and call.when == "call":
        found = item.config.stash.setdefault(CELLS, [])
        table, row, columns, cells = cell
        for column, value in zip(columns, cells, strict=True):
            found.append((table, row, column, value if outcome.get_result().passed else "FAILED"))


def pytest_sessionfinish(session):
    path = session.config.getoption("--support")
    if path:
        from support import write

        write(path, session.config.stash.get(CELLS, []))
