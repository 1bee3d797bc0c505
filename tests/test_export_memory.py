"""Memory of a GPU by the calls of its driver, which a stand-in answers from the host's memory."""

from __future__ import annotations

import gc
import subprocess

import numpy as np
import pytest

from export_kit import CONFIG, shared_bundle
from hsa_compile.export import runtime
from hsa_compile.export.bundle import TensorSpec
from hsa_compile.export.memory import Cuda, DeviceError, Host
from hsa_compile.export.session import Session
from hsa_compile.export.state import SessionState

# Counts what is allocated, refuses more than 1 MiB at once, and demands that a context is current.
_DRIVER = r"""
#include <stdlib.h>
#include <string.h>
static int current, live;
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int number) { *device = number; return number > 0 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &current; return device; }
int cuCtxSetCurrent(void* context) { current = context == &current; return 0; }
int cuCtxSynchronize(void) { return current ? 0 : 201; }
static int allocate(void** p, size_t n) {
  if (!current) return 201;
  if (n > 1 << 20) return 2;
  live += 1;
  *p = malloc(n);
  memset(*p, 255, n);
  return 0;
}
int cuMemAlloc_v2(void** p, size_t n) { return allocate(p, n); }
int cuMemHostAlloc(void** p, size_t n, unsigned flags) { return flags == 3 ? allocate(p, n) : 1; }
int cuMemFree_v2(void* p) { live -= 1; free(p); return 0; }
int cuMemFreeHost(void* p) { return cuMemFree_v2(p); }
int cuMemsetD8_v2(void* p, unsigned char x, size_t n) { memset(p, x, n); return 0; }
int cuMemcpy(void* to, const void* from, size_t n) { memcpy(to, from, n); return 0; }
int live_allocations(void) { return live; }
"""
SPECS = (
    TensorSpec("position", "int64", ("batch",)),
    TensorSpec("pending", "bfloat16", ("batch", 4, 3)),
    TensorSpec("mem_k", "bfloat16", ("batch", "rows", 1, 2)),
    TensorSpec("mem_v", "bfloat16", ("batch", "rows", 1, 2)),
    TensorSpec("landmark", "bfloat16", ("batch", "capacity", 1, 5)),
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("driver")
    (directory / "driver.c").write_text(_DRIVER)
    built = directory / "libdriver.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(built), str(directory / "driver.c")], check=True)
    return str(built)


def read(device: Cuda | Host, pointer: int, nbytes: int) -> bytes:
    copy = np.zeros(nbytes, np.uint8)
    device.copy(copy.ctypes.data, pointer, nbytes)
    return copy.tobytes()


@pytest.mark.parametrize("host_memory", [False, True])
def test_memory_comes_zeroed_and_goes(driver: str, host_memory: bool) -> None:
    device = Cuda(host_memory, library=driver)
    plain, shared = device.zeros((2, 3), "float16"), device.shared((2, 3), "int64")
    store = device.chunk_store((2, 8), "bfloat16")
    assert (plain.nbytes, shared.nbytes, store.nbytes) == (12, 48, 32)
    for buffer in (plain, shared, store):
        assert read(device, buffer.pointer, buffer.nbytes) == bytes(buffer.nbytes)
    assert plain.host is None
    assert (store.host is not None) == host_memory
    assert shared.host is not None
    shared.host[1, 2] = 7
    assert read(device, shared.pointer + 40, 8) == (7).to_bytes(8, "little")
    assert shared.view(3, 1).host.tolist() == [[0], [0], [0]]
    assert device._cuda.live_allocations() == 3
    view = shared.view(1)
    del plain, shared, store, buffer
    gc.collect()
    assert device._cuda.live_allocations() == 1  # what the view holds
    del view
    gc.collect()
    assert device._cuda.live_allocations() == 0


def test_what_the_driver_refuses_is_said(driver: str) -> None:
    with pytest.raises(DeviceError, match="no NVIDIA driver here"):
        Cuda(library="libcuda-of-nowhere.so")
    with pytest.raises(DeviceError, match="cuDeviceGet failed with CUDA error 101"):
        Cuda(device=1, library=driver)
    with pytest.raises(DeviceError, match="out of memory; take fewer rows"):
        Cuda(library=driver).zeros((2**20,), "int64")


@pytest.mark.parametrize("gpu", [False, True])
def test_rows_are_copied_and_memory_grows_on_any_device(driver: str, gpu: bool) -> None:
    device = Cuda(library=driver) if gpu else Host()
    states = [SessionState(SPECS, 2, 4, capacity, device) for capacity in (2, 5)]
    for state in states:
        state.advance(np.array([7, 0]))
        for i, buffer in enumerate(state.buffers.values()):
            content = np.random.default_rng(i).integers(0, 255, buffer.nbytes, np.uint8)
            device.copy(buffer.pointer, content.ctypes.data, buffer.nbytes)
    state, other = states

    def row(of: SessionState, name: str, b: int, nbytes: int | None = None) -> bytes:
        buffer = of.buffers[name]
        return read(device, buffer.pointer + b * buffer.row_bytes, nbytes or buffer.row_bytes)

    chunk = {"mem_k": 16, "mem_v": 16, "landmark": 10}
    before = {name: row(state, name, 0, n) for name, n in chunk.items()}
    state.make_room(np.array([30, 3]))
    assert (state.capacity, state.generation) == (9, 1)
    assert {name: row(state, name, 0, n) for name, n in chunk.items()} == before
    state.copy_row(other, 0, to=1)
    for name in state.buffers:
        assert row(state, name, 1, chunk.get(name)) == row(other, name, 0, chunk.get(name))
    assert state.positions.tolist() == [7, 7]
    state.reset(1)
    assert row(state, "position", 1) == bytes(8)
    assert state.positions.tolist() == [7, 0]


def test_a_session_runs_on_a_gpus_memory(
    driver: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The stand-in's memory is the host's, so the CPU provider runs on it: only who allocates and copies is a GPU's."""
    bundle = shared_bundle(tmp_path_factory)
    plain = Session(bundle, batch=2, threads=1, reserve=0)
    device = Cuda(library=driver)
    monkeypatch.setattr(device, "name", "cpu", raising=False)
    monkeypatch.setattr(runtime, "Host", lambda: device)
    session = Session(bundle, batch=2, threads=1, reserve=0)
    session._decoder.find_least_chunks()
    assert session.runtime.least_chunks == 0
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 60))
    for least in (0, 1):
        session.runtime.least_chunks = least  # as where a provider computes nothing with empty tensors
        for one in (session, plain):
            one.reset()
        for n in (30, 1, 1, 1, 1, 60, 1):
            lengths = [n, n // 2]
            np.testing.assert_array_equal(session.step(ids[:, :n], lengths), plain.step(ids[:, :n], lengths))
