"""SPUL: a soft prompt that makes a language model unlearn. Karuna Bhaila, Minh-Hao Van, Xintao Wu, NAACL 2025.

    python unlearn.py                                                            the embedded toy, on the CPU
    python unlearn.py --model DIR --dataset sst2 --data-dir DIR --method spul ga     the real thing

In reading order: the loss (Section 3), the methods, the one training loop, the three stages that use it (pretraining the
embedded LM, QLoRA, unlearning), the grid, the command line.
"""
import argparse
import copy
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import sys
import time
import warnings
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
from model import Config, build, check_device, fast_bf16, read_json, save_model, sweep, tie, whole, write_json
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
    """A way to unlearn. One of your own is one loss and one entry below."""
    loss: Callable
    forget_answer: str        # what y holds on the forget set: a generic, the true or a random answer
    trains: str               # "prompt" or "weights"
    flags: tuple              # which of alpha, beta and p its result depends on
    sees_retain: bool = True


METHODS = {
    "spul": Method(spul_loss, "generic", "prompt", ("alpha", "beta", "p")),
    "ga": Method(baselines.ga_loss, "true", "weights", (), sees_retain=False),
    "rl": Method(baselines.rl_loss, "random", "weights", (), sees_retain=False),
    "ga+kl": Method(baselines.ga_kl_loss, "true", "weights", ("beta",)),
    "ga+gd": Method(baselines.ga_gd_loss, "true", "weights", ("alpha",)),
}


# ------------------------------------------------------------------------------------------ the training loop

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` of the steps, then a cosine down to 0."""
    first = max(1, round(warmup * steps))
    if step < first:
        return peak * (step + 1) / first
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def train(stage, params, batches, loss_of, epochs, lr, run, seed=0, warmup=0.1, clip=0.3, accumulate=1,
          state=None, fingerprint="", after_epoch=None):
    """The one training loop, of pretraining, QLoRA, SPUL and every baseline.

    params: tensors to train; batches(epoch) -> the epoch's batches; loss_of(batch) -> loss, parts; state: a file that
    keeps the last finished epoch. All randomness of an epoch follows from (seed, stage, epoch), so a run that was cut
    off goes on from that file to the very same numbers. -> {"epochs", "seconds_per_epoch", "tokens_per_second"}
    """
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.001, fused=True)
    steps_per_epoch = -(-len(batches(0)) // accumulate)
    done, seconds, tokens = restore(state, fingerprint, params, optimizer)
    run.rewind(stage, done * steps_per_epoch)
    for epoch in range(done, epochs):
        torch.manual_seed(derived_seed(seed, stage, epoch))
        todo, step = batches(epoch), epoch * steps_per_epoch
        for i, batch in enumerate(todo):
            if i % accumulate == 0:
                began = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, epochs * steps_per_epoch, lr, warmup)
            loss, parts = loss_of(batch)
            (loss / accumulate).backward()
            if (i + 1) % accumulate and i + 1 < len(todo):
                continue
            sum_gradients(params)
            norm, step = whole_tensor(torch.nn.utils.clip_grad_norm_(params, clip)), step + 1
            if not (loss.isfinite() & norm.isfinite()):  # no such step reaches the weights, nor what `keep` writes
                raise ValueError(f"{stage}: at step {step} the loss is {loss.item():g}, its gradient {norm.item():g} long; "
                                 f"lower the learning rate (the last finished epoch is kept in {run.dir})")
            optimizer.step()
            optimizer.zero_grad()
            seconds, tokens = seconds + time.perf_counter() - began, tokens + accumulate * batch[0].numel()
            run.log(stage, f"{epoch + 1}/{epochs}", step, epochs * steps_per_epoch, loss, parts, group["lr"],
                    time.perf_counter() - began)
        keep(state, fingerprint, params, optimizer, epoch + 1, seconds, tokens)
        if after_epoch:
            after_epoch(f"{stage} {epoch + 1}/{epochs}")
    return {"epochs": epochs, "seconds_per_epoch": round(seconds / max(1, epochs), 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-9))}


def derived_seed(*parts):
    """A seed that follows from the parts alone."""
    return int(fingerprint_of(parts), 16) % 2 ** 31


# ------------------------------------------------------------------------- what a run leaves behind, and finds again

def fingerprint_of(*what):
    """A short hash of numbers, strings, lists and dicts: a file made from other ones is stale."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def keep(state, fingerprint, params, optimizer, epoch, seconds, tokens):
    """Writes all that training needs to go on after `epoch`."""
    if state and is_main():
        with whole(state) as part:
            torch.save({"fingerprint": fingerprint, "epoch": epoch, "seconds": seconds, "tokens": tokens,
                        "params": [w.detach() for w in params], "optimizer": optimizer.state_dict()}, part)


def restore(state, fingerprint, params, optimizer):
    """Puts back what `keep` wrote, if it is there and was made by the same settings. -> epochs done, seconds, tokens"""
    if not state or not Path(state).is_file():
        return 0, 0.0, 0
    try:
        saved = torch.load(state, weights_only=True, map_location=params[0].device)
        if saved["fingerprint"] != fingerprint:
            print(f"{state} was made with other settings; this stage starts anew")
            return 0, 0.0, 0
        for w, kept in zip(params, saved["params"], strict=True):
            w.data.copy_(kept.view_as(w))
        optimizer.load_state_dict(saved["optimizer"])
        print(f"going on after epoch {saved['epoch']}, from {state}")
        return int(saved["epoch"]), float(saved["seconds"]), int(saved["tokens"])
    except Exception as e:
        raise ValueError(f"{state}: torn or foreign ({type(e).__name__}); expected this run's training state: delete it "
                         "to start this stage anew") from None


COLUMNS = ("stage", "epoch", "step", "loss", "L_f", "L_r", "L_kl", "lr", "ms")


class Run:
    """A run directory: args.json, log.csv, adapter/, prompt/ and results.json, whose rows survive what comes after."""

    def __init__(self, dir, args):
        self.dir, self.every, self.args, self.cells = Path(dir), args.log_every, vars(args), {}
        self.factors = {}  # of L_r and L_kl, for the log line
        self.results = self.dir / "results.json"
        if self.results.is_file():
            self.cells = {row["cell"]: row for row in evaluate.read_rows(dir)}
        if is_main():
            sweep(self.dir)
            write_json(self.dir / "args.json", self.args)

    def rewind(self, stage, step):
        """Drops what log.csv holds of this stage after `step`, of an epoch cut off or of other settings, and a torn row."""
        if is_main():
            (self.dir / "log.csv").touch()
            with open(self.dir / "log.csv", newline="", errors="replace") as f:
                rows = [row for row in csv.reader(f) if len(row) == len(COLUMNS)]
            with whole(self.dir / "log.csv") as part, open(part, "w", newline="") as f:
                csv.writer(f).writerows([row for row in rows if row[0] != stage or int(row[2]) <= step] or [COLUMNS])

    def log(self, stage, epoch, step, steps, loss, parts, lr, seconds):
        """One line of log.csv for each step, and of the screen every so often."""
        loss, parts = loss.item(), {k: v.item() for k, v in parts.items()}
        if not is_main():
            return
        with open(self.dir / "log.csv", "a", newline="") as f:
            csv.writer(f).writerow([stage, epoch, step, f"{loss:.6g}", *(f"{parts[k]:.6g}" if k in parts else "" for k in
                                    ("L_f", "L_r", "L_kl")), f"{lr:.3e}", f"{1000 * seconds:.0f}"])
        if step % self.every == 0 or step == steps:
            terms = " + ".join(f"{self.factors[k]:g} {k} {v:.3f}" if k in self.factors else f"{k} {v:.3f}"
                               for k, v in parts.items())
            left = seconds * (steps - step)
            print(f"{stage}  epoch {epoch}  step {step}/{steps}  loss {loss:.3f} = {terms}  lr {lr:.1e}  "
                  f"{1000 * seconds:.0f} ms  eta {int(left // 60)}m{int(left % 60):02d}s", flush=True)

    def finish(self, cell, fingerprint, row):
        """Adds a row to results.json and prints it as a line of Table 2."""
        self.cells[cell] = {"cell": cell, "fingerprint": fingerprint, **row}
        self.write()

    def write(self):
        """results.json; then the training states of its rows have served."""
        if is_main():
            write_json(self.results, {"args": self.args, "rows": list(self.cells.values())})
            for cell in self.cells:
                (self.dir / f"state-{cell}.pt").unlink(missing_ok=True)

    def finished(self, cell, fingerprint):
        """The row of this cell, if an earlier run with the same settings has it; a row of other settings is dropped."""
        row = self.cells.get(cell)
        if row and row.get("fingerprint") != fingerprint:
            for key, other in list(self.cells.items()):  # with Vanilla goes its seed: all rows stand on the same base model
                if key == cell or row["method"] == "vanilla" and other.get("seed") == row.get("seed"):
                    print(f"{key} in {self.results} was made with other settings; its row is dropped")
                    del self.cells[key]
            self.write()  # before its files are written anew: a row and files that do not belong together never meet
        return self.cells.get(cell)

    def place(self, kind, cell):
        """The directory for a cell's prompt, adapter or weights: RUN/kind, or RUN/kind-CELL when that is taken."""
        other = [row for key, row in self.cells.items() if key != cell and row.get("files") == kind]
        return f"{kind}-{cell}" if other else kind


# ------------------------------------------------------------------------------------------- many processes (torchrun)

def is_main():
    """Whether this process is the one that writes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def all_rows(mine, n):
    """This process's rows (b,V) -> every process's (n,V), of which only the own carry a gradient.

    So each process computes the loss of the whole batch exactly as one process alone would, and the sum of all
    processes' gradients is the gradient; no loss needs to know that there are several.
    """
    if not torch.distributed.is_initialized():
        return mine
    world = torch.distributed.get_world_size()
    sizes = [n * (k + 1) // world - n * k // world for k in range(world)]
    padded = torch.zeros(max(sizes), *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    padded[:len(mine)] = mine.detach()
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    parts = [part[:size] for part, size in zip(parts, sizes)]
    parts[torch.distributed.get_rank()] = mine
    return torch.cat(parts)


def sum_gradients(params):
    """Adds up the processes' gradients: of phi's encoder, of LoRA, or of the weights, never of what is frozen."""
    if torch.distributed.is_initialized():
        for w in params:
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
            if is_sharded(w):
                w.grad *= torch.distributed.get_world_size()  # fully_shard has added them up, and divided by their number
            else:
                torch.distributed.all_reduce(w.grad)


def shard(model):
    """Spreads weights, gradients and AdamW's state over the processes, in place: each keeps 16 bytes a parameter / N.

    PyTorch's fully_shard puts one layer's weights together as that layer computes, and takes them apart again.
    """
    from torch.distributed.fsdp import fully_shard  # here: it takes a second, which one process alone need not wait
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # V, which nothing writes to
    mesh = torch.distributed.init_device_mesh(model.lm_head.weight.device.type, (torch.distributed.get_world_size(),))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)


def is_sharded(w):
    """Whether this process holds but a part of the tensor (a DTensor)."""
    return hasattr(w, "full_tensor")


def whole_tensor(w):
    """The tensor itself, or put together from all processes."""
    return w.full_tensor() if is_sharded(w) else w


def unshard(model):
    """-> a sharded model put together again in every process, for evaluation, which shares the texts out."""
    with torch.device("meta"):
        plain = build(model.config)
    plain.load_state_dict({name: whole_tensor(w) for name, w in model.state_dict().items()}, assign=True)
    tie(plain)
    return plain.eval()


# --------------------------------------------------------------------------------------------- stage 1: an embedded LM

# word-level vocabulary and 0.8 M parameters for the toy; 4,000 pieces and 5.2 M parameters for a corpus of one's own
RECIPES = {
    "toy": dict(model_type="word", vocab_size=1000, D=128, layers=4, heads=4, batch=64, std=0.02, clip=1.0,
                stages=[dict(steps=400, lr=2e-3, lists=0.35, text_weight=0.1)]),
    "corpus": dict(model_type="bpe", vocab_size=4000, D=256, layers=4, heads=8, batch=64, std=0.03, clip=1.0,
                   stages=[dict(steps=500, lr=1.5e-3, lists=0.6, text_weight=0.2),
                           dict(steps=1500, lr=1.5e-3, lists=0.15, text_weight=0.2)]),
}


def embedded_lm(dataset, corpus, names, dir, args):
    """Pretrains the embedded LM, unless `dir` holds the one that this very corpus and recipe give. -> dir

    corpus: [(Example, person or None)]; dir becomes a checkpoint directory in Hugging Face's layout.
    """
    recipe = RECIPES["toy" if dataset == "toy" else "corpus"]
    fingerprint = fingerprint_of(recipe, corpus, names, torch.__version__)
    made = dir / "fingerprint.json"
    found = read_json(made, "an embedded LM", ["fingerprint"]) if made.is_file() else {}
    if found.get("fingerprint") == fingerprint:
        print(f"the embedded LM is in {dir}")
        return dir
    if found:
        print(f"{dir} was made from other texts or settings; it is made anew")
    if is_main():
        made.unlink(missing_ok=True)  # half made anew, it must not pass for the old one
        pretrain(recipe, fingerprint, corpus, names, dir, args)
        write_json(made, {"fingerprint": fingerprint})
        for state in dir.glob("state-*.pt"):
            state.unlink()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return dir


def train_tokenizer(recipe, corpus, names, path):
    """A sentencepiece model of whole words, or of byte-pair pieces in which the names and the answers are whole."""
    words = data.pretraining_words()
    options = dict(user_defined_symbols=["\u2581" + w for w in dict.fromkeys([*names, *data.answer_words()])],
                   byte_fallback=True) if recipe["model_type"] == "bpe" else dict(use_all_vocab=True)
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 200 + [" ".join(names)] + [e.text for e, _ in corpus]),
        model_writer=buffer, model_type=recipe["model_type"], vocab_size=recipe["vocab_size"],
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **options)
    with whole(path) as part:
        part.write_bytes(buffer.getvalue())


def pretrain(recipe, fingerprint, corpus, names, dir, args):
    """Tokenizer and LM from nothing, into dir."""
    train_tokenizer(recipe, corpus, names, dir / "tokenizer.model")
    tokenizer, D = data.load_tokenizer(dir), recipe["D"]
    model = build(Config("llama", tokenizer.size, D, int(D * 2.75) // 16 * 16, recipe["layers"], recipe["heads"],
                         recipe["heads"], D // recipe["heads"], 1024, 1e-5, word_embed_proj_dim=D)).to(args.device)
    torch.manual_seed(derived_seed("pretraining"))
    for name, w in model.named_parameters():
        if w.dim() > 1:  # embeddings and head start large: words that pretraining never asks for stay within reach
            torch.nn.init.normal_(w, 0.0, D ** -0.5 if name.startswith(("embed", "lm_head")) else recipe["std"])
    run = Run(dir, args)
    for number, stage in enumerate(recipe["stages"], 1):
        def batches(epoch):
            rng = data.generator(f"{number}/{epoch}", "pretraining")
            return Lazy(min(100, stage["steps"]), data.pretraining_batches(
                tokenizer, corpus, names, rng, recipe["batch"], stage["lists"], stage["text_weight"]))

        def loss_of(batch):
            tokens, weights = (t.to(args.device) for t in batch)
            counts = weights[:, 1:] > 0
            with autocast(model, args):
                logits = model.lm_head(model.hidden(tokens[:, :-1])[0][counts])  # (N,V): only what counts
            weights = weights[:, 1:][counts]
            loss = (F.cross_entropy(logits.float(), tokens[:, 1:][counts], reduction="none") * weights).sum() / weights.sum()
            return loss, {"L_lm": loss.detach()}

        train(f"pretraining {number}", list(model.parameters()), batches, loss_of, -(-stage["steps"] // 100), stage["lr"],
              run, clip=recipe["clip"], state=dir / f"state-{number}.pt", fingerprint=fingerprint)
    save_model(model, dir)


class Lazy:
    """n batches of an iterator, made one by one as they are asked for."""

    def __init__(self, n, batches):
        self.n, self.batches = n, batches

    def __len__(self):
        return self.n

    def __iter__(self):
        return itertools.islice(self.batches, self.n)


def autocast(model, args):
    """bf16 compute over float32 weights, where --dtype bf16 meets weights that are trained."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16,
                          enabled=args.dtype == "bf16" and model.lm_head.weight.dtype == torch.float32)


# ---------------------------------------------------------------------------------- stages 2 and 3: QLoRA and unlearning

def fit(stage, model, params, loss, prompts, answers, base_hidden, head, args, run, prefix=lambda: None, *, lr, epochs,
        warmup, forget_per_batch=0, fingerprint="", after_epoch=None, seed=0, alpha=1.0, beta=1.0):
    """Trains params on the prompts and their answers (one token each) with one of the losses. -> train's figures

    base_hidden (n,D): the base model's state at every answer; through its head it gives log h(x) of Eq. (4) at a
    fraction of the memory: 0.4 GB in bf16 for LLaMA-2-7B on SST-2, where the log-probabilities are 6 GB.
    """
    def batches(epoch):
        cut = data.epoch_batches(prompts, args.batch, data.generator(f"{seed}/{epoch}", stage), forget_per_batch)
        return Lazy(len(cut), (data.collate(prompts, answers, index, args.device) for index in cut))

    def loss_of(batch):
        share, base = evaluate.my_share(len(batch.y)), None
        with autocast(model, args):
            logits = model(batch.tokens[share], batch.answer_pos[share], prefix())
        if base_hidden is not None:
            with torch.no_grad():
                base = head(base_hidden[batch.index]).float().log_softmax(-1)
        return loss(all_rows(logits, len(batch.y)), base, batch.y, batch.is_forget, alpha, beta)

    state = None if is_sharded(params[0]) else run.dir / f"state-{stage}.pt"  # sharded, a stage cut off starts anew
    figures = train(stage, params, batches, loss_of, epochs, lr, run, seed, warmup, args.clip, args.accumulate,
                    state, fingerprint, after_epoch)
    return {**figures, "flops_per_token": flops_per_token(model, params)}


def flops_per_token(model, params):
    """What the layers' matrix products cost a text token in a step, by which `evaluate.efficiency` judges the speed."""
    last = f"layers.{len(model.layers) - 1}."  # of which only keys and values are computed at every token
    maps = sum(m.in_features * m.out_features for name, m in model.named_modules() if hasattr(m, "in_features") and
               name.startswith("layers.") and (not name.startswith(last) or "k_proj" in name or "v_proj" in name))
    return maps * (6 if sum(w.numel() for w in params) >= maps else 4)  # forward; gradients of inputs, of trained weights


def adapter_place(dir, seed):
    """A run's first seed has RUN/adapter, every other RUN/adapter-seedN."""
    note = Path(dir, "adapter", "fingerprint.json")
    taken = note.is_file() and read_json(note, "a tuned adapter", ["seed"])["seed"] != seed
    return f"adapter-seed{seed}" if taken else "adapter"


def tune_base(model, prompts, args, run, seed, fingerprint):
    """QLoRA, in place: LoRA on the 4-bit model learns the true answers of both sets. -> the figures for its row"""
    dir = run.dir / adapter_place(run.dir, seed)
    note = dir / "fingerprint.json"
    made = read_json(note, "a tuned adapter", ["fingerprint", "figures"]) if note.is_file() else {}
    if made.get("fingerprint") == fingerprint:
        load_adapter(model, dir)
        figures = made["figures"]
    else:
        if made:
            print(f"{dir} was made with other settings; it is made anew")
            note.unlink(missing_ok=True)
        torch.manual_seed(derived_seed(seed, "lora"))
        params = add_lora(model, args.rank, args.lora_alpha, args.lora_dropout, args.targets)
        everyone = prompts["train_retain"] + prompts["train_forget"]

        def loss(logits, base, y, is_forget, alpha, beta):
            L_r = cross_entropy(logits, y, torch.ones_like(is_forget))
            return L_r, {"L_r": L_r}

        model.train()
        figures = fit(f"qlora-seed{seed}", model, params, loss, everyone, [p.label for p in everyone], None, None, args, run,
                      lr=args.qlora_lr, epochs=args.qlora_epochs, warmup=0.05, fingerprint=fingerprint, seed=seed)
        figures["trainable_params"] = sum(w.numel() for w in params)
        if is_main():
            save_adapter(model, dir, args.model or "")
            write_json(note, {"fingerprint": fingerprint, "seed": seed, "figures": figures})
            (run.dir / f"state-qlora-seed{seed}.pt").unlink(missing_ok=True)
    for w in model.parameters():
        w.requires_grad_(False)
    model.eval()
    return figures


def forget_answers(method, prompts, tokens, task, seed):
    """y of every prompt (n,): retain examples the true token, forget examples what the method wants of them."""
    rng = data.generator(seed, f"{method.forget_answer} answers")  # paper: random ; released code: unseeded
    choices = {"generic": task.generic, "random": task.labels}.get(method.forget_answer)
    return [tokens[rng.choice(choices)] if p.is_forget and choices else p.label for p in prompts]


def unlearn(name, model, base_hidden, prompts, answers, args, run, cell, fingerprint, *, alpha, beta, p, lr, seed):
    """One cell of the grid: from the frozen base model -> (model, prefix or None, figures), prompt or weights saved."""
    method = METHODS[name]
    options = dict(lr=lr, alpha=alpha or 0.0, beta=beta or 0.0, seed=seed, fingerprint=fingerprint,
                   epochs=args.epochs if method.trains == "prompt" or args.epochs_given else 1,
                   forget_per_batch=args.forget_per_batch if method.sees_retain else 0)
    torch.manual_seed(derived_seed(seed, cell))
    out = run.dir / run.place("prompt" if method.trains == "prompt" else "weights", cell)
    run.factors = {part: options[k] for part, k in (("L_r", "alpha"), ("L_kl", "beta")) if k in method.flags}
    loss = functools.partial(method.loss, kl_direction=args.kl_direction)
    if method.trains == "prompt":
        encoder = PromptEncoder(p, model.embed_tokens.embedding_dim, args.hidden).to(args.device)
        params = list(encoder.parameters())
        figures = fit(cell, model, params, loss, prompts, answers, base_hidden, model.lm_head, args, run,
                      lambda: prompt_kv(model, encoder()), warmup=0.1, **options)
        with torch.no_grad():
            prefix = prompt_kv(model, encoder())
        if is_main():
            save_prompt(encoder(), out, encoder, args.model or "")
    else:
        tuned, prefix = copy.deepcopy(model), None
        tuned = merge_lora(tuned) if args.tune == "full" else tuned
        for weight, w in tuned.named_parameters():
            w.requires_grad_(args.tune == "full" or "lora_" in weight)
        tuned.checkpointing, sharded = model.checkpointing, args.tune == "full" and torch.distributed.is_initialized()
        if sharded:
            shard(tuned)
        params = [w for w in tuned.parameters() if w.requires_grad]
        figures = fit(cell, tuned, params, loss, prompts, answers, base_hidden, model.lm_head, args, run,
                      warmup=0.05, **options)
        model = (unshard(tuned) if sharded else tuned).requires_grad_(False)
        if is_main():
            save_model(model, out) if args.tune == "full" else save_adapter(model, out, args.model or "")
    return model, prefix, {**figures, "trainable_params": sum(w.numel() for w in params), "files": out.name}


# ---------------------------------------------------------------------------------------------------------- the grid

def prepare(seed, args):
    """A seed's data and pretrained LM -> the LM's directory, its frozen model, the task, {label: token}, {split: [Prompt]},
    and a fingerprint of all that the base model will depend on."""
    task, notes = data.task_of(args), []
    splits = data.load_splits(args.dataset, args.data_dir, seed, args.max_train, args.max_test, notes)
    print("\n".join(notes))
    if args.model:
        lm = args.model
    elif args.dataset == "toy":  # knows nothing of the seed's forget set, so all seeds share it
        lm = embedded_lm("toy", *data.toy_corpus(), Path(args.cache) / "lm-toy", args)
    else:
        corpus, names = data.named_corpus(splits["train_retain"] + splits["train_forget"])
        lm = embedded_lm(args.dataset, corpus, names, Path(args.cache) / f"lm-{args.dataset}-seed{seed}", args)
    tokenizer, model = data.load_tokenizer(lm), evaluate.load_base(lm, args)
    model.checkpointing = args.checkpointing
    if tokenizer.size > model.config.vocab_size:
        raise ValueError(f"{lm}: {tokenizer.size} tokens in the tokenizer, {model.config.vocab_size} in config.json; "
                         "do they belong together?")
    prompts = data.encode_splits(tokenizer, task, splits, args.max_len)
    tokens = data.label_tokens(tokenizer, task, splits["train_retain"][0].text)
    common = fingerprint_of(Path(lm, "config.json").read_text(), splits, task, {k: getattr(args, k) for k in (
        "weights", "dtype", "max_len", "rank", "lora_alpha", "lora_dropout", "targets", "qlora_lr", "qlora_epochs",
        "batch", "accumulate", "clip")}, model.embed_tokens.weight.double().sum().item())
    return lm, model, task, tokens, prompts, common


def run_seed(seed, args, run):
    """Base model and all cells of one seed; finished ones are not run again."""
    lm, model, task, tokens, prompts, common = prepare(seed, args)
    row = dict(method="", model=str(args.model or f"embedded-{args.dataset}"), dataset=args.dataset, seed=seed, alpha=None,
               beta=None, p=None, lr=None, forget_fraction=None)

    def measure(cell, fingerprint, model, prefix, **more):
        with autocast(model, args):
            scores = evaluate.scores(model, prompts, prefix, args.device)
        run.finish(cell, fingerprint, {**row, **more, **scores, "peak_memory_mb": evaluate.peak_memory_mb(args.device)})
        print(evaluate.table2([run.cells[cell]]), flush=True)

    if is_main():
        write_json(run.dir / f"base-seed{seed}.json", {"lm": str(lm), "adapter": adapter_place(run.dir, seed)})
    vanilla, base = f"vanilla-s{seed}", f"qlora-s{seed}"
    if not run.finished(vanilla, common):
        measure(vanilla, common, model, None, method="vanilla", trainable_params=0, epochs=0, seconds_per_epoch=0.0)
    figures = tune_base(model, prompts, args, run, seed, common)
    if not run.finished(base, common):
        measure(base, common, model, None, **{**figures, "method": "qlora", "lr": args.qlora_lr})
    evaluate.check_learned(run.cells[base], prompts)
    model = merge_lora(model, model.lm_head.weight.dtype) if args.merged else model
    base_hidden = None
    for cell in cells(args):
        method, name = METHODS[cell["method"]], cell_name(cell, seed)
        fingerprint = fingerprint_of(common, cell, {k: getattr(args, k) for k in (
            "epochs", "epochs_given", "hidden", "forget_per_batch", "kl_direction", "tune", "merged")})
        if run.finished(name, fingerprint):
            print(f"{name} is done already; its row stands in {run.results}")
            continue
        train_on = training_prompts(prompts, method, cell["forget_fraction"], seed)
        everyone = prompts["train_retain"] + prompts["train_forget"]
        if base_hidden is None:
            base_hidden = evaluate.hidden_states(model, everyone, None, args.device)
        index = torch.tensor([i for i, _ in train_on], device=base_hidden.device)
        chosen = [prompt for _, prompt in train_on]
        answers = forget_answers(method, everyone, tokens, task, seed)
        unlearned, prefix, figures = unlearn(
            cell["method"], model, base_hidden[index], chosen, [answers[i] for i, _ in train_on], args, run, name,
            fingerprint, seed=seed, **{k: cell[k] for k in ("alpha", "beta", "p", "lr")})
        measure(name, fingerprint, unlearned, prefix, **{**cell, **figures})


def training_prompts(prompts, method, fraction, seed):
    """-> [(number among all train prompts, prompt)]: what a method sees; `fraction` of the forget set, Table 4."""
    retain, forget = prompts["train_retain"], prompts["train_forget"]
    kept = data.generator(seed, "forget fraction").sample(range(len(forget)), len(forget))
    kept = sorted(kept[:max(1, round(fraction * len(forget)))])
    return ([(i, p) for i, p in enumerate(retain) if method.sees_retain]
            + [(len(retain) + i, forget[i]) for i in kept])


def cells(args):
    """The grid: every combination of the list-valued flags that matters to the method."""
    grid = []
    for name, fraction in itertools.product(args.method, args.forget_fraction):
        flags = METHODS[name].flags
        axes = [getattr(args, k) if k in flags else [None] for k in ("alpha", "beta", "p")]
        for lr, alpha, beta, p in itertools.product(args.lr.get(name) or args.lr[METHODS[name].trains], *axes):
            grid.append(dict(method=name, forget_fraction=fraction, lr=lr, alpha=alpha, beta=beta, p=p))
    return grid


def cell_name(cell, seed):
    """What a cell's row and files are called, as spul-s0-f1-lr0.003-a1-b1-p20."""
    marks = dict(forget_fraction="f", lr="lr", alpha="a", beta="b", p="p")
    return f"{cell['method']}-s{seed}" + "".join(f"-{m}{cell[k]:g}" for k, m in marks.items() if cell[k] is not None)


# --------------------------------------------------------------------------------------------------- command line

# What each kind of run sets where no flag says otherwise; lr: of all that train a prompt, of all that train weights, and
# of single methods, whose own comes first.
PRESETS = {
    "toy": dict(p=[20], lr={"prompt": 5e-3, "weights": 3e-4, "rl": 1e-4}, epochs=6, batch=32, forget_per_batch=8,
                clip=1.0, targets=["all"], rank=16, qlora_lr=2e-4, qlora_epochs=1, merged=True, dtype="fp32"),
    "embedded": dict(p=[30], lr={"prompt": 3e-3, "weights": 1e-4}, epochs=2, batch=32, forget_per_batch=8, clip=1.0,
                     targets=["all"], rank=32, qlora_lr=1e-3, qlora_epochs=4, merged=True),
    "paper": dict(p=[30], lr={"prompt": 1e-4, "weights": 1e-5}, epochs=10, batch=32, forget_per_batch=0, clip=0.3,
                  targets=["q_proj", "v_proj"], rank=16, qlora_lr=1e-4, qlora_epochs=10, merged=False),
}


def parser():
    """All flags, each with its meaning; None stands for the preset's value."""
    ap = argparse.ArgumentParser(description="Soft prompting for unlearning: a language model forgets a part of its data.")
    add = ap.add_argument
    add("--dataset", default="toy", help=f"one of {', '.join(data.DATASETS)} (default: toy)")
    add("--data-dir", default=".", help="the directory that holds the dataset's files")
    add("--model", help="a LLaMA or OPT checkpoint directory; without it an embedded LM is pretrained and cached")
    add("--method", nargs="+", default=["spul"], help=f"any of {' '.join(METHODS)}")
    add("--alpha", nargs="+", type=float, default=[1.0], help="weight of L_r, Eq. (5)")
    add("--beta", nargs="+", type=float, default=[1.0], help="weight of L_KL, Eq. (5)")
    add("--p", nargs="+", type=int, help="tokens of the soft prompt")
    add("--forget-fraction", nargs="+", type=float, default=[1.0],
        help="part of the forget set that unlearning sees, Table 4")
    add("--seed", nargs="+", type=int, default=[0], help="split, forget set, order, generic answers and initial values")
    add("--lr", nargs="+", type=float, help="learning rate of unlearning; several search the best one")
    add("--epochs", type=int, help="passes of unlearning over its train set (baselines: 1)")
    add("--batch", type=int, help="examples in a batch")
    add("--accumulate", type=int, default=1, help="batches whose gradients make one step")
    add("--forget-per-batch", type=int,
        help="forget examples in each batch; 0 mixes both sets in one pass, as the paper does")
    add("--hidden", type=int, default=128, help="width of phi's encoder")
    add("--kl-direction", choices=["prompted||base", "base||prompted"], default="prompted||base",
        help="Eq. (4), or the released code's")
    add("--tune", choices=["full", "lora"], default="full", help="what the baselines train: every weight, or the adapter")
    add("--merged", action=argparse.BooleanOptionalAction,
        help="unlearn on dense weights, the adapter merged in: fast for a small model (default: for embedded LMs)")
    add("--clip", type=float, help="largest norm of a gradient")
    add("--rank", type=int, help="rank of LoRA")
    add("--lora-alpha", type=float, default=64, help="LoRA's alpha")
    add("--lora-dropout", type=float, default=0.1, help="LoRA's dropout")
    add("--targets", nargs="+", help="linear maps that LoRA adapts, or all")
    add("--qlora-lr", type=float, help="learning rate of QLoRA")
    add("--qlora-epochs", type=int, help="epochs of QLoRA")
    add("--weights", choices=["nf4", "bf16", "fp32"], default="nf4", help="how the frozen model is kept")
    add("--dtype", choices=["fp32", "bf16"],
        help="what is computed in (default: bf16 where the hardware multiplies it; the toy: fp32)")
    add("--device", help="cuda when present, else cpu")
    add("--checkpointing", action="store_true",
        help="keep only each layer's input for the backward pass: less memory, more time")
    add("--max-len", type=int, default=256, help="tokens of a prompt; a longer text loses its end")
    add("--max-train", type=int, help="train examples at most")
    add("--max-test", type=int, help="test examples at most")
    add("--labels", nargs="+", help="the answers, one token each (for --dataset splits)")
    add("--generic", nargs="+", help="the generic answers for the forget set, one token each")
    add("--template", help="the prompt with {text} and {label} (for --dataset splits)")
    add("--out", help="run directory (default: one under runs/)")
    add("--cache", default="runs", help="where embedded LMs are kept")
    add("--log-every", type=int, default=50, help="steps between two lines on the screen")
    add("--threads", type=int, help="CPU threads")
    add("--explain", action="store_true", help="then shows SPUL at work on one forget and one retain example")
    return ap


def parse(argv=None):
    """argv -> args with every preset filled in. ValueError, in one line, for values that make no sense."""
    args = parser().parse_args(argv)
    for name, known in ((args.dataset, data.DATASETS), *((m, METHODS) for m in args.method)):
        if name not in known:
            raise ValueError(f"{name!r} is not implemented; expected one of {', '.join(known)}")
    preset = PRESETS["paper" if args.model else "toy" if args.dataset == "toy" else "embedded"]
    args.epochs_given = args.epochs is not None
    given = args.lr
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.lr = {name: given or [value] for name, value in preset["lr"].items()}
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    positive = ("epochs", "batch", "accumulate", "hidden", "rank", "max_len", "log_every", "clip", "qlora_lr", "lora_alpha",
                "qlora_epochs")
    for key, value in [(k, getattr(args, k)) for k in positive] + [("p", v) for v in args.p] + [
            ("lr", v) for v in given or []] + [("threads", 1 if args.threads is None else args.threads)]:
        if not 0 < value < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} {value}; expected a number above 0")
    if not all(0 < f <= 1 for f in args.forget_fraction) or not all(0 <= w < math.inf for w in args.alpha + args.beta):
        raise ValueError("--forget-fraction lies above 0 and up to 1, --alpha and --beta are 0 or more")
    if not 0 <= args.forget_per_batch < args.batch or not 0 <= args.lora_dropout < 1:
        raise ValueError(f"--forget-per-batch {args.forget_per_batch} must be below --batch {args.batch}; "
                         f"--lora-dropout {args.lora_dropout} below 1")
    check_device(args.device)
    args.dtype = args.dtype or ("bf16" if fast_bf16(args.device) else "fp32")
    args.merged = args.merged and args.tune == "full"  # a merged adapter cannot be tuned on
    stem = f"{Path(args.model).resolve().name if args.model else 'embedded'}-{args.dataset}-{'-'.join(args.method)}"
    args.out = args.out or str(Path("runs") / stem)
    return args


def main(argv=None):
    """The command line: trains, prints and writes every cell of the grid."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if "WORLD_SIZE" in os.environ:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    run = Run(args.out, args)
    started = time.perf_counter()
    for seed in args.seed:
        run_seed(seed, args, run)
    if is_main():
        print(f"\n{evaluate.table2(list(run.cells.values()))}\n\n{run.results}, after "
              f"{time.perf_counter() - started:.0f} s")
        if args.explain:
            print()
            spul = [cell_name(cell, args.seed[0]) for cell in cells(args) if cell["method"] == "spul"]
            evaluate.explain(evaluate.load_run(run.dir, *spul[:1]))


if __name__ == "__main__":
    sys.exit(data.run_cli(main))
