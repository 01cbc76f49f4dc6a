"""What several test files share."""

import signal

import pytest
import torch

from alda import toy

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The same number of threads everywhere: sums of floats depend on it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A few images of the miniature world, in the true layouts of GTA5, SYNTHIA and Cityscapes."""
    root = tmp_path_factory.mktemp("world")
    toy.write(root, seed=0, counts=toy.SMALL)
    return root
