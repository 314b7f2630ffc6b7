"""Makes `methods.npz`: eight training steps of each method by Hugging Face PEFT, on a tiny network with random weights.

    pip install torch==2.13.0 peft==0.21.2 numpy && python tests/golden/make_methods.py

The network is `tanh(x up^T) down^T` without biases, in float64, the loss the mean square to a target, the optimizer plain
gradient descent, so that factors, gradients and losses of every step depend on the method alone. AdaLoRA is trained with
the budget's steps in between, as PEFT's documentation has it.
"""

from pathlib import Path

import numpy as np
import peft
import torch

STEPS, LEARNING_RATE = 8, 0.2
IN, HIDDEN, OUT, ROWS = 8, 12, 6, 10

METHODS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=6),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=6, use_dora=True),
    "pissa": lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="olora"),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, tinit=2, tfinal=2, deltaT=1, total_step=STEPS, orth_reg_weight=0.3
    ),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down"]),
    "vera": lambda: peft.VeraConfig(r=5, projection_prng_key=3, d_initial=0.2),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=3),
    "lokr, whole": lambda: peft.LoKrConfig(r=2, alpha=3),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False),
}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(IN, HIDDEN, bias=False)
        self.down = torch.nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def trained(name: str) -> dict[str, np.ndarray]:
    """Losses, and the adapter's arrays and their gradients at every step."""
    torch.manual_seed(0)
    net = Net()
    x, target = torch.randn(ROWS, IN, dtype=torch.float64), torch.randn(ROWS, OUT, dtype=torch.float64)
    record = {"x": x, "target": target, "base/up": net.up.weight.double(), "base/down": net.down.weight.double()}
    config = METHODS[name]()
    config.target_modules = ["up", "down"]
    model = peft.get_peft_model(net, config).double()
    generator = torch.Generator().manual_seed(1)
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    if name not in ("pissa", "olora"):  # what starts at zero hides mistakes; those two start where they have to
        for value in parameters.values():
            value.data += 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    for key, value in model.named_buffers():
        if "vera_" in key:
            record[f"buffer/{key.split('.')[-2]}"] = value
    optimizer = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE)
    record["y"] = model(x)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = ((model(x) - target) ** 2).mean()
        if name == "adalora":
            loss = loss + orthogonality(model, config.orth_reg_weight)
        loss.backward()
        record[f"{step}/loss"] = loss
        for key, value in parameters.items():
            record[f"{step}/value/{short(key)}"] = value.data.clone()
            record[f"{step}/gradient/{short(key)}"] = value.grad.clone()
        optimizer.step()
        if name == "adalora":
            model.base_model.update_and_allocate(step + 1)
    for key, value in parameters.items():
        record[f"{STEPS}/value/{short(key)}"] = value.data.clone()
    record[f"{STEPS}/y"] = model(x)
    return {key: value.detach().numpy().astype(np.float64) for key, value in record.items()}


def orthogonality(model: torch.nn.Module, weight: float) -> torch.Tensor:
    """The regulariser as PEFT's AdaLoraModel adds it to a transformer's loss."""
    total, count = 0.0, 0
    for key, p in model.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            gram = p @ p.T if "lora_A" in key else p.T @ p
            total, count = total + torch.norm(gram - torch.eye(*gram.size()), p="fro"), count + 1
    return weight * total / count


def short(key: str) -> str:
    """base_model.model.up.lora_A.default.weight -> up/lora_A"""
    parts = [part for part in key.split(".") if part not in ("base_model", "model", "default", "weight")]
    return "/".join(parts)


if __name__ == "__main__":
    arrays = {f"{name}/{key}": value for name in METHODS for key, value in trained(name).items()}
    np.savez_compressed(Path(__file__).with_name("methods.npz"), **arrays)
    for name in METHODS:
        values = [key for key in arrays if key.startswith(f"{name}/0/value")]
        losses = [float(arrays[f"{name}/{step}/loss"]) for step in (0, STEPS - 1)]
        print(name, losses, {key.split("/", 3)[3]: arrays[key].shape for key in values})
