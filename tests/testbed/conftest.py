import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Models this small are faster on one thread, above all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
