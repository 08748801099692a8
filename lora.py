"""LoRA (Hu et al. 2022) on the frozen, 4-bit model: how Section 4.1 makes the base model memorise its data (QLoRA).

A linear map W (out,in) becomes W + alpha/r * B A with A (r,in) and B (out,r); only A and B are trained.
Adapters are written and read in PEFT's file format.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import Linear4bit, check_shapes, file_name, read_adapter, reading, write_json, write_tensors


class LoraLinear(nn.Module):
    """y = base(x) + alpha/r * B(A(dropout(x))); A starts random and B at zero, so that nothing changes at first."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        device = next(iter(base.state_dict().values())).device
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)  # a loaded model is in eval mode, and stays so: no dropout until train() is called

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (B,T,r)
        return self.base(x) + F.linear(low, self.alpha / self.rank * self.lora_B.to(x.dtype))  # (B,T,out)

    def dense(self):
        """-> the update in float32 upon the DEQUANTISED weights (out,in): the same function as forward's."""
        W = self.base.dense() if isinstance(self.base, Linear4bit) else self.base.weight.float()
        return W + self.alpha / self.rank * self.lora_B.detach() @ self.lora_A.detach()


def add_lora(model, rank=16, alpha=64, dropout=0.1, targets=("q_proj", "v_proj")):
    """Wraps every linear map of the layers whose name ends in one of targets ("all": each of them), in place.

    -> the trainable parameters, A and B of each. ValueError when no target is found.
    """
    linear = [n for n, m in model.named_modules() if n.startswith("layers.") and isinstance(m, (nn.Linear, Linear4bit))]
    chosen = [name for name in linear if "all" in targets or name.rpartition(".")[2] in targets]
    if not chosen:
        leaves = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"no linear map is called {' or '.join(targets)}; this model has {', '.join(leaves)}")
    return wrap(model, chosen, rank, alpha, dropout)


def wrap(model, names, rank, alpha, dropout):
    """Puts a LoraLinear in the place of each of these linear maps -> A and B of the first, of the second, ..."""
    loras = [LoraLinear(model.get_submodule(name), rank, alpha, dropout) for name in names]
    for name, lora in zip(names, loras):
        model.set_submodule(name, lora)
    return [w for lora in loras for w in (lora.lora_A, lora.lora_B)]


def merge_lora(model, dtype=None):
    """Makes every linear map of the layers a plain one, the update added in float32, in place -> model, in dtype (its own).

    4-bit weights are dequantised, so the full-fine-tuning baselines start from the very function QLoRA trained.
    (released code: merges the adapter into the unquantised checkpoint, which is another function.)
    """
    for name, m in list(model.named_modules()):
        if isinstance(m, (LoraLinear, Linear4bit)) and not name.endswith(".base"):
            weight = m.dense()
            plain = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), getattr(m, "base", m).bias
            model.set_submodule(name, plain)
    return model.to(dtype or model.lm_head.weight.dtype)


# What PEFT writes into adapter_config.json: HARMLESS changes nothing, PLAIN must be so, and all else must be off.
HARMLESS = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "inference_mode",
            "base_model_name_or_path", "megatron_core", "qalora_group_size", "peft_version", "auto_mapping", "revision",
            "exclude_modules"}
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
OFF = (None, False, "", [], {})


def tensor_names(model, name):
    """The names of A and B of our linear map `name` in PEFT's files."""
    return [f"base_model.model.{file_name(model, name)}.lora_{letter}.weight" for letter in "AB"]


def save_adapter(model, dir, base=""):
    """Writes adapter_config.json and adapter_model.safetensors as `PeftModel.from_pretrained` reads them."""
    loras = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    if not loras:
        raise ValueError("the model has no LoRA layers to save; call add_lora first")
    tensors = {}
    for name, m in loras.items():
        tensors |= zip(tensor_names(model, name), (m.lora_A, m.lora_B))
    write_tensors(Path(dir) / "adapter_model.safetensors", tensors)
    write_json(Path(dir) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": m.rank,
        "lora_alpha": m.alpha, "lora_dropout": m.dropout, "bias": "none", "inference_mode": True,
        "fan_in_fan_out": False, "target_modules": sorted({n.rpartition(".")[2] for n in loras})})


def load_adapter(model, dir):
    """Adds the LoRA layers that PEFT or `save_adapter` wrote to dir, in place -> their parameters.

    ValueError or OSError, in one line, for options that are not implemented and for tensors that do not fit.
    """
    raw, tensors = read_adapter(dir, ("LORA",), "a LoRA adapter as PEFT writes it")
    with reading(Path(dir) / "adapter_config.json", "plain LoRA; r from 1, lora_alpha finite, lora_dropout below 1"):
        for key, value in raw.items():
            if key not in HARMLESS and value not in PLAIN.get(key, OFF):
                raise ValueError(f"{key} is {value!r}, which is not implemented")
        rank, alpha, dropout = raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0)
        if type(rank) is not int or not (rank > 0 and abs(alpha) < 1e12 and 0 <= dropout < 1):
            raise ValueError(f"r {rank!r}, lora_alpha {alpha!r:.40}, lora_dropout {dropout!r}")
    tensors = {n: t for n, t in tensors.items() if not n.endswith(".base_layer.weight")}  # PEFT's copy of a head
    names, expected = [], {}
    for name, m in model.named_modules():
        a, b = tensor_names(model, name)
        if isinstance(m, (nn.Linear, Linear4bit)) and (a in tensors or b in tensors):
            names.append(name)
            expected |= {a: (rank, m.in_features), b: (m.out_features, rank)}
    check_shapes(dir, tensors, expected)
    if not names:
        raise ValueError(f"{dir}: no tensors; expected a LoRA pair for each linear map that the adapter changes")
    params = wrap(model, names, rank, alpha, float(dropout))
    for w, name in zip(params, expected):
        w.data.copy_(tensors[name][1]())
    return params
