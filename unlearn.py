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
from model import (Config, build, check_device, fast_bf16, read_json, reading, save_model, sweep, tie, whole,
                   write_json)
from soft_prompt import PromptEncoder, prompt_kv, save_prompt


# --------------------------------------------------------------------------------------------------- the loss

def spul_loss(logits, base_logprobs, y, is_forget, alpha, beta, kl_direction="prompted||base"):
    """L = L_f + alpha L_r + beta L_KL, Eq. (5).

    logits         (B,V)  h(phi, x) at the answer, with gradient
    base_logprobs  (B,V)  log h(x), without the prompt
    y              (B,)   tokens (int64); forget: a random generic answer; retain: the true one
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
          state=None, fingerprint=""):
    """The one training loop, of pretraining, QLoRA, SPUL and every baseline.

    params: tensors to train; batches(epoch) -> list of the epoch's batches; loss_of(batch) -> loss, parts, how many
    tokens it holds; state: a file that keeps the last finished epoch. All randomness of an epoch follows from (seed,
    stage, epoch), so a run that was cut off goes on from that file to the very same numbers.
    -> {"epochs", "seconds_per_epoch", "tokens_per_second"}. ValueError at a loss or gradient that is not finite.
    """
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.001, fused=True)
    steps_per_epoch = -(-len(batches(0)) // accumulate)
    done, seconds, tokens = restore(state, fingerprint, params, optimizer)
    step, steps = done * steps_per_epoch, epochs * steps_per_epoch
    run.rewind(stage, step)
    for epoch in range(done, epochs):
        torch.manual_seed(derived_seed(seed, stage, epoch))
        todo = batches(epoch)
        for start in range(0, len(todo), accumulate):
            began = time.perf_counter()
            optimizer.param_groups[0]["lr"] = rate = learning_rate(step, steps, lr, warmup)
            for batch in todo[start:start + accumulate]:
                loss, parts, n = loss_of(batch)
                (loss / accumulate).backward()
                tokens += n
            sum_gradients(params)
            norm, step = whole_tensor(torch.nn.utils.clip_grad_norm_(params, clip)), step + 1
            if not (loss.isfinite() & norm.isfinite()):  # no such step reaches the weights, nor what `keep` writes
                raise ValueError(f"{stage}: at step {step} the loss is {loss.item():g}, its gradient {norm.item():g} long; "
                                 f"lower the learning rate (the last finished epoch is kept in {run.dir})")
            optimizer.step()
            optimizer.zero_grad()
            took = time.perf_counter() - began
            seconds += took
            run.log(stage, f"{epoch + 1}/{epochs}", step, steps, loss, parts, rate, took)
        keep(state, fingerprint, params, optimizer, epoch + 1, seconds, tokens)
    return {"epochs": epochs, "seconds_per_epoch": round(seconds / max(1, epochs), 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-9))}


def derived_seed(*parts):
    """A seed that follows from the parts alone."""
    return int(fingerprint_of(parts), 16) % 2 ** 31


def autocast(model, args):
    """bf16 compute over float32 weights, where --dtype bf16 meets weights that are trained."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16,
                          enabled=args.dtype == "bf16" and model.lm_head.weight.dtype == torch.float32)


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
    with reading(state, "this run's training state; delete it to start this stage anew"):
        saved = torch.load(state, weights_only=True, map_location=params[0].device)
        if saved["fingerprint"] != fingerprint:
            print(f"{state} was made with other settings; this stage starts anew")
            return 0, 0.0, 0
        for w, kept in zip(params, saved["params"], strict=True):
            w.data.copy_(kept.view_as(w))
        optimizer.load_state_dict(saved["optimizer"])
        print(f"going on after epoch {saved['epoch']}, from {state}")
        return int(saved["epoch"]), float(saved["seconds"]), int(saved["tokens"])


COLUMNS = ("stage", "epoch", "step", "loss", "L_f", "L_r", "L_kl", "lr", "ms")


class Run:
    """A run directory: args.json, log.csv, adapter/, prompt/ and results.json, whose rows survive what comes after.

    A row of results.json is a cell: vanilla, QLoRA or one point of the grid, for one seed. `files` in it names the
    directory, of its adapter, prompt or weights.
    """

    def __init__(self, dir, args):
        self.dir, self.every, self.cells = Path(dir), args.log_every, {}
        self.args, self.factors = vars(args), {}  # factors: of L_r and L_kl, for the log line
        self.results = self.dir / "results.json"
        if self.results.is_file():
            self.cells = {row["cell"]: row for row in evaluate.read_results(dir)}
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
        if not is_main():
            return
        losses = {"loss": loss.item(), **{k: v.item() for k, v in parts.items()}}
        with open(self.dir / "log.csv", "a", newline="") as f:
            csv.DictWriter(f, COLUMNS, extrasaction="ignore").writerow({
                "stage": stage, "epoch": epoch, "step": step, **{k: f"{v:.6g}" for k, v in losses.items()},
                "lr": f"{lr:.3e}", "ms": f"{1000 * seconds:.0f}"})
        if step % self.every == 0 or step == steps:
            terms = " + ".join(f"{self.factors[k]:g} {k} {losses[k]:.3f}" if k in self.factors else f"{k} {losses[k]:.3f}"
                               for k in parts)
            left = seconds * (steps - step)
            print(f"{stage}  epoch {epoch}  step {step}/{steps}  loss {losses['loss']:.3f} = {terms}  lr {lr:.1e}  "
                  f"{1000 * seconds:.0f} ms  eta {int(left // 60)}m{int(left % 60):02d}s", flush=True)

    def finish(self, cell, fingerprint, row):
        """Adds a row to results.json."""
        self.cells[cell] = {"cell": cell, "fingerprint": fingerprint, **row}
        self.write()

    def write(self):
        """Writes results.json; then the training states of its rows have served."""
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
        taken = any(row.get("files") == kind for key, row in self.cells.items() if key != cell)
        return self.dir / (f"{kind}-{cell}" if taken else kind)


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
    rows, share = mine.new_zeros(n, *mine.shape[1:]), evaluate.my_share(n)
    rows[share] = mine.detach()
    torch.distributed.all_reduce(rows)
    rows[share] = mine
    return rows


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
    if not is_sharded(model.lm_head.weight):
        return model
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


def embedded_lm(splits, seed, args):
    """-> a checkpoint directory: the LM pretrained on the dataset's train texts, unless --cache holds that very one."""
    if args.dataset == "toy":  # knows nothing of any seed's forget set, so all seeds share it
        recipe, dir, (corpus, names) = RECIPES["toy"], Path(args.cache) / "lm-toy", data.toy_corpus()
    else:
        recipe, dir = RECIPES["corpus"], Path(args.cache) / f"lm-{args.dataset}-seed{seed}"
        corpus, names = data.named_corpus(splits["train_retain"] + splits["train_forget"])
    fingerprint = fingerprint_of(recipe, corpus, names, torch.__version__)
    made = dir / "fingerprint.json"
    found = read_json(made, "an embedded LM", ["fingerprint"])["fingerprint"] if made.is_file() else None
    if found == fingerprint:
        print(f"the embedded LM is in {dir}")
        return dir
    if found:
        print(f"{dir} was made from other texts or settings; it is made anew")
    if torch.distributed.is_initialized():
        raise ValueError(f"{dir}: no LM of these texts yet, and one process makes it; run once without torchrun, or give "
                         "--model")
    made.unlink(missing_ok=True)  # half made anew, it must not pass for the old one
    pretrain(recipe, fingerprint, corpus, names, dir, args)
    write_json(made, {"fingerprint": fingerprint})
    for state in dir.glob("state-*.pt"):
        state.unlink()
    return dir


def train_tokenizer(recipe, corpus, names, path):
    """A sentencepiece model of whole words, or of byte-pair pieces in which the names and the answers are whole."""
    options = dict(user_defined_symbols=["\u2581" + w for w in dict.fromkeys([*names, *data.answer_words()])],
                   byte_fallback=True) if recipe["model_type"] == "bpe" else dict(use_all_vocab=True)
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(data.pretraining_words())] * 200 + [" ".join(names)] + [e.text for e, _ in corpus]),
        model_writer=buffer, model_type=recipe["model_type"], vocab_size=recipe["vocab_size"],
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **options)
    with whole(path) as part:
        part.write_bytes(buffer.getvalue())


def pretrain(recipe, fingerprint, corpus, names, dir, args):
    """Tokenizer and LM from nothing, into dir. corpus: [(Example, the person it names or None)]."""
    train_tokenizer(recipe, corpus, names, dir / "tokenizer.model")
    tokenizer, D = data.load_tokenizer(dir), recipe["D"]
    model = build(Config("llama", vocab_size=tokenizer.size, hidden_size=D, intermediate_size=int(D * 2.75) // 16 * 16,
                         num_hidden_layers=recipe["layers"], num_attention_heads=recipe["heads"],
                         num_key_value_heads=recipe["heads"], head_dim=D // recipe["heads"], max_position_embeddings=1024,
                         rms_norm_eps=1e-5, word_embed_proj_dim=D)).to(args.device)
    torch.manual_seed(derived_seed("pretraining"))
    for name, w in model.named_parameters():
        if w.dim() > 1:  # embeddings and head start large: words that pretraining never asks for stay within reach
            torch.nn.init.normal_(w, 0.0, D ** -0.5 if name.startswith(("embed", "lm_head")) else recipe["std"])

    def loss_of(stream):
        tokens, weights = (t.to(args.device) for t in next(stream))
        weights, counts = weights[:, 1:], weights[:, 1:] > 0
        with autocast(model, args):
            logits = model.lm_head(model.hidden(tokens[:, :-1])[0][counts])  # (N,V): only what counts
        losses = F.cross_entropy(logits.float(), tokens[:, 1:][counts], reduction="none") * weights[counts]  # (N,)
        loss = losses.sum() / weights[counts].sum()
        return loss, {"L_lm": loss.detach()}, tokens.numel()

    run = Run(dir, args)
    for number, stage in enumerate(recipe["stages"], 1):
        def batches(epoch):  # each step takes the next batch of the epoch's own stream
            stream = data.pretraining_batches(tokenizer, corpus, names, data.generator(f"{number}/{epoch}", "pretraining"),
                                              recipe["batch"], stage["lists"], stage["text_weight"])
            return [stream] * min(100, stage["steps"])

        train(f"pretraining {number}", list(model.parameters()), batches, loss_of, -(-stage["steps"] // 100), stage["lr"],
              run, clip=recipe["clip"], state=dir / f"state-{number}.pt", fingerprint=fingerprint)
    save_model(model, dir)


# ---------------------------------------------------------------------------------- stages 2 and 3: QLoRA and unlearning

def fit(stage, model, params, loss, prompts, answers, args, run, prefix=lambda: None, base_logprobs=lambda index: None, *,
        lr, epochs, warmup, seed, fingerprint, forget_per_batch=0):
    """Trains params on the prompts and their answers (one token each). -> train's figures

    loss(logits, base_logprobs, y, is_forget) -> loss, parts; prefix() -> the soft prompt's keys and values, if there is
    one; base_logprobs(index (B,)) -> log h(x) (B,V) of these prompts, for the losses that need it.
    """
    def batches(epoch):
        return data.epoch_batches(prompts, args.batch, data.generator(f"{seed}/{epoch}", stage), forget_per_batch)

    def loss_of(index):
        batch, share = data.collate(prompts, answers, index, args.device), evaluate.my_share(len(index))
        with autocast(model, args):
            logits = model(batch.tokens[share], batch.answer_pos[share], prefix())
        total, parts = loss(all_rows(logits, len(index)), base_logprobs(batch.index), batch.y, batch.is_forget)
        return total, parts, batch.tokens.numel()

    state = None if is_sharded(params[0]) else run.dir / f"state-{stage}.pt"  # sharded, a stage cut off starts anew
    figures = train(stage, params, batches, loss_of, epochs, lr, run, seed, warmup, args.clip, args.accumulate,
                    state, fingerprint)
    return {**figures, "trainable_params": sum(w.numel() for w in params), "flops_per_token": flops_per_token(model, params)}


def flops_per_token(model, params):
    """What the layers' matrix products cost a text token in a step, by which `evaluate.efficiency` judges the speed."""
    last = f"layers.{len(model.layers) - 1}."  # of which only keys and values are computed at every token
    maps = sum(m.in_features * m.out_features for name, m in model.named_modules() if hasattr(m, "in_features") and
               name.startswith("layers.") and (not name.startswith(last) or "k_proj" in name or "v_proj" in name))
    return maps * (6 if sum(w.numel() for w in params) >= maps else 4)  # forward; gradients of inputs, of trained weights


def tune_base(model, prompts, args, run, cell, fingerprint, seed):
    """QLoRA: LoRA on the 4-bit model, in place, learns the true answers of both train sets. -> the figures for its row"""
    torch.manual_seed(derived_seed(seed, "lora"))
    params = add_lora(model, args.rank, args.lora_alpha, args.lora_dropout, args.targets)
    everyone, out = prompts["train_retain"] + prompts["train_forget"], run.place("adapter", cell)

    def loss(logits, base_logprobs, y, is_forget):
        L_r = cross_entropy(logits, y, torch.ones_like(is_forget))
        return L_r, {"L_r": L_r}

    model.train()
    figures = fit(cell, model, params, loss, everyone, [q.label for q in everyone], args, run, lr=args.qlora_lr,
                  epochs=args.qlora_epochs, warmup=0.05, seed=seed, fingerprint=fingerprint)
    model.requires_grad_(False).eval()
    if is_main():
        save_adapter(model, out, args.model or "")
    return {**figures, "files": out.name}


def copy_to_tune(model, args):
    """-> a copy for the baselines: every weight trained, sharded if there are several processes, or the adapter alone."""
    tuned = copy.deepcopy(model)
    if args.tune == "lora":
        for name, w in tuned.named_parameters():
            w.requires_grad_("lora_" in name)
        return tuned
    tuned = merge_lora(tuned, torch.float32).requires_grad_(True)
    if torch.distributed.is_initialized():
        shard(tuned)
    return tuned


def unlearn(point, cell, model, base_hidden, prompts, answers, args, run, fingerprint, seed):
    """One point of the grid, from the frozen base model -> (model, prefix or None, figures), its prompt or weights saved.

    base_hidden (n,D): the base's state at every answer; through its head it gives log h(x) of Eq. (4) at a fraction of
    the memory: 0.4 GB in bf16 for LLaMA-2-7B on SST-2, where the log-probabilities are 6 GB.
    """
    method, alpha, beta = METHODS[point["method"]], point["alpha"] or 0.0, point["beta"] or 0.0
    out = run.place(method.trains, cell)
    run.factors = {part: point[k] for part, k in (("L_r", "alpha"), ("L_kl", "beta")) if point[k] is not None}

    def loss(*tensors):
        return method.loss(*tensors, alpha, beta, kl_direction=args.kl_direction)

    @torch.no_grad()
    def base_logprobs(index):
        return model.lm_head(base_hidden[index]).float().log_softmax(-1)

    torch.manual_seed(derived_seed(seed, cell))
    if method.trains == "prompt":
        encoder = PromptEncoder(point["p"], model.embed_tokens.embedding_dim, args.hidden).to(args.device)
        tuned, params, warmup = model, list(encoder.parameters()), 0.1
    else:
        encoder, tuned, warmup = None, copy_to_tune(model, args), 0.05
        params = [w for w in tuned.parameters() if w.requires_grad]

    def prefix():
        return encoder and prompt_kv(model, encoder())

    figures = fit(cell, tuned, params, loss, prompts, answers, args, run, prefix, base_logprobs, lr=point["lr"],
                  epochs=args.epochs[method.trains], warmup=warmup, seed=seed, fingerprint=fingerprint,
                  forget_per_batch=args.forget_per_batch if method.sees_retain else 0)
    tuned = unshard(tuned).requires_grad_(False)
    if is_main():
        if encoder:
            save_prompt(encoder(), out, encoder, args.model or "")
        elif args.tune == "full":
            save_model(tuned, out)
        else:
            save_adapter(tuned, out, args.model or "")
    with torch.no_grad():
        return tuned, prefix(), {**figures, "files": out.name}


# ---------------------------------------------------------------------------------------------------------- the grid

def prepare(seed, args):
    """-> evaluate.Loaded with the seed's data and pretrained LM, and a fingerprint of all that the base will depend on."""
    notes = []
    splits = data.load_splits(args.dataset, args.data_dir, seed, args.max_train, args.max_test, notes)
    print("\n".join(notes))
    loaded = evaluate.load(args.model or embedded_lm(splits, seed, args), args, splits)
    settings = {k: getattr(args, k) for k in ("weights", "dtype", "max_len", "rank", "lora_alpha", "lora_dropout", "targets",
                                              "qlora_lr", "qlora_epochs", "batch", "accumulate", "clip")}
    weights = loaded.model.embed_tokens.weight.double().sum().item()
    return loaded, fingerprint_of(Path(loaded.lm, "config.json").read_text(), weights, splits, loaded.task, settings)


def run_seed(seed, args, run):
    """Base model and all cells of one seed; finished ones are not run again."""
    loaded, common = prepare(seed, args)
    model, prompts = loaded.model, loaded.prompts
    everyone, base_hidden = prompts["train_retain"] + prompts["train_forget"], None
    same = dict(method="", model=args.model or f"embedded-{args.dataset}", lm=str(loaded.lm), dataset=args.dataset,
                seed=seed, merged=args.merged, tune=args.tune, alpha=None, beta=None, p=None, lr=None, forget_fraction=None)

    def measure(cell, fingerprint, model, prefix=None, **row):
        with autocast(model, args):
            scores = evaluate.scores(model, prompts, prefix, args.device)
        run.finish(cell, fingerprint, {**same, **row, **scores, "peak_memory_mb": evaluate.peak_memory_mb(args.device)})
        print(evaluate.table2([run.cells[cell]]), flush=True)

    vanilla, base = f"vanilla-seed{seed}", f"qlora-seed{seed}"
    if not run.finished(vanilla, common):
        measure(vanilla, common, model, method="vanilla", trainable_params=0, epochs=0, seconds_per_epoch=0.0)
    if run.finished(base, common):
        load_adapter(model, run.dir / run.cells[base]["files"])
        model.requires_grad_(False)
    else:
        figures = tune_base(model, prompts, args, run, base, common, seed)
        measure(base, common, model, method="qlora", lr=args.qlora_lr, **figures)
    evaluate.check_learned(run.cells[base], prompts)
    model = merge_lora(model) if args.merged else model
    for point in grid(args):
        method, cell = METHODS[point["method"]], cell_name(point, seed)
        fingerprint = fingerprint_of(common, point, {k: getattr(args, k) for k in (
            "epochs", "hidden", "forget_per_batch", "kl_direction", "tune", "merged")})
        if run.finished(cell, fingerprint):
            print(f"{cell} is done already; its row stands in {run.results}")
            continue
        if base_hidden is None:
            base_hidden = evaluate.hidden_states(model, everyone, None, args.device)
        seen = seen_by(method, everyone, point["forget_fraction"], seed)
        answers = answers_for(method, everyone, loaded, seed)
        tuned, prefix, figures = unlearn(point, cell, model, base_hidden[seen], [everyone[i] for i in seen],
                                         [answers[i] for i in seen], args, run, fingerprint, seed)
        measure(cell, fingerprint, tuned, prefix, **point, **figures)


def seen_by(method, prompts, fraction, seed):
    """The numbers of the train prompts that a method sees: `fraction` of the forget set (Table 4), and the retain set."""
    forget = [i for i, q in enumerate(prompts) if q.is_forget]
    kept = data.generator(seed, "forget fraction").sample(forget, len(forget))[:max(1, round(fraction * len(forget)))]
    return [i for i, q in enumerate(prompts) if not q.is_forget and method.sees_retain] + sorted(kept)


def answers_for(method, prompts, loaded, seed):
    """y of every prompt (n,): retain examples the true token, forget examples what the method wants of them."""
    rng = data.generator(seed, f"{method.forget_answer} answers")  # paper: random ; released code: unseeded
    choices = {"generic": loaded.task.generic, "random": loaded.task.labels}.get(method.forget_answer)
    return [loaded.tokens[rng.choice(choices)] if q.is_forget and choices else q.label for q in prompts]


def grid(args):
    """Every combination of the list-valued flags that matters to the method -> its points, as dicts."""
    points = []
    for name, fraction in itertools.product(args.method, args.forget_fraction):
        flags = METHODS[name].flags
        axes = [getattr(args, k) if k in flags else [None] for k in ("alpha", "beta", "p")]
        for lr, alpha, beta, p in itertools.product(args.lr.get(name) or args.lr[METHODS[name].trains], *axes):
            points.append(dict(method=name, forget_fraction=fraction, lr=lr, alpha=alpha, beta=beta, p=p))
    return points


def cell_name(point, seed):
    """What a point's row and files are called, as spul-s0-f1-lr0.003-a1-b1-p20."""
    marks = dict(forget_fraction="f", lr="lr", alpha="a", beta="b", p="p")
    return f"{point['method']}-s{seed}" + "".join(f"-{m}{point[k]:g}" for k, m in marks.items() if point[k] is not None)


# --------------------------------------------------------------------------------------------------- command line

# What each kind of run sets where no flag says otherwise. lr and epochs: of what trains a prompt, of what trains weights,
# and lr of single methods, which comes first.
PRESETS = {
    "toy": dict(p=[20], lr={"prompt": [5e-3], "weights": [3e-4], "rl": [1e-4]}, epochs={"prompt": 6, "weights": 1}, batch=32,
                forget_per_batch=8, clip=0.3, targets=["all"], rank=16, qlora_lr=2e-4, qlora_epochs=1, merged=True,
                dtype="fp32"),
    "embedded": dict(p=[30], lr={"prompt": [3e-3], "weights": [1e-4]}, epochs={"prompt": 2, "weights": 1}, batch=32,
                     forget_per_batch=8, clip=1.0, targets=["all"], rank=32, qlora_lr=1e-3, qlora_epochs=4, merged=True),
    "paper": dict(p=[30], lr={"prompt": [1e-4], "weights": [1e-5]}, epochs={"prompt": 10, "weights": 1}, batch=32,
                  forget_per_batch=0, clip=0.3, targets=["q_proj", "v_proj"], rank=16, qlora_lr=1e-4, qlora_epochs=10,
                  merged=False),
}


def parser():
    """All flags, each with its meaning; None stands for the preset's value."""
    ap = data.Flags(description="Soft prompting for unlearning: a language model forgets a part of its data.")
    add, several = ap.add_argument, dict(nargs="+")
    count, above_0 = data.number(int), data.number(float)
    zero_up = data.number(float, "of 0 or more", lambda v: 0 <= v < math.inf)
    add("--dataset", choices=data.DATASETS, default="toy", help="what is learned and partly forgotten (default: toy)")
    add("--data-dir", default=".", help="the directory that holds the dataset's files")
    add("--model", help="a LLaMA or OPT checkpoint directory; without it an embedded LM is pretrained and cached")
    add("--method", **several, choices=METHODS, default=["spul"], help="ways to unlearn")
    add("--alpha", **several, type=zero_up, default=[1.0], help="weight of L_r, Eq. (5)")
    add("--beta", **several, type=zero_up, default=[1.0], help="weight of L_KL, Eq. (5)")
    add("--p", **several, type=count, help="tokens of the soft prompt")
    add("--forget-fraction", **several, type=data.number(float, "above 0 and up to 1", lambda v: 0 < v <= 1), default=[1.0],
        help="part of the forget set that unlearning sees, Table 4")
    add("--seed", **several, type=int, default=[0], help="split, forget set, order, generic answers and initial values")
    add("--lr", **several, type=above_0, help="learning rate of unlearning; several search the best one")
    add("--epochs", type=count, help="passes of unlearning over its train set (baselines: 1)")
    add("--batch", type=count, help="examples in a batch")
    add("--accumulate", type=count, default=1, help="batches whose gradients make one step")
    add("--forget-per-batch", type=data.number(int, "of 0 or more", lambda v: v >= 0),
        help="forget examples in each batch; 0 mixes both sets in one pass, as the paper does")
    add("--hidden", type=count, default=128, help="width of phi's encoder")
    add("--kl-direction", choices=["prompted||base", "base||prompted"], default="prompted||base",
        help="Eq. (4), or the released code's")
    add("--tune", choices=["full", "lora"], default="full", help="what the baselines train: every weight, or the adapter")
    add("--merged", action=argparse.BooleanOptionalAction,
        help="unlearn on dense weights, the adapter merged in: fast for a small model (default: for embedded LMs)")
    add("--clip", type=above_0, help="largest norm of a gradient")
    add("--rank", type=count, help="rank of LoRA")
    add("--lora-alpha", type=above_0, default=64, help="LoRA's alpha")
    add("--lora-dropout", type=data.number(float, "from 0 to below 1", lambda v: 0 <= v < 1), default=0.1,
        help="LoRA's dropout")
    add("--targets", **several, help="linear maps that LoRA adapts, or all")
    add("--qlora-lr", type=above_0, help="learning rate of QLoRA")
    add("--qlora-epochs", type=count, help="epochs of QLoRA")
    add("--weights", choices=["nf4", "bf16", "fp32"], default="nf4",
        help="how the frozen model is kept: in 4 bits, or dense, and then computed in too")
    add("--dtype", choices=["fp32", "bf16"],
        help="what is computed in (default: bf16 where the hardware multiplies it; the toy: fp32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda when present, else cpu")
    add("--checkpointing", action="store_true",
        help="keep only each layer's input for the backward pass: less memory, more time")
    add("--max-len", type=count, default=256, help="tokens of a prompt; a longer text loses its end")
    add("--max-train", type=count, help="train examples at most")
    add("--max-test", type=count, help="test examples at most")
    add("--labels", **several, help="the answers, one token each (for --dataset splits)")
    add("--generic", **several, help="the generic answers for the forget set, one token each")
    add("--template", help="the prompt with {text} and {label} (for --dataset splits)")
    add("--out", help="run directory (default: one under runs/)")
    add("--cache", default="runs", help="where embedded LMs are kept")
    add("--log-every", type=count, default=50, help="steps between two lines on the screen")
    add("--threads", type=count, help="CPU threads")
    add("--explain", action="store_true", help="then shows SPUL at work on one forget and one retain example")
    return ap


def parse(argv=None):
    """argv -> args with every preset filled in. ValueError, in one line, for values that make no sense."""
    args = parser().parse_args(argv)
    preset = PRESETS["paper" if args.model else "toy" if args.dataset == "toy" else "embedded"]
    for key, value in preset.items():
        given = getattr(args, key)
        setattr(args, key, value if given is None else dict.fromkeys(value, given) if isinstance(value, dict) else given)
    if args.forget_per_batch >= args.batch:
        raise ValueError(f"--forget-per-batch {args.forget_per_batch} must be below --batch {args.batch}")
    check_device(args.device)
    args.dtype = args.dtype or ("bf16" if fast_bf16(args.device) else "fp32")
    args.merged = args.merged and args.tune == "full"  # a merged adapter cannot be tuned on
    name = Path(args.model).resolve().name if args.model else "embedded"
    args.out = args.out or str(Path("runs") / f"{name}-{args.dataset}-{'-'.join(args.method)}")
    return args


def main(argv=None):
    """The command line: trains, prints and writes every cell of the grid."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything is put on a GPU
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    run, started = Run(args.out, args), time.perf_counter()
    for seed in args.seed:
        run_seed(seed, args, run)
    if is_main():
        print(f"\n{evaluate.table2(list(run.cells.values()))}\n\n{run.results}, after "
              f"{time.perf_counter() - started:.0f} s")
        if args.explain:
            print()
            spul = [cell_name(point, args.seed[0]) for point in grid(args) if point["method"] == "spul"]
            evaluate.explain(evaluate.load_run(run.dir, *spul[:1]))


if __name__ == "__main__":
    sys.exit(data.run_cli(main))
