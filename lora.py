"""LoRA (Hu et al. 2022) on frozen, 4-bit weights: QLoRA, with which the base model learns its data.

A linear layer W (out,in) becomes W + alpha/r B A with A (r,in) and B (out,r); only A and B are
trained. Section 4.1, Settings. Adapters are written and read in PEFT's file format.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import (ADAPTER, InputError, Linear4bit, check_shapes, file_name, load_model, read_json,
                   read_tensors, unpack_nf4, write_adapter)


class LoraLinear(nn.Module):
    """y = base(x) + alpha/r B A dropout(x). B starts at zero, so nothing changes at first.

    lora_A (r,in) starts as PEFT's does. The layer is in training mode if its base is.
    """

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)
        self.train(base.training)  # a loaded model is in eval mode

    def forward(self, x):
        low = F.dropout(x, self.dropout, self.training) @ self.lora_A.to(x.dtype).T    # (rows,r)
        update = low @ (self.alpha / self.rank * self.lora_B.to(x.dtype)).T            # (rows,out)
        return self.base(x) + update


def add_lora(model, rank=16, alpha=64, dropout=0.1, targets=("q_proj", "v_proj")):
    """Wrap every linear layer that `targets` names, in place.

    targets: last parts of names (q_proj), full names (layers.0.self_attn.q_proj), or all. Returns
    the trainable parameters, A and B of each layer. InputError when no target is found.
    """
    for name, layer in list(model.layers.named_modules(prefix="layers")):
        is_target = "all" in targets or name in targets or name.rpartition(".")[2] in targets
        if is_target and isinstance(layer, (nn.Linear, Linear4bit)):
            lora = LoraLinear(layer, rank, alpha, dropout)
            model.set_submodule(name, lora.to(model.embed_tokens.weight.device))
    params = list(peft_tensors(model).values())
    if not params:
        raise InputError(f"--targets {' '.join(targets)}: no such linear layer; expected names "
                         "such as q_proj v_proj, or all")
    return params


def merge_lora(model, dtype=None):
    """Make every adapted or 4-bit layer a dense one, in place. Returns the model, in dtype.

    Each becomes its DEQUANTISED weight plus its LoRA update: the function that QLoRA trained, up to
    rounding. (released code: merges into the unquantised weights, which is another function.)
    """
    dtype = dtype or model.embed_tokens.weight.dtype
    unpack_nf4(model, torch.float32)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            update = layer.alpha / layer.rank * layer.lora_B.detach() @ layer.lora_A.detach()
            layer.base.weight.data = layer.base.weight.float() + update
            model.set_submodule(name, layer.base)
    return model.to(dtype)


def load_base(dir, adapter=None, weights="nf4", device="cpu", dtype="fp32", dense=False,
              trainable=False):
    """Return the base model: the checkpoint in `dir` with QLoRA's adapter, frozen.

    adapter: its directory, or None for the pretrained model. dense: unpack NF4 and merge the
    adapter, which needs more memory and computes the same function faster. trainable: leave the
    adapter unmerged; only its A and B require gradients. The others: see `model.load_model`.
    """
    model = load_model(dir, weights, device, dtype)
    if dense:
        unpack_nf4(model)
    if adapter:
        load_adapter(model, adapter)
        if dense and not trainable:
            merge_lora(model)
    if not trainable:
        model.requires_grad_(False)
    return model.eval()


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
    layers = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    targets = {name.rpartition(".")[2] for name in layers}
    if len(layers) < len(targets) * model.config.num_hidden_layers:
        targets = layers  # only some of the layers of that name: PEFT needs the full names
    write_adapter(dir, tensors, "LORA", lm, r=lora.rank, lora_alpha=lora.alpha,
                  lora_dropout=lora.dropout, target_modules=sorted(targets))


# Values of PEFT's options that change the function but no tensor; others are refused by name.
PLAIN_LORA = {"use_rslora": [False], "alpha_pattern": [{}], "fan_in_fan_out": [False],
              "layer_replication": [], "alora_invocation_tokens": [],
              "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva"]}


def load_adapter(model, dir):
    """Add the LoRA layers that PEFT or `save_adapter` wrote, in place. Returns their A and B."""
    path = Path(dir) / "adapter_config.json"
    config = read_json(path, "a LoRA adapter", ["r", "lora_alpha", "lora_dropout"])
    for key, allowed in PLAIN_LORA.items():
        if config.get(key) is not None and config[key] not in allowed:
            raise InputError(f"{path}: {key} is {config[key]!r}; only plain LoRA is implemented")
    saved, layers = read_tensors(dir, ADAPTER), {}
    for name, layer in model.layers.named_modules(prefix="layers"):
        layers[f"base_model.model.{file_name(model, name)}"] = name
    targets = {layers.get(key.rpartition(".lora_")[0]) for key in saved} - {None}
    if not targets:
        raise InputError(f"{dir}: no LoRA layer of this model in it; expected its own adapter")
    params = add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"], targets)
    tensors = peft_tensors(model)
    check_shapes(dir, saved, tensors)
    for name, w in tensors.items():
        w.data.copy_(saved[name])
    return params
