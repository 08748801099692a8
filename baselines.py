"""The four baselines of Section 4.1, as losses with the signature of `soft_prompt.spul_loss`.

Each baseline starts from the base model, the 4-bit weights with QLoRA's adapter merged in, and
trains all of its weights (full fine-tuning); with --tune lora it trains that adapter further
(`unlearn.make_trainable`). `unlearn.METHODS` says what y holds on the forget set, the true answer
or a random generic one, and which losses get base_logprobs; for the others it is None. Each loss
returns only the parts that it uses, under the names of spul_loss. L_f is the term as it enters the
loss: for ascent, minus the cross-entropy.
"""
from soft_prompt import cross_entropy, kl_divergence


def ga_loss(logits, base_logprobs, y, w_forget, w_retain, alpha, beta):
    """Gradient ascent (GA): make the true answers of the forget set unlikely."""
    L_f = -(cross_entropy(logits, y) * w_forget).sum()
    return L_f, {"L_f": L_f}


def rl_loss(logits, base_logprobs, y, w_forget, w_retain, alpha, beta):
    """Random labels (RL): fit a random label on each forget example.

    The paper draws them from the generic labels (neutral, unknown), not from the task's labels. So
    y is the same as SPUL's, but the model is trained and nothing protects the retain set.
    """
    L_f = (cross_entropy(logits, y) * w_forget).sum()
    return L_f, {"L_f": L_f}


def ga_kl_loss(logits, base_logprobs, y, w_forget, w_retain, alpha, beta):
    """GA on the forget set, with the KL divergence to the base model on the retain set."""
    L_f = -(cross_entropy(logits, y) * w_forget).sum()
    L_kl = (kl_divergence(logits, base_logprobs) * w_retain).sum()
    return L_f + beta * L_kl, {"L_f": L_f, "L_kl": L_kl}


def ga_gd_loss(logits, base_logprobs, y, w_forget, w_retain, alpha, beta):
    """GA on the forget set and gradient descent (GD) on the retain set."""
    L_f = -(cross_entropy(logits, y) * w_forget).sum()
    L_r = (cross_entropy(logits, y) * w_retain).sum()
    return L_f + alpha * L_r, {"L_f": L_f, "L_r": L_r}
