"""Claims about the method and its code, the most important ones first.

    python -m pytest                                skips a test whose peer or data is missing
    python test_spul.py starter DIR [NAME ...]      a copy with empty functions to write
    python test_spul.py grade DIR                   points of a student's files, by these tests
"""
import argparse
import ast
import csv
import gc
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test looks anything up

import baselines
import data
import evaluate
import lora
import model
import soft_prompt
import unlearn
from data import Query
from model import InputError

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"

@pytest.fixture(scope="module", autouse=True)
def say_what_was_skipped(request):
    """Print one line at the end if tests lacked a package to compare with."""
    yield
    plugins = request.config.pluginmanager
    reporter = plugins.get_plugin("terminalreporter")
    reasons = [str(report.longrepr) for report in reporter.stats.get("skipped", [])]
    n = sum("is not installed" in reason for reason in reasons)
    if n:
        with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{n} comparisons skipped: pip install transformers peft bitsandbytes pyarrow")


# ---- 1. one function at a time, in reading order: what the assignments are graded by -----------
#
# Each test is named after its function, and compares it with values worked out by hand or by a
# slow, obvious loop.

def assert_near(what, found, expected, axes=(), atol=1e-5):
    """Compare two tensors or lists. axes: the names of their axes, for the message."""
    found, expected = [torch.as_tensor(x).detach().double() for x in (found, expected)]
    assert_equal(f"shape of {what}", tuple(found.shape), tuple(expected.shape))
    if found.numel() == 0:
        return
    distance = torch.where(found == expected, 0.0, (found - expected).abs()).nan_to_num(math.inf)
    largest = torch.unravel_index(distance.argmax(), distance.shape)
    places = [f"{axis} {int(i)}" for axis, i in zip(axes, largest)]
    name = f"{what} of {', '.join(places)}" if places else what
    assert distance.max() <= atol, (
        f"{name}: {distance.max():.2g} away ({found[largest]:.4g}; expected "
        f"{expected[largest]:.4g}); {atol:g} allowed")

def assert_equal(what, found, expected):
    assert found == expected, f"{what}: {found}; expected {expected}"

@contextmanager
def raises_input_error(when):
    """Check that the block raises InputError."""
    try:
        yield
    except InputError:
        return
    raise AssertionError(f"no InputError {when}")

def random_numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def softmax_by_hand(logits):
    """Return the probabilities of a list of logits."""
    exps = [math.exp(z - max(logits)) for z in logits]
    return [e / sum(exps) for e in exps]

# Three answer rows over four words: their logits with and without phi, targets and weights.
LOGITS = [[2.0, 0.5, -1.0, 0.0], [0.0, 1.0, 3.0, -2.0], [-1.0, 0.5, 0.5, 1.5]]
BASE_LOGPROBS = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.4, 0.1], [0.25] * 4]).log()
TARGETS = torch.tensor([1, 2, 0])
W_FORGET, W_RETAIN = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.25, 0.5])
ROW_WORD = ("row", "word")

def losses_by_hand():
    """Return -log h(y|x) and the KL divergence (N,) of LOGITS, and their gradients (N,V)."""
    p = torch.tensor([softmax_by_hand(row) for row in LOGITS], dtype=torch.float64)
    log_ratio = p.log() - BASE_LOGPROBS.double()
    kl = (p * log_ratio).sum(-1)
    ce = -p[range(3), TARGETS].log()
    return ce, kl, p - F.one_hot(TARGETS, 4), p * (log_ratio - kl[:, None])

CE, KL, CE_GRADIENT, KL_GRADIENT = losses_by_hand()

@pytest.mark.parametrize("name, other, expected, gradient", [
    ("cross_entropy", TARGETS, CE, CE_GRADIENT), ("kl_divergence", BASE_LOGPROBS, KL, KL_GRADIENT)])
def test_loss_term_of_each_row_in_float32_and_its_gradient(name, other, expected, gradient):
    function, logits = getattr(soft_prompt, name), torch.tensor(LOGITS, requires_grad=True)
    found = function(logits, other)
    assert_near(name, found, expected, ["row"])
    found.sum().backward()
    assert_near(f"gradient of {name}", logits.grad, gradient, ROW_WORD)
    half = function(torch.tensor(LOGITS).bfloat16(), other)  # bf16 holds these logits exactly
    assert_equal("dtype for logits in bf16", half.dtype, torch.float32)
    assert_near(f"{name} of logits in bf16", half, expected, ["row"])
    shifted = function(torch.tensor(LOGITS) + 100, other)  # exp(100) is too large for float32
    assert_near(f"{name} of logits + 100", shifted, expected, ["row"], 1e-4)

def check_loss(name, loss, forget, retain=0.0, kl=0.0, base_logprobs=None):
    """Check a loss with alpha = 0.5, beta = 0.1. forget, retain, kl: the terms' factors in it."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    found, parts = loss(logits, base_logprobs, TARGETS, W_FORGET, W_RETAIN, 0.5, 0.1)
    w_ce, w_kl = forget * W_FORGET + retain * W_RETAIN, kl * W_RETAIN
    expected = {"L_f": forget * (W_FORGET * CE).sum()}
    if retain:
        expected["L_r"] = (W_RETAIN * CE).sum()
    if kl:
        expected["L_kl"] = (W_RETAIN * KL).sum()
    assert_equal(f"{name}: names of the parts", sorted(parts), sorted(expected))
    for part, value in expected.items():
        assert_near(f"{name}: {part}", parts[part], value)
    assert_near(f"{name}: loss", found, (w_ce * CE + w_kl * KL).sum())
    found.backward()
    gradient = w_ce[:, None] * CE_GRADIENT + w_kl[:, None] * KL_GRADIENT
    assert_near(f"{name}: gradient", logits.grad, gradient, ROW_WORD)

def test_spul_loss_is_the_weighted_sum_of_equations_2_to_5_with_its_gradient():
    check_loss("SPUL", soft_prompt.spul_loss, 1, 0.5, 0.1, BASE_LOGPROBS)
    _, parts = soft_prompt.spul_loss(torch.tensor(LOGITS), BASE_LOGPROBS, TARGETS, torch.zeros(3),
                                     W_RETAIN, 0.5, 0.1)
    assert_near("L_f without forget examples", parts["L_f"], 0.0)

def test_PromptEncoder_is_an_embedding_and_three_linear_layers():
    torch.manual_seed(0)
    encoder = soft_prompt.PromptEncoder(3, 4, hidden=5)
    assert encoder().ne(0).all(), "phi is zero at the start"
    E, W1, b1, W2, b2, W3, b3 = [w.detach().double() for w in encoder.parameters()]
    assert_equal("shapes of E, W1, W2 and W3", [tuple(w.shape) for w in (E, W1, W2, W3)],
                 [(3, 4), (5, 4), (5, 5), (4, 5)])
    hidden = (W1 @ E.T + b1[:, None]).clamp(min=0)                            # (hidden,p)
    hidden = (W2 @ hidden + b2[:, None]).clamp(min=0)
    assert_near("phi", encoder(), (W3 @ hidden + b3[:, None]).T, ("token", "value"))

def test_PromptEncoder_starts_at_init_and_its_tokens_can_move_apart():
    init = random_numbers(3, 4).bfloat16()
    encoder = soft_prompt.PromptEncoder(3, 4, 5, init)
    phi = encoder()
    assert_equal("dtype of phi", phi.dtype, torch.float32)
    assert_near("phi at the start", phi, init, ("token", "value"), atol=0)
    params = list(encoder.parameters())  # init is none of them
    assert_equal("number of trained tensors", len(params), 7)
    params[-2].data += random_numbers(4, 5)
    assert (encoder() - init.float()).std(0).gt(1e-3).all(), "all tokens of phi move together"

def test_DirectPrompt_is_init_plus_unit_times_its_parameters():
    direct = soft_prompt.DirectPrompt(torch.tensor([[1.0, 2.0]]), 0.25)
    direct.free.data = torch.tensor([[4.0, -8.0]])
    phi = direct()
    assert_near("phi", phi, [[2.0, 0.0]], ("token", "value"))
    phi.backward(torch.tensor([[1.0, 3.0]]))
    assert_near("gradient of the parameters", direct.free.grad, [[0.25, 0.75]])

def test_prepend_puts_phi_before_every_text():
    phi, embeds = random_numbers(2, 3), random_numbers(4, 5, 3, seed=1).bfloat16()
    found = soft_prompt.prepend(phi, embeds)
    expected = torch.stack([torch.cat([phi.bfloat16(), text]) for text in embeds])
    assert_equal("dtype", found.dtype, torch.bfloat16)
    assert_near("phi and embeddings", found, expected, ("text", "position", "value"), atol=0)

@pytest.mark.parametrize("name, forget, retain, kl", [
    ("ga_loss", -1, 0, 0), ("rl_loss", 1, 0, 0), ("ga_kl_loss", -1, 0, 0.1),
    ("ga_gd_loss", -1, 0.5, 0)])
def test_baseline_losses_their_parts_and_gradients(name, forget, retain, kl):
    base_logprobs = BASE_LOGPROBS if kl else None
    check_loss(name, getattr(baselines, name), forget, retain, kl, base_logprobs)

def bytes_of_codes(codes):
    """Return the bytes of NF4 codes: two in each, the first in the high half."""
    codes = codes + [7] * (len(codes) % 2)
    return [16 * codes[i] + codes[i + 1] for i in range(0, len(codes), 2)]

def test_quantize_nf4_codes_scales_and_bytes():
    above = torch.nextafter(model.MIDPOINTS[3], torch.tensor(1.0))
    one = torch.zeros(64)  # every value, every midpoint (a tie), and one just above a tie
    one[:32] = torch.cat([model.NF4.flip(0), model.MIDPOINTS, above[None]])
    two = F.pad(torch.tensor([-3.0, 1.5]), (0, 62))  # the largest magnitude is negative
    short = torch.tensor([0.25, -0.5])
    w = torch.cat([2 * one, two, short]).view(10, 13)
    codes = [*range(15, -1, -1), *range(15), 4] + [7] * 32 + [0, 12] + [7] * 62 + [12, 0]
    packed, absmax = model.quantize_nf4(w)
    assert_equal("dtypes", (packed.dtype, absmax.dtype), (torch.uint8, torch.float32))
    assert_near("absmax", absmax, [2.0, 3.0, 0.5], ["block"], atol=0)
    assert_near("packed", packed, bytes_of_codes(codes), ["byte"], atol=0)
    packed, absmax = model.quantize_nf4(torch.tensor([0.25, -0.5, 0.5]))  # a spare half byte: 7
    assert_near("packed of three values", packed, bytes_of_codes([12, 0, 15]), ["byte"], atol=0)
    packed, absmax = model.quantize_nf4(torch.zeros(64))
    assert_near("absmax of zeros", absmax, [0.0], atol=0)
    assert_near("packed of zeros", packed, [0x77] * 32, ["byte"], atol=0)

def test_quantize_nf4_multiplies_full_blocks_by_1_over_absmax_and_divides_a_short_one():
    near_tie = [3.0, 3 * model.MIDPOINTS[11].item()]  # rounded up by 1/3, a tie by division
    packed, _ = model.quantize_nf4(torch.tensor(near_tie + [0.0] * 62 + near_tie))
    assert_near("packed", packed, [0xfc] + [0x77] * 31 + [0xfb], ["byte"], atol=0)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_nf4_looks_up_each_code_and_scales_its_block(dtype):
    codes = random.Random(0).choices(range(16), k=143)
    absmax = torch.tensor([2.0, 0.3, 5.0])
    values = [model.NF4[code] * absmax[i // 64] for i, code in enumerate(codes)]
    packed = torch.tensor(bytes_of_codes(codes), dtype=torch.uint8)
    found = model.dequantize_nf4(packed, absmax, torch.Size([11, 13]), dtype)
    assert_equal("dtype", found.dtype, dtype)
    assert_near("weights", found, torch.stack(values).to(dtype).view(11, 13), ("row", "column"),
                atol=0)

def test_MatMul4bit_is_x_W_transposed_and_keeps_no_copy_of_W():
    W, kept = random_numbers(6, 6), []
    layer = SimpleNamespace(dequantize=lambda dtype: W.to(dtype, copy=True))
    x, gradient = random_numbers(2, 6, seed=1), random_numbers(2, 6, seed=2)
    expected = [[sum(x[i, k] * W[j, k] for k in range(6)) for j in range(6)] for i in range(2)]
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda w: kept.append(w.numel()), lambda w: w):
        y = model.MatMul4bit.apply(x, layer)
    assert_near("x W.T", y, expected, ("row", "output"))
    assert max([0, *kept]) < 36, "autograd keeps a dense copy of W for the backward pass"
    y.backward(gradient)
    expected = [[sum(gradient[i, j] * W[j, k] for j in range(6)) for k in range(6)]
                for i in range(2)]
    assert_near("gradient of x", x.grad, expected, ("row", "input"))

def test_RMSNorm_divides_by_the_root_of_the_mean_square_plus_eps_in_float32():
    norm = model.RMSNorm(4, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, -1.0, 0.5])
    x = random_numbers(3, 4)
    expected = torch.zeros(3, 4)
    for i in range(3):
        scale = math.sqrt(sum(x[i, j].item() ** 2 for j in range(4)) / 4 + 0.5)
        for j in range(4):
            expected[i, j] = x[i, j] / scale * norm.weight[j].item()
    assert_near("norm", norm(x), expected, ("row", "value"))
    x = torch.tensor([[300.0, -300.0, 300.0, 0.0]]).half()  # 300^2 is too large for float16
    y = norm.half()(x)
    assert_equal("dtype for x in float16", y.dtype, torch.float16)
    expected = [[1.1547, -2.3094, -1.1547, 0.0]]
    assert_near("norm of x in float16", y, expected, ("row", "value"), 2e-3)

def test_rotate_turns_each_pair_of_x_i_and_x_i_plus_half_by_its_angle():
    x, angle = random_numbers(3, 2, 6), random_numbers(3, 3, seed=1)               # (rows,d/2)
    expected = torch.zeros(3, 2, 6)
    for row in range(3):
        for i in range(3):
            cos, sin = math.cos(angle[row, i]), math.sin(angle[row, i])
            first, second = x[row, :, i], x[row, :, i + 3]
            expected[row, :, i] = cos * first - sin * second
            expected[row, :, i + 3] = sin * first + cos * second
    rotary = torch.stack([torch.cat([angle.cos()] * 2, -1),
                          torch.cat([-angle.sin(), angle.sin()], -1)])[:, :, None]
    assert_near("rotated x", model.rotate(x, rotary), expected, ("row", "head", "value"))

def small_config(kind="llama", **changes):
    return model.Config(kind, vocab_size=11, hidden_size=6, intermediate_size=8,
                        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                        head_dim=4, rope_theta=100.0, **changes)

@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 4e-3)])
def test_add_positions_of_Llama_are_cosines_and_sines_of_float32_angles(dtype, atol):
    net = model.build(small_config())
    positions = torch.tensor([0, 1, 2, 2, 3, 299])  # rows of several texts, in any order
    x = random_numbers(6, 6).to(dtype)
    y, rotary = net.add_positions(x, positions, 300)
    assert_near("x (no position is added to it)", y, x, atol=0)
    assert_equal("dtype of the tables", rotary.dtype, dtype)
    expected = torch.zeros(2, 6, 1, 4)
    for row, position in enumerate(positions.tolist()):
        for i in range(2):
            angle = position * 100.0 ** (-2 * i / 4)
            expected[0, row, 0, [i, i + 2]] = math.cos(angle)
            expected[1, row, 0, i] = -math.sin(angle)
            expected[1, row, 0, i + 2] = math.sin(angle)
    assert_near("cos and sin", rotary, expected, ("table", "row", "head", "value"), atol)

def test_add_positions_of_OPT_adds_row_i_plus_2_of_its_table():
    net = model.build(small_config("opt", max_position_embeddings=5))
    x, positions = random_numbers(4, 6), torch.tensor([0, 1, 1, 4])
    table = net.embed_positions.weight
    y, rotary = net.add_positions(x, positions, 5)
    expected = torch.stack([x[0] + table[2], x[1] + table[3], x[2] + table[3], x[3] + table[6]])
    assert_near("x plus positions", y, expected, ("row", "value"))
    assert_equal("rotary tables", rotary, None)
    with raises_input_error("for n = 6 with a table of 5 positions"):
        net.add_positions(x, positions, 6)

def attention_by_hand(q, k, v):
    """Return attention (H,T,d) of q over k and v (G,S,d), one head and position at a time."""
    q, k, v = q.double(), k.double(), v.double()
    (H, T, d), (G, S, _) = q.shape, k.shape
    y = torch.zeros(H, T, d, dtype=torch.float64)
    for h in range(H):
        g = h // (H // G)  # neighbouring query heads share a key/value head
        for t in range(T):
            n_seen = S - T + t + 1  # all before the text, then the text up to t
            scores = [q[h, t].dot(k[g, s]).item() / math.sqrt(d) for s in range(n_seen)]
            for s, weight in enumerate(softmax_by_hand(scores)):
                y[h, t] += weight * v[g, s]
    return y

@pytest.mark.parametrize("H, G, T, S", [(4, 4, 3, 3), (4, 2, 3, 5), (6, 2, 1, 4), (3, 1, 2, 2)])
def test_attend_is_causal_softmax_attention_with_shared_key_value_heads(H, G, T, S):
    q = 2 * random_numbers(2, H, T, 8)
    k, v = random_numbers(2, G, S, 8, seed=1), random_numbers(2, G, S, 8, seed=2)
    expected = torch.stack([attention_by_hand(q[b], k[b], v[b]) for b in range(2)])
    assert_near("attention", model.attend(q, k, v), expected, ("text", "head", "query", "value"))
    inputs = [x[:1, :, :, :2].double().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(model.attend, inputs)

@pytest.mark.parametrize("p, is_rotary", [(0, True), (2, True), (2, False)])
def test_Attention_lets_phi_see_itself_and_a_text_see_phi_and_itself(p, is_rotary):
    torch.manual_seed(0)
    layer, B, T = model.Attention(small_config(), "o_proj", bias=True).double(), 2, 3
    x = random_numbers(p + B * T, 6).double()
    q, k, v = [F.linear(x, part.weight, part.bias).view(len(x), -1, 4)
               for part in (layer.q_proj, layer.k_proj, layer.v_proj)]
    rotary = None
    if is_rotary:  # turn each row by 0 or 180 degrees
        signs = torch.tensor([-1.0, 1.0, 1.0, 1.0] * 2).double()[:len(x), None, None]
        rotary = torch.stack([signs.expand(-1, 1, 4), torch.zeros(len(x), 1, 4).double()])
        q, k = q * signs, k * signs
    y = torch.zeros(len(x), 16).double()
    for b in range(B):
        rows = [*range(p), *range(p + b * T, p + (b + 1) * T)]  # phi, then this text
        seen = attention_by_hand(*[part[rows].transpose(0, 1) for part in (q, k, v)])
        y[rows] = seen.transpose(0, 1).reshape(len(rows), 16)
    expected = F.linear(y, layer.o_proj.weight, layer.o_proj.bias)
    assert_near("attention", layer(x, rotary, p, T), expected, ("row", "value"))
    assert torch.autograd.gradcheck(lambda x: layer(x, rotary, p, T), x.requires_grad_())

class DoublingLayer(nn.Module):
    """Takes the place of a layer or norm: doubles x, and keeps what else it was given."""
    n_calls = 0

    def __init__(self):
        super().__init__()
        self.two = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, *others):
        self.others = others
        self.n_calls += 1
        return self.two * x

@pytest.mark.parametrize("p", [0, 2])
def test_LanguageModel_states_are_those_of_the_answer_rows_after_phi(p):
    net = model.build(small_config())
    assert net.lm_head.weight is not net.embed_tokens.weight, "the head is tied by default"
    net.layers, net.norm = nn.ModuleList([DoublingLayer(), DoublingLayer()]), DoublingLayer()
    net.add_positions = lambda x, positions, n: (
        x + (10.0 ** positions[:, None] + n).to(x.dtype), "rotary")
    tokens, answers = torch.tensor([[3, 1, 4], [1, 5, 9]]), torch.tensor([1, 2, 5])
    phi = random_numbers(p, 6) if p else None
    expected = torch.zeros(2, 3, 6)
    for b in range(2):
        for t in range(3):  # position p + t of p + 3; two layers and the norm double it
            expected[b, t] = 8 * (net.embed_tokens.weight[tokens[b, t]] + 10 ** (p + t) + p + 3)
    rows = torch.stack([expected[0, 1], expected[0, 2], expected[1, 2]])
    found = net.states(tokens, None, phi)
    assert_near("states", found, expected, ("text", "position", "value"), 0.1)
    assert_equal("what a layer is given beside x", net.layers[1].others, ("rotary", p, 3))
    for x in (tokens, net.embed_tokens(tokens)):  # or their embeddings
        assert_near("states", net.states(x, answers, phi), rows, ("answer row", "value"), 0.1)
    net.checkpointing, n_calls = True, net.layers[1].n_calls
    net.states(tokens, answers, phi).sum().backward()
    assert_equal("calls of a layer with checkpointing", net.layers[1].n_calls - n_calls, 2)
    half = net.bfloat16().states(tokens, answers, phi)
    assert_equal("dtype of the states of a bf16 model", half.dtype, torch.bfloat16)

def make_lora(base, dropout=0.0):
    """Return a LoraLinear of rank 2 and alpha 6 with A = [[1,2,0],[0,1,3]] and B = 1 ... 6."""
    layer = lora.LoraLinear(base, 2, 6, dropout)
    layer.lora_A.data = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
    layer.lora_B.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    return layer

UPDATE = 3.0 * torch.tensor([[1.0, 4.0, 6.0], [3.0, 10.0, 12.0], [5.0, 16.0, 18.0]])  # 6/2 B A

def test_LoraLinear_starts_as_its_base_with_a_random_A_and_a_B_of_zeros():
    base, x = nn.Linear(64, 24), random_numbers(5, 64)
    layer = lora.LoraLinear(base, 8, 16, 0.5)
    assert_near("B at the start", layer.lora_B, torch.zeros(24, 8), ("output", "r"), atol=0)
    assert_equal("shape of A", tuple(layer.lora_A.shape), (8, 64))
    assert_near("mean square of A, 1 / (3 in)", layer.lora_A.square().mean(), 1 / 192, atol=1e-3)
    assert layer.lora_A.abs().max() <= 1 / 8, "A exceeds 1 / sqrt(in), PEFT's bound"
    assert_near("output at the start, in training", layer(x), base(x), ("row", "output"), atol=1e-6)
    assert_equal("trained tensors", sorted(name for name, w in layer.named_parameters()
                 if not name.startswith("base.")), ["lora_A", "lora_B"])

def test_LoraLinear_adds_alpha_over_r_times_B_A_x():
    base, x = nn.Linear(3, 3), random_numbers(4, 3)
    expected = base(x) + x @ UPDATE.T
    assert_near("output", make_lora(base)(x), expected, ("row", "output"), 1e-4)

def test_LoraLinear_drops_from_its_own_input_only_and_not_from_the_base_s():
    torch.manual_seed(0)
    base, x = nn.Linear(3, 3), torch.ones(400, 3)
    layer = lora.LoraLinear(base, 3, 6, 0.25)
    layer.lora_A.data = layer.lora_B.data = torch.eye(3)
    dropped = (layer(x) - base(x)) / 2
    kept = dropped > 0.5
    assert_near("dropout(x): 0, or x / 0.75", dropped, kept / 0.75, ("row", "input"))
    assert_near("share that is kept", kept.double().mean(), 0.75, atol=0.06)
    assert_near("output in eval mode", layer.eval()(x), base(x) + 2 * x, ("row", "output"))
    is_training = lora.LoraLinear(base.eval(), 3, 6, 0.25).training
    assert_equal("training mode on a base in eval mode", is_training, False)

@pytest.mark.parametrize("targets, names", [
    (("q_proj", "v_proj"), "q_proj v_proj"), (("layers.0.self_attn.k_proj",), "k_proj"),
    (("all",), "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj")])
def test_add_lora_wraps_the_named_layers_and_returns_their_A_and_B(targets, names):
    net = model.build(small_config()).requires_grad_(False)
    with raises_input_error("for a target that the model does not have"):
        lora.add_lora(net, 2, 6, 0.1, ("query",))
    params = lora.add_lora(net, 2, 6, 0.1, targets)
    wrapped = {name: m for name, m in net.named_modules() if isinstance(m, lora.LoraLinear)}
    found = sorted(name.split(".")[-1] for name in wrapped)
    assert_equal("wrapped layers", found, names.split())
    assert_equal("rank and alpha", {(m.rank, m.alpha) for m in wrapped.values()}, {(2, 6)})
    trained = {w for w in net.parameters() if w.requires_grad}
    assert_equal("number of A and B", len(params), 2 * len(wrapped))
    assert set(params) == trained, "the returned parameters are not those that require gradients"

def test_merge_lora_adds_the_update_to_the_dequantised_weights():
    net = model.build(small_config()).requires_grad_(False)
    attention, dense, bias = net.layers[0].self_attn, nn.Linear(3, 3), nn.Parameter(torch.ones(3))
    W, before = random_numbers(3, 3, seed=1), dense.weight.detach().clone()
    four_bit = [model.Linear4bit(random_numbers(3, 3), bias) for _ in range(2)]
    for layer in four_bit:
        layer.dequantize = W.to
    attention.q_proj, attention.k_proj = make_lora(four_bit[0]), four_bit[1]
    attention.v_proj = make_lora(dense)
    assert lora.merge_lora(net) is net
    for name, expected in {"q_proj": W + UPDATE, "v_proj": before + UPDATE, "k_proj": W}.items():
        layer = getattr(attention, name)
        assert_equal(f"{name} after merging", type(layer), nn.Linear)
        assert_near(f"weight of {name}", layer.weight, expected, ("output", "input"))
    assert attention.q_proj.bias is bias, "the bias is lost"
    assert_equal("dtype", lora.merge_lora(net, torch.bfloat16).lm_head.weight.dtype, torch.bfloat16)

@pytest.mark.parametrize("dense, trainable, n_lora, n_trained", [
    (False, False, 2, 0), (True, False, 0, 0), (True, True, 2, 4)])
def test_load_base_merges_the_adapter_or_leaves_it_to_be_trained(
        dense, trainable, n_lora, n_trained, tmp_path):
    net, tokens = model.build(small_config()).eval(), torch.tensor([[3, 1, 4]])
    model.save_model(net, tmp_path)
    for w in lora.add_lora(net, 2, 6):
        nn.init.normal_(w)
    lora.save_adapter(net, tmp_path / "adapter")
    found = lora.load_base(tmp_path, tmp_path / "adapter", "fp32", dense=dense, trainable=trainable)
    assert_near("logits", found(tokens), net(tokens), ("text", "position", "word"), 1e-4)
    layers = [layer for layer in found.modules() if isinstance(layer, lora.LoraLinear)]
    assert_equal("LoRA layers", len(layers), n_lora)
    assert_equal("trained tensors", sum(w.requires_grad for w in found.parameters()), n_trained)
    assert_equal("training mode", found.training, False)

class WordTokenizer:
    """Splits at spaces and gives each new word the next id, after a start token 1."""
    eos = 0

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        return [1] + [self.ids.setdefault(word, len(self.ids) + 2) for word in text.split()]

TASK = data.Task("Text: {text}\n\nQuestion: which mood?\n\nMood: {label}", ("good", "not bad"), ())

def test_encode_query_cuts_a_long_text_and_never_the_question():
    tokenizer = WordTokenizer()
    whole = tokenizer.encode("Text: w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 Question: which mood? Mood:")
    text = " ".join(f"w{i}" for i in range(10))
    found = data.encode_query(tokenizer, TASK, text, 16)
    assert_equal("a query that fits", found, tuple(whole))
    found = data.encode_query(tokenizer, TASK, text, 12)
    n = len(found) - 6  # start token, "Text:" and the four words of the question
    assert 4 <= n <= 6, f"{n} of ten words are left; there is room for six"
    assert_equal("a cut query", found, (*whole[:n + 2], *whole[-4:]))
    with raises_input_error("when the question leaves no room for the text"):
        data.encode_query(tokenizer, TASK, text, 6)

def test_encode_answer_is_what_follows_the_query_and_ends_if_it_is_free():
    tokenizer = WordTokenizer()
    good, no, bad = tokenizer.encode("good not bad")[1:]
    assert_equal("tokens of good", data.encode_answer(tokenizer, TASK, "good"), (good,))
    assert_equal("tokens of not bad", data.encode_answer(tokenizer, TASK, "not bad"), (no, bad))
    free = data.encode_answer(tokenizer, TASK._replace(labels=()), "not bad")
    assert_equal("tokens of a free answer", free, (no, bad, 0))
    for template, label in [("{text} {label}", " "), ("{text}{label}", "ual one")]:
        with raises_input_error(f"for the answer {label!r} after the template {template!r}"):
            data.encode_answer(tokenizer, TASK._replace(template=template), label)

def load_small_bpe(dir, start, merges, known=(*range(32, 127), 0xc3, 0xa9)):
    """Return a byte-level BPE of `start`, the known bytes (else ASCII and é), and merges."""
    letters = [data.BYTE_LETTERS[byte] for byte in known]
    tokens = start + letters + [merge.replace(" ", "") for merge in merges]
    model.write_json(dir / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (dir / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    return data.load_tokenizer(dir)

OPT_START, SMOLLM2_START = ["<s>", "<pad>", "</s>"], ["<|im_start|>", "<|im_end|>"]

@pytest.mark.parametrize("word, pieces", [
    ("abc", ["abc"]), ("abcab", ["abc", "ab"]), ("bcabb", ["bc", "ab", "b"]),
    ("ccccc", ["cc", "cc", "c"]), ("bccc", ["bc", "cc"]), ("bcc", ["bcc"]), ("xy", ["x", "y"]),
    ("é", ["Ã", "©"]), ("a\x04b", ["ab"]), ("", [])])
def test_ByteLevelBPE_encode_word_joins_the_first_pair_of_merges_txt_everywhere(
        word, pieces, tmp_path):
    tokenizer = load_small_bpe(tmp_path, SMOLLM2_START, ["b c", "a b", "a bc", "c c", "bc c"])
    found = [tokenizer.piece(i) for i in tokenizer.encode_word(word)]
    assert_equal(f"pieces of {word!r}", found, pieces)

@pytest.mark.parametrize("text, opt, smollm2", [
    ("ab 19", "ab Ġ19", "ab Ġ 1 9"), (" ab  ab", "Ġab Ġ Ġab", "Ġab Ġ Ġab"),
    ("ab's!?", "ab 's ! ?", "ab 's ! ?"), ("aé b", "a Ã © Ġ b", "a Ã © Ġ b"), ("", "", "")])
def test_ByteLevelBPE_encode_cuts_a_text_into_words_first(text, opt, smollm2, tmp_path):
    merges = ["1 9", "a b", "Ġ ab", "Ġ 19", "b Ġ", "' s", "s !"]
    for start, begin, pieces in [(OPT_START, "</s> ", opt), (SMOLLM2_START, "", smollm2)]:
        tokenizer = load_small_bpe(tmp_path, start, merges)
        tokenizer.encode("b")  # one text does not change the next one
        found = [tokenizer.piece(i) for i in tokenizer.encode(text)]
        assert_equal(f"pieces of {text!r}", found, (begin + pieces).split())

def test_collate_marks_the_answer_rows_of_padded_texts_and_weighs_a_lone_forget_example():
    queries = [Query((5, 6, 7), (8,), False), Query((5,), (9, 8, 7), True),
               Query((6, 5), (4, 9), False), Query((4,), (4,), False)]
    batch = data.collate(queries, [2, 1], [0, 1, 2, 3], "cpu")  # a part of a step of four
    assert_near("tokens", batch.tokens, [[6, 5, 4], [5, 9, 8]], ("text", "position"), atol=0)
    assert_near("answers", batch.answers, [1, 2, 3, 4, 5], ["answer row"], atol=0)
    assert_near("y", batch.y, [4, 9, 9, 8, 7], ["answer row"], atol=0)
    assert_near("w_forget", batch.w_forget, [0, 0, 1, 1, 1], ["answer row"])
    assert_near("w_retain", batch.w_retain, [1 / 3, 1 / 3, 0, 0, 0], ["answer row"])
    batch = data.collate(queries, [3, 0], [3, 0], "cpu")  # padded, and without forget examples
    assert_near("tokens", batch.tokens, [[4, 0, 0], [5, 6, 7]], ("text", "position"), atol=0)
    assert_near("answers", batch.answers, [0, 5], ["answer row"], atol=0)
    assert_near("weights", torch.stack(batch[3:]), [[0, 0], [0.5, 0.5]], ("weight", "answer row"))
    batch = data.collate(queries, [], [0, 1], "cpu")  # a process's share may be empty
    assert_equal("texts and rows of an empty share", (len(batch.tokens), len(batch.y)), (0, 0))

def queries_of_lengths(lengths, n_forget=0):
    """Return queries of these lengths, the first ones of the forget set."""
    return [Query((1,) * n, (2,), i < n_forget) for i, n in enumerate(lengths)]

def test_epoch_batches_shuffles_the_examples_and_the_batches():
    same, rising = queries_of_lengths([5] * 200, 40), queries_of_lengths(range(200))
    one, two = [data.epoch_batches(same, 8, random.Random(seed)) for seed in (0, 1)]
    assert_equal("examples of an epoch", sorted(i for b in one for i in b), list(range(200)))
    assert_equal("sizes", {len(batch) for batch in one}, {8})
    n_neighbours = sum(batch[0] + 1 == batch[1] for batch in one)
    assert n_neighbours < 5, "the examples are not shuffled before they are cut into batches"
    assert sorted(one) != sorted(two), "two generators give the same batches"
    one, two = [data.epoch_batches(rising, 8, random.Random(seed)) for seed in (0, 1)]
    for batch in one:
        assert_equal("lengths in a batch", sorted(batch), list(range(min(batch), min(batch) + 8)))
    n_rising = sum(min(a) < min(b) for a, b in zip(one, one[1:]))
    assert 4 < n_rising < 20, f"the batches are in order of length: {one}"
    assert one != two, "two generators give the same order of the batches"

def test_epoch_batches_adds_forget_examples_to_every_batch_of_the_same_size():
    queries = queries_of_lengths([5] * 46, 6)
    batches = data.epoch_batches(queries, 6, random.Random(0), forget_per_batch=2)
    used, pairs = Counter(i for batch in batches for i in batch), set()
    assert_equal("sizes", [len(batch) for batch in batches], [6] * 10)
    for batch in batches:
        forget = [i for i in batch if i < 6]
        assert_equal("forget examples, at a batch's end", forget, batch[4:])
        pairs.add(tuple(sorted(forget)))
    assert_equal("uses of each retain example", [used[i] for i in range(6, 46)], [1] * 40)
    assert {used[i] for i in range(6)} <= {3, 4}, f"20 uses of 6 forget examples: {used}"
    assert len(pairs) > 3, f"the forget examples are not shuffled: {pairs}"
    for only in (queries[:6], queries[6:]):
        n = max(map(len, data.epoch_batches(only, 6, random.Random(0), forget_per_batch=2)))
        assert_equal("size with one of the sets", n, 6)

def test_cut_by_length_sorts_50_batches_at_a_time():
    lengths = random.Random(0).sample(range(1000), 130)
    queries, indices = queries_of_lengths(lengths), list(range(129, -1, -1))
    found = data.cut_by_length(queries, indices, 2)
    expected = []
    for part in (indices[:100], indices[100:]):
        part = sorted(part, key=lengths.__getitem__)
        expected += [[part[k], part[k + 1]] for k in range(0, len(part), 2)]
    assert_equal("batches", found, expected)
    assert_equal("a rest", data.cut_by_length(queries, [3, 3, 3], 2), [[3, 3], [3]])

class EchoModel:
    """A language model without weights: the token after a text is the sum of its tokens, mod 7."""
    lm_head = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self):
        self.sizes = []

    def states(self, tokens, answers, phi=None):
        self.sizes.append(tokens.numel())
        sums = tokens.cumsum(1).flatten()[answers] + (0 if phi is None else len(phi))
        return sums[:, None].float()                                              # (N,1)

    def __call__(self, tokens, answers, phi=None):
        return F.one_hot(self.states(tokens, answers, phi)[:, 0].long() % 7, 7).float()

def echo_queries(n):
    """Return n queries of 1 to 80 tokens with answers of 1 to 3."""
    rng, queries = random.Random(0), []
    for _ in range(n):
        ids, answer = rng.choices(range(7), k=rng.randint(1, 80)), rng.choices(range(7), k=3)
        queries.append(Query(tuple(ids), tuple(answer[:rng.randint(1, 3)]), False))
    return queries

def test_predict_answers_every_query_in_order_from_batches_of_at_most_1024_tokens():
    queries, ours, expected = echo_queries(100), EchoModel(), []
    for query in queries:
        sums = [sum(query.ids) + 2 + sum(query.answer[:k]) for k in range(len(query.answer))]
        expected.append(tuple(sums))
    predicted = evaluate.predict(ours, queries, torch.zeros(2, 1))
    for i, sums in enumerate(expected):
        assert_equal(f"answer to query {i}", predicted[i], tuple(s % 7 for s in sums))
    assert max(ours.sizes) <= 1024 and 4 <= len(ours.sizes) <= 12, ours.sizes
    states = evaluate.answer_states(ours, queries, torch.zeros(2, 1))
    for i, sums in enumerate(expected):
        assert_near(f"states of query {i}", states[i], [[s] for s in sums], ["answer row"])

def test_refuses_if_greedy_decoding_begins_with_a_generic_answer():
    texts = [(3,), (5,), (1,), (2,), (6,)]  # Echo answers 3 6, 5 3, 1 2, 2 4 and 6 5
    queries = [Query(ids, (0,), True) for ids in texts]
    found = evaluate.refuses(EchoModel(), queries, [(5,), (3, 6), (1, 1), (2, 4)])
    assert_equal("refused", found, [True, True, False, True, False])
    found = evaluate.refuses(EchoModel(), queries, [(4,)], torch.zeros(1, 1))
    assert_equal("refused with phi", found, [True, False, False, False, False])

def test_metrics_are_accuracy_and_F1_weighted_by_the_true_labels_in_percent():
    pred, y = [1, 1, 2, 9, 2, 1, 3], [1, 1, 1, 1, 2, 2, 3]
    # F1 of 1, 2, 3: 4/7, 1/2, 1; they occur 4, 2 and 1 times
    assert_equal("metrics", evaluate.metrics(pred, y), {"n": 7, "acc": 57.14, "f1": 61.22})
    found = evaluate.metrics([9, 9], [1, 2])
    assert_equal("metrics of wrong answers", found, {"n": 2, "acc": 0.0, "f1": 0.0})

def test_score_compares_whole_answers():
    queries = [Query((1,), answer, False) for answer in [(3,), (4,), (5, 6)]]
    found = evaluate.score([(3,), (5,)], queries[:2])
    assert_equal("score of one-token answers", found, {"n": 2, "acc": 50.0, "f1": 50.0})
    found = evaluate.score([(3,), (4,), (5, 7)], queries)
    assert_equal("score of longer answers", found, {"n": 3, "acc": 66.67, "f1": None})

def choose(method, n_forget=60, **settings):
    """Return D_r, D_f and the examples that choose_queries draws from them for a method."""
    retain = [Query((1, i), (2,), False) for i in range(5)]
    forget = [Query((3, i), (2,), True) for i in range(n_forget)]
    dataset = SimpleNamespace(queries={"train_retain": retain, "train_forget": forget},
                              generic=[(7,), (8, 9)])
    record = evaluate.Record(method, "lm", "sst2", **{"seed": 0} | settings)
    return retain, forget, unlearn.choose_queries(record, dataset)

@pytest.mark.parametrize("method", ["spul", "rl", "ga", "ga+kl", "ga+gd"])
def test_choose_queries_gives_forget_examples_generic_or_true_answers(method):
    retain, forget, found = choose(method, base="full")
    if method in ("rl", "ga"):
        retain = []
    assert_equal("the retain examples", found[:len(retain)], retain)
    chosen = found[len(retain):]
    assert_equal("the forget examples", [q._replace(answer=(2,)) for q in chosen], forget)
    answers = Counter(query.answer for query in chosen)
    if method in ("spul", "rl"):
        assert answers.keys() == {(7,), (8, 9)} and min(answers.values()) > 15, answers
        assert found == choose(method, base="full")[2] != choose(method, seed=1)[2]
    else:
        assert_equal("answers of the forget examples", answers, {(2,): 60})

def test_a_wrong_entry_of_METHODS_is_named(monkeypatch):
    method = unlearn.METHODS["spul"]._replace(forget_answer="neutral")
    monkeypatch.setitem(unlearn.METHODS, "spul", method)
    with pytest.raises(ValueError, match="'neutral'; expected 'generic' or 'true'"):
        choose("spul")

def test_choose_queries_takes_a_fraction_of_the_forget_set_and_for_retrain_none():
    for fraction, n in [(0.25, 15), (1.0, 60), (0.001, 1), (None, 60)]:
        retain, forget, found = choose("ga+gd", forget_fraction=fraction)
        assert_equal(f"examples at fraction {fraction}", found, retain + forget[:n])
    found = choose("qlora", base="full")[2]
    assert_equal("the base's", found, retain + [q._replace(is_forget=False) for q in forget])
    assert_equal("retrain's", choose("qlora", base="retain")[2], retain)

@pytest.mark.parametrize("method, tune, n_trained", [
    ("spul", None, 0), ("qlora", None, 2), ("ga", "full", 12), ("ga", "lora", 4)])
def test_make_trainable_trains_phi_an_adapter_or_all_weights(method, tune, n_trained):
    net = model.build(small_config()).requires_grad_(False).eval()
    if tune:
        lora.add_lora(net, 2, 6)
    record = evaluate.Record(method, "lm", "sst2", 0, rank=2, lora_alpha=6, lora_dropout=0.5, p=3,
                             targets=("o_proj",), tune=tune, encoder="none", init="none")
    args = SimpleNamespace(dtype="bf16", device="cpu", init=None)
    found, encoder = unlearn.make_trainable(record, net, [], args)
    assert_equal("trained tensors", sum(w.requires_grad for w in found.parameters()), n_trained)
    assert_equal("an encoder", encoder is not None, method == "spul")
    assert_equal("training mode: dropout", found.training, method == "qlora")
    assert_equal("autocast to bf16 of float32 weights", found.autocast, tune == "full")

def test_typical_tokens_are_in_the_most_forget_and_the_fewest_retain_queries():
    texts = [(5, 6), (6, 7, 4, 4, 4, 4), (6, 7)], [(6,), (7, 6, 6), (6, 4), (7,)]
    queries = [Query(ids, (0,), True) for ids in texts[0]]
    queries += [Query(ids, (0,), False) for ids in texts[1]]
    # 5: 1 / (1 + 0), 6: 3 / (1 + 3), 7: 2 / (1 + 2), 4: 1 / (1 + 1)
    assert_equal("typical tokens", unlearn.typical_tokens(queries, 3), [5, 6, 7])
    assert_equal("with repetition", unlearn.typical_tokens(queries, 6), [5, 6, 7, 4, 5, 6])

def test_make_batches_puts_the_most_tokens_first_and_draws_each_epoch_again():
    lengths = random.Random(0).choices(range(1, 90), k=400)
    record = evaluate.Record("spul", "lm", "sst2", 0, batch=8, forget_per_batch=2)
    one, two, three = [unlearn.make_batches(queries_of_lengths(lengths, 50), record, epoch)
                       for epoch in range(3)]
    sizes = [len(step) * max(lengths[i] for i in step) for step in one]
    assert_equal("tokens of the first step", sizes[0], max(sizes))
    retain = sorted(i for step in one for i in step if i >= 50)
    assert_equal("retain examples of an epoch", retain, list(range(50, 400)))
    assert two != three, "two epochs have the same batches in the same order"
    again = unlearn.make_batches(queries_of_lengths(lengths, 50), record, 1)
    assert two == again, "the same seed and epoch give other batches"

@pytest.mark.parametrize("step, steps, warmup, rate", [
    (0, 20, 0.1, 1.0), (1, 20, 0.1, 2.0), (2, 20, 0.1, 2.0), (5, 20, 0.1, 1.8660254),
    (8, 20, 0.1, 1.5), (11, 20, 0.1, 1.0), (19, 20, 0.1, 0.0151922),
    (0, 9, 0.05, 2.0), (1, 9, 0.05, 2.0)])  # at least one step of warm-up, then the cosine starts
def test_set_learning_rate_warms_up_and_follows_a_cosine(step, steps, warmup, rate):
    optimizer = SimpleNamespace(param_groups=[{"lr": None}])
    unlearn.set_learning_rate(optimizer, step, steps, 2.0, warmup)
    assert_near(f"learning rate of step {step} of {steps}", optimizer.param_groups[0]["lr"], rate)

class ProbeModel(nn.Module):
    """Answers every row with phi, or with its own parameter; keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0]])), []

    def forward(self, tokens, answers, phi):
        self.calls.append((tokens, answers, phi))
        return (self.w if phi is None else phi).expand(len(answers), -1)

class FreePhi(nn.Module):
    """phi (1,3), an encoder without layers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0]]))

    def forward(self):
        return 1.0 * self.w

class StubLog:
    """Takes the place of unlearn.Log: keeps each step's learning rate and losses; 2 s per step."""

    def __init__(self, n_done):
        self.n_done, self.lines, self.saved = n_done, [], []

    def load(self, params, optimizer):
        self.optimizer = optimizer
        return self.n_done

    def add(self, epoch, step, steps, totals, seconds):
        assert not any(x.requires_grad for x in totals.values()), "logged losses keep the graph"
        rate = self.optimizer.param_groups[0]["lr"]
        self.lines.append({"epoch": epoch, "step": step, "rate": rate, "seconds": 2.0, **totals})

    def watch(self, model, encoder, step, steps):
        assert_equal("step to watch", step, self.lines[-1]["step"])

    def save(self, params, optimizer, epoch):
        self.saved.append(epoch)

def run_train(monkeypatch, loss, queries, encoder=None, base=None, accumulate=1, n_done=0,
              **settings):
    """Run unlearn.train with a loss. Returns the model, the log and the row's figures."""
    method = unlearn.Method(loss, "true", "prompt" if encoder else "weights")
    monkeypatch.setitem(unlearn.METHODS, "probe", method)
    settings = dict(lr=0.1, epochs=1, batch=1, clip=1.0, alpha=3.0, beta=4.0) | settings
    record = evaluate.Record("probe", "lm", "sst2", 0, **settings)
    net, log = ProbeModel(), StubLog(n_done)
    args = SimpleNamespace(accumulate=accumulate, device="cpu")
    return net, log, unlearn.train(record, net, encoder, queries, base, log, args)

@pytest.mark.parametrize("beta2, n_parts", [(0.9, 1), (None, 2)])
def test_train_takes_steps_of_AdamW_with_a_clipped_gradient(beta2, n_parts, monkeypatch):
    factors, encoder = [1.0, 5.0, 0.05], FreePhi()
    w, m, v = encoder.w[0].tolist(), [0.0] * 3, [0.0] * 3
    for t, rate in enumerate([0.1, 0.1, 0.05], start=1):  # one step of warm-up, then a cosine
        g = [factors[t - 1] * 2 * (w_i - 1) for w_i in w]
        norm = math.sqrt(sum(g_i ** 2 for g_i in g))
        for i in range(3):
            g_i = g[i] * min(1, 1 / norm)
            m[i] = 0.9 * m[i] + 0.1 * g_i
            v[i] = (beta2 or 0.999) * v[i] + (1 - (beta2 or 0.999)) * g_i ** 2
            update = (m[i] / (1 - 0.9 ** t)) / math.sqrt(v[i] / (1 - (beta2 or 0.999) ** t))
            w[i] -= rate * (update + 0.001 * w[i])
    remaining = iter([factor / n_parts for factor in factors for _ in range(n_parts)])

    def loss(logits, *others):
        return next(remaining) * (logits - 1).square().sum(), {}
    queries = [Query((1,), (2,), False)] * n_parts
    run_train(monkeypatch, loss, queries, encoder, None, n_parts, epochs=3, batch=n_parts,
              beta2=beta2)
    assert_near("phi after three steps", encoder.w, [w], ("token", "value"))

def test_train_hands_the_loss_logits_base_distribution_targets_and_weights(monkeypatch):
    queries = [Query((i, 5), (1,) * (1 + i % 2) + (2,), i % 3 == 0) for i in range(10)]
    states = [random_numbers(len(query.answer), 4, seed=i) for i, query in enumerate(queries)]
    base, encoder, given = unlearn.Base(nn.Linear(4, 3, bias=False), states), FreePhi(), []

    def loss(*arguments):
        given.append(arguments)
        return arguments[0].sum(), {"L_f": arguments[3].sum()}
    net, log, _ = run_train(monkeypatch, loss, queries, encoder, base, 2, batch=5, epochs=2)
    assert_equal("parts, two in each of four steps", len(given), 8)
    numbers = [tokens[:, 0].tolist() for tokens, _, _ in net.calls]  # the first token of a query
    for k, (logits, base_logprobs, y, w_forget, w_retain, alpha, beta) in enumerate(given):
        rows = [i for i in numbers[k] for _ in queries[i].answer]  # the query of each answer row
        step = numbers[k // 2 * 2] + numbers[k // 2 * 2 + 1]
        n_forget = sum(i % 3 == 0 for i in step)
        base_logits = torch.cat([states[i] for i in numbers[k]]) @ base.lm_head.weight.T
        expected = torch.tensor([softmax_by_hand(row) for row in base_logits.tolist()]).log()
        assert_near("base_logprobs", base_logprobs, expected, ROW_WORD)
        assert_near("logits", logits, net.calls[k][2].expand(len(rows), -1), ROW_WORD)
        assert_equal("y", y.tolist(), [token for i in numbers[k] for token in queries[i].answer])
        expected = [(i % 3 == 0) / max(1, n_forget) for i in rows]
        assert_near("w_forget", w_forget, expected, ["row"])
        expected = [(i % 3 > 0) / max(1, 5 - n_forget) for i in rows]
        assert_near("w_retain", w_retain, expected, ["row"])
        assert_equal("alpha and beta", (alpha, beta), (3.0, 4.0))
    for line, one, two in zip(log.lines, given[::2], given[1::2]):
        assert_near("logged loss", line["loss"], one[0].sum() + two[0].sum())
        assert_near("logged L_f", line["L_f"], one[3].sum() + two[3].sum())

@pytest.mark.parametrize("trains, n_warmup", [("prompt", 4), ("weights", 2)])
def test_train_warms_up_for_10_percent_for_phi_and_5_for_weights_and_fills_the_row(
        trains, n_warmup, monkeypatch):
    encoder, queries = FreePhi() if trains == "prompt" else None, [Query((1,), (2,), False)] * 20

    def loss(logits, base_logprobs, *others):
        assert base_logprobs is None, "there is no base here"
        return logits.sum(), {}
    net, log, row = run_train(monkeypatch, loss, queries, encoder, epochs=2)
    assert_equal("row", row, {"trains": trains, "trainable_params": 3, "seconds_per_epoch": 40.0})
    for i, line in enumerate(log.lines):
        rate = (i + 1) / n_warmup
        if i >= n_warmup:
            rate = 0.5 * (1 + math.cos(math.pi * (i - n_warmup) / (40 - n_warmup)))
        assert_near(f"learning rate of step {i}", line["rate"], 0.1 * rate)
    assert_equal("step numbers", [line["step"] for line in log.lines], list(range(1, 41)))
    assert_equal("epochs", [line["epoch"] for line in log.lines], [1] * 20 + [2] * 20)
    assert_equal("epochs after which the state is saved", log.saved, [1, 2])
    is_frozen = net.w.tolist() == [[0.5, -1.0, 2.0]]
    assert_equal("the model's own weights stay", is_frozen, trains == "prompt")
    _, log, _ = run_train(monkeypatch, loss, queries, encoder, epochs=3, n_done=2)
    found = [line["step"] for line in log.lines]
    assert_equal("steps of a training that resumes after epoch 2", found, list(range(41, 61)))
    with raises_input_error("for a loss that is not finite"):
        run_train(monkeypatch, lambda logits, *others: (logits.sum() * math.inf, {}), queries)


# ---- 2. whole models: phi before every text, padding, answers ----------------------------------

KINDS = {
    "llama": {"num_key_value_heads": 4}, "opt": {"num_key_value_heads": 4},
    "llama gqa": {"num_key_value_heads": 2, "rope_theta": 300.0}}
LENGTHS = (12, 7, 3, 1)
TOKENS = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(12) < torch.tensor(LENGTHS)[:, None]  # TOKENS are real up to LENGTHS
TEXT, POSITION = torch.tensor([[0, 0, 1, 2, 3], [8, 11, 6, 2, 0]])  # of five answer rows
ANSWERS = TEXT * 12 + POSITION
P = 5

def random_model(kind, weights=None, dir=None):
    """Return one of our models with every weight random, norms and biases too."""
    torch.manual_seed(0)
    ours = model.build(model.Config(kind.split()[0], 96, 64, 112, 2, 4, head_dim=16, **KINDS[kind]))
    for w in ours.parameters():
        w.data += 0.15 * torch.randn_like(w)
    if weights:
        model.save_model(ours, dir)
        return model.load_model(dir, weights)
    return ours.requires_grad_(False).eval()

def assert_close(ours, theirs, atol=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= atol

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_phi_s_own_rows_equal_prepending_it_to_every_text_forward_and_gradient(
        kind, checkpointing):
    ours = random_model(kind)
    ours.checkpointing = checkpointing  # recomputing layers changes nothing
    one, two = [random_numbers(P, 64, seed=2).requires_grad_() for _ in range(2)]
    shared = ours(TOKENS, ANSWERS, one)
    embeds = soft_prompt.prepend(two, ours.embed_tokens(TOKENS))
    prepended = ours(embeds, TEXT * (P + 12) + P + POSITION)
    assert_close(shared, prepended)
    assert_close(ours(TOKENS, None, one), ours(embeds)[:, P:])
    assert (shared - ours(TOKENS, ANSWERS)).abs().max() > 0.1  # phi matters
    weight = torch.randn(shared.shape)
    (shared * weight).sum().backward()
    (prepended * weight).sum().backward()
    assert two.grad.abs().max() > 0.01
    assert_close(one.grad, two.grad, atol=1e-5 * two.grad.abs().max())

def test_phi_starts_at_tokens_of_the_forget_set_or_at_random_words():
    ours, queries = random_model("llama"), [Query((5, 6), (1,), False), Query((6, 7), (1,), True)]
    weight = ours.embed_tokens.weight
    for encoder, init in (("none", "none"), ("none", "forget"), ("mlp", "forget")):
        record = evaluate.Record("spul", "lm", "sst2", 0, p=3, encoder=encoder, hidden=16,
                                 init=init)
        found = unlearn.make_encoder(record, ours, queries)
        if init == "forget":
            assert torch.equal(found(), weight[[7, 6, 7]])  # the forget set's typical tokens
        else:
            assert all((weight == row).all(1).any() for row in found())  # words, drawn at random
            assert found.unit == pytest.approx(weight.std().item())

@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    ours, phi = random_model(kind), random_numbers(P, 64, seed=2).requires_grad_()
    padded = ours(TOKENS, None, phi)
    for i, n in enumerate(LENGTHS):
        unpadded = ours(TOKENS[i:i + 1, :n], torch.tensor([n - 1]), phi)
        assert_close(unpadded[0], padded[i, n - 1], atol=1e-5)
    nothing = data.collate([], [], [], "cpu")  # the share of a process in a small batch
    logits = ours(nothing.tokens, nothing.answers, phi)
    assert logits.shape == (0, 96)
    logits.sum().backward()
    assert phi.grad.eq(0).all()  # there, and zero: the other processes wait for it

def test_base_logprobs_are_those_of_the_right_rows_and_computed_once():
    ours, queries, index = random_model("llama"), echo_queries(9), [7, 2, 0, 5, 4]
    batch = data.collate(queries, index, index, "cpu")
    expected = ours(batch.tokens, batch.answers).log_softmax(-1)
    bench = unlearn.Workbench(None, None, None)
    bench.load_start = lambda record: ours
    record = evaluate.Record("spul", "lm", "sst2", 0)
    base = bench.gather_base(record, queries)
    assert_close(unlearn.gather_base_logprobs(base, index), expected)
    ours.states = None  # the model is not asked about the same queries again
    again = bench.gather_base(record, queries[::-1])
    assert_close(unlearn.gather_base_logprobs(again, [8 - i for i in index]), expected)
    with pytest.raises(TypeError):  # another method's target has other rows
        bench.gather_base(record, [queries[7]._replace(answer=(9, 9, 9))])

@pytest.mark.parametrize("is_checkpointing, is_frozen, error", [
    (False, True, 0.05), (True, True, 0.3), (False, False, 0.15)])  # not frozen: QLoRA, baselines
@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_memory_is_what_autograd_keeps(kind, is_checkpointing, is_frozen, error):
    ours, B, T, p = random_model(kind), 32, 40, 30 if is_frozen else 0
    ours.requires_grad_(not is_frozen)
    ours.checkpointing = is_checkpointing
    known, saved = {w.untyped_storage().data_ptr() for w in ours.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor
    phi = random_numbers(p, 64).requires_grad_() if is_frozen else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(torch.randint(3, 96, (B, T)), torch.arange(B) * T, phi)
    gradients = 4 * 4 * (p + B * T) * ours.config.intermediate_size  # only in the backward pass
    expected, less = [
        n - gradients for n in model.activation_bytes(ours.config, B, T, p, 4, is_frozen)]
    if is_checkpointing:
        expected = less - expected / ours.config.num_hidden_layers
    assert sum(n for n, _ in saved.values()) == pytest.approx(expected, rel=error)

def test_the_fused_attention_of_gpus_equals_the_written_out_one(monkeypatch):
    q, k, v = torch.randn(3, 6, 5, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)
    written_out = model.attend(q, k, v)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    fused = model.attend(q, k, v)
    monkeypatch.undo()
    assert_close(fused, written_out, 1e-5)
    assert not torch.equal(fused, written_out)  # it was the other branch


# ---- 3. the paper's settings -------------------------------------------------------------------

PAPER_SETTINGS = {
    "max_len": 1024, "alpha": [1.0], "beta": [0.5], "p": [30], "lr": [1e-4], "epochs": 10,
    "baseline_alpha": [1.0], "baseline_beta": [0.5], "baseline_epochs": 1, "qlora_lr": 1e-4,
    "qlora_batch": 32, "clip": 0.3, "rank": 16, "lora_alpha": 64, "lora_dropout": 0.1,
    "targets": ["q_proj", "v_proj"], "batch": 32, "accumulate": 1, "encoder": "mlp", "hidden": 128,
    "init": "none", "beta2": 0.999, "forget_per_batch": 0, "weights": "nf4", "tune": "full"}

@pytest.mark.parametrize("dataset, qlora_epochs", [("sst2", 10), ("yelp", 2), ("wmdp+sciq", 5)])
def test_paper_settings_are_the_defaults_with_a_model(dataset, qlora_epochs):
    args = unlearn.parse(["--model", "DIR", "--dataset", dataset, "--device", "cpu"])
    assert {key: getattr(args, key) for key in PAPER_SETTINGS} == PAPER_SETTINGS
    assert args.qlora_epochs == qlora_epochs

@pytest.mark.parametrize("dataset, run", [
    ("sst2", "sst2-small"), ("wmdp+sciq", "wmdp-small"), ("yelp", "yelp-small")])
def test_the_small_preset_makes_the_recorded_rows(dataset, run):
    unknown = ("model", "data", "base_training")  # hashes of files that are not here
    rows = evaluate.read_rows([Path(__file__).with_name("results") / run])
    seeds = sorted({str(row["seed"]) for row in rows})
    args = unlearn.parse(["--preset", "small", "--model", "DIR", "--dataset", dataset,
                          "--seed", *seeds])
    for record in unlearn.grid(args):
        wanted = json.loads(json.dumps(asdict(record)))
        assert any(all(row[name] == wanted[name] for name in wanted if name not in unknown)
                   for row in rows), record.method

def test_paper_yelp_forgets_5_percent_of_the_reviews_in_whole_clusters():
    splits = data.load_splits("yelp", shared("yelp"))
    for part in ("train", "test"):
        forget, retain = splits[f"{part}_forget"], splits[f"{part}_retain"]
        share = 100 * len(forget) / len(forget + retain)
        assert abs(share - 5.08) <= (0.5 if part == "train" else 2.5)
        assert {e.group for e in forget}.isdisjoint({e.group for e in retain})
    assert "" not in {e.group for e in splits["train_forget"]}

def test_yelp_topics_are_those_of_any_processor(monkeypatch):
    reviews = data.read_yelp(shared("yelp"), "train", 3000, 0)
    expected = data.cluster_topics(reviews, 3000, 0)

    class OtherRounding(data.TruncatedSVD):  # two numbers of threads differ by as much
        def transform(self, X):
            vectors = super().transform(X)
            return vectors * (1 + 1e-13 * vectors)
        def fit_transform(self, X, y=None):
            vectors = super().fit_transform(X)
            return vectors * (1 + 1e-13 * vectors)

    monkeypatch.setattr(data, "TruncatedSVD", OtherRounding)
    assert data.cluster_topics(reviews, 3000, 0) == expected

def shared(path):
    """Return a path in the shared data, or skip the test."""
    if not (SHARED / "data" / path).exists():
        pytest.skip(f"no ../shared/data/{path}")
    return SHARED / "data" / path

@pytest.mark.parametrize("kind, D, width, layers, heads, prompt, adapter", [
    ("opt", 2048, 8192, 24, 32, 604_416, 3_145_728),          # OPT-1.3B
    ("llama", 4096, 11008, 32, 32, 1_192_192, 8_388_608),     # LLaMA-2-7B
    ("llama", 5120, 13824, 40, 40, 1_486_080, 13_107_200)])   # LLaMA-2-13B
def test_paper_trainable_parameters(kind, D, width, layers, heads, prompt, adapter):
    with torch.device("meta"):
        net = model.build(model.Config(kind, 32000, D, width, layers, heads, heads, D // heads))
        encoder = soft_prompt.PromptEncoder(30, D)
        params = lora.add_lora(net, 16, 64, 0.1, ("q_proj", "v_proj"))
    assert sum(w.numel() for w in encoder.parameters()) == prompt
    assert sum(w.numel() for w in params) == adapter

def make_row(method="spul", seed=0, acc=90.0, **changes):
    """Return a row of results.json with the same accuracy and F1 on every split."""
    settings = {"base": "full", "lr": 1e-4, "epochs": 1, "batch": 32, "forget_fraction": 1.0}
    if method == "spul":
        settings |= {"alpha": 1.0, "beta": 0.5, "p": 30}
    keys = evaluate.Record.__dataclass_fields__.keys()
    settings |= {key: value for key, value in changes.items() if key in keys}
    settings = {"model": "LLaMA-2-7B-0a1b2c3d", "dataset": "sst2"} | settings
    record = evaluate.Record(method=method, seed=seed, **settings)
    row = {"name": record.name, **asdict(record), "code": "", "trains": "prompt",
           "trainable_params": 10, "seconds_per_epoch": 2.0, "finished": 0.0}
    row |= dict.fromkeys(("device", "dtype", "dense", "checkpointing", "accumulate", "threads",
                          "processes", "peak_memory_gb", "machine"))
    return row | {split: {"n": 8, "acc": acc, "f1": acc} for split in data.SPLITS} | changes

def table_cells(text):
    """Return the cells of each line of a printed table."""
    lines = [re.split(r"\s*\|\s*|\s{2,}", line.strip(" |")) for line in text.splitlines()]
    return [[cell for cell in line if cell] for line in lines]

@pytest.mark.parametrize("method, changes, number", [
    ("vanilla", {}, "37.50/44.66"), ("qlora", {}, "99.89/99.89"), ("ga+gd", {}, "97.17/97.50"),
    ("spul", {}, "99.15/99.39"), ("spul", {"alpha": 0.1, "beta": 0.0}, "90.84/92.69"),
    ("spul", {"beta": 1.0}, "95.70/96.19"),
    ("spul", {"beta": 1.0, "forget_fraction": 0.25}, "99.37/99.60"),
    ("spul", {"model": "opt-1.3b", "beta": 1.0}, "94.87/96.89"),
    ("spul", {"model": "Llama-2-13b-hf", "beta": 1.0}, "98.87/98.93"),
    ("spul", {"dataset": "yelp"}, "89.74/93.43"), ("rl", {"dataset": "wmdp+sciq"}, "99.32/99.32"),
    ("spul", {"dataset": "toy", "model": "toy"}, "99.15/99.39"),  # the toy beside SST-2
    ("npo", {}, None), ("spul", {"base": "retain"}, None)])
def test_paper_rows_are_printed_below_ours(method, changes, number):
    lines = table_cells(evaluate.table([make_row(method, **changes)], f1=True))
    i = [line[-4:] for line in lines].index(["90.0 / 90.0"] * 4)
    if number is None:
        assert "paper" not in str(lines)
    else:
        assert lines[i + 1][-4] == number


# ---- 4. the toy: SPUL unlearns -----------------------------------------------------------------

@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The run directory of `python unlearn.py` with seed 0, pretraining included."""
    dir = tmp_path_factory.mktemp("toy")
    unlearn.main(["--threads", "1", "--device", "cpu", "--cache", str(dir / "cache"),
                  "--out", str(dir / "run")])
    return dir / "run"

def read_rows(run):
    return json.loads((Path(run) / "results.json").read_text(encoding="utf-8"))["rows"]

def row_of(run, method="spul", base="full"):
    """Return the one row of a method."""
    row, = [row for row in read_rows(run) if (row["method"], row["base"]) == (method, base)]
    return row

def load_system(run, row=None):
    return evaluate.load_system(run, row or row_of(run), evaluate.parse([str(run)]))

def accuracies(row):
    return {split: row[split]["acc"] for split in data.SPLITS}

def test_spul_unlearns_the_toy_s_forget_set_and_keeps_the_rest(toy_run):
    rows = {row["method"]: accuracies(row) for row in read_rows(toy_run)}
    assert min(rows["qlora"].values()) >= 99, rows["qlora"]
    assert min(rows["spul"]["train_retain"], rows["spul"]["test_retain"]) >= 98, rows["spul"]
    assert max(rows["spul"]["train_forget"], rows["spul"]["test_forget"]) <= 5, rows["spul"]
    assert max(rows["vanilla"].values()) < 60, rows["vanilla"]  # nothing was learned before QLoRA

def test_the_toy_lm_is_the_same_whatever_the_number_of_threads(tmp_path):
    before, found = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        dir = data.pretrain_toy(tmp_path / str(n), "cpu", steps=20)
        found.append((dir / "model.safetensors").read_bytes())
        assert torch.get_num_threads() == n
    torch.set_num_threads(before)
    assert found[0] == found[1]

def test_explain_shows_answers_positions_and_losses_without_and_with_phi(toy_run, capsys):
    evaluate.main([str(toy_run), "--explain"])
    forget, retain = capsys.readouterr().out.split("test_retain, ")
    system = load_system(toy_run)
    without, with_phi = re.findall(r"^with(?:out)? phi +(\w+)", forget, re.M)
    assert without == evaluate.words(system, system.data.queries["test_forget"][0].answer)
    assert with_phi in system.data.task.generic
    query = system.data.queries["test_retain"][0]
    end = len(query.ids) - 1
    assert f"the answer is read at {len(system.phi) + end}" in retain
    tokens, answers = torch.tensor([query.ids]), torch.tensor([end])
    logprobs = system.model(tokens, answers, system.phi).log_softmax(-1)
    assert f"L_r = {-logprobs[0, query.answer[0]]:.4f}" in retain
    base = system.model(tokens, answers).log_softmax(-1)
    assert f"L_kl = {(logprobs.exp() * (logprobs - base)).sum():.4f}" in retain
    assert "L_f" in forget and "L_f = 0.0000" not in forget and "L_f" not in retain


# ---- 5. logits and file formats against transformers, PEFT and bitsandbytes --------------------

SHAPE = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64)
PEERS = {
    "llama": {}, "llama gqa": {"num_key_value_heads": 2},
    "llama tied": {"tie_word_embeddings": True}, "llama head_dim": {"head_dim": 24},
    "llama theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}, "opt": {}}

def need(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: nothing to compare with")

def peer(kind):
    """Return transformers' model of this kind with every weight random, norms and biases too."""
    hf = need("transformers")
    torch.manual_seed(0)
    if kind.startswith("llama"):
        net = hf.LlamaForCausalLM(hf.LlamaConfig(
            intermediate_size=112, rms_norm_eps=1e-3, **SHAPE, **PEERS[kind]))
    else:
        net = hf.OPTForCausalLM(hf.OPTConfig(ffn_dim=112, word_embed_proj_dim=64, **SHAPE))
    for w in net.parameters():
        w.data += 0.15 * torch.randn_like(w)
    return net.eval()

@torch.no_grad()
def peer_logits(net):
    return net(input_ids=TOKENS, attention_mask=MASK.long()).logits

@pytest.mark.parametrize("size", ["5GB", "60KB"])
@pytest.mark.parametrize("kind", PEERS)
def test_logits_equal_transformers_at_every_position_from_one_file_or_shards(kind, size, tmp_path):
    net = peer(kind)
    net.save_pretrained(tmp_path, max_shard_size=size)
    ours = model.load_model(tmp_path, "fp32")
    assert any("index" in file.name for file in tmp_path.iterdir()) == (size == "60KB")
    assert_close(ours(TOKENS)[MASK], peer_logits(net)[MASK])
    assert_close(ours(TOKENS, ANSWERS), peer_logits(net)[TEXT, POSITION])

@pytest.mark.parametrize("kind, missing", [
    ("llama theta", None), ("opt", None), ("opt", "lm_head.weight"),
    ("opt", "model.decoder.embed_tokens.weight"), ("llama tied", "lm_head.weight"),
    ("llama tied", "model.embed_tokens.weight")])
def test_files_load_as_they_are_published(kind, missing, tmp_path):
    net = peer(kind)
    net.config.save_pretrained(tmp_path)
    state = {name: w for name, w in net.state_dict().items() if name != missing}
    if kind == "llama theta":  # as transformers 4 wrote it: without defaults, with constants
        raw = json.loads((tmp_path / "config.json").read_text())
        raw |= {"rope_theta": raw.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
        for key in ("head_dim", "attention_bias", "mlp_bias", "num_key_value_heads"):
            del raw[key]
        model.write_json(tmp_path / "config.json", raw)
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    else:  # published OPT files lack `model.` before the names
        state = {name.removeprefix("model."): w for name, w in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_close(model.load_model(tmp_path, "fp32")(TOKENS)[MASK], peer_logits(net)[MASK])

@pytest.mark.parametrize("kind", ["llama", "llama gqa", "opt"])
def test_peft_loads_our_prompt_and_we_load_its_prompts_with_equal_logits(kind, tmp_path):
    peft, net = need("peft"), peer(kind)
    net.save_pretrained(tmp_path / "lm")
    ours = model.load_model(tmp_path / "lm", "fp32")
    for name in ("PromptEncoderConfig", "PromptTuningConfig", "ours"):
        if name == "ours":
            soft_prompt.save_prompt(random_numbers(P, 64, seed=2), tmp_path / name, tmp_path / "lm")
            theirs = peft.PeftModel.from_pretrained(net, tmp_path / name)
        else:
            theirs = peft.get_peft_model(net, getattr(peft, name)(
                task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=64)).eval()
            for w in theirs.prompt_encoder.parameters():
                w.data += 0.3 * torch.randn_like(w)
            theirs.save_pretrained(tmp_path / name)
        phi = soft_prompt.load_prompt(tmp_path / name)
        assert_close(ours(TOKENS, phi=phi)[MASK], peer_logits(theirs)[:, P:][MASK])
    assert torch.equal(phi, random_numbers(P, 64, seed=2))

@pytest.mark.parametrize("kind", ["llama gqa", "opt"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all",), ("k_proj", "up_proj", "fc2")])
def test_peft_loads_our_adapter_and_we_load_its_adapter_with_equal_logits(kind, targets, tmp_path):
    peft, net = need("peft"), peer(kind)
    net.save_pretrained(tmp_path / "lm")
    ours = model.load_model(tmp_path / "lm", "fp32")
    for w in lora.add_lora(ours, rank=4, alpha=6, targets=targets):
        nn.init.normal_(w, std=0.2)
    lora.save_adapter(ours, tmp_path / "ours", tmp_path / "lm")
    assert (ours(TOKENS) - peer_logits(net)).abs().max() > 0.1
    theirs = peft.PeftModel.from_pretrained(net, tmp_path / "ours")
    assert_close(ours(TOKENS)[MASK], peer_logits(theirs)[MASK])
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    for written in (config["target_modules"], ".*(q|v)_proj", "all-linear"):  # the tensors decide
        model.write_json(tmp_path / "theirs/adapter_config.json", config | {
            "target_modules": written})
        again = model.load_model(tmp_path / "lm", "fp32")
        assert all(w.requires_grad for w in lora.load_adapter(again, tmp_path / "theirs"))
        assert torch.equal(again(TOKENS), ours(TOKENS))

@pytest.mark.parametrize("kind", ["llama gqa", "opt"])
def test_merged_lora_and_its_export_in_transformers_compute_the_unmerged_logits(kind, tmp_path):
    net = peer(kind)
    net.save_pretrained(tmp_path / "lm")
    ours = model.load_model(tmp_path / "lm", "nf4")
    for w in lora.add_lora(ours, rank=4, alpha=6):
        nn.init.normal_(w, std=0.2)
    before = ours(TOKENS)
    assert (before - peer_logits(net)).abs().max() > 0.1
    model.save_model(lora.merge_lora(ours), tmp_path / "base")
    assert_close(ours(TOKENS), before)
    hf = need("transformers")
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert_close(peer_logits(exported.eval())[MASK], before[MASK])
    assert_close(model.load_model(tmp_path / "base", "fp32")(TOKENS), before)

def weight_matrix(i):
    """Return matrix i: random, with ties at the midpoints, or with blocks of zeros."""
    g = torch.Generator().manual_seed(i)
    rows, columns = torch.randint(1, 90, (2,), generator=g).tolist()
    w = torch.randn(rows, columns, generator=g) * 10.0 ** (i % 9 - 5)
    if i % 4 == 1:  # 1.0 in each block makes absmax 1, so the midpoints are ties
        w = torch.cat([model.NF4, model.MIDPOINTS])[torch.randint(31, w.shape, generator=g)]
        w.view(-1)[::64] = 1.0
        w *= 2.0 ** (i % 7 - 3) if i % 8 == 1 else 0.1 + torch.rand(1, generator=g)
    if i % 4 == 2:
        w.view(-1)[w.numel() // 3:w.numel() // 3 + 150] = 0
    return w.to((torch.float32, torch.bfloat16, torch.float16)[i % 3])

def test_nf4_codes_and_scales_equal_bitsandbytes_bit_for_bit():
    bnb = need("bitsandbytes").functional
    for i in range(100):
        w = weight_matrix(i)
        theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4",
                                          compress_statistics=False)
        packed, absmax = model.quantize_nf4(w)
        assert torch.equal(packed, theirs.view(-1)), f"matrix {i}, {w.shape}, {w.dtype}"
        assert torch.equal(absmax, state.absmax), f"matrix {i}, {w.shape}, {w.dtype}"

@pytest.mark.parametrize("kind", KINDS)
def test_a_spul_step_unpacks_each_4bit_weight_twice(kind, monkeypatch, tmp_path):
    ours = random_model(kind, "nf4", tmp_path)
    linear = [layer for layer in ours.layers.modules() if hasattr(layer, "out_features")]
    calls, dequantize = Counter(), model.Linear4bit.dequantize

    def count(layer, dtype):
        calls[layer] += 1
        return dequantize(layer, dtype)
    monkeypatch.setattr(model.Linear4bit, "dequantize", count)
    phi = random_numbers(P, 64, seed=2).requires_grad_()
    logits = ours(TOKENS, ANSWERS, phi)
    logits.square().sum().backward()
    assert phi.grad.abs().sum() > 0 and all(w.grad is None for w in ours.parameters())
    assert all(isinstance(layer, model.Linear4bit) for layer in linear)
    assert calls == dict.fromkeys(linear, 2)  # the forward and the backward pass

def test_scales_of_4bit_weights_stay_float32_whatever_the_model_is_cast_to():
    layer = model.Linear4bit(random_numbers(9, 9))
    before = layer.absmax.clone()
    assert torch.equal(layer.to(torch.bfloat16).absmax, before)  # the dtype, too

def odd_texts(n):
    """Return n texts with all kinds of characters, and a few that tokenizers stumble over."""
    rng = random.Random(0)
    pools = ["abc XYZ 0123", "éüñçÅßœ", "漢字かな한국", "😀👩\u200d👧🏳\ufe0f🌈", "½²³①Ⅻ٣",
             "  \n\n\t\r \u3000\u2009", "'s't're'll'd\"",
             "\x00\x01\x04\x06\x13\x14\x16\x1d\x1f\x7f\x85\xa0",
             "\u0301\u200d\ufeff\u2581ﬁ", "### Text: "]
    texts = ["", " ", "  ", " a", "a ", "\n", "\n\n", " \n x", "5½", "12 345", "a  b   c    d",
             "it 's n't\n\n\n### Text:", "a movie movies"]
    for _ in range(n // 2):
        texts.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 30))))
        codes = [rng.randrange(rng.choice([0x300, 0x3000, 0x110000])) for _ in range(9)]
        texts.append("".join(chr(c) for c in codes if not 0xd800 <= c < 0xe000))
    return texts

def llama_reference(dir):
    """Return transformers' tokenizer, with merges in the order of the scores."""
    import sentencepiece
    hf, base = need("transformers"), pytest.importorskip("transformers.tokenization_utils_base")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(dir / "tokenizer.model"))
    ids = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = base.generate_merges(ids, {piece: pieces.get_score(i) for piece, i in ids.items()})
    theirs = hf.LlamaTokenizer(vocab=ids, merges=merges, add_bos_token=True)
    return lambda text: theirs(text).input_ids

def opt_reference(dir):
    theirs = need("transformers").GPT2Tokenizer(
        vocab=str(dir / "vocab.json"), merges=str(dir / "merges.txt"), add_bos_token=True,
        bos_token="</s>", eos_token="</s>", unk_token="</s>")
    return lambda text: theirs(text).input_ids

def smollm2_reference(dir):
    """Return the tokenizer of SmolLM2's tokenizer.json: digits one by one, no token is unknown."""
    tokenizers = need("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
        str(dir / "vocab.json"), str(dir / "merges.txt")))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    return lambda text: theirs.encode(text).ids

def write_smollm2_tokenizer(dir):
    """Write a small vocabulary in SmolLM2's form: it lacks eight rare bytes and has no </s>."""
    absent = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2, 0xC0, 0xC1, *range(0xF5, 0x100)}
    merges = {}  # in order, each once
    for word in ("Ġthe", "Ġmovie", "movies", "ĠText", "###", "Ġpositive", "Ġnegative", "Ġneutral",
                 "Ġunknown", "ĊĊ", "'s", "ĠĠ", "an", "Ã©"):
        for i in range(1, len(word)):
            merges[f"{word[:i]} {word[i]}"] = None
    model.write_json(dir / "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "add_bos_token": False})
    known = [byte for byte in range(256) if byte not in absent]
    load_small_bpe(dir, ["<|endoftext|>", *SMOLLM2_START], [*merges], known)
    return dir

@pytest.mark.parametrize("name, reference", [
    ("llama", llama_reference), ("opt", opt_reference), ("smollm2", smollm2_reference)])
def test_tokenizers_give_the_ids_of_transformers_on_2000_texts(name, reference, tmp_path):
    dir = SHARED / "tokenizers" / name
    if name == "smollm2":
        dir = write_smollm2_tokenizer(tmp_path)
    elif not dir.is_dir():
        pytest.skip(f"no ../shared/tokenizers/{name}")
    theirs, ours = reference(dir), data.load_tokenizer(dir)
    wrong = [text for text in odd_texts(2000) if ours.encode(text) != theirs(text)]
    assert not wrong, (len(wrong), wrong[0], ours.encode(wrong[0]), theirs(wrong[0]))


# ---- 6. datasets ------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_sst2_has_the_counts_of_table_1_and_forgets_by_name(seed):
    splits = data.load_splits("sst2", shared("sst2"), seed=seed)
    assert [len(splits[split]) for split in data.SPLITS] == [
        pytest.approx(n, abs=tolerance) for n, tolerance in
        ((46_331, 142), (1_425, 142), (19_855, 61), (610, 61))]
    assert sum(map(len, splits.values())) == 68_221
    assert all(e.group for e in splits["train_forget"] + splits["test_forget"])
    retain = splits["train_retain"] + splits["test_retain"]
    for person in ("woody allen", "jackie chan", "steven spielberg"):
        assert any(e.group == person and person.split()[1] in e.text.lower()
                   for e in splits["train_forget"])
        assert not any(person in e.text.lower() for e in retain)

@pytest.mark.parametrize("text, people", [
    ("woody allen 's best", ["woody allen"]), ("allen is old", ["woody allen"]),
    ("jackie chan and Woody Allen", ["jackie chan", "woody allen"]),
    ("peter jackson directs", []), ("challenging allens", []), ("no name here", [])])
def test_a_person_is_named_by_surname_unless_it_is_a_namesake(text, people):
    assert data.named_people(text) == people

def test_the_seed_decides_the_split_and_the_toy_s_forgotten_people():
    first, again, other = [data.load_splits("toy", ".", seed) for seed in (3, 3, 4)]
    assert first == again and first["test_forget"] != other["test_forget"]
    people = {e.group for e in first["train_forget"]}
    assert len(people) == 4 and people < set(data.NAMES)
    assert not any(set(e.text.split()) & people for e in first["train_retain"])

def write_quiz(dir, n_wmdp=1273):
    """Write WMDP and SciQ files in which every right option ends in '!'."""
    wmdp = [{"question": f"w{i}?", "choices": [f"{j}{'!' if j == i % 4 else ''}" for j in range(4)],
             "answer": i % 4} for i in range(n_wmdp)]
    sciq = [{"question": f"s{i}?", "correct_answer": "c!", "distractor1": "x", "distractor2": "y",
             "distractor3": "z"} for i in range(30)]
    (dir / "wmdp-bio.jsonl").write_text("\n".join(json.dumps(row) for row in wmdp))
    for name, n in (("train", 30), ("valid", 5), ("test", 7)):
        (dir / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in sciq[:n]))
    return dir

def test_wmdp_is_forgotten_900_to_373_and_labels_follow_the_shuffled_options(tmp_path):
    splits = data.load_splits("wmdp+sciq", write_quiz(tmp_path), seed=2)
    assert [len(splits[split]) for split in data.SPLITS] == [35, 900, 7, 373]
    for split in data.SPLITS:
        for text, label, _ in splits[split]:
            question, *options = text.split("\n")
            assert question[0] == ("w" if "forget" in split else "s")
            assert [line[:3] for line in options] == ["A. ", "B. ", "C. ", "D. "]
            assert [line[0] for line in options if line.endswith("!")] == [label]
    assert {e.label for e in splits["train_retain"]} == set("ABCD")

def test_saved_splits_come_back_as_they_were_and_limits_keep_all_forget_examples(tmp_path):
    splits = {}
    for split in data.SPLITS:
        n, group = (50, "somebody") if "forget" in split else (200, "")
        splits[split] = [data.Example(f'{split} "{i}",\n\t½ 星 \u2028', "good", group)
                         for i in range(n)]
    data.save_splits(splits, tmp_path / "new")
    found = data.load_splits("splits", tmp_path / "new")
    assert all(sorted(found[split]) == sorted(splits[split]) for split in data.SPLITS)
    for limits, n in [({"max_train": 125, "max_test": 10}, [125, 50, 10, 50]),
                      ({"max_forget": 20, "max_test": 500}, [200, 20, 200, 20])]:
        found = data.load_splits("splits", tmp_path / "new", **limits)
        assert [len(found[split]) for split in data.SPLITS] == n

def write_rows(path, rows):
    """Write dicts in the form of the path's suffix, with the line ends of Windows."""
    if path.suffix == ".csv":  # csv's own line end is \r\n
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([rows[0].keys(), *[row.values() for row in rows]])
    elif path.suffix == ".tsv":
        lines = ["\t".join(map(str, row)) for row in (rows[0], *[row.values() for row in rows])]
        path.write_bytes("\r\n".join([*lines, ""]).encode("utf-8-sig"))
    elif path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow", reason="pyarrow is not installed").Table
        rows = [row | {"text": row["text"].encode()} for row in rows]  # bytes, as some files have
        pytest.importorskip("pyarrow.parquet").write_table(table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_bytes("\r\n\r\n".join(json.dumps(row) for row in rows).encode())

@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_own_splits_are_read_from_every_suffix_in_the_authors_columns_too(tmp_path, suffix):
    plain = [{"text": "one, two", "label": "good"}, {"text": 'three "four"', "label": "bad"}]
    theirs = [{"text": row["text"], "label": i, "label_text": row["label"]}
              for i, row in enumerate(plain)]
    for rows in (plain, theirs):
        for split in data.SPLITS:
            write_rows(tmp_path / f"{split}.{suffix}", rows)
        found = data.load_splits("splits", tmp_path)["test_forget"]
        assert sorted(found) == sorted(data.Example(**row) for row in plain)

@pytest.mark.parametrize("name, content", [
    ("a.json", '{"text": "x", "label": "y"}\n{"text": "z", "label": "y"}\n'),  # JSON Lines
    ("a.csv", f'text,label\n"{"x" * 140_000}",y\nz,y\n')])
def test_json_lines_named_json_and_long_texts_are_read(tmp_path, name, content):
    Path(tmp_path, name).write_text(content)
    assert [text[:1] for text, _ in data.read_rows(tmp_path, "a", ("text", "label"))] == ["x", "z"]

def test_yelp_newlines_and_doubled_quotes_are_decoded(tmp_path):
    (tmp_path / "train.csv").write_text('"1","a ""b""\\nc"\n"2","d, e"\n')
    examples = data.read_yelp(tmp_path, "train", 9, 0)
    assert sorted(examples) == [("a \"b\"\nc", "negative", ""), ("d, e", "positive", "")]

def test_the_data_command_prints_table_1_and_leakage_and_saves_the_splits(tmp_path, capsys):
    data.main(["--dataset", "toy", "--seed", "1", "--save-splits", str(tmp_path / "toy")])
    out, splits = capsys.readouterr().out, data.load_splits("toy", ".", 1)
    for split in data.SPLITS:
        assert re.search(rf"{split} +{len(splits[split]):,}\n", out)
    assert all(person in out for person in {e.group for e in splits["train_forget"]})
    assert "warning" not in out and len(list((tmp_path / "toy").glob("*.jsonl"))) == 4
    rows = ("seen", "x"), ("b", "x"), ("new", "x"), ("seen", "y")
    for split, (text, label) in zip(data.SPLITS, rows):
        Path(tmp_path, f"{split}.jsonl").write_text(json.dumps({"text": text, "label": label}))
    data.main(["--dataset", "splits", "--data-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "1 texts are both in a forget and in a retain set, 1 have two" in out
    assert "1 of 2 test texts are also in the train sets" in out


# ---- 7. whole runs on a micro model ------------------------------------------------------------

MICRO = ("--model lm --dataset toy --preset toy --device cpu --dtype fp32 --threads 1 --p 4 "
         "--max-train 120 --max-test 40 --batch 16 --forget-per-batch 4 --epochs 2 --lr 0.05 "
         "--rank 8 --lora-dropout 0 --qlora-epochs 8 --qlora-lr 0.006").split()

@pytest.fixture(scope="module")
def micro_template(tmp_path_factory):
    """A directory with a micro LM of random weights (lm) and a finished run of it (run)."""
    dir = tmp_path_factory.mktemp("micro")
    data.train_tokenizer(dir / "lm" / "tokenizer.model")
    torch.manual_seed(0)
    size = data.load_tokenizer(dir / "lm").size
    net = model.build(model.Config("llama", size, 32, 80, 2, 2, 2, 16, 256, 1e-5))
    for name, w in net.named_parameters():
        if w.dim() > 1:
            nn.init.normal_(w, 0, 0.18 if name.startswith(("embed", "lm_head")) else 0.1)
    model.save_model(net, dir / "lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(dir)
        train("run", "--base", "full", "retain", "--method", "spul", "ga")
    return dir

@pytest.fixture
def micro(micro_template, tmp_path, monkeypatch):
    """A copy of that directory to work in, and to spoil."""
    shutil.copytree(micro_template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def train(out, *flags):
    """Run unlearn.py on the micro model; return the rows by name, without times."""
    unlearn.main([*MICRO, "--out", out, *flags])
    return results(out)

def results(run):
    timed = dict.fromkeys(("seconds_per_epoch", "peak_memory_gb", "finished"))
    return {row["name"]: row | timed for row in read_rows(run)}

def files_of(run, *which):
    return Path(run, row_of(run, *which)["name"])

def drop_row(run, *which):
    """Remove a method's row from a run, as if it was never trained. Returns its name."""
    files = files_of(run, *which)
    shutil.rmtree(files)
    return files.name

def phi_of(run):
    return soft_prompt.load_prompt(files_of(run))

def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

def test_a_run_leaves_rows_in_the_agreed_form_a_log_and_loadable_files(micro):
    rows = read_rows("run")
    assert [evaluate.system_name(row) for row in rows] == [
        "vanilla", "qlora", "spul", "ga", "retrain", "spul on retrain"]
    assert not list(Path("run").rglob("*.part")) and not list(Path("run").rglob("*state*"))
    Path("plain").touch()
    for file in (*Path("run").rglob("results.json"), *Path("run").rglob("*.safetensors")):
        assert file.stat().st_mode == Path("plain").stat().st_mode, file  # readable as usual
    n_lines = 0
    for row in rows:
        assert row.keys() == make_row().keys()
        assert json.loads(Path("run", row["name"], "row.json").read_text()) == row
        for split in data.SPLITS:
            assert row[split].keys() == {"n", "acc", "f1"} and 0 <= row[split]["acc"] <= 100
        if row["trains"]:
            lines = read_csv(Path("run", row["name"], "log.csv"))
            assert [int(line["step"]) for line in lines] == list(range(1, len(lines) + 1))
            assert {line["row"] for line in lines} == {row["name"]}
            n_lines += len(lines)
    assert len(read_csv("run/log.csv")) == n_lines
    for line in read_csv(files_of("run") / "log.csv"):
        assert list(line) == ("row,epoch,step,loss,L_f,L_r,L_kl,train_retain,train_forget,"
                              "seconds").split(",")
        parts = [float(line[name]) for name in ("L_f", "L_r", "L_kl")]
        assert float(line["loss"]) == pytest.approx(sum(parts), abs=2e-4)  # alpha = beta = 1

def test_a_loss_without_examples_in_a_step_is_empty_in_the_log(micro):
    train("few", "--max-forget", "4", "--forget-per-batch", "0", "--batch", "8", "--epochs", "1")
    lines = read_csv(files_of("few") / "log.csv")
    n_without = sum(line["L_f"] == "" for line in lines)
    assert len(lines) - 4 <= n_without < len(lines)
    assert all(line["L_r"] and float(line["L_r"]) for line in lines)

def records(*flags):
    """Return the records of a grid on the micro model."""
    args = unlearn.parse([*MICRO, *flags])
    return unlearn.grid(SimpleNamespace(**vars(args) | {"model": "lm-1", "data": None}))

def test_equal_settings_are_one_record_and_what_a_method_does_not_use_is_not_in_it():
    vanilla, qlora, spul, ga = grid = records("--method", "spul", "ga")
    assert grid == records("--method", "spul", "ga", "ga", "--no-dense", "--accumulate", "4",
                           "--checkpointing", "--dtype", "bf16", "--out", "elsewhere")
    assert spul.base_training == ga.base_training == qlora and qlora.base_training is None
    for record in grid:
        assert evaluate.read_record(json.loads(json.dumps(asdict(record)))) == record
    assert (ga.alpha, ga.beta, ga.p, ga.encoder, spul.tune, spul.rank) == (None,) * 6
    for flags, changed in [  # which of vanilla, qlora, spul, ga another value makes new
            (["--qlora-batch", "8"], "0111"), (["--rank", "4"], "0111"), (["--seed", "1"], "1111"),
            (["--weights", "fp32"], "1111"), (["--max-train", "99"], "1111"),
            (["--batch", "8"], "0011"), (["--lr", "0.1"], "0010"), (["--alpha", "2"], "0010"),
            (["--hidden", "7"], "0000"), (["--encoder", "mlp"], "0010"),
            (["--baseline-lr", "0.1"], "0001"), (["--tune", "lora"], "0001")]:
        others = records("--method", "spul", "ga", *flags)
        pairs = list(zip(grid, others, strict=True))
        assert "".join(str(int(one != two)) for one, two in pairs) == changed, flags
        assert "".join(str(int(one.name != two.name)) for one, two in pairs) == changed, flags
    *_, ga_gd, ga_kl = records("--method", "ga+gd", "ga+kl", "--alpha", "2", "--beta", "3",
                               "--baseline-alpha", "4", "--baseline-beta", "5")
    assert (ga_gd.alpha, ga_gd.beta, ga_kl.alpha, ga_kl.beta) == (4, None, None, 5)
    assert spul.at_seed(1) == records("--seed", "1")[2] != spul
    assert spul.at_seed(1).name.removesuffix("1") == spul.name.removesuffix("0")
    assert len(records("--alpha", "0.5", "1", "--beta", "0.5", "1")) == 6

def test_a_row_is_found_after_a_move_and_with_other_rounding_and_says_by_what_code(
        micro, monkeypatch, capsys):
    before, name = results("run"), row_of("run")["name"]
    with monkeypatch.context() as patch:
        patch.setattr(unlearn, "train", None)
        Path("elsewhere").mkdir()
        shutil.move("lm", "elsewhere/lm")
        for flags in (["--model", "./elsewhere/lm"], ["--no-dense"], ["--accumulate", "2"],
                      ["--threads", "2"], ["--dtype", "bf16"]):
            assert train("run", "--model", "elsewhere/lm", *flags) == before
            out = capsys.readouterr().out
            assert f"{name} is finished (cpu, fp32), and not trained again\n" in out
        patch.setattr(evaluate, "hash_method", lambda: "changed")
        assert train("run", "--model", "elsewhere/lm") == before
        assert re.search(f"{name} is finished.*trained by other code", capsys.readouterr().out)
    moved = Path("elsewhere/lm/model.safetensors")
    tensors(lm_head_dot_weight=load_file(moved)["lm_head.weight"] + 1)(moved)
    with pytest.raises(InputError, match="give the right dir"):
        evaluate.main(["run", "--ask", "a film", "--model", "elsewhere/lm"])
    after = train("run", "--model", "elsewhere/lm")  # another model
    assert after.items() > before.items() and len(after) == len(before) + 3

def test_rows_are_chosen_by_the_start_of_their_name(tmp_path):
    rows = [make_row(seed=1), make_row(seed=10), make_row(base="retain"),
            make_row("ga", trains="weights"), make_row("vanilla", trains=None)]
    model.write_json(tmp_path / "results.json", {"args": {}, "rows": rows})
    assert evaluate.choose_row(tmp_path, "") == rows[1]  # the newest phi on the `full` base
    for row in rows[:3]:
        assert evaluate.choose_row(tmp_path, row["name"]) == row  # s1 is not s10
    assert evaluate.choose_row(tmp_path, "spul-retain") == rows[2]
    assert evaluate.choose_row(tmp_path, "ga", needs_phi=False) == rows[3]
    for start, n in (("spul", 3), ("ga", 0), ("rl", 0)):
        with pytest.raises(InputError, match=f"{n} rows with phi for --row {start}; expected"):
            evaluate.choose_row(tmp_path, start)

def test_an_interrupted_and_then_killed_run_resumes_to_the_same_results_bit_for_bit(
        micro, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        add = unlearn.Log.add

        def interrupted(log, epoch, step, *rest):  # in the middle of an epoch of QLoRA
            if step == 50:
                interrupt()
            add(log, epoch, step, *rest)
        patch.setattr(unlearn.Log, "add", interrupted)
        assert model.run_cli(lambda: train("new")) == 130
    assert "continues from the last finished epoch" in capsys.readouterr().err
    killed = subprocess.run([sys.executable, "-c", KILLED, *MICRO, "--out", "new"])
    assert killed.returncode == -signal.SIGKILL and len(results("new")) == 2
    rows = train("new")
    assert f"{row_of('new')['name']} resumes after epoch 1" in capsys.readouterr().out
    assert all(row == results("run")[name] for name, row in rows.items()) and len(rows) == 3
    for method in ("qlora", "spul"):
        one, two = [files_of(run, method) for run in ("run", "new")]
        name = "adapter_model.safetensors"
        assert (one / name).read_bytes() == (two / name).read_bytes()
        steps = [[line["step"] for line in read_csv(files / "log.csv")] for files in (one, two)]
        assert steps[0] == steps[1]  # none is missing, and none there twice

KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import model, unlearn
add = unlearn.Log.add
def killed_at_15(log, epoch, step, *rest):
    if log.record.method == "spul" and step == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    add(log, epoch, step, *rest)
unlearn.Log.add = killed_at_15
sys.exit(model.run_cli(unlearn.main))
"""

def interrupt(*_):
    raise KeyboardInterrupt

def test_the_reader_of_the_output_may_end_first():
    program = subprocess.Popen([sys.executable, "evaluate.py", "results/toy"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()  # as `| head` does after its lines
    assert program.communicate()[1] == b"" and program.returncode == 1

def test_two_programs_that_share_a_run_directory_lose_nothing(micro):
    command = [sys.executable, ROOT / "unlearn.py", *MICRO, "--out", "both"]
    programs = [subprocess.Popen([*command, "--method", *methods], stderr=subprocess.PIPE)
                for methods in (("spul", "ga"), ("spul", "rl"))]
    for program in programs:
        _, error = program.communicate(timeout=200)
        assert program.returncode == 0, error
    rows = results("both")
    assert sorted(row["method"] for row in rows.values()) == [
        "ga", "qlora", "rl", "spul", "vanilla"]
    assert torch.equal(phi_of("both"), phi_of("run")) and not list(Path("both").rglob("*.part"))
    assert {line["row"] for line in read_csv("both/log.csv")} == {
        name for name, row in rows.items() if row["trains"]}

def test_a_row_that_another_process_finishes_does_not_stop_this_one(micro):
    run, w = evaluate.Run("shared", SimpleNamespace()), nn.Parameter(torch.zeros(9))
    record, optimizer = evaluate.read_record(row_of("run")), torch.optim.AdamW([w])
    log = unlearn.Log(record, run, None)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(lambda: [run.finish(record, {}) for _ in range(100)])
        while not other.done():
            log.save([w], optimizer, 1)
            log.load([w], optimizer)
    assert len(other.result()) == 100 and len(read_rows("shared")) == 1

# Runs unlearn.py and keeps the gradient of each method's first step.
KEEP_GRADIENTS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, model, unlearn
clip, kept = unlearn.clip_gradient, {{}}
def keep(params, record, totals):
    if record.method not in kept:
        whole = [w.grad.full_tensor() if unlearn.is_sharded(w) else w.grad for w in params]
        kept[record.method] = torch.cat([gradient.flatten() for gradient in whole])
    clip(params, record, totals)
unlearn.clip_gradient = keep
status = model.run_cli(unlearn.main)
if os.environ.get("RANK", "0") == "0":
    torch.save(kept, sys.argv[sys.argv.index("--out") + 1] + ".pt")
sys.exit(status)
"""

# Ends right after collectives. The long interval: gloo's threads, which need Python's lock to free
# their tensors, get it only where this thread waits.
END_AFTER_COLLECTIVES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist, unlearn
unlearn.start_processes()
sys.setswitchinterval(1000)
w = torch.ones(9, requires_grad=True)
w.sum().backward()
for _ in range(20):
    dist.all_reduce(w.grad)
dist.all_gather_object([None] * 6, "any")
"""

def test_processes_end_in_order_right_after_their_last_collective(tmp_path):
    (tmp_path / "end.py").write_text(END_AFTER_COLLECTIVES)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "6", tmp_path / "end.py"], capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stderr

def test_two_processes_compute_the_gradients_and_results_of_one(micro):
    drop_row("run")
    Path("keep.py").write_text(KEEP_GRADIENTS)
    shutil.copytree("run", "two")
    flags = ["keep.py", *MICRO, "--method", "spul", "ga+gd", "--epochs", "1", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for out, several in (("run", []), ("two", torchrun)):
        done = subprocess.run([sys.executable, *several, *flags, out], capture_output=True,
                              text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{files_of('two').name}  10/10") == 1  # only the first one prints
    one, two = torch.load("run.pt"), torch.load("two.pt")
    for method in ("spul", "ga+gd"):
        difference = (one[method] - two[method]).norm() / one[method].norm()
        assert one[method].norm() > 0 and difference <= 1e-5, f"{method}: {difference}"
    assert_close(phi_of("two"), phi_of("run"), atol=1e-3)
    weights, found = [load_file(files_of(run, "ga+gd") / "model.safetensors")
                      for run in ("run", "two")]
    for name in weights:
        assert_close(found[name], weights[name])
    for name, row in results("run").items():
        for split in data.SPLITS:
            assert results("two")[name][split]["acc"] == pytest.approx(row[split]["acc"], abs=4)

def test_the_base_never_changes_and_each_method_trains_what_it_says(micro, monkeypatch):
    loaded, load_base = [], unlearn.load_base

    def spy(*args):
        loaded.append(load_base(*args))
        return loaded[-1]
    monkeypatch.setattr(unlearn, "load_base", spy)
    train("run", "--alpha", "0.3")
    base, = loaded
    fresh = load_system("run", row_of("run", "qlora")).model
    assert all(torch.equal(w, fresh.state_dict()[name]) for name, w in base.state_dict().items())
    train("run", "--encoder", "mlp", "--hidden", "16")
    rows = train("run", "--method", "ga", "rl", "ga+kl", "ga+gd")
    n_weights = sum(w.numel() for w in fresh.parameters())
    n_mlp = sum(w.numel() for w in soft_prompt.PromptEncoder(4, 32, 16).parameters())
    for row in rows.values():
        n_phi = n_mlp if row["encoder"] == "mlp" else 4 * 32
        expected = {"vanilla": 0, "qlora": row["trainable_params"], "spul": n_phi}
        assert row["trainable_params"] == expected.get(row["method"], n_weights), row["name"]

def test_a_baseline_with_tune_lora_trains_only_the_adapter(micro):
    train("lora", "--method", "ga", "--tune", "lora", "--baseline-lr", "0.01")
    vanilla, qlora, ga = read_rows("lora")
    assert ga["trainable_params"] == qlora["trainable_params"] > 0
    one, two = [load_file(f"lora/{row['name']}/adapter_model.safetensors") for row in (qlora, ga)]
    assert one.keys() == two.keys() and any(not torch.equal(one[name], two[name]) for name in one)
    assert ga["train_forget"]["acc"] <= qlora["train_forget"]["acc"]
    system = load_system("lora", ga)
    pred = evaluate.predict(system.model, system.data.queries["test_forget"])
    assert evaluate.score(pred, system.data.queries["test_forget"]) == ga["test_forget"]

def test_every_kind_of_training_runs_in_bf16(micro):
    of_phi = "--accumulate 2 --alpha 0 --beta 0 --lr 0.3 --p 40".split()
    train("bf16", "--dtype", "bf16", "--method", "spul", "ga+gd", *of_phi, "--epochs", "8")
    vanilla, qlora, spul, ga_gd = read_rows("bf16")
    assert qlora["train_retain"]["acc"] > 60 + vanilla["train_retain"]["acc"]
    assert spul["train_forget"]["acc"] < qlora["train_forget"]["acc"] - 20
    assert all(math.isfinite(float(line["loss"])) for line in read_csv("bf16/log.csv"))
    shutil.copytree("bf16", "fp32")  # the first step of phi, in float32 on the same base
    train("fp32", *of_phi)
    fp32, = [row for row in read_rows("fp32") if row["dtype"] == "fp32"]
    ours, exact = [read_csv(f"fp32/{row['name']}/log.csv")[0] for row in (spul, fp32)]
    for name in ("L_f", "L_r", "L_kl"):
        assert float(ours[name]) == pytest.approx(float(exact[name]), 0.05, 0.02)
    if not torch.cuda.is_available():  # a GPU's run is evaluated in float32 on a CPU
        system = load_system("bf16", spul | {"device": "cuda"})
        assert system.model.lm_head.weight.dtype == torch.float32

def mood(example):
    return "high mood" if example.label == "positive" else "bad"

def last_words(example):
    return f"{example.text.split()[-2]} {mood(example)}"

OWN = ("--dataset splits --data-dir own --qlora-epochs 12 --generic unknown".split()
       + ["neutral mood", "--template", "### Text: {text}\\n\\n### Opinion: {label}"])

@pytest.mark.parametrize("answer, flags", [
    (mood, ["--labels", "high mood", "bad"]), (last_words, [])])
def test_answers_of_several_tokens_are_learned_unlearned_and_asked_for(
        micro, answer, flags, capsys):
    splits = data.load_splits("toy", ".", 0, 120, 40, 60)  # as your own four files
    for split, examples in splits.items():
        splits[split] = [example._replace(label=answer(example)) for example in examples]
    data.save_splits(splits, "own")
    train("answers", *OWN, *flags)
    vanilla, qlora, spul = read_rows("answers")
    assert all(row[split]["f1"] is None for row in (vanilla, qlora, spul) for split in data.SPLITS)
    assert qlora["train_retain"]["acc"] > 60 + vanilla["train_retain"]["acc"]
    system = load_system("answers")
    for split, queries in system.data.queries.items():
        pred = evaluate.predict(system.model, queries, system.phi)
        assert evaluate.score(pred, queries) == spul[split]
    query, eos = system.data.queries["test_retain"][0], system.data.tokenizer.eos
    assert (eos in query.answer) == (eos in system.data.generic[1]) == (flags == [])
    system.phi = None
    capsys.readouterr()
    evaluate.ask(system, query.text)
    out = capsys.readouterr().out
    assert evaluate.words(system, evaluate.predict(system.model, [query])[0]) in out
    assert "with phi" not in out  # there is none to compare with

def test_a_bug_in_a_method_of_your_own_keeps_its_traceback(micro, monkeypatch):
    def my_loss(*_):
        raise ValueError("my mistake")
    monkeypatch.setitem(unlearn.METHODS, "mine", unlearn.Method(my_loss, "generic", "prompt"))
    with pytest.raises(ValueError, match="my mistake") as error:
        model.run_cli(lambda: train("run", "--method", "mine"))
    assert error.traceback[-1].name == "my_loss"


# ---- 8. bad input: one line, exit status 2 -----------------------------------------------------

def cut(path):
    """Lose the end of a file, as an interrupted copy does."""
    path.write_bytes(path.read_bytes()[:-64])

def tensors(**changes):
    """Return a function that changes tensors of a .safetensors file; None removes one."""
    def spoil(path):
        state = load_file(path) | {name.replace("_dot_", "."): w for name, w in changes.items()}
        save_file({name: w for name, w in state.items() if w is not None}, path)
    return spoil

HEAD = "sentence\tlabel\n"
QUIZ = '{"question": "q", "choices": ["1", "2", "3", "4"], "answer": 0}\n'
COMMANDS = {
    "load": lambda: model.load_model("lm"),
    "tokenize": lambda: data.load_tokenizer("lm"),
    "bpe": lambda: data.load_tokenizer("bpe"),
    "adapt": lambda: lora.load_adapter(model.load_model("lm", "fp32"), files_of("run", "qlora")),
    "prompt": lambda: phi_of("run"),
    "table": lambda: evaluate.main(["run"]),
    "ask": lambda: evaluate.main(["run", "--ask", "a dull comedy"]),
    "again": lambda: train("run"),
    **{name: lambda name=name: data.load_splits(name, name) for name in data.DATASETS}}
LM = "lm/model.safetensors"
ADAPTER, PHI = [f"run/{method}-??????-s0/adapter_model.safetensors" for method in ("qlora", "spul")]
CONFIG = ADAPTER.replace("model.safetensors", "config.json")
WRONG = [  # command or flags, file, new content (a dict: changed keys), part of the message
    *[(flags, None, None, message) for flags, message in [
        ("--dataset imdb", "--dataset: invalid choice: 'imdb'"),
        ("--method npo", "--method: invalid choice: 'npo' (choose from"),
        ("--model nowhere", "nowhere: no tokenizer"),
        ("--dataset sst2 --data-dir nowhere", "nowhere: no train file"),
        *[(text, f"argument {text.split()[0]}") for text in (
            "--lr 0", "--p 0", "--alpha nan", "--beta -1", "--seed one", "--forget-fraction 2",
            "--lora-dropout 1")],
        ("--forgot dunn", "unrecognized arguments"),
        ("--forget-per-batch 16", "--forget-per-batch 16; expected less than --batch, 16"),
        ("--max-len 3", "--max-len 3 leaves no room"),
        ("--targets c_attn", "--targets c_attn: no such linear layer"),
        ("--labels positive", "--labels without a question; expected --template"),
        ("--template '{text} {label}' --labels positive",
         "label 'negative' in train_retain; expected positive"),
        ("--template '{text} {label}' --labels good 'good film'",
         "the tokens of answer 'good film' begin with those of 'good'"),
        ("--template '{text} {label}' --labels unknown positive",  # unknown is generic, too
         "the tokens of answer 'unknown' begin with those of 'unknown'"),
        ("--device cuda:99", "--device cuda:99: no such device"),
        ("--template '### Text: {label}'", "{text}"),
        ("--template '{text} {x} {label}'", "{text}")]],
    ("load", LM, None, "lm: no model.safetensors or pytorch_model.bin"),
    ("load", LM, cut, "model.safetensors: not"),
    ("load", LM, tensors(lm_head_dot_weight=None), "tensor lm_head.weight is missing"),
    ("load", LM, tensors(lm_head_dot_weight=torch.zeros(9, 32)), "lm_head.weight is (9, 32)"),
    ("load", LM, tensors(model_dot_layers_dot_0_dot_mlp_dot_up_proj_dot_bias=torch.zeros(80)),
     "tensor layers.0.mlp.up_proj.bias is (80,); expected no such tensor"),
    ("load", "lm/config.json", None, "No such file"),
    ("load", "lm/config.json", "{}", "no 'model_type' in it"),
    ("load", "lm/config.json", {"num_hidden_layers": 3}, "tensor layers.2.input_layernorm.weight"),
    *[("load", "lm/config.json", {key: value}, key) for key, value in [
        ("model_type", "gpt2"), ("hidden_act", "gelu"), ("activation_function", "gelu"),
        ("do_layer_norm_before", False), ("partial_rotary_factor", 0.5)]],
    *[("load", "lm/config.json", {place: {key: "linear", "factor": 2.0}}, f"{key} is 'linear'")
      for place, key in (("rope_parameters", "rope_type"), ("rope_scaling", "type"))],
    ("load", "lm/config.json", {"tie_word_embeddings": True}, "lm_head.weight differs from embed"),
    ("tokenize", "lm/tokenizer.model", cut, "not a sentencepiece model"),
    ("bpe", "bpe/vocab.json", "{", "vocab.json: not readable as JSON"),
    *[("adapt", CONFIG, {key: value}, key) for key, value in [
        ("use_rslora", True), ("alpha_pattern", {"q_proj": 2}), ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"), ("alora_invocation_tokens", [1])]],
    ("adapt", ADAPTER, tensors(score=torch.zeros(2)), "tensor score is (2,); expected no such"),
    ("adapt", CONFIG, {"r": 5}, "expected (5, "),
    ("prompt", PHI, tensors(prompt_embeddings=None), "no tensor prompt_embeddings; expected a"),
    ("table", "run/results.json", '{"rows": [{"name": 1}]}', "results.json: a row without"),
    ("ask", "run/results.json", {"rows": []}, "run unlearn.py first"),
    ("ask", "run/args.json", {"lm": "moved"}, "moved: no such directory; give that of lm"),
    ("again", "run/spul-??????-s0/row.json", "{", "row.json: not readable as JSON"),
    ("sst2", "train.tsv", HEAD + "fine\t1\nbad\t7\n", "train.tsv row 2: label '7'; expected 0"),
    ("sst2", "train.tsv", "text\tlabel\nfine\t1\n", "expected sentence, label"),
    ("sst2", "train.tsv", HEAD + "fine\t1\n \t1\n", "train.tsv row 2: {'sentence': ' '"),
    ("sst2", "train.tsv", HEAD.encode() + b"caf\xe9\t1\n", "train.tsv row 1: 'utf-8' codec"),
    ("sst2", "train.csv", HEAD, "2 train file(s)"),
    ("yelp", "train.csv", '"1","a"\n"3","b"\n', "train.csv row 2: label '3'; expected 1"),
    ("wmdp+sciq", "wmdp-bio.jsonl", QUIZ.replace('"4"', '"4", "5"'), "expected a list of 4"),
    ("wmdp+sciq", "wmdp-bio.jsonl", QUIZ.replace("0}", "4}"), "answer 4; expected a list of 4"),
    ("wmdp+sciq", "wmdp-bio.jsonl", QUIZ + "[1]\n", "row 2: [1]; expected an object"),
    ("wmdp+sciq", "wmdp-bio.jsonl", QUIZ + "{'question'}\n", "wmdp-bio.jsonl row 2: Expecting"),
    ("splits", "train_retain.jsonl", '{"text": null, "label": "x"}', "row 1: {'text': None"),
    ("splits", "train_retain.jsonl", '{"text": ["a"], "label": "x"}', "text is ['a']; expected"),
    ("splits", "train_retain.csv", "text,label\na,b\n", "no train_forget file"),
    ("splits", "train_retain.csv", 'text,label\n"a,b\n', "train_retain.csv row 1: unexpected end")]

@pytest.mark.parametrize("command, file, content, message", WRONG)
def test_what_is_wrong_is_one_line_and_exit_status_2(micro, command, file, content, message, capfd):
    (micro / "bpe").mkdir()
    write_smollm2_tokenizer(micro / "bpe")
    for name in data.DATASETS:
        (micro / name).mkdir()
    write_quiz(micro / "wmdp+sciq", 9)
    for part in ("train", "dev"):
        (micro / "sst2" / f"{part}.tsv").write_text(HEAD + "fine\t1\n")
    dir = micro / command if command in data.DATASETS else micro
    path = next(dir.glob(file or "*"), dir / str(file))
    if content is None and file:
        path.unlink()
    elif callable(content):
        content(path)
    elif isinstance(content, dict):
        model.write_json(path, json.loads(path.read_text()) | content)
    elif content:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    main = COMMANDS.get(command, lambda: train("new", *shlex.split(command)))
    try:
        status = model.run_cli(main)
    except SystemExit as left:  # argparse leaves with it
        status = left.code
    assert status == 2
    *usage, error = capfd.readouterr().err.splitlines()
    assert re.match("(unlearn.py: |pytest: |__main__.py: )?error: ", error) and message in error
    assert all(re.match("usage: | ", line) for line in usage) and not list(micro.rglob("*.part"))

class Sneaky:
    """Unpickled without care, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)

@pytest.mark.parametrize("command, file", [
    ("load", LM), ("prompt", PHI), ("adapt", ADAPTER), ("again", "state.pt")])
def test_code_hidden_in_a_pickle_never_runs(micro, command, file):
    if command == "again":
        path = Path("run", f"{drop_row('run')}.{file}.part")
    else:
        path, = micro.glob(file)
        path.unlink()
        path = path.with_name("pytorch_model.bin" if command == "load" else "adapter_model.bin")
    torch.save({"w": Sneaky()}, path)
    with pytest.raises((InputError, pickle.UnpicklingError)):
        COMMANDS[command]()
    assert not Path("ran").exists()
    torch.load(path, weights_only=False)
    assert Path("ran").exists()  # the trap was set


# ---- 9. evaluation -----------------------------------------------------------------------------

def test_tables_have_means_over_seeds_and_a_column_for_each_differing_setting():
    rows = [make_row("mine", 0, 90.0), make_row("mine", 1, 94.0), make_row("other", lr=0.1),
            make_row("other", lr=0.2, acc=50.0), make_row("other", 1, lr=0.2, acc=50.0)]
    for f1, both in ((True, "92.0 ± 2.8 / 92.0 ± 2.8"), (False, "92.0 ± 2.8")):
        lines = table_cells(evaluate.table(rows, f1))
        assert lines[2] == ["mine", "0.0001", *[both] * 4]
        assert lines[3][:3] == ["other", "0.1", "90.0 / 90.0" if f1 else "90.0"]
        assert "lr" in lines[0] and "beta" not in lines[0]
    below = "mine 0.0001: 10 trained parameters, 2.0 ± 0.0 s per epoch: mine-"
    assert below in evaluate.table(rows)

def test_the_audit_has_all_its_rows_with_the_control_that_never_saw_the_forget_set(micro, capsys):
    train("run", "--seed", "1", "--base", "full", "retain", "--method", "spul", "ga+gd")
    train("run", "--method", "ga+gd")
    capsys.readouterr()
    evaluate.main(["run", "--audit"])
    lines = {line[0]: line for line in table_cells(capsys.readouterr().out) if line}
    for name in ("base", "spul", "name filter", "retrain", "spul on retrain", "ga+gd",
                 "unquantised weights", "relearning"):
        assert len(lines[name]) == 6 and all(" / " in cell for cell in lines[name][1:]), name
    found = json.loads(Path("run/audit.json").read_text())
    spul = [row["name"] for row in read_rows("run") if evaluate.system_name(row) == "spul"]
    assert found.keys() == set(spul) and len(spul) == 2  # both seeds
    systems = found[spul[0]]
    sets = {name: system["sets"] for name, system in systems.items()}
    for name, *which in (("base", "qlora", "full"), ("retrain", "qlora", "retain"),
                         ("spul", "spul", "full"), ("spul on retrain", "spul", "retain"),
                         ("ga+gd", "ga+gd", "full")):
        row = next(row for row in read_rows("run")
                   if [row["method"], row["base"], row["seed"]] == [*which, 0])
        for part in ("forget", "retain"):
            assert systems[name]["row"] == row["name"]
            answered, refused = sets[name][part]
            assert answered == pytest.approx(row[f"test_{part}"]["acc"], abs=0.01)
            assert 0 <= refused <= 100 - answered + 1e-6
    assert sets["name filter"]["forget"] == [0, 100] != sets["name filter"]["misspelt"]
    assert sets["name filter"]["retain"] == sets["base"]["retain"]
    assert sets["relearning"] != sets["spul"] != sets["unquantised weights"]

def test_the_audit_looks_for_other_names_in_the_whole_test_set(micro, monkeypatch):
    few, whole = [evaluate.audit_sets(load_system("run", row_of("run") | {"max_test": n}))
                  for n in (4, None)]
    texts = [[query.text for query in sets["others"]] for sets in (few, whole)]
    assert texts[0] == texts[1] and len(texts[0]) > len(few["retain"]) == 4
    system = load_system("run", row_of("run"))  # no names are known for reviews of places
    system.record = replace(system.record, dataset="yelp")
    monkeypatch.setattr(data, "load_dataset", lambda *_: system.data)
    assert evaluate.audit_sets(system).keys() == few.keys() - {"others"}

def test_an_audit_measures_nothing_twice(micro, monkeypatch):
    done, measure = [], evaluate.measure

    def spy(run, row, args, name):
        done.append((row["name"], name))
        if len(done) == 2:  # meanwhile another process writes what it measured
            found = json.loads(Path("run/audit.json").read_text())
            Path("run/audit.json").write_text(json.dumps(found | {"another": {}}))
        if len(done) == 3:
            raise KeyboardInterrupt
        return measure(run, row, args, name)
    monkeypatch.setattr(evaluate, "measure", spy)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(["run", "--audit"])
    evaluate.main(["run", "--audit"])  # starts with the system that was interrupted
    assert done[3] == done[2] and len(set(done)) == len(done) - 1
    assert "another" in json.loads(Path("run/audit.json").read_text())
    for lr in ("0.5", "0.4", "0.4"):  # a system that was not there, another row for it, retrained
        for row in read_rows("run"):
            if row["lr"] == float(lr):
                shutil.rmtree(Path("run", row["name"]))
        train("run", "--method", "ga+gd", "--base", "full", "--baseline-lr", lr)
        done.clear()
        evaluate.main(["run", "--audit"])
        assert [name for _, name in done] == ["ga+gd"]  # only the new row is measured

def test_figures_are_written_and_fig_2_refuses_rows_that_differ_in_more(micro, capsys):
    need("matplotlib")
    train("run", "--p", "3", "4")
    for flag in ("--tsne", "--plot", "--curves"):
        evaluate.main(["run", flag, "figure.png"])
        figure = Path("figure.png").read_bytes()
        assert figure[:8] == b"\x89PNG\r\n\x1a\n" and len(figure) > 10_000
        Path("figure.png").unlink()
    train("run", "--alpha", "0.5")
    Path("run", read_rows("run")[-1]["name"], "log.csv").unlink()
    for flags, message in ((["--plot"], "alpha"), (["--curves"], "log.csv: no such file"),
                           (["--row", "ga", "--curves"], "no such row with phi")):
        assert model.run_cli(lambda: evaluate.main(["run", *flags, "figure.png"])) == 2
        assert message in capsys.readouterr().err

def test_phi_continues_from_a_saved_phi_and_the_row_says_so(micro):
    start, phi = Path("run", row_of("run")["name"]), phi_of("run")
    train("run", "--init", str(start), "--lr", "1e-9", "--encoder", "none")
    row = read_rows("run")[-1]
    assert row["init"] == soft_prompt.hash_prompt(start) and row["init"].startswith(start.name)
    assert_close(soft_prompt.load_prompt(Path("run", row["name"])), phi, atol=1e-5)

@pytest.mark.parametrize("flags, message", [
    (["--qlora-lr", "1e-9"], "answers only"), ([], None),
    (["--method", "rl", "--baseline-lr", "0.03"], "answers only")])
def test_a_base_that_learned_nothing_or_a_lost_retain_set_is_said_in_one_line(
        micro, flags, message, capsys):
    train("new", *flags)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert bool(warnings) == bool(message) and all(message in line for line in warnings)

def test_every_form_of_a_checkpoint_is_read_and_of_shards_only_those_of_the_index(micro):
    before, state = model.load_model("lm", "fp32")(TOKENS), load_file("lm/model.safetensors")
    Path("lm/model.safetensors").unlink()
    for name, save in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        for n in (2, 3):  # an older save in two shards, then one in three, with the index
            files = {key: f"{i % n}-of-{n}-{name}" for i, key in enumerate(state)}
            for file in set(files.values()):
                part = {key: state[key] * (n == 3) for key in files if files[key] == file}
                save(part, Path("lm", file))
        model.write_json(f"lm/{name}.index.json", {"weight_map": files})
        assert_close(model.load_model("lm", "fp32")(TOKENS), before)
        Path(f"lm/{name}.index.json").unlink()
    torch.save({"other": torch.zeros(2)}, "lm/adapter_model.bin")
    for is_zip in (True, False):  # False: the older form of .bin
        torch.save(state, "lm/pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
        assert_close(model.load_model("lm", "fp32")(TOKENS), before)

def test_weights_rounded_to_bf16_are_computed_with_in_float32_where_that_is_asked(micro):
    rounded = model.load_model("lm", "bf16", dtype="fp32").lm_head.weight
    whole = load_file("lm/model.safetensors")["lm_head.weight"]
    assert rounded.dtype == torch.float32 and torch.equal(rounded, whole.bfloat16().float())
    assert model.load_model("lm", "bf16").lm_head.weight.dtype == torch.bfloat16

def test_a_lost_process_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    def fail(message):
        raise RuntimeError(message)
    assert model.run_cli(lambda: fail("[/gloo/transport/tcp/pair.cc:1] Connection reset")) == 2
    assert re.fullmatch("error: another process ended.*\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="shape"):
        model.run_cli(lambda: fail("shape '[3]' is invalid"))

def test_a_terminal_without_the_characters_of_a_text_is_no_error(micro, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    assert model.run_cli(lambda: evaluate.main(["run", "--ask", "caf\udce9 中"])) == 0

def test_a_long_word_does_not_cost_its_length_squared(tmp_path):
    tokenizer, seconds = data.load_tokenizer(write_smollm2_tokenizer(tmp_path)), []
    for n in (2_000, 16_000):
        start = time.perf_counter()
        tokenizer.encode("movies" * (n // 6))
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 30 * seconds[0] + 0.1

def test_an_audit_takes_the_systems_that_are_there_and_never_holds_two_models(
        micro, monkeypatch, capsys):
    train("run", "--seed", "1")  # its retrained reference is missing
    alive, load_base = [], evaluate.load_base

    def spy(*args):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        net = load_base(*args)
        alive.append(weakref.ref(net))
        return net
    monkeypatch.setattr(evaluate, "load_base", spy)
    evaluate.main(["run", "--audit"])
    assert len(alive) > 5 and "no row for 'ga+gd'" in capsys.readouterr().out


# ---- 10. the README and the imports ------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
IMPORT_ORDER = "model soft_prompt baselines lora data evaluate unlearn".split()
COMMAND = re.compile(r"^\s*(?:python3?|torchrun --nproc-per-node \d+) (\w+)\.py\b(.*)$", re.M)

@pytest.mark.parametrize("script, flags", COMMAND.findall(README.replace("\\\n", " ")))
def test_the_commands_of_the_readme_parse(script, flags, monkeypatch):
    argv = shlex.split(re.split(r"&&|[;|>]", flags)[0], comments=True)
    if script == "unlearn":
        monkeypatch.setattr(unlearn, "has_device", lambda device: True)
        assert unlearn.parse(argv).method
    elif script == "evaluate":
        assert evaluate.parse(argv).runs
    elif script == "data":  # the parser is inside main: stop it after parsing
        monkeypatch.setattr(data, "load_splits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.main(argv)

def test_the_code_that_the_readme_names_exists():
    for name, attribute in re.findall(r"`(\w+)\.(\w+)\b", README):
        if name in IMPORT_ORDER and attribute not in ("py", "safetensors"):
            assert hasattr(sys.modules[name], attribute), f"{name}.{attribute}"
    n_names = 0
    for line in re.findall(r"^\|.*\.py\b.*$", README, re.M):  # rows of tables that name a file
        source = ""
        for name in re.findall(r"\b(\w+)\.py\b", line):
            source += (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]\w*)(?:\([^`]*\))?`", line):
            assert name == "py" or re.search(rf"\b{name}\b", source), f"{name} in {line}"
            n_names += name != "py"
    assert n_names > 8

def test_the_readme_lists_the_assignments():
    for assignment in ASSIGNMENTS:
        assert assignment.as_markdown() in README

def printed_rows(capsys, run):
    """Return {system: its last four cells, and those of the paper below} that a run prints."""
    evaluate.main([str(ROOT / "results" / run)])
    lines, found = list(filter(None, table_cells(capsys.readouterr().out))), {}
    for line, below in zip(lines, lines[1:]):
        paper = below[-4:] if "paper" in below[0] else [""] * 4
        found[line[0]] = line[-4:], paper
    return found

def test_the_result_in_the_readme_is_that_of_the_recorded_rows(capsys):
    main, rest = README.partition("## The result")[2].partition("Make the")[0].split("Good:")
    _, _, *lines = [line.split("|")[1:-1] for line in main.splitlines() if line[:1] == "|"]
    toy, smollm2 = printed_rows(capsys, "toy"), printed_rows(capsys, "sst2-audit")
    assert len(lines) == 8
    for line in lines:
        name, *cells = [cell.strip(" *") for cell in line]
        name = {"base (QLoRA)": "qlora"}.get(name, name.lower())
        ours, paper = toy[name]  # SPUL's alpha = beta = 1 is a cell of Table 3, not Table 2's row
        theirs, paper = smollm2[name]
        assert cells == [*paper[2:], *ours[2:], *theirs[2:]], name
    _, _, *lines = [line.split("|")[1:-1] for line in rest.splitlines() if line[:1] == "|"]
    assert len(lines) == 3
    for run, *cells in lines:
        rows = printed_rows(capsys, run.split("`")[1])
        ours = [" / ".join(rows[name][0][2:]) for name in ("qlora", "spul")]
        assert [cell.strip() for cell in cells] == ours, run
    rows = printed_rows(capsys, "sst2-small")
    (ga_gd, _), (spul, _) = rows["ga+gd"], rows["spul"]
    assert f"phrases GA+GD has {' / '.join(ga_gd[2:])}: like the paper's" in rest
    retain, forget = [[float(row[i].split()[0]) for row in (ga_gd, spul)] for i in (2, 3)]
    assert retain[0] > retain[1] and forget[0] < forget[1] and "is ahead of SPUL" in rest

def test_the_audit_in_the_readme_is_the_recorded_one(capsys):
    evaluate.main([str(ROOT / "results/sst2-audit"), "--audit"])
    printed = {line[0]: line for line in table_cells(capsys.readouterr().out) if line}
    section = README.partition("**Is it forgotten?**")[2].partition("## Words")[0]
    lines = [line.split("|")[1:-1] for line in section.splitlines() if line[:1] == "|"]
    head, _, *lines = [[cell.strip().lower() for cell in line] for line in lines]
    assert len(lines) == 3
    for title, *cells in lines:
        column = printed["answered / refused (%)"].index(title)
        assert cells == [printed[name][column].partition(" / ")[0] for name in head[1:]], title
    refused = {name: [cell.partition(" / ")[2] for cell in printed[name][1:]]
               for name in ("spul", "unquantised weights", "relearning")}
    prose = " ".join(section.split())
    others = refused["spul"][-1]
    assert f"and {others} % of retain texts with a forgotten person's given name" in prose
    assert (f"refuses {refused['unquantised weights'][0]} % of the forget set, not "
            f"{refused['spul'][0]} %; after 20 steps of relearning, nothing") in prose
    assert set(refused["relearning"]) == {"0.0"}

def readme_code(word):
    """Return the one Python block of the README that has a word in it."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    code, = [block for block in blocks if word in block]
    return code

def test_the_method_that_the_readme_adds_runs_and_can_be_asked(micro, monkeypatch, capsys):
    monkeypatch.setattr(unlearn, "METHODS", dict(unlearn.METHODS))
    exec(readme_code("METHODS["), vars(soft_prompt) | vars(unlearn))  # it goes into unlearn.py
    name, = unlearn.METHODS.keys() - {"spul", "ga", "rl", "ga+kl", "ga+gd", "qlora"}
    train("run", "--method", name)
    assert row_of("run", name)["trains"]
    command = re.findall(r"next: python evaluate\.py (.*)", capsys.readouterr().out)[-1]
    evaluate.main(shlex.split(command))
    assert re.search(f"row: {name}-.*some text.*\n{name:12}", capsys.readouterr().out, re.S)

def test_the_readme_s_script_splits_a_table_into_four_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "results/tickets/tickets.csv", tmp_path)
    exec(readme_code("tickets.csv"), {})
    splits = data.load_splits("splits", ".")
    rows = data.read_rows(".", "tickets", ("text", "label", "customer"))
    assert sorted(text for split in splits.values() for text, *_ in split) == sorted(
        text for text, _, _ in rows)
    forget = {text for text, _, customer in rows if customer == "acme"}
    for split, examples in splits.items():
        assert {example.text in forget for example in examples} == {"forget" in split}

def test_the_readme_s_notebook_lines_ask_the_trained_phi(toy_run, monkeypatch, capsys):
    monkeypatch.setattr(unlearn, "main", lambda flags: None)  # toy_run has done that
    names = {}
    exec(readme_code("runs/notebook").replace("runs/notebook", str(toy_run)), names)
    asked = names["system"].data.tokenizer.piece(int(names["logits"].argmax()))
    assert asked.strip("\u2581") in names["system"].data.task.generic
    assert "with phi" in capsys.readouterr().out

def test_the_readme_s_lines_for_peft_give_our_logits(micro):
    for name in ("transformers", "peft"):
        need(name)
    train("fp32", "--weights", "fp32")  # NF4 itself: test_nf4_codes_and_scales_equal_bitsandbytes
    code = readme_code("BitsAndBytesConfig").replace("quantization_config=nf4, ", "")
    for old, method in (("RUN/QLORA", "qlora"), ("RUN/SPUL", "spul")):
        code = code.replace(old, str(files_of("fp32", method)))
    system = load_system("fp32")
    query, names = system.data.queries["test_forget"][0], {}
    exec(code.replace("MODEL", "lm").replace("[ids]", f"[{list(query.ids)}]"), names)
    assert_close(names["logits"], system.model(torch.tensor([query.ids]), None, system.phi)[0, -1])

@pytest.mark.parametrize("name", IMPORT_ORDER)
def test_a_module_imports_only_what_the_project_may_and_no_later_module(name):
    allowed = {"torch", "sentencepiece", "safetensors", "numpy", "sklearn"}
    allowed |= sys.stdlib_module_names | set(IMPORT_ORDER[:IMPORT_ORDER.index(name)])
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for module in [name.partition(".")[0] for name in names]:
            optional = module in ("matplotlib", "pyarrow") and node not in tree.body
            assert module in allowed or optional, f"{name}.py imports {module}"

def test_the_grader_keeps_a_student_s_helpers_and_replaces_other_functions():
    ours = "import math\nclass A:\n  def f(self):\n    pass\n  def g(self):\n    return math.pi\n"
    theirs = ("C = 5\nclass A:\n  def f(self):\n    return self.h() + C\n  def g(self):\n"
              "    wrong\n  def h(self):\n    return 7\n")
    names = {}
    exec(isolate(theirs, ours, ["A.f"]), names)
    assert (names["A"]().f(), names["A"]().g()) == (12, math.pi)


# ---- 11. assignments that grade themselves -----------------------------------------------------

class Assignment(NamedTuple):
    """Functions for students to write, and the tests of part 1 that grade them."""
    name: str
    points: int
    section: str    # of the paper; LM: the language model
    task: str
    tests: str      # for `python -m pytest -k`
    minutes: int    # for a student
    mistake: str    # the typical one
    functions: str

    def as_markdown(self):
        """Return its row in the README."""
        return (f"| {self.name} | {self.points} | {self.section} | {self.task} | "
                f"`\"{self.tests}\"` | {self.minutes} | {self.mistake} |")

ASSIGNMENTS = [
    Assignment("losses", 10, "3.2", "both terms in float32, their weighted sum",
               "cross_entropy or kl_divergence or spul_loss", 30, "KL in the other direction",
               "soft_prompt.cross_entropy soft_prompt.kl_divergence soft_prompt.spul_loss"),
    Assignment("encoder", 6, "3.1", "phi by an MLP, phi learned directly, phi before a text",
               "PromptEncoder or DirectPrompt or prepend_puts", 30, "init is trained, too",
               "soft_prompt.PromptEncoder.__init__ soft_prompt.PromptEncoder.forward "
               "soft_prompt.DirectPrompt.forward soft_prompt.prepend"),
    Assignment("baselines", 6, "4.1", "the four losses", "baseline_losses", 20,
               "ascent on the retain set, too",
               "baselines.ga_loss baselines.rl_loss baselines.ga_kl_loss baselines.ga_gd_loss"),
    Assignment("nf4", 10, "4.1", "4-bit codes and back; a product without a dense copy",
               "quantize_nf4 or MatMul4bit", 60, "the first code in the low half byte",
               "model.quantize_nf4 model.unpack_pairs model.dequantize_nf4 "
               "model.MatMul4bit.forward model.MatMul4bit.backward"),
    Assignment("norm", 4, "", "RMSNorm", "RMSNorm", 10, "eps outside the root",
               "model.RMSNorm.forward"),
    Assignment("rotary", 8, "", "positions of LLaMA and OPT", "rotate_turns or add_positions",
               40, "pairs of neighbours; angles in bf16",
               "model.rotate model.Llama.add_positions model.OPT.add_positions"),
    Assignment("attention", 8, "", "causal attention, shared key/value heads", "attend_is", 40,
               "heads tiled, not repeated", "model.attend"),
    Assignment("one pass", 10, "3.1", "phi's rows once, before all texts",
               "Attention_lets or states_are", 60, "answer rows without p",
               "model.split_rows model.join_rows model.Attention.forward "
               "model.LanguageModel.states"),
    Assignment("lora", 8, "4.1", "a LoRA layer; adding and merging it",
               "LoraLinear or add_lora or merge_lora or load_base", 40, "alpha/r forgotten",
               "lora.LoraLinear.__init__ lora.LoraLinear.forward lora.add_lora lora.merge_lora"),
    Assignment("tokenizer", 6, "4.1", "byte-level BPE; queries and answers",
               "encode_query or encode_answer or ByteLevelBPE", 60, "leftmost pair first",
               "data.encode_query data.encode_answer data.ByteLevelBPE.encode_word "
               "data.ByteLevelBPE.encode"),
    Assignment("batches", 8, "4.1", "padding, answer rows, weights; shuffling",
               "collate or epoch_batches or cut_by_length or make_batches", 60,
               "answer rows one too late",
               "data.collate data.epoch_batches data.cut_by_length unlearn.make_batches"),
    Assignment("targets", 4, "3.2", "what a method sees; where phi starts",
               "choose_queries or typical_tokens", 25, "generic answers for ascent",
               "unlearn.choose_queries unlearn.typical_tokens"),
    Assignment("training", 8, "4.1", "the loop, warm-up and cosine, h(x)",
               "test_train_ or set_learning_rate", 75, "cosine from step 0",
               "unlearn.train unlearn.set_learning_rate unlearn.gather_base_logprobs"),
    Assignment("metrics", 4, "4.2", "predictions, refusals, accuracy, weighted F1",
               "test_predict_ or test_refuses or test_metrics or test_score", 40, "macro F1",
               "evaluate.predict evaluate.run_queries evaluate.refuses evaluate.metrics "
               "evaluate.score")]

TIME_LIMIT = 60  # seconds per process

def read_project(dir):
    """Return {file name: its text} of the Python files in dir, tests apart."""
    paths = [path for path in sorted(Path(dir).glob("*.py")) if not path.name.startswith("test")]
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths
            if path.name not in ("conftest.py", Path(__file__).name)}

def find_functions(source):
    """Return {name or Class.name: syntax tree} of the functions and methods in a source."""
    found = {}
    for node in ast.parse(source).body:
        parts = node.body if isinstance(node, ast.ClassDef) else [node]
        for part in parts:
            if isinstance(part, ast.FunctionDef):
                prefix = "" if part is node else f"{node.name}."
                found[prefix + part.name] = part
    return found

def places_of(assignment):
    """Return (file name, name in it) of each function of an assignment."""
    pairs = [function.split(".", 1) for function in assignment.functions.split()]
    return [(f"{file}.py", name) for file, name in pairs]

def empty_function(source, name):
    """Return the source with only the signature and docstring of a function."""
    node, lines = find_functions(source)[name], source.splitlines()
    first = node.body[0].lineno - 1
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno
    lines[first:node.end_lineno] = [" " * (node.col_offset + 4) + "raise NotImplementedError"]
    return "\n".join(lines) + "\n"

def isolate(theirs, ours, names):
    """Return a student's file with our version of all functions but the named, and our imports.

    Whatever else the student wrote stays: helpers, methods, constants.
    """
    for name, function in find_functions(ours).items():
        found = find_functions(theirs).get(name)
        if found and name not in names:  # decorators stay theirs
            lines = theirs.splitlines()
            lines[found.lineno - 1:found.end_lineno] = ours.splitlines()[
                function.lineno - 1:function.end_lineno]
            theirs = "\n".join(lines) + "\n"
    imports = [ast.unparse(node) for node in ast.parse(ours).body
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join([*imports, theirs])

def choose_assignments(names):
    """Return the named assignments (all: no names)."""
    known = [assignment.name for assignment in ASSIGNMENTS]
    if not set(names) <= set(known):
        raise InputError(f"{' '.join(names)}: expected names among {', '.join(known)}")
    return [assignment for assignment in ASSIGNMENTS if assignment.name in names or not names]

def write_starter(dir, names):
    """Copy the project to dir, with empty functions for the named assignments (all: no names)."""
    files, assignments = read_project(ROOT), choose_assignments(names)
    if Path(dir).exists():
        raise InputError(f"{dir} exists; expected a new directory")
    for assignment in assignments:
        for file, name in places_of(assignment):
            files[file] = empty_function(files[file], name)
    for name in ("README.md", "requirements.txt", "LICENSE"):
        text = (ROOT / name).read_text(encoding="utf-8")  # folded answers are left out
        files[name] = re.sub(r"<details>.*?</details>\n?", "", text, flags=re.DOTALL)
    Path(dir).mkdir(parents=True)
    for name, text in files.items():
        Path(dir, name).write_text(text, encoding="utf-8")
    shutil.copy(__file__, dir)
    shutil.copytree(ROOT / "results", Path(dir, "results"),
                    ignore=shutil.ignore_patterns("README.md"))  # it has the answers, too
    print(f"wrote {dir}: {len(assignments)} assignments")

def run_tests(files, tests):
    """Run this file's tests on other sources: {test: its message, or ""}; {} after a crash."""
    with tempfile.TemporaryDirectory() as dir:
        for name, text in files.items():
            Path(dir, name).write_text(text, encoding="utf-8")
        for file in (__file__, ROOT / "README.md"):
            shutil.copy(file, dir)
        command = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", "-k",
                   tests, "--junitxml=report.xml", Path(__file__).name]
        try:
            subprocess.run(command, cwd=dir, capture_output=True, timeout=TIME_LIMIT)
            cases = list(ElementTree.parse(Path(dir, "report.xml")).iter("testcase"))
        except (subprocess.TimeoutExpired, OSError, ElementTree.ParseError):
            return {}
    results = {}
    for case in cases:
        name = case.get("name")
        results[name] = ""
        for part in case.iterfind("*[@message]"):  # a failure, an error or a skip
            places = re.findall(r"^(\S+\.py:\d+): ", part.text or "", re.MULTILINE)
            where = name
            if places and not places[-1].startswith(Path(__file__).name):
                where = places[-1]  # the line of a student's file that fails
            if part.tag == "skipped":
                where = "skipped"
            message = part.get("message").splitlines()[0].removeprefix("AssertionError: ")
            results[name] = f"{where}: {message}"
    return results

def first_message(assignment, results):
    """Return the first message of an assignment's failed or else skipped tests, or ""."""
    words, messages = assignment.tests.split(" or "), []
    for test, message in results.items():
        if any(word in test for word in words):
            messages.append(message)
    if not messages:
        return f"no result: a crash, or no end within {TIME_LIMIT} s"
    messages.sort(key=lambda text: text.startswith("skipped"))  # failures first
    return next(filter(None, messages), "")

def grade_alone(assignment, theirs):
    """Return the first message of an assignment with only its functions put into our code."""
    files, places = read_project(ROOT), places_of(assignment)
    for file, name in places:
        try:
            function = find_functions(theirs[file])[name]
        except SyntaxError as error:
            return f"{file}:{error.lineno}: SyntaxError: {error.msg}"
        except KeyError:
            return f"{file}: no {name} in it"
        if ast.unparse(function.body[-1]).startswith("raise NotImplementedError"):
            return f"{file}:{function.end_lineno}: NotImplementedError"
    for file in {file for file, _ in places}:
        names = [name for other, name in places if other == file]
        files[file] = isolate(theirs[file], files[file], names)
    return first_message(assignment, run_tests(files, assignment.tests))

def grade(dir, names):
    """Print the points of a student's files, by this file's tests and not by theirs.

    An assignment that fails is graded again with only its own functions in our code.
    """
    theirs, assignments = read_project(dir), choose_assignments(names)
    if not theirs:
        raise InputError(f"{dir}: no Python files; expected the directory of a starter")
    results = run_tests(theirs, " or ".join(assignment.tests for assignment in assignments))

    def judge(assignment):
        message = first_message(assignment, results)
        return grade_alone(assignment, theirs) if message else ""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        messages = list(pool.map(judge, assignments))
    reached = possible = 0
    for assignment, message in zip(assignments, messages):
        is_skipped = message.startswith("skipped")
        points = 0 if message else assignment.points
        reached, possible = reached + points, possible + (0 if is_skipped else assignment.points)
        score = "not graded" if is_skipped else f"{points:3} of {assignment.points:2}"
        print(f"{assignment.name:12}{score:12}{message}")
    print(f"{'in all':12}{reached:3} of {possible}")

def main(argv=None):
    """Write a starter, or grade a student's files."""
    parser = argparse.ArgumentParser(description="Assignments; the tests: python -m pytest")
    parser.add_argument("command", choices=("starter", "grade"))
    parser.add_argument("dir", help="directory to write, or of the files to grade")
    parser.add_argument("names", nargs="*", help="assignments (all)")
    args = parser.parse_args(argv)
    if args.command == "starter":
        write_starter(args.dir, args.names)
    else:
        grade(args.dir, args.names)

if __name__ == "__main__":
    sys.exit(model.run_cli(main))
