"""The folder of a run: its log, and checkpoints that survive a kill at any instant.

    log.jsonl           a line a step
    step_N/state.pt     a checkpoint: the folder appears whole, then `latest` names it; the one before is kept
"""
import os
import shutil
import sys

import torch


def cut_log(out, size):
    """Makes the run's folder, and leaves the first `size` bytes of its log, or as many as there are."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "a") as f:
        f.truncate(min(size, f.tell()))


def save_checkpoint(out, step, state):
    """Writes `state` as out/step_<step>; whatever dies on the way, `latest` names a whole checkpoint."""
    folder, temporary, latest = out / f"step_{step}", out / f"step_{step}.tmp", out / "latest"
    before = latest.read_text() if latest.exists() else ""
    if folder.name == before:                             # a stage border right after a save: nothing is new
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with open(temporary / "state.pt", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    if folder.exists():                                   # left by a run that died before `latest` moved
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    with open(out / "latest.tmp", "w") as f:
        f.write(folder.name)
        f.flush()
        os.fsync(f.fileno())
    os.replace(out / "latest.tmp", latest)
    for old in out.glob("step_[0-9]*"):
        if old.name not in (folder.name, before):
            shutil.rmtree(old)


def load_checkpoint(out):
    """The state that `latest` names, mapped from its file rather than read; None where no run began.
    Exits where the folder holds something else than a run that can be gone on from."""
    if not (out / "latest").exists():
        if (out / "config.json").exists():
            sys.exit(f"{out} holds a model that no run of this script began: choose another --out")
        return None
    file = out / (out / "latest").read_text() / "state.pt"
    if not file.is_file():
        sys.exit(f"{out} has lost its last checkpoint: what is in it cannot be gone on from; choose "
                 "another --out")
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
