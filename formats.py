"""What published files look like: one line of any of them becomes a Sample (App. C.3 to C.5).

    line of a file --a reader of FORMATS--> Sample       JSONL: a file as a sequence of samples
    recipe of files --read_recipe--> files, weights      convert: parquet to JSONL and image files

A format is one function and one row of FORMATS. What cannot be used raises BadSample: one sentence
that names file and line. Nothing ever stands in for a bad sample. data.py makes batches of samples.
"""
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

# Table 12: samples by source. A recipe that uses these names needs no weights of its own.
TABLE12 = {"fineweb-edu": 600_000, "dclm": 200_000, "grit": 200_000, "llava-onevision": 100_000,
           "cambrian-ocr": 80_000, "sharegpt-4o": 50_000, "synthdog": 50_000,
           "benchmark-train": 50_000, "obelics": 10_000}


ROLES = ("system", "user", "assistant", "document")


class BadSample(Exception):
    """A sample that cannot be used; the message is one sentence with the file's name and line."""


class NoPreference(BadSample):
    """Rated answers of which none is better, or that do not fit within the caps beside their
    prompt: not broken, but no pair either. loader() leaves it out and does not count it."""


def is_text(part):
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def has_half_surrogate(text):
    """A cut emoji leaves half of a surrogate pair behind: JSON may hold it, no encoding can."""
    return any("\ud800" <= c <= "\udfff" for c in text)


@dataclass
class Sample:
    """One example. `messages` is [{"role", "content"}] with content a list of {"type": "image"} and
    {"type": "text", "text": str}; the image parts consume `images` in order. Running text has the
    single role "document": no template, every text token supervised. For DPO `messages` ends with
    the user's turn, and `chosen` and `rejected` are the contents of two answers to it. Raises
    BadSample on what the template has no place for."""
    id: str
    messages: list
    images: list = field(default_factory=list)   # paths or PIL images; length() takes (width, height)
    source: str = ""                             # which data set, for the log
    chosen: list | None = None
    rejected: list | None = None
    where: str = ""                              # "train.jsonl line 7", for complaints

    def __post_init__(self):
        if complaint := self.complaint():
            raise BadSample(f"{self.where or self.id} has {complaint}.")

    def complaint(self):
        """What the template has no place for, as the end of a sentence, or None."""
        markers = 0
        for message in self.messages:
            role, parts = message["role"], message["content"]
            if role not in ROLES:
                return f"the unknown role {role!r}"
            if not all(part["type"] == "image" or is_text(part) for part in parts):
                return "a content part that is neither text nor image"
            shown = sum(part["type"] == "image" for part in parts)
            if shown and role in ("system", "assistant"):
                return f"an image in the {role}'s turn; only a user shows one"
            markers += shown
        if (self.chosen is None) != (self.rejected is None):
            return "one of chosen and rejected without the other"
        answers = [*(self.chosen or ()), *(self.rejected or ())]
        if not all(map(is_text, answers)):
            return "a chosen or rejected answer that is not text"
        parts = [part for message in self.messages for part in message["content"]] + answers
        if any(has_half_surrogate(part.get("text", "")) for part in parts):
            return "text that is not Unicode (half of a surrogate pair)"
        if not self.messages or markers != len(self.images):
            return (f"{len(self.messages)} messages with {markers} image markers, and "
                    f"{len(self.images)} images")

    def answered(self, content):
        """The prompt with an assistant's answer, e.g. sample.answered(sample.chosen)."""
        messages = self.messages + [{"role": "assistant", "content": content}]
        return replace(self, messages=messages, chosen=None, rejected=None)

    def rows(self):
        """The rows this makes in a batch: itself, or the chosen and the rejected answer of a
        pair."""
        if self.chosen is None:
            return [self]
        return [self.answered(self.chosen), self.answered(self.rejected)]


# --------------------------------------------------------------------------------------------------
# Parts of a sample

def texts(string):
    return [{"type": "text", "text": string}]


def content_parts(string, images=()):
    """Text with <image> markers -> content parts; `images` that no marker mentions come first."""
    pieces = string.split("<image>")
    parts = [{"type": "image"} for _ in images] if len(pieces) == 1 else []
    for k, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (k > 0) + (texts(piece) if piece else [])
    return parts


def strip_separators(string):
    """LLaVA puts a line break between <image> and the question: a separator, not text."""
    return string.replace("<image>\n", "<image>").replace("\n<image>", "<image>")


def as_list(value):
    """A field that holds nothing, one thing or a list of things -> a list."""
    return value if isinstance(value, list) else [value] if value else []


def check_fields(fields, allowed, what, required=()):
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(f"unknown field {', '.join(unknown)} in {what}")
    if missing := sorted(set(required) - set(fields)):
        raise ValueError(f"no field {', '.join(missing)} in {what}")


# --------------------------------------------------------------------------------------------------
# Readers: the fields of one line -> the fields of a Sample

def read_messages(row):
    """The native format, where text is in parts and only text; and Qwen's and LLaMA-Factory's,
    where content is a string with <image> markers, or an image part carries its own path.
    UltraChat repeats its prompt."""
    check_fields(row, ("id", "source", "images", "messages", "chosen", "rejected", "prompt",
                       "prompt_id"), "the sample")
    images, messages = list(as_list(row.get("images"))), []
    for message in row["messages"]:
        check_fields(message, ("role", "content"), "a message")
        parts = message["content"]
        parts = content_parts(parts) if isinstance(parts, str) else parts
        for part in parts:
            own = "text" if part["type"] == "text" else "image"
            check_fields(part, ("type", own), "a content part")
        images += [part["image"] for part in parts if "image" in part]
        parts = [{key: part[key] for key in part if key != "image"} for part in parts]
        messages.append({"role": message["role"], "content": parts})
    answers = {key: texts(row[key]) if isinstance(row[key], str) else row[key]
               for key in ("chosen", "rejected") if row.get(key) is not None}
    return dict(messages=messages, images=images, **answers)


def read_llava(row):
    """LLaVA's {"from", "value"}: LLaVA-OneVision, Cambrian, ShareGPT-4o, and LLaMA-Factory's
    pairs."""
    roles = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES[:3]}
    system = [{"role": "system", "content": texts(row["system"])}] if row.get("system") else []
    turns = [{"role": roles[turn["from"]], "content": content_parts(strip_separators(turn["value"]))}
             for turn in row["conversations"]]
    answers = {key: texts(row[key]["value"]) for key in ("chosen", "rejected")
               if row.get(key) is not None}
    images = as_list(row.get("image")) or as_list(row.get("images"))
    return dict(images=images, messages=system + turns, **answers)


def read_mmpr(row):
    images = as_list(row.get("image"))
    question = content_parts(strip_separators(row["question"]), images)
    return dict(messages=[{"role": "user", "content": question}], images=images,
                chosen=texts(row["chosen"]), rejected=texts(row["rejected"]))


def read_rlhfv(row):
    """RLHF-V: the text column is itself JSON with question, chosen and rejected."""
    return read_mmpr(json.loads(row["text"]) | {"image": row.get("image") or row["image_path"]})


def read_vlfeedback(row):
    """VLFeedback, and UltraFeedback before it was binarised: several answers, each rated on several
    aspects; the best mean against the worst."""
    answers, rated = row["completions"], []
    if isinstance(answers, dict):                          # records may be stored as columns
        answers = [dict(zip(answers, values)) for values in zip(*answers.values())]
    for k, answer in enumerate(answers):
        marks = [str(aspect.get("Rating")) for aspect in answer["annotations"].values()]
        marks = [float(mark) for mark in marks if mark.replace(".", "", 1).isdigit()]  # not "N/A"
        if marks:
            rated.append((sum(marks) / len(marks), -k, answer["response"]))
    if not rated or max(rated)[0] == min(rated)[0]:
        raise NoPreference("has no answer that is rated better than another")
    return read_mmpr({"question": row.get("prompt") or row["instruction"],
                      "image": row.get("image") or row.get("img_path"),
                      "chosen": max(rated)[2], "rejected": min(rated)[2]})


def read_ultrafeedback(row):
    """UltraFeedback, binarised: two conversations that differ in their last message."""
    chosen, rejected = ([{"role": m["role"], "content": texts(m["content"])} for m in row[key]]
                        for key in ("chosen", "rejected"))
    if any("<image>" in message["content"][0]["text"] for message in chosen):
        raise ValueError("a conversation as chosen and as rejected is text alone, but has <image>")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected answer different prompts")
    if chosen[-1] == rejected[-1]:
        raise NoPreference("has the same answer as chosen and as rejected")
    return dict(messages=chosen[:-1], chosen=chosen[-1]["content"],
                rejected=rejected[-1]["content"])


def read_interleaved(row):
    """OBELICS: two lists of one length, with a text or an image (here a path) at each place."""
    parts, images = [], []
    for text, image in zip(row["texts"], row["images"], strict=True):
        if text:
            parts += texts(text)
        elif image:
            parts.append({"type": "image"})
            images.append(image)
    return dict(messages=[{"role": "document", "content": parts}], images=images)


def one_question(row, question, answer):
    images = as_list(row["image"])
    messages = [{"role": "user", "content": content_parts(question, images)},
                {"role": "assistant", "content": texts(answer)}]
    return dict(images=images, messages=messages)


def read_vqa(row):
    """DocVQA, TextVQA, InfoVQA: a question and its accepted answers, of which the first is
    taken."""
    answers = as_list(row.get("answers")) or as_list(row["answer"])
    return one_question(row, row["question"], answers[0])


def read_choices(row):
    """AI2D: options, and the number of the right one. The answer is its letter, as evaluate.py asks
    for it."""
    options = [f"{chr(65 + i)}. {option}" for i, option in enumerate(row["options"])]
    if not 0 <= (right := int(row["answer"])) < len(options):
        raise ValueError(f"the answer {row['answer']} is none of {len(options)} options")
    hint = "Answer with the option's letter from the given choices directly."
    return one_question(row, "\n".join([row["question"], *options, hint]), chr(65 + right))


def read_chartqa(row):
    return one_question(row, row["query"], as_list(row["label"])[0])


def read_synthdog(row):
    """SynthDoG: a page and all that is written on it, in JSON."""
    written = json.loads(row["ground_truth"])["gt_parse"]["text_sequence"]
    return one_question(row, "<image>Read all the text in the image.", written)


def read_text(row):
    """FineWeb-Edu, DCLM: running text without a template; every token is supervised, its end
    too."""
    return dict(messages=[{"role": "document", "content": texts(row["text"])}])


# A line is read by the first row of this table whose columns it has. Published files carry further
# columns, which are ignored; the `messages` formats are strict.
FORMATS = [
    ({"prompt", "chosen", "rejected"}, read_ultrafeedback),     # its messages repeat the chosen ones
    ({"messages"}, read_messages),
    ({"conversations"}, read_llava),
    ({"prompt", "completions"}, read_vlfeedback),
    ({"instruction", "completions"}, read_vlfeedback),
    ({"question", "chosen", "rejected"}, read_mmpr),
    ({"chosen", "rejected"}, read_ultrafeedback),
    ({"question", "image", "options", "answer"}, read_choices),
    ({"query", "image", "label"}, read_chartqa),
    ({"question", "image", "answers"}, read_vqa),
    ({"question", "image", "answer"}, read_vqa),
    ({"image", "ground_truth"}, read_synthdog),
    ({"text", "image"}, read_rlhfv),
    ({"text", "image_path"}, read_rlhfv),
    ({"texts", "images"}, read_interleaved),
    ({"text"}, read_text),
]


def to_sample(row, folder, where, source):
    """A parsed line -> Sample, its image paths relative to `folder`. Raises BadSample."""
    columns = set(row) if isinstance(row, dict) else set()
    read = next((read for needed, read in FORMATS if needed <= columns), None)
    if read is None:
        found = f"the fields {', '.join(sorted(columns))}" if columns else "no fields"
        raise BadSample(f"{where} has {found}, which fit no known format.")
    try:
        fields = read(row)
        images = fields.get("images", [])
        if links := [i for i in images if i.startswith(("http://", "https://"))]:
            raise BadSample(f"{where} has an image by its address ({links[0]}): download it and give "
                            "its path.")
        # A column of pictures that its reader passed over would be lost in silence.
        pictures = [i for column in ("image", "images") for i in as_list(row.get(column)) if i]
        if row.get("videos") or row.get("video") or pictures and not images:
            raise BadSample(f"{where} has images or videos that its format has no place for.")
        fields["images"] = [str(folder / image.removeprefix("file://")) for image in images]
        name = row.get("id") if read is read_messages else None    # published ids repeat, lines do not
        return Sample(str(name or where), source=row.get("source") or source, where=where, **fields)
    except NoPreference as error:
        raise NoPreference(f"{where} {error}.") from None
    except KeyError as error:
        raise BadSample(f"{where} has no field {error}, or it holds an unknown value.") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise BadSample(f"{where} is malformed: {error}.") from None


# --------------------------------------------------------------------------------------------------
# Files and recipes

def read_json(path):
    """A whole JSON file. Raises ValueError with its name."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from None


class JSONL:
    """A file of samples as a sequence that reads a line when asked for it; one pass at the start
    finds the lines. Also a .json file that is one list, as LLaVA's and LLaMA-Factory's are; that
    one is kept in memory. Image paths are relative to the file's folder, or to `images`. Raises
    BadSample on reading a bad line, ValueError for a parquet file."""

    def __init__(self, path, source=None, images=None):
        self.path, self.rows, self.folder = Path(path), None, Path(images or Path(path).parent)
        self.source = source or self.path.stem
        if self.path.suffix == ".parquet":
            raise ValueError(f"{path} is parquet; first run `python data.py convert {path} FOLDER`.")
        with open(self.path, "rb") as file:
            if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                self.rows = read_json(path)
                return
            file.seek(0)
            ends, blank = [0], []
            for line in file:
                ends.append(ends[-1] + len(line))
                blank.append(line.isspace())
        self.lines = np.flatnonzero(~np.array(blank, bool))            # counted from 0
        self.starts = np.array(ends, np.int64)[self.lines]

    def __len__(self):
        return len(self.rows if self.rows is not None else self.lines)

    def __getitem__(self, index):
        if self.rows is not None:
            where = f"{self.path.name} item {index + 1}"
            return to_sample(self.rows[index], self.folder, where, self.source)
        where = f"{self.path.name} line {self.lines[index] + 1}"
        with open(self.path, "rb") as file:                            # anew: workers share no place
            file.seek(self.starts[index])
            try:
                row = json.loads(file.readline())
            except ValueError as error:                                # bad JSON or bad UTF-8
                raise BadSample(f"{where} is not JSON ({error}).") from None
        return to_sample(row, self.folder, where, self.source)


def read_recipe(path):
    """{"sources": [{"name", "path", "weight", "images"}], "samples", "seed"}
    -> {name: JSONL}, {name: weight}, samples (None if not given), seed. Paths are relative to the
    recipe's folder; `images` is where those of a source lie, if not beside its file. A weight is a
    share in samples; without one it is Table 12's, if the name is there, or the source's size.
    Raises ValueError."""
    path = Path(path)
    recipe = read_json(path)
    check_fields(recipe, ("sources", "samples", "seed"), path, required=("sources",))
    sources, weights = {}, {}
    for entry in recipe["sources"]:
        check_fields(entry, ("name", "path", "weight", "images"), path, required=("name", "path"))
        name = entry["name"]
        if name in sources:
            raise ValueError(f"{path} names the source {name} twice.")
        images = path.parent / entry["images"] if "images" in entry else None
        sources[name] = JSONL(path.parent / entry["path"], name, images)
        weights[name] = entry.get("weight", TABLE12.get(name, len(sources[name])))
        if not isinstance(weights[name], (int, float)):
            raise ValueError(f"{path}: the weight of {name} is {weights[name]!r}, not a number.")
    samples = recipe.get("samples")
    if not sources or "samples" in recipe and not (isinstance(samples, int) and samples > 0):
        raise ValueError(f"{path} needs sources, and samples as a number above 0.")
    return sources, weights, samples, recipe.get("seed", 0)


def convert(paths, folder):
    """Parquet files -> folder/data.jsonl; images, as bytes or {"bytes", "path"}, become files
    beside it. A field that is empty is left out of what it is nested in: parquet gives every part
    of a message all parts' fields."""
    import pyarrow.parquet
    folder, count = Path(folder), 0
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def save(value):
        nonlocal count
        if isinstance(value, list):
            return [save(v) for v in value]
        if isinstance(value, bytes):
            value = {"bytes": value}
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("bytes"), bytes):
            return {key: save(v) for key, v in value.items() if v is not None}
        name = f"images/{count:08d}{Path(value.get('path') or '').suffix}"
        (folder / name).write_bytes(value["bytes"])
        count += 1
        return name

    with open(folder / "data.jsonl", "w") as out:
        for path in paths:
            for rows in pyarrow.parquet.ParquetFile(path).iter_batches(256):
                for row in rows.to_pylist():
                    row = {key: save(value) for key, value in row.items()}
                    out.write(json.dumps(row, default=str) + "\n")
