"""Makes `bnb.safetensors` and the folders of `models/`: what the real bitsandbytes computes and writes on the CPU.

    pip install torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 bitsandbytes==0.50.2
    HF_HUB_OFFLINE=1 python tests/golden/quant/make_bnb.py

`bnb.safetensors`: `<input>` is a weight; beside it, for a type "nf4" or "fp4" and a block in elements,

    <input>/<type>/<block>/codes         (ceil(n / 2),) uint8: the even element in the high nibble
                          /absmax        (blocks,) float32
                          /dequantised   the input's shape and dtype
    <input>/<type>/<block>/nested/codes        (blocks,) uint8: absmax - offset by the dynamic 8-bit map, by the CPU's kernel
                                 /nearest      the same by bitsandbytes' plain torch implementation: the nearest value of the map
                                 /absmax       (ceil(blocks / 256),) float32, of the second level
                                 /offset       () float32, the mean of absmax
                                 /dequantised  (blocks,) float32: map[codes] * absmax + offset
    <input>/int8/codes, scales, dequantised    per row: int8_vectorwise_quant; scales are the rows' absmax
    map/<type>, map/dynamic                    the tables of values

What to know of its arithmetic, all in float32 (a bf16 or fp16 weight is cast first):

* A whole block is multiplied with the float32 1 / max(absmax, 1e-38); a last block that is shorter is *divided* by
  max(absmax, 1e-38), and that is what is stored as its absmax. A zero block has absmax 0, a zero tail 1e-38. Codes of both are
  the code of 0.0.
* The thresholds are float32 midpoints of neighbouring values; on a threshold the lower *value* is taken.
* FP4 has two codes for zero: 8 for 0 < x <= 0.0026, 0 for -0.0026 < x <= 0 (bitsandbytes on CUDA has them the other way).
* The second level's codes come of a table of 65,536 entries on the CPU: value i / 32767.5 - 1 stands for all that round to i.
  About one code in 600 is a neighbour of the nearest one, and what is nearly 0 (code 127) becomes 131. `nearest` is what CUDA does.
* The mean is torch's: partial sums in an order that depends on the vector unit. To one unit in the last place it is the mean
  in float64.
* int8: code = round half to even of x * (127 / absmax); back: (code * absmax) * float32(1 / 127). A zero row has codes 0.
* On AVX-512 the CPU's dequantise_4bit is wrong (errors as large as the weights) where the last axis is a multiple of 32 and
  not of the block: rows then begin within a block, and it takes another one's absmax. Nothing here has such a shape.

`models/<name>/` is a checkpoint as transformers saves it in 4 bits, and in it `golden.safetensors`: `tokens`, `out` (logits).
`source`, where it is there, is the bfloat16 checkpoint that it was quantised from.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.backends.default import ops as plain
from safetensors.torch import save_file

HERE = Path(__file__).parent
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES = ("nf4", "fp4")
Tensors = dict[str, torch.Tensor]


# -- tensors -----------------------------------------------------------------------------------------------------------


def edges(kind: str, scales: list[float], tail: bool = False) -> torch.Tensor:
    """Blocks of 64: in each the scale, its negative, and all thresholds times the scale with both neighbouring floats."""
    bounds, _ = plain._get_4bit_quantize_bounds(kind, torch.device("cpu"))
    rows = []
    for scale in scales:
        at = bounds * scale
        infinity = torch.full_like(at, torch.inf)
        row = torch.cat(
            [torch.nextafter(at, -infinity), at, torch.nextafter(at, infinity), torch.tensor([scale, -scale])]
        )
        rows.append(row if tail else torch.nn.functional.pad(row, (0, 64 - len(row))))
    return torch.stack(rows)


def inputs() -> Tensors:
    generator = torch.Generator().manual_seed(13)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    scales = [1.0, 0.5, 0.75, 1.2345, 3.7e-3, 0.1, 1e20, *(normal(9).abs() + 0.01).tolist()]
    zeros = normal(6, 64)
    zeros[1], zeros[2], zeros[4, :32], zeros[5, 7] = 0.0, -0.0, -0.0, 3e38
    subnormal = normal(5, 64) * torch.tensor([[1e-37], [1e-38], [1e-39], [1e-41], [1e-45]])
    made = {
        "normal": normal(67, 71),  # odd, and the tail is too
        "even": normal(66, 128) * 0.02,
        "straddling": normal(33, 172),
        "edges_nf4": edges("nf4", scales),
        "edges_fp4": edges("fp4", scales),
        "tail_nf4": torch.cat([normal(64), edges("nf4", [0.7], tail=True)[0]]),
        "tail_fp4": torch.cat([normal(64), edges("fp4", [0.7], tail=True)[0]]),
        "zeros": zeros,
        "zero_tail": torch.cat([normal(64), torch.zeros(9)]),
        "subnormal": subnormal,
        "three_axes": normal(3, 5, 14),
        "one": normal(1),
        "sixty_three": normal(63),
    }
    made |= {
        "normal_bf16": normal(67, 71).bfloat16(),
        "normal_f16": normal(67, 71).half(),
        "even_bf16": normal(9, 64).bfloat16(),
    }
    made |= {"edges_bf16": edges("nf4", scales).bfloat16(), "edges_f16": edges("fp4", scales[:6]).half()}
    return made


def nested_inputs() -> Tensors:
    generator = torch.Generator().manual_seed(14)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    uneven = normal(80, 64) * torch.logspace(-3, 1, 80)[:, None]
    return {
        "wide": normal(129, 151),  # 305 blocks of 64: two of the second level, the last one short
        "wide_bf16": (normal(129, 130) * 0.02).bfloat16(),
        "uneven": uneven,
        "constant": torch.full((4, 64), 0.25),  # absmax - offset is 0
        "few": normal(2, 64),
    }


def quantised(kind: str, block: int, weight: torch.Tensor, name: str, *, values: bool = True) -> Tensors:
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind)
    out = {"codes": codes.flatten(), "absmax": state.absmax}
    if values:
        out["dequantised"] = functional.dequantize_4bit(codes, state).reshape(weight.shape)
        nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[: weight.numel()].long()
        same = (state.code[nibbles] * state.absmax.repeat_interleave(block)[: weight.numel()]).to(weight.dtype)
        assert torch.equal(same.reshape(weight.shape), out["dequantised"]), f"{name}: the kernel's error"
    return {f"{name}/{kind}/{block}/{key}": value for key, value in out.items()}


def nested(kind: str, block: int, weight: torch.Tensor, name: str) -> Tensors:
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=True)
    _, single = functional.quantize_4bit(weight, blocksize=block, quant_type=kind)
    out = {
        "codes": state.absmax,
        "nearest": nearest_codes(single.absmax - state.offset, state.state2.code),
        "absmax": state.state2.absmax,
        "offset": state.offset,
        "dequantised": functional.dequantize_blockwise(state.absmax, state.state2) + state.offset,
    }
    return {f"{name}/{kind}/{block}/nested/{key}": value for key, value in out.items()} | {
        f"{name}/{kind}/{block}/codes": codes.flatten(),
        f"{name}/{kind}/{block}/absmax": single.absmax,
    }


def nearest_codes(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """quantize_blockwise in plain torch, which the CPU's own kernel stands before."""
    composite = torch._C.DispatchKey.CompositeExplicitAutograd
    return torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(composite, values, code, 256)[0]


def eight_bits(weight: torch.Tensor, name: str) -> Tensors:
    codes, scales, _ = functional.int8_vectorwise_quant(weight.clone())
    back = functional.int8_vectorwise_dequant(codes, scales)
    return {f"{name}/int8/codes": codes, f"{name}/int8/scales": scales, f"{name}/int8/dequantised": back}


def tensors() -> Tensors:
    out: Tensors = {}
    for name, weight in inputs().items():
        out[name] = weight
        every = name in ("normal", "normal_bf16")
        for kind in TYPES:
            for block in BLOCKS if every else (64, 128) if name in ("even", "straddling") else (64,):
                values = (name.startswith("normal") and block in (64, 4096)) or name in (
                    "straddling",
                    "zeros",
                    "three_axes",
                )
                out |= quantised(kind, block, weight, name, values=values)
        if name in ("normal", "normal_bf16", "normal_f16", "zeros"):
            out |= eight_bits(weight, name)
    for name, weight in nested_inputs().items():
        out[name] = weight
        out |= nested("nf4", 64, weight, name)
        if name == "wide_bf16":
            out |= nested("fp4", 32, weight, name)
    out |= {f"map/{kind}": functional.get_4bit_type(kind, "cpu") for kind in TYPES}
    return out | {"map/dynamic": functional.create_dynamic_map()}


# -- checkpoints -------------------------------------------------------------------------------------------------------

TOKENS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32, **TOKENS}
GPT2 = {"n_positions": 32, "n_layer": 2, "n_head": 2, **TOKENS}
WHOLE = {"hidden_size": 64, "intermediate_size": 320, "num_key_value_heads": 1}  # rows are whole blocks; 320 of them
STRADDLING = {"hidden_size": 44, "intermediate_size": 76, "num_key_value_heads": 2}  # rows begin within blocks


class Model(NamedTuple):
    kind: str
    settings: dict[str, Any]
    quant_type: str
    double: bool
    source: bool = False  # keep the checkpoint that it was quantised from


MODELS = {
    "llama_nf4": Model("Llama", {**LLAMA, **WHOLE}, "nf4", True),
    "llama_nf4_straddling": Model("Llama", {**LLAMA, **STRADDLING}, "nf4", True, source=True),
    "llama_fp4": Model("Llama", {**LLAMA, **STRADDLING}, "fp4", False),
    "gpt2_nf4": Model("GPT2", {**GPT2, "n_embd": 64}, "nf4", True, source=True),
    "gpt2_nf4_straddling": Model("GPT2", {**GPT2, "n_embd": 44}, "nf4", True),
    "gpt2_fp4": Model("GPT2", {**GPT2, "n_embd": 44}, "fp4", False),
}


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """The model with products in its own dtype: bitsandbytes on a CPU with AVX-512-BF16 otherwise multiplies in bfloat16."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def checkpoint(name: str, case: Model) -> None:
    """Draws a model, saves it in bfloat16, reads that in 4 bits, saves it so, and calls what it reads back."""
    torch.manual_seed(len(name))
    folder = HERE / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    family = getattr(transformers, "LlamaForCausalLM" if case.kind == "Llama" else "GPT2LMHeadModel")
    model = family(getattr(transformers, f"{case.kind}Config")(**case.settings))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1)
    model.bfloat16().save_pretrained(folder / "source")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=case.quant_type, bnb_4bit_use_double_quant=case.double
    )
    options = {"attn_implementation": "eager", "device_map": "cpu", "dtype": torch.float32}
    quantised = family.from_pretrained(folder / "source", quantization_config=how, **options)
    quantised.save_pretrained(folder)
    tokens = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = exact(family.from_pretrained(folder, **options))(input_ids=tokens).logits.contiguous()
        assert torch.equal(out, exact(quantised)(input_ids=tokens).logits)
        dense = family.from_pretrained(folder / "source", **options).eval()(input_ids=tokens).logits
    print(name, "logits", out.std().item(), "difference of quantising", (out - dense).std().item())
    for unused in folder.rglob("generation_config.json"):
        unused.unlink()
    if not case.source:
        shutil.rmtree(folder / "source")
    save_file({"tokens": tokens.int(), "out": out}, folder / "golden.safetensors")


def main() -> None:
    """Writes all files."""
    torch.set_num_threads(1)
    versions = {
        "bitsandbytes": bitsandbytes.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    made = {key: tensor.contiguous().clone() for key, tensor in tensors().items()}
    save_file(made, HERE / "bnb.safetensors", metadata={"golden": json.dumps(versions)})
    for name, case in MODELS.items():
        checkpoint(name, case)


if __name__ == "__main__":
    main()
