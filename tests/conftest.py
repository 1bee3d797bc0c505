import os
from collections.abc import Callable, Iterator

import pytest
import torch

from hsa_compile.dispatch import use_backend
from hsa_compile.schedules.builder import compiler_version

# What is tested must not hang on what was tuned on a machine; tests of records say otherwise.
os.environ["HSA_COMPILE_SCHEDULE"] = "default"
# Nothing is downloaded, not even looked for.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # Two test processes on two cores: more threads would only wait for each other.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def light() -> Iterator[None]:
    """No kernels, which have tests of their own, and one thread: sizes this small gain by neither."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with use_backend("eager"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training draws no picture, which takes longer than a few steps of a small model."""
    monkeypatch.setattr("hsa_compile.model.train.plot_losses", lambda path, *_: path.touch())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and empty_like give tensors full of NaN (or a wild index), so that nothing that was left unwritten
    hides."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poison(*args: object, real: Callable[..., torch.Tensor] = real, **kwargs: object) -> torch.Tensor:
            x = real(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else 2**30)

        monkeypatch.setattr(torch, name, poison)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if compiler_version() is None:
        for item in items:
            if "needs_compiler" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="apache-tvm is not installed"))
