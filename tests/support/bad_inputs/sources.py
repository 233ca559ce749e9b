"""Models, tokenizers, data and names that are not what they should be; commands, and runs that are not there."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.bad_inputs.row import FIFO, MEASURED, READ, BadInput, bare, run
from tests.support.materials import LLAMA
from tests.support.table_files import zstd


def _model(content: object, place: str, reason: str, hint: str, *, looked: bool = False) -> BadInput:
    """A model folder with this config.json."""
    files = {"m": None} if content is None else {"m/config.json": content}
    return run(
        "--model", "m", place=place, reason=reason, hint=hint, files=files, looked=MEASURED if looked else ()
    )


MODELS = {
    "model: nothing of this name": run(
        "--model", "none", place="--model", reason="'none' is neither a folder nor a built-in", hint="quickstart"
    ),
    "model: no name": run("--model", "", place="--model", reason="no model given", hint="quickstart"),
    "model: a file": run(
        "--model", "m", files={"m": "x"}, place="--model", reason="m is a file", hint="name a folder with"
    ),
    "model: a file in its folder": run(
        "--model", "model/config.json", place="--model", reason="config.json is a file", hint="name its folder: model"
    ),
    "model: a file for llama.cpp": run(
        "--model", "m.gguf", files={"m.gguf": "GGUF"}, place="--model", reason="a file: weights for llama.cpp",
        hint="gguf_file='m.gguf'"
    ),
    "model: a file of weights alone": run(
        "--model", "m.safetensors", files={"m.safetensors": "x"}, place="--model", reason="m.safetensors is a file",
        hint="name a folder with a Hugging Face config.json"
    ),
    "model: a built-in shape mistyped": run(
        "--model", "quickstrat", place="--model", reason="'quickstrat'", hint="did you mean quickstart?"
    ),
    "model: a shape without weights": run(
        "--model", "quickstart", "--init", "pretrained", place="--init", reason="which has no weights",
        hint="--init random"
    ),
    "model: pretrained without a tokenizer": run(
        "--init", "pretrained", place="fine-tune.yaml", reason="has no tokenizer", hint="--tokenizer FOLDER"
    ),
    "config.json: none": _model(None, "--model", "m has no config.json", "Hugging Face model folder"),
    "config.json: a pipe": _model(FIFO, "--model", "m has no config.json", "Hugging Face model folder"),
    "config.json: broken": _model('{\n"model_type": llama}', "m/config.json:2", "malformed JSON", "one JSON object"),
    "config.json: empty": _model("", "m/config.json:1", "malformed JSON", "one JSON object"),
    "config.json: a list": _model("[]", "m/config.json", "expected a JSON object", '{"model_type"'),
    "config.json: UTF-16": _model("{}".encode("utf-16"), "m/config.json", "UTF-16", "iconv"),
    "config.json: binary": _model(b"\x80\x02}", "m/config.json", "UTF-8", "UTF-8"),
    "config.json: no model_type": _model(
        {"hidden_size": 32}, "m/config.json", "model_type", "model_type"
    ),
    "config.json: unknown model_type": _model(
        LLAMA | {"model_type": "lama"}, "m/config.json", "'lama'", "did you mean 'llama'?", looked=True
    ),
    "config.json: model_type is a number": _model(
        LLAMA | {"model_type": 5}, "m/config.json", "model_type", "model_type"
    ),
    "config.json: no language model": _model(
        {"model_type": "vit"}, "m/config.json", "no causal language model", "llama", looked=True
    ),
    "config.json: sizes that do not fit together": _model(
        LLAMA | {"num_attention_heads": 5}, "m/config.json", "not a multiple", "of a llama model", looked=True
    ),
    "config.json: no number": _model(
        LLAMA | {"rms_norm_eps": float("nan")}, "m/config.json", "rms_norm_eps is NaN", "check the model's config.json"
    ),
    "config.json: fewer layers than none": _model(
        LLAMA | {"num_hidden_layers": -1}, "m/config.json", "num_hidden_layers is -1", "check the model's config.json"
    ),
    "config.json: a rotary embedding that there is not": _model(
        LLAMA | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "spiral"}}, "the llama model",
        "rope_parameters.rope_type is 'spiral'", "of a llama model", looked=True
    ),
    "config.json: a size in words": _model(
        LLAMA | {"hidden_size": "large"}, "m/config.json", "'hidden_size' expected int", "of a llama model",
        looked=True
    ),
    "seq_len over the model's positions": run(
        "--seq-len", "129", looked=READ,
        place="--seq-len", reason="exceeds the model's 128 positions", hint="--seq-len 128 or less",
    ),
    "an enormous seq_len": run(
        "--seq-len", "999999999999",
        place="text.jsonl", reason="one row needs 999,999,999,999", hint="set seq_len to", looked=READ,
    ),
    "tokenizer larger than the embedding": run(
        "--model", "m", files={"m/config.json": LLAMA | {"vocab_size": 200, "eos_token_id": 1}}, looked=MEASURED,
        place="quickstart.yaml", reason="257 tokens, but the model's embedding only 200", hint="vocab_size",
    ),
    "tokenizer: no folder": run(
        "--tokenizer", "none", place="none", reason="no tokenizer folder 'none'", hint="bytes"
    ),
    "tokenizer: a folder without one": run(
        "--tokenizer", "t", files={"t": None}, place="t", reason="there is no tokenizer", hint="tokenizer.json"
    ),
    "tokenizer: a file in its folder": run(
        "--tokenizer", "t/tokenizer.json", files={"t/tokenizer.json": "{}"}, place="t/tokenizer.json",
        reason="this is a file", hint="name its folder: t"
    ),
    "tokenizer: broken": run(
        "--tokenizer", "t", files={"t/tokenizer.json": "{"}, looked=READ,
        place="t", reason="can't load this tokenizer", hint="save_pretrained",
    ),
}  # fmt: skip


def _data(
    name: str, content: object, place: str, reason: str, hint: str, *, looked: bool = False
) -> BadInput:
    files = {} if content == "" and name == "none.txt" else {name: content}
    return run(
        "--data", name, place=place, reason=reason, hint=hint, files=files, looked=READ if looked else ()
    )


def _parquet(*texts: object) -> bytes:
    sink = pa.BufferOutputStream()
    kind = pa.string() if all(text is None or isinstance(text, str) for text in texts) else None
    pq.write_table(pa.table({"text": pa.array(texts, kind)}), sink)
    found: bytes = sink.getvalue().to_pybytes()
    return found


GOOD_TEXT = "a text of some length"
DATA = {
    "data: nothing of this name": run(
        "--data", "none.txt", place="none.txt", reason="no such file", hint="a pattern, 'stdlib'"
    ),
    "data: a name on the hub": run(
        "--data", "roneneldan/TinyStories", place="--data", reason="HF_HUB_OFFLINE prevents access to the hub",
        hint="unset HF_HUB_OFFLINE", looked=("dstrain.data.listing.hub_datasets",), environment={"HF_HUB_OFFLINE": "1"},
    ),
    "data: no name": run("--data", " ", place="data", reason="no data source given", hint="stdlib"),
    "data: code in no module": run(
        "--data", "nowhere:texts", place="--data", reason="there is no module 'nowhere'", hint="code_dirs"
    ),
    "data: code that gives no text": run(
        "--data", "mine:texts", files={"mine.py": "def texts():\n    print('hello')\n    yield 3\n"}, place="--data",
        reason="dataset mine:texts: document 1 is an int, not a str", hint="yield the text",
        looked=("dstrain.data.reading.own_documents",),
    ),
    "data: options of a file": run(
        "--set", "data_options.a=1", place="--set data_options.a", reason="are for a dataset of your own",
        hint="remove them",
    ),
    "data: a NUL in its name": bare(
        "plan", "--model", "model", "--config", "c.yaml", files={"c.yaml": 'data: "a\\0b"\n'},
        place=r"a\x00b", reason="can't be read", hint="check the path",
    ),
    "data: a link that leads nowhere": run(
        "--data", "l", files={"l": "-> gone"}, place="l", reason="broken link", hint="remove it"
    ),
    "data: a pipe": _data("p", FIFO, "p", "neither a file nor a folder", "write the text to a file"),
    "data: a device": run(
        "--data", "/dev/zero", place="/dev/zero", reason="neither a file nor a folder",
        hint="write the text to a file"
    ),
    "data: empty": _data("d.txt", "", "d.txt", "empty", "name one with text"),
    "data: a folder without text": _data("d", None, "d", "no text in this folder", ".txt"),
    "data: a folder of other files": run(
        "--data", "d", files={"d/a.png": b"x"}, place="d", reason=".png", hint=".txt"
    ),
    "data: a folder of empty files": run(
        "--data", "d", files={"d/a.txt": b""}, place="d", reason="all 1 text files are empty", hint="copied completely"
    ),
    "data: binary": _data("d.bin", bytes(range(256)) * 8, "d.bin", "binary", "UTF-8", looked=True),
    "data: Latin-1": _data("d.txt", "a\n\xe9t\xe9".encode("latin-1"), "d.txt:2", "0xe9", "iconv", looked=True),
    "data: UTF-16": _data("d.txt", "text".encode("utf-16"), "d.txt", "UTF-16", "iconv", looked=True),
    "data: compressed": _data("d.txt", b"\x1f\x8b\x08", "d.txt", "compressed", "decompress it", looked=True),
    "data: too little": _data("d.txt", "few", "d.txt", "but one row needs 32", "set seq_len to 3", looked=True),
    "data: JSON lines without text": _data(
        "d.jsonl", '{"text": "a"}\n{"body": "b"}\n', "d.jsonl:2", "no field 'text'", '{"text": "..."}', looked=True
    ),
    "data: broken JSON lines": _data(
        "d.jsonl", '{"text": "a"}\n{"text"\n', "d.jsonl:2", "not JSON", '{"text": "..."}', looked=True
    ),
    "data: JSON lines of numbers": _data(
        "d.jsonl", '{"text": 5}\n', "d.jsonl:1", "a number, not a string", '{"text": "..."}', looked=True
    ),
    "data: parquet that is cut": _data(
        "d.parquet", _parquet(GOOD_TEXT)[:-9], "d.parquet", "this parquet file has no end", "copy it again", looked=True
    ),
    "data: parquet without rows": _data(
        "d.parquet", _parquet(), "d.parquet", "has no rows", "name another file", looked=True
    ),
    "data: parquet with null": _data(
        "d.parquet", _parquet(GOOD_TEXT, None), "d.parquet: row group 1, row 2", "null, not a string", "each row",
        looked=True,
    ),
    "data: parquet of another column": run(
        "--data", "d.parquet", "--set", "data_fields.text=story", files={"d.parquet": _parquet(GOOD_TEXT)},
        place="d.parquet: row group 1, row 1", reason="no field 'story', which data_fields names",
        hint="name in your files", looked=READ,
    ),
    "data: columns of two types": run(
        "--data", "d", files={"d/a.parquet": _parquet(GOOD_TEXT), "d/b.parquet": _parquet(5)}, place="b.parquet",
        reason="holds whole numbers here, and strings in", hint="separate sources", looked=READ,
    ),
    "data: a row of a table that is too short": _data(
        "d.csv", "id,text\n1,a\n2\n", "d.csv:3", "has 1 cells, and the header 2", "double quotes", looked=True
    ),
    "data: a cell that never ends": _data(
        "d.csv", 'id,text\n1,"a\n2,b\n', "d.csv:2", "never closed", "cut off", looked=True
    ),
    "data: zstd that is cut": _data(
        "d.jsonl.zst", zstd(b'{"text": "a"}\n' * 999)[:-5], "d.jsonl.zst:1", "damaged zstd file", "zstd -t", looked=True
    ),
    "data: tokens of another tokenizer": _data(
        "d.jsonl", '{"input_ids": [1, 50256]}\n', "d.jsonl:1", "input_ids[1] is 50256", "name the tokenizer",
        looked=True,
    ),
    "data: labels that are shifted": _data(
        "d.jsonl", '{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}\n', "d.jsonl:1", "labels[0] is 2",
        "shifted by one", looked=True,
    ),
    "data: formats that are mixed": _data(
        "d.jsonl", '{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "d.jsonl:2",
        "is in the format prompt-completion, and the one at", "data_format=text", looked=True,
    ),
    "data: a record of two formats": _data(
        "d.jsonl", '{"text": "a", "messages": []}\n', "d.jsonl:1", "could be in the format text or messages",
        "data_format=text", looked=True,
    ),
    "data: an index that is cut": run(
        "--data", "d", files={"d.bin": b"ab" * 9, "d.idx": b"MMIDIDX\0\0\1"}, place="d.idx",
        reason="not an index of Megatron's", hint="copy it again", looked=READ,
    ),
    "data: tokens without a word about them": _data(
        "d.bin", b"\1\2\0\4" * 99, "d.bin", "binary file", "data_format=nanogpt", looked=True
    ),
    "data: no index beside tokens": run(
        "--data", "d.bin", "--set", "data_format=megatron", files={"d.bin": b"ab" * 9}, place="d.bin",
        reason="there is no index beside this file", hint="d.idx",
    ),
    "data: a saved data set of several splits": run(
        "--data", "d", files={"d/dataset_dict.json": {"splits": ["train", "test"]}}, place="d",
        reason="several splits: train, test", hint="d/train",
    ),
    "data: a pattern that nothing matches": run(
        "--data", "none/*.parquet", place="none/*.parquet", reason="no file matches", hint="quotes"
    ),
    "data: no gzip": _data("d.jsonl.gz", b"no gzip", "d.jsonl.gz", "damaged gzip", "gzip -t", looked=True),
}  # fmt: skip

_RUN = {"runs/x/config.yaml": "steps: 3\n"}

NAMES = {
    "name: a path": run("--name", "a/b", place="--name", reason="'a/b' is not a valid folder name", hint="runs_dir"),
    "name: the folder above": run("--name", "..", place="--name", reason="'..' is not a valid folder name",
        hint="no leading dot"),
    "name: leaves the folder": run("--name", "../../x", place="--name", reason="is not a valid folder name",
        hint="no slash"),
    "name: absolute": run("--name", "/etc/x", place="--name", reason="is not a valid folder name", hint="no slash"),
    "name: hidden": run("--name", ".x", place="--name", reason="is not a valid folder name", hint="no leading dot"),
    "name: none": run("--name", "", place="--name", reason="is not a valid folder name", hint="100 letters"),
    "name: too long": run("--name", "n" * 300, place="--name", reason="is not a valid folder name", hint="up to 100"),
    "name: a line break": run("--name", "a\nb", place="--name", reason=r"'a\nb' is not a valid folder name",
        hint="letters"),
    "name: an escape sequence": run("--name", "\x1b[31mx", place="--name", reason=r"'\x1b[31mx'", hint="letters"),
    "name: a tab": run("--name", "a\tb", place="--name", reason=r"'a\tb' is not a valid folder name", hint="letters"),
    "name: of a run that is there": run(
        files={"runs/x": None}, place="--name", reason="runs/x already exists",
        hint="continue it with `dstrain resume x`"
    ),
    "runs_dir: a file": run(
        "--set",
        "runs_dir=f",
        files={"f": "x"},
        place="--set runs_dir",
        reason="f is a file",
        hint="choose another folder",
    ),
    "runs_dir: below a file": run(
        "--set", "runs_dir=f/runs", files={"f": "x"}, place="--set runs_dir", reason="f is a file",
        hint="choose another folder"
    ),
    "resume: no name": bare("run", "--resume", place="--resume", reason="requires the name of the"
    " run", hint="dstrain resume"),
    "resume: nothing there": bare(
        "resume", "none", place="RUN", reason="'none' is not a run folder", hint="dstrain run"
    ),
    "resume: another one is there": bare(
        "resume", "y", files=_RUN, place="RUN", reason="'y' is not a run folder", hint="run folders in runs/: x"
    ),
    "resume: a file": bare("resume", "f", files={"f": "x"}, place="RUN", reason="not a run folder", hint="dstrain run"),
    "resume: no run": bare("resume", place="RUN", reason="Missing argument", hint="resume --help"),
    "resume: two runs": bare("resume", "x", "y", place="y", reason="unexpected extra argument", hint="resume --help"),
    "resume: another name": bare(
        "resume", "x", "--name", "y", files=_RUN, place="--name", reason="can't be renamed", hint="remove --name"
    ),
    "resume: a spoilt config.yaml": bare(
        "resume", "x", files={"runs/x/config.yaml": "stpes: 3\n"},
        place="config.yaml:1", reason="'stpes'", hint="did you mean steps?",
    ),
    "resume: an empty config.yaml": bare(
        "resume", "x", files={"runs/x/config.yaml": ""}, place="config.yaml", reason="empty", hint="KEY: VALUE"
    ),
    "resume: a name of 5,000 letters": bare(
        "resume", "a" * 5000, place="RUN", reason="not a run folder", hint="dstrain run"
    ),
    "checkpoints: nothing there": bare(
        "checkpoints", "none", place="RUN", reason="not a run folder", hint="dstrain run"
    ),
    "checkpoints: no run": bare("checkpoints", place="RUN", reason="Missing argument", hint="checkpoints --help"),
    "export: nothing there": bare("export", "none", "out", place="RUN", reason="not a run folder", hint="dstrain run"),
    "export: nowhere": bare("export", "x", place="OUT", reason="Missing argument", hint="export --help"),
    "export: no checkpoint": bare(
        "export", "x", "out", files=_RUN, place="checkpoints", reason="no complete checkpoint",
        hint="dstrain resume x"
    ),
    "export: step 0": bare(
        "export", "x", "out", "--step", "0", files=_RUN, place="--step", reason="x>=1", hint="export --help"
    ),
    "export: a precision that is none": bare(
        "export", "x", "out", "--dtype", "int8", files=_RUN, place="--dtype", reason="'int8'", hint="'bf16'"
    ),
    "generate: nothing there": bare(
        "generate", "none", "Hello", place="FOLDER", reason="not a model folder", hint="dstrain export"
    ),
    "generate: an address": bare(
        "generate", "https://huggingface.co/org/name", "x", place="FOLDER",
        reason="https://huggingface.co/org/name is an address", hint="hf download org/name"
    ),
    "resume: an address": bare(
        "resume", "s3://bucket/run", place="RUN", reason="s3://bucket/run is an address", hint="aws s3 cp"
    ),
    "validation: an address": run(
        "--set", "validation=[https://a.org/v.jsonl]", place="--set validation",
        reason="https://a.org/v.jsonl is an address", hint="curl -LO https://a.org/v.jsonl"
    ),
    "validation: options of a file": run(
        "--set", "validation=[{path: text.jsonl, options: {a: 1}}]", place="--set validation",
        reason="are for a dataset of your own", hint="remove them"
    ),
    "generate: no prompt": bare(
        "generate", "model", place="PROMPT", reason="Missing argument", hint="generate --help"
    ),
    "generate: no tokens": bare(
        "generate", "model", "x", "--tokens", "0", place="--tokens", reason="x>=1", hint="generate --help"
    ),
    "generate: cold": bare(
        "generate", "model", "x", "--temperature", "-1", place="--temperature", reason="x>=0", hint="generate --help"
    ),
    "doctor: no hostfile": bare(
        "doctor", "--hostfile", "none", place="none", reason="hostfile not found", hint="name slots=N"
    ),
    "doctor: a bad hostfile": bare(
        "doctor", "--hostfile", "h", files={"h": "n1\n"}, place="h:1", reason="n1 has no slots", hint="n1 slots=N"
    ),
    "doctor: an unknown flag": bare(
        "doctor", "--hosts", "h", place="--hosts", reason="No such option", hint="--hostfile"
    ),
}  # fmt: skip

COMMANDS = {
    "an unknown command": bare("rnu", place="'rnu'", reason="no such command", hint="did you mean 'run'?"),
    "an unknown command, nothing near": bare("xyzzy", place="xyzzy", reason="No such command", hint="--help"),
    "a command in capitals": bare("RUN", place="'RUN'", reason="o such command", hint="--help"),
    "a command below config": bare("config", "shwo", place="'shwo'", reason="o such command", hint="show"),
    "an empty command": bare("", place="''", reason="o such command", hint="--help"),
    "an unknown flag": run("--zerp", "2", place="--zerp", reason="No such option", hint="--zero"),
    "an unknown flag of plan": bare(
        "plan", "--piepline", "2", place="--piepline", reason="No such option", hint="--pipeline"
    ),
    "an unknown flag in front": bare(
        "--verbose", "run", place="--verbose", reason="No such option", hint="dstrain --help"
    ),
    "a flag without its value": run("--zero", place="--zero", reason="requires an argument", hint="run --help"),
    "a flag with a value that takes none": run(
        "--dry-run=yes", place="--dry-run", reason="does not take a value", hint="run --help"
    ),
    "a stray word": run("train", place="train", reason="unexpected extra argument", hint="run --help"),
    "an underscore in a flag": run("--seq_len", "32", place="--seq_len", reason="No such option", hint="--seq-len"),
    "one dash": run("-pipeline", "2", place="-p", reason="No such option", hint="run --help"),
    "plan: a bad config": bare(
        "plan", "--config", "c.yaml", files={"c.yaml": "stpes: 1\n"}, place="c.yaml:1", reason="'stpes'",
        hint="steps?"
    ),
    "config show: a bad value": bare(
        "config", "show", "--set", "lr=fast", place="--set lr", reason="a number", hint="peak learning rate"
    ),
}  # fmt: skip
