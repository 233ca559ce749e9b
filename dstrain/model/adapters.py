"""LoRA, rsLoRA and DoRA in a model's layers: PEFT's own modules, put into each layer as soon as it has its weights."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from dstrain.errors import DstrainError
from dstrain.lora import ADAPTER, Adapter, Bits, base_name, is_adapter_parameter
from dstrain.model.adapter_dropout import DropoutByRows
from dstrain.model.adapter_file import AdapterFile
from dstrain.model.initialise import cast, module_seed
from dstrain.model.quantization import (
    StoredWeights,
    bits_on_disk,
    bitsandbytes_config,
    import_bitsandbytes,
    linear_modules,
    no_fetched_kernels,
    quantize,
    quantized_modules,
)
from dstrain.model.skeleton import empty_model, put_at_paths, untouched_rng

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

_OF_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save)\.")
_INITS: dict[str, bool | str] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


class Adapters:
    """The adapters of one model. PEFT finds their places in a model without weights.

    Args:
        config: of the model.
        adapter: the config's section, or a folder that PEFT or dstrain wrote an adapter to.
        seed: of the initial values, which depend on it and on a module's name only.
        unpacked: to be merged: what is quantized is so in this precision, and then unpacked again.

    Attributes:
        modules, parameters: Hugging Face names of what is adapted.
        trained: the shape of each of their parameters, by name.
        tied_modules: those of the modules that share a weight with another.
        whole: those of the modules that are trained as a whole.
        bits: of the model's own linear layers; None: as they are.
        quantized: the paths of those that have so many bits.

    Raises:
        DstrainError: PEFT or bitsandbytes is not installed, or PEFT can't adapt this model so: the reason.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        adapter: Adapter | Path,
        *,
        seed: int = 0,
        unpacked: torch.dtype | None = None,
    ) -> None:
        self._seed = seed
        self._unpacked = unpacked
        start = adapter.start if isinstance(adapter, Adapter) else None
        self._start = AdapterFile(Path(start)) if start is not None else None
        self._on_disk = bool(getattr(config, "quantization_config", None))
        model = empty_model(config)
        tied = getattr(model, "all_tied_weights_keys", {})
        self.tied_modules = {name.rpartition(".")[0] for name in (*tied, *tied.values())}
        self._lora = lora = lora_config(adapter) if isinstance(adapter, Adapter) else _read_config(adapter)
        self.bits = _bits(config, adapter)
        self.quantized: tuple[str, ...] = ()
        self.whole = tuple(_whole_modules(model, lora.modules_to_save or (), config.model_type))
        if self.bits is not None:
            import_bitsandbytes()
            self.quantized = quantized_modules(model, self.whole)
            self._unquantized = linear_modules(model).difference(self.quantized)
            if fixed := sorted(set(self.whole).intersection(self.quantized)):
                raise DstrainError(
                    f"{fixed[0]} is quantized in the model's files, and can't be trained as a whole",
                    where="adapter.modules_to_save",
                    hint="leave it out, or start from the model's unquantized weights with adapter.base",
                )
        with _understood(config.model_type):
            tuner = _tuner(model, lora)
            self.modules = tuple(tuner.targeted_module_names)
            self.parameters = tuple(tuner.targeted_parameter_names)
            # For some families PEFT rewrites what was asked for.
            self._lora = tuner.peft_config[ADAPTER]
            if self.whole:
                _train_whole(model, self._lora)
        if isinstance(adapter, Adapter):
            self._refuse_idle_names(adapter, model, config.model_type)
        self.trained = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if is_adapter_parameter(name)
        }
        if self._start is not None:
            self._start.refuse_others(self.trained)

    def _refuse_idle_names(self, adapter: Adapter, model: nn.Module, family: str) -> None:
        """Refuse what PEFT passes over: a name that means nothing in this model. Raises DstrainError."""
        adapted = [*self.modules, *self.parameters]
        every = [base_name(name) for name, _ in model.named_modules()]
        rewritten = isinstance(adapter.targets, list) and set(self._lora.target_modules or ()) != set(
            adapter.targets
        )
        for key, names, among in (
            (
                "targets",
                [] if isinstance(adapter.targets, str) or rewritten else adapter.targets,
                self.modules,
            ),
            ("target_parameters", adapter.target_parameters, self.parameters),
            ("exclude", [] if isinstance(adapter.exclude, str) else adapter.exclude, every),
        ):
            for name in names:
                if not any(f".{known}".endswith(f".{name}") for known in among):
                    raise _idle(key, name, family, every)
        for key, pattern in (
            ("rank_pattern", adapter.rank_pattern),
            ("alpha_pattern", adapter.alpha_pattern),
        ):
            for name in pattern:
                if not any(re.match(rf"(.*\.)?({name})$", known) for known in adapted):
                    raise _idle(key, name, family, adapted)

    def quantization_config(self, dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """What ``from_pretrained`` needs to quantize the model likewise; None: nothing, or its own config says so."""
        if self.bits is None or self._on_disk:
            return None
        return bitsandbytes_config(self.bits, dtype, self._unquantized)

    def config_to_save(self, base: str) -> LoraConfig:
        """PEFT's own record of the adapters, for the model that ``from_pretrained(base)`` gives."""
        lora = copy.deepcopy(self._lora)
        lora.base_model_name_or_path = base
        lora.inference_mode = True
        return lora

    def add(
        self,
        modules: Mapping[str, nn.Module],
        *,
        without: Collection[str] = (),
        without_data: bool = False,
        stored: StoredWeights | None = None,
    ) -> dict[str, nn.Module]:
        """Put the adapters into these modules, whose weights have their values, and freeze those; quantize them first.

        No global random state is touched.

        Args:
            modules: by Hugging Face path.
            without: paths in them of what has its adapters.
            without_data: the weights are on meta, and the adapters shall be.
            stored: weights that are quantized in the model's files: they have no values yet.

        Returns:
            The same, with another module in the place of one that is adapted itself.
        """
        root = nn.Module()
        put_at_paths(root, modules)
        done = tuple(f"{path}." for path in without)
        names = {name for name, _ in root.named_modules() if not f"{name}.".startswith(done or ("/",))}
        lora = copy.deepcopy(self._lora)
        lora.target_modules = [name for name in self.modules if name in names]
        lora.target_parameters = [name for name in self.parameters if name.rpartition(".")[0] in names]
        lora.exclude_modules = None
        lora.modules_to_save = [name for name in self.whole if name in names]
        if self.bits is not None:
            dtype = next(
                (
                    parameter.dtype
                    for parameter in root.parameters()
                    if parameter.is_floating_point() and (without_data or not parameter.is_meta)
                ),
                torch.float32,
            )
            here = [name for name in self.quantized if name in names]
            quantize(
                root, here, self.bits, self._unpacked or dtype, stored, unpacked=self._unpacked is not None
            )
            setattr(root, f"is_loaded_in_{self.bits}", True)  # where PEFT looks for it
        freeze(root)
        with untouched_rng(), _quiet():
            if lora.target_modules or lora.target_parameters:
                _tuner(root, lora, without_data=without_data)
                self._drop_by_rows(root, names)
            if lora.modules_to_save:
                _train_whole(root, lora)
            if self.bits is not None:
                cast(root, dtype)  # PEFT takes fp32 beside a weight that has no precision
            if not without_data:
                self._initialise(root, names)
        return {path: root.get_submodule(path) for path in modules}

    def add_to_model(
        self,
        model: PreTrainedModel,
        *,
        without: Collection[str] = (),
        without_data: bool = False,
        stored: StoredWeights | None = None,
    ) -> None:
        """The same for a whole model, in place."""
        children = dict(model.named_children())
        added = self.add(children, without=without, without_data=without_data, stored=stored)
        for path, module in added.items():
            setattr(model, path, module)
        freeze(model)

    def _drop_by_rows(self, root: nn.Module, names: Collection[str]) -> None:
        """Let dropout draw from numbers that no layout changes."""
        for name, dropout in list(root.named_modules()):
            path, _, adapter = name.rpartition(".lora_dropout.")
            if adapter == ADAPTER and isinstance(dropout, nn.Dropout) and base_name(path) in names:
                by_rows = DropoutByRows(dropout.p, module_seed(self._seed, f"{path}.dropout"))
                root.get_submodule(f"{path}.lora_dropout")._modules[ADAPTER] = by_rows

    @torch.no_grad()
    def _initialise(self, root: nn.Module, names: Collection[str]) -> None:
        """As PEFT does, with numbers that depend on the module's name."""
        from peft.tuners.lora import LoraLayer

        for name, module in root.named_modules():
            if isinstance(module, LoraLayer) and base_name(name) in names:
                layer: Any = module  # without types
                torch.default_generator.manual_seed(module_seed(self._seed, name))
                if self._lora.init_lora_weights == "orthogonal" and ADAPTER in layer.lora_A:
                    layer.orthogonal_init(ADAPTER)
                else:  # embeddings have no orthogonal values
                    values = self._lora.init_lora_weights
                    layer.reset_lora_parameters(ADAPTER, True if values == "orthogonal" else values)
                if ADAPTER in layer.lora_variant:  # DoRA takes its magnitudes from both
                    layer.lora_variant[ADAPTER].init(layer, adapter_name=ADAPTER, config=self._lora)
        if self._start is not None:
            for name, parameter in root.named_parameters():
                if is_adapter_parameter(name) and base_name(_OF_ADAPTER.split(name)[0]) in names:
                    parameter.copy_(self._start.read(name))


def _bits(config: PretrainedConfig, adapter: Adapter | Path) -> Bits | None:
    """Of the model's own weights. Raises DstrainError where they have others on disk than they shall have."""
    asked = adapter.base if isinstance(adapter, Adapter) else None
    found = bits_on_disk(config, config.name_or_path or config.model_type)
    if asked and found and asked != found:
        raise DstrainError(
            f"the model's weights are quantized to {found} in its files, which {asked} can't be made of",
            where="adapter.base",
            hint=f"adapter.base: {found}, or name a folder with the model's unquantized weights",
        )
    return asked or found


def has_adapters(module: nn.Module) -> bool:
    """Whether anything below has adapters, so that nothing else is trained."""
    return any(is_adapter_parameter(name) for name, _ in module.named_parameters())


def freeze(module: nn.Module) -> None:
    """Let nothing but adapters be trained."""
    for name, parameter in module.named_parameters():
        if not is_adapter_parameter(f".{name}"):
            parameter.requires_grad_(False)


def _idle(key: str, name: str, family: str, known: Sequence[str]) -> DstrainError:
    like = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return DstrainError(
        f"nothing that is adapted in this {family} model is named {name!r}"
        if key != "exclude"
        else f"no module of this {family} model is named {name!r}",
        where=f"adapter.{key}",
        hint=f"names look like {like[0]}; {key} takes their last parts",
    )


def lora_config(adapter: Adapter) -> LoraConfig:
    """What is asked of PEFT. Raises DstrainError where there is none."""
    lora: LoraConfig = import_peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        exclude_modules=adapter.exclude or None,
        target_parameters=adapter.target_parameters or None,
        modules_to_save=adapter.modules_to_save or None,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        use_rslora=adapter.type == "rslora",
        use_dora=adapter.type == "dora",
        init_lora_weights=_INITS[adapter.init],
    )
    return lora


def _read_config(folder: Path) -> LoraConfig:
    """Raises DstrainError: there is none, or none of LoRA."""
    where = str(folder / "adapter_config.json")
    peft = import_peft()
    try:
        with _quiet():
            found = peft.PeftConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a damaged file raises what it likes
        raise DstrainError(
            f"{folder} has no adapter_config.json that PEFT can read: {' '.join(str(error).split())}",
            where=where,
            hint="name a folder that PEFT's save_pretrained or `dstrain export` wrote",
        ) from error
    if not isinstance(found, peft.LoraConfig):
        raise DstrainError(
            f"this is an adapter of PEFT's type {found.peft_type}, and dstrain knows LoRA, rsLoRA and DoRA",
            where=where,
            hint="merge it with PEFT, and train on with the merged model",
        )
    found.inference_mode = False
    lora: LoraConfig = found
    return lora


def import_peft() -> Any:
    """PEFT, which imports bitsandbytes where that is installed. Raises DstrainError where it can't be imported."""
    try:
        with no_fetched_kernels():
            import peft
    except ImportError as error:
        raise DstrainError(
            f"adapters need PEFT, which can't be imported: {error}", hint="pip install peft"
        ) from None
    return peft


def _tuner(model: nn.Module, lora: LoraConfig, *, without_data: bool = True) -> Any:
    from peft import LoraModel

    return LoraModel(model, lora, ADAPTER, low_cpu_mem_usage=without_data)


def _train_whole(root: nn.Module, lora: LoraConfig) -> None:
    from peft.utils.other import set_additional_trainable_modules

    set_additional_trainable_modules(root, lora, {}, ADAPTER)


def _whole_modules(model: PreTrainedModel, asked: Iterable[str], family: str) -> Iterator[str]:
    """The modules that are trained as a whole. Raises DstrainError for a name that no module has."""
    names = [name for name, _ in model.named_modules()]
    for wanted in asked:
        found = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise DstrainError(
                f"no module of {family} is named {wanted!r}",
                where="adapter.modules_to_save",
                hint=f"names look like {next((n for n in names if n.count('.') > 2), names[-1])}",
            )
        yield from found


@contextmanager
def _understood(family: str) -> Iterator[None]:
    """Turns what PEFT raises for a config that does not fit the model into an error of ours."""
    try:
        with _quiet():
            yield
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        text = " ".join(str(error).split())
        hint = "adapter.targets: all-linear, or a list of the last parts of module names, such as [q_proj, v_proj]"
        if found := re.search(r"Incompatible modules: \{(.*?)\}", text):  # in families with a state space
            text, hint = text.partition(" Please")[0], f"adapter.exclude: [{found[1].replace(chr(39), '')}]"
        raise DstrainError(
            f"PEFT can't adapt this {family} model: {text}",
            where="adapter",
            hint=hint,
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings are for who calls PEFT; what matters of them is checked."""
    level = logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)
