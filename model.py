"""The language model h of Section 3.1: 4-bit weights, LLaMA and OPT by hand, checkpoint files.

Axes are those of soft_prompt.py. G equals H, except under grouped-query attention, where H/G query
heads share one key/value head. Parameters have Hugging Face's names, without the leading `model.`
or `model.decoder.`. Every loaded weight is frozen.
"""
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
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
    16 NF4 values. Two codes share a byte, the first in the high half. Bit for bit the result of
    bitsandbytes: ties go to the lower code, and only a last, shorter block is divided by absmax;
    full blocks are multiplied by its inverse.
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


def dequantize_nf4(packed, absmax, shape, dtype, block_size=64):
    """Return the weights of `shape` and `dtype` that `quantize_nf4` packed, scaled in float32."""
    full = F.pad(packed, (0, -len(packed) % (block_size // 2)))  # complete the last block
    values = F.embedding(full.int(), PAIRS.to(packed.device))  # (n/2,2)
    values.view(-1, block_size).mul_(absmax[:, None])
    return values.view(-1)[:math.prod(shape)].view(shape).to(dtype)


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
        self.register_buffer("absmax", absmax)
        self.bias = bias

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
    """x / sqrt(mean(x^2) + eps) * weight, with the mean in float32."""

    def __init__(self, D, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x32 * scale).to(x.dtype)


def rotate(x, rotary):
    """Rotate each pair (x[i], x[i+d/2]) of x (B,H,T,d), Hugging Face's half-split layout.

    The first half of the sines is negated in the table: x[i] cos - x[i+d/2] sin.
    """
    cos, sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal self-attention over phi's keys and values (`prefix`) and the text's own.

    x (B,T,D) -> (B,T,D) and x's own K, V (B,G,T,d). x is the text, or in `prompt_kv` phi itself.
    prefix: phi's K, V (1,G,p,d) or None. rotary: (2,T,d) or None. The softmax is written out, which
    on CPUs is also faster than F.scaled_dot_product_attention.
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

    def forward(self, x, prefix, rotary):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.d).transpose(1, 2)      # (B,H,T,d)
        k = self.k_proj(x).view(B, T, self.G, self.d).transpose(1, 2)      # (B,G,T,d)
        v = self.v_proj(x).view(B, T, self.G, self.d).transpose(1, 2)      # (B,G,T,d)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        own_kv = (k, v)
        if prefix is not None:  # phi: p more keys and values, the same for every example
            k = torch.cat([prefix[0].expand(B, -1, -1, -1), k], dim=2)     # (B,G,p+T,d)
            v = torch.cat([prefix[1].expand(B, -1, -1, -1), v], dim=2)     # (B,G,p+T,d)
        p = k.shape[2] - T
        # stack the queries of the H/G heads that share a key/value head: one product for all
        n_rows = self.H // self.G * T
        q = q.reshape(B, self.G, n_rows, self.d) * self.d ** -0.5          # (B,G,n_rows,d)
        scores = (q @ k.mT).view(B, self.H, T, p + T)                      # (B,H,T,p+T)
        # a query sees phi and the text up to itself, so real tokens never see right padding
        mask = torch.full((T, p + T), -math.inf, dtype=x.dtype, device=x.device).triu(p + 1)
        weights = (scores + mask).softmax(-1)                              # (B,H,T,p+T)
        y = weights.view(B, self.G, n_rows, p + T) @ v                     # (B,G,n_rows,d)
        y = y.view(B, self.H, T, self.d).transpose(1, 2).flatten(2)        # (B,T,H*d)
        return getattr(self, self.out_name)(y), own_kv


class LlamaLayer(nn.Module):
    """x (B,T,D) -> (B,T,D) and the attention's K, V."""

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

    def forward(self, x, prefix, rotary):
        a, kv = self.self_attn(self.input_layernorm(x), prefix, rotary)
        x = x + a
        m = self.post_attention_layernorm(x)
        gate = F.silu(self.mlp.gate_proj(m))  # SwiGLU
        return x + self.mlp.down_proj(gate * self.mlp.up_proj(m)), kv


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

    def forward(self, x, prefix, rotary):
        a, kv = self.self_attn(self.self_attn_layer_norm(x), prefix, rotary)
        x = x + a
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x)))), kv


class LanguageModel(nn.Module):
    """What LLaMA and OPT share: embedding, layers, head, and the way through them."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: keep only each layer's input for the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        tie_head(self)

    def forward(self, tokens, answer_pos=None, prefix=None):
        """Return logits (B,V) at answer_pos (B,) in 0..T-1, or (B,T,V) when it is None.

        tokens: (B,T), or embeddings (B,T,D). prefix: `soft_prompt.prompt_kv` of a phi, whose p
        positions come before the text's.
        """
        state, _ = self.hidden(tokens, answer_pos, prefix)
        return self.lm_head(state)

    def hidden(self, tokens, answer_pos=None, prefix=None):
        """Return the state that lm_head reads, (B,D) or (B,T,D), and each layer's own K, V."""
        p = prefix[0][0].shape[2] if prefix else 0
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        x, rotary = self.add_positions(x, p)
        new_kv = []
        for layer, phi_kv in zip(self.layers, prefix or [None] * len(self.layers)):
            if self.checkpointing:
                x, kv = checkpoint(layer, x, phi_kv, rotary, use_reentrant=False)
            else:
                x, kv = layer(x, phi_kv, rotary)
            new_kv.append(kv)
        if answer_pos is not None:
            x = x[torch.arange(len(x), device=x.device), answer_pos]  # (B,D)
        return self.norm(x), new_kv


class Llama(LanguageModel):
    """LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU."""
    file_prefix = "model."

    def __init__(self, config):
        super().__init__(config, LlamaLayer)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def add_positions(self, x, p):
        """Return x itself and cos, sin (2,T,d) of positions p ... p+T-1 (RoFormer, Eq. 34)."""
        d, T = self.config.head_dim, x.shape[1]
        frequency = self.config.rope_theta ** (-torch.arange(0, d, 2, device=x.device) / d)
        angle = torch.arange(p, p + T, device=x.device)[:, None] * frequency  # (T,d/2)
        angle = torch.cat([-angle, angle], dim=-1)  # (T,d); sin(-a) = -sin(a): see `rotate`
        return x, torch.stack([angle.cos(), angle.sin()]).to(x.dtype)


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

    def add_positions(self, x, p):
        """Return x plus its learned positions, which start after phi's p, and no rotary tables."""
        T, most = x.shape[1], self.config.max_position_embeddings
        if p + T > most:
            raise InputError(f"{p} + {T} tokens; OPT has {most} positions; lower --max-len or --p")
        return x + self.embed_positions(torch.arange(p, p + T, device=x.device) + 2), None


# ---- support: checkpoint files, devices --------------------------------------------------------

def tie_head(model):
    """Use one matrix for embedding and head where config.json says so."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def build(config):
    """Return a Llama or OPT with random weights (none under `torch.device("meta")`)."""
    return Llama(config) if config.model_type == "llama" else OPT(config)


def load_model(dir, weights="nf4", device="cpu", dtype="fp32"):
    """Return the frozen model of a checkpoint directory. InputError for files that do not fit.

    weights: "nf4" (every matrix except embedding and head in 4 bits), "bf16" or "fp32".
    dtype: with "nf4", the precision ("bf16" or "fp32") of all that is not in 4 bits.
    Tensors are read and quantised one at a time.
    """
    precision = dtype if weights == "nf4" else weights
    torch_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = build(read_config(dir))
    for name, tensor in find_tensors(dir, model).items():
        place, _, leaf = name.rpartition(".")
        layer = model.get_submodule(place)
        if weights == "nf4" and name.startswith("layers.") and tensor.dim() == 2:
            model.set_submodule(place, Linear4bit(tensor.to(device), layer.bias))
        else:
            tensor = tensor.to(device, torch_dtype, copy=True)  # no view of the mapped file
            setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False))
    tie_head(model)
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


def save_model(model, dir):
    """Write a model without NF4 and LoRA layers (`lora.merge_lora`) as transformers reads it."""
    # a tied head is listed once, as the embedding
    tensors = {file_name(model, name): w for name, w in model.named_parameters()}
    write_tensors(Path(dir) / "model.safetensors", tensors)
    write_json(Path(dir) / "config.json", vars(model.config) | {
        "ffn_dim": model.config.intermediate_size})  # OPT's name for it


@contextmanager
def atomic_write(path):
    """Yield a temporary path; then rename it to `path`, so that a file is complete or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
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
    for key in keys:
        if key not in value:
            raise InputError(f"{path}: no {key!r} in it; expected {expected}")
    return value


def read_tensors(dir, stem):
    """Return {name: tensor}, memory-mapped, of dir/stem.safetensors or .bin, or of its shards."""
    tensors, paths = {}, sorted(Path(dir).glob(f"{stem}*.safetensors"))
    for path in paths or sorted(Path(dir).glob(f"*{stem}*.bin")):
        try:
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:  # weights_only: a pickle that brings code of its own is refused
                tensors |= torch.load(path, "cpu", weights_only=True, mmap=True)
        except Exception as e:  # a damaged file may raise anything
            reason = str(e).partition("\n")[0]
            raise InputError(f"{path}: not readable as tensors ({reason}); download it again")
    if not tensors:
        raise InputError(f"{dir}: no {stem}.safetensors or .bin; expected a checkpoint")
    return tensors


def find_tensors(dir, model):
    """Return {parameter name: tensor} of a checkpoint, exactly the model's parameters."""
    found = {}
    for name_in_file, tensor in read_tensors(dir, "model").items():
        name = name_in_file.removeprefix("model.").removeprefix("decoder.")
        if not name.endswith("rotary_emb.inv_freq"):  # constants in LLaMA-2's published files
            found[name] = tensor
    if model.config.tie_word_embeddings and "lm_head.weight" in found:  # stored once or twice
        found.setdefault("embed_tokens.weight", found.pop("lm_head.weight"))
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
    write_tensors(Path(dir) / "adapter_model.safetensors", tensors)
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


def check_device(device):
    """InputError for a device that is not there."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {device}: no such device here; expected cpu, or cuda on a GPU")
