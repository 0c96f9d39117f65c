"""The project's root on the import path, one thread unless OMP_NUM_THREADS says otherwise, and the CPU for all tests.

The tests check CPU numbers, except those marked `gpu`, which need one and skip without. On a machine with a GPU the
scripts under test would choose it by default: here they do not see it, nor do the processes that tests start.
"""
import os
import sys
from pathlib import Path

import pytest

if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"                   # inherited by the processes that tests start

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (after the thread count is set)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

HIDDEN = "HEED_TESTS_HIDE"                                # from the processes of a parallel run, which are no scripts
if HIDDEN in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[HIDDEN]
GPU = torch.cuda.is_available()
if GPU:
    torch.cuda.init()                                     # this process has seen it; those it starts will not
    os.environ[HIDDEN] = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.cuda.is_available = lambda: False


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    if request.node.get_closest_marker("gpu"):
        if not GPU:
            pytest.skip("needs a GPU")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ[HIDDEN])
