"""SPUL, Section 3: a soft prompt phi that makes a frozen language model unlearn part of its data.

No weight of the model changes. phi is p learned embeddings, put before the tokens of every query.
Only the small encoder that computes phi is trained, with three losses (Eq. 2-4; their sum: Eq. 5).
Where to look:
    Eq. (2) to (5)                                  cross_entropy, kl_divergence, spul_loss
    a batch without forget examples                 mean_over: L_f is 0
    phi's keys and values enter attention           model.Attention.forward
    what a method starts from and what it trains    unlearn.make_trainable
    a method of your own                            unlearn.METHODS

Axes, in every file: B examples of a batch, T tokens of a text, p tokens of the soft prompt,
D width of the model, V words, H attention heads, G key/value heads, d width of a head, r rank of
LoRA.
"""
import torch
import torch.nn.functional as F
from torch import nn

from model import InputError, read_tensors, write_adapter


class PromptEncoder(nn.Module):
    """Compute phi (p,D) from trainable parameters, as P-tuning does (Liu et al. 2021).

    Embedding(p,D) -> Linear(D,hidden) -> ReLU -> Linear(hidden,hidden) -> ReLU ->
    Linear(hidden,D). With hidden = 128 and p = 30 it has the paper's 1,192,192 trainable parameters
    on LLaMA-2-7B. With `init` (p,D), phi = init + MLP(E) with a last layer of zeros: training
    starts at init. (paper: no init.)
    """

    def __init__(self, p, D, hidden=128, init=None):
        super().__init__()
        self.embedding = nn.Embedding(p, D)
        self.mlp_head = nn.Sequential(
            nn.Linear(D, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, D))
        if init is None:
            init = torch.zeros(p, D)
        else:
            nn.init.zeros_(self.mlp_head[-1].weight)
            nn.init.zeros_(self.mlp_head[-1].bias)
        self.register_buffer("init", init.float())

    def forward(self):
        return self.init + self.mlp_head(self.embedding.weight)


def prepend(phi, embeds):
    """Return phi (p,D) followed by embeds (B,T,D), as (B,p+T,D).

    This is the definition. Training and evaluation use `prompt_kv`, with which the model gives the
    same logits at a lower cost (a test compares both, and the gradients).
    """
    phi = phi.to(embeds.dtype).expand(len(embeds), -1, -1)  # (B,p,D)
    return torch.cat([phi, embeds], dim=1)


def prompt_kv(model, phi):
    """Return `prefix`: for each layer the keys and values (1,G,p,d) of phi (p,D), with gradient.

    Attention is causal, so phi at positions 0 ... p-1 never sees the text, and its keys and values
    are the same for every example. `model.Attention` puts them before those of the text, whose
    positions start at p, so the text sees just what it would see behind phi itself. Computed once
    per batch they cost p tokens instead of B*p: with p = 30, B = 32, T = 48 a batch has 1,566
    tokens instead of 2,496.
    """
    embeds = phi.to(model.embed_tokens.weight)[None]  # (1,p,D), of its dtype and device
    _, prefix = model.hidden(embeds)  # each layer's K, V; the states are not needed
    return prefix


def mean_over(values, part):
    """Return the mean of those values (B,) whose part (B,) is True; 0 if there are none.

    On SST-2, 38 % of the paper's batches hold no forget example.
    """
    part = part.to(values.dtype)
    return (values * part).sum() / part.sum().clamp(min=1)


def cross_entropy(logits, y, part):
    """Return the mean over `part` of -log h(y|x), in float32.

    logits (B,V), y (B,) tokens, part (B,) bool.
    """
    return mean_over(F.cross_entropy(logits.float(), y, reduction="none"), part)


def kl_divergence(logits, base_logprobs, part):
    """Return Eq. (4): the mean over `part` of KL(h(phi,x) || h(x)), in float32.

    logits (B,V) of what is trained, base_logprobs (B,V) of the frozen base, part (B,) bool.
    (released code: the other direction)
    """
    logprobs = logits.float().log_softmax(-1)
    divergence = (logprobs.exp() * (logprobs - base_logprobs.float())).sum(-1)  # (B,)
    return mean_over(divergence, part)


def spul_loss(logits, base_logprobs, y, is_forget, alpha, beta):
    """Return the loss L of Eq. (5) and its parts {"L_f", "L_r", "L_kl"}.

    logits         (B,V)  h(phi, x) at the answer position, with gradient
    base_logprobs  (B,V)  log h(x), without the prompt
    y              (B,)   target tokens: a random generic answer for a forget example, the true
                          answer for a retain example
    is_forget      (B,)   bool

    Each part is the mean over its examples, and 0 when the batch holds none of them. (paper: sums
    over D_f and D_r; released code: means, as here. With means, a forget example of SST-2 weighs
    about 30 times as much as a retain example.)
    """
    is_retain = ~is_forget
    L_f = cross_entropy(logits, y, is_forget)               # Eq. (2)
    L_r = cross_entropy(logits, y, is_retain)               # Eq. (3)
    L_kl = kl_divergence(logits, base_logprobs, is_retain)  # Eq. (4)
    loss = L_f + alpha * L_r + beta * L_kl                  # Eq. (5)
    return loss, {"L_f": L_f, "L_r": L_r, "L_kl": L_kl}


# ---- support: files in PEFT's format -----------------------------------------------------------

def save_prompt(phi, dir, lm=""):
    """Write phi (p,D) to dir as an adapter that PEFT loads as P-tuning. lm: the model's name."""
    p, D = phi.shape
    write_adapter(dir, {"prompt_embeddings": phi.float()}, "P_TUNING", lm, inference_mode=True,
                  num_virtual_tokens=p, token_dim=D)


def load_prompt(dir):
    """Return phi (p,D), float32, as `save_prompt` or PEFT (P-tuning, prompt tuning) wrote it."""
    tensors = read_tensors(dir, "adapter_model")
    if "prompt_embeddings" not in tensors:
        raise InputError(f"{dir}: no tensor prompt_embeddings; expected a soft prompt")
    return tensors["prompt_embeddings"].float()
