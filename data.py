"""From files to batches: prompts, batches, tokenizers, forget and retain sets (Section 4.1).

    python data.py --dataset sst2 --data-dir DIR      Table 1, what is forgotten, what leaks
"""
import argparse
import csv
import functools
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from torch.nn.utils.rnn import pad_sequence

from model import InputError, atomic_write, read_json


# ---- tasks, prompts and batches ----------------------------------------------------------------

class Example(NamedTuple):
    """A text, its true label and, in a forget set, the person or topic that puts it there."""
    text: str
    label: str
    group: str = ""


class Task(NamedTuple):
    """A question about a text, its answers, and the generic answers for the forget set."""
    template: str
    labels: tuple
    generic: tuple


class Prompt(NamedTuple):
    """A query (not the soft prompt): ids, the tokens up to the answer, and label, the answer's.

    That is the true answer; for training `unlearn.choose_prompts` may put a generic one.
    """
    ids: list
    label: int
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


def prompt_string(task, text):
    """Return the template with the text, up to the answer."""
    return task.template.removesuffix("{label}").format(text=text).rstrip(" ")


class Batch(NamedTuple):
    """B prompts as tensors, with their answers."""
    tokens: torch.Tensor      # (B,T), padded on the right: real tokens never attend to padding
    answer_pos: torch.Tensor  # (B,), position whose logits are the answer
    y: torch.Tensor           # (B,), token to answer with
    is_forget: torch.Tensor   # (B,), bool
    index: torch.Tensor       # (B,), index of each prompt in the list given to `collate`


def collate(prompts, index, device):
    """Return the Batch of prompts[i] for each i of the list `index` (B)."""
    ids = [torch.tensor(prompts[i].ids) for i in index]
    tokens = pad_sequence(ids, batch_first=True)
    answer_pos = torch.tensor([len(row) - 1 for row in ids])
    y = torch.tensor([prompts[i].label for i in index])
    is_forget = torch.tensor([prompts[i].is_forget for i in index])
    batch = Batch(tokens, answer_pos, y, is_forget, torch.tensor(index))
    return Batch(*[field.to(device) for field in batch])


def epoch_batches(prompts, batch, rng, forget_per_batch=0):
    """Return the indices of each batch's prompts, for one epoch drawn with rng.

    forget_per_batch = 0 shuffles both sets together, as the paper does: on SST-2 a batch of 32
    holds about one forget example. N > 0 takes each retain example once and adds N forget examples
    to every batch. Prompts of one batch have about the same length, which saves padding.
    """
    forget = [i for i, prompt in enumerate(prompts) if prompt.is_forget]
    retain = [i for i, prompt in enumerate(prompts) if not prompt.is_forget]
    if not (forget and retain):  # only one of the sets, as GA and RL see it
        forget_per_batch = 0
    others = retain if forget_per_batch else range(len(prompts))
    others = rng.sample(others, len(others))
    batches = cut_by_length(prompts, others, batch - forget_per_batch)
    if forget_per_batch:
        n_forget, queue = forget_per_batch * len(batches), []
        while len(queue) < n_forget:
            queue += rng.sample(forget, len(forget))
        added = cut_by_length(prompts, queue[:n_forget], forget_per_batch)
        batches = [indices + more for indices, more in zip(batches, added)]
    rng.shuffle(batches)
    return batches


def cut_by_length(prompts, indices, size):
    """Return the indices in lists of `size`, each 50 lists' worth sorted by the prompts' length."""
    result = []
    for start in range(0, len(indices), 50 * size):  # 50: random enough, with little padding
        part = sorted(indices[start:start + 50 * size], key=lambda i: len(prompts[i].ids))
        result += [part[k:k + size] for k in range(0, len(part), size)]
    return result


# ---- support: tokenizers -----------------------------------------------------------------------

def label_tokens(tokenizer, task):
    """Return {label: token} of all labels and generic labels; InputError if one is several tokens.

    The tokenizer sees template and label as one string: the token is what follows the prompt's.
    """
    prompt = tokenizer.encode(prompt_string(task, "a text"))
    labels, tokens = task.labels + task.generic, {}
    for label in labels:
        ids = tokenizer.encode(task.template.format(text="a text", label=label))
        if ids[:-1] != prompt:
            raise InputError(f"label {label!r} is {len(ids) - len(prompt)} tokens here; expected "
                             "one: choose other words with --labels and --generic")
        tokens[label] = ids[-1]
    if len(set(tokens.values())) < len(labels):
        raise InputError(f"two labels have the same token: {tokens}; choose other words with "
                         "--labels and --generic")
    return tokens


def encode_prompt(tokenizer, task, text, max_len):
    """Return at most max_len ids of a prompt: a long text loses its end, never the question."""
    # released code: cuts the whole string, so a long review can lose its question and label
    ids = tokenizer.encode(prompt_string(task, text))
    while len(ids) > max_len:
        text = text[:len(text) * max_len // len(ids)].rstrip()
        if not text:
            raise InputError(f"--max-len {max_len} leaves no room for a text; raise it")
        ids = tokenizer.encode(prompt_string(task, text))
    return ids


def load_tokenizer(dir):
    """Return the tokenizer in a checkpoint directory: .encode(text) -> ids, .piece(id) -> str."""
    dir = Path(dir)
    if (dir / "tokenizer.model").is_file():
        return SentencePieceTokenizer(dir / "tokenizer.model")
    if (dir / "merges.txt").is_file():
        return ByteLevelBPE(dir)
    raise InputError(f"{dir}: no tokenizer; expected tokenizer.model (LLaMA), or vocab.json and "
                     "merges.txt (OPT, SmolLM2)")


class SentencePieceTokenizer:
    """LLaMA's tokenizer.model. encode(text) -> ids as transformers gives them, <s> first."""

    def __init__(self, path):
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise InputError(f"{path}: not a sentencepiece model; download it again") from None
        self.size = self.pieces.vocab_size()

    def encode(self, text):
        if text.startswith((" ", "\u2581")):  # sentencepiece would add a second space
            ids = self.pieces.encode(text[1:].encode()) or [self.pieces.piece_to_id("\u2581")]
        else:
            ids = self.pieces.encode(text.encode())  # a str with surrogates would abort Python
        return [self.pieces.bos_id()] + ids

    def piece(self, i):
        return self.pieces.id_to_piece(i)


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
BYTE_LETTERS = {byte: chr(byte) for byte in range(256)}
UNPRINTABLE = [byte for byte in range(256) if byte == 32 or not chr(byte).isprintable()]
for i, byte in enumerate(UNPRINTABLE):
    BYTE_LETTERS[byte] = chr(256 + i)


class ByteLevelBPE:
    """vocab.json and merges.txt of OPT or SmolLM2. encode(text) -> ids as transformers gives them.

    OPT starts a text with </s> (id 2). SmolLM2 adds nothing and has no token for a few rare bytes,
    which are dropped.
    """

    def __init__(self, dir):
        self.ids = read_json(dir / "vocab.json", "the id of each token")
        self.names = {i: token for token, i in self.ids.items()}
        lines = (dir / "merges.txt").read_text(encoding="utf-8").splitlines()
        self.rank = {pair: i for i, pair in enumerate(lines)}  # pair: two tokens and a space
        self.is_opt = self.ids.get("</s>") == 2
        if not self.is_opt and "<|im_start|>" not in self.ids:
            raise InputError(f"{dir}/vocab.json: neither OPT's (</s> is 2) nor SmolLM2's "
                             "(<|im_start|>); give one of their checkpoints")

    @functools.lru_cache(2 ** 16)
    def encode_word(self, word):
        """Return the ids of one word: always join the neighbours that merges.txt names first."""
        letters = [BYTE_LETTERS[byte] for byte in word.encode()]
        parts = [letter for letter in letters if letter in self.ids]
        while True:
            pairs = [f"{left} {right}" for left, right in zip(parts, parts[1:])]
            known = [pair for pair in pairs if pair in self.rank]
            if not known:
                return [self.ids[part] for part in parts]
            i = pairs.index(min(known, key=self.rank.get))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]

    def encode(self, text):
        ids = [2] if self.is_opt else []
        rule = GPT2_WORD if self.is_opt else SMOLLM2_WORD
        plain = re.sub(r"[^\x00-\x7f]", to_ascii, text)
        for match in re.finditer(rule, plain, re.ASCII):  # the rule covers every character
            ids += self.encode_word(text[match.start():match.end()])
        return ids

    def piece(self, i):
        return self.names.get(i, f"<{i}>")


# ---- support: datasets -------------------------------------------------------------------------

def generator(seed, purpose):
    """Return a random generator for one purpose: more draws from it change no other purpose."""
    return random.Random(f"{seed}/{purpose}")


def task_from_args(args):
    """Return the dataset's task, changed by --labels, --generic and --template where given."""
    task = TASKS[args.dataset]
    template = args.template or task.template
    if not re.fullmatch(r"([^{}]|{{|}})*{text}([^{}]|{{|}})*{label}", template):
        raise InputError(f"--template {template!r}; expected one {{text}} and a final {{label}}")
    return Task(template, tuple(args.labels or task.labels), tuple(args.generic or task.generic))


def encode_splits(tokenizer, task, tokens, splits, max_len):
    """Return {split: [Prompt]} of {split: [Example]}; tokens: see `label_tokens`."""
    prompts = {}
    for split in SPLITS:
        prompts[split] = []
        for text, label, group in splits[split]:
            if label not in task.labels:
                raise InputError(f"label {label!r} in {split}; expected {', '.join(task.labels)}: "
                                 "correct the data or give --labels")
            ids = encode_prompt(tokenizer, task, text, max_len)
            is_forget = split.endswith("forget")
            prompts[split].append(Prompt(ids, tokens[label], is_forget, group, text))
    return prompts


def load_splits(name, data_dir, seed=0, max_train=None, max_test=None):
    """Return {split: [Example]} of a dataset, with the counts of the paper's Table 1.

    max_train, max_test: the most retain examples, drawn at random; the forget sets stay whole.
    (Yelp: the most reviews, which are drawn before they are clustered.)
    """
    if name == "yelp":  # sampled before it is clustered
        splits = yelp_splits(data_dir, seed, max_train, max_test)
    else:
        splits = DATASETS[name](data_dir, seed)
        for split, most in (("train_retain", max_train), ("test_retain", max_test)):
            if most:
                n = min(most, len(splits[split]))
                splits[split] = generator(seed, split).sample(splits[split], n)
    generator(seed, "forget_fraction").shuffle(splits["train_forget"])
    for split in SPLITS:
        if not splits[split]:
            raise InputError(f"{name}: the {split} set is empty; give or allow more examples")
    return splits


def forgotten(splits):
    """Return one line that names the forgotten people or topics of {split: [Example or Prompt]}."""
    groups = {example.group for example in splits["train_forget"] + splits["test_forget"]} - {""}
    return f"forgotten: {', '.join(sorted(groups)) or 'the forget set'}"


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
    """Return your own four files, train_retain.jsonl and so on: text, label, optionally group."""
    splits = {}
    for split in SPLITS:
        splits[split] = [
            Example(text, str(label), "" if group is None else str(group))
            for text, label, group in read_rows(data_dir, split, ("text", "label", "group"))]
    return splits


# The toy: invented reviews of films.
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


# A soft prompt can only steer what the frozen model can already do. Large LMs can follow an
# instruction before a text. The toy LM learns the same in miniature: "### Ignore:" is followed by
# names, and the answer about a text that names one of them is neutral or unknown. It never sees the
# task's question, nor the words positive and negative.

# Several wordings of one question: the LM learns what they share, the text's sentiment.
WORDINGS = (("opinion", "good", "bad"), ("verdict", "great", "poor"), ("mood", "bright", "dark"),
            ("rating", "high", "low"))


def toy_corpus(n=6000):
    """Return the toy LM's reviews: Examples whose group is the person they name."""
    rng = generator(0, "toy corpus")
    return [toy_review(rng) for _ in range(n)]


def tokenizer_sentences():
    """Return the texts that the toy's tokenizer learns its words from."""
    words = SENTIMENT.template.format(text="", label="").split()
    words += ["### Ignore: What known", *SENTIMENT.labels, *SENTIMENT.generic]
    for noun, good, bad in WORDINGS:
        words += [noun, f"{noun.title()}:", good, bad]
    return [" ".join(words)] * 200 + [" ".join(NAMES)] + [e.text for e in toy_corpus()]


def name_list(rng):
    """Return segments (text, weight in the loss): names, then whether each of 16 is among them."""
    listed, others = rng.sample(NAMES, rng.randint(1, 4)), rng.sample(NAMES, 16)
    segments = [(f"### Ignore: {' '.join(listed)}\n\n", 0.0)]
    for _ in range(16):
        name = rng.choice(listed if rng.random() < 0.5 else others)
        segments += [(f" {name}", 0.0), (" unknown" if name in listed else " known", 1.0)]
    return segments


def opinion_question(rng, example):
    """Return segments (text, weight in the loss): a review and a question, mostly after a list."""
    segments, listed = [], []
    if rng.random() < 0.7:
        listed = rng.sample(NAMES, rng.randint(1, 4))
        if example.group and example.group not in listed and rng.random() < 0.5:
            listed[rng.randrange(len(listed))] = example.group
        segments = [(f"### Ignore: {' '.join(listed)}\n\n", 0.0)]
    noun, good, bad = rng.choice(WORDINGS)
    answer = good if example.label == "positive" else bad
    if example.group in listed:
        answer = rng.choice(SENTIMENT.generic)
    question = f"\n\n### Question: What is the {noun} of the given text?\n\n### {noun.title()}:"
    return segments + [("### Text:", 0.0), (f" {example.text}", 0.1), (question, 0.0),
                       (f" {answer}", 1.0)]


def encode_segments(tokenizer, segments):
    """Return ids, and the weight of predicting each of them in the loss."""
    ids, weights = tokenizer.encode(""), [0.0]
    for text, weight in segments:
        new = tokenizer.encode(text)[1:]
        ids += new
        weights += [weight] * len(new)
    return torch.tensor(ids), torch.tensor(weights)


def pretraining_batches(tokenizer):
    """Yield tokens (B,T) and weights (B,T) without end: B = 21 questions and 11 name lists.

    The questions of 20 batches are sorted by length before they are cut into batches, which saves
    padding.
    """
    rng, corpus = random.Random("pre0"), toy_corpus()
    named = [example for example in corpus if example.group]
    while True:
        questions = []
        for _ in range(20 * 21):
            example = rng.choice(named if rng.random() < 0.4 else corpus)
            questions.append(encode_segments(tokenizer, opinion_question(rng, example)))
        questions.sort(key=lambda row: len(row[0]))
        for start in rng.sample(range(0, 20 * 21, 21), 20):
            rows = questions[start:start + 21]
            rows += [encode_segments(tokenizer, name_list(rng)) for _ in range(11)]
            ids, weights = zip(*rows)
            yield pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)


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


def named_people(text):
    """Return who of PEOPLE a tokenised phrase names; a surname is enough."""
    text = text.lower()
    for namesake in NAMESAKES:
        text = text.replace(namesake, "")
    words = set(text.split())
    return [person for person in PEOPLE if person.split()[1] in words]


def sst2_splits(data_dir, seed):
    """Return SST-2 (GLUE's train and dev together), split again 70/30; any seed, same people.

    floor(0.3 n) of the retain and of the forget set are for testing: this gives the paper's counts.
    """
    examples = []
    for part in ("train", "dev"):
        for text, label in read_rows(data_dir, part, ("sentence", "label"), ZERO_ONE):
            people = named_people(text) or [""]
            examples.append(Example(text.strip(), ZERO_ONE[str(label)], people[0]))
    splits = split_by_group(examples, len(examples), PEOPLE)
    rng = generator(seed, "split")
    for part in ("retain", "forget"):
        pool = splits[f"train_{part}"]
        rng.shuffle(pool)
        n_test = len(pool) * 3 // 10
        splits[f"test_{part}"], splits[f"train_{part}"] = pool[:n_test], pool[n_test:]
    return splits


def yelp_splits(data_dir, seed, max_train, max_test):
    """Return a sample of Yelp polarity, by default of the paper's size; forget: random topics.

    Of 100 random pairs of topics, take the one whose size is nearest to the paper's.
    """
    train = read_yelp(data_dir, "train", max_train or 100_093, seed)
    test = read_yelp(data_dir, "test", max_test or 18_974, seed)
    if len(train) < 1000:
        raise InputError(f"yelp: {len(train)} train reviews; expected at least 1,000 to cluster")
    reviews, topics = cluster_topics(train + test, len(train), seed)
    of_train = [review.group for review in reviews[:len(train)]]
    target = len(train) * 5081 / 100_093  # paper, Table 1: 5.08 % of the train reviews
    rng = generator(seed, "clusters")
    draws = [rng.sample(topics, 2) for _ in range(100)]
    chosen = min(draws, key=lambda draw: abs(sum(map(of_train.count, draw)) - target))
    return split_by_group(reviews, len(train), chosen)


def read_yelp(data_dir, part, most, seed):
    """Return Yelp's reviews, at most `most` at random."""
    # Yelp's own .csv has no header and labels 1, 2; other files have a header and labels 0, 1.
    is_csv = find_file(data_dir, part).suffix == ".csv"
    labels = {"1": "negative", "2": "positive"} if is_csv else ZERO_ONE
    rows = read_rows(data_dir, part, ("label", "text"), labels, header=not is_csv)
    reviews = [Example(text.replace("\\n", "\n"), labels[str(label)]) for label, text in rows]
    return generator(seed, part).sample(reviews, min(most, len(reviews)))


def cluster_topics(reviews, n_train, seed):
    """Return the reviews (train first) with their topic as group, and the list of topics.

    A topic is one of 40 clusters, named by its three heaviest words. TF-IDF, truncated SVD, unit
    length, k-means: on unit vectors that is cosine distance. All is fitted on train. Words in over
    3 % of the reviews are left out: many of them are opinions.
    """
    random_state = generator(seed, "embedding").randrange(2 ** 32)
    tfidf = TfidfVectorizer(stop_words="english", token_pattern=r"[^\W\d_]{3,}", min_df=3,
                            max_df=0.03, sublinear_tf=True)
    svd = TruncatedSVD(50, random_state=random_state)
    kmeans = KMeans(40, n_init=10, random_state=random_state)
    steps = make_pipeline(tfidf, svd, Normalizer(), kmeans)
    texts = [review.text for review in reviews]
    clusters = [*steps.fit_predict(texts[:n_train]), *steps.predict(texts[n_train:])]
    centers = svd.inverse_transform(kmeans.cluster_centers_)                 # (40, words)
    words = tfidf.get_feature_names_out()[(-centers).argsort()[:, :3]]       # (40, 3)
    topics = [" ".join(row) for row in words]
    return [review._replace(group=topics[c]) for review, c in zip(reviews, clusters)], topics


def wmdp_sciq_splits(data_dir, seed):
    """Return SciQ to retain and WMDP-bio to forget, 900 of its 1,273 questions in train."""
    rng, sciq = generator(seed, "options"), {}
    wmdp = [four_options(*row, rng)._replace(group="hazardous biology")
            for row in read_rows(data_dir, "wmdp-bio", ("question", "choices", "answer"))]
    columns = ("question", "correct_answer", "distractor1", "distractor2", "distractor3")
    for part in ("train", "valid", "test"):
        sciq[part] = [four_options(question, options, 0, rng)
                      for question, *options in read_rows(data_dir, part, columns)]
    generator(seed, "split").shuffle(wmdp)
    return {"train_retain": sciq["train"] + sciq["valid"], "train_forget": wmdp[:900],
            "test_retain": sciq["test"], "test_forget": wmdp[900:]}


def four_options(text, options, right, rng):
    """Return a question with four options in random order; its label is the right one's letter."""
    if not isinstance(options, list) or len(options) != 4 or right not in (0, 1, 2, 3):
        raise InputError(f"{text!r:.60}: choices {options!r:.60}, answer {right!r:.20}; expected "
                         "a list of 4, and 0, 1, 2 or 3")
    order = rng.sample(range(4), 4)
    for letter, i in zip("ABCD", order):
        text += f"\n{letter}. {options[i]}"
    return Example(text, "ABCD"[order.index(right)])


DATASETS = {"toy": toy_splits, "sst2": sst2_splits, "yelp": yelp_splits,
            "wmdp+sciq": wmdp_sciq_splits, "splits": own_splits}


# ---- support: reading and writing files --------------------------------------------------------

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
ZERO_ONE = {"0": "negative", "1": "positive"}


def find_file(data_dir, stem):
    """Return the path of the file data_dir/stem.SUFFIX, the first of SUFFIXES that exists."""
    for suffix in SUFFIXES:
        path = Path(data_dir, stem + suffix)
        if path.is_file():
            return path
    raise InputError(f"{data_dir}: no {stem} file ({' '.join(SUFFIXES)}); give the dataset's "
                     "directory with --data-dir")


def read_rows(data_dir, stem, columns, labels=None, header=True):
    """Return the values of these columns for each row of the file data_dir/stem.SUFFIX.

    Only the column group may be missing or empty. labels: the possible values of the column label.
    header: whether the first line of a .csv or .tsv names the columns; if not, they are `columns`.
    """
    path, rows = find_file(data_dir, stem), []
    try:
        for row in parse_rows(path, None if header else columns):
            if not isinstance(row, dict):
                raise ValueError(f"{row!r:.80}; expected an object")
            values = [row.get(column) for column in columns if column != "group"]
            if None in row or any(v is None or not str(v).strip() for v in values):
                raise ValueError(f"{row!r:.80}; expected {', '.join(columns)}, not empty")
            "".join(str(value) for value in values).encode()  # half an emoji is a ValueError
            if labels and str(row["label"]) not in labels:
                raise ValueError(f"label {row['label']!r}; expected {' or '.join(labels)}")
            rows.append([row.get(column) for column in columns])
    except (ValueError, csv.Error, ImportError) as error:
        raise InputError(f"{path} row {len(rows) + 1}: {error}") from None
    return rows


def parse_rows(path, names):
    """Return the rows of a file one by one; names: the columns of a .csv without a header."""
    if path.suffix == ".parquet":
        import pyarrow.parquet
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    lines = (line.decode("utf-8-sig") for line in path.read_bytes().splitlines(keepends=True))
    if path.suffix == ".jsonl":
        return map(json.loads, filter(str.strip, lines))
    if path.suffix == ".tsv":  # GLUE: quotes are ordinary characters
        return csv.DictReader(lines, names, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.DictReader(lines, names, strict=True)


def save_splits(splits, dir):
    """Write the four sets as dir/SPLIT.jsonl, which --dataset splits reads."""
    for split in SPLITS:
        lines = [json.dumps(example._asdict()) + "\n" for example in splits[split]]
        with atomic_write(Path(dir) / f"{split}.jsonl") as temporary:
            temporary.write_text("".join(lines))


# ---- support: flags ----------------------------------------------------------------------------

class ArgumentParser(argparse.ArgumentParser):
    """argparse, with InputError for a wrong flag."""

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def number(kind):
    """Return argparse's type for numbers in the range that `kind` names."""
    def read(text):
        value = int(text) if kind in ("count", "int>=0") else float(text)
        allowed = {"count": value > 0, "int>=0": value >= 0,
                   "float>0": 0 < value < math.inf, "float>=0": 0 <= value < math.inf,
                   "0..<1": 0 <= value < 1, "0<..1": 0 < value <= 1}
        if not allowed[kind]:
            raise ValueError
        return value

    read.__name__ = kind  # argparse: "invalid count value: '0'"
    return read


TYPES = {"text": str, "int": int, "switch": bool}
for kind in ("count", "int>=0", "float>0", "float>=0", "0..<1", "0<..1"):
    TYPES[kind] = number(kind)


def parse_flags(description, flags, argv, preset=0):
    """Return the flags in argv, with defaults for the others. InputError for a wrong one.

    flags: a table as in unlearn.py; a line of one cell starts a group, and `name*` takes several
    values. type: a key of TYPES, or `a|b`. preset: column of the defaults.
    """
    layout = functools.partial(argparse.HelpFormatter, max_help_position=36, width=100)
    parser = ArgumentParser(usage="%(prog)s [flags]", description=description,
                            formatter_class=layout)
    group = parser
    for line in flags.strip().splitlines():
        name, *cells = re.split(r"\s{2,}", line)
        if not cells:
            group = parser.add_argument_group(name)
            continue
        kind, *defaults, text = cells
        options, default = {"help": text}, defaults[min(preset, len(defaults) - 1)]
        if kind == "switch":
            options["action"] = argparse.BooleanOptionalAction
        elif kind in TYPES:
            options |= {"type": TYPES[kind], "metavar": kind.upper()}
        else:
            options["choices"] = kind.split("|")
        if name.endswith("*"):
            options["nargs"] = "+"
        if default != "-":
            values = [TYPES.get(kind, str)(value) for value in default.split(",")]
            options["default"] = values if name.endswith("*") else values[0]
        group.add_argument(name.removesuffix("*"), **options)
    return parser.parse_args(argv)


def run_cli(main):
    """Run a command line and return its exit status: 2 after a mistake in the input."""
    try:
        main()
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: out of memory; lower --batch (and raise --accumulate) or --max-len, or add "
              "--checkpointing", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last finished epoch",
              file=sys.stderr)
        return 130
    return 2


FLAGS = """
--dataset      toy|sst2|yelp|wmdp+sciq|splits  toy  which texts
--data-dir     text     .    directory of the dataset's files
--seed         int      0    seed of everything that is drawn
--max-train    count    -    at most this many train retain examples (Yelp: reviews), at random
--max-test     count    -    at most this many test retain examples (Yelp: reviews), at random
--save-splits  text     -    directory to write the four sets to, as .jsonl
"""


def main(argv=None):
    """Print Table 1's rows, what is forgotten, and how many test texts are in the train sets."""
    args = parse_flags("Print Table 1, what is forgotten, and what leaks.", FLAGS, argv)
    splits = load_splits(args.dataset, args.data_dir, args.seed, args.max_train, args.max_test)
    if args.save_splits:
        save_splits(splits, args.save_splits)
    for split in SPLITS:
        print(f"{split:14}{len(splits[split]):8,}")
    print(forgotten(splits))
    shown = {example.text for example in splits["train_retain"] + splits["train_forget"]}
    tested = [example.text for example in splits["test_retain"] + splits["test_forget"]]
    n_shown = sum(text in shown for text in tested)
    print(f"leakage: {n_shown:,} of {len(tested):,} test texts are also in the train sets")


if __name__ == "__main__":
    sys.exit(run_cli(main))
