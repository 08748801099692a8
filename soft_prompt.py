"""The soft prompt phi of Section 3.1: p learned embeddings that stand before any text; no weight of the model changes.

phi (p,D) comes out of a small encoder (P-tuning, Liu et al. 2021), which only training needs. Prompts are written and
read in PEFT's file format, the encoder's weights beside them.
"""
from pathlib import Path

import torch
from torch import nn

from model import check_shapes, read_adapter, read_tensors, reading, write_json, write_tensors


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
    check_shapes(dir, tensors, {"prompt_embeddings": (raw.get("num_virtual_tokens"), D or raw.get("token_dim"))})
    return tensors["prompt_embeddings"][1]().float()


def load_encoder(dir):
    """-> the PromptEncoder that `save_prompt` put beside phi, so that training can go on."""
    path = Path(dir) / "encoder.safetensors"
    tensors = {name: load() for name, (_, load) in read_tensors(path).items()}
    with reading(path, "the weights of a prompt encoder; train it anew"):
        encoder = PromptEncoder(*tensors["embedding.weight"].shape, len(tensors["mlp_head.0.weight"]))
        encoder.load_state_dict(tensors)
    return encoder
