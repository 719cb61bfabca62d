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
from packaging.version import Version

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
    found = Version(transformers.__version__)
    for place, item in enumerate(items):
        item.user_properties.append(("place", place))
        needed = item.get_closest_marker("since")
        if needed is not None and found < Version(needed.args[0]):
            reason = f"transformers {found} has no such model"
            item.add_marker(pytest.mark.skip(reason=reason))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


class Support:
    """Notes cells of a row in a matrix of docs/: they hold if the test that they are for passes."""

    def __init__(self, request):
        self._noted = request.node.user_properties

    def __call__(self, table, row, *columns):
        self._noted.append(("row", (table, row, columns)))

    def found(self, *what):
        self._noted.append(("cells", what))

    refused = found


@pytest.fixture
def support(request):
    return Support(request)


def pytest_addoption(parser):
    parser.addoption("--support", help="write the matrix of what merges to this file")


def pytest_configure(config):
    path = config.getoption("--support")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Matrix(path))


class Matrix:
    """Gathers what tests have noted, from all processes that run them, in the order of tests."""

    def __init__(self, path):
        self._path = path
        self._cells = []

    def pytest_runtest_logreport(self, report):
        noted = dict(report.user_properties)
        if report.when == "call" and "row" in noted:
            table, row, columns = noted["row"]
            cells = noted.get("cells", ["yes"] * len(columns))
            for column, value in zip(columns, cells, strict=True):
                value = value if report.passed else "FAILED"
                self._cells.append((noted["place"], table, row, column, value))

    def pytest_sessionfinish(self):
        from support import write

        write(self._path, [cell for _, *cell in sorted(self._cells, key=lambda cell: cell[0])])
