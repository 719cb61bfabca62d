"""Two ways in transformers to use what was merged: python generate.py DIRECTORY PROMPT

DIRECTORY is one of `merged_4bit` or `merged_16bit`; nothing but transformers (and bitsandbytes, for
4 bits) is needed, and both ways say the same.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def by_pipeline(directory, messages):
    say = pipeline("text-generation", directory)
    return say(messages, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]["content"]


def by_generate(directory, messages):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    directory, prompt = sys.argv[1:]
    messages = [{"role": "user", "content": prompt}]
    print("pipeline:", by_pipeline(directory, messages))
    print("generate:", by_generate(directory, messages))
