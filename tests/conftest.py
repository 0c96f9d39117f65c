"""Puts the project root on the import path, and uses one thread unless OMP_NUM_THREADS says otherwise."""
import os
import sys
from pathlib import Path

if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"                   # inherited by the processes that tests start

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (after the thread count is set)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
