"""What stands beside the weights: config, generation config, tokenizer, adapter files.

Everything is written from copies: saving a transformers config changes it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.dynamic_module_utils import custom_object_save

from merge_callback.base_files import base_config, companions_of_base, with_limits_of_base
from merge_callback.codecs.bnb4 import Bnb4
from merge_callback.compat import align_special_tokens
from merge_callback.engines import class_of
from merge_callback.plan import Plan

logger = logging.getLogger(__name__)

# What a trainer turns off or on in the live config and a user of the model wants back.
RESTORED = ("use_cache", "output_router_logits", "router_aux_loss_coef")


def save_companions(
    plan: Plan, method: str, directory: Path, processing_class: Any, restored: Mapping[str, Any]
) -> None:
    """Write config, generation config and tokenizer (or processor) of one merged model."""
    config, generation = aligned(
        merged_config(plan, method, restored), generation_config(plan), processing_class
    )
    if getattr(plan.model, "_auto_class", None) is not None:  # its code is not transformers' own
        custom_object_save(plan.model, directory, config=config)  # type: ignore[arg-type]
    config.save_pretrained(directory)
    if generation is not None:
        generation.save_pretrained(directory)
    if processing_class is not None:
        processing_class.save_pretrained(directory)
    if not isinstance(processing_class, SavedProcessor):  # which has them among its files
        _carry_along(plan.model.config, processing_class, directory)


def _carry_along(config: PretrainedConfig, processing_class: Any, directory: Path) -> None:
    """Copy files of the base; one that cannot be read is no reason to lose a merge."""
    names = [path.name for path in directory.iterdir()]
    for path in companions_of_base(config, processing_class, names):
        try:
            content = path.read_bytes()
        except OSError as error:
            logger.warning("%s of the base is not carried along: %s", path, error)
        else:
            (directory / path.name).write_bytes(content)


def aligned(
    config: PretrainedConfig, generation: GenerationConfig | None, processing_class: Any
) -> tuple[PretrainedConfig, GenerationConfig | None]:
    """Configs whose special tokens are the tokenizer's, as a Trainer has them from its start on.

    They are changed in place. So generation ends at a chat's end of turn that became the EOS.
    """
    if isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin):
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            align_special_tokens(config, generation, tokenizer)
    return config, generation


class SavedProcessor:
    """A tokenizer or processor as it was at one moment: the files that it saves.

    Those that are in use cannot be saved by another thread, which may find them "already borrowed".
    """

    def __init__(self, processing_class: Any, config: PretrainedConfig):
        self.name = type(processing_class).__name__
        processing_class = with_limits_of_base(config, processing_class)
        with tempfile.TemporaryDirectory() as directory:
            processing_class.save_pretrained(directory)
            _carry_along(config, processing_class, Path(directory))
            paths = [path for path in Path(directory).rglob("*") if path.is_file()]
            self._files = {path.relative_to(directory): path.read_bytes() for path in paths}

    def differing(self, directory: Path) -> list[str]:
        """Files of a directory that are not as they were saved."""
        return sorted(
            name.as_posix()
            for name, content in self._files.items()
            if not (directory / name).is_file() or (directory / name).read_bytes() != content
        )

    def save_pretrained(self, directory: Path) -> None:
        """Write the files."""
        for name, content in self._files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)


def processor_name(processing_class: Any) -> str | None:
    """What a tokenizer or processor is, by its class."""
    if processing_class is None or isinstance(processing_class, SavedProcessor):
        return getattr(processing_class, "name", None)
    return type(processing_class).__name__


def generation_problems(plan: Plan) -> list[str]:
    """Why the generation config cannot be saved; transformers only finds out at the end."""
    generation = generation_config(plan)
    try:
        if generation is not None:
            generation.validate(strict=True)
    except ValueError as error:
        return [f"model.generation_config cannot be saved; change the values it names: {error}"]
    return []


def live_config(model: nn.Module) -> PretrainedConfig:
    """A copy of the model's config, whose quantisation is an object.

    Where there is a GPU Unsloth makes a dict of it, with a torch.dtype that JSON does not hold.
    """
    config: Any = copy.deepcopy(model.config)
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == "bitsandbytes":
        config.quantization_config = BitsAndBytesConfig(**found)  # type: ignore[no-untyped-call]
    return config  # type: ignore[no-any-return]


def generation_config(plan: Plan) -> GenerationConfig | None:
    """A copy of the model's generation config; None when it does not generate."""
    found = getattr(plan.model, "generation_config", None)
    return copy.deepcopy(found) if plan.model.can_generate() else None


def note_settings(model: nn.Module) -> None:
    """Note, once for each model, the values of RESTORED before a trainer changes them."""
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        _noted.setdefault(_inner(model), _settings(config))
        _of_trainers.pop(_inner(model), None)  # a new trainer sets its own


def settings_to_restore(model: nn.Module) -> dict[str, Any]:
    """The values of RESTORED as a user of the model wants them: as they were before a trainer.

    Where nobody has noted them they are the base's. `use_cache` is the base's wherever that is at
    hand, since training scripts turn it off by themselves.
    """
    config: PretrainedConfig = _inner(model).config  # type: ignore[assignment]
    found = _noted.get(_inner(model))
    if found is None:
        base = base_config(config)
        found = {"use_cache": True} if base is None else _settings(base)
    known = _settings(config)
    return {k: v for k, v in {**found, **cache_of_base(config)}.items() if k in known}


def cache_of_base(config: PretrainedConfig) -> dict[str, Any]:
    """The base's `use_cache`; empty where it is not at hand, or has none."""
    base = base_config(config)
    found = {} if base is None else _settings(base)
    return {"use_cache": found["use_cache"]} if "use_cache" in found else {}


def give_back_settings(model: nn.Module) -> None:
    """Set what a trainer has changed in a live config to what it was, once training is over."""
    inner = _inner(model)
    if not isinstance(getattr(inner, "config", None), PretrainedConfig):
        return
    _of_trainers[inner] = _settings(inner.config)  # type: ignore[arg-type]
    _set(inner.config, settings_to_restore(model))  # type: ignore[arg-type]


def take_settings_again(model: nn.Module) -> None:
    """Undo `give_back_settings`: the same trainer goes on training."""
    inner = _inner(model)
    _set(inner.config, _of_trainers.pop(inner, {}))  # type: ignore[arg-type]


def _set(config: PretrainedConfig, settings: Mapping[str, Any]) -> None:
    """In the text config; and in the one around it, where trainers set what nobody reads."""
    text = config.get_text_config()
    for name, value in settings.items():
        setattr(text, name, value)
        if name in vars(config):
            setattr(config, name, value)


# By model: settings before any trainer, and those of the trainer that has ended.
_noted: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
_of_trainers: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def _inner(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    text = config.get_text_config()
    return {name: getattr(text, name) for name in RESTORED if hasattr(text, name)}


def save_adapter(
    model: PeftModel,
    adapters: tuple[str, ...],
    directory: Path,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the active adapters with PEFT's own save, and leave PEFT's configs as they were.

    Args:
        state: entries of the model's state dict; None: the model's own.
    """
    with contextlib.ExitStack() as undo:
        for name in adapters:
            settings = vars(model.peft_config[name])
            undo.callback(settings.update, dict(settings))
        ours = threading.current_thread() is threading.main_thread()
        # Catching warnings is for all threads at once, so another one ignores these for good.
        with warnings.catch_warnings() if ours else contextlib.nullcontext():
            # PEFT asks the Hub whether the vocabulary was resized, and warns when it cannot.
            warnings.filterwarnings("ignore", message="Could not find a config file")
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            given = {} if state is None else {"state_dict": dict(state)}
            model.save_pretrained(str(directory), selected_adapters=list(adapters), **given)
        if len(adapters) == 1 and adapters != ("default",):
            _lift(directory / adapters[0])  # so that PeftModel.from_pretrained(directory) finds it


def _lift(directory: Path) -> None:
    """Move the files of a directory into its parent."""
    for path in directory.iterdir():
        path.replace(directory.parent / path.name)
    directory.rmdir()


def merged_config(plan: Plan, method: str, restored: Mapping[str, Any]) -> PretrainedConfig:
    """The config of one merged model, with values that its trainer had changed."""
    config = live_config(plan.model)
    config.architectures = [class_of(plan.model).__name__]
    _set(config, restored)
    if plan.ties_broken:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    if method == "merged_16bit":
        config.dtype = plan.dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    elif plan.base_is_4bit:
        config.quantization_config.bnb_4bit_quant_storage = torch.uint8  # what is written
        if plan.ties_broken:  # loaders skip what is tied, which nothing is any more
            config.quantization_config.llm_int8_skip_modules = plan.unquantised_linears(method)
    else:
        config.dtype = plan.dtype
        config.quantization_config = _quantization_config(plan, method)
    return config


def _quantization_config(plan: Plan, method: str) -> BitsAndBytesConfig:
    """The config of a 4-bit checkpoint that was made of a base of more bits."""
    written = [c for c in plan.containers[method].values() if isinstance(c, Bnb4)]
    asked = plan.quantization_config
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=written[0].grid.quant_type,
        bnb_4bit_use_double_quant=written[0].grid.nested,
        bnb_4bit_compute_dtype=asked.bnb_4bit_compute_dtype if asked else written[0].dtype,
        llm_int8_skip_modules=plan.unquantised_linears(method),
    )
