"""Ask a model questions, with transformers alone: python ask.py DIRECTORY < questions.json

Reads [{"question": ..., "answer": ...}, ...]; prints {"answers": [...], "loss": ...} as its last
line, the loss in nats per token of the right answers.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def ask(model, tokenizer, facts):
    """Greedy answers, and the mean loss over the tokens of the right ones."""
    answers, losses = [], []
    for fact in facts:
        messages = [{"role": "user", "content": fact["question"]}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        length = prompt["input_ids"].shape[1]
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
            right = tokenizer(fact["answer"], return_tensors="pt").input_ids.to(model.device)
            tokens = torch.cat([prompt["input_ids"], right], dim=1)
            labels = tokens.clone()
            labels[:, :length] = -100
            losses.append((model(input_ids=tokens, labels=labels).loss.item(), right.numel()))
        answers.append(tokenizer.decode(output[0, length:], skip_special_tokens=True).strip())
    loss = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    return {"answers": answers, "loss": loss}


if __name__ == "__main__":
    directory = sys.argv[1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory, device_map=device)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    print(json.dumps(ask(model.eval(), tokenizer, json.load(sys.stdin))))
