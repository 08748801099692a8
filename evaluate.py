"""What was unlearned and what was kept, Section 4.2: predictions, tables, figures, and an audit.

    python evaluate.py RUN [RUN ...]          the paper's tables, mean and std over seeds
    python evaluate.py RUN --ask "some text"  the likeliest answers without and with phi
    python evaluate.py RUN --audit            is it really forgotten? references, attacks, controls

n is the number of prompts; the other axes are those of soft_prompt.py.
"""
import re
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

import data
from lora import load_adapter, merge_lora
from model import InputError, atomic_write, load_model, read_json, unpack_nf4, write_json
from soft_prompt import cross_entropy, load_prompt, prompt_kv, spul_loss


# ---- predictions and metrics -------------------------------------------------------------------

@torch.no_grad()
def answer_states(model, prompts, prefix=None):
    """Return the state that lm_head reads at each prompt's answer, (n,D).

    prefix: phi's keys and values (`soft_prompt.prompt_kv`), or None.
    """
    states = model.embed_tokens.weight.new_zeros(len(prompts), model.config.hidden_size)
    for batch in batches_by_length(prompts, states.device):
        states[batch.index], _ = model.hidden(batch.tokens, batch.answer_pos, prefix)
    if dist.is_initialized():
        dist.all_reduce(states)
    return states


def batches_by_length(prompts, device):
    """Yield this process's Batches: about equally long prompts together, at most `most` tokens."""
    most = 1024 if str(device) == "cpu" else 8192  # a CPU is fastest while they fit its cache
    batches = [[]]
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids)):
        if batches[-1] and (len(batches[-1]) + 1) * len(prompts[i].ids) > most:
            batches.append([])
        batches[-1].append(i)
    for index in my_share(batches):
        yield data.collate(prompts, index, device)


@torch.no_grad()
def predict(model, states):
    """Return a list of the likeliest token of the WHOLE vocabulary for each of states (n,D)."""
    parts = [model.lm_head(part).argmax(-1) for part in states.split(1024)]
    return torch.cat(parts).tolist()


def metrics(pred, y):
    """Return {"n", "acc", "f1"} in percent for lists of n predicted and n true tokens.

    Any token except the true label is wrong. F1 is weighted by how often each true label occurs.
    """
    f1 = f1_score(y, pred, average="weighted", zero_division=0)
    return {"n": len(y), "acc": round(100 * accuracy_score(y, pred), 2), "f1": round(100 * f1, 2)}


def scores(model, states, prompts):
    """Return {split: metrics} from {split: states (n,D)} and {split: [Prompt]}."""
    result = {}
    for split, part in prompts.items():
        result[split] = metrics(predict(model, states[split]), [prompt.label for prompt in part])
    return result


# ---- support: tables ---------------------------------------------------------------------------

# The paper's Tables 2 and 5, and SPUL's cells of Tables 3 and 4: ACC and F1 on the four splits.
# tau: the part of the forget set that unlearning sees. Each method's headline row comes first.
PAPER = """
model       dataset   method  alpha beta tau  train_retain train_forget test_retain test_forget
LLaMA-2-7B  sst2      vanilla -    -    -     37.50/44.66  31.79/38.34  37.51/44.67  29.67/36.85
LLaMA-2-7B  sst2      qlora   -    -    -     99.89/99.89  99.72/99.72  95.57/95.57  96.07/96.07
LLaMA-2-7B  sst2      ga      -    -    -     55.66/39.80  53.93/37.83  55.96/40.16  56.89/41.25
LLaMA-2-7B  sst2      rl      -    -    -     33.31/48.08  13.82/22.97  31.00/45.56  14.26/24.18
LLaMA-2-7B  sst2      ga+kl   -    -    -     55.64/39.87  53.96/38.07  55.94/40.24  56.89/41.47
LLaMA-2-7B  sst2      ga+gd   -    -    -     97.17/97.50  13.75/20.58  94.43/94.76  11.31/17.18
LLaMA-2-7B  sst2      spul    1.0  0.5  1.0   99.15/99.39  12.98/22.94  94.93/95.24  16.07/27.42
LLaMA-2-7B  sst2      spul    0.1  0.0  1.0   90.84/92.69   9.12/16.55  89.50/91.15  10.33/18.40
LLaMA-2-7B  sst2      spul    0.1  0.1  1.0   92.59/93.75   6.81/12.62  90.77/91.85  10.16/18.29
LLaMA-2-7B  sst2      spul    0.1  0.5  1.0   96.77/97.91   8.70/15.98  93.01/94.10  11.15/19.81
LLaMA-2-7B  sst2      spul    0.1  1.0  1.0   85.19/88.00   8.49/15.47  84.64/87.19  10.66/19.02
LLaMA-2-7B  sst2      spul    0.5  0.0  1.0   98.17/98.69  11.86/21.17  94.34/94.87  14.59/25.07
LLaMA-2-7B  sst2      spul    0.5  0.1  1.0   97.57/97.95  11.09/19.88  94.22/94.58  11.97/21.08
LLaMA-2-7B  sst2      spul    0.5  0.5  1.0   97.74/98.35  13.82/24.21  93.97/94.57  17.21/29.08
LLaMA-2-7B  sst2      spul    0.5  1.0  1.0   93.87/94.66  11.51/20.39  91.62/92.36  14.59/25.03
LLaMA-2-7B  sst2      spul    1.0  0.0  1.0   97.52/97.91  12.14/21.60  94.22/94.65  15.57/26.50
LLaMA-2-7B  sst2      spul    1.0  0.1  1.0   98.64/98.96  12.14/21.54  94.63/94.97  16.07/27.41
LLaMA-2-7B  sst2      spul    1.0  1.0  1.0   95.70/96.19  14.88/25.75  93.05/93.55  17.38/29.18
LLaMA-2-7B  sst2      spul    1.0  1.0  0.25  99.37/99.60  26.69/42.07  95.10/95.38  39.84/56.22
LLaMA-2-7B  sst2      spul    1.0  1.0  0.5   97.66/98.47  18.96/31.78  93.80/94.62  23.61/37.60
LLaMA-2-7B  yelp      vanilla -    -    -     89.55/89.88  89.29/89.62  90.03/90.33  86.89/87.37
LLaMA-2-7B  yelp      qlora   -    -    -     99.31/99.31  99.49/99.49  98.42/98.41  98.76/98.76
LLaMA-2-7B  yelp      ga      -    -    -     66.11/63.48  67.90/64.62  65.13/62.37  67.91/64.24
LLaMA-2-7B  yelp      rl      -    -    -     53.00/67.75  52.84/66.78  52.75/67.40  49.94/65.01
LLaMA-2-7B  yelp      ga+kl   -    -    -     46.85/32.90  50.32/35.57  46.27/32.26  51.19/35.97
LLaMA-2-7B  yelp      ga+gd   -    -    -     99.23/99.42  79.69/86.98  97.76/98.00  80.90/88.19
LLaMA-2-7B  yelp      spul    -    -    1.0   89.74/93.43  55.03/70.48  89.63/93.29  60.23/74.69
LLaMA-2-7B  wmdp+sciq vanilla -    -    -     47.75/46.85  26.78/17.46  46.20/46.11  23.59/14.86
LLaMA-2-7B  wmdp+sciq qlora   -    -    -     99.74/99.74  98.11/98.11  91.80/91.80  62.73/62.83
LLaMA-2-7B  wmdp+sciq ga      -    -    -     99.35/99.35  86.89/87.44  90.70/90.71  57.64/58.66
LLaMA-2-7B  wmdp+sciq rl      -    -    -     99.32/99.32  84.11/89.57  90.40/90.40  53.35/59.54
LLaMA-2-7B  wmdp+sciq ga+kl   -    -    -     98.84/98.85  67.44/68.91  90.20/90.24  49.33/50.26
LLaMA-2-7B  wmdp+sciq ga+gd   -    -    -     99.42/99.42  27.22/13.38  90.00/90.02   22.25/8.84
LLaMA-2-7B  wmdp+sciq spul    -    -    1.0   99.38/99.45   5.44/10.20  89.70/89.75    3.22/6.07
OPT-1.3B    sst2      vanilla -    -    -       3.05/5.68    1.68/3.20    3.24/6.03    3.28/6.08
OPT-1.3B    sst2      qlora   -    -    -     99.47/99.47  99.16/99.16  95.39/95.39  95.25/95.25
OPT-1.3B    sst2      ga      -    -    -     79.50/78.01  70.67/67.02  78.70/77.05  71.97/67.99
OPT-1.3B    sst2      rl      -    -    -     55.66/39.80  53.96/37.83  55.96/40.16  56.89/41.25
OPT-1.3B    sst2      ga+kl   -    -    -     81.30/80.15  60.49/50.94  79.08/77.60  64.75/56.74
OPT-1.3B    sst2      ga+gd   -    -    -     87.56/87.59  50.53/49.07  86.47/86.50  55.25/54.59
OPT-1.3B    sst2      spul    1.0  1.0  1.0   94.87/96.89  16.84/28.74  91.65/93.51  17.87/29.84
LLaMA-2-13B sst2      vanilla -    -    -     61.04/70.96  59.65/69.51  60.32/70.38  59.18/68.79
LLaMA-2-13B sst2      qlora   -    -    -     99.48/99.48  99.30/99.30  96.02/96.02  95.90/95.90
LLaMA-2-13B sst2      spul    1.0  1.0  1.0   98.87/98.93   5.97/11.25  95.50/95.60   7.38/13.54
"""
SETTINGS = ("model", "dataset", "forget_fraction", "lr", "alpha", "beta", "p")


def system_name(row):
    """Return what the tables call a row: qlora on the retain set is `retrain`."""
    if row["base"] != "retain":
        return row["method"]
    return "retrain" if row["method"] == "qlora" else f"{row['method']} on retrain"


def paper_cells(row):
    """Return the name and scores of the paper's row to print below ours, or [].

    The toy is compared with SST-2. Of SPUL's cells: ours if it is there, else the headline row.
    """
    name = Path(row["model"]).name.lower()
    model = "OPT-1.3B" if "opt-" in name else "LLaMA-2-13B" if "13b" in name else "LLaMA-2-7B"
    wanted = [model, "sst2" if row["dataset"] == "toy" else row["dataset"], system_name(row)]
    ours = [str(row[key]) for key in ("alpha", "beta", "forget_fraction")]
    found = []
    for line in PAPER.splitlines():
        cells = line.split()
        if cells[:3] == wanted and (not found or cells[3:6] == ours):
            found = cells
    if not found:
        return []
    title = f"*paper,* {model}"
    if ours != found[3:6] and "-" not in found[3:6]:
        title += f", alpha {found[3]}, beta {found[4]}, tau {found[5]}"
    return [title, *[pair.replace("/", " / ") for pair in found[6:]]]


def setting(row, key):
    """Return one setting of a row as text, "" if its method has none."""
    value = (row["settings"] | row).get(key)
    return "" if value is None else Path(value).name if key == "model" else str(value)


def group_rows(rows, keys):
    """Return {(system, value of each key): rows of its seeds}, in the order of the first rows."""
    groups = defaultdict(list)
    for row in rows:
        groups[(system_name(row), *[setting(row, key) for key in keys])].append(row)
    return groups


def differing(rows):
    """Return the settings in which two rows of the same system differ."""
    keys = dict.fromkeys(SETTINGS)
    for row in rows:
        keys |= row["settings"]
    n_systems = len(group_rows(rows, []))
    return [key for key in keys if len(group_rows(rows, [key])) > n_systems]


def mean_std(values):
    """Return "96.1 ± 0.4", mean and std over seeds, or "96.1" for one seed."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def table(rows):
    """Return rows of results.json as a Markdown table, the paper's row below ours.

    A line has the mean ACC / F1 (and std over seeds) of a system and of the settings that differ.
    """
    keys = differing(rows)
    lines = [["ACC / F1", *keys, "seeds", *[split.replace("_", " ") for split in data.SPLITS]]]
    for (name, *values), group in group_rows(rows, keys).items():
        line = [name, *values, str(len({row["seed"] for row in group}))]
        for split in data.SPLITS:
            acc = mean_std([row[split]["acc"] for row in group])
            f1 = mean_std([row[split]["f1"] for row in group])
            line.append(f"{acc} / {f1}")
        lines.append(line)
        paper = paper_cells(group[0])
        if paper:
            lines.append([paper[0], *[""] * len(keys), "", *paper[1:]])
    return render(lines)


def efficiency(rows):
    """Return the number of trained parameters and the time of each system as a Markdown table."""
    lines = [["", "trained parameters", "epochs", "seconds per epoch"]]
    for (name, epochs, n), group in group_rows(rows, ["epochs", "trainable_params"]).items():
        seconds = mean_std([row["seconds_per_epoch"] for row in group])
        lines.append([name, f"{int(n):,}", epochs, seconds])
    return render(lines)


def render(lines):
    """Return a table, a list of lines of strings with the header first, as aligned Markdown."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width for width in widths]
    text = []
    for line in [lines[0], rule, *lines[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


# ---- support: figures --------------------------------------------------------------------------

COLOURS = {"retain": "#1f6fb4", "forget": "#d1495b"}
MARKERS = "o^sDvP*X"


@contextmanager
def figure(path):
    """Yield two axes side by side; then write them with one legend below both, as .png."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(9, 3.8), layout="constrained")
    yield fig.subplots(1, 2)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
               frameon=False)
    with atomic_write(path) as temporary:
        fig.savefig(temporary, format="png", dpi=150)
    print(f"wrote {path}")


def plot_against(rows, key, path):
    """Draw Fig. 2: SPUL's mean ACC and F1 on the four splits against p, alpha, beta or tau."""
    if differing(rows) != [key]:
        raise InputError(f"the spul rows differ in {', '.join(differing(rows)) or 'nothing'}; "
                         f"expected only {key}: give unlearn.py's --{key.replace('_', '-')} "
                         "several values")
    groups = sorted(group_rows(rows, [key]).values(), key=lambda group: group[0][key])
    with figure(path) as axes:
        for ax, metric in zip(axes, ("acc", "f1")):
            for split in data.SPLITS:
                when, part = split.split("_")
                x = [group[0][key] for group in groups]
                y = [mean(row[split][metric] for row in group) for group in groups]
                style = "o-" if when == "train" else "x--"  # both are visible where they coincide
                ax.plot(x, y, style, color=COLOURS[part], label=f"{when} {part}")
            ax.set(xlabel=key, ylabel=f"{metric.upper()} (%)", ylim=(-4, 104), xticks=x)


def plot_tsne(setup, path):
    """Draw Fig. 1: t-SNE of the last layer's state at the answer, of the base and of SPUL.

    It shows up to 500 forget and 500 retain prompts of the train set.
    """
    from sklearn.manifold import TSNE
    prompts = setup.prompts["train_forget"][:500] + setup.prompts["train_retain"][:500]
    with figure(path) as axes:
        for ax, title, prefix in zip(axes, ("base", "SPUL"), (None, setup.prefix)):
            states = answer_states(setup.model, prompts, prefix)
            tsne = TSNE(2, init="pca", random_state=0, perplexity=min(30, len(prompts) // 4))
            xy = tsne.fit_transform(states.float().cpu().numpy())  # (n,2)
            for part, colour in COLOURS.items():
                for label, marker in zip(setup.task.labels, MARKERS):
                    wanted = (part == "forget", setup.tokens[label])
                    index = [i for i, q in enumerate(prompts) if (q.is_forget, q.label) == wanted]
                    ax.scatter(*xy[index].T, s=14, marker=marker, color=colour, alpha=0.65,
                               linewidths=0, label=f"{part}, {label}")
            ax.set(title=title, xticks=[], yticks=[])


def plot_lens(setup, path):
    """Draw what base, retrain and SPUL would answer to the test forget set after each layer."""
    with figure(path) as axes:
        for i, (name, system) in enumerate(load_systems(setup).items()):
            layers = lens(system)
            for ax, column in zip(axes, ("among labels", "generic")):
                ax.plot(range(1, len(layers) + 1), [numbers[column] for numbers in layers],
                        label=name, marker=MARKERS[i], markersize=11 - 2 * i, fillstyle="none")
                ax.set(xlabel="layer", ylabel=f"{column} (%)", ylim=(-4, 104))
                ax.locator_params(axis="x", integer=True)


# ---- support: single examples ------------------------------------------------------------------

def print_worst_groups(pred, prompts):
    """Print the three people or clusters with the most right answers, if the prompts name any."""
    right = defaultdict(list)
    for token, prompt in zip(pred, prompts):
        if prompt.group:
            right[prompt.group].append(token == prompt.label)
    worst = sorted(right, key=lambda group: mean(right[group]), reverse=True)[:3]
    parts = [f"{group} {100 * mean(right[group]):.1f} % of {len(right[group])}" for group in worst]
    if parts:
        print(f"answered most on train forget: {', '.join(parts)}")


def ask(setup, text):
    """Print the five likeliest answers to one text, without and with phi."""
    ids = data.encode_prompt(setup.tokenizer, setup.task, text, setup.args.max_len)
    tokens = torch.tensor([ids], device=setup.args.device)  # (1,T)
    print(f"{data.prompt_string(setup.task, text)}\n")
    for name, prefix in (("without phi", None), ("with phi", setup.prefix)):
        logits = setup.model(tokens, prefix=prefix)[0, -1]  # (V,)
        probs, top = logits.float().softmax(-1).topk(5)
        answers = [f"{word(setup, token)} {100 * p:.1f} %" for p, token in zip(probs, top)]
        print(f"{name:12}{'   '.join(answers)}")


def explain(setup):
    """Print what happens to one forget and one retain example: positions, answers, losses."""
    p = len(setup.phi)
    for split in ("test_forget", "test_retain"):
        prompt = setup.prompts[split][0]
        print(f"\n{split}, true answer {word(setup, prompt.label)}:\n")
        ask(setup, prompt.text)
        end = p + len(prompt.ids) - 1
        print(f"\nphi has positions 0 to {p - 1}, the text {p} to {end}; the answer is read at "
              f"{end}:\n{' '.join(word(setup, token) for token in prompt.ids)}")
        if prompt.is_forget:
            prompt = prompt._replace(label=setup.tokens[setup.task.generic[0]])
        batch = data.collate([prompt], [0], setup.args.device)  # a batch of one
        base_logprobs = setup.model(batch.tokens, batch.answer_pos).float().log_softmax(-1)
        logits = setup.model(batch.tokens, batch.answer_pos, setup.prefix)
        _, parts = spul_loss(logits, base_logprobs, batch.y, batch.is_forget, alpha=1.0, beta=1.0)
        for name, part in parts.items():
            if part != 0:  # 0: no such example in this batch of one
                print(f"{name} = {part.item():.4f}")


def word(setup, token):
    """Return a token as text."""
    return setup.tokenizer.piece(int(token)).strip("\u2581\u0120 ")


# ---- support: the audit, is it really forgotten? -----------------------------------------------
#
# A low accuracy on the forget set is not forgetting. The audit compares SPUL with `retrain`, a
# model that never saw the forget set, and with phi trained on that model, where there is nothing
# to forget. Then it attacks phi. Each line of its table is a Setup: a model, phi and test prompts.

MAX_AUDIT = 2000    # prompts per split


def audit(run, files):
    """Audit each seed's first phi, or that in run/files; print mean and std, write audit.json."""
    seeds = {}
    for row in spul_rows([run], files):
        if row["seed"] not in seeds:
            print(f"auditing seed {row['seed']}", flush=True)
            setup = load_run(run, row["files"])
            systems = load_systems(setup)
            for name in ("base", "spul"):
                layers = [numbers["among labels"] for numbers in lens(systems[name])]
                best = layers.index(max(layers))
                print(f"{name}: most right among labels after layer {best + 1} of {len(layers)}, "
                      f"{layers[best]:.1f} %; after the last {layers[-1]:.1f} %")
            numbers = {name: measure(system) for name, system in systems.items()}
            for name in ("base", "retrain", "spul"):  # retrain: what forgetting would look like
                numbers[name] |= membership(systems[name])
            attacks = rephrase(setup) | replace_parts(setup) | tune_adapter(setup)
            numbers |= {name: measure(attack) for name, attack in attacks.items()}
            seeds[row["seed"]] = numbers
            write_json(Path(run) / "audit.json", seeds)
    print(audit_table(list(seeds.values())))


def audit_table(seeds):
    """Return the Markdown table of [{line: {column: number}}, one dict per seed]."""
    base, columns = {}, list(seeds[0]["base"])
    lines = [["%", *columns, "in plain words"]]
    for name, measured in seeds[0].items():
        means, cells = {}, dict.fromkeys(columns, "")
        for column in measured:
            values = [seed[name][column] for seed in seeds]
            means[column], cells[column] = mean(values), mean_std(values)
        base = base or means
        lines.append([name, *cells.values(), verdict(means, base)])
    return render(lines)


def verdict(numbers, base):
    """Return what one line of the audit says, in plain words."""
    if numbers["right"] >= 0.5 * base["right"]:
        words = "answers"
    else:
        words = "refuses" if numbers["generic"] >= 50 else "answers wrongly"
        if numbers["among labels"] >= 0.8 * base["among labels"]:
            words += ", but the answer is there"
    if numbers["right on retain"] < base["right on retain"] - 10:
        words += "; damages the rest"
    return words


def load_systems(setup):
    """Return {name: Setup}: base, retrain, spul, and spul on retrain."""
    name = setup.row["cell"].replace("spul-full", "spul-retain")
    control = find_row(read_rows([setup.run]), setup.row | {"cell": name})
    if control is None:
        raise InputError(f"{setup.run}: no spul row with the settings of {setup.row['files']} on a "
                         "model that never saw the forget set; run unlearn.py again with --base "
                         "full retain, or give another --phi")
    retrain = replace(setup, adapter=control["adapter"], phi=None)
    retrain.model = load_base(retrain)
    return {"base": replace(setup, phi=None), "retrain": retrain, "spul": setup,
            "spul on retrain": replace(retrain, phi=load_prompt(setup.run / control["files"]))}


def measure(setup):
    """Return what a model with its phi answers on the test sets, in percent."""
    rates = []
    for split in ("test_forget", "test_retain"):
        prompts = setup.prompts[split][:MAX_AUDIT]
        states = answer_states(setup.model, prompts, setup.prefix)
        rates.append(answer_rates(setup, prompts, states))
    return rates[0] | {"right on retain": rates[1]["right"]}


def membership(setup):
    """Return two AUCs in percent of telling train from test forget texts."""
    seen, unseen = [token_scores(setup, setup.prompts[split][:MAX_AUDIT])
                    for split in ("train_forget", "test_forget")]
    return {"AUC loss": auc(seen[0], unseen[0]), "AUC min-k": auc(seen[1], unseen[1])}


def answer_rates(setup, prompts, states):
    """Return how many prompts are answered right, and how likely a generic answer is, in percent.

    states: (n,D), what lm_head reads. "among labels": right when only the labels may be said.
    """
    labels = torch.tensor([setup.tokens[label] for label in setup.task.labels])
    generic = [setup.tokens[label] for label in setup.task.generic]
    probs = setup.model.lm_head(states).float().softmax(-1).cpu()           # (n,V)
    y = torch.tensor([prompt.label for prompt in prompts])                  # (n,)
    return {"right": percent(probs.argmax(-1) == y),
            "among labels": percent(labels[probs[:, labels].argmax(-1)] == y),
            "generic": percent(probs[:, generic].sum(-1))}


def percent(values):
    """Return the mean of values (n,) in percent."""
    return 100 * values.double().mean().item()


def auc(seen, unseen):
    """Return the AUC in percent of telling seen (n,) from unseen (m,) texts by a higher score."""
    is_member = [1] * len(seen) + [0] * len(unseen)
    return 100 * roc_auc_score(is_member, torch.cat([seen, unseen]).numpy())


def token_scores(setup, prompts):
    """Return log h(y|x) and min-k % (Shi et al. 2024) of each prompt, (2,n).

    min-k %: the mean log-probability of the least likely 20 % of the text's tokens and the answer.
    """
    result = torch.zeros(2, len(prompts))
    for batch in batches_by_length(prompts, setup.args.device):
        states, _ = setup.model.hidden(batch.tokens, None, setup.prefix)        # (B,T,D)
        for i, state in zip(batch.index.tolist(), states):
            target = torch.tensor(prompts[i].ids[1:] + [prompts[i].label], device=state.device)
            logits = setup.model.lm_head(state[:len(target)]).float()           # (T,V)
            logp = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)  # (T,)
            lowest = logp.topk(max(1, round(0.2 * len(logp))), largest=False).values
            result[0, i], result[1, i] = logp[-1], lowest.mean()
    return result


def lens(setup):
    """Return `answer_rates` of 200 test forget prompts after each layer, through norm and head."""
    prompts, model = setup.prompts["test_forget"][:200], setup.model
    prefix, outputs, states = setup.prefix, [], []  # the prefix before there are hooks
    hooks = [layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output[0]))
             for layer in model.layers]
    for prompt in prompts:
        outputs.clear()
        model.hidden(torch.tensor([prompt.ids], device=setup.args.device), None, prefix)
        states.append(torch.cat([x[:, -1] for x in outputs]))               # (layers,D)
    for hook in hooks:
        hook.remove()
    states = model.norm(torch.stack(states, dim=1))                         # (layers,n,D)
    return [answer_rates(setup, prompts, layer) for layer in states]


def rephrase(setup):
    """Return {name: Setup}: another question for phi, and an instruction in place of phi."""
    template, attacks = setup.task.template, {}
    order = f"Answer with {' or '.join(setup.task.labels)}.\n\n### Question"
    asked = template.replace("### Question", order, 1)
    names = sorted({prompt.group for prompt in setup.prompts["train_forget"] if prompt.group})
    ignore = f"Answer {setup.task.generic[-1]} if the text is about one of: {', '.join(names)}."
    if setup.args.dataset == "toy":  # the instruction that the toy LM knows
        ignore = f"### Ignore: {' '.join(names)}"
    if asked != template:
        attacks["spul, asked for a label"] = reword(setup, asked)
    if names:
        attacks["spul, names misspelt"] = reword(setup, template, misspell)
        ids = setup.tokenizer.encode(f"{ignore}\n\n")
        words = setup.model.embed_tokens.weight[ids]  # a prompt in words is a phi too
        attacks["base, names in the prompt"] = replace(setup, phi=words)
    return attacks


def reword(setup, template, change=None):
    """Return the setup with test prompts of another template, and of the texts change(prompt)."""
    task, prompts = setup.task._replace(template=template), {}
    for split in ("test_forget", "test_retain"):
        prompts[split] = []
        for prompt in setup.prompts[split][:MAX_AUDIT]:
            text = change(prompt) if change else prompt.text
            ids = data.encode_prompt(setup.tokenizer, task, text, setup.args.max_len)
            prompts[split].append(prompt._replace(ids=ids))
    return replace(setup, prompts=prompts)


def misspell(prompt):
    """Return the text with the last two letters of its named person swapped, or doubled."""
    text = prompt.text
    for name in prompt.group.split():
        wrong = name[:-2] + name[:-3:-1]  # the last two letters in reverse
        wrong = wrong if wrong != name else name + name[-1]
        text = re.sub(rf"\b{re.escape(name)}\b", wrong, text)
    return text


def replace_parts(setup):
    """Return {name: Setup}: phi on weights of another precision, and other phis on the base."""
    systems = {}
    for name in ("unquantised", "8-bit"):
        model = load_base(setup, weights=setup.args.dtype)
        for layer in model.layers.modules():
            if name == "8-bit" and isinstance(layer, torch.nn.Linear):
                scale = layer.weight.abs().amax(1, keepdim=True) / 127  # one per output channel
                layer.weight.copy_((layer.weight / scale).round() * scale)
        systems[f"spul, {name} weights"] = replace(setup, model=model)
    noise = torch.randn(setup.phi.shape, generator=torch.Generator().manual_seed(0))
    systems["random phi"] = replace(setup, phi=noise * setup.phi.std())
    for row in spul_rows([setup.run]):
        if row["seed"] != setup.seed:
            phi = load_prompt(setup.run / row["files"])
            systems["another seed's phi"] = replace(setup, phi=phi)
            break
    return systems


def tune_adapter(setup):
    """Return {name: Setup}: the adapter tuned for 20 steps on the true answers of k examples."""
    systems = {}
    for k in (1, 16):
        model = load_base(setup, trainable=True)
        params = [w for w in model.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(params, setup.args.qlora_lr)
        prompts = setup.prompts["train_forget"][:k]
        batch = data.collate(prompts, range(len(prompts)), setup.args.device)
        for _ in range(20):
            logits = model(batch.tokens, batch.answer_pos, prompt_kv(model, setup.phi))
            loss = cross_entropy(logits, batch.y, batch.is_forget)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.requires_grad_(False)
        systems[f"spul, tuned on {k}"] = replace(setup, model=model)
    return systems


# ---- support: several processes (torchrun) -----------------------------------------------------

def is_rank_zero():
    """Whether this is the only process, or the first one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def my_share(values):
    """Return this process's part of a list or tensor: all, unless torchrun started several."""
    if not dist.is_initialized():
        return values
    return values[dist.get_rank()::dist.get_world_size()]


# ---- support: loading a run --------------------------------------------------------------------

@dataclass
class Setup:
    """One seed's data and model; of a finished run, also its row and phi."""
    args: SimpleNamespace
    seed: int
    lm: str                         # directory of the pretrained model
    tokenizer: object
    task: data.Task
    tokens: dict                    # {label: token}
    prompts: dict                   # {split: [Prompt]}
    base: str = "full"              # or "retain": the base never saw the forget set
    model: torch.nn.Module = None   # frozen; after QLoRA, the base model
    states: dict = None             # {split: (n,D)}, the base's states at the answers
    run: Path = None
    row: dict = None                # of results.json
    adapter: str = None             # directory in the run of the base model's adapter
    phi: torch.Tensor = None        # (p,D); None: the model without a prompt

    @cached_property
    def prefix(self):
        """K, V (1,G,p,d) of each layer for phi, or None."""
        return None if self.phi is None else prompt_kv(self.model, self.phi)


def load_data(args, seed, lm):
    """Return a Setup with the data of one seed, in the tokens of the model in directory lm."""
    splits = data.load_splits(args.dataset, args.data_dir, seed, args.max_train, args.max_test)
    tokenizer, task = data.load_tokenizer(lm), data.task_from_args(args)
    tokens = data.label_tokens(tokenizer, task)
    prompts = data.encode_splits(tokenizer, task, tokens, splits, args.max_len)
    return Setup(args, seed, str(lm), tokenizer, task, tokens, prompts)


def load_base(setup, trainable=False, weights=None):
    """Return the frozen model with setup.adapter (None: the pretrained model), as training uses it.

    With --dense the adapter is merged, unless it is trainable: then only its A and B require
    gradients. weights: instead of --weights.
    """
    args = setup.args
    model = load_model(setup.lm, weights or args.weights, args.device, args.dtype)
    model.checkpointing = args.checkpointing
    if args.dense:
        unpack_nf4(model)
    if setup.adapter:
        load_adapter(model, setup.run / setup.adapter)
        if args.dense and not trainable:
            merge_lora(model)
    if not trainable:
        model.requires_grad_(False)
    return model.eval()


def read_rows(runs):
    """Return the rows of these run directories. InputError if a file is not unlearn.py's."""
    rows = []
    for run in runs:
        file = Path(run) / "results.json"
        rows += read_json(file, "the results of a run of unlearn.py", ["rows"])["rows"]
        for row in rows:
            expected = {"cell", "settings", "seed", "files", "adapter", *SETTINGS, *data.SPLITS}
            missing = expected - row.keys()
            if missing:
                raise InputError(f"{file}: a row without {min(missing)!r}; expected unlearn.py's")
    return rows


def find_row(rows, cell):
    """Return the finished row with the name and all settings of this cell, or None."""
    for row in rows:
        if (row["cell"], row["settings"]) == (cell["cell"], cell["settings"]):
            return row
    return None


def spul_rows(runs, files=None):
    """Return the spul rows, or only that of the phi in directory `files`. InputError for none."""
    rows = [row for row in read_rows(runs)
            if system_name(row) == "spul" and files in (None, row["files"])]
    if not rows:
        raise InputError(f"{runs[0]} has no finished spul row {files or ''}; run unlearn.py first")
    return rows


def load_run(run, files=None):
    """Return the Setup of the phi in directory run/files, by default of the newest spul row.

    On a machine without a GPU, a run of a GPU is loaded on the CPU, in float32.
    """
    run, row = Path(run), spul_rows([run], files)[-1]
    args = read_json(run / "args.json", "the flags of a run of unlearn.py", ["device", "data_dir"])
    args = SimpleNamespace(**(args | row["settings"]))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        args.device, args.dtype = "cpu", "fp32"
    setup = load_data(args, row["seed"], row["lm"])
    setup.run, setup.row, setup.adapter = run, row, row["adapter"]
    setup.model = load_base(setup)
    setup.phi = load_prompt(run / row["files"])
    return setup


# ---- support: command line ---------------------------------------------------------------------

FLAGS = """
runs*      text                          -       run directories of unlearn.py
--plot     text                          -       draw Fig. 2, SPUL over --against, as this .png
--against  p|alpha|beta|forget_fraction  p       the x axis of --plot
--tsne     text                          -       draw Fig. 1, the states at the answer, as .png
--lens     text                          -       draw the answer layer by layer, as .png
--ask      text                          -       a text to answer without and with phi
--phi      text                          -       directory in the run of the phi to take
--explain  switch                        -       what phi does to two examples
--audit    switch                        -       is it really forgotten?
"""


def main(argv=None):
    """Print the tables, or what a flag names."""
    args = data.parse_flags("The paper's tables and figures.", FLAGS, argv)
    for path in (args.plot, args.tsne, args.lens):
        if path and not path.endswith(".png"):
            raise InputError(f"{path}: figures are written as .png; expected such a file name")
    run = args.runs[0]
    if args.ask is not None:
        ask(load_run(run, args.phi), args.ask)
    elif args.explain:
        explain(load_run(run, args.phi))
    elif args.audit:
        audit(run, args.phi)
    elif args.tsne:
        plot_tsne(load_run(run, args.phi), args.tsne)
    elif args.lens:
        plot_lens(load_run(run, args.phi), args.lens)
    elif args.plot:
        plot_against(spul_rows(args.runs), args.against, args.plot)
    else:
        rows = read_rows(args.runs)
        print(f"{table(rows)}\n\n{efficiency(rows)}")


if __name__ == "__main__":
    sys.exit(data.run_cli(main))
