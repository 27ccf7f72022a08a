"""The snippet of DCLM-1B's model card, with its import line changed, on a folder of yours.

python examples/dclm_model_card.py FOLDER
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from openlm_lite.hf import *  # noqa: F403  (instead of: from open_lm.hf import *)

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

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
