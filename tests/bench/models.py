"""The same weights in each peer's form, made from the one GGUF file.

Each part runs in that peer's environment:

PYTHON models.py hf|w8a8|q4_0|openvino FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

GGUF = "model-q4_1.gguf"


def hf(folder: Path) -> None:
    """hf-fp32 and hf-bf16: folders as transformers and vLLM read them."""
    import torch
    import transformers

    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    for name, dtype in (("hf-fp32", torch.float32), ("hf-bf16", torch.bfloat16)):
        # A model read from GGUF refuses to be saved, so its weights move into a fresh one.
        clean = transformers.AutoModelForCausalLM.from_config(type(read.config)(**config), dtype=dtype)
        clean.load_state_dict({key: value.to(dtype) for key, value in read.state_dict().items()})
        clean.tie_weights()
        clean.generation_config = read.generation_config
        clean.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def w8a8(folder: Path) -> None:
    """hf-w8a8: 8-bit weights a channel and 8-bit activations a token, in the form vLLM reads."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    source, target = folder / "hf-bf16", folder / "hf-w8a8"
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight.float() / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[name + "_scale"] = scale
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight | {"strategy": "channel", "dynamic": False},
                "input_activations": eight | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=1))


def q4_0(folder: Path) -> None:
    """model-q4_0.gguf: the format that llama.cpp's CPU code is fastest with."""
    import ctypes

    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    options.allow_requantize = True
    source, target = (str(folder / name).encode() for name in (GGUF, "model-q4_0.gguf"))
    if llama_cpp.llama_model_quantize(source, target, ctypes.byref(options)):
        raise RuntimeError("llama_model_quantize failed")


def openvino(folder: Path) -> None:
    """ov-int8 and ov-int4: OpenVINO's representation, with tokenizers."""
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    source = folder / "hf-fp32"
    tokenizer, detokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
    forms = {
        "ov-int8": OVWeightQuantizationConfig(bits=8, sym=False),
        "ov-int4": OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0),
    }
    for name, quantisation in forms.items():
        model = OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=quantisation)
        model.save_pretrained(folder / name)
        save_model(tokenizer, folder / name / "openvino_tokenizer.xml")
        save_model(detokenizer, folder / name / "openvino_detokenizer.xml")


PARTS: dict[str, Callable[[Path], None]] = {"hf": hf, "w8a8": w8a8, "q4_0": q4_0, "openvino": openvino}

if __name__ == "__main__":
    PARTS[sys.argv[1]](Path(sys.argv[2]))
