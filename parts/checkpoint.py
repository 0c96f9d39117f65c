"""A model's folder of safetensors, read strictly and written whole, and where weights go. Knows no
model.

Released checkpoints, transformers and this project share the layout: config.json, model.safetensors
or several of them with an index, generation_config.json, and the tokenizer's and the processor's
files beside them.
"""
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from parts.config import read_object

# --------------------------------------------------------------------------------------------------
# Where weights go


def device_of(name="", here=True):
    """The device of that name; without a name, cuda where there is one. Raises ValueError on a
    device that is not here, or with here=False only on a name that is none."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {name} is unknown: say cuda or cpu") from None
    if here and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch sees no GPU")
    return device


def dtype_of(name, device):
    """The dtype of that name; without a name, bfloat16 on cuda and float32 elsewhere."""
    return getattr(torch, name or ("bfloat16" if torch.device(device).type == "cuda" else "float32"))


# --------------------------------------------------------------------------------------------------
# Weights


def find_tensors(folder):
    """-> {name: (file, shape)} of every tensor in the folder, and a list of what is wrong with its
    files."""
    wrong, where, files = [], {}, ["model.safetensors"]
    if (index := Path(folder) / "model.safetensors.index.json").is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of file names")
        files = sorted(set(weight_map.values()))
    for file in files:
        path = Path(folder) / file
        if not path.is_file():
            wrong.append(f"missing file {file}")
            continue
        try:
            with safe_open(path, framework="pt") as f:
                where.update({n: (path, tuple(f.get_slice(n).get_shape())) for n in f.keys()})
        except Exception as error:               # safetensors' own error type is not a public class
            wrong.append(f"unreadable file {file} ({error})")
    return where, wrong


def read_weights(folder, shapes, dtype_for, device, tied=(), stored=lambda name: [name]):
    """-> {name: tensor} for `shapes` {name: shape}. Raises one ValueError that names all that is
    wrong.

    dtype_for(name) -> dtype, or None for the stored one. tied: (name, other) where `name` may stand
    in the files, and must then equal `other`. stored(name) -> the names in the files of the parts
    that make `name`, one after another in its first dimension. The files are mapped, not read: on
    the CPU and in the stored dtype the tensors *are* the mapping, and otherwise one at a time is
    converted.
    """
    where, wrong = find_tensors(folder)
    whole, tied = {name: stored(name) for name in shapes}, [stored(name)[0] for name in tied]
    owner = {n: name for name, parts in whole.items() for n in parts}
    shapes = {n: parted(shapes[name], len(whole[name])) for n, name in owner.items()}
    wrong += [f"missing tensor {n} {list(shapes[n])}" for n in shapes if n not in where]
    wrong += [f"unexpected tensor {n}" for n in where if n not in shapes and n not in tied]
    wrong += [f"{n} has shape {list(where[n][1])} where {list(shapes[n])} is needed"
              for n in shapes if n in where and where[n][1] != tuple(shapes[n])]
    if wrong:
        raise ValueError(f"{folder} does not hold this model, {len(wrong)} problem(s): " + "; ".join(wrong))
    state, kept = {}, {}
    for name in shapes:                         # reopened each time: closing drops the mapped pages
        file = where[name][0]
        with safe_open(file, framework="pt") as f:
            stored = f.get_tensor(name)
            state[name] = stored.to(device=device, dtype=dtype_for(owner[name]))
        if state[name] is stored:               # not converted: one lasting mapping serves them all
            kept[file] = kept.get(file) or safe_open(file, framework="pt")
            state[name] = kept[file].get_tensor(name)
        del stored
    if tied and tied[0] in where:
        with safe_open(where[tied[0]][0], framework="pt") as f:
            other = state[tied[1]]
            if not torch.equal(f.get_tensor(tied[0]).to(other), other):
                raise ValueError(f"{folder} has tie_word_embeddings, but an {tied[0]} other than its embeddings")
    return {name: state[parts[0]] if len(parts) == 1 else torch.cat([state[n] for n in parts])
            for name, parts in whole.items()}


def parted(shape, parts):
    return tuple(shape) if parts == 1 else (shape[0] // parts, *shape[1:])


def as_stored(state, stored):
    """The other way: {name: tensor} under the names in the files."""
    return {n: piece for name, t in state.items()
            for n, piece in zip(stored(name), [t] if len(stored(name)) == 1
                                else t.chunk(len(stored(name))))}


def write_folder(folder, config, state, shard_bytes):
    """config.json and safetensors of at most shard_bytes each. Each file appears whole or not at
    all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [[]], 0
    for name, t in state.items():
        if shards[-1] and size + t.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += t.nbytes
    names = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards):
        save_file({n: state[n].detach().cpu().contiguous() for n in shard}, folder / f"{file}.tmp",
                  metadata={"format": "pt"})
        os.replace(folder / f"{file}.tmp", folder / file)
    texts = {"config.json": config}
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = dict(
            metadata=dict(total_size=sum(t.nbytes for t in state.values())),
            weight_map={n: file for file, shard in zip(names, shards) for n in shard})
    for file, content in texts.items():
        (folder / f"{file}.tmp").write_text(json.dumps(content, indent=2) + "\n")
        os.replace(folder / f"{file}.tmp", folder / file)
    stale = [f for f in folder.iterdir() if f.name not in (*names, *texts)
             and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", f.name)]
    for file in sorted(stale, key=lambda f: f.suffix != ".json"):  # an index goes before its shards
        file.unlink()


COMPANIONS = ("tokenizer*", "preprocessor_config.json", "processor_config.json",
              "added_tokens.json", "generation_config.json", "chat_template*", "vocab.json", "merges.txt",
              "special_tokens_map.json", "video_preprocessor_config.json")


def copy_companions(source, folder):
    """The tokenizer, the processor's settings and the like, from one model's folder to another."""
    for pattern in COMPANIONS:
        for file in Path(source).glob(pattern):
            shutil.copy(file, Path(folder) / file.name)
