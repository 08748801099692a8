"""SPUL: soft prompting for unlearning (Bhaila, Van, Wu, NAACL 2025): the training program.

    python unlearn.py                                          the embedded toy, on the CPU
    python unlearn.py --model DIR --dataset sst2 --data-dir DIR --method spul ga     the real thing

For each seed the base model first learns the data (QLoRA); then each method, starting from that
base model, unlearns the forget set. The loss of Eq. (5) is in soft_prompt.py.
"""
import copy
import itertools
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import evaluate
from baselines import ga_gd_loss, ga_kl_loss, ga_loss, rl_loss
from evaluate import is_rank_zero, my_share
from lora import add_lora, merge_lora, save_adapter
from model import (Config, InputError, atomic_write, build, check_device, read_json, save_model,
                   tie_head, write_json)
from soft_prompt import PromptEncoder, cross_entropy, prompt_kv, save_prompt, spul_loss


class Method(NamedTuple):
    """A way to train. A method of your own is one loss and one entry in METHODS.

    Each term of the loss is a mean over the forget or over the retain examples (`scale_gradient`
    relies on it); the parts named L_f, L_r and L_kl are logged.
    """
    loss: Callable             # (logits, base_logprobs, y, is_forget, alpha, beta) -> loss, parts
    forget_answer: str         # y of a forget example: "generic" (random) or "true"
    trains: str                # "prompt": phi; "weights": all, or with --tune lora the adapter
    flags: tuple = ()          # which of alpha and beta the loss uses
    sees_retain: bool = True   # False: only forget examples are in the batches
    needs_base: bool = False   # True: the loss gets base_logprobs, else None


METHODS = {
    "spul": Method(spul_loss, "generic", "prompt", ("alpha", "beta"), needs_base=True),
    "ga": Method(ga_loss, "true", "weights", sees_retain=False),
    "rl": Method(rl_loss, "generic", "weights", sees_retain=False),
    "ga+kl": Method(ga_kl_loss, "true", "weights", ("beta",), needs_base=True),
    "ga+gd": Method(ga_gd_loss, "true", "weights", ("alpha",)),
}


def qlora_loss(logits, base_logprobs, y, is_forget, alpha, beta):
    """Cross-entropy of every example towards its true answer: how the base model learns."""
    L_ce = cross_entropy(logits, y, ~is_forget)  # `choose_prompts` has marked none as forget
    return L_ce, {"L_ce": L_ce}


QLORA = Method(qlora_loss, "true", "adapter")


# ---- the training loop -------------------------------------------------------------------------

def train(cell, method, model, encoder, prompts, base, args, run):
    """Train phi's encoder, the adapter or all weights: the one loop of QLoRA, SPUL and baselines.

    cell: the settings of this training, a dict that becomes its row of results.json. encoder:
    PromptEncoder, or None to train the model's own trainable parameters. prompts: the examples;
    the label of each is its target y. base: see `gather_base`, or None. run: the Run that logs and
    from which an interrupted training resumes. Returns the row's time and size figures.
    """
    params = [w for w in (encoder or model).parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cell["lr"], betas=(0.9, cell["settings"]["beta2"]),
                                  weight_decay=0.001)
    epochs = cell["settings"]["epochs"]  # args.epochs is phi's: see `make_cell`
    first_epoch, seconds = load_checkpoint(run, cell, params, optimizer)
    for epoch in range(first_epoch, epochs):
        torch.manual_seed(derive_seed(cell, epoch))  # for QLoRA's dropout
        batches = make_batches(prompts, cell, epoch, args)
        for i, indices in enumerate(batches):
            start = time.perf_counter()
            step, steps = epoch * len(batches) + i, epochs * len(batches)
            set_learning_rate(optimizer, step, steps, cell["lr"], 0.1 if encoder else 0.05)
            for index in split_step(indices, cell):  # one part, unless --accumulate is given
                batch = share_of_process(data.collate(prompts, index, args.device))
                base_logprobs = gather_base_logprobs(*base, batch.index) if base else None  # (B,V)
                prefix = prompt_kv(model, encoder()) if encoder else None
                with autocast(model, args):
                    logits = model(batch.tokens, batch.answer_pos, prefix)                  # (B,V)
                scale_gradient(logits, batch.is_forget, indices, prompts)
                loss, parts = method.loss(logits, base_logprobs, batch.y, batch.is_forget,
                                          cell["alpha"], cell["beta"])
                loss.backward()
            sum_gradients(params)
            clip_gradient(params, args.clip, loss, run, cell)
            optimizer.step()
            optimizer.zero_grad()
            took = time.perf_counter() - start
            seconds += took
            run.log(cell, epoch, step, steps, loss, parts, took)
        save_checkpoint(run, cell, params, optimizer, epoch + 1, seconds)
    return {"epochs": epochs, "seconds_per_epoch": round(seconds / epochs, 3),
            "trainable_params": sum(w.numel() for w in params)}


# ---- what a method sees and trains -------------------------------------------------------------

def choose_prompts(method, setup, cell):
    """Return the training examples: D_r, then the first `forget_fraction` of D_f.

    The label of each is its target y: the true token, or a random generic one on the forget set,
    drawn once for all epochs. `gather_base` has h(x) in the same order: do not change it.
    """
    if method.forget_answer not in ("generic", "true"):
        raise ValueError(f"forget_answer {method.forget_answer!r}; expected 'generic' or 'true'")
    forget = setup.prompts["train_forget"]  # `data.load_splits` has shuffled it
    n_seen = max(1, round((cell["forget_fraction"] or 1.0) * len(forget)))
    if method is QLORA and setup.base == "retain":
        n_seen = 0
    rng = data.generator(setup.seed, "generic answers")  # released code: unseeded
    generic = [setup.tokens[label] for label in setup.task.generic]
    prompts = list(setup.prompts["train_retain"]) if method.sees_retain else []
    for prompt in forget[:n_seen]:
        y = rng.choice(generic) if method.forget_answer == "generic" else prompt.label
        # QLoRA does not tell the two sets apart
        prompts.append(prompt._replace(label=y, is_forget=method is not QLORA))
    return prompts


def make_trainable(method, setup, prompts, cell, args):
    """Return the model to run, the PromptEncoder to train or None, and what kind of file it makes.

    SPUL trains an encoder on the frozen base model. QLoRA adds its adapter to the pretrained model,
    in place. The baselines start from a copy of the base model: the dequantised 4-bit weights with
    QLoRA's adapter merged in, as float32, because small steps would be lost in bf16; with
    --tune lora they train that adapter further, without dropout.
    """
    model = setup.model
    if method.trains == "prompt":
        init = initial_phi(model, prompts, cell["p"]) if args.init == "forget" else None
        encoder = PromptEncoder(cell["p"], model.config.hidden_size, args.hidden, init)
        return model, encoder.to(args.device), "prompt"
    if method is QLORA:  # `prepare` loads the base model again
        add_lora(model, args.rank, args.lora_alpha, args.lora_dropout, args.targets)
        return model.train(), None, "adapter"
    if method.trains != "weights":
        raise ValueError(f"trains {method.trains!r}; expected 'prompt' or 'weights'")
    if args.tune == "full":
        tuned = merge_lora(copy.deepcopy(model), torch.float32)
        return shard(tuned.requires_grad_(True)), None, "weights"
    return evaluate.load_base(setup, trainable=True), None, "adapter"  # --tune lora


def initial_phi(model, prompts, p):
    """Return the embeddings (p,D) of the tokens most typical of the forget prompts.

    That is, by the ratio of the number of forget and retain prompts that hold them.
    """
    forget, retain = Counter(), Counter()
    for prompt in prompts:
        (forget if prompt.is_forget else retain).update(set(prompt.ids))
    typical = sorted(forget, key=lambda token: forget[token] / (1 + retain[token]), reverse=True)
    tokens = (typical * p)[:p]  # repeated if there are fewer than p
    return model.embed_tokens.weight[tokens]


# ---- support: one cell, the base model, the grid -----------------------------------------------

def run_cell(setup, args, run, name, **point):
    """Train one cell from setup.model, save and evaluate it. Returns its row, finished or new.

    name: of the method. point: lr, and those of alpha, beta, p and forget_fraction it uses.
    """
    cell = make_cell(setup, args, name, **point)
    method = METHODS.get(name, QLORA)
    row = evaluate.find_row(run.rows, cell)
    if row:
        print(f"{cell['cell']} is in {run.results}, and not trained again")
        return row
    torch.manual_seed(derive_seed(cell, "initial values"))
    prompts = choose_prompts(method, setup, cell)
    base = gather_base(setup, method) if method.needs_base else None
    model, encoder, kind = make_trainable(method, setup, prompts, cell, args)
    cell |= train(cell, method, model, encoder, prompts, base, args, run)
    model = unshard(model).requires_grad_(False).eval()
    phi = encoder().detach() if encoder else None
    prefix = prompt_kv(model, phi) if encoder else None
    cell["files"] = run.directory(kind)
    save_result(model, phi, kind, run.dir / cell["files"], setup.lm)
    if method is QLORA and args.dense:  # as `evaluate.load_base` does: the base model
        merge_lora(model)
    states = split_states(model, setup, prefix)
    row = run.finish(cell, evaluate.scores(model, states, setup.prompts))
    if method is QLORA:
        setup.states = states  # of the base model, for L_KL
    else:
        pred = evaluate.predict(model, states["train_forget"])
        evaluate.print_worst_groups(pred, setup.prompts["train_forget"])
    return row


def split_states(model, setup, prefix=None, splits=data.SPLITS):
    """Return {split: states (n,D)} that lm_head reads at the answers of the prompts."""
    with autocast(model, setup.args):
        return {split: evaluate.answer_states(model, setup.prompts[split], prefix)
                for split in splits}


def gather_base(setup, method):
    """Return lm_head and the base's states (n,D) at the answers, in `choose_prompts`' order.

    h(x) never changes, so its states are computed once, and a batch looks them up by its index.
    """
    if setup.states is None:
        setup.states = split_states(setup.model, setup, splits=("train_retain", "train_forget"))
    retain, forget = setup.states["train_retain"], setup.states["train_forget"]
    return setup.model.lm_head, torch.cat([retain, forget]) if method.sees_retain else forget


def save_result(model, phi, kind, dir, lm):
    """Write what a cell trained: phi, the adapter or all weights."""
    if not is_rank_zero():
        return
    if kind == "prompt":
        save_prompt(phi, dir, lm)
    elif kind == "adapter":
        save_adapter(model, dir, lm)
    else:
        save_model(model, dir)


def prepare(seed, base, args, run):
    """Return the Setup of one seed: its data and its base model, trained or from a finished run."""
    setup = evaluate.load_data(args, seed, args.model or pretrain_toy(args))
    print(data.forgotten(setup.prompts))
    setup.base, setup.run, setup.model = base, run.dir, evaluate.load_base(setup)
    vanilla = make_cell(setup, args, "vanilla")
    if not evaluate.find_row(run.rows, vanilla):
        states = split_states(setup.model, setup)
        run.finish(vanilla, evaluate.scores(setup.model, states, setup.prompts))
    row = run_cell(setup, args, run, "qlora", lr=args.qlora_lr)
    setup.adapter = row["files"]
    setup.model = evaluate.load_base(setup)
    return setup


def grid(args):
    """Yield every combination of the list-valued flags that matters to each method, as dicts."""
    for name in args.method:
        lists = {"forget_fraction": args.forget_fraction, "lr": args.baseline_lr}
        for flag in METHODS[name].flags:
            lists[flag] = getattr(args, flag)
        if METHODS[name].trains == "prompt":
            lists |= {"lr": args.lr, "p": args.p}
        for values in itertools.product(*lists.values()):
            yield {"name": name} | dict(zip(lists, values))


def main(argv=None):
    """Train, print and write every cell of the grid."""
    args = parse(argv)
    start_processes(args)
    run, start = Run(args.out, args), time.perf_counter()
    for seed, base in itertools.product(args.seed, args.base):
        setup = prepare(seed, base, args, run)
        for point in grid(args):
            run_cell(setup, args, run, **point)
    seconds = time.perf_counter() - start
    print(f"\n{evaluate.table(run.rows)}\n\n{run.results}, after {seconds:.0f} s")
    stop_processes()


# ---- support: the parts of a step --------------------------------------------------------------

def make_batches(prompts, cell, epoch, args):
    """Return the prompt indices of each step of an epoch, batch * accumulate of them per step."""
    rng = data.generator(cell["seed"], f"{cell['method']}/batches/{epoch}")
    size, n_forget = cell["settings"]["batch"], cell["settings"]["forget_per_batch"]
    return data.epoch_batches(prompts, size * args.accumulate, rng, n_forget * args.accumulate)


def split_step(indices, cell):
    """Return the prompt indices of a step in parts of at most --batch, or of QLoRA's batch.

    With --forget-per-batch, the forget examples are at the end; each part gets its share of them.
    """
    n_parts = math.ceil(len(indices) / cell["settings"]["batch"])
    return [indices[k::n_parts] for k in range(n_parts)]


def scale_gradient(logits, is_forget, indices, prompts):
    """Make backward() multiply the gradient of each example's logits (B,V) by its `share`.

    The loss of a batch averages over its own forget and retain examples; the objective averages
    over those of the whole step (`indices`), in all parts and processes. So an example's share is
    the number of its kind in the batch / in the step: 1 without --accumulate and torchrun.
    """
    step_forget = sum(prompts[i].is_forget for i in indices)
    step_retain = len(indices) - step_forget
    forget_share = is_forget.sum() / max(1, step_forget)
    retain_share = (~is_forget).sum() / max(1, step_retain)
    share = torch.where(is_forget, forget_share, retain_share).to(logits.dtype)[:, None]  # (B,1)
    logits.register_hook(lambda gradient: share * gradient)


def set_learning_rate(optimizer, step, steps, peak, warmup):
    """Raise the rate linearly over this share of the steps, then lower it along a cosine.

    The shares 0.1 for phi and 0.05 for all others are the released code's.
    """
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        factor = (step + 1) / warmup_steps
    else:
        progress = (step - warmup_steps) / (steps - warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    optimizer.param_groups[0]["lr"] = peak * factor


def gather_base_logprobs(lm_head, states, index):
    """Return log h(x) (B,V) of the prompts of a batch, from the base's states (n,D) of all."""
    return lm_head(states[index]).float().log_softmax(-1)


def autocast(model, args):
    """Compute in bf16 where --dtype bf16 meets float32 weights, such as those of the baselines."""
    weight = model.lm_head.weight
    is_needed = args.dtype == "bf16" and weight.dtype == torch.float32
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=is_needed)


def clip_gradient(params, clip, loss, run, cell):
    """Clip the gradient's norm. InputError when the loss or the norm is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    if is_sharded(norm):
        norm = norm.full_tensor()  # of all processes
    if not norm.isfinite():
        raise InputError(f"{cell['cell']}: loss {loss.item():g}, gradient norm {norm.item():g}; "
                         f"lower the learning rate (the last finished epoch is in {run.dir})")


# ---- support: the embedded toy LM --------------------------------------------------------------

TOY_LM = {"vocab_size": 1000, "D": 128, "steps": 450, "lr": 2e-3}


def pretrain_toy(args):
    """Return the directory of the toy LM, pretrained from scratch unless the cache holds it.

    It knows nothing about any seed's forget set, so all seeds share it. After changing what it
    learns, delete the directory.
    """
    dir = Path(args.cache) / "lm-toy"
    recipe = dir / "recipe.json"
    if recipe.is_file() and read_json(recipe, "the toy LM's settings") == TOY_LM:
        return dir
    if dist.is_initialized():
        raise InputError(f"{dir}: no toy LM yet; run once without torchrun to pretrain it")
    train_tokenizer(dir / "tokenizer.model")
    tokenizer = data.load_tokenizer(dir)
    model = build_toy(tokenizer.size).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.001)
    steps, start = TOY_LM["steps"], time.perf_counter()
    batches = data.pretraining_batches(tokenizer)
    for step in range(steps):
        tokens, weights = [part.to(args.device) for part in next(batches)]  # (B,T), (B,T)
        target, weights = tokens[:, 1:], weights[:, 1:]                     # (B,T-1), (B,T-1)
        counts = weights > 0
        state, _ = model.hidden(tokens[:, :-1])                             # (B,T-1,D)
        losses = F.cross_entropy(model.lm_head(state[counts]), target[counts], reduction="none")
        loss = (losses * weights[counts]).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimizer, step, steps, TOY_LM["lr"], warmup=0.05)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"toy LM  step {step + 1}/{steps}  loss {loss:.3f}  {seconds:.0f} s", flush=True)
    save_model(model, dir)
    write_json(recipe, TOY_LM)
    return dir


def train_tokenizer(path):
    """Write a sentencepiece model of whole words for the toy's reviews."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(data.tokenizer_sentences()), model_writer=file,
            model_type="word", vocab_size=TOY_LM["vocab_size"], hard_vocab_limit=False,
            use_all_vocab=True, minloglevel=2, num_threads=1)


def build_toy(vocab_size):
    """Return the toy LM, a small LLaMA with random weights."""
    D = TOY_LM["D"]
    model = build(Config("llama", vocab_size, D, intermediate_size=352, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4, head_dim=32,
                         max_position_embeddings=1024, rms_norm_eps=1e-5))
    torch.manual_seed(1)
    for name, w in model.named_parameters():
        if w.dim() > 1:  # large embeddings: words that pretraining never asks for stay in reach
            is_embedding = name.startswith(("embed", "lm_head"))
            torch.nn.init.normal_(w, 0.0, D ** -0.5 if is_embedding else 0.06)
    return model


# ---- support: run directories and checkpoints --------------------------------------------------

BASE_SETTINGS = ("model dataset data_dir weights dtype dense max_len max_train max_test labels "
                 "generic template accumulate clip rank lora_alpha lora_dropout targets "
                 "qlora_lr qlora_epochs").split()
PROMPT_SETTINGS = "epochs beta2 forget_per_batch hidden init".split()
# A new flag that changes results belongs in one of these: finished rows are found by them.


def make_cell(setup, args, name, **point):
    """Return a row of results.json without its results: a name and all of its settings."""
    settings = {key: getattr(args, key) for key in BASE_SETTINGS}
    settings |= {"epochs": args.qlora_epochs, "batch": args.qlora_batch or args.batch,
                 "beta2": 0.999, "forget_per_batch": 0}
    base = None if name == "vanilla" else setup.base
    cell = f"{name}-{base}-s{setup.seed}" if base else f"{name}-s{setup.seed}"
    if name in METHODS:
        settings["batch"] = args.batch
        if METHODS[name].trains == "prompt":
            settings |= {key: getattr(args, key) for key in PROMPT_SETTINGS}
        else:
            settings |= {"epochs": args.baseline_epochs, "tune": args.tune,
                         "forget_per_batch": args.forget_per_batch}
            cell += "-lora" if args.tune == "lora" else ""
        for key, value in point.items():
            mark = "lr" if key == "lr" else key[0]
            cell += f"-{mark}{value:g}"
    return {"cell": cell, "method": name, "base": base, "model": args.model or "toy",
            "lm": setup.lm, "dataset": args.dataset, "seed": setup.seed, "forget_fraction": None,
            "lr": None, "alpha": None, "beta": None, "p": None, **point, "files": None,
            "adapter": setup.adapter, "trainable_params": 0, "epochs": 0,
            "seconds_per_epoch": 0.0, "settings": settings}


class Run:
    """A run directory: args.json, log.csv, results.json, and the files of each row."""

    def __init__(self, dir, args):
        self.dir, self.args = Path(dir), args
        self.results = self.dir / "results.json"
        self.rows = evaluate.read_rows([dir]) if self.results.is_file() else []
        if is_rank_zero():
            write_json(self.dir / "args.json", vars(args))

    def finish(self, cell, scores):
        """Add a row to results.json and print it. Returns the row."""
        row = cell | scores
        self.rows.append(row)
        if is_rank_zero():
            write_json(self.results, {"args": vars(self.args), "rows": self.rows})
            self.checkpoint(cell).unlink(missing_ok=True)
        print(evaluate.table([row]), flush=True)
        return row

    def directory(self, kind):
        """Return the directory for a cell's files: `kind`, or `kind-N` if another row has it."""
        is_free = all(row["files"] != kind for row in self.rows)
        return kind if is_free else f"{kind}-{len(self.rows)}"

    def checkpoint(self, cell):
        """Return the path of a cell's training state."""
        return self.dir / f"state-{cell['cell']}.pt"

    def log(self, cell, epoch, step, steps, loss, parts, seconds):
        """Add a line to log.csv, and every 50 steps one to the screen.

        The losses are those of the step's last part, without those of other processes.
        """
        if not is_rank_zero():
            return
        terms = {name: f"{part.item():.4f}" for name, part in parts.items()}
        line = f"{cell['cell']},{epoch + 1},{step + 1},{loss.item():.6g}"
        for name in ("L_f", "L_r", "L_kl"):
            line += f",{terms.get(name, '')}"
        path = self.dir / "log.csv"
        header = "" if path.is_file() else "stage,epoch,step,loss,L_f,L_r,L_kl,seconds\n"
        with open(path, "a", encoding="utf-8") as f:
            f.write(f"{header}{line},{seconds:.3f}\n")
        if (step + 1) % 50 == 0 or step + 1 == steps:
            minutes = seconds * (steps - step - 1) / 60
            shown = "  ".join(f"{name} {value}" for name, value in terms.items())
            print(f"{cell['cell']}  epoch {epoch + 1}  step {step + 1}/{steps}  {shown}  "
                  f"{1000 * seconds:.0f} ms  {minutes:.1f} min left", flush=True)


def derive_seed(cell, purpose):
    """Return a seed that depends on seed, method and purpose: a grid's cells start alike."""
    return data.generator(cell["seed"], f"{cell['method']}/{purpose}").randrange(2 ** 31)


def save_checkpoint(run, cell, params, optimizer, epoch, seconds):
    """Write what training needs to resume after `epoch` (not sharded weights: they start over)."""
    if is_rank_zero() and not is_sharded(params[0]):
        with atomic_write(run.checkpoint(cell)) as temporary:
            torch.save({"cell": cell, "epoch": epoch, "seconds": seconds,
                        "params": params, "optimizer": optimizer.state_dict()}, temporary)


def load_checkpoint(run, cell, params, optimizer):
    """Restore what `save_checkpoint` wrote for this cell. Returns epochs done and seconds."""
    path = run.checkpoint(cell)
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, "cpu", weights_only=True)
    if state["cell"] != cell:
        print(f"{path} has other settings; {cell['cell']} starts from its first epoch")
        return 0, 0.0
    for w, saved in zip(params, state["params"], strict=True):
        w.data.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    print(f"{cell['cell']} resumes after epoch {state['epoch']}")
    return state["epoch"], state["seconds"]


# ---- support: flags ----------------------------------------------------------------------------

# name (* takes several values), type, default of each preset (one if they agree, - is none), help
PRESETS = ("paper", "small", "toy")
FLAGS = """
data
--dataset           toy|sst2|yelp|wmdp+sciq|splits  toy  what is learned and forgotten
--data-dir          text     .    directory of the dataset's files
--max-train         count    -    at most this many train retain examples (Yelp: reviews)
--max-test          count    -    at most this many test retain examples (Yelp: reviews)
--max-len           count    1024  256  256  tokens per prompt; longer texts are cut
--labels*           text     -    answers, one token each
--generic*          text     -    generic answers for the forget set
--template          text     -    prompt with {text} and {label}
model
--model             text     -    LLaMA or OPT checkpoint directory (the toy: pretrained here)
--weights           nf4|bf16|fp32  nf4  how the frozen weights are stored
--dense             switch   -    yes  yes  unpack NF4 once: faster steps, more memory
--dtype             fp32|bf16  -  compute dtype (default: bf16 on a GPU that has it, else fp32)
--device            text     -    cpu or cuda (default: cuda where there is a GPU)
--checkpointing     switch   -    recompute layers in the backward pass: less memory, more time
base model (QLoRA)
--base*             full|retain  full  what it learns: all, or the retain set (retrained reference)
--rank              count    16   rank of LoRA
--lora-alpha        float>0  64   LoRA's alpha
--lora-dropout      0..<1    0.1  0    0.1  LoRA's dropout
--targets*          text     q_proj,v_proj  all  all  linear layers that LoRA adapts, or all
--qlora-lr          float>0  1e-4  5e-4  1e-4  learning rate
--qlora-epochs      count    -    2    1    epochs (paper: sst2 10, yelp 2, wmdp+sciq 5)
--qlora-batch       count    -    examples per batch (default: --batch)
unlearning (flags with several values make a grid)
--method*           METHODS  spul  how to unlearn
--alpha*            float>=0  1    weight of L_r, Eq. (5)
--beta*             float>=0  0.5  0.5  1    weight of L_KL, Eq. (5)
--p*                count    30   30   20   tokens of the soft prompt
--lr*               float>0  1e-4  2e-3  2e-3  learning rate of phi
--epochs            count    10   4    1    epochs of phi
--baseline-lr*      float>0  1e-5  1e-5  1e-4  learning rate of the baselines
--baseline-epochs   count    1    epochs of the baselines
--forget-fraction*  0<..1    1    part of the forget set that unlearning sees, Table 4
--forget-per-batch  int>=0   0    8    8    forget examples per batch; 0: as they come
--init              mlp|forget  mlp  forget  forget  where phi starts: encoder or forget tokens
--hidden            count    128  width of phi's encoder
--beta2             0..<1    0.999  0.95  0.95  AdamW's beta2 for phi
--tune              full|lora  full  what the baselines train: all weights, or the adapter
running
--preset            paper|small|toy  -  default settings (default: toy, with --model paper)
--seed*             int      0    split, forget set, order and initial values
--batch             count    32   16   16   examples per batch
--accumulate        count    1    batches per step
--clip              float>0  0.3  largest norm of the gradient
--out               text     -    run directory (default: runs/MODEL-DATASET)
--cache             text     runs  where the toy LM is kept
--threads           count    -    CPU threads
"""
PAPER_QLORA_EPOCHS = {"sst2": 10, "yelp": 2, "wmdp+sciq": 5}


def parse(argv=None):
    """Return the flags, with the preset's values filled in. InputError for impossible ones."""
    title = "Soft prompting for unlearning in language models."
    flags = FLAGS.replace("METHODS", "|".join(METHODS))
    args = data.parse_flags(title, flags, argv)
    preset = args.preset or ("paper" if args.model else "toy")
    args = data.parse_flags(title, flags, argv, PRESETS.index(preset))
    args.preset = preset
    if args.qlora_epochs is None:
        args.qlora_epochs = PAPER_QLORA_EPOCHS.get(args.dataset, 10)
    if args.dataset != "toy" and not args.model:
        raise InputError(f"--dataset {args.dataset} needs --model DIR; a small one: hf download "
                         "HuggingFaceTB/SmolLM2-135M-Instruct --local-dir DIR")
    if args.forget_per_batch >= args.batch:
        raise InputError(f"--forget-per-batch {args.forget_per_batch}; expected less than --batch, "
                         f"{args.batch}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.dtype is None:
        is_fast = args.device.startswith("cuda") and torch.cuda.is_bf16_supported(False)
        args.dtype = "bf16" if args.model and is_fast else "fp32"
    name = f"{Path(args.model).resolve().name}-{args.dataset}" if args.model else "toy"
    args.out = args.out or f"runs/{name}"
    return args


# ---- support: several processes (torchrun) -----------------------------------------------------

def start_processes(args):
    """Join the processes that torchrun started, if it did. Only the first one prints and writes."""
    if "WORLD_SIZE" in os.environ:
        if args.device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        if not is_rank_zero():
            sys.stdout = open(os.devnull, "w")


def stop_processes():
    """Leave the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_of_process(batch):
    """Return this process's part of a batch: all of it, unless torchrun started several."""
    return data.Batch(*[my_share(field) for field in batch])


def sum_gradients(params):
    """Add up the gradients of all processes; each computed its share of the step's objective."""
    if dist.is_initialized():
        for w in params:
            if is_sharded(w):
                w.grad *= dist.get_world_size()  # fully_shard has averaged them
            else:
                dist.all_reduce(w.grad)


def shard(model):
    """Spread weights, gradients and optimizer state over the processes (fully_shard), in place."""
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard
        kind, world = model.lm_head.weight.device.type, dist.get_world_size()
        mesh = dist.init_device_mesh(kind, (world,))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
    return model


def is_sharded(w):
    """Whether this process holds only a part of the tensor (a DTensor)."""
    return hasattr(w, "full_tensor")


def unshard(model):
    """Return a sharded model as a complete one in every process."""
    if not is_sharded(model.lm_head.weight):
        return model
    with torch.device("meta"):
        complete = build(model.config)
    state = {name: w.full_tensor() for name, w in model.state_dict().items()}
    complete.load_state_dict(state, assign=True)
    tie_head(complete)
    return complete


if __name__ == "__main__":
    sys.exit(data.run_cli(main))
