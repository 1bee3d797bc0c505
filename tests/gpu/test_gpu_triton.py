"""The checks of ``check_triton.py``, one test each."""

from collections.abc import Callable

import pytest
import torch

from check_triton import jobs

JOBS = dict(jobs())


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    if "far offsets" not in request.node.name:  # filling its gigabytes would only take time
        request.getfixturevalue("poisoned")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_triton_on_the_gpu(job: Callable[[], object]) -> None:
    pytest.importorskip("triton")
    job()
