"""The chunked scan side by side: ours, state-spaces' ssd_minimal_discrete, transformers' stand-in for the kernel.

    python bench.py scan --ssd-minimal PATH/ssd_minimal.py          # time and memory, forward + backward
    python bench.py scan --growth                                   # time(2T) / time(T) of ours up to 131,072

ssd_minimal.py is mamba_ssm/modules/ssd_minimal.py of github.com/state-spaces/mamba, read from where you keep
it; transformers is imported. Without one of them its rows are left out. Each runs with chunks of 64, 128 and
256. Times are the thread's processor time, the least of `--repeats` rounds in which all take turns, so that a
busy machine is unfair to none; peak memory is what a run adds to its inputs, in a fresh process (Linux only).
"""
import argparse
import json
import os
import subprocess
import sys
import time
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402  (after the number of threads is set)
import torch.nn.functional as F  # noqa: E402

from mamba2 import ssd  # noqa: E402


def ours(chunk, path=None):
    return lambda x, dt, A, B, C: ssd(x, dt, A, B, C, chunk=chunk)[0]


def minimal(chunk, path):
    """The listing as a module; the fused kernel it imports for its own test is stubbed if absent."""
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"):
        sys.modules.setdefault(name, types.ModuleType(name)).mamba_chunk_scan_combined = None
    module = types.ModuleType("ssd_minimal")
    with open(path) as file:
        exec(compile(file.read(), path, "exec"), module.__dict__)

    def run(x, dt, A, B, C):
        B = B.repeat_interleave(x.shape[2] // B.shape[2], 2)
        pad = -x.shape[1] % chunk                                      # the listing wants whole chunks
        X, A, B, C = (F.pad(z, (0, 0) * (z.dim() - 2) + (0, pad)) for z in (x * dt[..., None], dt * A, B, C))
        return module.ssd_minimal_discrete(X, A, B, C, chunk)[0][:, :x.shape[1]]
    return run


def fallback(chunk, path=None):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    scan = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
    return lambda x, dt, A, B, C: scan(x, dt, A, B, C, chunk)


ROWS = {                                                      # how to make the function, chunk sizes to try
    "ours": (ours, (None,)),
    "ssd_minimal": (minimal, (64, 128, 256)),
    "transformers": (fallback, (64, 128, 256)),
}


def inputs(T, opt):
    """As many groups as heads, as the listing wants it; decays from quick to slow."""
    torch.manual_seed(0)
    x, B, C = (torch.randn(opt.batch, T, opt.H, opt.P) for _ in range(3))
    dt = F.softplus(torch.randn(opt.batch, T, opt.H) - 4)
    return [z.requires_grad_() for z in (x, dt, -torch.exp(torch.rand(opt.H)), B, C / opt.P ** 0.5)]


def once(f, args, weight):
    start = time.thread_time()
    f(*args).backward(weight)
    for z in args:
        z.grad = None
    return time.thread_time() - start


def peak_memory(row, chunk, opt):
    """Bytes that one forward and backward adds in a fresh process."""
    command = [sys.executable, __file__, "scan", "--memory-of", row, "--T", opt.T, "--H", opt.H, "--P", opt.P,
               "--batch", opt.batch, *(["--chunk", chunk] if chunk else []),
               *(["--ssd-minimal", opt.ssd_minimal] if opt.ssd_minimal else [])]
    return json.loads(subprocess.run([str(c) for c in command], check=True, capture_output=True).stdout)


def resident(field):
    """VmRSS (now) or VmHWM (the most since the last reset) of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def measure_memory(opt):
    f, args = ROWS[opt.memory_of][0](opt.chunk, opt.ssd_minimal), inputs(opt.T, opt)
    weight = torch.randn_like(args[0])
    once(f, inputs(64, opt), weight[:, :64])                   # loads code and allocates scratch once
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = resident("VmRSS")
    once(f, args, weight)
    print(resident("VmHWM") - before)


def compare(opt):
    args = inputs(opt.T, opt)
    weight = torch.randn_like(args[0])
    runs = {}
    for row, (make, chunks) in ROWS.items():
        try:
            runs.update({(row, chunk): make(chunk, opt.ssd_minimal) for chunk in chunks})
        except (ImportError, TypeError) as missing:
            print(f"{row}: left out ({missing})")
    reference = runs["ours", None](*args).detach()
    best = {key: float("inf") for key in runs}
    for _ in range(opt.repeats):
        for key, f in runs.items():
            best[key] = min(best[key], once(f, args, weight))
    print(f"B={opt.batch} T={opt.T} H={opt.H} P=N={opt.P} fp32, one thread, forward + backward")
    print(f"{'':14}{'chunk':>6}{'ms':>8}{'x ours':>8}{'MB':>8}{'x ours':>8}{'difference':>12}")
    memory = {key: peak_memory(*key, opt) for key in runs}
    for key, f in runs.items():
        with torch.no_grad():
            difference = ((f(*args) - reference).norm() / reference.norm()).item()
        print(f"{key[0]:14}{key[1] or 'own':>6}{1e3 * best[key]:8.0f}{best[key] / best['ours', None]:8.2f}"
              f"{memory[key] / 1e6:8.0f}{memory[key] / memory['ours', None]:8.2f}{difference:12.1e}")


def growth(opt):
    lengths = [2 ** k for k in range(12, 18)]
    best = dict.fromkeys(lengths, float("inf"))
    for _ in range(opt.repeats):
        for T in lengths:
            args = inputs(T, opt)
            best[T] = min(best[T], once(ours(None), args, torch.randn_like(args[0])))
    for T in lengths:
        print(f"T={T:>7} {1e3 * best[T]:8.0f} ms" + (
            f"   time(2T) / time(T) = {best[T] / best[T // 2]:.2f}" if T // 2 in best else ""))


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(required=True)
    parser = commands.add_parser("scan", description=__doc__, formatter_class=raw)
    parser.add_argument("--T", type=int, default=16384)
    parser.add_argument("--H", type=int, default=8)
    parser.add_argument("--P", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ssd-minimal", metavar="PATH")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--memory-of", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    opt = top.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    (measure_memory if opt.memory_of else growth if opt.growth else compare)(opt)
