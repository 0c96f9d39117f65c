"""One score per position of a corpus, in 4 bits: a safetensors file that serves many runs (B.2).

`density.py --cache` writes rho of Eq. 2, `distill.py --write-cache` the gradient scores of Eq. 7,
between each sample's own minimum and maximum. Not w, so text, tau and beta stay free.

    sample  (n,)     first 8 bytes of the sha256 of the sample's id
    image   (n, 16)  half the sha256 of what the scores were computed from
    range   (n, 3)   minimum, maximum, and the mean before rounding: what beta multiplies
    place   (n, 4)   first byte in `packed`, number of scores, first row in `grids`, their number
    crc     (n,)     CRC-32 of all else that belongs to the sample
    grids   (k, 3)   t, h, w in patches of every image
    packed  (bytes,) two scores a byte, the first in the lower half
"""
import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

VERSION, OLD = "2", b"HEEDrho4"               # OLD: how files of version 1 begin
LEVELS = 15                                   # steps from a sample's minimum to its maximum
COLUMNS = dict(sample="<i8", image="(16,)u1", range="(3,)<f4", place="(4,)<i8", grids="(3,)<i4",
               packed="u1", crc="<i8")
KINDS = {     # what a record's `image` is the hash of, what has one score, what writes such a file
    "density": ("the image's bytes", "visual tokens", "python density.py --cache"),
    "fisher": ("images, tokens or labels", "positions",
               "python distill.py --cond c5 --write-cache"),
}


class CacheError(ValueError):
    """A cache that is damaged or belongs to something else. Names file, sample and what differs."""


# ---- What a file must agree with -----------------------------------------------------------------

def fingerprint(weights, preprocessing):
    """sha256 (hex) of what decides scores besides the sample: weights (module or state dict) with
    their names, dtypes and shapes, and settings (dict). A tower in bf16 is not the one in fp32."""
    state = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    total = hashlib.sha256(json.dumps(preprocessing, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def tower_fingerprint(teacher, processor):
    """What decides rho besides the image: the vision tower, and how the processor feeds it."""
    settings = {name: getattr(processor, name) for name in processor.DECIDES}
    return fingerprint(teacher.visual, settings | {"table": processor.table.tolist()})


def image_sha(images):
    """sha256 (hex) over images in order: the bytes of files, the pixels of PIL images."""
    total = hashlib.sha256()
    for image in images:
        drawn = isinstance(image, Image.Image)
        drawing = drawn and f"{image.mode}{image.size}".encode() + image.tobytes()
        data = drawing or Path(image).read_bytes()
        total.update(hashlib.sha256(data).digest())       # one digest each, so no border can move
    return total.hexdigest()


def contents(sample, encoded, kind):
    """sha256 (hex) of what scores are made from: images, for gradients tokens and labels too."""
    images = image_sha(sample.images) if sample.images else ""
    if kind == "density":
        return images
    rows = torch.stack([encoded.ids, encoded.labels])
    return hashlib.sha256(images.encode() + rows.numpy().tobytes()).hexdigest()


def sample_key(sample_id):
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little", signed=True)


def image_key(sha):
    """sha: hex or bytes -> (16,) uint8, filled up with zeros."""
    sha = bytes.fromhex(sha) if isinstance(sha, str) else sha
    return np.frombuffer(sha[:16].ljust(16, b"\0"), "u1")


def grid_rows(grids):
    return np.asarray([] if grids is None else grids, np.int32).reshape(-1, 3)


def checksum(*parts):
    return zlib.crc32(b"".join(np.asarray(part).tobytes() for part in parts))


# ---- Four bits, written and read -----------------------------------------------------------------

def quantise(values):
    """values (n,) -> levels (n,) uint8 in 0..15, low, high. Both extremes survive exactly."""
    low, high = values.min(), values.max()
    step = (high - low).clamp(min=1e-30) / LEVELS
    return ((values - low) / step).round().to(torch.uint8), low.item(), high.item()


def dequantise(levels, low, high):
    """Inverse of quantise, to within half a step: |error| <= (high - low) / 30."""
    return torch.lerp(torch.tensor(low), torch.tensor(high), levels.float() / LEVELS)


def write_cache(path, records, fingerprint, kind="density"):
    """Writes a cache in one pass over records of (sample_id, image_sha, grids (k, 3) or None, values
    (n,)); it takes its name only when it is whole. Raises CacheError for two samples of one id, and
    for values that are missing, not finite or (fisher) negative."""
    columns, keys = {name: bytearray() for name in COLUMNS}, set()
    for sample_id, sha, grids, values in records:
        key, grids = sample_key(sample_id), grid_rows(grids)
        values = torch.as_tensor(values).detach().float().cpu().flatten()
        usable = len(values) and torch.isfinite(values).all()
        if not usable or kind == "fisher" and values.min() < 0:
            raise CacheError(f"sample {sample_id!r}: {len(values)} values, not all usable as {kind}")
        if key in keys:
            raise CacheError(f"{path}: two samples have the id {sample_id!r}")
        keys.add(key)
        mean = values.mean()
        # Even steps of what goes through exp(), as rho does, are even ratios of w. Gradient scores
        # are weights already (Eq. 7): so their logarithm is kept, down to 1e-4 of the largest.
        if kind == "fisher":
            values = values.clamp(min=max(1e-4 * values.max().item(), 1e-30)).log()
        levels, low, high = quantise(values)
        pairs = F.pad(levels, (0, len(levels) % 2)).view(-1, 2)
        place = [len(columns["packed"]), len(values), len(columns["grids"]) // 12, len(grids)]
        row = [np.int64(key), image_key(sha), np.float32([low, high, mean]), np.int64(place), grids,
               (pairs[:, 0] | pairs[:, 1] << 4).numpy()]
        for name, field in zip(COLUMNS, [*row, np.int64(checksum(*row))]):
            columns[name] += field.tobytes()
    tables = {name: np.frombuffer(columns[name], dtype) for name, dtype in COLUMNS.items()}
    head = dict(version=VERSION, kind=kind, fingerprint=fingerprint)
    head["crc"] = str(checksum(*head.values(), tables["sample"]))
    partial = Path(f"{path}.partial")
    try:
        partial.write_bytes(save(tables, head))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Cache:
    """A cache opened for reading. The file is mapped: a lookup touches one record, and processes of
    one machine share what they touch. Opening checks head, size and the table of samples, `record`
    the record it reads; both raise CacheError."""

    def __init__(self, path, fingerprint, kind="density"):
        self.path, self.fingerprint, self.kind = Path(path), fingerprint, kind
        self.content, self.unit, command = KINDS[kind]
        try:
            with open(path, "rb") as file:
                if file.read(len(OLD)) == OLD:
                    raise CacheError(f"{path} has the format of an earlier version: write it anew with "
                                     f"`{command}`")
            file = safe_open(path, "pt")
            head = file.metadata() or {}
            if head.keys() != {"version", "kind", "fingerprint", "crc"}:
                raise CacheError(f"{path} is not a {kind} cache")
            self.columns = {name: file.get_tensor(name).numpy() for name in COLUMNS}
        except SafetensorError as error:
            raise CacheError(f"{path} is truncated or grown, or its head is damaged ({error})") from None
        version, found, made_with = head["version"], head["kind"], head["fingerprint"]
        sample = self.columns["sample"]
        if str(checksum(version, found, made_with, sample)) != head["crc"]:
            raise CacheError(f"{path}: the head is damaged (CRC)")
        if (version, found) != (VERSION, kind):
            raise CacheError(f"{path} holds {found} values, version {version}; wanted {kind}, {VERSION}")
        if made_with != fingerprint:
            raise CacheError(f"{path} was made with another model or preprocessing: "
                             f"fingerprint {made_with[:12]}, this run has {fingerprint[:12]}")
        self.order, self.n_records = sample.argsort(), len(sample)
        self.n_values = int(self.columns["place"][:, 1].sum())

    def __reduce__(self):                                 # a data worker maps the file itself
        return Cache, (self.path, self.fingerprint, self.kind)

    def record(self, sample_id, image_sha, grids):
        """-> one sample's values (n,) fp32, and their mean as it was before rounding. Raises
        CacheError if it is missing, damaged, or of another image or grid."""
        where, key = f"{self.path}, sample {sample_id!r}", sample_key(sample_id)
        c = self.columns
        found = self.order[np.searchsorted(c["sample"], key, sorter=self.order):][:1]
        if c["sample"][found].tolist() != [key]:
            raise CacheError(f"{where}: not in the cache")
        i = found[0]
        first, count, image, images = c["place"][i].tolist()
        grid, packed = c["grids"][image:image + images], c["packed"][first:first + (count + 1) // 2]
        row = [c[name][i] for name in ("sample", "image", "range", "place")]
        if checksum(*row, grid, packed) != c["crc"][i]:
            raise CacheError(f"{where}: the record is damaged (CRC)")
        if not np.array_equal(c["image"][i], image_key(image_sha)):
            raise CacheError(f"{where}: {self.content} are not those the cache was made from")
        if not np.array_equal(grid, grid_rows(grids)):
            stored, here = (list(map(tuple, rows.tolist())) for rows in (grid, grid_rows(grids)))
            raise CacheError(f"{where}: made at grids {stored}, this run has {here}")
        low, high, mean = c["range"][i].tolist()
        levels = torch.from_numpy(np.stack([packed & 15, packed >> 4], axis=1).ravel()[:count])
        values = dequantise(levels, low, high)
        return values.exp() if self.kind == "fisher" else values, mean

    def bytes_per_value(self):
        """File size over stored values, with head and tables (the paper: 500 MB / 360 M = 1.39)."""
        return self.path.stat().st_size / max(self.n_values, 1)

    def __str__(self):
        return (f"{self.path}: {self.n_records} samples, {self.n_values} {self.unit}, "
                f"{self.bytes_per_value():.3f} bytes each")
