"""The plan: everything that will run, decided before a process starts, as pure data. `make_plan` makes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError, way_out
from dstrain.estimate.device import Device
from dstrain.estimate.memory import StageMemory
from dstrain.estimate.time import StepTime
from dstrain.estimate.traffic import Traffic
from dstrain.files import read_json
from dstrain.lora import Bits
from dstrain.mixture_shares import MixturePhase
from dstrain.optimizers import option_keys
from dstrain.planning.attention import VARLEN
from dstrain.planning.batch import Batch
from dstrain.planning.hook_specs import HookSpec
from dstrain.planning.layout import Host, Layout
from dstrain.plugins import is_code
from dstrain.renamed_keys import CONFIG_KEYS, DATA_SUMMARY, MEANT_BEFORE, with_new_names
from dstrain.version import __version__

FORMAT = 6
_FORMAT_OF_0_1 = 5


@dataclass(frozen=True)
class Machines:
    """What there is to run on.

    Attributes:
        hosts: names and slots; one local host without a hostfile. Slots are 0 where processes can
            be had at will (CPU).
        accelerator: ``cuda`` or ``cpu``.
        device_names: of one host's devices, for the display.
        precisions: what the devices can compute in.
        memory_bytes: of the smallest device, other hosts' taken to be alike; None: not known.
        flash_packages: the installed ones of ``FLASH_PACKAGES``.
        device: how fast these devices are; None: not known.
    """

    hosts: tuple[Host, ...]
    accelerator: str
    device_names: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    memory_bytes: int | None = None
    flash_packages: tuple[str, ...] = ()
    device: Device | None = None

    @property
    def kernels(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """What decides which attention there is: accelerator, precisions, packages."""
        return self.accelerator, self.precisions, self.flash_packages

    @property
    def slots(self) -> int | None:
        """All devices together; None where processes can be had at will."""
        total = sum(host.slots for host in self.hosts)
        return total or None


@dataclass(frozen=True)
class PlannedModel:
    """The model of a plan.

    Attributes:
        file: its Hugging Face config file, which was measured.
        folder: where its weights and tokenizer lie; None for a built-in shape.
        init: ``random`` or ``pretrained``.
        fingerprint: hash of the file's content.
        dropout: the largest probability in its config.
        type: ``model_type`` of its config.
        parameters: of the whole model; a tied weight counts once.
        layers: names of [embed, block 0, ..., head].
        tied: weights that several layers use.
        pipelines: whether it can be split into stages.
        adapter_parameters: of its adapters, which are trained in place of all others; 0 where there are none.
        bits: to what the others are quantized.
        base_fingerprint: hash of the pretrained weights that these are for; else None.
    """

    file: str
    folder: str | None
    init: str
    fingerprint: str
    dropout: float
    type: str
    parameters: int
    layers: tuple[str, ...]
    tied: tuple[str, ...]
    pipelines: bool
    adapter_parameters: int = 0
    bits: Bits | None = None
    base_fingerprint: str | None = None

    @property
    def weights_folder(self) -> str:
        """Where the pretrained weights lie. Raises ValueError for a built-in shape, which has none."""
        if self.folder is None:
            raise ValueError(f"{self.file} is a shape without weights")
        return self.folder

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PlannedModel:
        """From a plan's JSON."""
        known = _known(cls, record)
        return cls(**{**known, "layers": tuple(record["layers"]), "tied": tuple(record["tied"])})


@dataclass(frozen=True)
class PlannedData:
    """What the prepared data of a plan hold: see `dstrain.data.prepare.PackedData.summary`.

    Attributes:
        source: name of what was read, of so many ``files`` and ``bytes``.
        kinds, left_out: what a folder's files are, and what lies there and is not read, in words.
        commit: of a data set on the hub; the ranks read it there, and a run that goes on, wherever its branch is then.
        documents: all of them; of these ``validation_documents`` are kept from training, and ``empty_documents`` hold
            nothing.
        tokens: of all documents, with the tokens that each begins and ends with.
        begins_with, ends_with: those tokens, as the tokenizer writes them; empty: none.
        train_rows, validation_rows: samples of ``seq_len`` tokens.
        padding: share of the tokens to train on that only fill rows up.
        tokenizer: its name, with the ``tokenizer_fingerprint`` of its files.
        vocab_size: of the tokenizer.
        fingerprint: of the rows: what was read, how it was tokenized, split and packed.
        documents_hash: of the texts that the user's own code gave; empty for files.
        format: of the records: see `dstrain.data.chat.formats`.
        train_on: which parts of conversations are trained; empty for texts.
        train_stop_token: whether the tokens that end the assistant's turns are.
        trained_tokens: how many tokens of conversations are to be predicted; None for texts, where all are.
        cut_documents, dropped_documents: conversations that were longer than a row.
        text_field: the field of a record that holds a text, where it is not called ``text``.
        chat_template: the Jinja template that conversations were rendered with.
        stop_tokens: the tokens that end an assistant's turn.
        sources: what there are several of; the values above are of those that are trained on together. Empty for one.
        phases: their shares of the rows in the course of the run.
        streamed: whether it is read while it is trained on: documents, tokens and samples to train on are estimates.
        held_until: of a stream, numbers of the file and record up to which documents are held back for validation.
        limit_until: of a stream with a limit, numbers of the file and record that is not read any more.
    """

    source: str = ""
    files: int = 0
    bytes: int = 0
    documents: int = 0
    validation_documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    seq_len: int = 0
    train_rows: int = 0
    validation_rows: int = 0
    padding: float = 0.0
    tokenizer: str = ""
    tokenizer_fingerprint: str | None = None
    vocab_size: int = 0
    fingerprint: str = ""
    documents_hash: str = ""
    begins_with: str = ""
    ends_with: str = ""
    kinds: str = ""
    left_out: str = ""
    commit: str = ""
    format: str = "text"
    train_on: str = ""
    train_stop_token: bool = True
    trained_tokens: int | None = None
    cut_documents: int = 0
    dropped_documents: int = 0
    text_field: str = ""
    chat_template: str = ""
    stop_tokens: tuple[int, ...] = ()
    sources: tuple[PlannedSource, ...] = ()
    phases: tuple[MixturePhase, ...] = ()
    streamed: bool = False
    held_until: tuple[int, int] | None = None
    limit_until: tuple[int, int] | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PlannedData:
        """From a summary of the data, of another version too: what it has more is passed over."""
        known = _known(cls, record)
        sources = [
            PlannedSource(**{**source, "data": cls.from_record(source["data"])})
            for source in known.get("sources", ())
        ]
        phases = [MixturePhase.from_record(phase) for phase in known.get("phases", ())]
        held, limit = known.get("held_until"), known.get("limit_until")
        made = {
            "stop_tokens": tuple(known.get("stop_tokens", ())),
            "sources": tuple(sources),
            "phases": tuple(phases),
            "held_until": (held[0], held[1]) if held else None,
            "limit_until": (limit[0], limit[1]) if limit else None,
        }
        return cls(**{**known, **made})

    @property
    def parts(self) -> tuple[PlannedData, ...]:
        """What each source holds: of several, in their order; else of the only one."""
        return tuple(source.data for source in self.sources) or (self,)

    @property
    def training_sources(self) -> tuple[PlannedSource, ...]:
        """Those of several that are trained on."""
        return tuple(source for source in self.sources if source.trained)


@dataclass(frozen=True)
class PlannedSource:
    """One of several sources.

    Attributes:
        name: in the plan and in metrics.
        trained: whether it is trained on; else it is a validation set.
        rows: how many samples of it the run takes in all.
        data: what it holds.
    """

    name: str
    trained: bool
    rows: int
    data: PlannedData

    @property
    def epochs(self) -> float:
        """How often the run sees it."""
        return self.rows / self.data.train_rows


def _known(cls: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: record[field.name] for field in fields(cls) if field.name in record}


@dataclass(frozen=True)
class Plan:
    """Frozen, complete, JSON-serialisable. Nothing later decides what this could have decided.

    Attributes:
        config: the run config, every key.
        origins: origin of each run-config key, for the display.
        layout, batch: ranks and samples.
        accelerator: ``cuda`` or ``cpu``.
        attention: the implementation that is computed with; empty in plans of older versions: as the config says.
        deepspeed: the DeepSpeed JSON; ``deepspeed_origins`` has the origin of each leaf, dotted.
        stage_parameters: parameters that each stage holds.
        stage_time: estimated time of each stage over the mean of all.
        stage_memory: estimated bytes on a rank of each stage, by what they hold.
        memory_bytes: of one device; on CPUs of the machine, which its ranks share; None: not known.
        memory_verdict: ``fits``, ``tight`` or ``does not fit``, and by how much; empty where the memory is not known.
        device: what the devices are called.
        time: estimated, of a step and of the run; None where the devices' speed is not known.
        imbalance: estimated time of the slowest stage over the mean.
        imbalance_of_auto: what ``partition: auto`` would reach.
        checkpoint_bytes: estimated, of one checkpoint.
        disk_bytes: estimated, of all that the run leaves on its disk at once, at most.
        loss_chunk: tokens whose logits are made at a time for the loss; 0: all of a micro-batch.
        hooks: what is called beside the training.
        not_covered: code from outside, and DeepSpeed keys that change what is computed: not covered by the proof that
            all layouts train the same.
        warnings: what is accepted but worth knowing.
    """

    config: dict[str, Any]
    origins: dict[str, str]
    layout: Layout
    batch: Batch
    accelerator: str
    deepspeed: dict[str, Any]
    deepspeed_origins: dict[str, str]
    model: PlannedModel
    data: PlannedData
    stage_parameters: tuple[int, ...]
    stage_time: tuple[float, ...]
    stage_memory: tuple[StageMemory, ...]
    imbalance: float
    imbalance_of_auto: float
    attention: str = ""
    memory_bytes: int | None = None
    memory_verdict: str = ""
    device: str = ""
    time: StepTime | None = None
    loss_chunk: int = 0
    checkpoint_bytes: int = 0
    disk_bytes: int = 0
    hooks: tuple[HookSpec, ...] = ()
    not_covered: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dstrain: str = __version__
    format: int = field(default=FORMAT)

    @property
    def run_config(self) -> RunConfig:
        return RunConfig.model_validate(self.config)

    @property
    def attention_of_model(self) -> str:
        """What the model is built with. Where `auto` comes to nothing new, transformers chooses as it always has."""
        return self.attention if self.attention == VARLEN else self.run_config.attention

    def to_record(self) -> dict[str, Any]:
        """As JSON-serialisable data, with the rank table spelled out for a reader."""
        record = asdict(self)
        for stage, need in zip(record["stage_memory"], self.stage_memory, strict=True):
            stage["total"] = need.total
        record["layout"]["ranks"] = [
            asdict(place) | {"chunks": [[chunk.start, chunk.stop] for chunk in place.chunks]}
            for place in self.layout.places()
        ]
        return record

    @property
    def identity(self) -> dict[str, Any]:
        """What the runs that go on from a checkpoint must agree with, and the layout, which may change.

        Of losses only the user's own stand in it. The learning-rate schedule may change, as lr may.
        """
        own = {
            name: self.config[name]
            for key in ("loss", "optimizer")
            if is_code(self.config.get(key, ""))
            for name in (key, f"{key}_options")
        }
        return {
            "zero": self.config["zero"],
            "pipeline": self.layout.pipeline,
            "schedule": self.layout.schedule,
            "offload": self.config["offload"],
            "data_parallel": self.layout.data_parallel,
            "cut": list(self.layout.cut),
            "micro_batch": self.batch.micro_batch,
            "precision": self.config["precision"],
            "optimizer": self.config["optimizer"],
            **own,
            **{key: self.config[key] for key in (*option_keys(), "freeze")},
            **({"adapter": adapter} if (adapter := self.config.get("adapter")) else {}),
            **({"base": self.model.base_fingerprint} if self.model.base_fingerprint else {}),
            "seed": self.config["seed"],
            "global_batch": self.batch.global_batch,
            "seq_len": self.batch.seq_len,
            "pack": self.config["pack"],
            "data": self.data.fingerprint,
            "parameters": self.model.parameters,
            "model": self.model.fingerprint,
            "init": self.model.init,
        }

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan of a run folder's plan.json. Raises DstrainError where there is none, or no whole one."""
        hint = f"restore it from a copy, or let `dstrain resume {path.parent}` write it anew"
        try:
            return cls.from_record(read_json(path))
        except OSError as error:
            raise DstrainError(
                f"the plan can't be read: {error.strerror}", where=str(path), hint=way_out(error)
            ) from error
        except json.JSONDecodeError as error:
            where = f"{path}:{error.lineno}"
            raise DstrainError(f"the plan is damaged: {error.msg}", where=where, hint=hint) from None
        except DstrainError as error:
            error.where, error.hint = error.where or str(path), error.hint or hint
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DstrainError(f"the plan is damaged: {reason}", where=str(path), hint=hint) from None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Plan:
        """The plan that `to_record` wrote, in 0.1 too. Raises DstrainError for any other format."""
        if record.get("format") == _FORMAT_OF_0_1:
            record = _from_0_1(record)
        if record.get("format") != FORMAT:
            raise DstrainError(f"the plan has format {record.get('format')}, and this dstrain reads {FORMAT}")
        record = {**record, "config": {**MEANT_BEFORE, **record["config"]}}
        layout = record["layout"]
        hosts = tuple(Host(host["name"], host["slots"]) for host in layout["hosts"])
        return cls(
            **{
                **record,
                "layout": Layout(
                    hosts,
                    layout["pipeline"],
                    layout["data_parallel"],
                    tuple(layout["cut"]),
                    layout["schedule"],
                ),
                "batch": Batch(**record["batch"]),
                "model": PlannedModel.from_record(record["model"]),
                "data": PlannedData.from_record(record["data"]),
                "stage_parameters": tuple(record["stage_parameters"]),
                "stage_time": tuple(record["stage_time"]),
                "stage_memory": tuple(_stage_memory(stage) for stage in record["stage_memory"]),
                "time": _step_time(record["time"]),
                "hooks": tuple(HookSpec(**hook) for hook in record.get("hooks", ())),
                "not_covered": tuple(record.get("not_covered", ())),
                "warnings": tuple(record["warnings"]),
            }
        )


def _from_0_1(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **record,
        "format": FORMAT,
        "config": with_new_names(record["config"], CONFIG_KEYS),
        "origins": with_new_names(record["origins"], CONFIG_KEYS),
        "data": with_new_names(record["data"], DATA_SUMMARY),
    }


def _stage_memory(record: Mapping[str, Any]) -> StageMemory:
    return StageMemory(**{key: value for key, value in record.items() if key != "total"})


def _step_time(record: Mapping[str, Any] | None) -> StepTime | None:
    if record is None:
        return None
    sent = tuple(Traffic(**part) for part in record["traffic"])
    return StepTime(**{**record, "traffic": sent, "assumptions": tuple(record["assumptions"])})
