"""The language model h_theta of Section 3.1: LLaMA and OPT by hand, their 4-bit weights and their files.

Axes, once for all files:
    B examples of a batch     T tokens of a text      p tokens of the soft prompt
    D width of the model      V words                 r rank of LoRA
    H attention heads         G key/value heads       d width of a head (H * d = D as a rule)
G equals H, except under grouped-query attention, where H / G query heads share a key/value head.

Parameters bear Hugging Face's names, without the leading `model.` or `model.decoder.`.
Every loaded weight is frozen: SPUL trains none of them.
"""
import json
import math
import os
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------- 4-bit weights

# The 16 values of NormalFloat-4: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
# Dettmers et al., QLoRA, Appendix E; bitsandbytes keeps the same float32 numbers.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
MIDPOINTS = (NF4[:-1] + NF4[1:]) / 2
# Byte 0x2f stands for the values number 2 and 15: one look-up gives both.
PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], dim=1)  # (256,2)


def quantize_nf4(w, block_size=64):
    """w (any shape, n values) -> packed uint8 (ceil(n/2),), absmax float32 (ceil(n/block_size),).

    Each block of 64 values is divided by its largest magnitude and rounded to the nearest NF4 value; two 4-bit codes
    share a byte, the first in the high half. Bit for bit bitsandbytes' result: a tie goes to the lower code, and the
    last, shorter block is divided by absmax where full blocks are multiplied by its inverse.
    """
    flat, packed, scales = w.reshape(-1), [], []
    midpoints = MIDPOINTS.to(w.device)
    for part in flat.split(2 ** 20 // block_size * block_size):  # 1 M values at a time keep the float32 copy small
        full = part.numel() // block_size * block_size
        blocks, rest = part[:full].float().view(-1, block_size), part[full:].float()
        absmax = blocks.abs().amax(1)
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).reshape(-1)
        if rest.numel():
            last = rest.abs().amax().clamp(min=1e-38)
            absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, rest / last])
        codes = torch.bucketize(F.pad(scaled, (0, scaled.numel() % 2)), midpoints, out_int32=True).to(torch.uint8)
        packed.append(codes[::2] << 4 | codes[1::2])
        scales.append(absmax)
    return torch.cat(packed), torch.cat(scales)


def dequantize_nf4(packed, absmax, shape, dtype=torch.float32, block_size=64):
    """packed, absmax as `quantize_nf4` gives them -> weights of `shape` and `dtype`; the product is taken in float32."""
    n = math.prod(shape)
    values = F.embedding(packed.int(), PAIRS.to(packed.device)).view(-1)[:n]  # (n,)
    full = n // block_size
    values[:full * block_size].view(full, block_size).mul_(absmax[:full, None])
    if n % block_size:
        values[full * block_size:].mul_(absmax[-1])
    return values.view(shape).to(dtype)


class _MatMul4bit(torch.autograd.Function):
    """x @ W.T whose backward pass unpacks W again: autograd keeps 4 bits of it, not 16 or 32."""

    @staticmethod
    def forward(ctx, x, packed, absmax, shape):
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        return x @ dequantize_nf4(packed, absmax, shape, x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize_nf4(*ctx.saved_tensors, ctx.shape, grad.dtype), None, None, None


class Linear4bit(nn.Module):
    """y = x W.T + bias with a frozen W (out,in) in NF4: 0.56 bytes a weight, the block scales included."""

    def __init__(self, in_features, out_features, bias=False, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        n = in_features * out_features
        self.register_buffer("packed", torch.zeros(-(-n // 2), dtype=torch.uint8, device=device))
        self.register_buffer("absmax", torch.zeros(-(-n // 64), device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None

    def dense(self, dtype=torch.float32):
        """-> W (out,in)."""
        return dequantize_nf4(self.packed, self.absmax, (self.out_features, self.in_features), dtype)

    def forward(self, x):
        y = _MatMul4bit.apply(x, self.packed, self.absmax, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias


# ------------------------------------------------------------------------------------------- the forward pass

@dataclass
class Config:
    """What the forward pass needs of config.json, under LLaMA's names; the last two are OPT's."""
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
    word_embed_proj_dim: int = 0
    do_layer_norm_before: bool = True


def attend(q, k, v, prefix=None, answer_pos=None):
    """Causal attention of q (B,H,T,d) over k, v (B,G,T,d), after prefix K, V (1,G,p,d) if there are -> (B,T,H*d).

    With answer_pos (B,) q is (B,H,1,d), the query at that position alone. Right padding needs no mask: a real token
    never looks right. Every token may look at the whole soft prompt.
    """
    B, H, T, d = q.shape
    mask, p = None, 0
    if prefix is not None:
        p = prefix[0].shape[2]
        k, v = (torch.cat([a.expand(B, -1, -1, -1), b], dim=2) for a, b in zip(prefix, (k, v)))  # (B,G,p+T,d)
        mask = torch.ones(T, p + T, dtype=torch.bool, device=q.device).tril(p)
    if answer_pos is not None:
        mask = torch.arange(k.shape[2], device=q.device) <= p + answer_pos[:, None, None, None]  # (B,1,1,p+T)
    if k.shape[1] < H:
        k, v = (a.repeat_interleave(H // a.shape[1], dim=1) for a in (k, v))  # (B,H,p+T,d)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # on a CPU its backward pass is 7 times slower than float32's
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, is_causal=mask is None).to(q.dtype)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return y.transpose(1, 2).reshape(B, T, H * d)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32."""

    def __init__(self, D, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(D))

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_angles(T, start, c, like):
    """Cosines and sines (T,d/2) of rotary positions start ... start+T-1 (RoFormer, Eq. 34)."""
    inv_freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=like.device).float() / c.head_dim)
    angles = torch.outer(torch.arange(start, start + T, device=like.device).float(), inv_freq)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x, cos, sin):
    """x (B,H,T,d): turns the pair (x[i], x[i+d/2]) by its angle. Hugging Face's half-split layout, not (2i, 2i+1)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def heads(x, d):
    """(B,T,H*d) -> (B,H,T,d)."""
    return x.view(*x.shape[:2], -1, d).transpose(1, 2)


def at(x, answer_pos):
    """x (B,T,D), answer_pos (B,) -> (B,1,D); x itself when answer_pos is None.

    Only the answer is ever read, so the last layer makes queries there alone, and lm_head reads one position, not T.
    """
    return x if answer_pos is None else x[torch.arange(len(x), device=x.device), answer_pos, None]


class LlamaAttention(nn.Module):
    """x (B,T,D) -> (B,T,D), or (B,1,D) at answer_pos (B,), and K, V (B,G,T,d) with their rotary positions."""
    def __init__(self, c):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.d, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.d, c.hidden_size, bias=False)

    def forward(self, x, prefix, answer_pos, angles):
        q, k, v = (heads(y, self.d) for y in (self.q_proj(at(x, answer_pos)), self.k_proj(x), self.v_proj(x)))
        q = rotate(q, *(angles if answer_pos is None else (a[answer_pos, None, None] for a in angles)))  # (B,1,1,d/2)
        k = rotate(k, *angles)
        return self.o_proj(attend(q, k, v, prefix, answer_pos)), (k, v)


class LlamaMLP(nn.Module):
    """x (B,T,D) -> (B,T,D): SwiGLU."""
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class LlamaLayer(nn.Module):
    """x (B,T,D) -> (B,T,D), or (B,1,D) at answer_pos (B,), and the attention's K, V."""
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = LlamaAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = LlamaMLP(c)

    def forward(self, x, prefix, answer_pos, angles):
        a, kv = self.self_attn(self.input_layernorm(x), prefix, answer_pos, angles)
        x = at(x, answer_pos) + a
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Llama(nn.Module):
    """LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU."""
    file_prefix = "model."

    def __init__(self, c):
        super().__init__()
        self.config, self.checkpointing = c, False
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        tie(self)

    def hidden(self, tokens, answer_pos=None, prefix=None):
        """-> the state h that lm_head reads, (B,D) at answer_pos or (B,T,D), and every layer's K, V (B,G,T,d)."""
        x = embed(self, tokens)
        p = prefix[0][0].shape[2] if prefix else 0
        x, kv = run_layers(self, x, prefix, answer_pos, rotary_angles(x.shape[1], p, self.config, x))
        return self.norm(x), kv

    def forward(self, tokens, answer_pos=None, prefix=None):
        """tokens (B,T) or embeddings (B,T,D), answer_pos (B,) in 0..T-1 -> logits (B,V), or (B,T,V) when it is None.

        prefix is what `soft_prompt.prompt_kv` returns; it takes the positions before the text's.
        """
        return self.lm_head(self.hidden(tokens, answer_pos, prefix)[0])


class OPTAttention(nn.Module):
    """x (B,T,D) -> (B,T,D), or (B,1,D) at answer_pos (B,), and K, V (B,H,T,d)."""
    def __init__(self, c):
        super().__init__()
        self.d = c.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(c.hidden_size, c.hidden_size) for _ in range(4))

    def forward(self, x, prefix, answer_pos):
        q, k, v = (heads(y, self.d) for y in (self.q_proj(at(x, answer_pos)), self.k_proj(x), self.v_proj(x)))
        return self.out_proj(attend(q, k, v, prefix, answer_pos)), (k, v)


class OPTLayer(nn.Module):
    """The norms stand before attention and MLP; in OPT-350m alone after them."""

    def __init__(self, c):
        super().__init__()
        self.pre = c.do_layer_norm_before
        self.self_attn_layer_norm = nn.LayerNorm(c.hidden_size)
        self.self_attn = OPTAttention(c)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size)
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x, prefix, answer_pos):
        a, kv = self.self_attn(self.self_attn_layer_norm(x) if self.pre else x, prefix, answer_pos)
        x = at(x, answer_pos) + a
        x = x if self.pre else self.self_attn_layer_norm(x)
        m = self.fc2(F.relu(self.fc1(self.final_layer_norm(x) if self.pre else x)))
        return (x + m if self.pre else self.final_layer_norm(x + m)), kv


class OPT(nn.Module):
    """OPT (Zhang et al. 2022): learned positions, biases, ReLU, tied head; OPT-350m's narrow embeddings are projected."""
    file_prefix = "model.decoder."

    def __init__(self, c):
        super().__init__()
        self.config, self.checkpointing = c, False
        D, E = c.hidden_size, c.word_embed_proj_dim
        self.embed_tokens = nn.Embedding(c.vocab_size, E)
        self.embed_positions = nn.Embedding(c.max_position_embeddings + 2, D)  # rows 0 and 1 are never used
        self.project_in = nn.Linear(E, D, bias=False) if E != D else None
        self.layers = nn.ModuleList(OPTLayer(c) for _ in range(c.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(D) if c.do_layer_norm_before else None
        self.project_out = nn.Linear(D, E, bias=False) if E != D else None
        self.lm_head = nn.Linear(E, c.vocab_size, bias=False)
        tie(self)

    def hidden(self, tokens, answer_pos=None, prefix=None):
        """As `Llama.hidden`; h has the width of the embeddings, 512 in OPT-350m where D is 1024."""
        x = embed(self, tokens)
        T, p = x.shape[1], prefix[0][0].shape[2] if prefix else 0
        if p + T > self.config.max_position_embeddings:
            raise ValueError(f"{p} prompt tokens and {T} text tokens are more than OPT's "
                             f"{self.config.max_position_embeddings} positions; lower --max-len or --p")
        x = x if self.project_in is None else self.project_in(x)
        x = x + self.embed_positions(torch.arange(p, p + T, device=x.device) + 2)
        x, kv = run_layers(self, x, prefix, answer_pos)
        x = x if self.final_layer_norm is None else self.final_layer_norm(x)
        return (x if self.project_out is None else self.project_out(x)), kv

    forward = Llama.forward


def embed(model, tokens):
    """Token numbers (B,T) -> embeddings (B,T,D); embeddings pass through."""
    return tokens if tokens.is_floating_point() else model.embed_tokens(tokens)


def run_layers(model, x, prefix, answer_pos, *extra):
    """x (B,T,D) through all layers -> x, [(K, V) of each layer]; with answer_pos (B,) x (B,D) is that position's.

    With checkpointing, only the layers' inputs are kept for the backward pass.
    """
    kv, last = [], len(model.layers) - 1
    for i, layer in enumerate(model.layers):
        args = (x, prefix[i] if prefix else None, answer_pos if i == last else None, *extra)
        if model.checkpointing and torch.is_grad_enabled():
            x, layer_kv = checkpoint(layer, *args, use_reentrant=False)
        else:
            x, layer_kv = layer(*args)
        kv.append(layer_kv)
    return x if answer_pos is None else x[:, 0], kv


def tie(model):
    """One matrix for embedding and head where config.json says so."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def build(config):
    """Config -> Llama or OPT with PyTorch's own initial weights; under `torch.device("meta")` it takes no memory."""
    return (Llama if config.model_type == "llama" else OPT)(config)


# ------------------------------------------------------------------------------------------------------ files

# Settings of config.json that the forward pass above has not got: any other value than this one is refused.
ONLY = {"llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None},
        "opt": {"activation_function": "relu", "enable_bias": True, "layer_norm_elementwise_affine": True,
                "_remove_final_layer_norm": False, "tie_word_embeddings": True}}


@contextmanager
def whole(path):
    """Yields a name to write under; then the file appears as `path` in one step, or, after an error, not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # the last two: what torch and safetensors make of a full disk
        reason = str(e).partition("\n")[0]
        raise OSError(f"{path}: not written ({reason}); is the disk full? What stood there before still does") from None
    finally:
        part.unlink(missing_ok=True)


def sweep(dir):
    """Removes what a run that was killed as it wrote has left half written in dir, and in the directories there."""
    for part in [*Path(dir).glob(".*.part"), *Path(dir).glob("*/.*.part")]:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """Writes `value` as indented JSON, whole or not at all."""
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path, expected, keys=()):
    """-> the JSON object in `path`, with these keys. ValueError or OSError, in one line, without; `expected`: what it is."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e}); expected {expected}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a {type(value).__name__}; expected {expected}, a JSON object")
    for key in keys:
        if key not in value:
            raise ValueError(f"{path}: no {key!r} in it; expected {expected}")
    return value


def read_config(dir):
    """dir/config.json, as transformers 4 or 5 writes it -> Config. What is not implemented is refused by name."""
    path = Path(dir) / "config.json"
    raw = read_json(path, "a checkpoint directory in Hugging Face's layout")
    kind = raw.get("model_type")
    if kind not in list(ONLY):
        raise ValueError(f"{path}: model_type {kind!r}; only 'llama' and 'opt' are implemented")
    rope = raw.get("rope_parameters") or {}
    rope = dict(rope if isinstance(rope, dict) else {"rope_type": rope})
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    if rope.pop("rope_type", "default") != "default" or rope.pop("partial_rotary_factor", 1.0) != 1.0 or rope:
        raise ValueError(f"{path}: rope_parameters {raw['rope_parameters']}; only plain rotary positions are implemented")
    for key, value in {**ONLY[kind], "quantization_config": None}.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}; only {value!r} is implemented")
    D, H = (raw.get(key) if type(raw.get(key)) is int else 0 for key in ("hidden_size", "num_attention_heads"))
    c = {"intermediate_size": raw.get("ffn_dim"), "num_key_value_heads": H, "word_embed_proj_dim": D,
         "head_dim": D // max(H, 1), "tie_word_embeddings": kind == "opt",
         **{key: value for key, value in raw.items() if value is not None}, "rope_theta": theta}
    config = Config(**{key: c.get(key, getattr(Config, key, None)) for key in Config.__annotations__})
    check_config(path, config)
    return config


def check_config(path, c):
    """ValueError for sizes that are no sizes, or that do not fit together."""
    for key, kind in Config.__annotations__.items():
        value, limit = getattr(c, key), 1000 if key == "num_hidden_layers" else 2 ** 24
        if kind is int and (type(value) is not int or not 0 < value <= limit):
            raise ValueError(f"{path}: {key} is {value!r}; expected a whole number from 1 to {limit}")
        if kind is float and not (isinstance(value, (int, float)) and 0 < value < 1e12):
            raise ValueError(f"{path}: {key} is {value!r}; expected a positive number")
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{path}: {key} is {value!r}; expected true or false")
    H, G, d, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size
    if H % G or (d % 2 if c.model_type == "llama" else H * d != D or G != H) or H * d > 2 ** 24:
        raise ValueError(f"{path}: {H} heads and {G} key/value heads of width {d} do not fit a model of width {D}")


def config_json(c):
    """Config -> the dict that transformers 4 and 5 both read from config.json."""
    if c.model_type == "llama":
        return {**asdict(c), "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "bos_token_id": 1,
                "eos_token_id": 2}
    return {**asdict(c), "architectures": ["OPTForCausalLM"], "activation_function": "relu", "bos_token_id": 2,
            "eos_token_id": 2, "pad_token_id": 1, "ffn_dim": c.intermediate_size}


def checkpoint_files(dir):
    """-> the weight files of a checkpoint directory: one file, or the shards that an index names."""
    for file in (Path(dir) / "model.safetensors", Path(dir) / "pytorch_model.bin"):
        index = Path(f"{file}.index.json")
        if file.is_file():
            return [file]
        if index.is_file():
            where = read_json(index, "an index of shards").get("weight_map")
            names = sorted({str(name) for name in where.values()}) if isinstance(where, dict) else []
            # a checkpoint may come from a stranger: its shards lie beside the index
            odd = [name for name in names if Path(name).name != name or Path(name).suffix != file.suffix]
            if odd or not names:
                raise ValueError(f"{index}: its map names {odd[:1] or 'no shards'}; expected {file.suffix} files beside it")
            return [file.with_name(name) for name in names]
    raise FileNotFoundError(f"{dir}: no model.safetensors or pytorch_model.bin, single or with an index; "
                            "expected a checkpoint directory in Hugging Face's layout")


def read_tensors(path):
    """One .safetensors or .bin file -> {name: (shape, load)} where load() reads that tensor alone."""
    def load(name):
        with safe_open(path, "pt") as f:  # opened anew for each tensor: closing it gives the mapped pages back
            return checked(name, f.get_tensor(name))

    def checked(name, tensor):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{path}: tensor {name} is {tensor.dtype}; expected float32, float16 or bfloat16")
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            raise ValueError(f"{path}: tensor {name} holds NaN or infinity; is the file damaged?")
        return tensor

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, but one beside it asks for it; was a download cut off?")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                return {n: (tuple(f.get_slice(n).get_shape()), lambda n=n: load(n)) for n in f.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {str(n): (tuple(t.shape), lambda n=n, t=t: checked(n, t)) for n, t in state.items()}
    except Exception as e:  # of many kinds; at pickle.UnpicklingError torch advises to run the code that the file brings
        reason = type(e).__name__ if "Unpickling" in type(e).__name__ else f"{type(e).__name__}: {e}".split("\n")[0]
        raise ValueError(f"{path}: torn, foreign or unsafe ({reason}); expected tensors and nothing else") from None


def read_adapter(dir, kinds, expected):
    """dir, as PEFT writes it, peft_type one of kinds -> adapter_config.json as a dict, and what `read_tensors` gives."""
    raw = read_json(Path(dir) / "adapter_config.json", expected)
    if raw.get("peft_type") not in kinds:
        raise ValueError(f"{dir}: peft_type {raw.get('peft_type')!r}; expected {expected}, {' or '.join(kinds)}")
    for file in (Path(dir) / "adapter_model.safetensors", Path(dir) / "adapter_model.bin"):
        if file.is_file():
            return raw, read_tensors(file)
    raise FileNotFoundError(f"{dir}: no adapter_model.safetensors or adapter_model.bin; expected {expected}")


def write_tensors(path, tensors):
    """Writes {name: tensor} as .safetensors, whole or not at all."""
    with whole(path) as part:
        save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, part, metadata={"format": "pt"})


def find_tensors(dir, model):
    """-> {parameter name: (shape, load)}, exactly the model's parameters in exactly its shapes, or a ValueError."""
    found = {}
    for path in checkpoint_files(dir):
        for name, entry in read_tensors(path).items():
            for prefix in ("model.", "decoder."):
                name = name.removeprefix(prefix)
            if name.endswith("rotary_emb.inv_freq"):  # LLaMA-2's files carry these constants
                continue
            if name in found:
                raise ValueError(f"{dir}: tensor {name} occurs twice; expected it once")
            found[name] = entry
    expected = {n: tuple(w.shape) for n, w in model.named_parameters()}
    if model.config.tie_word_embeddings and "lm_head.weight" in found:
        head = found.pop("lm_head.weight")
        found.setdefault("embed_tokens.weight", head)
    for name in sorted(expected.keys() | found.keys()):
        shape, want = found.get(name, ("missing",))[0], expected.get(name, "no such tensor")
        if shape != want:
            raise ValueError(f"{dir}: tensor {name} is {shape}; config.json asks for {want}")
    return found


def check_device(device):
    """ValueError, in one line, for a device that is not there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device}: no such device here; expected cpu, or cuda where there is a GPU") from None


def fast_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware: a GPU from Ampere on, a CPU with AVX512-BF16 or AMX."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return features.get("avx512_bf16", False) or features.get("amx_bf16", False)


def replace_modules(model, choose):
    """Puts choose(name, module) in the module's place wherever that is not None."""
    for name, module in list(model.named_modules()):
        new = choose(name, module)
        if new is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)


def load_model(dir, weights="nf4", device="cpu", dtype=None):
    """A checkpoint directory in Hugging Face's layout -> a frozen model in eval mode.

    weights: "nf4" (every matrix but embedding and head in 4 bits), "bf16" or "fp32"; dtype: what the rest is kept and
    everything is computed in (by default float32 for "nf4" and "fp32"). Tensors are read and quantised one by one: the
    peak is the finished model plus one tensor. ValueError or OSError, in one line, for files that do not fit.
    """
    if weights not in ("nf4", "bf16", "fp32"):
        raise ValueError(f"weights {weights!r}; expected nf4, bf16 or fp32")
    dtype = dtype or (torch.bfloat16 if weights == "bf16" else torch.float32)
    with torch.device("meta"):
        model = build(read_config(dir))
    found = find_tensors(dir, model)
    if weights == "nf4":
        replace_modules(model, lambda name, m: Linear4bit(m.in_features, m.out_features, m.bias is not None, device="meta")
                        if isinstance(m, nn.Linear) and name != "lm_head" else None)
    for name, (_, load) in sorted(found.items(), key=lambda item: -math.prod(item[1][0])):  # the largest need most room
        layer, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        tensor = load()
        if isinstance(layer, Linear4bit) and leaf == "weight":
            layer.packed, layer.absmax = quantize_nf4(tensor.to(device))
        else:
            setattr(layer, leaf, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
    tie(model)
    return model.eval()


def file_name(model, name):
    """The name of a module or parameter of ours -> its name in Hugging Face's files."""
    return name if name.startswith("lm_head") else model.file_prefix + name


def save_model(model, dir):
    """Writes config.json and model.safetensors as transformers reads them; 4-bit weights are written out unpacked."""
    dtype = model.embed_tokens.weight.dtype
    state = {f"{name}.weight": m.dense(dtype) for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    state |= dict(model.named_parameters())
    if any(".lora_A" in name for name in state):
        raise ValueError("the model has LoRA layers, which a plain checkpoint cannot hold; call merge_lora first")
    write_tensors(Path(dir) / "model.safetensors", {file_name(model, name): w for name, w in state.items()})
    write_json(Path(dir) / "config.json", {**config_json(model.config), "dtype": str(dtype).removeprefix("torch.")})
