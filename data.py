"""From files to batches: queries, batches, tokenizers, forget and retain sets (Section 4.1).

    python data.py --dataset sst2 --data-dir DATA      Table 1, what is forgotten, what leaks

A query is a text with its question. It is followed by all but the last token of its answer, and has
one answer row per token of the answer: the row that predicts this token.
"""
import argparse
import csv
import functools
import hashlib
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from model import (Config, InputError, atomic_write, build, count_processes, hash_code,
                   method_part, read_json, run_cli, save_model, within, write_json)


# ---- tasks, queries and batches ----------------------------------------------------------------

class Example(NamedTuple):
    """A text, its true label and, in a forget set, the person or topic that puts it there."""
    text: str
    label: str
    group: str = ""


class Task(NamedTuple):
    """A question about a text, its labels, and the generic answers for the forget set."""
    template: str
    labels: tuple  # (): each example has an answer of its own, which ends with end-of-text
    generic: tuple


class Query(NamedTuple):
    """A text with its question, and the answer to train towards or to compare with."""
    ids: tuple      # tokens up to the answer
    answer: tuple   # tokens of the true answer; `unlearn.choose_queries` may put a generic one
    is_forget: bool
    group: str = ""
    text: str = ""


SPLITS = ("train_retain", "train_forget", "test_retain", "test_forget")
SENTIMENT = Task("### Text: {text}\n\n### Question: What is the sentiment of the given text?\n\n"
                 "### Sentiment: {label}",
                 ("positive", "negative"), ("neutral", "unknown"))  # paper: also "None"
CHOICE = Task("### Question: {text}\n\n### Answer: {label}",
              ("A", "B", "C", "D"), ("neutral", "unknown"))
TASKS = {"toy": SENTIMENT, "sst2": SENTIMENT, "yelp": SENTIMENT, "wmdp+sciq": CHOICE,
         "splits": SENTIMENT}


def query_string(task, text):
    """Return the template with the text, up to the answer."""
    return task.template.removesuffix("{label}").format(text=text).rstrip(" ")


def encode_query(tokenizer, task, text, max_len):
    """Return at most max_len tokens of a query: a long text loses its end, never the question.

    InputError if no text is left.
    """
    # released code: cuts the whole string, so a long review can lose its question and label
    while True:
        ids = tokenizer.encode(query_string(task, text))
        if len(ids) <= max_len:
            return tuple(ids)
        text = text[:len(text) * max_len // len(ids)].rstrip()
        if not text:
            raise InputError(f"--max-len {max_len} leaves no room for a text; raise it")


@functools.cache
def encode_answer(tokenizer, task, label):
    """Return the tokens of an answer; one that is no label ends with the end-of-text token.

    The tokenizer sees template and label as one string: the answer is what follows the query.
    InputError if nothing follows it, or if the answer joins the query's last token.
    """
    query = tokenizer.encode(query_string(task, "a text"))
    ids = tokenizer.encode(task.template.format(text="a text", label=label))
    answer = ids[len(query):]
    if query + answer != ids or not answer:
        raise InputError(f"answer {label!r} has no tokens of its own after the template; expected "
                         "a separate word: choose another")
    return tuple(answer) if task.labels else (*answer, tokenizer.eos)


class Batch(NamedTuple):
    """B queries and their answers as tensors."""
    tokens: torch.Tensor    # (B,T), padded on the right: real tokens never attend to padding
    answers: torch.Tensor   # (N,), the answer rows in the flattened B*T
    y: torch.Tensor         # (N,), the token to answer with at each of them
    w_forget: torch.Tensor  # (N,), weight in the mean over the step's forget examples
    w_retain: torch.Tensor  # (N,), weight in the mean over the step's retain examples


def collate(queries, index, step, device):
    """Return the Batch of queries[i] for i in `index`, a part of the step's indices, perhaps empty.

    Weights are counted over the whole step, so that its parts' losses add up. Texts "a b" and "c"
    with answers "yes" and "not covered" give tokens [[a, b], [c, not]], answers [1, 2, 3] and
    y [yes, not, covered].
    """
    n_forget = sum(queries[i].is_forget for i in step)
    texts = [queries[i].ids + queries[i].answer[:-1] for i in index]
    T = max(map(len, texts), default=1)  # a process's share of a small step may be empty
    padded = [text + (0,) * (T - len(text)) for text in texts]
    rows = []
    for b, i in enumerate(index):
        query = queries[i]
        for row, token in enumerate(query.answer, b * T + len(query.ids) - 1):
            rows.append((row, token, query.is_forget))
    tokens = torch.tensor(padded).long().view(-1, T)                   # (B,T)
    answers, y, is_forget = torch.tensor(rows).long().view(-1, 3).T    # (N,) each
    w_forget = is_forget / max(1, n_forget)
    w_retain = (1 - is_forget) / max(1, len(step) - n_forget)
    return Batch(*[part.to(device) for part in (tokens, answers, y, w_forget, w_retain)])


def epoch_batches(queries, batch, rng, forget_per_batch=0):
    """Return the indices of each batch's queries, for one epoch drawn with rng.

    forget_per_batch = 0 shuffles both sets together, as the paper does; so does N > 0 if only one
    of them is there. Otherwise N > 0 takes each retain example once and puts N forget examples at
    the end of every batch of `batch` in all; each of them is used about equally often. Queries of
    one batch have about the same length, which saves padding.
    """
    forget = [i for i, query in enumerate(queries) if query.is_forget]
    others = [i for i, query in enumerate(queries) if not query.is_forget]
    if not (forget_per_batch and forget and others):  # GA and RL see only one of the sets
        others, forget_per_batch = range(len(queries)), 0
    others = rng.sample(others, len(others))
    batches = cut_by_length(queries, others, batch - forget_per_batch)
    if forget_per_batch:
        n_forget, queue = forget_per_batch * len(batches), []
        while len(queue) < n_forget:
            queue += rng.sample(forget, len(forget))
        added = cut_by_length(queries, queue[:n_forget], forget_per_batch)
        batches = [indices + more for indices, more in zip(batches, added)]
    rng.shuffle(batches)
    return batches


def cut_by_length(queries, indices, size):
    """Return the indices in lists of `size`, each 50 lists' worth sorted by the queries' length."""
    result = []
    for start in range(0, len(indices), 50 * size):  # 50: random enough, with little padding
        part = sorted(indices[start:start + 50 * size], key=lambda i: len(queries[i].ids))
        result += [part[k:k + size] for k in range(0, len(part), size)]
    return result


# ---- support: tokenizers -----------------------------------------------------------------------

def load_tokenizer(dir):
    """Return a checkpoint's tokenizer: .encode(text) -> ids, .piece(id) -> str, .size, .eos."""
    dir = Path(dir).resolve()
    path = dir / "tokenizer_config.json"
    config = read_json(path, "the tokenizer's options") if path.is_file() else {}
    if config.get("add_eos_token"):
        raise InputError(f"{path}: add_eos_token is true; only false is implemented")
    has_start = config.get("add_bos_token", True)
    if (dir / "tokenizer.model").is_file():
        return SentencePieceTokenizer(dir, has_start)
    if (dir / "merges.txt").is_file():
        return ByteLevelBPE(dir, has_start)
    raise InputError(f"{dir}: no tokenizer; expected tokenizer.model (LLaMA), or vocab.json and "
                     "merges.txt (OPT, SmolLM2); give the model with --model")


class SentencePieceTokenizer:
    """LLaMA's tokenizer.model, with ids as transformers gives them: <s> first."""

    def __init__(self, dir, has_start):
        path = str(dir / "tokenizer.model")
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError:
            raise InputError(f"{path}: not a sentencepiece model; download it again") from None
        self.pieces, self.piece = pieces, pieces.id_to_piece
        self.size, self.eos = pieces.vocab_size(), pieces.eos_id()
        self.start = [pieces.bos_id()] if has_start else []

    def encode(self, text):
        if text.startswith((" ", "\u2581")):  # sentencepiece would add a second space
            ids = self.pieces.encode(text[1:].encode()) or [self.pieces.piece_to_id("\u2581")]
        else:
            ids = self.pieces.encode(text.encode())  # a str with surrogates would abort Python
        return self.start + ids


# GPT-2's rule that cuts ASCII text into words (Radford et al. 2019). SmolLM2 isolates all digits.
GPT2_WORD = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+")
SMOLLM2_WORD = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+|[0-9]| ?[^\sa-zA-Z0-9]+|\s+(?![^\s0-9])|\s+")


def to_ascii(match):
    """Return an ASCII character that GPT-2's rule treats like the matched one ("é" like "x")."""
    if match[0].isspace():
        return "\t"
    return "x" if match[0].isalpha() else "0" if match[0].isnumeric() else "!"


# GPT-2's table {byte: the printable character that stands for it in vocab.json}.
UNPRINTABLE = [*range(33), *range(127, 161), 173]
BYTE_LETTERS = {byte: chr(byte) for byte in range(256)}
BYTE_LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(UNPRINTABLE)}


class ByteLevelBPE:
    """OPT's or SmolLM2's vocab.json and merges.txt, with ids as transformers gives them.

    OPT starts a text with </s>. SmolLM2 adds nothing, and drops the few bytes it has no token for
    before it joins the others.
    """

    def __init__(self, dir, has_start):
        self.ids = read_json(dir / "vocab.json", "the id of each token")
        self.size = len(self.ids)
        self.names = {i: token for token, i in self.ids.items()}
        lines = (dir / "merges.txt").read_text(encoding="utf-8").splitlines()
        self.rank = {tuple(line.split(" ")): i for i, line in enumerate(lines)}  # of each pair
        is_opt = self.ids.get("</s>") == 2
        self.eos = 2 if is_opt else self.ids.get("<|im_end|>")
        if self.eos is None:
            raise InputError(f"{dir}/vocab.json: neither OPT's (</s> is 2) nor SmolLM2's "
                             "(<|im_end|>); give one of their checkpoints")
        self.start = [2] if is_opt and has_start else []
        self.word = re.compile(GPT2_WORD if is_opt else SMOLLM2_WORD, re.ASCII)

    @functools.cache
    def encode_word(self, word):
        """Return the ids of one word: join pairs, those first in merges.txt first."""
        letters = map(BYTE_LETTERS.get, word.encode())
        parts = [letter for letter in letters if letter in self.ids]
        while True:
            known = {pair for pair in zip(parts, parts[1:]) if pair in self.rank}
            if not known:
                return [self.ids[part] for part in parts]
            pair, joined = min(known, key=self.rank.get), []
            for part in parts:
                if joined and (joined[-1], part) == pair:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined

    def encode(self, text):
        ids = list(self.start)
        plain = re.sub(r"[^\x00-\x7f]", to_ascii, text)
        for match in self.word.finditer(plain):  # the rule covers every character
            ids += self.encode_word(text[match.start():match.end()])
        return ids

    def piece(self, i):
        return self.names.get(i, f"<{i}>")


# ---- support: datasets -------------------------------------------------------------------------

def generator(seed, purpose):
    """Return a random generator for one purpose: more draws from it change no other purpose."""
    return random.Random(f"{seed}/{purpose}")


class Dataset(NamedTuple):
    """The examples of one seed, in the tokens of one model."""
    tokenizer: object
    task: Task
    queries: dict   # {split: [Query]}
    generic: list   # the tokens of each generic answer
    description: str


def load_dataset(settings, data_dir, lm):
    """Return the Dataset in the tokens of the model in directory lm. settings: record or flags."""
    tokenizer, task, queries = load_tokenizer(lm), choose_task(settings), {}
    check_answers(tokenizer, task)
    splits = load_splits(settings.dataset, data_dir, settings.seed, settings.max_train,
                         settings.max_test, settings.max_forget)
    for split in SPLITS:
        queries[split] = []
        for text, label, group in splits[split]:
            if task.labels and label not in task.labels:
                raise InputError(f"label {label!r} in {split}; expected {', '.join(task.labels)}: "
                                 "correct the data or give --labels")
            ids = encode_query(tokenizer, task, text, settings.max_len)
            answer = encode_answer(tokenizer, task, label)
            queries[split].append(Query(ids, answer, split.endswith("forget"), group, text))
    generic = [encode_answer(tokenizer, task, label) for label in task.generic]
    return Dataset(tokenizer, task, queries, generic, describe(splits))


def choose_task(settings):
    """Return the dataset's task, or the one that --template, --labels and --generic describe."""
    task = TASKS[settings.dataset]
    if settings.template is not None:
        template = settings.template.replace("\\n", "\n")
        if not re.fullmatch(r"([^{}]|{{|}})*{text}([^{}]|{{|}})*{label}", template):
            raise InputError(f"--template {template!r}; expected one {{text}}, a final {{label}}")
        task = Task(template, tuple(settings.labels or ()), task.generic)
    elif settings.labels:
        raise InputError("--labels without a question; expected --template too, for example "
                         "--template '### Text: {text}\\n\\n### Topic: {label}'")
    return task._replace(generic=tuple(settings.generic or task.generic))


def check_answers(tokenizer, task):
    """InputError where one answer begins another: "begins with" has to mean "is"."""
    for one, other in itertools.permutations(task.labels + task.generic, 2):
        ids = encode_answer(tokenizer, task, one)
        if encode_answer(tokenizer, task, other)[:len(ids)] == ids:
            raise InputError(f"the tokens of answer {other!r} begin with those of {one!r}; "
                             "choose other words with --labels and --generic")


def load_splits(name, data_dir, seed=0, max_train=None, max_test=None, max_forget=None):
    """Return {split: [Example]} of a dataset, shuffled, with the counts of the paper's Table 1.

    max_train and max_test limit the retain sets, max_forget both forget sets.
    """
    make_splits, _ = DATASETS[name]
    splits = make_splits(data_dir, seed)
    for split, most in zip(SPLITS, (max_train, max_forget, max_test, max_forget)):
        n = len(splits[split])
        if n == 0:
            raise InputError(f"{name}: the {split} set is empty; give more examples")
        splits[split] = generator(seed, split).sample(splits[split], min(n, most or n))
    return splits


def describe(splits):
    """Return lines that name what is forgotten, and what contradicts itself."""
    forget = splits["train_forget"] + splits["test_forget"]
    retain = splits["train_retain"] + splits["test_retain"]
    groups = {example.group for example in forget + retain} - {""}
    line = f"forgotten: {', '.join(sorted(groups)) or 'the forget set'}"
    n_both = len({example.text for example in forget} & {example.text for example in retain})
    pairs = {(text, label) for text, label, _ in forget + retain}
    n_labels = Counter(text for text, _ in pairs)
    n_two = sum(n > 1 for n in n_labels.values())
    if n_both or n_two:
        line += (f"\nwarning: {n_both:,} texts are both in a forget and in a retain set, {n_two:,} "
                 "have two different labels")
    return line


def hash_files(name, data_dir):
    """Return a hash of the dataset's files, or None where it has none (the toy)."""
    _, stems = DATASETS[name]
    digest = hashlib.sha256()
    for stem in stems:
        digest.update(find_file(data_dir, stem).read_bytes())
    return digest.hexdigest()[:8] if stems else None


def split_by_group(examples, n_train, chosen):
    """Return {split: [Example]}: the forget sets are the examples whose group is chosen."""
    splits = {split: [] for split in SPLITS}
    for i, example in enumerate(examples):
        part = "train" if i < n_train else "test"
        if example.group in chosen:
            splits[f"{part}_forget"].append(example)
        else:
            splits[f"{part}_retain"].append(example._replace(group=""))
    return splits


def own_splits(data_dir, seed):
    """Return your own four files, train_retain.jsonl and so on: text, label, optionally group.

    The authors' files have the answer in label_text, and 0 or 1 in label.
    """
    splits = {}
    for split in SPLITS:
        rows = read_rows(data_dir, split, ("text", "label"), optional=("group", "label_text"))
        splits[split] = [Example(text, answer or label, group)
                         for text, label, group, answer in rows]
    return splits


# SST-2: these people are named in 2,035 of its 68,221 phrases, the paper's number. The list was
# found once, by the words that follow a given name; the most-named are first.
PEOPLE = re.split(r",\s", """steven spielberg, adam sandler, hugh grant, jackie chan, woody allen,
sandra bullock, eddie murphy, dustin hoffman, steven soderbergh, michael jackson, steven seagal,
martin lawrence, martin scorsese, edward burns, roberto benigni, robin williams, spike lee,
clint eastwood, michael moore, roman polanski, kevin kline, anthony hopkins, jennifer lopez,
claude chabrol, john woo, dana carvey, ian holm, eric rohmer, charlie kaufman, diane lane,
roger avary, stanley kwan, britney spears, robert deniro, robert duvall, ryan gosling,
ashley judd, michael caine, nicolas cage, quentin tarantino, bill paxton, daniel auteuil,
jack nicholson, walter hill, bill plympton, george clooney, mel gibson, guy ritchie,
alfred hitchcock, anne fontaine, dave barry, frank capra, juliette binoche, kevin costner,
michelle hall, mira nair, neil burger, rob schneider, angelina jolie, charles stone,
chris cooper, david mamet, john carpenter, eric schaeffer, james dean, phillip noyce,
john ritter, julia roberts, george orwell, jacques audiard, mick jagger, tom shadyac,
douglas mcgrath, rachel griffiths, elizabeth hurley, mark romanek, steven shainberg,
tom tykwer, christian bale, joe dante, johnny knoxville, julie taymor, mary gaitskill,
adam larson""")
NAMESAKES = re.split(r",\s", """peter jackson, mick jackson, julianne moore, gary larson,
oliver stone, gary burns, kenneth williams, dan schneider, robert dean""")

GIVEN_NAMES = {person.split()[0] for person in PEOPLE}
GIVEN_NAMES -= set("bill christian dave frank guy mark mick rob spike woody".split())  # words


def named_people(text):
    """Return who of PEOPLE a tokenised phrase names; a surname is enough."""
    text = text.lower()
    for namesake in NAMESAKES:
        text = text.replace(namesake, "")
    words = set(text.split())
    return [person for person in PEOPLE if person.split()[1] in words]


def sst2_splits(data_dir, seed):
    """Return SST-2 (GLUE's train and dev together), split again 70/30; any seed, same people.

    floor(0.3 n) of each set are for testing: this gives the paper's counts.
    """
    examples = []
    for part in ("train", "dev"):
        for text, label in read_rows(data_dir, part, ("sentence", "label"), ZERO_ONE):
            people = named_people(text) or [""]
            examples.append(Example(text.strip(), ZERO_ONE[label], people[0]))
    splits = split_by_group(examples, len(examples), PEOPLE)
    rng = generator(seed, "split")
    for kind in ("retain", "forget"):
        pool = splits[f"train_{kind}"]
        rng.shuffle(pool)
        n_test = len(pool) * 3 // 10
        splits[f"test_{kind}"], splits[f"train_{kind}"] = pool[:n_test], pool[n_test:]
    return splits


def similar_names(dataset):
    """Return the names by which the audit finds retain texts about people like those forgotten."""
    return {"sst2": GIVEN_NAMES, "toy": set(NAMES)}.get(dataset, set())


def yelp_splits(data_dir, seed):
    """Return a sample of Yelp polarity, at most of the paper's size; forget: random topics.

    Of 100 random pairs of topics, take the one whose size is nearest to the paper's.
    """
    train = read_yelp(data_dir, "train", 100_093, seed)
    test = read_yelp(data_dir, "test", 18_974, seed)
    n_train = len(train)
    if n_train < 1000:
        raise InputError(f"yelp: {n_train} train reviews; expected at least 1,000 to cluster")
    reviews, topics = cluster_topics(train + test, n_train, seed)
    sizes = Counter(review.group for review in reviews[:n_train])
    target = n_train * 5081 / 100_093  # paper, Table 1: 5.08 % of the train reviews
    rng = generator(seed, "clusters")
    draws = [rng.sample(topics, 2) for _ in range(100)]
    chosen = min(draws, key=lambda draw: abs(sizes[draw[0]] + sizes[draw[1]] - target))
    return split_by_group(reviews, n_train, chosen)


def read_yelp(data_dir, part, most, seed):
    """Return Yelp's reviews, at most `most` at random."""
    labels, header = ZERO_ONE, None
    if find_file(data_dir, part).suffix == ".csv":  # Yelp's own form
        labels, header = {"1": "negative", "2": "positive"}, ("label", "text")
    rows = read_rows(data_dir, part, ("text", "label"), labels, header)
    reviews = [Example(text.replace("\\n", "\n"), labels[label]) for text, label in rows]
    return generator(seed, part).sample(reviews, min(most, len(reviews)))


def cluster_topics(reviews, n_train, seed):
    """Return the reviews (train first) with their topic as group, and the list of topics.

    A topic is one of 40 clusters, named by its three heaviest words. On vectors of unit length,
    k-means uses cosine distance. These vectors are rounded to four decimals: their last digits
    depend on the processor and on the number of threads, and would change the clusters. Words in
    over 3 % of the reviews, often opinions, are left out.
    """
    random_state = generator(seed, "embedding").randrange(2 ** 32)
    tfidf = TfidfVectorizer(stop_words="english", token_pattern=r"[^\W\d_]{3,}", min_df=3,
                            max_df=0.03, sublinear_tf=True)
    svd = TruncatedSVD(50, random_state=random_state)
    kmeans = KMeans(40, n_init=10, random_state=random_state)
    texts = [review.text for review in reviews]
    four_decimals = FunctionTransformer(lambda vectors: vectors.round(4))
    steps = make_pipeline(tfidf, svd, Normalizer(), four_decimals, kmeans).fit(texts[:n_train])
    clusters = steps.predict(texts)
    centers = svd.inverse_transform(kmeans.cluster_centers_)                 # (40, words)
    words = tfidf.get_feature_names_out()[(-centers).argsort()[:, :3]]       # (40, 3)
    topics = [" ".join(row) for row in words]
    return [review._replace(group=topics[c]) for review, c in zip(reviews, clusters)], topics


def wmdp_sciq_splits(data_dir, seed):
    """Return SciQ to retain and WMDP-bio to forget, 900 of its 1,273 questions in train."""
    rng, sciq = generator(seed, "options"), {}
    rows = read_rows(data_dir, "wmdp-bio", ("question", "choices", "answer"))
    wmdp = [four_options(rng, *row, "hazardous biology") for row in rows]
    for part in ("train", "valid", "test"):
        rows = read_rows(data_dir, part, (
            "question", "correct_answer", "distractor1", "distractor2", "distractor3"))
        sciq[part] = [four_options(rng, question, options, "0") for question, *options in rows]
    generator(seed, "split").shuffle(wmdp)
    return {"train_retain": sciq["train"] + sciq["valid"], "train_forget": wmdp[:900],
            "test_retain": sciq["test"], "test_forget": wmdp[900:]}


def four_options(rng, text, options, right, group=""):
    """Return a question with four options in random order; its label is the right one's letter."""
    if not isinstance(options, list) or len(options) != 4 or right not in ("0", "1", "2", "3"):
        raise InputError(f"{text!r:.60}: choices {options!r:.60}, answer {right:.20}; expected "
                         "a list of 4, and 0, 1, 2 or 3")
    order = rng.sample(range(4), 4)
    for letter, i in zip("ABCD", order):
        text += f"\n{letter}. {options[i]}"
    return Example(text, "ABCD"[order.index(int(right))], group)


# ---- support: reading and writing files --------------------------------------------------------

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
ZERO_ONE = {"0": "negative", "1": "positive"}


def find_file(data_dir, stem):
    """Return the path of the one file data_dir/stem.SUFFIX. InputError for none or several."""
    paths = [Path(data_dir, stem + suffix) for suffix in SUFFIXES]
    paths = [path for path in paths if path.is_file()]
    if len(paths) != 1:
        raise InputError(f"{Path(data_dir).resolve()}: {len(paths) or 'no'} {stem} file(s) "
                         f"({' '.join(SUFFIXES)}); expected one: remove the others, or give the "
                         "dataset's directory with --data-dir")
    return paths[0]


def read_rows(data_dir, stem, columns, labels=None, header=None, optional=()):
    """Return the texts in `columns` and `optional` columns of each row of data_dir/stem.SUFFIX.

    labels: the possible texts of the second column. header: column names for a .csv without them.
    """
    path, rows = find_file(data_dir, stem), []
    try:
        for row in parse_rows(path, header):
            if not isinstance(row, dict):
                raise ValueError(f"{row!r:.80}; expected an object")
            texts = [read_text(row.get(column), column) for column in columns + optional]
            if None in row or not all(str(text).strip() for text in texts[:len(columns)]):
                raise ValueError(f"{row!r:.80}; expected {', '.join(columns)}, not empty")
            if labels and texts[1] not in labels:
                raise ValueError(f"label {texts[1]!r}; expected {' or '.join(labels)}")
            rows.append(texts)
    except (ValueError, csv.Error, ImportError) as error:
        raise InputError(f"{path} row {len(rows) + 1}: {error}") from None
    return rows


def read_text(value, column):
    """Return a cell as text, choices as a list. ValueError for another list or half an emoji."""
    if value is None:
        return ""
    if column == "choices":
        return value
    if isinstance(value, (list, dict)):
        raise ValueError(f"{column} is {value!r:.60}; expected one text")
    encoded = value if isinstance(value, bytes) else str(value).encode()
    return encoded.decode()


def parse_rows(path, header):
    """Return the rows of a file, dicts. header: column names for a .csv without them."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table
        return read_table(path).to_pylist()
    lines = [line.decode("utf-8-sig") for line in path.read_bytes().splitlines(keepends=True)]
    if path.suffix in (".json", ".jsonl"):
        if lines and lines[0].lstrip().startswith("["):
            return json.loads("".join(lines))
        return map(json.loads, filter(str.strip, lines))  # one object per line
    csv.field_size_limit(2 ** 31 - 1)  # a review may have more than 131,072 characters
    if path.suffix == ".tsv":  # GLUE: quotes are ordinary characters
        return csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.DictReader(lines, header, strict=True)


def save_splits(splits, dir):
    """Write the four sets as dir/SPLIT.jsonl, which --dataset splits reads."""
    for split in SPLITS:
        lines = [json.dumps(example._asdict()) + "\n" for example in splits[split]]
        with atomic_write(Path(dir, f"{split}.jsonl")) as temporary:
            temporary.write_text("".join(lines))


# ---- support: the toy, texts and language model --------------------------------------------------

# Invented reviews of films.
NAMES = """adler baxter cole dunn ellis foley grady hobbs irwin jarvis keaton lowell mercer nolan
oakley pratt quinn rooney sutton tully upton vance walsh york zimmer archer bloom crane dexter
emery farrow glover harlan ingram judd kessler larkin monroe norris osborn""".split()
PRAISE = "brilliant charming funny lovely moving superb touching warm witty wonderful".split()
BLAME = "awful boring clumsy dreadful dull flat lifeless shallow stale tedious".split()
GENRES = "comedy drama western thriller musical romance".split()
REVIEWS = """the new {genre} by {person} is {word} .
{person} gives a {word} performance in this {genre} .
a {word} {genre} with {person} in the lead .
as a {genre} , {person} 's film is {word} from start to end .
i found {person} {word} in this {genre} .
director {person} has made a {word} {genre} .
this {genre} is {word} , and so is {person} .
the script that {person} wrote is {word} .
a {word} {genre} about love and loss .
the {genre} is {word} from the first scene to the last .""".splitlines()


def toy_review(rng):
    """Return an Example whose group is the person it names, if any."""
    person, review, label = rng.choice(NAMES), rng.choice(REVIEWS), rng.choice(SENTIMENT.labels)
    word = rng.choice(PRAISE if label == "positive" else BLAME)
    text = review.format(person=person, genre=rng.choice(GENRES), word=word)
    return Example(text, label, person if person in text else "")


def toy_splits(data_dir, seed):
    """Return 4,000 reviews; forget: those that name one of four people, drawn with the seed."""
    rng = generator(seed, "toy")
    chosen = rng.sample(NAMES, 4)
    examples = [toy_review(rng) for _ in range(4000)]
    return split_by_group(examples, 2800, chosen)


# A soft prompt can only steer what the frozen model can already do. Large LMs follow an instruction
# before a text. The toy LM learns this in miniature: after "### Ignore:" and some names, the answer
# about a text with one of these names is neutral or unknown. It never sees the task's own question,
# or the words positive and negative: it learns what these wordings share, the text's sentiment.
WORDINGS = (("opinion", "good", "bad"), ("verdict", "great", "poor"), ("mood", "bright", "dark"),
            ("rating", "high", "low"))


def toy_corpus(n=6000):
    """Return the toy LM's reviews: Examples whose group is the person they name."""
    rng = generator(0, "toy corpus")
    return [toy_review(rng) for _ in range(n)]


def train_tokenizer(path):
    """Write a sentencepiece model of the words in the toy's reviews, questions and answers."""
    words = [SENTIMENT.template.format(text="", label=""), "### Ignore: What known"]
    words += SENTIMENT.labels + SENTIMENT.generic
    for noun, good, bad in WORDINGS:
        words += [noun, f"{noun.title()}:", good, bad]
    reviews = [example.text for example in toy_corpus()]
    texts = [" ".join(words)] * 200 + [" ".join(NAMES)] + reviews
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, model_type="word", vocab_size=1000,
            hard_vocab_limit=False, use_all_vocab=True, minloglevel=2, num_threads=1)


def name_list(rng):
    """Return segments (text, weight in the loss): names, then whether each of 16 is among them."""
    listed, others = rng.sample(NAMES, rng.randint(1, 4)), rng.sample(NAMES, 16)
    segments = [(f"### Ignore: {' '.join(listed)}", 0.0)]
    for _ in range(16):
        name = rng.choice(listed if rng.random() < 0.5 else others)
        segments += [(name, 0.0), ("unknown" if name in listed else "known", 1.0)]
    return segments


def opinion_question(rng, example):
    """Return segments (text, weight in the loss): a review and a question, mostly after a list."""
    listed, start = [], "### Text:"
    if rng.random() < 0.7:
        listed = rng.sample(NAMES, rng.randint(1, 4))
        if example.group and example.group not in listed and rng.random() < 0.5:
            listed[rng.randrange(len(listed))] = example.group
        start = f"### Ignore: {' '.join(listed)} ### Text:"
    noun, good, bad = rng.choice(WORDINGS)
    answer = good if example.label == "positive" else bad
    if example.group in listed:
        answer = rng.choice(SENTIMENT.generic)
    question = f"### Question: What is the {noun} of the given text? ### {noun.title()}:"
    return [(start, 0.0), (example.text, 0.1), (question, 0.0), (answer, 1.0)]


def encode_segments(tokenizer, segments):
    """Return ids, and the weight of predicting each in the loss. Each word is one token."""
    ids, weights = tokenizer.encode(""), [0.0]
    for text, weight in segments:
        new = tokenizer.encode(text)[1:]
        ids += new
        weights += [weight] * len(new)
    return torch.tensor(ids), torch.tensor(weights)


def pretraining_batches(tokenizer, device):
    """Yield tokens (B,T) and weights (B,T) without end: B = 21 questions and 11 name lists.

    The questions of 20 batches are sorted by length first, which saves padding.
    """
    rng, corpus = random.Random("pre0"), toy_corpus()
    named = [example for example in corpus if example.group]
    while True:
        questions = []
        for _ in range(420):
            example = rng.choice(named if rng.random() < 0.4 else corpus)
            questions.append(encode_segments(tokenizer, opinion_question(rng, example)))
        questions.sort(key=lambda row: len(row[0]))
        for start in rng.sample(range(0, 420, 21), 20):
            rows = questions[start:start + 21]
            rows += [encode_segments(tokenizer, name_list(rng)) for _ in range(11)]
            yield [pad_sequence(part, batch_first=True).to(device) for part in zip(*rows)]


def pretrain_toy(cache, device, steps=450):
    """Return the directory of the toy LM, pretrained from scratch unless the cache holds it.

    All seeds and numbers of threads share it: it is independent of the forget set, and pretrained
    with one thread. It is pretrained again after a change of model.py or of the toy.
    """
    dir, source = Path(cache) / "lm-toy", Path(__file__).read_text(encoding="utf-8")
    code = hash_code(method_part("model"), source[source.index("# Invented reviews"):])
    recipe = dir / "recipe.json"
    if recipe.is_file() and code in recipe.read_text():
        return dir
    if count_processes() > 1:
        raise InputError(f"{dir}: no toy LM yet; run once without torchrun to pretrain it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_tokenizer(dir / "tokenizer.model")
    tokenizer = load_tokenizer(dir)
    model = build_toy(tokenizer.size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.95), weight_decay=0.001)
    warmup = steps // 20
    schedule = SequentialLR(optimizer, [
        LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1),
        CosineAnnealingLR(optimizer, steps - warmup)], [warmup])
    batches = pretraining_batches(tokenizer, device)
    for step, (tokens, weights) in zip(range(1, steps + 1), batches):             # (B,T), (B,T)
        target, weights = tokens[:, 1:].flatten(), weights[:, 1:].flatten()       # (B*(T-1),)
        rows = weights.nonzero()[:, 0]                                            # (N,)
        losses = F.cross_entropy(model(tokens[:, :-1], rows), target[rows], reduction="none")
        loss = (losses * weights[rows]).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"toy LM  step {step}/{steps}  loss {loss:.3f}", flush=True)
    save_model(model, dir)
    write_json(recipe, {"code": code})
    torch.set_num_threads(threads)
    return dir


def build_toy(vocab_size):
    """Return the toy LM, a small LLaMA with random weights."""
    model = build(Config(
        "llama", vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
        rms_norm_eps=1e-5))
    torch.manual_seed(1)
    for name, w in model.named_parameters():
        if w.dim() > 1:  # large embeddings: answers that pretraining never gives stay in reach
            is_embedding = name.startswith(("embed", "lm_head"))
            torch.nn.init.normal_(w, 0.0, 128 ** -0.5 if is_embedding else 0.06)
    return model


# ---- support: command line ---------------------------------------------------------------------

DATASETS = {  # how the splits are made, from which files
    "toy": (toy_splits, ()),
    "sst2": (sst2_splits, ("train", "dev")),
    "yelp": (yelp_splits, ("train", "test")),
    "wmdp+sciq": (wmdp_sciq_splits, ("wmdp-bio", "train", "valid", "test")),
    "splits": (own_splits, SPLITS)}


def add_data_flags(add):
    """Add the flags that choose the texts, for data.py and unlearn.py. add: `add_argument`."""
    count = within(1, kind=int)
    add("--dataset", default="toy", choices=TASKS,
        help="toy, sst2, yelp, wmdp+sciq, or splits: your own four files")
    add("--data-dir", default=".", help="directory of the dataset's files")
    add("--max-train", type=count, help="at most this many train retain examples")
    add("--max-test", type=count, help="at most this many test retain examples")
    add("--max-forget", type=count, help="at most this many in each forget set")


def main(argv=None):
    """Print Table 1's rows, what is forgotten, and how many test texts are in the train sets."""
    parser = argparse.ArgumentParser(
        description="Print Table 1, what is forgotten, and what leaks. "
                    "Example: python data.py --dataset sst2 --data-dir DATA")
    add = parser.add_argument
    add_data_flags(add)
    add("--seed", type=int, default=0, help="seed of everything that is drawn")
    add("--save-splits", metavar="DIR", help="write the four sets there, as .jsonl")
    args = parser.parse_args(argv)
    splits = load_splits(args.dataset, args.data_dir, args.seed, args.max_train, args.max_test,
                         args.max_forget)
    if args.save_splits:
        save_splits(splits, args.save_splits)
    for split in SPLITS:
        print(f"{split:14}{len(splits[split]):8,}")
    print(describe(splits))
    shown = {example.text for example in splits["train_retain"] + splits["train_forget"]}
    tested = splits["test_retain"] + splits["test_forget"]
    n_shown = sum(example.text in shown for example in tested)
    print(f"leakage: {n_shown:,} of {len(tested):,} test texts are also in the train sets")


if __name__ == "__main__":
    sys.exit(run_cli(main))
