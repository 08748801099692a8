"""SPUL, Section 3: a soft prompt phi that makes a frozen language model unlearn part of its data.

No weight of the model changes. phi is p learned embeddings, put before the tokens of every query.
Only phi is trained, with three losses (Eq. 2-4; their sum: Eq. 5).
Where to look:
    Eq. (2) to (5)                                  cross_entropy, kl_divergence, spul_loss
    a step without forget examples                  their weights are 0, so L_f is 0
    phi enters attention                            model.Attention.forward
    what a method starts from and what it trains    unlearn.make_trainable
    a method of your own                            unlearn.METHODS

Axes, in every file: B texts of a batch, T tokens of a text, p tokens of the soft prompt, N answer
rows of a batch (one per token of each text's answer), D width of the model, V words, H attention
heads, G key/value heads, d width of a head, r rank of LoRA.
"""
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import ADAPTER, InputError, read_tensors, write_adapter


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


class DirectPrompt(nn.Module):
    """phi (p,D) = init + unit * free: p x D trainable parameters that start at zero.

    unit: the standard deviation of the model's embeddings, so that one learning rate suits models
    whose embeddings differ in size. (paper: learns phi through the encoder above.)
    """

    def __init__(self, init, unit):
        super().__init__()
        self.free = nn.Parameter(torch.zeros(init.shape, device=init.device))
        self.register_buffer("init", init.float())
        self.unit = unit

    def forward(self):
        return self.init + self.unit * self.free


def prepend(phi, embeds):
    """Return phi (p,D) followed by embeds (B,T,D), as (B,p+T,D) in the dtype of embeds.

    This is the definition of h(phi, x). `model.Attention` gives the same logits at a lower cost
    (a test compares both, and the gradients).
    """
    phi = phi.to(embeds.dtype).expand(len(embeds), -1, -1)  # (B,p,D)
    return torch.cat([phi, embeds], dim=1)


def cross_entropy(logits, y):
    """Return -log h(y|x) (N,) of logits (N,V) at tokens y (N,), in float32."""
    return F.cross_entropy(logits.float(), y, reduction="none")


def kl_divergence(logits, base_logprobs):
    """Return KL(h(phi,x) || h(x)) (N,), in float32. (released code: the other direction.)

    logits (N,V) of what is trained, base_logprobs (N,V) of the frozen base.
    """
    logprobs = logits.float().log_softmax(-1)
    return (logprobs.exp() * (logprobs - base_logprobs.float())).sum(-1)


def spul_loss(logits, base_logprobs, y, w_forget, w_retain, alpha, beta):
    """Return the loss L of Eq. (5) and its parts {"L_f", "L_r", "L_kl"}.

    logits         (N,V)  h(phi, x) at the answer rows, with gradient
    base_logprobs  (N,V)  log h(x), without the prompt
    y              (N,)   target tokens: of a random generic answer for a forget example, of the
                          true answer for a retain example
    w_forget       (N,)   1 / (forget examples in the step) on their rows, 0 on the others
    w_retain       (N,)   1 / (retain examples in the step) on their rows, 0 on the others

    So each part is a mean over examples, and 0 when the step has none of them. (paper: sums over
    D_f and D_r; released code: means, as here. With means over mixed batches of 32, a forget
    example of SST-2 weighs about 20 times as much as a retain example.)
    """
    L_f = (cross_entropy(logits, y) * w_forget).sum()                  # Eq. (2)
    L_r = (cross_entropy(logits, y) * w_retain).sum()                  # Eq. (3)
    L_kl = (kl_divergence(logits, base_logprobs) * w_retain).sum()     # Eq. (4)
    loss = L_f + alpha * L_r + beta * L_kl                             # Eq. (5)
    return loss, {"L_f": L_f, "L_r": L_r, "L_kl": L_kl}


# ---- support: files in PEFT's format -----------------------------------------------------------

def save_prompt(phi, dir, lm=""):
    """Write phi (p,D) to dir as an adapter that PEFT loads as P-tuning. lm: the model's name."""
    p, D = phi.shape
    write_adapter(dir, {"prompt_embeddings": phi.float()}, "P_TUNING", lm, inference_mode=True,
                  num_virtual_tokens=p, token_dim=D)


def load_prompt(dir):
    """Return phi (p,D), float32, as `save_prompt` or PEFT (P-tuning, prompt tuning) wrote it."""
    tensors = read_tensors(dir, ADAPTER)
    if "prompt_embeddings" not in tensors:
        raise InputError(f"{dir}: no tensor prompt_embeddings; expected a soft prompt")
    return tensors["prompt_embeddings"].float()


def hash_prompt(dir):
    """Return the directory's name with a hash of the phi in it."""
    digest = hashlib.sha256(load_prompt(dir).numpy().tobytes()).hexdigest()
    return f"{Path(dir).name}-{digest[:8]}"
