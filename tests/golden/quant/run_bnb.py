"""What transformers with bitsandbytes computes from a folder: `python run_bnb.py FOLDER INPUTS.npz RESULT.npz`.

`out` are logits, `types` the format of each module in 4 bits and whether its scales are in 8.
"""

import json
import sys
import warnings
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
import transformers


def main(folder: str, inputs: str, result: str) -> None:
    """Runs the model on the inputs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokens = torch.tensor(np.load(inputs)["tokens"]).long()
    kind = getattr(transformers, json.loads((Path(folder) / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(folder, attn_implementation="eager", device_map="cpu", dtype=torch.float32).eval()
    small = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for module in small:  # else the product is in bfloat16 on a CPU that can
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        out = model(input_ids=tokens).logits.numpy()
    types = [f"{module.weight.quant_type} {module.weight.compress_statistics}" for module in small]
    np.savez(result, out=out, types=np.asarray(types))


if __name__ == "__main__":
    main(*sys.argv[1:])
