"""What tests with several processes share: a port, a rank's environment, and a check at its end."""

import os
import socket
from pathlib import Path

import torch


def unused_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def become_rank(rank: int, port: int) -> None:
    """One of two processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)
    )


def assert_no_gloo_thread() -> None:
    """Gloo's threads, alive, now and then abort the exit of a process; Linux alone names them here."""
    names = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]
    assert not [name for name in names if 'gloo' in name]
