"""The language model h of Section 3.1: 4-bit weights, LLaMA and OPT by hand, checkpoint files.

A batch is a list of rows: phi's p rows, then the T rows of each of B texts. x is (p+B*T,D), so that
every norm, linear layer and MLP sees one matrix. Only `Attention` tells the parts apart.

Axes are those of soft_prompt.py. G equals H, except under grouped-query attention, where H/G query
heads share one key/value head. Parameters have Hugging Face's names, without the leading `model.`
or `model.decoder.`. Every loaded weight is frozen.
"""
import argparse
import ast
import functools
import hashlib
import importlib.util
import json
import math
import os
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint


class InputError(Exception):
    """A mistake in the user's input, in one line: what was found, what was expected, what to do."""


# ---- 4-bit weights (NF4) -----------------------------------------------------------------------

# The 16 values of NormalFloat-4: quantiles of a normal distribution, scaled to [-1, 1], with an
# exact zero (Dettmers et al., QLoRA, Appendix E; the float32 numbers are bitsandbytes').
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])
MIDPOINTS = (NF4[:-1] + NF4[1:]) / 2
# A byte holds two codes: byte 0x2f means NF4[2], then NF4[15]. One lookup gives both values.
PAIRS = torch.cartesian_prod(NF4, NF4)  # (256,2)


def quantize_nf4(w, block_size=64):
    """Return packed uint8 (ceil(n/2),) and absmax float32 (ceil(n/block_size),) of w with n values.

    Each block of 64 values is divided by its largest magnitude and rounded to the nearest of the
    16 NF4 values. Two codes share a byte, the first in the high half; a spare half byte and blocks
    of zeros have code 7, the value 0. Bit for bit the result of bitsandbytes: ties go to the lower
    code, and only a last, shorter block is divided by absmax; full blocks are multiplied by its
    inverse.
    """
    n = w.numel()
    blocks = F.pad(w.float().reshape(-1), (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    if n % block_size:
        absmax[-1].clamp_(min=1e-38)
        scaled[-1] = blocks[-1] / absmax[-1]
    codes = torch.bucketize(scaled.view(-1), MIDPOINTS.to(w.device), out_int32=True)
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
    return packed[:(n + 1) // 2], absmax


@functools.cache
def pairs_on(device):
    """Return PAIRS on a device, copied there once."""
    return PAIRS.to(device)


def unpack_pairs(packed, absmax, pairs, dtype, block_size):
    """Return the values of whole blocks: two per byte, scaled in float32."""
    values = F.embedding(packed.int(), pairs).view(-1, block_size)  # (n/64,64)
    return (values * absmax[:, None]).view(-1).to(dtype)


@functools.cache
def fused_unpack_pairs():
    """Return `unpack_pairs` as one GPU kernel, or itself where there is no compiler."""
    if importlib.util.find_spec("triton"):
        return torch.compile(unpack_pairs, dynamic=True)
    print("no triton here: 4-bit weights are unpacked by several kernels, which is slower")
    return unpack_pairs


def dequantize_nf4(packed, absmax, shape, dtype, block_size=64):
    """Return the weights of `shape` and `dtype` that `quantize_nf4` packed."""
    full = F.pad(packed, (0, -len(packed) % (block_size // 2)))  # complete the last block
    unpack = fused_unpack_pairs() if packed.is_cuda else unpack_pairs
    values = unpack(full, absmax, pairs_on(packed.device), dtype, block_size)
    return values[:math.prod(shape)].view(shape)


class MatMul4bit(torch.autograd.Function):
    """x @ W.T, whose backward pass dequantises W again: autograd stores no dense copy of W."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ layer.dequantize(x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(grad.dtype), None


class Linear4bit(nn.Module):
    """y = x W.T + bias with a frozen W (out,in) in NF4: 0.56 bytes per weight with its scales."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.shape = weight.shape
        self.out_features, self.in_features = weight.shape
        packed, absmax = quantize_nf4(weight)
        self.register_buffer("packed", packed)
        # kept as integers: `model.to(torch.bfloat16)` would round floats
        self.register_buffer("absmax_bits", absmax.view(torch.int32))
        self.bias = bias

    @property
    def absmax(self):
        """The blocks' scales, float32."""
        return self.absmax_bits.view(torch.float32)

    def dequantize(self, dtype):
        return dequantize_nf4(self.packed, self.absmax, self.shape, dtype)

    def forward(self, x):
        y = MatMul4bit.apply(x, self)
        return y if self.bias is None else y + self.bias


# ---- the forward pass --------------------------------------------------------------------------

@dataclass
class Config:
    """What the forward pass needs from config.json, under LLaMA's names."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, with the mean in float32 and the result in x's dtype."""

    def __init__(self, D, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x32 * scale).to(x.dtype)


def rotate(x, rotary):
    """Rotate each pair (x[i], x[i+d/2]) of x (rows,H,d), Hugging Face's half-split layout.

    rotary: cos and sin (2,rows,1,d). The first half of the sines is negated in the table:
    x[i] cos - x[i+d/2] sin.
    """
    cos, sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def split_rows(x, p, T):
    """Return phi's part (1,H,p,d) and the texts' part (B,H,T,d) of x (p+B*T,H,d)."""
    phi, texts = x.split([p, len(x) - p])
    texts = texts.reshape(len(texts) // T, T, *x.shape[1:])                # (B,T,H,d)
    phi = phi.transpose(0, 1)[None].clone()  # a view would keep all rows for the backward pass
    return phi, texts.transpose(1, 2)


def join_rows(phi, texts):
    """Return phi's part (1,H,p,d) and the texts' part (B,H,T,d) as one matrix (p+B*T,H*d)."""
    phi = phi[0].transpose(0, 1).flatten(1)                                # (p,H*d)
    texts = texts.transpose(1, 2).flatten(0, 1).flatten(1)                 # (B*T,H*d)
    return torch.cat([phi, texts])


def attend(q, k, v):
    """Return causal attention (B,H,T,d) of q (B,H,T,d) over k and v (B,G,S,d), S >= T.

    The last T of the S positions are the queries' own. Each query sees the S-T before them (phi)
    and its own text up to itself, so real tokens never see right padding. The softmax is written
    out, which on CPUs is also faster than F.scaled_dot_product_attention.
    """
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    if q.is_cuda and T > 0:  # the same in one kernel, which keeps no scores (a test compares them)
        return F.scaled_dot_product_attention(q, k, v, causal_lower_right(T, S), enable_gqa=True)
    # stack the queries of the H/G heads that share a key/value head: one product for all
    q = q.reshape(B, G, H // G * T, d) * d ** -0.5
    scores = (q @ k.mT).view(B, H, T, S)
    scores += torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
    weights = scores.softmax(-1).view(B, G, H // G * T, S)
    return (weights @ v).view(B, H, T, d)


class Attention(nn.Module):
    """Causal self-attention: phi's rows see phi; a text's rows see phi, then their own text.

    x (p+B*T,D) -> (p+B*T,D). This equals prepending phi to every text (`soft_prompt.prepend`):
    phi comes first and never sees a text, so its keys and values are the same for all of them.
    With p = 30, B = 32, T = 48 there are 1,566 rows instead of 2,496.
    """

    def __init__(self, config, out_name, bias):
        super().__init__()
        D, self.d = config.hidden_size, config.head_dim
        self.H, self.G = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, self.H * self.d, bias)
        self.k_proj = nn.Linear(D, self.G * self.d, bias)
        self.v_proj = nn.Linear(D, self.G * self.d, bias)
        self.out_name = out_name  # LLaMA: o_proj, OPT: out_proj
        self.add_module(out_name, nn.Linear(self.H * self.d, D, bias))

    def forward(self, x, rotary, p, T):
        q = self.q_proj(x).unflatten(-1, (self.H, self.d))                 # (p+B*T,H,d)
        k = self.k_proj(x).unflatten(-1, (self.G, self.d))                 # (p+B*T,G,d)
        v = self.v_proj(x).unflatten(-1, (self.G, self.d))                 # (p+B*T,G,d)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q_phi, q = split_rows(q, p, T)                                     # (1,H,p,d), (B,H,T,d)
        k_phi, k = split_rows(k, p, T)                                     # (1,G,p,d), (B,G,T,d)
        v_phi, v = split_rows(v, p, T)                                     # (1,G,p,d), (B,G,T,d)
        y_phi = attend(q_phi, k_phi, v_phi)                                # (1,H,p,d)
        B = len(q)
        k = torch.cat([k_phi.expand(B, -1, -1, -1), k], dim=2)             # (B,G,p+T,d)
        v = torch.cat([v_phi.expand(B, -1, -1, -1), v], dim=2)             # (B,G,p+T,d)
        y = attend(q, k, v)                                                # (B,H,T,d)
        return getattr(self, self.out_name)(join_rows(y_phi, y))


class LlamaLayer(nn.Module):
    """x (p+B*T,D) -> (p+B*T,D)."""

    def __init__(self, config):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = Attention(config, "o_proj", bias=False)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(D, width, bias=False),
            "up_proj": nn.Linear(D, width, bias=False),
            "down_proj": nn.Linear(width, D, bias=False)})

    def forward(self, x, rotary, p, T):
        x = x + self.self_attn(self.input_layernorm(x), rotary, p, T)
        m = self.post_attention_layernorm(x)
        gate = F.silu(self.mlp.gate_proj(m))  # SwiGLU
        return x + self.mlp.down_proj(gate * self.mlp.up_proj(m))


class OPTLayer(nn.Module):
    """The same as `LlamaLayer`, with LayerNorm and a ReLU MLP."""

    def __init__(self, config):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.self_attn_layer_norm = nn.LayerNorm(D)
        self.self_attn = Attention(config, "out_proj", bias=True)
        self.final_layer_norm = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, width)
        self.fc2 = nn.Linear(width, D)

    def forward(self, x, rotary, p, T):
        x = x + self.self_attn(self.self_attn_layer_norm(x), rotary, p, T)
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))


class LanguageModel(nn.Module):
    """What LLaMA and OPT share: embedding, layers, head, and the way through them."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: keep only each layer's input for the backward pass
        self.autocast = False       # True: compute in bf16 with float32 weights
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        tie_head(self)

    def forward(self, tokens, answers=None, phi=None):
        """Return h(phi, x): logits (N,V) at the answer rows, or (B,T,V) when `answers` is None.

        tokens: (B,T), or embeddings (B,T,D). answers: (N,), rows of the flattened B*T positions.
        phi: (p,D), the soft prompt before every text, or None.
        """
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            return self.lm_head(self.states(tokens, answers, phi))

    def states(self, tokens, answers=None, phi=None):
        """Return the states that lm_head reads, (N,D) or (B,T,D). Arguments: see `forward`.

        phi, in the embeddings' dtype, has positions 0 to p-1; each text has p to p+T-1. With
        self.checkpointing, layers are recomputed in the backward pass (use_reentrant=False).
        """
        embeds = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        B, T, D = embeds.shape
        if phi is None:
            phi = embeds.new_zeros(0, D)
        p = len(phi)
        x = torch.cat([phi.to(embeds), embeds.flatten(0, 1)])              # (p+B*T,D)
        one_text = torch.arange(p + T, device=x.device)
        positions = torch.cat([one_text[:p], one_text[p:].repeat(B)])      # (p+B*T,)
        x, rotary = self.add_positions(x, positions, p + T)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, p, T, use_reentrant=False)
            else:
                x = layer(x, rotary, p, T)
        if answers is None:
            return self.norm(x[p:]).view(B, T, D)
        return self.norm(x[p + answers])                                   # (N,D)


class Llama(LanguageModel):
    """LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU."""
    file_prefix = "model."

    def __init__(self, config):
        super().__init__(config, LlamaLayer)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def add_positions(self, x, positions, n):
        """Return x, and cos and sin (2,rows,1,d) of the rows' positions, all below n.

        RoFormer, Eq. 34. The layout is that of `rotate`. Angles are in float32, the tables in x's
        dtype.
        """
        d = self.config.head_dim
        frequency = self.config.rope_theta ** (-torch.arange(0, d, 2, device=x.device) / d)
        angle = torch.arange(n, device=x.device)[:, None] * frequency      # (n,d/2)
        angle = torch.cat([-angle, angle], dim=-1)  # (n,d); sin(-a) = -sin(a): see `rotate`
        table = torch.stack([angle.cos(), angle.sin()]).to(x.dtype)        # (2,n,d)
        return x, table[:, positions, None]


class OPT(LanguageModel):
    """OPT (Zhang et al. 2022): LayerNorm, learned positions, biases, ReLU, tied head."""
    file_prefix = "model.decoder."

    def __init__(self, config):
        super().__init__(config, OPTLayer)
        # as in Hugging Face's files, position i is row i + 2
        self.embed_positions = nn.Embedding(config.max_position_embeddings + 2, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def norm(self, x):
        return self.final_layer_norm(x)

    def add_positions(self, x, positions, n):
        """Return x plus its learned positions, all below n, and None for rotary tables.

        InputError when n exceeds config.max_position_embeddings.
        """
        most = self.config.max_position_embeddings
        if n > most:
            raise InputError(f"phi and text have {n} tokens; OPT has {most} positions; lower "
                             "--max-len or --p")
        return x + self.embed_positions(positions + 2), None


def activation_bytes(config, B, T, p, size, is_frozen):
    """Return the bytes of activations at the peak of a step: without and with checkpointing.

    size: bytes per number, 2 or 4. Keeps per layer: the norms' inputs (LLaMA's in float32), q,
    the keys and values of B texts, the attention weights, the MLP's products; unless the linear
    layers are frozen, also their inputs. The backward pass adds the gradients in one MLP.
    """
    R, D, F = p + B * T, config.hidden_size, config.intermediate_size
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    is_llama = config.model_type == "llama"
    layer = size * (R * H * d + 2 * B * (p + T) * G * d + B * H * T * (p + T))
    layer += (8 * R * D + 3 * size * R * F) if is_llama else size * (2 * R * D + R * F)
    if not is_frozen:
        layer += size * R * (2 * D + H * d + F)
    n, gradients = config.num_hidden_layers, 4 * size * R * F
    return n * layer + gradients, n * size * R * D + layer + gradients


# ---- support: checkpoint files -----------------------------------------------------------------

def tie_head(model):
    """Use one matrix for embedding and head where config.json says so."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def build(config):
    """Return a Llama or OPT with random weights (none under `torch.device("meta")`)."""
    return Llama(config) if config.model_type == "llama" else OPT(config)


def load_model(dir, weights="nf4", device="cpu", dtype=None):
    """Return the frozen model of a checkpoint directory. InputError for files that do not fit.

    weights: "nf4" (every matrix except embedding and head in 4 bits), "bf16" or "fp32", to which
    values are rounded. dtype: "bf16" or "fp32" (default: fp32, with weights="bf16" bf16), the
    computing dtype; what is not quantised is kept in it, unless weights="fp32". Tensors are read
    and quantised one at a time.
    """
    dtype = dtype or ("bf16" if weights == "bf16" else "fp32")
    is_half = dtype == "bf16" and weights != "fp32"
    held = torch.bfloat16 if is_half else torch.float32
    with torch.device("meta"):
        model = build(read_config(dir))
    for name, tensor in find_tensors(dir, model).items():
        place, _, leaf = name.rpartition(".")
        layer = model.get_submodule(place)
        if weights == "nf4" and name.startswith("layers.") and tensor.dim() == 2:
            model.set_submodule(place, Linear4bit(tensor.to(device), layer.bias))
        else:
            if weights == "bf16":
                tensor = tensor.to(torch.bfloat16)
            tensor = tensor.to(device, held, copy=True)  # no view of the mapped file
            setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False))
    tie_head(model)
    model.autocast = dtype == "bf16" and not is_half
    return model.eval()


def unpack_nf4(model, dtype=None):
    """Replace every Linear4bit by a dense layer with the same values, in place. Returns the model.

    The dense layer needs more memory and unpacks nothing per step. dtype: by default the model's.
    """
    dtype = dtype or model.embed_tokens.weight.dtype
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
            dense.bias = layer.bias
            model.set_submodule(name, dense)
    return model


def file_name(model, name):
    """Return Hugging Face's name of our parameter or layer `name`."""
    return name if name == "lm_head.weight" else model.file_prefix + name


def save_model(model, dir, state=None):
    """Write a model without NF4 and LoRA layers (`lora.merge_lora`) as transformers reads it.

    state: {name: tensor} in place of the model's own, where it is spread over processes.
    """
    state = state or model.state_dict()
    # a tied head is listed once, as the embedding
    tensors = {file_name(model, name): state[name] for name, _ in model.named_parameters()}
    write_tensors(Path(dir) / "model.safetensors", tensors)
    write_json(Path(dir) / "config.json", vars(model.config) | {
        "ffn_dim": model.config.intermediate_size})  # OPT's name for it


def identify_model(dir):
    """Return the directory's name with a hash of its configuration and of its tensors' first rows.

    A moved model is the same model; another one under the same name is not.
    """
    dir = Path(dir).resolve()
    digest = hashlib.sha256(json.dumps(vars(read_config(dir)), sort_keys=True).encode())
    for name, tensor in sorted(read_tensors(dir, CHECKPOINT).items()):
        row = tensor[:1].float().numpy().tobytes()
        digest.update(name.encode() + row)
    return f"{dir.name}-{digest.hexdigest()[:8]}"


@contextmanager
def atomic_write(path):
    """Write atomically: yield a temporary path, then rename it. InputError if that fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors would leave the file readable for its owner only
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # what the writers raise
        raise InputError(f"{path}: cannot be written ({error}); expected room on the disk and a "
                         "directory that you may write to")
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def write_tensors(path, tensors):
    """Write {name: tensor} as .safetensors, atomically."""
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def read_json(path, expected, keys=()):
    """Return the JSON object in `path`. InputError if it is missing, malformed or lacks a key."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:  # ValueError: malformed JSON or UTF-8
        raise InputError(f"{path}: not readable as JSON ({e}); expected {expected}")
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; expected {expected}")
    for key in keys:
        if key not in value:
            raise InputError(f"{path}: no {key!r} in it; expected {expected}")
    return value


CHECKPOINT = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


def find_files(dir, names):
    """Return the paths of the first of `names` in dir, or of the shards that its index names."""
    for name in names:
        path, index = Path(dir, name), Path(dir, f"{name}.index.json")
        if path.is_file():
            return [path]
        if index.is_file():
            shards = read_json(index, "an index of shards", ["weight_map"])["weight_map"]
            return [Path(dir, shard) for shard in sorted(set(shards.values()))]
    raise InputError(f"{dir}: no {' or '.join(names)}; expected a checkpoint")


def read_tensors(dir, names):
    """Return {name: tensor}, memory-mapped, of the first of the files `names` in dir."""
    tensors = {}
    for path in find_files(dir, names):
        try:
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:  # weights_only: a pickle that brings code of its own is refused
                is_mapped = zipfile.is_zipfile(path)  # the older form of .bin is not a zip file
                tensors |= torch.load(path, "cpu", weights_only=True, mmap=is_mapped)
        except Exception as e:  # a damaged file may raise anything
            reason = str(e).partition("\n")[0]
            raise InputError(f"{path}: not readable as tensors ({reason}); download it again")
    return tensors


def find_tensors(dir, model):
    """Return {parameter name: tensor} of a checkpoint, exactly the model's parameters."""
    found = {}
    for name_in_file, tensor in read_tensors(dir, CHECKPOINT).items():
        name = name_in_file.removeprefix("model.").removeprefix("decoder.")
        if not name.endswith("rotary_emb.inv_freq"):  # constants in LLaMA-2's published files
            found[name] = tensor
    if model.config.tie_word_embeddings and "lm_head.weight" in found:  # stored once or twice
        head = found.pop("lm_head.weight")
        if not torch.equal(found.setdefault("embed_tokens.weight", head), head):
            raise InputError(f"{dir}: lm_head.weight differs from embed_tokens.weight, but "
                             "config.json ties them; set tie_word_embeddings to false")
    check_shapes(dir, found, dict(model.named_parameters()))
    return found


def check_shapes(dir, tensors, expected):
    """InputError for the first tensor without its expected shape; both are {name: tensor}."""
    for name in sorted(expected | tensors):
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        wanted = tuple(expected[name].shape) if name in expected else "no such tensor"
        if found != wanted:
            raise InputError(f"{dir}: tensor {name} is {found}; expected {wanted} by its "
                             "configuration")


def write_adapter(dir, tensors, peft_type, lm, **settings):
    """Write an adapter as PEFT reads it. lm: the model's name."""
    write_tensors(Path(dir) / ADAPTER[0], tensors)
    write_json(Path(dir) / "adapter_config.json", {
        "peft_type": peft_type, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(lm),
        **settings})


# What the forward pass implements, for options that change no tensor. Other variants have other
# tensors (biases, projections, quantised weights), and `check_shapes` refuses them.
IMPLEMENTED = {"model_type": ["llama", "opt"], "hidden_act": ["silu"],
               "activation_function": ["relu"], "do_layer_norm_before": [True],
               "rope_type": ["default"], "type": ["default"], "partial_rotary_factor": [1.0]}


def read_config(dir):
    """Return the Config of dir/config.json. InputError names whatever is not implemented."""
    path = Path(dir) / "config.json"
    raw = read_json(path, "a Hugging Face checkpoint directory", [
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
    raw |= raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, 4
    given = {key: value for key, value in raw.items() if value is not None}
    for key, allowed in IMPLEMENTED.items():
        if key in given and given[key] not in allowed:
            raise InputError(f"{path}: {key} is {given[key]!r}; only {allowed} is implemented")
    heads = raw["num_attention_heads"]
    values = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads,
              "intermediate_size": raw.get("ffn_dim"),
              "tie_word_embeddings": raw["model_type"] == "opt"} | given
    return Config(**{name: values[name] for name in Config.__annotations__ if name in values})


def method_part(name):
    """Return the source of the file name.py above its support code."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return source.partition("\n# ---- support")[0]


def hash_code(*sources):
    """Return a hash of Python code that comments, docstrings and layout do not change."""
    digest = hashlib.sha256()
    for source in sources:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                if ast.get_docstring(node, clean=False) is not None:
                    del node.body[0]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:8]


# ---- support: devices, processes (torchrun), command lines -------------------------------------

def has_device(device):
    """Whether this machine has the device: cpu, or cuda, cuda:1 or mps on a GPU."""
    try:
        return torch.zeros(1, device=device).numel() == 1
    except (RuntimeError, AssertionError):
        return False


def is_rank_zero():
    """Whether this is the only process, or the first one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def count_processes():
    """Return how many processes torchrun started, or 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share_of_process(values):
    """Return this process's part of a list: all of it, unless torchrun started several."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return values[rank::count_processes()]


def gather_objects(value):
    """Return the list of all processes' values."""
    values = [value] * count_processes()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def within(low, high=math.inf, kind=float):
    """Return argparse's type for a number from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}; expected {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid float value: 'x'"
    return parse


def run_cli(main):
    """Run a command line and return its exit status: 2 after a mistake in the input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without the text's characters
    try:
        main()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: out of memory; add --checkpointing, then --accumulate 4, or lower --max-len",
              file=sys.stderr)
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistBackendError):
            raise
        print("error: another process ended (torchrun says which); the same command continues from "
              "the last finished epoch", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last finished epoch",
              file=sys.stderr)
        return 130
    return 2
