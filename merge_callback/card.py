"""The model card of a merged model. Knows nothing of weights.

What the Hub asks for stands in its header; the text comes from a template, ours or the user's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from merge_callback.base_files import base_file
from merge_callback.engines import class_of
from merge_callback.foreign import plain
from merge_callback.report import figures_table, inline

TEMPLATE = Path(__file__).with_name("card.md.jinja")
_LARGEST_HEADER = 1 << 16  # bytes
_PLACEHOLDER = "path/to/this/directory"
_PATH = re.compile(rf'path = "{_PLACEHOLDER}(/(?P<inside>\w+))?"\n')


def write_card(
    directory: Path,
    model: PreTrainedModel,
    manifest: Mapping[str, Any],
    methods: Sequence[str],
    *,
    processor: str | None = None,
    datasets: Sequence[str] = (),
    template: str | os.PathLike[str] | None = None,
) -> None:
    """Write README.md, unless there is one.

    Args:
        model: the live model, without its adapter's wrapper.
        manifest: what stands in merge_manifest.json.
        methods: how the model in `directory` was saved; several: each in a directory of its name.
        processor: class of the tokenizer or processor beside it.
        datasets: ids on the Hub.
        template: a Jinja file of the user's. It is given `card_data`, and by name `title`,
            `base_model`, `methods`, `manifest`, `adapters`, `figures` and `snippet`; all but
            `manifest` are Markdown, in which names are escaped.
    """
    path = directory / "README.md"
    if path.exists():
        return
    base = manifest["base"]
    source = base["id"]
    known = bool(source) and (base["revision"] is not None or _on_the_hub(source))
    known = known and _names_a_repository(source)
    shown = inline(source) if source else None
    data = ModelCardData(
        base_model=source if known else None,
        base_model_relation="finetune" if known else None,
        library_name="transformers",
        datasets=[dataset for dataset in datasets if _is_an_id(dataset)] or None,
        tags=["merge_callback", "lora", *(["bitsandbytes"] if "merged_4bit" in methods else [])],
        **_licence(model),  # type: ignore[arg-type]
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template or TEMPLATE),
        title=f"{shown or class_of(model).__name__}, fine-tuned",
        base_model=shown,
        methods=methods,
        manifest=manifest,
        figures=figures_table(manifest),
        snippet=snippet(model, processor, _folder(methods)),
        adapters=inline(", ".join(manifest["adapters"])),
    )
    path.write_text(str(card), "utf-8")


def card_for_the_hub(text: str, repo_id: str, folder: str = "") -> str:
    """A card as it stands in a repository: its Python loads from there.

    A base model that is a path of the machine that trained is left out: the Hub refuses such a
    card, and PEFT writes them.

    Args:
        folder: of the repository, that the card lies in.
    """

    def load(call: re.Match[str]) -> str:
        inside = call["inside"] or folder
        return f'"{repo_id}"' + (f', subfolder="{inside}"' if inside else "")

    place = _PATH.search(text)
    if place is not None:
        text = _PATH.sub("", text).replace("from_pretrained(path", f"from_pretrained({load(place)}")
    card = ModelCard(text, ignore_metadata_errors=True)
    base = card.data.get("base_model")
    if isinstance(base, str) and not _names_a_repository(base):
        card.data.pop("base_model")
        card.data["tags"] = [tag for tag in card.data.get("tags") or () if base not in tag] or None
        return str(card)
    return text


def snippet(model: PreTrainedModel, processor: str | None, inside: str = "") -> str:
    """Python that loads the model, and generates where it can."""
    name = class_of(model).__name__
    kind = next((auto for auto, names in _AUTO.items() if name in names.values()), name)
    lines = [f"from transformers import {kind}", "", f'path = "{_PLACEHOLDER}{inside}"']
    lines.append(f'model = {kind}.from_pretrained(path, device_map="auto")')
    if processor is not None:
        auto = "AutoTokenizer" if "Tokenizer" in processor else "AutoProcessor"
        lines[0] = f"from transformers import {', '.join(sorted([kind, auto]))}"
        lines.append(f"processor = {auto}.from_pretrained(path)")
        if model.can_generate() and auto == "AutoTokenizer":
            lines += [
                'inputs = processor("Once upon a time", return_tensors="pt").to(model.device)',
                "outputs = model.generate(**inputs, max_new_tokens=40)",
                "print(processor.decode(outputs[0], skip_special_tokens=True))",
            ]
    return "\n".join(["```python", *lines, "```"])


def _folder(methods: Sequence[str]) -> str:
    """Where the first merged model lies below the card."""
    return "" if len(methods) == 1 else "/" + next(name for name in methods if name != "lora")


_AUTO = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


def _on_the_hub(source: str | None) -> bool:
    return bool(source) and str(source).count("/") == 1 and not os.path.exists(str(source))


def _names_a_repository(name: str) -> bool:
    return _is_an_id(name) and not os.path.exists(name)


def _is_an_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _licence(model: PreTrainedModel) -> dict[str, str]:
    """That of the base, with its name and link, where its card is at hand."""
    found = base_file(model.config, "README.md")
    try:
        data = _header(found) if found else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # not ours to mend
        return {}
    keys = ("license", "license_name", "license_link")
    values = {key: data.get(key) for key in keys}
    return {key: v for key, v in values.items() if isinstance(v, str) and v == plain(v)}


def _header(card: Path) -> dict[Any, Any]:
    """The YAML of a card, of which no more is read than a header has."""
    if not card.is_file():
        return {}
    with card.open("rb") as file:
        text = file.read(_LARGEST_HEADER).decode("utf-8", "replace").lstrip()
    if not text.startswith("---\n"):
        return {}
    found = yaml.safe_load(text[4:].partition("\n---")[0])
    return found if isinstance(found, dict) else {}
