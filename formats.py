"""What published files look like: one line of any of them becomes a Sample (App. C.3 to C.5).

    line of a file --a reader of FORMATS--> Sample       JSONL: a file as a sequence of samples
    recipe of files --read_recipe--> files, weights      convert: parquet to JSONL and image files

A format is one function and one row of FORMATS. What cannot be used raises BadSample: one sentence
that names file and line. Nothing ever stands in for a bad sample. data.py makes batches of samples.
"""
import json
import os
import re
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

# Samples by source: a recipe that uses these names needs no weights. Names that stand together share
# their samples in proportion to their sizes.
TABLE12 = {"fineweb-edu": 600_000, "dclm": 200_000, "grit": 200_000, "llava-onevision": 100_000,
           "cambrian-ocr": 80_000, "sharegpt-4o": 50_000, "synthdog": 50_000,
           "benchmark-train": 50_000, "obelics": 10_000}
MIXTURES = {
    "distill": TABLE12,
    "sft": {"cambrian": 200_000, "llava-onevision": 125_000, "sharegpt-4o": 75_000,     # App. C.4
            "benchmark-train scienceqa mathv360k": 75_000,
            "ultrachat magpie-pro lima slimorca": 25_000},
    "dpo": {"mmpr": 100_000, "vlfeedback": 25_000, "ultrafeedback": 15_000,             # App. C.5
            "rlhf-v": 10_000}}

ROLES = ("system", "user", "assistant", "document")
# Columns by which published pairs say how good an answer is, with "rejected" in place of "chosen".
SCORES = ("score_chosen", "chosen_score", "chosen-rating", "chosen_rating")


class BadSample(Exception):
    """A sample that cannot be used; the message is one sentence with the file's name and line."""

    def __init__(self, sentence):
        line = " ".join(sentence.split())                    # whatever its file held
        super().__init__(line if len(line) < 1000 else f"{line[:500]} ... {line[-400:]}")


class NoPreference(BadSample):
    """Answers of which none is better, or that do not fit within the caps beside their prompt: not
    broken, but no pair either. loader() leaves it out and does not count it."""


def is_text(part):
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def is_part(part):
    return part["type"] == "image" or is_text(part)


def is_unicode(text):
    """A cut emoji leaves half of a surrogate pair behind: JSON may hold it, no encoding can."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


@dataclass
class Sample:
    """One example. `messages` is [{"role", "content"}] with content a list of {"type": "image"} and
    {"type": "text", "text": str}; the image parts consume `images` in order. Running text has the
    single role "document": no template, every text token supervised. For DPO `messages` ends with
    the user's turn, and `chosen` and `rejected` are the contents of two answers to it. Raises
    BadSample on what the template has no place for."""
    id: str
    messages: list
    images: list = field(default_factory=list)   # paths, PIL images; for length() (width, height)
    source: str = ""                             # which data set, for the log
    chosen: list | None = None
    rejected: list | None = None
    where: str = ""                              # "train.jsonl line 7", for complaints

    def __post_init__(self):
        if complaint := self.complaint():
            raise BadSample(f"{self.where or self.id} has {complaint}.")

    def complaint(self):
        """What the template has no place for, as the end of a sentence; or None."""
        markers = 0
        for message in self.messages:
            role, parts = message["role"], message["content"]
            if role not in ROLES:
                return f"the unknown role {role!r:.40}"
            if not isinstance(parts, list) or not all(map(is_part, parts)):
                return "a content part that is neither text nor image"
            shown = sum(part["type"] == "image" for part in parts)
            if shown and role in ("system", "assistant"):
                return f"an image in the {role}'s turn; only a user shows one"
            markers += shown
        if (self.chosen is None) != (self.rejected is None):
            return "one of chosen and rejected without the other"
        answers = [self.chosen, self.rejected] if self.chosen is not None else []
        if not all(isinstance(answer, list) and all(map(is_text, answer)) for answer in answers):
            return "a chosen or rejected answer that is not text"
        contents = [message["content"] for message in self.messages] + answers
        if not all(is_unicode(part.get("text", "")) for content in contents for part in content):
            return "text that is not Unicode (half of a surrogate pair)"
        if not self.messages or markers != len(self.images):
            return (f"{len(self.messages)} messages with {markers} image markers, and "
                    f"{len(self.images)} images")

    def answered(self, content):
        """The prompt with an assistant's answer, e.g. sample.answered(sample.chosen)."""
        messages = self.messages + [{"role": "assistant", "content": content}]
        return replace(self, messages=messages, chosen=None, rejected=None)

    def rows(self):
        """The rows in a batch: the sample, or the chosen and the rejected answer of a pair."""
        if self.chosen is None:
            return [self]
        return [self.answered(self.chosen), self.answered(self.rejected)]


# ---- Parts of a sample ---------------------------------------------------------------------------

def texts(string):
    return [{"type": "text", "text": string}]


def conversation(turns, images, separator="\n"):
    """[(role, text or content)] -> messages. In a user's text each <image> stands for one of
    `images`; if no turn shows any, the first user's turn shows all, before its text. Without images
    <image> is text, but refused where the marker of a lost image would stand. A `separator` beside a
    marker is no text: LLaVA puts a line break between image and question."""
    messages = []
    for role, content in turns:
        if isinstance(content, str) and role == "user" and images:
            marked = content.replace("<image>" + separator, "<image>")
            pieces = marked.replace(separator + "<image>", "<image>").split("<image>")
            content = texts(pieces[0]) if pieces[0] else []
            for piece in pieces[1:]:
                content += [{"type": "image"}] + (texts(piece) if piece else [])
        elif isinstance(content, str):
            if role == "user" and re.search(r"^\s*<image>|\n<image>\s*$", content):
                raise ValueError("a turn shows no image, but has <image> where one belongs")
            content = texts(content)
        messages.append({"role": role, "content": content})
    asked = [message for message in messages if message["role"] == "user"]
    if asked and not any(part["type"] == "image" for m in messages for part in m["content"]):
        asked[0]["content"] = [{"type": "image"} for _ in images] + asked[0]["content"]
    return messages


def alternating(strings):
    """A list of questions and answers in turn -> [(role, text)]."""
    check_fields({"turns": strings}, {"turns": list}, "a conversation")
    return [("assistant" if k % 2 else "user", string) for k, string in enumerate(strings)]


def as_list(value):
    """A field that holds nothing, one thing or a list of things -> a list."""
    return value if isinstance(value, list) else [value] if value else []


def check_fields(fields, types, what, required=()):
    """Raises ValueError unless `fields` is a dict with these fields at most, each of its type."""
    if not isinstance(fields, dict):
        raise ValueError(f"{what} is not an object with fields")
    if unknown := sorted(set(fields) - set(types)):
        raise ValueError(f"unknown field {', '.join(unknown)} in {what}")
    if missing := sorted(set(required) - set(fields)):
        raise ValueError(f"no field {', '.join(missing)} in {what}")
    for name, value in fields.items():
        if not isinstance(value, types[name]) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.40} in {what}")


# ---- Readers: the fields of one line -> the fields of a Sample -----------------------------------

def read_messages(row):
    """The native format, where text is in parts and only text; and Qwen's and LLaMA-Factory's,
    where content is a string with <image> markers, or an image part carries its own path.
    UltraChat-200k repeats its prompt."""
    known = "id source images messages chosen rejected prompt prompt_id".split()
    check_fields(row, dict.fromkeys(known, object), "the sample")
    images, turns = list(as_list(row.get("images"))), []
    for message in row["messages"]:
        check_fields(message, {"role": str, "content": (str, list)}, "a message")
        content = message["content"]
        if isinstance(content, list):
            for part in content:
                own = "text" if part["type"] == "text" else "image"
                check_fields(part, {"type": str, own: str}, "a content part")
            images += [part["image"] for part in content if "image" in part]
            content = [{key: part[key] for key in part if key != "image"} for part in content]
        turns.append((message["role"], content))
    answers = {key: texts(row[key]) if isinstance(row[key], str) else row[key]
               for key in ("chosen", "rejected") if row.get(key) is not None}
    return dict(messages=conversation(turns, images, separator=""), images=images, **answers)


def read_llava(row):
    """LLaVA's {"from", "value"}: LLaVA-OneVision, Cambrian, ShareGPT-4o, MathV360K, Magpie-Pro,
    SlimOrca, LLaMA-Factory's pairs; the turns of LIMA and the first UltraChat are mere strings."""
    roles = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES[:3]}
    turns = [("system", row["system"])] if row.get("system") else []
    given = row["conversations"] if "conversations" in row else row["data"]
    if isinstance(given[0], str):
        turns += alternating(given)
    else:
        turns += [(roles[turn["from"]], turn["value"]) for turn in given]
    answers = {key: texts(row[key]["value"]) for key in ("chosen", "rejected")
               if row.get(key) is not None}
    images = as_list(row.get("image")) or as_list(row.get("images"))
    return dict(messages=conversation(turns, images), images=images, **answers)


def read_mmpr(row):
    images = as_list(row.get("image"))
    return dict(messages=conversation([("user", row["question"])], images), images=images,
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
    chosen, rejected = (conversation([(m["role"], m["content"]) for m in row[key]], [])
                        for key in ("chosen", "rejected"))
    roles = {chosen[-1]["role"], rejected[-1]["role"]}
    if chosen[:-1] != rejected[:-1] or roles != {"assistant"}:
        raise ValueError("chosen and rejected are not two answers to one prompt")
    return dict(messages=chosen[:-1], chosen=chosen[-1]["content"],
                rejected=rejected[-1]["content"])


def read_interleaved(row):
    """OBELICS: two lists of one length, with a text or an image (here a path) at each place."""
    parts, images = [], []
    check_fields({key: row[key] for key in ("texts", "images")}, {"texts": list, "images": list},
                 "the sample")
    for text, image in zip(row["texts"], row["images"], strict=True):
        parts += ([{"type": "image"}] if image else []) + (texts(text) if text else [])
        images += [image] if image else []
    return dict(messages=[{"role": "document", "content": parts}], images=images)


def one_question(row, question, answer):
    images = as_list(row.get("image"))
    return dict(messages=conversation([("user", question), ("assistant", answer)], images),
                images=images)


def read_vqa(row):
    """DocVQA, TextVQA, InfoVQA: a question and its accepted answers; the first is taken."""
    answers = as_list(row.get("answers")) or as_list(row["answer"])
    return one_question(row, row["question"], answers[0])


def read_choices(row):
    """AI2D, ScienceQA: options, and the number of the right one. The answer is its letter, as
    evaluate.py asks for it; ScienceQA may have a hint, and no image."""
    options = row["options"] if "options" in row else row["choices"]
    check_fields({"options": options}, {"options": list}, "the question")
    if not float(row["answer"]) in range(len(options)):
        raise ValueError(f"the answer {row['answer']} is none of {len(options)} options")
    lines = [f"Context: {row['hint']}"] if row.get("hint") else []
    lines += [row["question"], *(f"{chr(65 + i)}. {option}" for i, option in enumerate(options)),
              "Answer with the option's letter from the given choices directly."]
    return one_question(row, "\n".join(lines), chr(65 + int(row["answer"])))


def read_chartqa(row):
    return one_question(row, row["query"], as_list(row["label"])[0])


def read_synthdog(row):
    """SynthDoG: a page and all that is written on it, in JSON."""
    written = json.loads(row["ground_truth"])["gt_parse"]["text_sequence"]
    return one_question(row, "<image>Read all the text in the image.", written)


def read_grit(row):
    """GRIT: a caption, and where its phrases are: [from, to, x0, y0, x1, y1, confidence], from and to
    in characters, corners in parts of the image. Qwen3-VL's boxes are in thousandths."""
    boxes = []
    for start, end, *corners, _ in sorted(row.get("ref_exps") or row["noun_chunks"]):
        label = row["caption"][int(start):int(end)]
        if not label or len(corners) != 4 or not all(0 <= x <= 1 for x in corners):
            raise ValueError("a phrase or its box is out of bounds")
        boxes.append({"bbox_2d": [round(1000 * x) for x in corners], "label": label})
    images = as_list(row.get("image") or row["url"])
    turns = ["<image>Describe the image in one sentence.", row["caption"],
             "Locate what the sentence names, as JSON.", json.dumps(boxes, ensure_ascii=False)]
    return dict(messages=conversation(alternating(turns), images), images=images)


def read_text(row):
    """FineWeb-Edu, DCLM: running text without a template; all of it supervised, its end too."""
    return dict(messages=[{"role": "document", "content": texts(row["text"])}])


# A line is read by the first row of this table whose columns it has. Published files carry further
# columns, which are ignored; the `messages` format is strict.
FORMATS = [
    ({"prompt", "chosen", "rejected"}, read_ultrafeedback),  # its messages repeat the chosen ones
    ({"conversations"}, read_llava),                         # and these are repeated as messages
    ({"messages"}, read_messages),
    ({"prompt", "completions"}, read_vlfeedback),
    ({"instruction", "completions"}, read_vlfeedback),
    ({"question", "chosen", "rejected"}, read_mmpr),
    ({"chosen", "rejected"}, read_ultrafeedback),
    ({"question", "options", "answer", "image"}, read_choices),
    ({"question", "choices", "answer"}, read_choices),
    ({"query", "image", "label"}, read_chartqa),
    ({"question", "image", "answers"}, read_vqa),
    ({"question", "image", "answer"}, read_vqa),
    ({"image", "ground_truth"}, read_synthdog),
    ({"caption", "ref_exps"}, read_grit),
    ({"caption", "noun_chunks"}, read_grit),
    ({"text", "image"}, read_rlhfv),
    ({"text", "image_path"}, read_rlhfv),
    ({"texts", "images"}, read_interleaved),
    ({"data"}, read_llava),
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
        for image in images:
            if image.lower().startswith(("http:", "https:", "data:")):
                raise BadSample(f"{where} has an image by its address ({image[:80]}): download it "
                                "and give its path.")
        # A column of pictures that its reader passed over would be lost in silence.
        pictures = [i for column in ("image", "images") for i in as_list(row.get(column)) if i]
        if row.get("videos") or row.get("video") or pictures and not images:
            raise BadSample(f"{where} has images or videos that its format has no place for.")
        scores = [(row.get(x), row.get(x.replace("chosen", "rejected"))) for x in SCORES]
        better = all(float(x) > float(y) for x, y in scores if None not in (x, y))
        if "chosen" in fields and (fields["chosen"] == fields.get("rejected") or not better):
            raise NoPreference("has a chosen answer that is no better than the rejected one")
        fields["images"] = [str(folder / image.removeprefix("file://")) for image in images]
        name = read is read_messages and row.get("id") or where    # published ids repeat
        source = str(row.get("source") or source)
        return Sample(str(name), source=source, where=where, **fields)
    except NoPreference as error:
        raise NoPreference(f"{where} {error}.") from None
    except BadSample:
        raise
    except KeyError as error:
        raise BadSample(f"{where} has no field {error}, or it holds an unknown value.") from None
    except Exception as error:               # whatever a reader stumbles over is the line's fault
        raise BadSample(f"{where} is malformed: {error or type(error).__name__}.") from None


# ---- Files and recipes ---------------------------------------------------------------------------

def parse_json(raw, where):
    """JSON -> its value. Raises ValueError that begins with `where`."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:            # bad JSON, bad UTF-8, nested too deep
        raise ValueError(f"{where} is not JSON ({error}).") from None


class JSONL:
    """A file of samples as a sequence that reads a line when asked for it; one pass at the start
    finds the lines. Also a .json file that is one list, as LLaVA's is, which is kept in memory. Image
    paths are relative to the file's folder, or to `images`. Raises BadSample on reading a bad line,
    ValueError for a parquet file."""

    def __init__(self, path, source=None, images=None):
        self.path, self.rows, self.folder = Path(path), None, Path(images or Path(path).parent)
        self.source = source or self.path.stem
        if self.path.suffix == ".parquet":
            raise ValueError(f"{path} is parquet; first run `python data.py convert {path} DIR`.")
        with open(self.path, "rb") as file:
            if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                self.rows = parse_json(self.path.read_bytes(), path)
                return
            file.seek(0)
            ends, blank = [0], []
            for line in file:
                ends.append(ends[-1] + len(line))
                blank.append(line.isspace())
        self.lines = np.flatnonzero(~np.array(blank, bool))  # counted from 0
        self.starts = np.array(ends, np.int64)[self.lines]

    def __len__(self):
        return len(self.rows if self.rows is not None else self.lines)

    def __getitem__(self, index):
        if self.rows is not None:
            where = f"{self.path.name} item {index + 1}"
            return to_sample(self.rows[index], self.folder, where, self.source)
        where = f"{self.path.name} line {self.lines[index] + 1}"
        with open(self.path, "rb") as file:                  # opened anew: workers share no place
            file.seek(self.starts[index])
            try:
                row = parse_json(file.readline(), where)
            except ValueError as error:
                raise BadSample(str(error)) from None
        return to_sample(row, self.folder, where, self.source)


def read_recipe(path):
    """{"sources": [{"name", "path", "weight", "images"}], "mixture", "samples", "seed"}
    -> {name: JSONL}, {name: weight}, samples (None if not given), seed. Raises ValueError.

    Paths are relative to the recipe's folder; `images` is where those of a source lie, if not
    beside its file. A weight is a share in samples; without one it is that of the mixture, "distill"
    (the default), "sft" or "dpo", if the name is there, or the source's size."""
    path = Path(path)
    recipe = parse_json(path.read_bytes(), path)
    check_fields(recipe, {"sources": list, "mixture": str, "samples": int, "seed": int}, path,
                 required=("sources",))
    mixture, samples = recipe.get("mixture", "distill"), recipe.get("samples")
    fits = recipe["sources"] and mixture in MIXTURES and 0 < recipe.get("samples", 1) <= 10 ** 9
    if not fits:
        raise ValueError(f"{path} needs sources, a mixture of {', '.join(MIXTURES)}, and samples as "
                         "a number from 1 to 1,000,000,000.")
    sources, given = {}, {}
    for entry in recipe["sources"]:
        check_fields(entry, {"name": str, "path": str, "images": str, "weight": (int, float)}, path,
                     required=("name", "path"))
        name = entry["name"]
        if name in sources:
            raise ValueError(f"{path} names the source {name} twice.")
        try:
            images = path.parent / entry["images"] if "images" in entry else None
            sources[name] = JSONL(path.parent / entry["path"], name, images)
        except ValueError as error:                          # of odd paths too
            raise ValueError(f"{path}: the source {name}: {error}") from None
        given[name] = entry.get("weight", len(sources[name]))
        if not 0 < given[name] < 1e15:
            raise ValueError(f"{path}: the source {name} has {len(sources[name])} samples and the "
                             f"weight {given[name]!r:.40}; both must be above 0.")
    shared = {entry["name"] for entry in recipe["sources"] if "weight" not in entry}
    for names, weight in MIXTURES[mixture].items():
        group = shared & set(names.split())
        size = sum(len(sources[name]) for name in group)
        given |= {name: weight * len(sources[name]) / size for name in group}
    return sources, given, samples, recipe.get("seed", 0)


def is_image(raw, whole):
    """Whether bytes open as an image; `whole`: and decode to their end, as text that begins like one
    does not."""
    try:
        with Image.open(BytesIO(raw)) as image:
            if whole:
                image.load()
        return True
    except Exception:                                        # nearly any: see parts/images.py
        return False


def convert(paths, folder):
    """Parquet files -> folder/data.jsonl and image files beside it. {"bytes", "path"} is an image,
    as columns of images are stored; mere bytes are one if they decode as one, or else must be text.
    A field that is empty is left out of what it is nested in: parquet gives every part of a message
    all parts' fields. Raises ValueError, OSError, ImportError."""
    import pyarrow.parquet
    folder, count = Path(folder), 0
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def save(value, where):
        nonlocal count
        if isinstance(value, list):
            return [save(v, where) for v in value]
        if isinstance(value, bytes):
            text = None if b"\0" in value else value.decode(errors="surrogateescape")
            readable = text is not None and is_unicode(text)
            if not is_image(value, whole=readable):
                if not readable:
                    raise ValueError(f"{where} holds bytes that are neither an image nor text.")
                return text
            value = {"bytes": value}
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("bytes"), bytes):
            return {key: save(v, where) for key, v in value.items() if v is not None}
        name = f"images/{count:08d}{Path(value.get('path') or '').suffix}"
        (folder / name).write_bytes(value["bytes"])
        count += 1
        return name

    with open(folder / "data.jsonl.part", "w") as out:
        for path in paths:
            rows = (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256)
                    for row in batch.to_pylist())
            for n, row in enumerate(rows):
                row = {key: save(value, f"{path} row {n + 1}: {key}") for key, value in row.items()}
                out.write(json.dumps(row, default=str) + "\n")
    os.replace(folder / "data.jsonl.part", folder / "data.jsonl")    # whole, or not there
