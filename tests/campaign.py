"""An attack that takes as long as it is given: killed runs, mutated inputs. Not collected by pytest; the suite has seeded parts.

    python tests/campaign.py --kills 100 --mutations 1000 --seed 0

A kill: `kill -9` at a random instant of a distillation, an SFT or a DPO run on the embedded world, then the same command; the log and
the weights must be those of a run that nobody killed, to the bit. A mutation: one line of data, one recipe or one config.json
with a field missing, of another type or beyond reason; it must be read, or refused in one sentence that names the file.
"""
import argparse
import copy
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import read_data  # noqa: E402  (after the root is on the path)
from formats import BadSample  # noqa: E402
from parts.config import Config  # noqa: E402

ODD = [None, -1, 0, 2.5, True, "", "x", "<image>", [], [None], [[]], {}, {"a": 1}, 10 ** 400, "1e400", "\ud800", ["a", 1]]
LINES = [
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "4.95"}]},
    {"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                                       {"role": "assistant", "content": [{"type": "text", "text": "tea"}]}]},
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "tea"}]},
    {"question": "What?", "answers": ["tea"], "image": "a.png"},
    {"question": "What?", "choices": ["tea", "milk"], "answer": 1, "image": "a.png"},
    {"question": "What?", "image": "a.png", "chosen": "tea", "rejected": "milk"},
    {"text": "Some running text."},
]


def paths(node, at=()):
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*at, key)
        yield from paths(value, (*at, key))


def mutated(value, rng):
    """A copy with one place gone, or another thing in it."""
    new = copy.deepcopy(value)
    place = rng.choice(list(paths(new)))
    parent = new
    for key in place[:-1]:
        parent = parent[key]
    if rng.random() < 0.2:
        del parent[place[-1]]
    else:
        parent[place[-1]] = rng.choice(ODD)
    return new


def attack_inputs(count, rng, folder):
    """-> how many were read, how many refused. Any other exception is a fault, and is raised."""
    from PIL import Image
    Image.new("RGB", (64, 64), "white").save(folder / "a.png")
    config, seen = json.loads((ROOT / "tiny" / "config.json").read_text()), {"read": 0, "refused": 0}
    good = folder / "good.jsonl"
    good.write_text(json.dumps(LINES[0]) + "\n")
    recipe = {"sources": [{"name": "a", "path": str(good), "weight": 2.0}, {"name": "b", "path": str(good), "weight": 1.0}]}
    for n in range(count):
        kind = n % 4
        try:
            if kind < 2:
                path = folder / "data.jsonl"
                path.write_text(json.dumps(mutated(rng.choice(LINES), rng)) + "\n")
                read_data(path)[0]
            elif kind == 2:
                path = folder / "mix.json"
                path.write_text(json.dumps(mutated(recipe, rng)))
                read_data(path)[0]
            else:
                path = folder / "config.json"
                path.write_text(json.dumps(mutated(config, rng)))
                Config.from_folder(folder)
            seen["read"] += 1
        except (BadSample, ValueError, OSError) as error:
            said = str(error)
            assert "\n" not in said and (path.name in said or "good.jsonl" in said or str(folder) in said), (path.read_text(), said)
            seen["refused"] += 1
    return seen


def digest(out):
    return [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("log.jsonl", "model.safetensors")]


def attack_runs(count, rng, folder):
    """-> how many kills hit a living run. Every resumed run must end as the one that was let be."""
    common = ["--questions", "0", "--threads", "1", "--save-every", "2"]
    commands = {"distill": ["distill.py", "--cond", "c4", "--tokens", "15000", *common],
                "sft": ["sft_dpo.py", "sft", "--model", str(folder / "distill"), "--tokens", "8000", *common],
                "dpo": ["sft_dpo.py", "dpo", "--model", str(folder / "sft"), "--tokens", "15000", *common]}
    whole, took, hits = {}, {}, 0
    for name, words in commands.items():
        begin = time.monotonic()
        subprocess.run([sys.executable, *words, "--out", folder / name], cwd=ROOT, check=True, capture_output=True)
        whole[name], took[name] = digest(folder / name), time.monotonic() - begin
    while hits < count:
        name = rng.choice(list(commands))
        out, alive = folder / "killed", True
        shutil.rmtree(out, ignore_errors=True)
        while alive:                                      # several kills of one run, until it gets through
            with subprocess.Popen([sys.executable, *commands[name], "--out", out], cwd=ROOT, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True) as run:
                try:
                    run.communicate(timeout=rng.uniform(0.3, 1.2) * took[name])
                    alive = False
                    assert run.returncode == 0
                except subprocess.TimeoutExpired:
                    run.kill()
                    hits += 1
        assert digest(out) == whole[name], f"{name} did not end with the same bits"
        print(f"{hits} kills", flush=True)
    return hits


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--mutations", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = attack_inputs(a.mutations, random.Random(a.seed), Path(folder))
        print(f"{a.mutations} mutations: {seen['read']} read, {seen['refused']} refused in a sentence, no traceback")
        print(f"{attack_runs(a.kills, random.Random(a.seed), Path(folder))} kills, all resumed to the same bits")


if __name__ == "__main__":
    main()
