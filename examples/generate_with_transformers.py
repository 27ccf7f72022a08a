"""An exported folder is an ordinary Hugging Face model: nothing of openlm_lite is imported here.

python examples/generate_with_transformers.py runs/quickstart/hf "def __init__(self, "
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


def main(folder: str, prompt: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.6, top_p=0.9)
    print(f"{type(model).__name__}:")
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
