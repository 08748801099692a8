"""LoRA (Hu et al. 2022) on the frozen, 4-bit model: how Section 4.1 makes the base model memorise its data (QLoRA).

A linear map W (out,in) becomes W + alpha/r * B A with A (r,in) and B (out,r); only A and B are trained.
Adapters are written and read in PEFT's file format.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import Linear4bit, file_name, read_adapter, replace_modules, write_json, write_tensors


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

    def merged(self):
        """-> nn.Linear with the DEQUANTISED weights plus the update in float32: the same function as forward's."""
        base = self.base
        weight = base.dense() if isinstance(base, Linear4bit) else base.weight.float()
        return _linear(weight + self.alpha / self.rank * self.lora_B.detach() @ self.lora_A.detach(), base.bias)


def _linear(weight, bias):
    """weight (out,in), bias (out,) or None -> a frozen nn.Linear."""
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return linear


def add_lora(model, rank=16, alpha=64, dropout=0.1, targets=("q_proj", "v_proj")):
    """Wraps every linear map of the layers whose name ends in one of targets ("all": each of them), in place.

    -> the trainable parameters, A and B of each. ValueError when no target is found.
    """
    linear = {n: m for n, m in model.named_modules() if n.startswith("layers.") and isinstance(m, (nn.Linear, Linear4bit))}
    loras = {name: LoraLinear(module, rank, alpha, dropout) for name, module in linear.items()
             if "all" in targets or name.rpartition(".")[2] in targets}
    if not loras:
        leaves = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"no linear map is called {' or '.join(targets)}; this model has {', '.join(leaves)}")
    replace_modules(model, lambda name, module: loras.get(name))
    return [w for lora in loras.values() for w in (lora.lora_A, lora.lora_B)]


def merge_lora(model, dtype=torch.float32):
    """Makes every linear map of the layers a plain one, the update added in float32, in place -> model, in dtype.

    4-bit weights are dequantised, so the full-fine-tuning baselines start from the very function QLoRA trained.
    (released code: merges the adapter into the unquantised checkpoint, which is another function.)
    """
    replace_modules(model, lambda name, m: m.merged() if isinstance(m, LoraLinear) else None)
    replace_modules(model, lambda name, m: _linear(m.dense(), m.bias) if isinstance(m, Linear4bit) else None)
    return model.to(dtype)


# What PEFT writes into adapter_config.json without changing what the adapter computes.
HARMLESS = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "inference_mode",
            "base_model_name_or_path", "init_lora_weights", "megatron_core", "qalora_group_size", "peft_version",
            "auto_mapping", "revision", "exclude_modules"}


def save_adapter(model, dir, base=""):
    """Writes adapter_config.json and adapter_model.safetensors as `PeftModel.from_pretrained` reads them."""
    loras = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    if not loras:
        raise ValueError("the model has no LoRA layers to save; call add_lora first")
    tensors = {}
    for name, m in loras.items():
        stem = f"base_model.model.{file_name(model, name)}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = m.lora_A, m.lora_B
    m = next(iter(loras.values()))
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
    odd = [k for k, v in raw.items() if v and k not in HARMLESS]
    odd += [k for k, ok in (("bias", ("none",)), ("init_lora_weights", (True, False, "gaussian")))
            if raw.get(k, ok[0]) not in ok]
    if odd:
        raise ValueError(f"{dir}: {odd[0]} is {raw[odd[0]]!r}, which is not implemented; expected plain LoRA")
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    if (type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e12
            or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1):
        raise ValueError(f"{dir}: r {rank!r}, lora_alpha {alpha!r:.40}, lora_dropout {dropout!r}; expected numbers, r >= 1, "
                         "a dropout below 1")
    tensors = {n: t for n, t in tensors.items() if not n.endswith(".base_layer.weight")}  # PEFT's copy of a head
    modules, params = {f"base_model.model.{file_name(model, n)}": m for n, m in model.named_modules()}, []
    for stem in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        base = modules.get(stem)
        pair = [tensors.get(f"{stem}.lora_{x}.weight") for x in "AB"]
        if not isinstance(base, (nn.Linear, Linear4bit)) or None in pair:
            raise ValueError(f"{dir}: tensors at {stem or min(tensors)!r} are no LoRA pair for a linear map of this model")
        want = [(rank, base.in_features), (base.out_features, rank)]
        if [shape for shape, _ in pair] != want:
            raise ValueError(f"{dir}: {stem} has shapes {[shape for shape, _ in pair]}; this model and r ask for {want}")
        lora = LoraLinear(base, rank, alpha, float(dropout))
        for w, (_, load) in zip((lora.lora_A, lora.lora_B), pair):
            w.data.copy_(load())
        replace_modules(model, lambda name, m: lora if m is base else None)
        params += [lora.lora_A, lora.lora_B]
    if not params:
        raise ValueError(f"{dir}: no tensors; expected a LoRA pair for each linear map that the adapter changes")
    return params
