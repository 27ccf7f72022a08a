"""The snippet of DCLM-1B's model card, with its import line changed, on a folder of yours.

python examples/dclm_model_card.py FOLDER
"""
# ruff: noqa: F403, I001  (the card's import and order)

import sys

from openlm_lite.hf import *
from transformers import AutoTokenizer, AutoModelForCausalLM

FOLDER = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)

inputs = tokenizer(["Machine learning is"], return_tensors="pt")
gen_kwargs = {
    "max_new_tokens": 50,
    "top_p": 0.8,
    "temperature": 0.8,
    "do_sample": True,
    "repetition_penalty": 1.1,
}
output = model.generate(inputs["input_ids"], **gen_kwargs)
output = tokenizer.decode(output[0].tolist(), skip_special_tokens=True)
print(output)
