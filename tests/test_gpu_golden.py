"""The CUDA that each GPU schedule lowers to, as text: a change of it that nobody meant is seen in review.

HSA_COMPILE_ACCEPT=1 pytest tests/test_gpu_golden.py      writes what is lowered now
"""

import difflib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
# Name: problem, pass, architecture, tokens of a segment. One a schedule: what differs by more than sizes.
ATTENTION = {"op": "chunk_attention", "chunk_size": 64, "dtype": "bfloat16"}
SELECT = {"op": "chunk_select", "kv_heads": 1, "retrieval_heads": 1, "chunk_size": 64, "top_k": 16, "dtype": "bfloat16"}
WIDE_GROUP = {**ATTENTION, "q_heads": 16, "kv_heads": 1, "head_dim": 64, "top_k": 8}
SMALL_GROUP = {**ATTENTION, "q_heads": 4, "kv_heads": 2, "head_dim": 64, "top_k": 8}
SCHEDULES = {
    "attention-rows": (WIDE_GROUP, "forward", "sm_90a", None),
    "attention-warpgroups": ({**WIDE_GROUP, "head_dim": 128}, "forward", "sm_90a", None),
    "attention-warps": (SMALL_GROUP, "forward", "sm_90a", None),
    "attention-token": (WIDE_GROUP, "forward", "sm_90a", 1),
    "attention-sm80": (WIDE_GROUP, "forward", "sm_80", None),
    "attention-backward": (WIDE_GROUP, "backward", "sm_90a", None),
    "select-streaming": ({**SELECT, "retrieval_dim": 64}, "forward", "sm_90a", None),
    "select-few": ({**SELECT, "retrieval_dim": 64}, "forward", "sm_90a", 1),
    "select-backward": ({**SELECT, "retrieval_dim": 64}, "backward", "sm_90a", None),
}
LOWER = """
import hashlib, json, re, sys
from hsa_compile.ir import any_problem_from_dict
from hsa_compile.schedules.choice import default_tile
from hsa_compile.schedules.cuda_lowering import lower
from hsa_compile.schedules.cuda_worker import program_for
from hsa_compile.schedules.target import resolve_any

fields, pass_name, arch, length = json.loads(sys.argv[1])
problem, target = any_problem_from_dict(fields), resolve_any("cuda:" + arch)
tile = default_tile(problem, pass_name, target, length)
print(problem, tile, sep="\\n")
for launch in program_for(problem, pass_name, tile).launches:
    kernel = lower(launch, launch.symbol, target)
    print(f"\\n== {launch.symbol}: grid {kernel.grid}, block {kernel.block}, {kernel.shared_bytes} bytes shared")
    print(*kernel.tensor_maps.values(), sep="\\n")
    # In full where matrix instructions are; of the rest, that it changed.
    text = kernel.source[kernel.source.index('extern "C"'):]
    text = re.sub(r"\\bworkspace(_\\d+)?\\b", "workspace", text)  # numbered by chance
    print(text if "/instruction/" in kernel.source else "sha256 " + hashlib.sha256(text.encode()).hexdigest())
"""

QUICK = ("attention-rows", "attention-warps", "attention-token")
needs_tilelang = pytest.mark.skipif(importlib.util.find_spec("tilelang") is None, reason="needs tilelang")


@needs_tilelang
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCHEDULES])
def test_a_schedule_lowers_to_what_was_reviewed(name: str) -> None:
    # In a process of its own: TileLang and this one's TVM do not go together.
    command = [sys.executable, "-c", LOWER, json.dumps(SCHEDULES[name])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    version = f"tilelang {importlib.metadata.version('tilelang')}\n"
    text, golden = version + done.stdout, GOLDEN / f"{name}.txt"
    if os.environ.get("HSA_COMPILE_ACCEPT"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    reviewed = golden.read_text()
    if not reviewed.startswith(version):
        pytest.skip(f"reviewed with {reviewed.splitlines()[0]}")
    lines = difflib.unified_diff(reviewed.splitlines(), text.splitlines(), "reviewed", "lowered", lineterm="", n=1)
    changes = list(lines)
    assert not changes, "\n".join(["HSA_COMPILE_ACCEPT=1 accepts this:", *changes[:60]])
