"""The model card of a merged model. Knows nothing of weights.

What the Hub asks for stands in its header; the text comes from a template, ours or the user's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils.hub import cached_file

from merge_callback.report import figures_table

TEMPLATE = Path(__file__).with_name("card.md.jinja")
_PLACEHOLDER = "path/to/this/directory"


def write_card(
    directory: Path,
    model: PreTrainedModel,
    manifest: Mapping[str, Any],
    method: str,
    *,
    processor: str | None = None,
    datasets: Sequence[str] = (),
    template: str | os.PathLike[str] | None = None,
) -> None:
    """Write README.md, unless there is one.

    Args:
        model: the live model, without its adapter's wrapper.
        manifest: what stands in merge_manifest.json.
        method: how the model in `directory` was saved.
        processor: class of the tokenizer or processor beside it.
        datasets: ids on the Hub.
        template: a Jinja file of the user's. It is given `card_data`, and by name `title`,
            `base_model`, `method`, `manifest`, `figures` and `snippet`, the last two Markdown.
    """
    path = directory / "README.md"
    if path.exists():
        return
    source = manifest["base"]["id"]
    data = ModelCardData(
        base_model=source if _on_the_hub(source) else None,
        base_model_relation="finetune" if _on_the_hub(source) else None,
        library_name="transformers",
        license=_licence(model),
        datasets=list(datasets) or None,
        tags=["merge_callback", "lora", *(["bitsandbytes"] if method == "merged_4bit" else [])],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template or TEMPLATE),
        title=f"{source or type(model).__name__}, fine-tuned",
        base_model=source,
        method=method,
        manifest=manifest,
        figures=figures_table(manifest),
        snippet=snippet(model, processor),
    )
    path.write_text(str(card))


def snippet(model: PreTrainedModel, processor: str | None) -> str:
    """Python that loads the model, and generates where it can."""
    name = type(model).__name__
    kind = next((auto for auto, names in _AUTO.items() if name in names.values()), name)
    lines = [f"from transformers import {kind}", "", f'path = "{_PLACEHOLDER}"']
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


def _licence(model: PreTrainedModel) -> str | None:
    """That of the base, where its card is at hand."""
    source = getattr(model.config, "_name_or_path", "") or ""
    if not source:
        return None
    try:
        found = cached_file(
            source,
            "README.md",
            revision=getattr(model.config, "_commit_hash", None),
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return ModelCard.load(found).data.get("license") if found else None
    except (OSError, ValueError):  # it is gone, or its header is no YAML: not ours to mend
        return None
