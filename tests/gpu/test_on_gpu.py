"""The checks of ``check.py``, one test each."""

from collections.abc import Callable

import pytest
import torch

from check import jobs
from hsa_compile import dispatch

JOBS = {f"{backend} {name}": (backend, job) for backend in ("compiled", "triton") for name, job in jobs(backend)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", JOBS)
def test_on_the_gpu(name: str, request: pytest.FixtureRequest) -> None:
    backend, job = JOBS[name]
    pytest.importorskip({"compiled": "tilelang", "triton": "triton"}[backend])
    if "far offsets" not in name:  # filling its gigabytes would only take time
        request.getfixturevalue("poisoned")
    _run(backend, job)


def _run(backend: str, job: Callable[[], object]) -> None:
    with dispatch.use_backend(backend):  # type: ignore[arg-type]
        job()
