"""The folder of a run: a lock, a log, and checkpoints that survive a kill at any instant.

    .lock               who works here; held by the kernel until that process ends
    log.jsonl           a line a step
    step_N/state.pt     a checkpoint: the folder appears whole, then `latest` names it; the one
                        before is kept, for the day when the last one is damaged

What is wrong raises ValueError, and what the disk refuses OSError, with one sentence each.
"""
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError

# --------------------------------------------------------------------------------------------------
# The lock


def lock(out, make):
    """Keeps a folder for this process until the file that is returned is closed, or the process is
    dead, however it died. None where there is no such folder, unless it is to be made. Raises
    ValueError where another process has it."""
    if make:
        out.mkdir(parents=True, exist_ok=True)
    elif not out.is_dir():
        return None
    file = open(out / ".lock", "a+")
    try:
        import fcntl                                # not in Windows
        # Not flock, which data workers inherit: it would outlive the process by some seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if getattr(error, "errno", None) not in (errno.EACCES, errno.EAGAIN):
            print(f"{out} cannot be locked here ({error}): see to it that no other run writes into it")
            return file
        file.seek(0)
        raise ValueError(f"{out} is in use by {file.read().strip() or 'another process'}: wait until it "
                         "ends, or choose another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


# --------------------------------------------------------------------------------------------------
# What a run reads: has it changed?


def fingerprint(path, blocks=256, block=4096, small=2 ** 24):
    """sha256 (hex) of a file's length and content: all of it up to 16 MiB, beyond that 256 evenly
    spaced blocks of 4 KiB, the first and the last bytes among them.

    So terabytes cost a MiB of reading; what it misses in a large file is a change that keeps the
    length and lies between the blocks. Nor does it see what a file only names, as a sample's images.
    """
    size = os.path.getsize(path)
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= small:
            found.update(file.read())
        else:
            for k in range(blocks):
                file.seek(k * (size - block) // (blocks - 1))
                found.update(file.read(block))
    return found.hexdigest()


def files_of(path):
    """The files that a run reads when it is given this path: a model's folder, a recipe and its
    sources, or a file by itself."""
    path = Path(path)
    if path.is_dir():
        names = ("config.json", "tokenizer.json", "preprocessor_config.json")
        return [path / name for name in names if (path / name).is_file()] \
            + sorted(path.glob("model*.safetensors"))
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        recipe = path.suffix == ".json" and file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
    sources = json.loads(path.read_bytes())["sources"] if recipe else []
    return [path, *(path.parent / source["path"] for source in sources)]


def fingerprints(s):
    """{file: fingerprint} of what the settings `s` name and the run reads."""
    flags = ("data", "density_cache", "model", "teacher", "mixer")
    named = [getattr(s, flag, "") for flag in flags]
    paths = [name.rpartition(":")[0] if ".py:" in name else name for name in named if name]
    return {str(file): fingerprint(file) for path in paths for file in files_of(path)}


def refuse_changes(s, inputs, state):
    """Raises ValueError when the checkpoint `state` is of a run with other settings than `s` (of those
    that decide its end), or with other files than those of `inputs`."""
    began = {f.name: f.default for f in fields(s)} | state["settings"]      # new flags had defaults
    flags = {f.name: "--" + f.name.replace("_", "-") for f in fields(s) if f.metadata["decides"]}
    changed = [f"{flag} {began[name]} there, {getattr(s, name)} here"
               for name, flag in flags.items() if began[name] != getattr(s, name)]
    if changed:
        raise ValueError(f"{s.out} holds a run with other settings ({'; '.join(changed)}): go on "
                         "with those, or choose another --out")
    theirs = state.get("inputs", inputs)                  # older checkpoints have none
    if changed := [file for file in theirs | inputs if theirs.get(file) != inputs.get(file)]:
        others = " and another ".join(changed)
        raise ValueError(f"{s.out} holds a run that began with another {others}: go on with what was "
                         "there, or choose another --out")


# --------------------------------------------------------------------------------------------------
# The log and the checkpoints


def cut_log(out, size):
    """Makes the run's folder, and leaves the first `size` bytes of its log, or as many as it has."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "a") as f:
        f.truncate(min(size, f.tell()))


def append_log(out, entry):
    with writing(out / "log.jsonl", 200), open(out / "log.jsonl", "a") as f:
        f.write(json.dumps(entry) + "\n")


@contextmanager
def writing(path, size):
    """What the disk refuses inside becomes an OSError of one sentence, with the path and about how
    many bytes it needs."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch hides the system's error behind its own, safetensors has it in its text alone.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            why = cause.strerror or cause
        elif "os error" in str(error):
            why = error
        else:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path} cannot be written ({why}): it needs about {size:,} bytes, and {free:,} "
                      "are free. What was saved before stays, and the same command goes on from it"
                      ) from error


def write_text(path, text):
    """The file has all of the text or, killed on the way, all of what it had before."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def save_checkpoint(out, step, state):
    """Writes `state` as out/step_<step>. Whatever dies on the way, `latest` names a whole checkpoint.
    Where the disk refuses, what was half written is removed."""
    folder, temporary, latest = out / f"step_{step}", out / f"step_{step}.tmp", out / "latest"
    before = latest.read_text() if latest.exists() else ""
    if folder.name == before:                       # a stage border right after a save
        return
    try:
        with writing(folder, tensor_bytes(state)):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with open(temporary / "state.pt", "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            if folder.exists():                     # left by a run that died before `latest` moved
                shutil.rmtree(folder)
            os.rename(temporary, folder)
            write_text(latest, folder.name)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        (out / "latest.tmp").unlink(missing_ok=True)
        raise
    for old in out.glob("step_[0-9]*"):
        if old.name not in (folder.name, before):
            shutil.rmtree(old)


def tensor_bytes(state):
    """Of all tensors in nested dicts."""
    if isinstance(state, dict):
        return sum(map(tensor_bytes, state.values()))
    return state.nbytes if isinstance(state, torch.Tensor) else 0


def read_state(folder):
    """The checkpoint in a step's folder, mapped from its file rather than read."""
    return torch.load(folder / "state.pt", map_location="cpu", mmap=True, weights_only=True)


def damage(folder):
    """Why the checkpoint in this folder cannot be used, by reading all of it; "" if it can."""
    try:
        with zipfile.ZipFile(folder / "state.pt") as file:
            if wrong := file.testzip():             # torch writes a checksum with every tensor
                return f"the checksum of {wrong} is wrong"
        return "" if "parameters" in read_state(folder) else "it has no parameters"
    except FileNotFoundError:
        return "there is no state.pt"
    except Exception as error:                      # torn files let zipfile and torch raise anything
        return f"state.pt cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"


def find_checkpoint(out):
    """The folder of the last good checkpoint; None where no run began. Goes back to the one before
    if the last is damaged, and says so. Raises ValueError where there is nothing to go on from."""
    latest = out / "latest"
    if not latest.exists():
        if (out / "config.json").exists():
            raise ValueError(f"{out} holds a model that no run of this script began: choose "
                             "another --out")
        return None
    last = out / (latest.read_text(errors="replace").strip("\0\n ") or "step_?")
    others = [path for path in out.glob("step_[0-9]*") if path.name[5:].isdigit() and path != last]
    faults = []
    for folder in [last, *sorted(others, key=lambda path: -int(path.name[5:]))]:
        why = damage(folder)
        if not why:
            if faults:
                print(f"{out}: the checkpoint {'; '.join(faults)}; going back to {folder.name}")
                write_text(latest, folder.name)
            return folder
        faults.append(f"{folder.name} is damaged ({why})")
    raise ValueError(f"{out} has lost its last checkpoints: {'; '.join(faults)}; what is in it cannot "
                     "be gone on from; choose another --out")


def last_checkpoint(out):
    return read_state(out / (out / "latest").read_text())


# --------------------------------------------------------------------------------------------------
# Ctrl-C and SIGTERM


class Interruptible:
    """Inside, Ctrl-C and SIGTERM, which schedulers send before a kill, set `signal` instead of
    ending the process, so that a step can be finished and saved. A second one ends it at once."""

    def __init__(self, says):
        self.says, self.signal, self.since = says, 0, 0.0

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():            # only there are signals
            self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        # The same request may come twice, from the terminal or scheduler and again from torchrun.
        if self.signal and time.monotonic() - self.since > 1:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            if self.says:
                os.write(2, b"\nstopping after this step; once more ends at once\n")

    def end(self, step, out):
        """Ends the process, after this step was saved, with the code that is usual for its signal."""
        if self.says:
            print(f"stopped after step {step}, which is saved in {out}: the same command goes on "
                  "from there", file=sys.stderr)
        sys.exit(128 + (self.signal or signal.SIGTERM))              # another rank may have got it


def ignore_signals(worker):
    """For data workers, which get what is sent to the whole process group: the step still needs their
    batches. Their parent tells them when to end, and they end when it is dead."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
