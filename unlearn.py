"""SPUL: a soft prompt that makes a language model unlearn. Karuna Bhaila, Minh-Hao Van, Xintao Wu, NAACL 2025.

    python unlearn.py                                                            the embedded toy, on the CPU
    python unlearn.py --model DIR --dataset sst2 --data-dir DIR --method spul ga     the real thing

In reading order: the loss (Section 3), the methods, the one training loop, the three stages that use it (pretraining the
embedded LM, QLoRA, unlearning), the grid, the command line.
"""
import argparse
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F

import baselines
import data
import evaluate
from baselines import cross_entropy, kl_divergence
from lora import add_lora, load_adapter, merge_lora, save_adapter
from model import Config, build, load_model, read_json, save_model, whole, write_json
from soft_prompt import PromptEncoder, prompt_kv, save_prompt


# --------------------------------------------------------------------------------------------------- the loss

def spul_loss(logits, base_logprobs, y, is_forget, alpha, beta, kl_direction="prompted||base"):
    """L = L_f + alpha L_r + beta L_KL, Eq. (5).

    logits         (B,V)  h(phi, x) at the answer, with gradient
    base_logprobs  (B,V)  log h(x), without the prompt
    y              (B,)   forget: a random generic answer; retain: the true one
    is_forget      (B,)   bool
    -> scalar loss, {"L_f", "L_r", "L_kl"}; each part is a mean over its examples of the batch, and 0 if there are none.
    """
    L_f = cross_entropy(logits, y, is_forget)                                   # Eq. (2)
    L_r = cross_entropy(logits, y, ~is_forget)                                  # Eq. (3)
    L_kl = kl_divergence(logits, base_logprobs, ~is_forget, kl_direction)       # Eq. (4)
    return L_f + alpha * L_r + beta * L_kl, {"L_f": L_f, "L_r": L_r, "L_kl": L_kl}


class Method(NamedTuple):
    """A way to unlearn: its loss, the answers it wants on the forget set (generic, true or random), what it trains."""
    loss: Callable
    forget_answer: str
    trains: str
    sees_retain: bool = True


METHODS = {
    "spul": Method(spul_loss, "generic", "prompt"),
    "ga": Method(baselines.ga_loss, "true", "weights", sees_retain=False),
    "rl": Method(baselines.rl_loss, "random", "weights", sees_retain=False),
    "ga+kl": Method(baselines.ga_kl_loss, "true", "weights"),
    "ga+gd": Method(baselines.ga_gd_loss, "true", "weights"),
}


# ------------------------------------------------------------------------------------------ the training loop

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` of the steps, then a cosine down to 0."""
    first = max(1, round(warmup * steps))
    if step < first:
        return peak * (step + 1) / first
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def train(stage, params, batches, loss_of, epochs, lr, run, seed=0, warmup=0.1, clip=0.3, weight_decay=0.001,
          accumulate=1, after_epoch=None):
    """The one training loop, of pretraining, QLoRA, SPUL and every baseline. -> seconds per epoch

    params: what to train; batches(epoch) -> the epoch's batches; loss_of(batch) -> loss, parts.
    All randomness of an epoch follows from (seed, stage, epoch).
    """
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)
    steps_per_epoch = -(-len(batches(0)) // accumulate)
    steps, step, seconds = epochs * steps_per_epoch, 0, []
    for epoch in range(epochs):
        torch.manual_seed(derived_seed(seed, stage, epoch))
        start = time.perf_counter()
        for i, batch in enumerate(todo := batches(epoch)):
            if i % accumulate == 0:
                began = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, lr, warmup)
            loss, parts = loss_of(batch)
            (loss / accumulate).backward()
            if (i + 1) % accumulate and i + 1 < len(todo):
                continue
            torch.nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            run.log(stage, f"{epoch + 1}/{epochs}", step, steps, loss, parts, group["lr"], time.perf_counter() - began)
        seconds.append(time.perf_counter() - start)
        if after_epoch:
            after_epoch(epoch + 1)
    return sum(seconds) / max(1, len(seconds))


def derived_seed(*parts):
    """A seed that follows from the parts alone."""
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:8], 16)


class Run:
    """A run directory and its log."""

    def __init__(self, dir, every=50):
        self.dir, self.every, self.last = Path(dir), every, 0.0
        self.dir.mkdir(parents=True, exist_ok=True)

    def log(self, stage, epoch, step, steps, loss, parts, lr, seconds):
        if step % self.every and step != steps:
            return
        terms = "".join(f"  {k} {float(v):.3f}" for k, v in parts.items())
        left = seconds * (steps - step)
        print(f"{stage}  epoch {epoch}  step {step}/{steps}  loss {float(loss):.3f} ={terms}  lr {lr:.1e}  "
              f"{1000 * seconds:.0f} ms  eta {int(left // 60)}m{int(left % 60):02d}s", flush=True)
