"""Makes `loralib.bin`, an adapter of loralib for `models/roberta_sequence_classification`, and `loralib.npz`.

    pip install torch==2.13.0 transformers==5.23.0 numpy && python tests/golden/make_loralib.py

Rank 3, alpha 6, on queries and values, and the classifier. The file has what torch may save: tensors that share a storage, that
are transposed, parameters, and another dtype. `loralib.npz` holds `tokens`, `mask`, and `out`, the logits of transformers with
W + alpha / r B A in place of each W. float32 on the CPU with eager attention.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

HERE = Path(__file__).parent
RANK, ALPHA = 3, 6

if __name__ == "__main__":
    folder = HERE / "models" / "roberta_sequence_classification"
    kind = transformers.RobertaForSequenceClassification
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.4 * torch.randn(shape, generator=generator)
    storage = draw(4, RANK, 16)
    adapter = {}
    for i, layer in enumerate(model.roberta.encoder.layer):
        for j, name in enumerate(("query", "value")):
            key = f"roberta.encoder.layer.{i}.attention.self.{name}"
            a, b = storage[2 * i + j], draw(RANK, 16).T
            adapter |= {f"{key}.lora_A": a, f"{key}.lora_B": torch.nn.Parameter(b)}
            getattr(layer.attention.self, name).weight.data += ALPHA / RANK * (b @ a)
    head = {key: draw(*value.shape) for key, value in model.classifier.state_dict().items()}
    head["dense.bias"] = head["dense.bias"].bfloat16()
    model.classifier.load_state_dict(head)
    adapter |= {f"classifier.{key}": value for key, value in head.items()}
    torch.save(adapter, HERE / "loralib.bin")
    calls = load_file(folder / "golden.safetensors")
    tokens, mask = calls["masked/tokens"], calls["masked/mask"]
    with torch.no_grad():
        out = model(tokens.long(), attention_mask=mask.long()).logits
    assert (out - calls["masked/out"]).abs().max() > 0.1
    np.savez_compressed(HERE / "loralib.npz", tokens=tokens.numpy(), mask=mask.numpy(), out=out.numpy())
    print(out)
