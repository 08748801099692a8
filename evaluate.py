"""What was forgotten, what was kept (Section 4.2): predictions, accuracy and weighted F1, tables, figures.

    python evaluate.py RUN [RUN ...]             the paper's tables from the rows of runs, mean and std over seeds
    python evaluate.py RUN --ask "some text"     one answer without and with the learned prompt
    python evaluate.py RUN --audit               is it really forgotten? references, attacks, controls
"""
import itertools
import resource
import sys
import timeit
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, mode
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
#
# A table is a list of lines, each a list of strings; the first is its header.

HEADS = {split: split.replace("_", " ") for split in data.SPLITS}  # of the four columns
SETTING = ("model", "dataset", "method", "forget_fraction", "lr", "alpha", "beta", "p")  # what a row is, but for its seed


def read_results(run):
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
    return [row for run in runs for row in read_results(run) + [row for one in audits(run).values() for row in one["rows"]]]


def group_by(rows, *keys):
    """Rows that agree in these keys are one group -> {their values: [rows]}, in the order of their first row."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(k) for k in keys), []).append(row)
    return groups


def differing(rows):
    """-> the keys of SETTING in which these rows differ; None stands where a method has no such setting."""
    return [key for key in SETTING if len({row.get(key) for row in rows} - {None}) > 1]


def mean_std(values):
    """Numbers, of one seed each -> "96.1 +-0.4", mean and std; of one number "96.1"."""
    values = torch.tensor([*values], dtype=torch.float64)
    return f"{values.mean():.1f}" + (f" +-{values.std():.1f}" if len(values) > 1 else "")


def acc_f1(rows):
    """The rows of several seeds -> "ACC / F1" on each of the four splits."""
    return [" / ".join(mean_std(row[s][k] for row in rows) for k in ("acc", "f1")) for s in data.SPLITS]


def table2(rows):
    """Rows of results.json -> Table 2 as aligned text, one line a cell."""
    return render([["ACC / F1", *HEADS.values()], *([row["cell"], *acc_f1([row])] for row in rows)])


def tabulate(rows, heads=("seeds", *HEADS.values()), cells=lambda group: [str(len(group)), *acc_f1(group)]):
    """Rows -> a table with one line for each method and setting, over its seeds: Tables 2, 3 and 4.

    Its columns are the settings in which the rows differ, so that no two pass for one, then what `cells` makes of a group.
    """
    keys = ["method", *(key for key in differing(rows) if key != "method")]
    lines = [[*keys, *heads]]
    for values, group in group_by(rows, *keys).items():
        lines.append([*("" if value is None else str(value) for value in values), *cells(group)])
    return lines


def best(rows):
    """The rows of the learning rate that serves each method best: train retain minus train forget, over all seeds."""
    def gain(group):
        return mean(row["train_retain"]["acc"] - row["train_forget"]["acc"] for row in group)

    others = [key for key in SETTING if key != "lr"]
    return [row for rates in group_by(rows, *others).values() for row in max(group_by(rates, "lr").values(), key=gain)]


def efficiency(rows):
    """The Efficiency paragraph: what each method trains, and what it takes, over the seeds; the last column is how much
    of what this CPU, with all its threads, does in plain float32 matrix products a step's own products reach."""
    a = torch.randn(1024, 1024)
    rate = 2 * 1024 ** 3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=20))  # floating-point operations per second

    def cells(group):
        row, speed = group[0], mean(row["tokens_per_second"] for row in group)
        return [f"{row['trainable_params']:,}", mean_std(row["seconds_per_epoch"] for row in group), f"{speed:,.0f}",
                f"{max(row['peak_memory_mb'] for row in group):,}",
                f"{100 * speed * row['flops_per_token'] / rate:.0f} %" if "flops_per_token" in row else "-"]

    heads = ["trainable parameters", "seconds per epoch", "tokens per second", "peak memory MB", "of matmul rate"]
    return tabulate([row for row in rows if row.get("seconds_per_epoch")], heads, cells)


def spul_alone(rows):
    """Tables 3 and 4: one form for both, since a run shows what it varied, alpha and beta or the forget fraction."""
    return tabulate([row for row in rows if row["method"] == "spul"])


TABLES = {"2": tabulate, "3": spul_alone, "4": spul_alone, "best": lambda rows: tabulate(best(rows)),
          "efficiency": efficiency}


def render(lines, form="text"):
    """A table as aligned text, Markdown or CSV."""
    if form == "csv":
        return "\n".join(",".join(f'"{c}"' if "," in c else c for c in line) for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
    if form == "markdown":
        padded.insert(1, ["-" * w for w in widths])
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)
    return "\n".join("  ".join(line).rstrip() for line in padded)


# ----------------------------------------------------------------------------------------------------------- figures

COLOURS = {"retain": "#1f6fb4", "forget": "#d1495b"}


@contextmanager
def figure(path, columns, width):
    """Yields a figure and its axes side by side, to draw on; then writes it to path, a .png or .svg."""
    if Path(path).suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: a figure is written as .png or .svg; give it one of these endings")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib; pip install matplotlib") from None
    fig = Figure(figsize=(width, 3.8), layout="constrained")
    axs = fig.subplots(1, columns, squeeze=False)[0]
    for ax in axs:
        ax.spines[["top", "right"]].set_visible(False)
    yield fig, axs
    with whole(path) as part:
        fig.savefig(part, format=Path(path).suffix[1:], dpi=150)
    print(f"wrote {path}")


def plot_against(rows, key, path):
    """Fig. 2: accuracy on the four splits against p (or alpha, beta, forget_fraction), mean and std over seeds."""
    rows = [row for row in rows if row["method"] == "spul"]
    if differing(rows) != [key]:
        raise ValueError(f"these rows of spul differ in {' and '.join(differing(rows)) or 'nothing'}; expected rows that "
                         f"differ in {key} alone: unlearn.py --{key.replace('_', '-')} with several values")
    groups = sorted(group_by(rows, key).items())
    values = [value for (value,), _ in groups]
    styles = {"train": dict(markersize=9, fillstyle="none"),  # one may lie right on the other: a large ring, a small disc
              "test": dict(markersize=5, linestyle="--")}
    with figure(path, 1, 5.4) as (_, (ax,)):
        for split, head in HEADS.items():
            acc = [torch.tensor([row[split]["acc"] for row in group]) for _, group in groups]
            when, part = split.split("_")
            ax.errorbar(values, [a.mean() for a in acc], [a.std(correction=len(a) > 1) for a in acc], capsize=3,
                        marker="o", color=COLOURS[part], label=head, **styles[when])
        ax.set(xlabel={"p": "p, tokens of the soft prompt"}.get(key, key), ylabel="accuracy (%)", ylim=(-4, 104),
               xticks=values)
        ax.legend(frameon=False, loc="center right")


def plot_tsne(loaded, path):
    """Fig. 1: t-SNE of the state at the answer, base beside SPUL; colour: forget or retain, shape: the true label."""
    from sklearn.manifold import TSNE
    pool = loaded.prompts["test_forget"] + loaded.prompts["test_retain"]
    data.generator(0, "t-sne").shuffle(pool)  # so that forget and retain are drawn alike, 500 of a label at most
    part = [q for label in {q.label for q in pool} for q in [q for q in pool if q.label == label][:500]]
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

    def word(self, token):
        """A token as text."""
        return self.tokenizer.piece(token).strip(data.SPACES)

    def accuracy(self, prompts):
        """-> percent of right answers to these prompts."""
        return scores(self.model, {"these": prompts}, self.prefix, self.args.device)["these"]["acc"]


def load_base(lm, args, adapter=None, merged=False):
    """A run's pretrained LM, with an adapter where one is given, or that merged into its weights -> the model, frozen."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = load_model(lm, args.weights, args.device, dtype if args.weights == "nf4" else None)
    model.checkpointing = args.checkpointing
    if adapter:
        load_adapter(model, adapter)
    model = merge_lora(model) if merged else model
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
    import unlearn  # here, since unlearn imports this file
    run = Path(run)
    flags = vars(unlearn.parser().parse_args([]))
    args = SimpleNamespace(**read_json(run / "args.json", "the settings of a run of unlearn.py", flags))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        args.device = "cpu"  # a run from a machine with a GPU, looked at on one without
    check_device(args.device)
    rows = [row for row in read_results(run) if {"files", "lm", "merged"} <= row.keys() and seed in (None, row["seed"])]
    row = next((row for row in rows if row["method"] == "spul" and cell in (None, row["cell"])), None)
    base = next((other for other in rows if row and (other["method"], other["seed"]) == ("qlora", row["seed"])), None)
    if not base:
        raise ValueError(f"{run} has no finished spul row{f' {cell}' if cell else ''}; run unlearn.py --method spul first")
    splits = data.load_splits(args.dataset, args.data_dir, row["seed"], args.max_train, args.max_test)
    loaded = load(base["lm"], args, splits, run / base["files"], row["merged"])
    phi = load_prompt(run / row["files"], loaded.model.embed_tokens.embedding_dim).to(args.device)
    with torch.no_grad():
        return loaded._replace(phi=phi, prefix=prompt_kv(loaded.model, phi), row=row)


@torch.no_grad()
def ask(loaded, text):
    """Prints the five likeliest answers of a loaded run to one text, without and with the learned prompt."""
    ids = data.encode_prompt(loaded.tokenizer, loaded.task, text, loaded.args.max_len)
    tokens, answer_pos = (torch.tensor(x, device=loaded.args.device) for x in ([ids], [len(ids) - 1]))  # (1,T), (1,)
    print(f"{data.prompt_string(loaded.task, text)}\n")
    for name, prefix in (("without phi", None), ("with phi   ", loaded.prefix)):
        top = loaded.model(tokens, answer_pos, prefix)[0].float().softmax(-1).topk(5)
        print(name, "   ".join(f"{loaded.word(token)} {100 * v:.1f} %" for v, token in zip(*top)))


def explain(loaded):
    """Prints what happens to one forget and one retain example: prompt, answers, tokens, losses and their pull on phi."""
    from unlearn import spul_loss  # here, since unlearn imports this file
    for split in ("test_forget", "test_retain"):
        example, prompt, p = loaded.splits[split][0], loaded.prompts[split][0], len(loaded.phi)
        end = p + len(prompt.ids) - 1
        print(f"{HEADS[split]}, the truth is {example.label}:\n")
        ask(loaded, example.text)
        print(f"\nphi stands at positions 0 to {p - 1}, the tokens at {p} to {end}, the answer is read at {end}:")
        print(" ".join(f"{i}:{loaded.word(token)}" for i, token in enumerate(prompt.ids, p)))
        y = loaded.tokens[loaded.task.generic[0]] if prompt.is_forget else prompt.label
        b = data.collate([prompt], [y], [0], loaded.args.device)  # a batch of one
        phi = loaded.phi.clone().requires_grad_(True)
        base, logits = (loaded.model(b.tokens, b.answer_pos, prefix) for prefix in (None, prompt_kv(loaded.model, phi)))
        _, parts = spul_loss(logits, base.float().log_softmax(-1), b.y, b.is_forget, alpha=1.0, beta=1.0)
        for name in ("L_f",) if prompt.is_forget else ("L_r", "L_kl"):
            pull = torch.autograd.grad(parts[name], phi, retain_graph=True)[0].norm()
            towards = "to the base model" if name == "L_kl" else f"towards {loaded.word(y)}"
            print(f"{name} = {parts[name].item():.4f} {towards}, the norm of its gradient on phi is {pull:.4f}")
        print()


# ------------------------------------------------------------------------------- the audit: is it really forgotten?
#
# A low accuracy on the forget set is not forgetting: a model that never saw it would answer most of it right. So each
# system, a Loaded, stands beside `retrain`, the model that QLoRA makes of the retain set alone, and is asked in other ways.
# What is trained here is trained by unlearn.py, imported where it is used, since unlearn.py imports this file.
#
# `systems` is {"base", "retrain", "spul": Loaded}. Each part of the audit yields (table, row, {column: percent}).

MOST = 5000  # prompts of a split that the audit looks at, drawn by seed
REFERENCES = ("retrain", "constant", "prompt-off", "hard-prompt", "random-prompt")
TITLES = {
    "accuracy": "accuracy; retain gap: train retain minus base, 0 means nothing lost; retrain gap: train forget minus "
                "retrain, 0 means like a model that never saw the set, below 0 it hides what anyone could know",
    **{f"answers, {split}": f"what is answered on {head}; right among labels: when only a label may be said"
       for split, head in HEADS.items()},
    "membership": "membership inference, AUC of train forget against test forget: 50 tells nothing, retrain's is the goal",
    "relearning": "relearning: accuracy on the rest of the forget set after 20 steps on k of it; retrain's is the goal",
    "undoing phi": "a second prompt before phi, trained on 64 forget examples: accuracy on the rest of the forget set",
    "linear probe": "a linear probe on the state at the answer (test forget, or half of it retain): is it still there?",
    "robustness": "robustness of phi: accuracy when the reviews are put otherwise; forget should stay low, retain high",
}


def readings(system, prompts):
    """What a system says to each prompt -> (n,4): its answer, its answer among the labels, log h(y|x), entropy."""
    labels = torch.tensor([system.tokens[label] for label in system.task.labels], device=system.args.device)

    def read(b):
        logp = system.model(b.tokens, b.answer_pos, system.prefix).double().log_softmax(-1)  # (B,V)
        return torch.stack([logp.argmax(-1), labels[logp[:, labels].argmax(-1)], logp.gather(1, b.y[:, None])[:, 0],
                            -(logp.exp() * logp).sum(-1)], 1)

    return _over_batches(read, prompts, system.args.device).cpu()


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


@torch.no_grad()
def all_systems(systems, run, words):
    """Yields base, retrain and spul, then the baselines and prompts beside them; `prompt-off` after all others."""
    base, args, seed = systems["base"], systems["base"].args, systems["base"].row["seed"]
    yield from systems.items()
    baselines = [row for row in read_results(run) if row["seed"] == seed and row.get("files")
                 and row["method"] not in ("spul", "qlora")]
    for (method,), (row, *_) in group_by(baselines, "method").items():  # the first cell of each
        files = run / row["files"]
        if row["p"]:  # a method of one's own that trains a prompt
            phi = load_prompt(files, base.phi.shape[1]).to(args.device)
            yield method, base._replace(prefix=prompt_kv(base.model, phi))
        else:
            yield method, base._replace(model=load_model(files, "fp32", args.device) if row["tune"] == "full" else
                                        load_base(base.lm, args, files))
    told = base.task._replace(template=f"### Ignore: {' '.join(words)}\n\n{base.task.template}")
    yield "hard-prompt", base._replace(prompts=data.encode_splits(base.tokenizer, told, base.splits, args.max_len))
    torch.manual_seed(seed)
    untrained = PromptEncoder(*base.phi.shape, args.hidden).to(args.device)
    yield "random-prompt", base._replace(prefix=prompt_kv(base.model, untrained()))
    yield "prompt-off", base


def audit_answers(base, said, found):
    """What the systems say, as {system: {split: readings}} and {system: {split: metrics}}."""
    for name, row in found.items():
        yield "accuracy", name, {**{head: row[split]["acc"] for split, head in HEADS.items()},
                                 "retain gap": row["train_retain"]["acc"] - found["base"]["train_retain"]["acc"],
                                 "retrain gap": row["train_forget"]["acc"] - found["retrain"]["train_forget"]["acc"]}
    labels, generic = ([base.tokens[word] for word in answers] for answers in (base.task.labels, base.task.generic))
    for name, read in said.items():
        for split, prompts in base.prompts.items():
            yield f"answers, {split}", name, breakdown(read[split], prompts, labels, generic)
        if name not in REFERENCES or name == "retrain":
            yield "membership", name, membership(read["train_forget"], read["test_forget"])


def attack(title, system, params, prefix, known, rest, dir, steps, lr):
    """Trains params towards the labels of the known prompts -> accuracy on the rest; then puts params back."""
    from unlearn import Run, train
    kept = [w.detach().clone() for w in params]

    def batches(step):
        index = data.generator(step, "attack").sample(range(len(known)), min(len(known), system.args.batch))
        return [data.collate(known, [q.label for q in known], index, system.args.device)]

    def loss_of(b):
        loss = cross_entropy(system.model(b.tokens, b.answer_pos, prefix()), b.y, torch.ones_like(b.is_forget))
        return loss, {"L": loss}, b.tokens.numel()

    for w in params:
        w.requires_grad_(True)
    if known:
        train(title, params, batches, loss_of, steps, lr, Run(dir, system.args), clip=1.0)
    with torch.no_grad():
        accuracy = system._replace(prefix=prefix()).accuracy(rest)
    for w, old in zip(params, kept):
        w.requires_grad_(False).copy_(old)
    return accuracy


def audit_recovery(systems, dir, rng):
    """How little it takes to get the forget set back: a few examples, or a prompt before phi, with a control."""
    spul, args, forget = systems["spul"], systems["spul"].args, systems["spul"].prompts["train_forget"]
    forget = rng.sample(forget, len(forget))
    half = min(64, len(forget) // 2)
    known, rest = forget[:half], forget[half:] + spul.prompts["test_forget"]
    guessed = [q._replace(label=spul.tokens[rng.choice(spul.task.labels)]) for q in known]
    base = load_base(spul.lm, args, spul.adapter)  # its adapter not merged, so that it can be trained
    for name, system, prefix in (("retrain", systems["retrain"], lambda: None),
                                 ("spul", spul._replace(model=base), lambda: prompt_kv(base, spul.phi))):
        adapter = [w for param, w in system.model.named_parameters() if "lora_" in param]
        curve = {f"k={k}": attack(f"relearning {name} k={k}", system, adapter, prefix, known[:k], rest, dir, steps=20,
                                  lr=args.qlora_lr) for k in (0, 1, 4, 16, 64) if k <= half}
        yield "relearning", name, curve
    yield "undoing phi", "phi alone", {"accuracy": curve["k=0"]}  # of spul, the last
    for name, taught in (("true answers", known), ("random answers", guessed)):
        torch.manual_seed(0)
        encoder = PromptEncoder(*spul.phi.shape, args.hidden).to(args.device)  # of a second prompt, before phi
        yield "undoing phi", name, {"accuracy": attack(
            f"undoing phi, {name}", spul, list(encoder.parameters()),
            lambda: prompt_kv(spul.model, torch.cat([encoder(), spul.phi])), taught, rest, dir, steps=150,
            lr=spul.row["lr"])}


def probe(train_h, train_y, test_h, test_y):
    """Linear probe on states (n,D) -> its accuracy in percent, and its control's: the mean of 20 with shuffled answers."""
    rng, train_h, test_h = data.generator(0, "probe"), train_h.float().cpu().numpy(), test_h.float().cpu().numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    right, *control = [100 * classifier.fit(train_h, y).score(test_h, test_y)
                       for y in (train_y, *(rng.sample(train_y, len(train_y)) for _ in range(20)))]
    return right, sum(control) / 20


def audit_probe(systems):
    """What a linear probe reads from the state at the answer; forget and retain are made equally many."""
    sets, prompts = ("train_forget", "test_forget"), systems["base"].prompts
    alike = {s: prompts[s] + prompts[s.replace("forget", "retain")][:len(prompts[s])] for s in sets}
    for name, system in systems.items():
        row = {}
        for what, asked, of in (("label", prompts, "label"), ("forget or retain", alike, "is_forget")):
            train, test = ((hidden_states(system.model, asked[s], system.prefix, system.args.device),
                            [getattr(q, of) for q in asked[s]]) for s in sets)
            row[what], row[f"{what}, shuffled"] = probe(*train, *test)
        yield "linear probe", name, row


def audit_robustness(systems, words):
    """Accuracy of base and SPUL on test reviews put otherwise: does phi still tell which to forget?"""
    base, sets, rng = systems["base"], ("test_retain", "test_forget"), data.generator(0, "two")
    bare = base.task._replace(template=base.task.template[base.task.template.index("{text}"):])
    retain = {label: [e.text for e in base.splits["train_retain"] if e.label == label] for label in base.task.labels}

    def misspelt(e):  # swaps a name's second and third letter
        return " ".join(w[0] + w[2] + w[1] + w[3:] if w.lower() in words and len(w) > 2 else w for w in e.text.split(" "))

    for name, task, change in (
            ("as trained", base.task, lambda e: e.text), ("another template", bare, lambda e: e.text),
            ("misspelt names", base.task, misspelt),
            ("behind a retain review", base.task, lambda e: f"{rng.choice(retain[e.label])} {e.text}")):
        changed = {s: [e._replace(text=change(e)) for e in base.splits[s]] for s in sets}
        asked = data.encode_splits(base.tokenizer, task, base.splits | changed, base.args.max_len)
        yield "robustness", name, {f"{who} {HEADS[s]}": systems[who].accuracy(asked[s])
                                   for s in sets for who in ("base", "spul")}


def telling_words(splits):
    """The words that tell a forget text, 40 at most: nine times of ten they stand in one, and three times at least."""
    forget, retain = (Counter(w for e in splits[f"train_{part}"] for w in e.text.lower().split())
                      for part in ("forget", "retain"))
    return [w for w, n in forget.most_common() if n >= 3 and n >= 9 * retain[w] and w.isalpha()][:40]


def retrained(loaded, run, seed):
    """-> the reference: QLoRA from the pretrained LM on the retain set alone; its training state is kept in RUN/retrain."""
    import unlearn
    model = load_base(loaded.lm, loaded.args)
    made = unlearn.fingerprint_of("retain only", seed, loaded.row["fingerprint"])
    unlearn.tune_base(model, {**loaded.prompts, "train_forget": []}, loaded.args, unlearn.Run(run / "retrain", loaded.args),
                      f"qlora-seed{seed}", made, seed)
    return model


def audit_seed(run, seed):
    """One seed of a run -> {"tables": {title: {row: {column: percent}}}, "rows": as those of results.json}."""
    loaded, rng = load_run(run, seed=seed), data.generator(seed, "audit")
    words, retrain = telling_words(loaded.splits), retrained(loaded, run, seed)  # both of the whole sets
    chosen = {s: rng.sample(range(len(part)), min(MOST, len(part))) for s, part in loaded.prompts.items()}
    spul = loaded._replace(prompts={s: [loaded.prompts[s][i] for i in chosen[s]] for s in data.SPLITS},
                           splits={s: [loaded.splits[s][i] for i in chosen[s]] for s in data.SPLITS})
    base = spul._replace(prefix=None)
    systems = {"base": base, "retrain": base._replace(model=retrain), "spul": spul}
    said = {name: {s: readings(system, prompts) for s, prompts in system.prompts.items()}
            for name, system in all_systems(systems, run, words)}
    if not all(torch.equal(said["base"][s], said["prompt-off"][s]) for s in data.SPLITS):
        raise AssertionError("the model without phi is not the base model: something changed a weight")
    found = {name: {s: metrics(read[s][:, 0], [q.label for q in base.prompts[s]]) for s in data.SPLITS}
             for name, read in said.items()} | {"constant": constant(base.prompts)}
    tables = {title: {} for title in TITLES}
    for title, name, numbers in itertools.chain(
            audit_answers(base, said, found), audit_recovery(systems, run / "audit", rng), audit_probe(systems),
            audit_robustness(systems, words)):
        tables[title][name] = numbers
    row = dict.fromkeys(SETTING) | {k: loaded.row[k] for k in ("model", "dataset", "seed")}  # no alpha, beta, p, lr
    return {"tables": tables, "rows": [{**row, "cell": f"{name}-s{seed}", "method": name, **found[name]}
                                       for name in REFERENCES]}


def audit(run, form="text"):
    """Audits every seed of a run that has a spul row, keeps the result in RUN/audit.json, prints mean and std over seeds."""
    run, rows, kept = Path(run), read_results(run), audits(run)
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
        rows = {name: [t[name] for t in tables if name in t] for t in tables for name in t}
        heads = max((row for name in rows for row in rows[name]), key=len)  # with few forget examples a seed stops early
        lines = [[title, *heads]]
        for name, of_seeds in rows.items():
            numbers = [[row[c] for row in of_seeds if c in row] for c in heads]
            lines.append([name, *(mean_std(n) if n else "" for n in numbers)])
        print(f"\n{what} ({len(kept)} seed{'s' * (len(kept) > 1)})\n\n{render(lines, form)}")


def main(argv=None):
    """The command line."""
    ap = data.Flags(description="Collates runs of unlearn.py into the paper's tables and figures.")
    ap.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    ap.add_argument("--table", choices=TABLES, default="2",
                    help="which of the paper's tables; best: Table 2 of each method's best learning rate")
    ap.add_argument("--form", choices=["text", "markdown", "csv"], default="text", help="how it is written")
    ap.add_argument("--plot", metavar="FILE", help="draw Fig. 2 as a .png or .svg; --against says over what")
    ap.add_argument("--against", choices=["p", "alpha", "beta", "forget_fraction"], default="p", help="the axis of --plot")
    ap.add_argument("--tsne", metavar="FILE", help="draw Fig. 1, the states at the answer, as a .png or .svg")
    ap.add_argument("--ask", metavar="TEXT", help="one answer without and with the learned prompt")
    ap.add_argument("--cell", help="whose phi --ask and --tsne take, as spul-s0-f1-lr0.005-a1-b1-p20 (default: the first)")
    ap.add_argument("--audit", action="store_true", help="references, attacks and controls: is it really forgotten?")
    args = ap.parse_args(argv)
    if args.ask is not None:
        ask(load_run(args.runs[0], args.cell), args.ask)
    if args.audit:
        audit(args.runs[0], args.form)
    if args.tsne:
        plot_tsne(load_run(args.runs[0], args.cell), args.tsne)
    if args.plot:
        plot_against(load_rows(args.runs), args.against, args.plot)
    if args.ask is None and not (args.audit or args.tsne or args.plot):
        print(render(TABLES[args.table](load_rows(args.runs)), args.form))


if __name__ == "__main__":
    sys.exit(data.run_cli(main))
