"""What lies in a model folder in place of weights that can be loaded, and what makes such weights of it.

Weights that can be loaded are model.safetensors, pytorch_model.bin, or shards of these with an index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
_SHOWN = 3


def describe_foreign_weights(folder: Path) -> tuple[str, str] | None:
    """What lies there, as the end of a sentence that begins "there are no weights in this folder, but", and what to do.

    None where nothing looks like weights.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return None
    for pattern, describe in _KINDS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return describe(folder, found)
    return None


def describe_foreign_file(path: Path) -> tuple[str, str] | None:
    """What a file is that is named in place of a model folder, and what to do.

    None where its name tells nothing, or what it holds needs only a config.json beside it.
    """
    for pattern, describe in _OTHER_FORMATS:
        if re.fullmatch(pattern, path.name):
            return describe(path.parent, [path.name])
    return None


def _adapter(folder: Path, found: Sequence[str]) -> tuple[str, str]:
    base = "its base model"
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8-sig"))
        base = f"its base model {str(named['base_model_name_or_path'])[:200]}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return (
        f"an adapter without its base model: {_listed(found)}",
        f"merge it with {base}: peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(OUT)",
    )


def _shards(folder: Path, found: Sequence[str]) -> tuple[str, str]:
    match = _SHARD.fullmatch(found[0])
    assert match is not None
    stem, _, count, suffix = match.groups()
    index = f"{stem}{suffix}.index.json"
    expected = int(count)
    there = sum(1 for name in found if name.startswith(f"{stem}-") and name.endswith(f"-of-{count}{suffix}"))
    what = f"{there} of {expected} shards ({_listed(found)}) without their index {index}"
    return what, f"copy or download {index}{' and the missing shards' if there < expected else ''} too"


def _convert(what: str, how: str) -> Callable[[Path, Sequence[str]], tuple[str, str]]:
    return lambda folder, found: (f"{what}: {_listed(found)}", how.replace("NAME", found[0]))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


_TRANSFORMERS_4 = "convert it with transformers 4: from_pretrained(FOLDER, {}=True).save_pretrained(OUT)"
_KINDS: tuple[tuple[str, Callable[[Path, Sequence[str]], tuple[str, str]]], ...] = (
    (r"adapter_(model\.(safetensors|bin)|config\.json)", _adapter),
    (_SHARD.pattern, _shards),
    (
        r"zero_to_fp32\.py",
        _convert("a checkpoint of DeepSpeed", "run in it: python zero_to_fp32.py . OUT --safe_serialization"),
    ),
    (
        r"consolidated.*\.(pth|safetensors)",
        _convert(
            "weights with the names of their authors' own code",
            "download the model in Hugging Face's format, or convert it with the family's script in"
            " transformers.models (convert_*_weights_to_hf.py)",
        ),
    ),
    (
        r".+\.gguf",
        _convert(
            "weights for llama.cpp",
            "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file='NAME').save_pretrained(OUT); weights that were"
            " never quantized are better",
        ),
    ),
    (r"flax_model.*\.msgpack", _convert("weights for Flax", _TRANSFORMERS_4.format("from_flax"))),
    (r"tf_model.*\.h5", _convert("weights for TensorFlow", _TRANSFORMERS_4.format("from_tf"))),
    (
        r".+\.safetensors",
        _convert("files of other names", "if NAME holds all weights of the model, name it model.safetensors"),
    ),
    (
        r"(?!training_args|optimizer|scheduler|rng_state).+\.(bin|pt|pth|ckpt)",
        _convert(
            "files of other names",
            "if NAME holds all weights of the model and nothing else, name it pytorch_model.bin",
        ),
    ),
    (
        r".+\.(onnx|nemo|h5|msgpack|npz|tflite|mlmodel)",
        _convert(
            "weights in another format", "export the model in Hugging Face's format: save_pretrained(OUT)"
        ),
    ),
)
"""A pattern of file names, and what is said of those that it fits; the first that fits any is taken."""
_OTHER_FORMATS = [kind for kind in _KINDS if re.search(r"gguf|msgpack|h5|onnx|consolidated", kind[0])]
