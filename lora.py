"""LoRA (Hu et al. 2022) on frozen, 4-bit weights: QLoRA, with which the base model learns its data.

A linear layer W (out,in) becomes W + alpha/r B A with A (r,in) and B (out,r); only A and B are
trained. Section 4.1, Settings. Adapters are written and read in PEFT's file format.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import (InputError, Linear4bit, check_shapes, dense_linear, file_name, read_adapter,
                   shapes, unpack_nf4, write_json, write_tensors)


class LoraLinear(nn.Module):
    """y = base(x) + alpha/r B A dropout(x). B starts at zero, so nothing changes at first."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)
        self.train(base.training)  # a loaded model is in eval mode: no dropout until train()

    def forward(self, x):
        low = F.dropout(x, self.dropout, self.training) @ self.lora_A.to(x.dtype).T    # (B,T,r)
        update = low @ (self.alpha / self.rank * self.lora_B.to(x.dtype)).T            # (B,T,out)
        return self.base(x) + update

    def merged(self):
        """Return the DEQUANTISED weight plus the LoRA update, (out,in) in float32."""
        is_4bit = isinstance(self.base, Linear4bit)
        W = self.base.dequantize() if is_4bit else self.base.weight.float()
        return W + self.alpha / self.rank * self.lora_B.detach() @ self.lora_A.detach()


def add_lora(model, rank=16, alpha=64, dropout=0.1, targets=("q_proj", "v_proj")):
    """Wrap every linear layer whose name is one of targets ("all": every one), in place.

    Returns the trainable parameters, A and B of each layer. InputError when no target is found.
    """
    chosen = [name for name in linear_layers(model)
              if "all" in targets or name.rpartition(".")[2] in targets]
    if not chosen:
        raise InputError(f"--targets {' '.join(targets)}: no such linear layer; expected names "
                         "such as q_proj v_proj, or all")
    return wrap_layers(model, chosen, rank, alpha, dropout)


def linear_layers(model):
    """Return the names of all linear layers inside the transformer layers."""
    return [name for name, layer in model.named_modules()
            if name.startswith("layers.") and isinstance(layer, (nn.Linear, Linear4bit))]


def wrap_layers(model, names, rank, alpha, dropout):
    """Replace each named linear layer by a LoraLinear around it. Returns all A and B."""
    for name in names:
        lora = LoraLinear(model.get_submodule(name), rank, alpha, dropout)
        model.set_submodule(name, lora.to(model.embed_tokens.weight.device))
    return list(peft_tensors(model).values())


def merge_lora(model, dtype=None):
    """Make every adapted or 4-bit layer a dense one, in place. Returns the model, in dtype.

    Each becomes its DEQUANTISED weight plus its LoRA update: the function that QLoRA trained, up to
    rounding. (released code: merges into the unquantised weights, which is another function.)
    """
    dtype = dtype or model.embed_tokens.weight.dtype
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            model.set_submodule(name, dense_linear(layer.merged(), layer.base.bias))
    return unpack_nf4(model, dtype).to(dtype)


# ---- support: files in PEFT's format -----------------------------------------------------------

def peft_tensors(model):
    """Return {PEFT's name: parameter} of A and B of every LoRA layer."""
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            prefix = f"base_model.model.{file_name(model, name)}"
            tensors[f"{prefix}.lora_A.weight"] = layer.lora_A
            tensors[f"{prefix}.lora_B.weight"] = layer.lora_B
    return tensors


def save_adapter(model, dir, lm=""):
    """Write the LoRA layers as `PeftModel.from_pretrained` reads them. lm: the model's name."""
    tensors = peft_tensors(model)
    lora = next(layer for layer in model.modules() if isinstance(layer, LoraLinear))
    write_tensors(Path(dir) / "adapter_model.safetensors", tensors)
    write_json(Path(dir) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(lm),
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
        "target_modules": sorted({name.split(".")[-3] for name in tensors})})


def load_adapter(model, dir):
    """Add the LoRA layers that PEFT or `save_adapter` wrote, in place. Returns their A and B."""
    config, file = read_adapter(dir, ["LORA"], ["r", "lora_alpha", "lora_dropout"])
    for key in ("use_rslora", "alpha_pattern"):  # PEFT's other options change the tensors
        if config.get(key):
            raise InputError(f"{dir}: {key} is {config[key]!r}; only plain LoRA is implemented")
    names = [name for name in linear_layers(model)
             if f"base_model.model.{file_name(model, name)}.lora_A.weight" in file.shapes]
    params = wrap_layers(model, names, config["r"], config["lora_alpha"], config["lora_dropout"])
    tensors = peft_tensors(model)
    check_shapes(dir, file.shapes, shapes(tensors))
    for name, w in tensors.items():
        w.data.copy_(file.read(name))
    return params
