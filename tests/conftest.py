"""Offline, quiet and deterministic: set before anything is imported that looks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


CELLS = pytest.StashKey()


class Support:
    """Notes a cell of the matrix of docs/support.md: it works if the test that it is for passes."""

    def __init__(self, request):
        self._request = request

    def __call__(self, table, row, column):
        self._request.node.stash[CELLS] = [table, row, column, "yes"]

    def refused(self, why):
        self._request.node.stash[CELLS][3] = why


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
        found.append((*cell[:3], cell[3] if outcome.get_result().passed else "FAILED"))


def pytest_sessionfinish(session):
    path = session.config.getoption("--support")
    if path:
        from support import write

        write(path, session.config.stash.get(CELLS, []))
