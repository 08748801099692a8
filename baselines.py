"""The four baselines of Section 4.1 as losses: tensors in, a scalar and its parts out, with `unlearn.spul_loss`'s signature.

    logits         (B,V)  at the answer
    base_logprobs  (B,V)  log h(x) of the base model, before any unlearning
    y              (B,)   true answers; on the forget set of rl_loss a random label
    is_forget      (B,)   bool
"""
import torch.nn.functional as F


def mean_over(values, part):
    """Mean of values (B,) where part (B,) holds. An empty part gives 0, never NaN: 38 % of SST-2's batches hold no
    forget example."""
    part = part.to(values.dtype)
    return (values * part).sum() / part.sum().clamp(min=1)


def cross_entropy(logits, y, part):
    """Mean over `part` of -log h(y|x), in float32."""
    return mean_over(F.cross_entropy(logits.float(), y, reduction="none"), part)


def kl_divergence(logits, base_logprobs, part, direction="prompted||base"):
    """Mean over `part` of KL(h(phi,x) || h(x)), Eq. (4), in float32. (released code: the reverse direction.)"""
    p, q = logits.float().log_softmax(-1), base_logprobs.float()
    if direction == "base||prompted":
        p, q = q, p
    return mean_over((p.exp() * (p - q)).sum(-1), part)


def ga_loss(logits, base_logprobs, y, is_forget, alpha=1.0, beta=1.0, kl_direction=None):
    """Gradient ascent: makes the true answers of the forget set unlikely. -> loss, parts"""
    L_f = -cross_entropy(logits, y, is_forget)
    return L_f, {"L_f": L_f}


def rl_loss(logits, base_logprobs, y, is_forget, alpha=1.0, beta=1.0, kl_direction=None):
    """Random labels: fits random answers on the forget set. -> loss, parts"""
    L_f = cross_entropy(logits, y, is_forget)
    return L_f, {"L_f": L_f}


def ga_kl_loss(logits, base_logprobs, y, is_forget, alpha=1.0, beta=1.0, kl_direction="prompted||base"):
    """Gradient ascent, held near the base model on the retain set, at the answer position. -> loss, parts"""
    L_f = -cross_entropy(logits, y, is_forget)
    L_kl = kl_divergence(logits, base_logprobs, ~is_forget, kl_direction)
    return L_f + beta * L_kl, {"L_f": L_f, "L_kl": L_kl}


def ga_gd_loss(logits, base_logprobs, y, is_forget, alpha=1.0, beta=1.0, kl_direction=None):
    """Gradient ascent on the forget set, gradient descent on the retain set. -> loss, parts"""
    L_f, L_r = -cross_entropy(logits, y, is_forget), cross_entropy(logits, y, ~is_forget)
    return L_f + alpha * L_r, {"L_f": L_f, "L_r": L_r}
