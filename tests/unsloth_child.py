"""What stock transformers makes of a directory, in a process that has never seen Unsloth."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def outputs(path, ids, text):
    """Its logits; and of its tokenizer the ids of `text`, padding side, longest input and EOS."""
    assert not {"unsloth", "unsloth_zoo", "merge_callback"} & sys.modules.keys()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for module in model.modules():  # a repacked weight computes otherwise on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids)).logits
    words = AutoTokenizer.from_pretrained(path)
    told = {
        "ids": words(text)["input_ids"],
        "padding_side": words.padding_side,
        "model_max_length": words.model_max_length,
        "eos": words.eos_token,
        "template": words.chat_template,
        "config_eos": model.config.eos_token_id,
        "generation_eos": model.generation_config.eos_token_id,
        "use_cache": model.config.use_cache,
    }
    return logits.double().tolist(), told
