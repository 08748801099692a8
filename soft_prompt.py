"""The soft prompt phi of Section 3.1: p learned embeddings that stand before any text; no weight of the model changes.

phi (p,D) comes out of a small encoder (P-tuning, Liu et al. 2021), which only training needs. Prompts are written and
read in PEFT's file format, the encoder's weights beside them.
"""
from pathlib import Path

import torch
from torch import nn

from model import read_adapter, read_tensors, write_json, write_tensors


class PromptEncoder(nn.Module):
    """Embedding(p,D) -> Linear(D,h) -> ReLU -> Linear(h,h) -> ReLU -> Linear(h,D); calling it gives phi (p,D).

    Only with this re-parameterisation and h = 128 does p = 30 give the paper's 1,192,192 parameters on LLaMA-2-7B.
    """

    def __init__(self, p, D, hidden=128):
        super().__init__()
        self.embedding = nn.Embedding(p, D)
        self.mlp_head = nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                      nn.Linear(hidden, D))

    def forward(self):
        return self.mlp_head(self.embedding.weight)


def prepend(phi, embeds):
    """phi (p,D), embeds (B,T,D) -> (B,p+T,D): the definition. phi stands before the text's own BOS token."""
    return torch.cat([phi.to(embeds.dtype).expand(len(embeds), -1, -1), embeds], dim=1)


def prompt_kv(model, phi):
    """phi (p,D) -> each layer's keys and values (1,G,p,d), with gradient: what the model needs to know of phi.

    Attention is causal, so phi never sees the text, and its keys and values are the same for every example. Computing
    them once, a step costs p + B*T tokens and not B*(p+T): with p=30, B=32, T=48 that is 1,566 in place of 2,496.
    """
    phi = phi.to(model.embed_tokens.weight.dtype)[None]  # (1,p,D)
    nowhere = torch.tensor([0], device=phi.device)  # of the last layer only keys and values are wanted: one query will do
    return model.hidden(phi, nowhere)[1]


def save_prompt(phi, dir, encoder=None, base=""):
    """Writes phi (p,D) as an adapter that PEFT loads as P-tuning; the encoder's weights go beside it."""
    write_tensors(Path(dir) / "adapter_model.safetensors", {"prompt_embeddings": phi.float()})
    if encoder:
        write_tensors(Path(dir) / "encoder.safetensors", encoder.state_dict())
    write_json(Path(dir) / "adapter_config.json", {
        "peft_type": "P_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "inference_mode": True,
        "num_virtual_tokens": phi.shape[0], "token_dim": phi.shape[1], "num_transformer_submodules": 1,
        "encoder_reparameterization_type": "MLP",
        "encoder_hidden_size": encoder.mlp_head[0].out_features if encoder else 128})


def load_prompt(dir, D=None):
    """-> phi (p,D) from what `save_prompt` or PEFT (P-tuning or prompt tuning) wrote. ValueError or OSError otherwise."""
    raw, tensors = read_adapter(dir, ("P_TUNING", "PROMPT_TUNING"), "a soft prompt as PEFT writes it")
    shape, load = tensors.get("prompt_embeddings", (None, None))
    if shape is None or len(shape) != 2 or shape[0] != raw.get("num_virtual_tokens") or D not in (None, shape[1]):
        raise ValueError(f"{dir}: prompt_embeddings has shape {shape}; "
                         f"expected ({raw.get('num_virtual_tokens')}, {D or raw.get('token_dim')})")
    return load().float()


def load_encoder(dir):
    """-> the PromptEncoder that `save_prompt` put beside phi, so that training can go on."""
    tensors = {n: load() for n, (_, load) in read_tensors(Path(dir) / "encoder.safetensors").items()}
    try:
        p, D = tensors["embedding.weight"].shape
        encoder = PromptEncoder(p, D, tensors["mlp_head.0.weight"].shape[0])
        encoder.load_state_dict(tensors)
    except (KeyError, RuntimeError, ValueError):
        raise ValueError(f"{dir}/encoder.safetensors: not the weights of a prompt encoder; train it anew") from None
    return encoder
