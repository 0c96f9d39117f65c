"""All tests run on the CPU, whose numbers they check, except those marked `gpu`, which need one and skip without.

On a machine with a GPU, scripts under test would choose it by default: here they do not see it, nor do their children.
"""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GPU = torch.cuda.is_available()
if GPU:
    torch.cuda.init()                                     # this process has seen it; what it starts will not
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.cuda.is_available = lambda: False


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    if request.node.get_closest_marker("gpu"):
        if not GPU:
            pytest.skip("needs a GPU")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
