"""What was forgotten, what was kept (Section 4.2): predictions, accuracy and weighted F1, tables, figures.

    python evaluate.py RUN [RUN ...]             the paper's tables from the rows of runs, mean and std over seeds
    python evaluate.py RUN --ask "some text"     one answer without and with the learned prompt
    python evaluate.py RUN --audit               is it really forgotten? references, attacks, controls
"""
import argparse
import functools
import resource
import sys
import timeit
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import mode
from types import SimpleNamespace
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
from baselines import cross_entropy
from lora import load_adapter, merge_lora
from model import check_device, load_model, read_json, whole, write_json
from soft_prompt import PromptEncoder, load_prompt, prompt_kv


def my_share(n):
    """The slice of n examples that is this process's: all of them, unless torchrun started several."""
    if not torch.distributed.is_initialized():
        return slice(0, n)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return slice(n * rank // world, n * (rank + 1) // world)


@torch.no_grad()
def _over_batches(read, prompts, device, batch=64):
    """read(Batch) -> (B,...) for all prompts, equally long ones together -> (n,...) in the prompts' order.

    Each of several processes reads its share, and the sum puts the shares together; what is too little to share, each reads.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    mine, out = order[my_share(len(order))], None
    shared = len(mine) < len(order) and len(order) >= torch.distributed.get_world_size()
    mine = mine if shared else order
    for start in range(0, len(mine), batch):
        index = mine[start:start + batch]
        values = read(data.collate(prompts, [p.label for p in prompts], index, device))
        out = values.new_zeros(len(prompts), *values.shape[1:]) if out is None else out
        out[index] = values
    if shared:
        torch.distributed.all_reduce(out)
    return out


def hidden_states(model, prompts, prefix=None, device="cpu"):
    """-> the state that lm_head reads at each answer (n,D)."""
    return _over_batches(lambda b: model.hidden(b.tokens, b.answer_pos, prefix)[0], prompts, device)


def metrics(pred, y):
    """Tokens pred (n,), y (n,) -> {"n", "acc", "f1"} in percent; F1 is weighted by how often each true label occurs."""
    pred, y = list(map(int, pred)), list(map(int, y))
    return {"n": len(y), "acc": round(100 * accuracy_score(y, pred), 2),
            "f1": round(100 * f1_score(y, pred, average="weighted", zero_division=0), 2)}


def scores(model, prompts, prefix=None, device="cpu"):
    """{split: [Prompt]} -> {split: metrics}; the answer is the argmax over the WHOLE vocabulary: any other word is wrong."""
    model.eval()
    found = {}
    for split, part in prompts.items():
        pred = _over_batches(lambda b: model(b.tokens, b.answer_pos, prefix).argmax(-1), part, device)  # (n,)
        found[split] = metrics(pred.cpu(), [q.label for q in part])
    return found


def constant(prompts):
    """{split: [Prompt]} -> {split: metrics} of a predictor that always gives the commonest train label."""
    answer = mode(q.label for q in prompts["train_retain"] + prompts["train_forget"])
    return {split: metrics([answer] * len(part), [q.label for q in part]) for split, part in prompts.items()}


LEARNED = 10.0  # points by which the base must beat the constant answer on the forget set, before unlearning begins


def check_learned(base, prompts):
    """ValueError unless the base's row shows that it learned the forget set: else there is nothing to unlearn."""
    got, least = base["train_forget"]["acc"], constant(prompts)["train_forget"]["acc"] + LEARNED
    if got < least:
        raise ValueError(f"the base answers {got} % of the forget set right, and {least:.1f} % were needed (the constant "
                         f"answer and {LEARNED:g} points): nothing was learned that could be unlearned; raise "
                         "--qlora-epochs or --qlora-lr")


def peak_memory_mb(device):
    """The most memory this process has held so far, in MB: the GPU's on a GPU."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10)


# ------------------------------------------------------------------------------------------------------------ tables

HEADS = ("train retain", "train forget", "test retain", "test forget")


def table2(rows):
    """Rows of results.json -> Table 2 as aligned text: ACC and F1 on the four splits, one line a cell."""
    width = max([14, *(len(row["cell"]) for row in rows)])
    lines = [" " * width + "".join(f"{head:>16}" for head in HEADS), " " * width + f"{'ACC':>9}{'F1':>7}" * 4]
    for row in rows:
        lines.append(f"{row['cell']:{width}}" + "".join(f"{row[s]['acc']:9.1f}{row[s]['f1']:7.1f}" for s in data.SPLITS))
    return "\n".join(lines)


def read_rows(run):
    """A run directory -> the rows of its results.json."""
    rows = read_json(Path(run) / "results.json", "the results of a finished run of unlearn.py").get("rows")
    if not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get("cell"), str) and {"method", "seed"} <= row.keys() and
            all(isinstance(row.get(s), dict) and {"n", "acc", "f1"} <= row[s].keys() for s in data.SPLITS) for row in rows):
        raise ValueError(f"{run}/results.json: no rows with the four splits; expected what unlearn.py writes")
    return rows


def audits(run):
    """-> {seed: audit} of RUN/audit.json, {} when there is none."""
    file = Path(run) / "audit.json"
    return read_json(file, "an audit by evaluate.py", ["seeds"])["seeds"] if file.is_file() else {}


def load_rows(runs):
    """Run directories -> the rows of their results.json, and of the references that their audits added."""
    return [row for run in runs for row in read_rows(run) + [row for one in audits(run).values() for row in one["rows"]]]


SETTING = ("model", "dataset", "method", "forget_fraction", "lr", "alpha", "beta", "p")  # what a row is, but for its seed


def group_by(rows, *keys):
    """Rows that agree in these keys are one group -> {their values: [rows]}, in the order of their first row."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(k) for k in keys), []).append(row)
    return groups


def group_spul(rows, *keys):
    """The same for the rows of spul alone, of which Table 3, Table 4 and Fig. 2 are made. They differ in these keys only."""
    rows = [row for row in rows if row["method"] == "spul"]
    for key in SETTING:
        values = sorted({str(row.get(key)) for row in rows})
        if key not in keys and len(values) > 1:
            raise ValueError(f"these rows of spul differ in {key} too ({', '.join(values)}); expected runs that differ in "
                             f"{' and '.join(keys)} alone")
    return group_by(rows, *keys)


def mean_std(rows, *keys):
    """The number at row[key][key] over the rows of several seeds -> "96.1 +-0.4", mean and std; of one row "96.1"."""
    values = torch.tensor([functools.reduce(dict.get, keys, row) for row in rows], dtype=torch.float64)
    return f"{values.mean():.1f}" + (f" +-{values.std():.1f}" if len(values) > 1 else "")


def collate_runs(rows):
    """-> the lines of Table 2: a header, then [method, setting, seeds, ACC / F1 of each split] for each group."""
    lines = [["method", "setting", "seeds", *HEADS]]
    for (_, _, method, fraction, lr, alpha, beta, p), group in group_by(rows, *SETTING).items():
        marks = dict(f=fraction if fraction != 1 else None, lr=lr, alpha=alpha, beta=beta, p=p)
        setting = " ".join(f"{k}={v:g}" for k, v in marks.items() if v is not None)
        cells = [f"{mean_std(group, s, 'acc')} / {mean_std(group, s, 'f1')}" for s in data.SPLITS]
        lines.append([method, setting, str(len(group)), *cells])
    return lines


def best(rows):
    """The rows of the learning rate that serves each method best: train retain minus train forget, over all seeds."""
    def gain(group):
        return sum(row["train_retain"]["acc"] - row["train_forget"]["acc"] for row in group) / len(group)

    rates = [group_by(group, "lr") for group in group_by(rows, *(k for k in SETTING if k != "lr")).values()]
    return [row for groups in rates for row in max(groups.values(), key=gain)]


def ablation(rows, split):
    """Table 3: spul's accuracy on `split` by alpha (down) and beta (across)."""
    cells = group_spul(rows, "alpha", "beta")
    alphas, betas = (sorted({key[i] for key in cells}) for i in (0, 1))
    lines = [["alpha \\ beta", *(f"{beta:g}" for beta in betas)]]
    for alpha in alphas:
        groups = [cells.get((alpha, beta)) for beta in betas]
        lines.append([f"{alpha:g}", *(mean_std(group, split, "acc") if group else "-" for group in groups)])
    return lines


def by_fraction(rows):
    """Table 4: spul's accuracy on the four splits by the part of the forget set that unlearning saw."""
    lines = [["forget fraction", *HEADS]]
    for (fraction,), group in sorted(group_spul(rows, "forget_fraction").items()):
        lines.append([f"{fraction:g}", *(mean_std(group, s, "acc") for s in data.SPLITS)])
    return lines


def matmul_rate(n=1024):
    """Floating-point operations per second of a float32 matrix product (n,n) x (n,n) on the CPU, the best of 20."""
    a = torch.randn(n, n)
    return 2 * n ** 3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=20))


def efficiency(rows):
    """The Efficiency paragraph: what each method trains, and what it takes, over the seeds; the last column is how much
    of what this CPU, with all its threads, does in plain float32 matrix products a step's own products reach."""
    rate = matmul_rate()
    lines = [["method", "trainable parameters", "seconds per epoch", "tokens per second", "peak memory MB",
              "of matmul rate"]]
    for group in group_by([row for row in rows if row.get("seconds_per_epoch")], *SETTING).values():
        row, speed = group[0], sum(row["tokens_per_second"] for row in group) / len(group)
        lines.append([row["method"], f"{row['trainable_params']:,}", mean_std(group, "seconds_per_epoch"),
                      f"{speed:,.0f}", f"{max(row['peak_memory_mb'] for row in group):,}",
                      f"{100 * speed * row['flops_per_token'] / rate:.0f} %" if "flops_per_token" in row else "-"])
    return lines


def render(lines, form="text"):
    """A table as aligned text, Markdown or CSV."""
    if form == "csv":
        return "\n".join(",".join(f'"{c}"' if "," in c else c for c in line) for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
    if form == "markdown":
        padded.insert(1, ["-" * w for w in widths])
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)
    return "\n".join("  ".join(line).rstrip() for line in padded)


# ----------------------------------------------------------------------------------------------------------- figures

COLOURS = {"retain": "#1f6fb4", "forget": "#d1495b"}


@contextmanager
def figure(path, columns, width):
    """Yields a figure and its axes side by side, to draw on; then writes it to path, a .png or .svg."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axs = plt.subplots(1, columns, figsize=(width, 3.8), layout="constrained", squeeze=False)
    for ax in axs[0]:
        ax.spines[["top", "right"]].set_visible(False)
    yield fig, axs[0]
    with whole(path) as part:
        fig.savefig(part, format=Path(path).suffix[1:], dpi=150)
    print(f"wrote {path}")


def plot_against(rows, key, path):
    """Fig. 2: accuracy on the four splits against p (or alpha, beta, forget_fraction), mean and std over seeds."""
    groups = sorted(group_spul(rows, key).items())
    values = [value for (value,), _ in groups]
    if len(values) < 2:
        raise ValueError(f"only {len(values)} value of {key} in these runs; expected several: unlearn.py --{key} 10 20 30")
    with figure(path, 1, 5.4) as (_, (ax,)):
        for split, head in zip(data.SPLITS, HEADS):
            acc = [torch.tensor([row[split]["acc"] for row in group]) for _, group in groups]
            when, part = split.split("_")  # one may lie right on the other: train is a large ring, test a small disc
            style = {"train": dict(markersize=9, fillstyle="none", linestyle="-"),
                     "test": dict(markersize=5, linestyle="--")}[when]
            ax.errorbar(values, [a.mean() for a in acc], [a.std(correction=0) for a in acc], capsize=3, marker="o",
                        color=COLOURS[part], label=head, **style)
        ax.set(xlabel={"p": "p, tokens of the soft prompt"}.get(key, key), ylabel="accuracy (%)", ylim=(-4, 104),
               xticks=values)
        ax.legend(frameon=False, loc="center right")


def plot_tsne(loaded, path, per_label=500):
    """Fig. 1: t-SNE of the state at the answer, base beside SPUL; colour: forget or retain, shape: the true label."""
    from sklearn.manifold import TSNE
    pool = loaded.prompts["test_forget"] + loaded.prompts["test_retain"]
    data.generator(0, "t-sne").shuffle(pool)  # so that forget and retain are drawn alike
    part = [q for label in {q.label for q in pool} for q in [q for q in pool if q.label == label][:per_label]]
    with figure(path, 2, 9) as (fig, axs):
        for ax, title, prefix in zip(axs, ("base", "SPUL"), (None, loaded.prefix)):
            h = hidden_states(loaded.model, part, prefix, loaded.args.device).float().cpu().numpy()  # (n,D)
            xy = TSNE(2, init="pca", random_state=0, perplexity=min(30, len(part) // 4)).fit_transform(h)  # (n,2)
            for is_forget, name in ((False, "retain"), (True, "forget")):  # the fewer forget points lie on top
                for label, marker in zip(loaded.task.labels, "o^sD"):
                    index = [i for i, q in enumerate(part) if (q.is_forget, q.label) == (is_forget, loaded.tokens[label])]
                    ax.scatter(*xy[index].T, s=14, marker=marker, color=COLOURS[name], alpha=0.65, linewidths=0,
                               label=f"{name}, {label}")
            ax.set(title=title, xticks=[], yticks=[])
        fig.legend(*axs[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(loaded.task.labels),
                   frameon=False)


# ----------------------------------------------------------------------------------------------- a finished run, again

class Loaded(NamedTuple):
    """A model with its task and data; of a finished run the base model (with its adapter) and its learned prompt: spul.

    The systems that the audit sets beside it are the same with another model, no prefix or other prompts.
    """
    args: SimpleNamespace
    lm: str                  # the pretrained LM's directory
    model: torch.nn.Module   # frozen
    tokenizer: object
    task: data.Task
    tokens: dict             # {label: its token}
    splits: dict             # {split: [Example]}
    prompts: dict            # {split: [Prompt]}, in the same order
    adapter: Path = None     # of the base
    phi: torch.Tensor = None  # (p,D)
    prefix: list = None      # K, V (1,G,p,d) of each layer, as prompt_kv gives them
    row: dict = None         # of results.json

    def logits(self, ids, prefix=None):
        """The tokens of one prompt -> the logits (1,V) of its answer."""
        tokens, answer_pos = (torch.tensor(x, device=self.args.device) for x in ([ids], [len(ids) - 1]))
        return self.model(tokens, answer_pos, prefix)

    def word(self, token):
        """A token as text."""
        return self.tokenizer.piece(token).strip(data.SPACES)

    def top_five(self, logits):
        """Logits (1,V) -> the five likeliest answers, as text."""
        top = logits[0].detach().float().softmax(-1).topk(5)
        return "   ".join(f"{self.word(token)} {100 * v:.1f} %" for v, token in zip(*top))


def load_base(lm, args, adapter=None, merged=False):
    """A run's pretrained LM, with an adapter where one is given, or that merged into its weights -> the model, frozen."""
    model = load_model(lm, args.weights, args.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    if adapter:
        load_adapter(model, adapter)
    model = merge_lora(model, model.lm_head.weight.dtype) if merged else model
    return model.requires_grad_(False).eval()


def load(lm, args, splits, adapter=None, merged=False):
    """-> Loaded: an LM's directory with its tokenizer, and a seed's {split: [Example]} as prompts in its tokens."""
    tokenizer, task = data.load_tokenizer(lm), data.task_of(args)
    model = load_base(lm, args, adapter, merged)
    if tokenizer.size > model.config.vocab_size:
        raise ValueError(f"{lm}: {tokenizer.size} tokens in the tokenizer, {model.config.vocab_size} in config.json; "
                         "do they belong together?")
    prompts = data.encode_splits(tokenizer, task, splits, args.max_len)
    tokens = data.label_tokens(tokenizer, task, splits["train_retain"][0].text)
    return Loaded(args, lm, model, tokenizer, task, tokens, splits, prompts, adapter)


def load_run(run, cell=None, seed=None):
    """Run directory -> Loaded: the first spul cell (of a seed), or the named one. ValueError or OSError if torn."""
    run = Path(run)
    args = SimpleNamespace(**read_json(run / "args.json", "the settings of a run of unlearn.py", [
        "dataset", "data_dir", "weights", "dtype", "device", "max_train", "max_test", "max_len", "labels", "generic",
        "template", "merged"]))
    check_device(args.device)
    rows = [row for row in read_rows(run) if {"files", "lm"} <= row.keys() and seed in (None, row["seed"])]
    row = next((row for row in rows if row["method"] == "spul" and cell in (None, row["cell"])), None)
    base = next((other for other in rows if row and (other["method"], other["seed"]) == ("qlora", row["seed"])), None)
    if not base:
        raise ValueError(f"{run} has no finished spul row{f' {cell}' if cell else ''}; run unlearn.py --method spul first")
    splits = data.load_splits(args.dataset, args.data_dir, row["seed"], args.max_train, args.max_test)
    loaded = load(base["lm"], args, splits, run / base["files"], args.merged)
    phi = load_prompt(run / row["files"], loaded.model.embed_tokens.embedding_dim).to(args.device)
    with torch.no_grad():
        return loaded._replace(phi=phi, prefix=prompt_kv(loaded.model, phi), row=row)


@torch.no_grad()
def ask(loaded, text):
    """Prints the five likeliest answers of a loaded run to one text, without and with the learned prompt."""
    ids = data.encode_prompt(loaded.tokenizer, loaded.task, text, loaded.args.max_len)
    print(f"{data.prompt_string(loaded.task, text)}\n\n"
          f"without phi {loaded.top_five(loaded.logits(ids))}\n"
          f"with phi    {loaded.top_five(loaded.logits(ids, loaded.prefix))}")


def explain(loaded):
    """Prints what happens to one forget and one retain example: prompt, tokens, answers, losses and their pull on phi."""
    from unlearn import spul_loss  # here, since unlearn imports this file
    p = len(loaded.phi)
    for split in ("test_forget", "test_retain"):
        example, prompt = loaded.splits[split][0], loaded.prompts[split][0]
        y, end = loaded.tokens[loaded.task.generic[0]] if prompt.is_forget else prompt.label, p + len(prompt.ids) - 1
        print(f"{split.replace('_', ' ')}: {data.prompt_string(loaded.task, example.text)!r}, the truth is {example.label}\n"
              f"phi stands at positions 0 to {p - 1}, the tokens at {p} to {end}, the answer is read at {end}:")
        print(" ".join(f"{i}:{loaded.word(token)}" for i, token in enumerate(prompt.ids, p)))
        phi = loaded.phi.clone().requires_grad_(True)
        base = loaded.logits(prompt.ids).detach()
        logits = loaded.logits(prompt.ids, prompt_kv(loaded.model, phi))
        print(f"before phi  {loaded.top_five(base)}\nafter phi   {loaded.top_five(logits)}")
        _, parts = spul_loss(logits, base.float().log_softmax(-1), torch.tensor([y], device=phi.device),
                             torch.tensor([prompt.is_forget], device=phi.device), alpha=1.0, beta=1.0)
        for name in ("L_f",) if prompt.is_forget else ("L_r", "L_kl"):
            pull = torch.autograd.grad(parts[name], phi, retain_graph=True)[0].norm()
            towards = "to the base model" if name == "L_kl" else f"towards {loaded.word(y)}"
            print(f"{name} = {parts[name].item():.4f} {towards}, the norm of its gradient on phi is {pull:.4f}")
        print()


# ------------------------------------------------------------------------------- the audit: is it really forgotten?
#
# A low accuracy on the forget set is not forgetting: a model that never saw it would answer most of it right. So each
# system stands beside `retrain`, the model that QLoRA makes of the retain set alone, and is asked in other ways.
# `systems` is {"base", "retrain", "spul": Loaded}, and a table {row: {column: percent}}. What is trained here is trained
# by unlearn.py, imported where it is used, since unlearn.py imports this file.

MOST = 5000  # prompts of a split that the audit looks at, drawn by seed


def readings(model, prompts, labels, prefix=None, device="cpu"):
    """What a system says to each prompt -> (n,4): its answer, its answer among the labels, log h(y|x), entropy."""
    def read(b):
        logp = model(b.tokens, b.answer_pos, prefix).double().log_softmax(-1)  # (B,V)
        among = torch.tensor(labels, device=logp.device)[logp[:, labels].argmax(-1)]
        return torch.stack([logp.argmax(-1), among, logp.gather(1, b.y[:, None])[:, 0], -(logp.exp() * logp).sum(-1)], 1)

    return _over_batches(read, prompts, device).cpu()


def breakdown(read, prompts, labels, generic):
    """Readings (n,4) -> percent of right, wrong label, generic and other answers; right when only labels may be said."""
    y, answer = torch.tensor([q.label for q in prompts]), read[:, 0].long()
    right, is_label, is_generic = answer == y, *(torch.isin(answer, torch.tensor(words)) for words in (labels, generic))
    parts = {"right": right, "wrong label": is_label & ~right, "generic": is_generic & ~right,
             "other": ~(is_label | is_generic | right), "right among labels": read[:, 1] == y}
    return {name: 100 * part.double().mean().item() for name, part in parts.items()}


def membership(seen, unseen):
    """Readings (n,4) of train and (m,4) of test examples -> AUC in percent of telling them apart by loss, by entropy."""
    is_member, read = [1] * len(seen) + [0] * len(unseen), torch.cat([seen, unseen]).numpy()
    return {"loss": 100 * roc_auc_score(is_member, read[:, 2]), "entropy": 100 * roc_auc_score(is_member, -read[:, 3])}


def probe(train_h, train_y, test_h, test_y):
    """Linear probe on states (n,D) -> its accuracy in percent, and its control's: the mean of 20 with shuffled answers."""
    rng, train_h, test_h = data.generator(0, "probe"), train_h.float().cpu().numpy(), test_h.float().cpu().numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    right, *control = [100 * classifier.fit(train_h, y).score(test_h, test_y)
                       for y in (train_y, *(rng.sample(train_y, len(train_y)) for _ in range(20)))]
    return right, sum(control) / 20


def telling_words(splits, most=40):
    """The words that tell a forget text: nine times of ten they stand in one, and three times at least."""
    forget, retain = (Counter(w for e in splits[f"train_{part}"] for w in e.text.lower().split())
                      for part in ("forget", "retain"))
    return [w for w, n in forget.most_common() if n >= 3 and n >= 9 * retain[w] and w.isalpha()][:most]


def attack(stage, system, params, prefix, known, rest, log, steps, lr):
    """Trains params towards the labels of the known prompts -> accuracy on the rest; then puts params back."""
    import unlearn
    model, args = system.model, system.args
    kept = [w.detach().clone() for w in params]

    def batches(step):
        index = data.generator(step, "attack").sample(range(len(known)), min(len(known), args.batch))
        return [data.collate(known, [q.label for q in known], index, args.device)]

    def loss_of(b):
        loss = cross_entropy(model(b.tokens, b.answer_pos, prefix()), b.y, torch.ones_like(b.is_forget))
        return loss, {"L": loss}, b.tokens.numel()

    for w in params:
        w.requires_grad_(True)
    if known:
        unlearn.train(stage, params, batches, loss_of, steps, lr, log, clip=1.0)
    with torch.no_grad():
        accuracy = scores(model, {"rest": rest}, prefix(), args.device)["rest"]["acc"]
    for w, old in zip(params, kept):
        w.requires_grad_(False).copy_(old)
    return accuracy


def retrained(loaded, run, seed):
    """-> the reference: QLoRA from the pretrained LM on the retain set alone; its training state is kept in RUN/retrain."""
    import unlearn
    model = load_base(loaded.lm, loaded.args)
    made = unlearn.fingerprint_of("retain only", seed, loaded.row["fingerprint"])
    unlearn.tune_base(model, {**loaded.prompts, "train_forget": []}, loaded.args, unlearn.Run(run / "retrain", loaded.args),
                      f"qlora-seed{seed}", made, seed)
    return model


def all_systems(systems, run, words):
    """Yields base, retrain and spul, then the baselines and prompts beside them; `prompt-off` after all others."""
    base, args, seed = systems["base"], systems["base"].args, systems["base"].row["seed"]
    yield from systems.items()
    baselines = [row for row in read_rows(run) if row["seed"] == seed and row.get("files") and row["method"] not in ("spul", "qlora")]
    for (method,), (row, *_) in group_by(baselines, "method").items():  # the first cell of each
        if row["p"]:  # a method of one's own that trains a prompt
            phi = load_prompt(run / row["files"], base.model.embed_tokens.embedding_dim).to(args.device)
            yield method, base._replace(prefix=prompt_kv(base.model, phi))
            continue
        yield method, base._replace(model=load_model(run / row["files"], "fp32", args.device) if args.tune == "full" else
                                    load_base(base.lm, args, run / row["files"]))
    told = base.task._replace(template=f"### Ignore: {' '.join(words)}\n\n{base.task.template}")
    yield "hard-prompt", base._replace(prompts=data.encode_splits(base.tokenizer, told, base.splits, args.max_len))
    torch.manual_seed(seed)
    with torch.no_grad():
        untrained = prompt_kv(base.model, PromptEncoder(*base.phi.shape, args.hidden).to(args.device)())
    yield "random-prompt", base._replace(prefix=untrained)
    yield "prompt-off", base


def audit_answers(systems, run, words):
    """What every system says -> its tables, and the references' rows for results."""
    base, tables, rows, read = systems["base"], {title: {} for title in TITLES}, {}, {}
    labels, generic = ([base.tokens[word] for word in answers] for answers in (base.task.labels, base.task.generic))
    for name, system in all_systems(systems, run, words):
        rows[name] = {}
        for s, asked in system.prompts.items():
            read[name, s] = readings(system.model, asked, labels, system.prefix, system.args.device)
            rows[name][s] = metrics(read[name, s][:, 0], [q.label for q in asked])
            tables[f"answers, {s}"][name] = breakdown(read[name, s], asked, labels, generic)
        if name not in REFERENCES or name == "retrain":
            tables["membership"][name] = membership(read[name, "train_forget"], read[name, "test_forget"])
    if not all(torch.equal(read["base", s], read["prompt-off", s]) for s in data.SPLITS):
        raise AssertionError("the model without phi is not the base model: something changed a weight")
    rows["constant"] = constant(base.prompts)
    for name, row in rows.items():
        tables["accuracy"][name] = {**{head: row[s]["acc"] for head, s in zip(HEADS, data.SPLITS)},
                                    "retain gap": row["train_retain"]["acc"] - rows["base"]["train_retain"]["acc"],
                                    "retrain gap": row["train_forget"]["acc"] - rows["retrain"]["train_forget"]["acc"]}
    return tables, rows


def audit_recovery(systems, run, rng):
    """How little it takes to get the forget set back -> two tables."""
    import unlearn
    spul, forget, curves = systems["spul"], systems["spul"].prompts["train_forget"], {}
    args, model, phi, log = spul.args, spul.model, spul.phi, unlearn.Run(run / "audit", spul.args)
    forget = rng.sample(forget, len(forget))
    half = min(64, len(forget) // 2)
    known, rest = forget[:half], forget[half:] + spul.prompts["test_forget"]
    guessed = [q._replace(label=spul.tokens[rng.choice(spul.task.labels)]) for q in known]
    base = load_base(spul.lm, args, spul.adapter)  # its adapter not merged, so that it can be trained
    for name, system, prefix in (("spul", spul._replace(model=base), lambda: prompt_kv(base, phi)),
                                 ("retrain", systems["retrain"], lambda: None)):
        adapter = [w for param, w in system.model.named_parameters() if "lora_" in param]
        curves[name] = {f"k={k}": attack(f"relearning {name} k={k}", system, adapter, prefix, known[:k], rest, log, steps=20,
                                         lr=args.qlora_lr) for k in (0, 1, 4, 16, 64) if k <= half}
    undone = {"phi alone": {"accuracy": curves["spul"]["k=0"]}}
    for name, taught in (("true answers", known), ("random answers", guessed)):
        torch.manual_seed(0)
        encoder = PromptEncoder(*phi.shape, args.hidden).to(args.device)  # of a second prompt, before phi
        undone[name] = {"accuracy": attack(
            f"undoing phi, {name}", spul, list(encoder.parameters()), lambda: prompt_kv(model, torch.cat([encoder(), phi])),
            taught, rest, log, steps=150, lr=spul.row["lr"])}
    return {"relearning": curves, "undoing phi": undone}


def audit_probe(systems):
    """What a linear probe reads from the state at the answer -> a table; forget and retain are made equally many."""
    table, sets, prompts = {}, ("train_forget", "test_forget"), systems["base"].prompts
    alike = {s: prompts[s] + prompts[s.replace("forget", "retain")][:len(prompts[s])] for s in sets}
    for name, system in systems.items():
        row = table[name] = {}
        for what, asked, of in (("label", prompts, "label"), ("forget or retain", alike, "is_forget")):
            h = [hidden_states(system.model, asked[s], system.prefix, system.args.device) for s in sets]
            y = [[getattr(q, of) for q in asked[s]] for s in sets]
            row[what], row[f"{what}, shuffled"] = probe(h[0], y[0], h[1], y[1])
    return table


def audit_robustness(systems, words):
    """Accuracy of base and SPUL on test reviews put otherwise: does phi still tell which to forget? -> a table."""
    base, sets, rng, table = systems["base"], ("test_retain", "test_forget"), data.generator(0, "two"), {}
    bare = base.task._replace(template=base.task.template[base.task.template.index("{text}"):])
    retain = {label: [e.text for e in base.splits["train_retain"] if e.label == label] for label in base.task.labels}

    def misspelt(e):  # swaps a name's second and third letter
        return " ".join(w[0] + w[2] + w[1] + w[3:] if w.lower() in words and len(w) > 2 else w for w in e.text.split(" "))

    for name, task, change in (
            ("as trained", base.task, lambda e: e.text), ("another template", bare, lambda e: e.text),
            ("misspelt names", base.task, misspelt),
            ("behind a retain review", base.task, lambda e: f"{rng.choice(retain[e.label])} {e.text}")):
        splits = base.splits | {s: [e._replace(text=change(e)) for e in base.splits[s]] for s in sets}
        prompts = data.encode_splits(base.tokenizer, task, splits, base.args.max_len)
        got = {who: scores(base.model, {s: prompts[s] for s in sets}, systems[who].prefix, base.args.device)
               for who in ("base", "spul")}
        table[name] = {f"{who} {s.replace('_', ' ')}": got[who][s]["acc"] for s in sets for who in got}
    return table


def audit_seed(run, seed):
    """One seed of a run -> {"tables": {title: {row: {column: percent}}}, "rows": as those of results.json}."""
    loaded, rng = load_run(run, seed=seed), data.generator(seed, "audit")
    words, retrain = telling_words(loaded.splits), retrained(loaded, run, seed)  # both of the whole sets
    chosen = {s: rng.sample(range(len(part)), min(MOST, len(part))) for s, part in loaded.prompts.items()}
    loaded = loaded._replace(prompts={s: [loaded.prompts[s][i] for i in chosen[s]] for s in data.SPLITS},
                             splits={s: [loaded.splits[s][i] for i in chosen[s]] for s in data.SPLITS})
    base = loaded._replace(prefix=None)
    systems = {"base": base, "retrain": base._replace(model=retrain), "spul": loaded}
    tables, rows = audit_answers(systems, run, words)
    tables |= {**audit_recovery(systems, run, rng), "linear probe": audit_probe(systems),
               "robustness": audit_robustness(systems, words)}
    row = dict.fromkeys(SETTING) | {k: loaded.row[k] for k in ("model", "dataset", "seed")}  # no alpha, beta, p, lr
    references = [{**row, "cell": f"{name}-s{seed}", "method": name, **rows[name]} for name in REFERENCES]
    return {"tables": tables, "rows": references}


REFERENCES = ("retrain", "constant", "prompt-off", "hard-prompt", "random-prompt")
TITLES = {
    "accuracy": "accuracy; retain gap: train retain minus base, 0 means nothing lost; retrain gap: train forget minus "
                "retrain, 0 means like a model that never saw the set, below 0 it hides what anyone could know",
    **{f"answers, {s}": f"what is answered on {s.replace('_', ' ')}; right among labels: when only a label may be said"
       for s in data.SPLITS},
    "membership": "membership inference, AUC between train forget and test forget: 50 tells nothing, the goal is "
                  "retrain's value",
    "relearning": "relearning: accuracy on the rest of the forget set after 20 steps on k of its examples; the goal is "
                  "retrain's curve",
    "undoing phi": "a second prompt before phi, trained on 64 forget examples: accuracy on the rest of the forget set",
    "linear probe": "a linear probe on the state at the answer (test forget, or half of it retain): is it still there to be "
                    "read?",
    "robustness": "robustness of phi: accuracy when the reviews are put otherwise; forget should stay low, retain high",
}


def audit(run, form="text"):
    """Audits every seed of a run that has a spul row, keeps the result in RUN/audit.json, prints mean and std over seeds."""
    run, rows, kept = Path(run), read_rows(run), audits(run)
    seeds = sorted({row["seed"] for row in rows if row["method"] == "spul"})
    if not seeds:
        raise ValueError(f"{run} has no finished spul row; run unlearn.py --method spul first")
    for seed in seeds:
        rests_on = sorted(str(row.get("fingerprint")) for row in rows if row["seed"] == seed)
        if kept.get(str(seed), {}).get("rests_on") != rests_on:
            print(f"auditing seed {seed}", flush=True)
            kept[str(seed)] = {"rests_on": rests_on, **audit_seed(run, seed)}
            write_json(run / "audit.json", {"seeds": kept})
    for title, what in TITLES.items():
        tables = [one["tables"][title] for one in kept.values()]
        lines = [[title, *next(iter(tables[0].values()))]]
        for name, row in tables[0].items():  # a seed with few forget examples stops at a smaller k
            lines.append([name, *(mean_std([t for t in tables if c in t.get(name, {})], name, c) for c in row)])
        print(f"\n{what} ({len(kept)} seed{'s' * (len(kept) > 1)})\n\n{render(lines, form)}")


def main(argv=None):
    """The command line."""
    ap = argparse.ArgumentParser(description="Collates runs of unlearn.py into the paper's tables and figures.")
    ap.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    ap.add_argument("--table", choices=["2", "3", "4", "best", "efficiency"], default="2",
                    help="which of the paper's tables; best: Table 2 of each method's best learning rate")
    ap.add_argument("--form", choices=["text", "markdown", "csv"], default="text", help="how it is written")
    ap.add_argument("--plot", metavar="FILE", help="draw Fig. 2 as a .png or .svg; --against says over what")
    ap.add_argument("--against", choices=["p", "alpha", "beta", "forget_fraction"], default="p", help="the axis of --plot")
    ap.add_argument("--tsne", metavar="FILE", help="draw Fig. 1, the states at the answer, as a .png or .svg")
    ap.add_argument("--ask", metavar="TEXT", help="one answer without and with the learned prompt")
    ap.add_argument("--cell", help="whose phi --ask and --tsne take, as spul-s0-f1-lr0.005-a1-b1-p20 (default: the first)")
    ap.add_argument("--audit", action="store_true", help="references, attacks and controls: is it really forgotten?")
    args = ap.parse_args(argv)
    for path in (args.plot, args.tsne):
        if path and Path(path).suffix not in (".png", ".svg"):
            raise ValueError(f"{path}: a figure is written as .png or .svg; give it one of these endings")
    if args.ask is not None:
        return ask(load_run(args.runs[0], args.cell), args.ask)
    if args.audit:
        return audit(args.runs[0], args.form)
    rows = load_rows(args.runs)
    if args.tsne or args.plot:
        if args.tsne:
            plot_tsne(load_run(args.runs[0], args.cell), args.tsne)
        if args.plot:
            plot_against(rows, args.against, args.plot)
        return
    tables = {"2": collate_runs, "4": by_fraction, "best": lambda rows: collate_runs(best(rows)), "efficiency": efficiency}
    if args.table in tables:
        print(render(tables[args.table](rows), args.form))
    else:  # Table 3 is one for each split
        for split, head in zip(data.SPLITS, HEADS):
            print(f"{head}, ACC\n{render(ablation(rows, split), args.form)}\n")


if __name__ == "__main__":
    sys.exit(data.run_cli(main))
