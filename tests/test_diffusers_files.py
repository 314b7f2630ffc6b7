"""Files of diffusers, of each era, by the formulas of their formats; what breaks in other loaders is a test here."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.interop import diffusers, kohya, tensor_file
from jlora.interop.layer import Layer, merged
from tests.pipelines import exactly, low_rank, normal, placed, small, weights

pytestmark = pytest.mark.once

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # (8, 8) in a small model
OUT = Q.replace("to_q", "to_out.0")
CONV = "down_blocks.0.resnets.0.conv1"  # (8, 8, 3, 3)
TEXT = "encoder.layers.1.self_attn.q_proj"  # (19, 19)


def of_lora(name: str, shape: tuple[int, ...], rank: int = 2, names=("lora_A", "lora_B")) -> dict:
    return {f"{name}.{part}.weight": x for part, x in zip(names, low_rank(shape, rank), strict=True)}


def read(tensors, models, metadata=None):
    return diffusers.layers_of(tensors, metadata or {}, models)


def only(tensors, models, component="unet", metadata=None) -> Layer:
    found = read(tensors, models, metadata).layers
    assert list(found) == [component]
    (layer,) = found[component]
    return layer


def said(**configs) -> dict[str, str]:
    """The metadata of a file with configs of components."""
    flat = {f"{component}.{name}": x for component, own in configs.items() for name, x in own.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(flat)}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, x in expected.items():
        assert found[key].dtype == x.dtype and found[key].shape == x.shape, key
        np.testing.assert_array_equal(found[key], x, err_msg=key)


# -- names -------------------------------------------------------------------------------------------------------------

PROCESSOR = Q.replace("to_q", "processor.to_q_lora")
DOWN_UP = ("down", "up")


@pytest.mark.parametrize(
    ("name", "parts", "module"),
    [
        (f"unet.{Q}", ("lora_A", "lora_B"), Q),
        (Q, ("lora_A", "lora_B"), Q),  # a UNet that was saved alone
        (f"unet.{OUT}", ("lora_A", "lora_B"), OUT),
        (f"unet.{Q}", ("lora.down", "lora.up"), Q),
        (f"unet.{OUT}", ("lora.down", "lora.up"), OUT),
        (f"unet.{PROCESSOR}", DOWN_UP, Q),
        (f"unet.{OUT.replace('to_out.0', 'processor.to_out_lora')}", DOWN_UP, OUT),
        (PROCESSOR, DOWN_UP, Q),
        (OUT.replace("to_out.0", "processor.to_out_lora"), DOWN_UP, OUT),
    ],
)
def test_names_of_each_era(name, parts, module):
    layer = only(of_lora(name, (8, 8), names=parts), small("sd15"))
    a, b = low_rank((8, 8), 2)
    assert (layer.module, layer.kind, layer.rank, layer.scale) == (module, "lora", 2, 1.0)
    w = normal((8, 8), 9)
    np.testing.assert_allclose(merged(layer, w), w + b @ a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("within", ["", "text_model."])
@pytest.mark.parametrize(
    ("name", "parts", "module"),
    [
        ("self_attn.q_proj", ("lora_A", "lora_B"), "self_attn.q_proj"),
        ("self_attn.q_proj", ("lora_linear_layer.down", "lora_linear_layer.up"), "self_attn.q_proj"),
        ("self_attn.to_k_lora", DOWN_UP, "self_attn.k_proj"),
        ("self_attn.to_out_lora", DOWN_UP, "self_attn.out_proj"),
    ],
)
def test_names_of_text_encoders(component, within, name, parts, module):
    """The list of the first encoder's modules has no `text_model.` and that of the second has; files have either."""
    models = small("sdxl")
    width = 19 if component == "text_encoder" else 32
    tensors = of_lora(f"{component}.{within}encoder.layers.1.{name}", (width, width), names=parts)
    own = "text_model." if component == "text_encoder_2" else ""
    assert only(tensors, models, component).module == f"{own}encoder.layers.1.{module}"


@pytest.mark.parametrize("pipeline", ["sd15", "sd21", "sdxl"])
def test_files_of_all_modules_come_back_bit_for_bit(pipeline, tmp_path):
    models = small(pipeline)
    expected = {}
    for component, own in weights(models).items():
        for i, module in enumerate(own):
            inner = module.removeprefix("text_model.")
            name = inner if component == "unet" or inner == "text_projection" else f"text_model.{inner}"
            tensors = of_lora(f"{component}.{name}", models[component][f"{module}.weight"], 1 + i % 3)
            expected |= {key: x.astype(np.float16) for key, x in tensors.items()}
    found = read(expected, models)
    assert {c: len(layers) for c, layers in found.layers.items()} == {c: len(own) for c, own in weights(models).items()}
    diffusers.write(tmp_path / "file.safetensors", found.layers, models)
    assert_same(load_file(tmp_path / "file.safetensors"), expected)


# -- scales ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"r": 2, "lora_alpha": 8}, 4.0),
        ({"r": 2, "lora_alpha": None}, 1.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}}, 4.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_q": 1}}, 0.5),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"o_q": 1}}, 4.0),  # the end of the path, of whole names
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_k": 1, f"^{Q}": 3, "to_q": 5}}, 1.5),  # the first that fits
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {r"attn1\.to_(q|k)": 6}}, 3.0),
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
    ],
)
def test_alphas_of_the_metadata(config, scale):
    layer = only(of_lora(f"unet.{Q}", (8, 8)), small("sd15"), metadata=said(unet=config))
    assert layer.scale == pytest.approx(scale, rel=1e-15)


def test_a_tensor_of_alpha_goes_before_the_metadata_and_another_components_is_not_taken():
    models = small("sd15")
    metadata = said(unet={"r": 2, "lora_alpha": 8}, text_encoder_2={"r": 2, "lora_alpha": 32})
    tensors = of_lora(f"unet.{Q}", (8, 8)) | {f"unet.{Q}.alpha": np.asarray(1.0, np.float16)}
    tensors |= of_lora(f"unet.{OUT}", (8, 8)) | of_lora(f"text_encoder.{TEXT}", (19, 19))
    found = read(tensors, models, metadata).layers
    assert {layer.module: layer.scale for own in found.values() for layer in own} == {Q: 0.5, OUT: 4.0, TEXT: 1.0}


def test_metadata_of_a_unet_that_was_saved_alone():
    """`unet.save_lora_adapter` writes no prefixes, in the keys or in the config."""
    metadata = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 6})}
    assert only(of_lora(Q, (8, 8)), small("sd15"), metadata=metadata).scale == 3.0


def test_mixed_ranks_without_alpha_have_scale_one_each():
    models = small("sd15")
    tensors = of_lora(f"unet.{Q}", (8, 8), 4) | of_lora(f"unet.{OUT}", (8, 8), 1)
    assert {(layer.rank, layer.scale) for layer in read(tensors, models).layers["unet"]} == {(4, 1.0), (1, 1.0)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "Expecting value: line 1 column 2 (char 1)"),
        ("[]", "'list' object has no attribute 'items'"),
        ('{"unet.r": "8"}', "r is '8'"),
        ('{"unet.lora_alpha": true}', "lora_alpha is True"),
        ('{"unet.lora_alpha": Infinity}', "lora_alpha is inf"),
        (
            '{"unet.alpha_pattern": {"(a+)+": 1}}',
            "a pattern: '(a+)+' repeats or branches so often that it could take forever on some names",
        ),
    ],
)
def test_damaged_metadata(text, reason):
    expected = f"the file: lora_adapter_metadata holds no configs of PEFT's: {reason}"
    with pytest.raises(ValueError, match=exactly(expected)):
        read(of_lora(f"unet.{Q}", (8, 8)), small("sd15"), {"lora_adapter_metadata": text})


def test_a_rank_that_the_tensors_do_not_have():
    expected = f"the file: lora_adapter_metadata has rank 4 for unet's '{Q}', and its tensors 2"
    with pytest.raises(ValueError, match=exactly(expected)):
        read(of_lora(f"unet.{Q}", (8, 8)), small("sd15"), said(unet={"r": 4, "lora_alpha": 4}))


# -- DoRA and biases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "shape"), [(Q, (8, 8)), (CONV, (8, 8, 3, 3))], ids=["linear", "convolution"])
def test_magnitudes_are_of_outputs(module, shape):
    """PEFT has (out,) of a linear layer and (1, out, 1, 1) of a convolution, which in LyCORIS would be of inputs."""
    models = small("sd15")
    m = np.linspace(1, 2, 8, dtype=np.float32)
    tensors = of_lora(f"unet.{module}", shape)
    tensors[f"unet.{module}.lora_magnitude_vector"] = m if len(shape) == 2 else m.reshape(1, 8, 1, 1)
    layer = only(tensors, models, metadata=said(unet={"r": 2, "lora_alpha": 4}))
    w, (a, b) = normal(shape, 4), low_rank(shape, 2)
    v = w + 2 * np.einsum("or,ri...->oi...", b.reshape(8, 2), a)
    axes = tuple(range(1, w.ndim))
    expected = m.reshape(-1, *[1] * (w.ndim - 1)) * v / np.sqrt((v**2).sum(axes, keepdims=True))
    np.testing.assert_allclose(merged(layer, w), expected, rtol=1e-5, atol=1e-6)
    assert_same(diffusers.tensors_of({"unet": [layer]}, models)[0], tensors)
    other = kohya.tensors_of({"unet": [layer]}, models)
    (name,) = [key for key in other if key.endswith("dora_scale")]
    assert other[name].shape == (8, *[1] * (w.ndim - 1))
    (back,) = kohya.layers_of(other, {}, models).layers["unet"]
    np.testing.assert_allclose(merged(back, w), expected, rtol=1e-5, atol=1e-6)


def test_a_bias_of_b_has_the_scale_of_b():
    models = small("sd15")
    tensors = of_lora(f"unet.{OUT}", (8, 8)) | {f"unet.{OUT}.lora_B.bias": normal((8,), 2)}
    found = read(tensors, models, said(unet={"r": 2, "lora_alpha": 6})).layers["unet"]
    assert [(layer.key, layer.kind, layer.scale) for layer in found] == [
        (f"{OUT}.weight", "lora", 3.0), (f"{OUT}.bias", "diff", 3.0),
    ]  # fmt: skip
    back, metadata = diffusers.tensors_of({"unet": found}, models)
    assert_same(back, tensors)
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_bias"] is True
    folded, _ = diffusers.tensors_of({"unet": found}, models, fold_alpha=True)
    np.testing.assert_allclose(folded[f"unet.{OUT}.lora_B.bias"], 3 * normal((8,), 2), rtol=1e-6)
    other = kohya.tensors_of({"unet": found}, models)
    np.testing.assert_allclose(other["lora_unet_" + OUT.replace(".", "_") + ".diff_b"], 3 * normal((8,), 2), rtol=1e-6)


# -- faults ------------------------------------------------------------------------------------------------------------

FAULTS = {
    "unknown module": (
        of_lora("unet.mid_block.attentions.3.proj_in", (8, 8)),
        *[f"'unet.mid_block.attentions.3.proj_in.lora_{part}.weight' is of the unet, which has no such module" for part in "AB"],
    ),
    "unknown component": (
        {"text_encoder_2.text_projection.lora_A.weight": np.ones((1, 8))},
        "'text_encoder_2.text_projection.lora_A.weight' is of the text_encoder_2, which is not here: without= leaves out what is not wanted",
    ),
    "transformer": (
        {"transformer.blocks.0.attn.to_q.lora_A.weight": np.ones((1, 8))},
        "'transformer.blocks.0.attn.to_q.lora_A.weight' is of a transformer (SD 3, FLUX and others), which jlora does not have",
    ),
    "a kohya file": (
        {"lora_unet_conv_in.alpha": np.ones(())},
        "'lora_unet_conv_in.alpha' is a name of kohya's: read this file by jlora.kohya.load",
    ),
    "nothing": (
        {"vae.x.lora_A.weight": np.ones((1, 8))},
        "'vae.x.lora_A.weight' is no key of a diffusers file for a UNet or its text encoders",
    ),
    "half": (
        {f"unet.{Q}.lora_B.weight": np.ones((8, 1))},
        f"'unet.{Q}.lora_B.weight' is a part of lora, whose A unet's '{Q}' lacks",
    ),
    "misshaped": (
        of_lora(f"unet.{CONV}", (8, 8, 1, 1)),
        f"'unet.{CONV}.lora_A.weight' has shape (2, 8, 1, 1), expected (2, 8, 3, 3) for unet's '{CONV}' of shape (8, 8, 3, 3)",
    ),
    "magnitude": (
        of_lora(f"unet.{Q}", (8, 8)) | {f"unet.{Q}.lora_magnitude_vector": np.ones(9)},
        f"'unet.{Q}.lora_magnitude_vector' has shape (9,), expected (8,) for unet's '{Q}' of shape (8, 8)",
    ),
    "no bias": (
        of_lora(f"unet.{Q}", (8, 8)) | {f"unet.{Q}.lora_B.bias": np.ones(8)},
        f"'unet.{Q}.lora_B.bias': unet's '{Q}' has no bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named_and_nothing_is_read(name):
    tensors, *lines = FAULTS[name]
    everything = of_lora(f"unet.{OUT}", (8, 8)) | tensors
    head = f"the file: {len(lines)} of {len(everything)} tensors cannot be placed, so none is:"
    with pytest.raises(ValueError, match=exactly("\n  ".join([head, *lines]))):
        read(everything, small("sd15"))


@pytest.mark.parametrize(
    ("stem", "parts"),
    [
        ("attn2.to_k", ("lora_A", "lora_B")), ("attn2.to_k", ("lora.down", "lora.up")),
        ("attn2.processor.to_k_lora", DOWN_UP),
    ],
)  # fmt: skip
def test_a_file_of_another_base_says_so(stem, parts):
    models = small("sd15")
    del models["text_encoder"]
    tensors = of_lora(f"unet.down_blocks.2.attentions.1.transformer_blocks.9.{stem}", (32, 51), names=parts)
    start = "the file: 2 of 2 tensors cannot be placed, so none is; the file is for a base whose texts have width 51, "
    with pytest.raises(ValueError, match=rf"\A{re.escape(start)}and the model's have 19:\n"):
        read(tensors, models)


# -- writing -----------------------------------------------------------------------------------------------------------


def lora(module, shape, rank, scale=1.0, **more) -> Layer:
    a, b = low_rank(shape, rank)
    return Layer(module, "lora", {"A": a, "B": b} | more, scale)


def test_metadata_has_the_real_ranks_and_alphas():
    models = small("sd15")
    layers = {
        "unet": [lora(Q, (8, 8), 2, 2.0), lora(OUT, (8, 8), 2, 2.0), lora(CONV, (8, 8, 3, 3), 3, 0.5)],
        "text_encoder": [lora(TEXT, (19, 19), 4, 0.25)],
    }
    tensors, metadata = diffusers.tensors_of(layers, models)
    assert set(metadata) == {"format", "lora_adapter_metadata"} and metadata["format"] == "pt"
    fixed = {
        "peft_type": "LORA",
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
    }
    unet = fixed | {
        "r": 2, "lora_alpha": 4, "rank_pattern": {f"^{CONV}": 3}, "alpha_pattern": {f"^{CONV}": 1.5},
        "target_modules": sorted([Q, OUT, CONV]),
    }  # fmt: skip
    text = fixed | {"r": 4, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": [TEXT]}
    expected = {f"unet.{name}": x for name, x in unet.items()} | {f"text_encoder.{name}": x for name, x in text.items()}
    assert json.loads(metadata["lora_adapter_metadata"]) == expected
    assert f"text_encoder.text_model.{TEXT}.lora_A.weight" in tensors
    found = read(tensors, models, metadata).layers
    for component, own in layers.items():
        assert [(layer.module, layer.scale) for layer in found[component]] == [(x.module, x.scale) for x in own]


def test_alpha_is_folded_into_b_on_request():
    models = small("sd15")
    layer = lora(Q, (8, 8), 2, 2.5)
    tensors, metadata = diffusers.tensors_of({"unet": [layer]}, models, fold_alpha=True)
    np.testing.assert_array_equal(tensors[f"unet.{Q}.lora_B.weight"], np.float32(2.5) * layer.tensors["B"])
    np.testing.assert_array_equal(tensors[f"unet.{Q}.lora_A.weight"], layer.tensors["A"])
    for said_of_it in ({}, metadata):
        w = normal((8, 8), 8)
        np.testing.assert_allclose(merged(only(tensors, models, metadata=said_of_it), w), merged(layer, w), rtol=1e-5)


def test_style_from_before_peft():
    models = small("sd15")
    layers = {"unet": [lora(CONV, (8, 8, 3, 3), 2)], "text_encoder": [lora(TEXT, (19, 19), 2)]}
    tensors, metadata = diffusers.tensors_of(layers, models, style="lora.up/down")
    text = f"text_encoder.text_model.{TEXT}.lora_linear_layer"
    assert set(tensors) == {
        f"unet.{CONV}.lora.down.weight", f"unet.{CONV}.lora.up.weight", f"{text}.down.weight", f"{text}.up.weight",
    }  # fmt: skip
    found = read(tensors, models, metadata).layers
    assert {layer.module for own in found.values() for layer in own} == {CONV, TEXT}
    with pytest.raises(ValueError, match=exactly("style='kohya'; expected 'peft' or 'lora.up/down'")):
        diffusers.tensors_of(layers, models, style="kohya")


def test_shapes_are_pefts():
    """Factors of a kohya file with two axes for a convolution have four in PEFT; a core is multiplied into A."""
    models, name = small("sd15"), "mid_block.attentions.0.proj_in"
    a, b = normal((2, 32)), normal((32, 2), 1)
    tucker = Layer(
        CONV, "lora", {"A": normal((2, 8, 1, 1)), "B": normal((8, 2, 1, 1), 1), "mid": normal((2, 2, 3, 3), 2)}
    )
    tensors, _ = diffusers.tensors_of({"unet": [Layer(name, "lora", {"A": a, "B": b}), tucker]}, models)
    assert {key: x.shape for key, x in tensors.items()} == {
        f"unet.{name}.lora_A.weight": (2, 32, 1, 1), f"unet.{name}.lora_B.weight": (32, 2, 1, 1),
        f"unet.{CONV}.lora_A.weight": (2, 8, 3, 3), f"unet.{CONV}.lora_B.weight": (8, 2, 1, 1),
    }  # fmt: skip
    w = normal((8, 8, 3, 3), 5)
    back = read(tensors, models).layers["unet"][1]
    np.testing.assert_allclose(merged(back, w), merged(tucker, w), rtol=1e-5, atol=1e-5)


def test_what_a_file_cannot_hold_is_named():
    models = small("sd15")
    wrong = [
        Layer(Q, "loha", {}),
        Layer("nowhere", "lora", {}),
        lora(OUT, (8, 8), 2, input_magnitude=np.ones((1, 8))),
        Layer("conv_in", "diff", {"added": np.ones(8)}, parameter="bias"),
    ]
    expected = (
        "a diffusers file cannot hold 4 of the layers:\n"
        f"  unet's '{Q}.weight' is of kind loha: jlora.kohya.save has more kinds\n"
        "  unet's 'nowhere.weight' is no tensor of the model\n"
        f"  unet's '{OUT}.weight' has magnitudes of its inputs: jlora.kohya.save has those\n"
        "  unet's 'conv_in.bias' is added to, and its weight has no factors"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        diffusers.tensors_of({"unet": wrong}, models)
    some = [lora(Q, (8, 8), 2, magnitude=np.ones(8)), lora(OUT, (8, 8), 2)]
    expected = (
        "a diffusers file cannot hold 1 of the layers:\n"
        f"  unet has magnitudes of '{Q}' and none of '{OUT}': PEFT has all or none"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        diffusers.tensors_of({"unet": some}, models)
    expected = (
        "a diffusers file cannot hold 1 of the layers:\n"
        f"  unet's '{Q}.weight' has magnitudes, which style='peft' alone has"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        diffusers.tensors_of({"unet": some[:1]}, models, style="lora.up/down")


# -- onto parameters ---------------------------------------------------------------------------------------------------


def few():
    return placed(small("sd15", lambda key: key.rpartition(".")[0] in (Q, CONV, TEXT)))


def test_load_and_save(tmp_path):
    models, params, names = few()
    tensors = of_lora(f"unet.{Q}", (8, 8), 2) | of_lora(f"unet.{CONV}", (8, 8, 3, 3), 3)
    tensors |= of_lora(f"text_encoder.text_model.{TEXT}", (19, 19), 2)
    metadata = said(
        unet={"r": 2, "lora_alpha": 5, "rank_pattern": {"conv1": 3}, "alpha_pattern": {"conv1": 1}},
        text_encoder={"r": 2, "lora_alpha": 2},
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata)
    found = diffusers.load(file, params, names)
    assert {c: {s.path: (s.rank, s.alpha) for s in adapted.sites} for c, adapted in found.items()} == {
        "unet": {f"{Q.replace('.', '/')}/kernel": (2, 5), f"{CONV.replace('.', '/')}/kernel": (3, 1)},
        "text_encoder": {f"{TEXT.replace('.', '/')}/kernel": (2, 2)},
    }
    kernel = jlora.merge(found["unet"])
    start = params["unet"]
    for part in [*CONV.split("."), "kernel"]:
        kernel, start = kernel[part], start[part]
    layer = next(layer for layer in diffusers.read(file, models).layers["unet"] if layer.module == CONV)
    expected = merged(layer, np.transpose(start, (3, 2, 0, 1)))
    np.testing.assert_allclose(np.transpose(kernel, (3, 2, 0, 1)), expected, rtol=1e-5, atol=1e-5)
    again = tmp_path / "again.safetensors"
    diffusers.save(again, found, names, metadata={"trained_by": "a test"})
    assert_same(load_file(again), tensors)
    assert diffusers.read(again, models).metadata["trained_by"] == "a test"
    back = diffusers.load(again, params, names)
    assert {c: [s.alpha for s in adapted.sites] for c, adapted in back.items()} == {
        c: [s.alpha for s in adapted.sites] for c, adapted in found.items()
    }
    with pytest.raises(FileExistsError, match="is there already: force=True replaces it"):
        diffusers.save(again, found, names)


def test_what_is_half_wrong_is_not_half_loaded(tmp_path):
    """Others leave the UNet's part in place when the text encoder's fails."""
    _, params, names = few()
    file = tmp_path / "file.safetensors"
    save_file(of_lora(f"unet.{Q}", (8, 8)) | of_lora("text_encoder.encoder.layers.1.mlp.fc1", (8, 8)), file)
    with pytest.raises(ValueError, match="2 of 4 tensors cannot be placed, so none is:"):
        diffusers.load(file, params, names)
    found = diffusers.load(file, params, names, without="^text_encoder")
    assert list(found) == ["unet"]


def test_numbers_that_are_not_finite(tmp_path):
    models, _, _ = few()
    tensors = of_lora(f"unet.{Q}", (8, 8))
    tensors[f"unet.{Q}.lora_B.weight"][0, 0] = np.nan
    file = tmp_path / "file.safetensors"
    tensor_file.write(file, tensors, {})
    with pytest.raises(ValueError, match="has values that are not finite"):
        diffusers.read(file, models)
