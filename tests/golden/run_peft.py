"""What Hugging Face PEFT computes from a folder: `python run_peft.py BASE ADAPTER INPUTS.npz RESULT.npz`.

`out` and `merged` are logits of the adapted model and after `merge_and_unload`; `sgd` eight losses of training that goes on
from the folder, at a learning rate of 0.1 on the batch in INPUTS; `after` the merged model's logits after that.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

STEPS, RATE = 8, 0.1


def main(base: str, adapter: str, inputs: str, result: str) -> None:
    """Runs PEFT on the inputs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given = np.load(inputs)
    tokens = torch.tensor(given["tokens"]).long()
    kind = getattr(transformers, json.loads((Path(base) / "config.json").read_text())["architectures"][0])

    def opened() -> torch.nn.Module:
        model = kind.from_pretrained(base, attn_implementation="eager", dtype=torch.float32).eval()
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()

    model, losses = opened(), []
    with torch.no_grad():
        out = model(input_ids=tokens).logits.numpy()
        merged = opened().merge_and_unload()(input_ids=tokens).logits.numpy()
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    for _ in range(STEPS):
        logits = model(input_ids=tokens).logits
        if "labels" in given:
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(given["labels"]).long())
        else:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        after = model.merge_and_unload()(input_ids=tokens).logits.numpy()
    np.savez(result, out=out, merged=merged, sgd=np.asarray(losses, np.float32), after=after)


if __name__ == "__main__":
    main(*sys.argv[1:])
