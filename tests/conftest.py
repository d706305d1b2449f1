"""A Hub on the loopback interface, a process with a Hub client that talks to it, a single thread: for who asks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hub_client
import pytest
import torch
from hub_server import LoopbackHub, running_hub


def pytest_configure(config: pytest.Config) -> None:
    """Where no test that needs a GPU is asked for, commands run on the CPU as they do without one, bit for bit."""
    marks = config.option.markexpr
    if marks and 'gpu' not in marks.replace('not gpu', ''):
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


@pytest.fixture(scope='session')
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('hf_home')


@pytest.fixture(scope='session')
def _hub() -> Iterator[LoopbackHub]:
    with running_hub(hub_client.USERS) as server:
        yield server


@pytest.fixture
def hub(_hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """The server, without faults of other tests; no token may have come to its object store."""
    _hub.faults.clear()
    _hub.requests.clear()
    yield _hub
    assert not any(authorized for _, path, authorized in _hub.requests if path.startswith('/objects/'))


@pytest.fixture(scope='session')
def client(_hub: LoopbackHub, hub_home: Path) -> Iterator[hub_client.Client]:
    """Run a function of hub_client in the client process, and look for tokens in all that comes of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub_client.environment(_hub.endpoint, hub_home).items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), hub_client.prepare_process)
        pool.submit(hub_client.process_id).result()

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> hub_client.Outcome:
        outcome = pool.submit(hub_client.observed, function, *args, **kwargs).result(timeout=100)
        for token in hub_client.USERS:
            assert token not in outcome.everything
        return outcome

    with pool:
        yield call


@pytest.fixture(scope='module')
def one_thread() -> Iterator[None]:
    """For a module and its shared runs: sums over several threads differ with their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
