"""config.json of a Qwen3-VL (dense): read strictly, with every fault named by file and field, and
written again. Other teachers' are read in their own files, which `TEACHERS` names by model_type.

Field names are those of the file. Its letters, as everywhere: D model width, H heads, G key/value
groups, P head dim.
"""
import importlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Optional

# model_type of another teacher: the file that has its Config
TEACHERS = {"internvl": "internvl", "internvl_chat": "internvl", "glm4v": "glm4v",
            "glm46v": "glm4v", "minicpmv": "minicpmv"}


def read_object(path):
    """The JSON object in a file. Raises ValueError with the file's name."""
    try:
        value = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:     # not JSON, not UTF-8, or nested beyond reason
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


KINDS = {                      # of a dataclass's fields: what a value must be, in code and in words
    int: (lambda v: type(v) is int and 0 < v < 2 ** 31, "a positive whole number"),
    float: (lambda v: type(v) in (int, float) and 0 < v < float("inf"), "a positive number"),
    list: (lambda v: isinstance(v, list) and all(type(n) is int and 0 <= n < 2 ** 31 for n in v),
           "a list of whole numbers"),
}


def fill(kind, values, where):
    """A dataclass whose every field stands in the JSON object `values`. Raises ValueError naming
    file and field."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is missing or no object")
    for f in fields(kind):
        fits, words = KINDS[f.type]
        if f.name not in values:
            raise ValueError(f"{where}: {f.name} is missing")
        if not fits(values[f.name]):
            raise ValueError(f"{where}: {f.name} is {str(values[f.name])[:40]!r}, but must be "
                             f"{words}")
    return kind(**{f.name: values[f.name] for f in fields(kind)})


def config_class(folder):
    """-> Config, or the one of another teacher's file, which is imported when its model_type is
    met; the path of the folder's config.json, and what it holds."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    raw = read_object(path)
    kind = raw.get("model_type")
    if kind == "qwen3_vl":
        return Config, path, raw
    if not isinstance(kind, str) or kind not in TEACHERS:
        known = ", ".join(["the dense qwen3_vl", *TEACHERS])
        raise ValueError(f"{path}: model_type is {kind!r}, but only {known} are implemented")
    return importlib.import_module(TEACHERS[kind]).Config, path, raw


def part(raw, key):
    return raw[key] if isinstance(raw.get(key), dict) else {}


def with_rope(path, text):
    """text_config with what its rope settings name, and these: rope_scaling in released
    checkpoints, rope_parameters in those of transformers 5."""
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(text.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} is no object")
        rope |= text.get(key) or {}
    return {**text, **{k: rope[k] for k in ("rope_theta", "mrope_section") if k in rope}}, rope


def demand(path, *rows):
    """Refuses what is not implemented. rows: (object, key, the values that are)."""
    for values, key, *ours in rows:
        if str(values.get(key, ours[0])) not in map(str, ours):
            raise ValueError(f"{path}: {key} is {values[key]!r}, but only {ours[0]!r} is "
                             "implemented")


def ends_and_hybrid(path, raw, text):
    """The fields of Config that all teachers read alike."""
    tied, places = raw.get("tie_word_embeddings", text.get("tie_word_embeddings")), [raw, text]
    if (generation := path.parent / "generation_config.json").is_file():
        places.insert(0, read_object(generation))
    eos = [p["eos_token_id"] for p in places if p.get("eos_token_id") is not None]
    eos = eos[0] if eos else Config().eos_token_id
    return dict(tie_word_embeddings=bool(tied), hybrid=raw.get("hybrid"),
                eos_token_id=eos if isinstance(eos, list) else [eos])


def token_id(path, token):
    """The id of an added token, which some published config.json do not have."""
    file = path.parent / "tokenizer.json"
    for added in read_object(file).get("added_tokens", []) if file.is_file() else []:
        if isinstance(added, dict) and added.get("content") == token and "id" in added:
            return added["id"]
    raise ValueError(f"{path.parent}: there is no tokenizer.json that has {token} as an added token")


def counted_positions(ids, mask, grids, config):
    """Config.positions under plain RoPE: real tokens are counted, visual ones among them. -> (3, B,
    T), three times the same, and (B,) what comes next. Raises ValueError when the placeholders do
    not match the tiles."""
    real = ids == ids if mask is None else mask                         # (B, T)  without one: all
    found = ((ids == config.image_token_id) & real).sum().item()
    tiles = 0 if grids is None else len(grids)
    if found != tiles * config.vision.tokens:
        raise ValueError(f"{tiles} tiles of {config.vision.tokens} tokens, but {found} "
                         "placeholders")
    count = real.cumsum(1)
    return (count - 1).clamp(min=0).expand(3, -1, -1), count[:, -1]


@dataclass
class TextConfig:
    vocab_size: int = 151936
    hidden_size: int = 4096                  # D
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32            # H
    num_key_value_heads: int = 8             # G
    head_dim: int = 128                      # P
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: list = field(default_factory=lambda: [24, 20, 20])     # frequencies of T, H, W
    max_position_embeddings: int = 262144

    # What a decoder may have otherwise, in classes derived from this one; norms: of a layer.
    qk_norm, qkv_bias, norms, Layer = True, False, 2, None


@dataclass
class VisionConfig:
    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 4096
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: list = field(default_factory=lambda: [8, 16, 24])
    in_channels: int = 3


@dataclass
class Config:
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False
    eos_token_id: list = field(default_factory=lambda: [151645, 151643])
    hybrid: Optional[dict] = None  # {"mixer": word or FILE.py:CLASS, "layers": replaced layers (S)}

    # Another teacher's, in a class derived from this one. None: as model.py and data.py do.
    Tower = Processor = positions = rope = None

    @classmethod
    def from_folder(cls, folder):
        """Reads config.json, by the class that its model_type calls for, and the end of an answer
        from generation_config.json. Raises ValueError naming file and field on what is missing,
        malformed or not implemented."""
        kind, path, raw = config_class(folder)
        return kind.read(path, raw)

    @classmethod
    def read(cls, path, raw):
        text, vision = part(raw, "text_config"), part(raw, "vision_config")
        text, rope = with_rope(path, text)
        demand(path, (rope, "rope_type", "default", "mrope"), (rope, "type", "default", "mrope"),
               (text, "hidden_act", "silu"), (text, "attention_bias", False),
               (vision, "hidden_act", "gelu_pytorch_tanh"))
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        top = {k: raw[k] for k in ids if raw.get(k) is not None} | ends_and_hybrid(path, raw, text)
        config = cls(fill(TextConfig, text, f"{path}, text_config"),
                     fill(VisionConfig, vision, f"{path}, vision_config"), **top)
        check_shapes(config, path)
        return config

    def stored(self, name):
        """The names of the file's tensors that make this parameter, one after another in its first
        dimension. Qwen3-VL's have the names of the parameters."""
        return [name]

    def to_json(self):
        text, top = asdict(self.text), asdict(self)
        text["rope_parameters"] = dict(rope_type="default", rope_theta=text["rope_theta"], mrope_interleaved=True,
                                       mrope_section=text.pop("mrope_section"))
        text["rope_scaling"] = {k: v for k, v in text["rope_parameters"].items() if k != "rope_theta"}
        text.update(model_type="qwen3_vl_text", hidden_act="silu", attention_bias=False,
                    tie_word_embeddings=self.tie_word_embeddings)
        vision = {**top.pop("vision"), "model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh"}
        top.pop("text")
        if self.hybrid is None:
            top.pop("hybrid")
        kind = "Qwen3VLForConditionalGeneration" if self.hybrid is None else "Qwen3VLHybrid"
        return dict(architectures=[kind], model_type="qwen3_vl", text_config=text, vision_config=vision, **top)


@dataclass
class OtherConfig(Config):
    """Another teacher's, which writes config.json as it was read, for a hybrid with a name that no
    other program takes for the teacher's."""
    raw: dict = field(default_factory=dict)

    def to_json(self):
        if self.hybrid is None:
            return self.raw
        name = f"{self.raw['model_type']}_hybrid"
        return {**self.raw, "architectures": [name], "hybrid": self.hybrid}


def check_shapes(config, path):
    """Refuses numbers that fit no model, before anything is built from them. config: a
    model.Config."""
    t, v = config.text, config.vision
    side = round(v.num_position_embeddings ** 0.5)
    blocks = v.deepstack_visual_indexes
    check_decoder(config, path)
    insist(path, [
        (len(t.mrope_section) == 3 and 2 * sum(t.mrope_section) == t.head_dim,
         "mrope_section does not sum to half of head_dim"),
        (v.hidden_size % (4 * v.num_heads) == 0,
         "vision hidden_size is no multiple of four times num_heads"),
        (side * side == v.num_position_embeddings, "num_position_embeddings is no square"),
        (v.out_hidden_size == t.hidden_size, "out_hidden_size is not text_config's hidden_size"),
        (all(i < v.depth for i in blocks), "deepstack_visual_indexes goes beyond depth"),
        (len(set(blocks)) == len(blocks) <= t.num_hidden_layers,
         "deepstack_visual_indexes repeats a block or has more than the decoder has layers"),
    ])


def check_decoder(config, path):
    """The rules that hold for every teacher."""
    t, ids = config.text, (config.image_token_id, config.video_token_id)
    rules = [
        (t.num_attention_heads % t.num_key_value_heads == 0,
         "num_attention_heads is no multiple of num_key_value_heads"),
        (all(type(i) is int for i in (*ids, *config.eos_token_id)), "a token id is no whole number"),
    ]
    if config.hybrid is not None:
        hybrid = config.hybrid if isinstance(config.hybrid, dict) else {}
        layers = hybrid.get("layers")
        fits = layers and KINDS[list][0](layers) and max(layers) < t.num_hidden_layers
        rules.append((fits and isinstance(hybrid.get("mixer"), str),
                      "hybrid names no mixer, or layers that there are not"))
    insist(path, rules)


def insist(path, rules):
    for fits, words in rules:
        if not fits:
            raise ValueError(f"{path}: {words}")
