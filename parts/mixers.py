"""Which class sits in a decoder layer's slot: a word, or FILE.py:CLASS, on the command line and in config.json."""
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MIXERS = {"mamba2": "mamba2.py:Mamba2", "gdn": "gdn.py:GatedDeltaNet"}


def mixer_class(spec):
    """The class named by a word of MIXERS, or by FILE.py:CLASS (looked for here, then beside this
    file)."""
    file, _, name = MIXERS.get(spec, spec).partition(":")
    folders = [ROOT] if spec in MIXERS else [Path(), ROOT]
    found = [(p / file).resolve() for p in folders if (p / file).is_file()]
    if not name or not found:
        raise ValueError(f"no mixer {spec!r}: give one of {', '.join(MIXERS)}, or FILE.py:CLASS "
                         "with a file that exists")
    loaded = sys.modules.get(found[0].stem)
    if Path(getattr(loaded, "__file__", None) or "").resolve() != found[0]:    # else it is imported
        module = importlib.util.spec_from_file_location(found[0].stem, found[0])
        loaded = importlib.util.module_from_spec(module)
        sys.modules.setdefault(found[0].stem, loaded)      # so that `import` gives the same classes
        module.loader.exec_module(loaded)
    if not hasattr(loaded, name):
        raise ValueError(f"{found[0]} has no class {name}")
    return getattr(loaded, name)
