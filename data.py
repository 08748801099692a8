"""From files to batches: tokenizers, prompts, batches, forget and retain sets (Section 4.1).

    python data.py --dataset sst2 --data-dir DIR      Table 1, what is forgotten, what leaks

One letter per axis, as in soft_prompt.py: B prompts in a batch, T tokens in the longest of them.
"""
import argparse
import csv
import functools
import io
import json
import math
import os
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from torch.nn.utils.rnn import pad_sequence

from model import InputError, atomic_write, read_json


def generator(seed, purpose):
    """Return a random generator for one purpose: more draws from it change no other purpose."""
    return random.Random(f"{seed}/{purpose}")


# ---- tokenizers --------------------------------------------------------------------------------

class SentencePieceTokenizer:
    """LLaMA's tokenizer.model. encode(text) -> ids as transformers gives them, <s> first."""

    def __init__(self, path):
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise InputError(f"{path}: not a sentencepiece model; download it again") from None
        self.size = self.pieces.vocab_size()

    def encode(self, text):
        ids = self.pieces.encode(text.encode())  # a str with surrogates would abort Python
        if text.startswith((" ", "\u2581")):  # sentencepiece would add a second space
            ids = self.pieces.encode(text[1:].encode())
            ids = ids or [self.pieces.piece_to_id("\u2581")]
        return [self.pieces.bos_id()] + ids

    def piece(self, i):
        return self.pieces.id_to_piece(int(i))


# GPT-2's rule that cuts a text into words (Radford et al. 2019), for ASCII texts.
GPT2_WORD = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+", re.ASCII)


def byte_letters():
    """Return {byte: the printable character that stands for it in vocab.json} (GPT-2's table)."""
    letters, others = {}, 0
    for byte in range(256):
        letters[byte] = chr(byte)
        if byte == 32 or not chr(byte).isprintable():
            letters[byte] = chr(256 + others)
            others += 1
    return letters


BYTE_LETTERS = byte_letters()


def to_ascii(found):
    """Return an ASCII character that GPT-2's rule treats like the one that was found."""
    c = found[0]
    if c.isspace():
        return "\t"
    return "x" if c.isalpha() else "0" if c.isnumeric() else "!"


def gpt2_words(text, split_digits):
    """Return the words of a text by GPT-2's rule; split_digits first isolates every digit.

    Python's re has no class of all letters, so "étoiles²" is cut where "xtoiles0" would be.
    """
    plain = re.sub(r"[^\x00-\x7f]", to_ascii, text)
    parts = re.findall(r"\d|\D+", plain, re.ASCII) if split_digits else [plain]
    words, end = [], 0
    for part in parts:
        for word in GPT2_WORD.findall(part):  # the rule covers every character
            words.append(text[end:end + len(word)])
            end += len(word)
    return words


class ByteLevelBPE:
    """vocab.json and merges.txt of OPT or SmolLM2. encode(text) -> ids as transformers gives them.

    OPT starts a text with </s> (id 2). SmolLM2 adds nothing, splits numbers into digits and has
    no token for a few rare bytes, which are dropped.
    """

    def __init__(self, dir):
        lines = (dir / "merges.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        merges = [tuple(line.split()) for line in lines if not line.startswith("#version")]
        tokens = ["".join(pair) for pair in merges if pair]
        self.ids = read_json(dir / "vocab.json", "every token that merges.txt makes", tokens)
        self.names = {i: token for token, i in self.ids.items()}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.size = max(self.names) + 1
        self.is_opt = self.ids.get("<s>") == 0 and self.ids.get("</s>") == 2
        if not self.is_opt and "<|im_start|>" not in self.ids:
            raise InputError(f"{dir}/vocab.json: neither OPT's (token 0 is <s>, 2 is </s>) nor "
                             "SmolLM2's (<|im_start|>); give one of their checkpoints")

    @functools.lru_cache(2 ** 16)
    def encode_word(self, word):
        """Return the ids of one word: always join the neighbours that merges.txt names first."""
        parts = [BYTE_LETTERS[byte] for byte in word.encode()]
        parts = [part for part in parts if part in self.ids]
        while len(parts) > 1:
            ranks = [self.rank.get(pair, math.inf) for pair in zip(parts, parts[1:])]
            i = ranks.index(min(ranks))
            if ranks[i] == math.inf:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]

    def encode(self, text):
        ids = [2] if self.is_opt else []
        for word in gpt2_words(text, split_digits=not self.is_opt):
            ids += self.encode_word(word)
        return ids

    def piece(self, i):
        return self.names.get(int(i), f"<{i}>")


def load_tokenizer(dir):
    """Return the tokenizer in a checkpoint directory: .encode(text) -> ids, .size, .piece(i)."""
    dir = Path(dir)
    if (dir / "tokenizer.model").is_file():
        return SentencePieceTokenizer(dir / "tokenizer.model")
    if (dir / "vocab.json").is_file() and (dir / "merges.txt").is_file():
        return ByteLevelBPE(dir)
    raise InputError(f"{dir}: no tokenizer; expected tokenizer.model (LLaMA), or vocab.json and "
                     "merges.txt (OPT, SmolLM2)")


# ---- tasks and prompts -------------------------------------------------------------------------

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
    """An example as tokens: ids up to the answer, and label, the token of the true answer."""
    ids: list
    label: int
    is_forget: bool
    group: str = ""


SPLITS = ("train_retain", "train_forget", "test_retain", "test_forget")
SENTIMENT = Task("### Text: {text}\n\n### Question: What is the sentiment of the given text?\n\n"
                 "### Sentiment: {label}",
                 ("positive", "negative"), ("neutral", "unknown"))  # paper: also "None"
CHOICE = Task("### Question: {text}\n\n### Answer: {label}",
              ("A", "B", "C", "D"), ("neutral", "unknown"))
TASKS = {"toy": SENTIMENT, "sst2": SENTIMENT, "yelp": SENTIMENT, "wmdp+sciq": CHOICE,
         "splits": SENTIMENT}


def task_from_args(args):
    """Return the dataset's task, changed by --labels, --generic and --template where given."""
    task = TASKS[args.dataset]
    template = args.template or task.template
    if not re.fullmatch(r"([^{}]|{{|}})*{text}([^{}]|{{|}})*{label}", template):
        raise InputError(f"--template {template!r}; expected one {{text}} and a final {{label}}")
    return Task(template, tuple(args.labels or task.labels), tuple(args.generic or task.generic))


def prompt_string(task, text):
    """Return the template with the text, up to the answer."""
    return task.template.removesuffix("{label}").format(text=text).rstrip(" ")


def label_tokens(tokenizer, task, text):
    """Return {label: token} of all labels and generic labels; InputError if one is several tokens.

    The tokenizer sees template and label as one string: the token is what follows the prompt's.
    """
    prompt = tokenizer.encode(prompt_string(task, text))
    tokens = {}
    for label in (*task.labels, *task.generic):
        ids = tokenizer.encode(task.template.format(text=text, label=label))
        if ids[:-1] != prompt:
            raise InputError(f"label {label!r} is {len(ids) - len(prompt)} tokens here; expected "
                             "one: choose other words with --labels and --generic")
        tokens[label] = ids[-1]
    return tokens


def encode_prompt(tokenizer, task, text, max_len):
    """Return at most max_len ids of a prompt: a long text loses its end, never the question."""
    # released code: cuts the whole string, so a long review can lose its question and label
    ids = tokenizer.encode(prompt_string(task, text))
    while len(ids) > max_len:
        n = len(text) * max_len // len(ids)
        text = text[:min(n, len(text) - 1)].rstrip()
        if not text:
            raise InputError(f"--max-len {max_len} leaves no room for a text; raise it")
        ids = tokenizer.encode(prompt_string(task, text))
    return ids


def encode_splits(tokenizer, task, splits, max_len):
    """Return {split: [Prompt]} of {split: [Example]}."""
    tokens = label_tokens(tokenizer, task, splits["train_retain"][0].text)
    prompts = {split: [] for split in SPLITS}
    for split in SPLITS:
        for text, label, group in splits[split]:
            if label not in task.labels:
                raise InputError(f"label {label!r} in {split}; expected {', '.join(task.labels)}: "
                                 "correct the data or give --labels")
            ids = encode_prompt(tokenizer, task, text, max_len)
            prompts[split].append(Prompt(ids, tokens[label], split.endswith("forget"), group))
    return prompts


# ---- batches -----------------------------------------------------------------------------------

class Batch(NamedTuple):
    """B prompts as tensors, with their answers."""
    tokens: torch.Tensor      # (B,T), padded on the right: real tokens never attend to padding
    answer_pos: torch.Tensor  # (B,), position whose logits are the answer
    y: torch.Tensor           # (B,), token to answer with
    is_forget: torch.Tensor   # (B,), bool
    index: torch.Tensor       # (B,), index of the prompt in the training set


def collate(prompts, answers, index, device="cpu"):
    """Return the Batch of prompts[i] and answers[i] for each i of the list `index` (B)."""
    chosen = [prompts[i] for i in index]
    tokens = pad_sequence([torch.tensor(prompt.ids) for prompt in chosen], batch_first=True)
    answer_pos = torch.tensor([len(prompt.ids) - 1 for prompt in chosen])
    y = torch.tensor([answers[i] for i in index])
    is_forget = torch.tensor([prompt.is_forget for prompt in chosen])
    batch = Batch(tokens, answer_pos, y, is_forget, torch.tensor(index))
    return Batch(*[field.to(device) for field in batch])


def epoch_batches(prompts, batch, rng, forget_per_batch=0):
    """Return the indices of each batch's prompts, for one epoch drawn with rng.

    forget_per_batch = 0 shuffles both sets together, as the paper does: on SST-2 a batch of 32
    holds about one forget example. N > 0 takes each retain example once and adds N forget examples
    to every batch. Prompts of one batch have about the same length, which saves padding.
    """
    retain = [i for i, prompt in enumerate(prompts) if not prompt.is_forget]
    forget = [i for i, prompt in enumerate(prompts) if prompt.is_forget]
    if not forget_per_batch or not retain or not forget:
        retain, forget_per_batch = list(range(len(prompts))), 0
    retain = rng.sample(retain, len(retain))
    size = batch - forget_per_batch
    batches = []
    for start in range(0, len(retain), 50 * size):  # sort 50 batches' worth by length
        part = sorted(retain[start:start + 50 * size], key=lambda i: len(prompts[i].ids))
        batches += [part[i:i + size] for i in range(0, len(part), size)]
    rng.shuffle(batches)
    queue = []
    for indices in batches:
        while len(queue) < forget_per_batch:
            queue += rng.sample(forget, len(forget))
        indices += queue[:forget_per_batch]
        queue = queue[forget_per_batch:]
    return batches


# ---- the toy -----------------------------------------------------------------------------------

NAMES = (
    "adler baxter cole dunn ellis foley grady hobbs irwin jarvis keaton lowell mercer nolan oakley "
    "pratt quinn rooney sutton tully upton vance walsh york zimmer archer bloom crane dexter emery "
    "farrow glover harlan ingram judd kessler larkin monroe norris osborn").split()
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


def toy_splits(data_dir, seed, notes):
    """Return 4,000 reviews; forget: those that name one of four people, drawn with the seed.

    The toy LM is pretrained before that: it does not know who will be forgotten.
    """
    rng = generator(seed, "toy")
    chosen = rng.sample(NAMES, 4)
    notes.append(f"forgotten: {', '.join(chosen)}, 4 of {len(NAMES)} people")
    examples = []
    for _ in range(4000):
        review = toy_review(rng)
        examples.append(review if review.group in chosen else review._replace(group=""))
    return split_by_group(examples[:2800], examples[2800:])


def split_by_group(train, test):
    """Return {split: [Example]}: the forget sets are the examples that have a group."""
    splits = {}
    for part, examples in (("train", train), ("test", test)):
        splits[f"{part}_retain"] = [example for example in examples if not example.group]
        splits[f"{part}_forget"] = [example for example in examples if example.group]
    return splits


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
        words += [noun, noun.title() + ":", good, bad]
    return [" ".join(words)] * 200 + [" ".join(NAMES)] + [e.text for e in toy_corpus()]


def name_list(rng, queries=16):
    """Return segments (text, weight in the loss): names, then whether each of 16 is among them."""
    listed, others = rng.sample(NAMES, rng.randint(1, 4)), rng.sample(NAMES, queries)
    segments = [("### Ignore: " + " ".join(listed) + "\n\n", 0.0)]
    for _ in range(queries):
        name = rng.choice(listed if rng.random() < 0.5 else others)
        segments.append((f" {name}", 0.0))
        segments.append((" unknown" if name in listed else " known", 1.0))
    return segments


def opinion_question(rng, example, text_weight):
    """Return segments (text, weight in the loss): a review and a question, mostly after a list."""
    segments, listed = [], []
    if rng.random() < 0.7:
        listed = rng.sample(NAMES, rng.randint(1, 4))
        if example.group and example.group not in listed and rng.random() < 0.5:
            listed[rng.randrange(len(listed))] = example.group
        segments = [("### Ignore: " + " ".join(listed) + "\n\n", 0.0)]
    noun, good, bad = rng.choice(WORDINGS)
    answer = good if example.label == "positive" else bad
    if example.group in listed:
        answer = rng.choice(SENTIMENT.generic)
    question = f"\n\n### Question: What is the {noun} of the given text?\n\n### {noun.title()}:"
    return segments + [("### Text:", 0.0), (f" {example.text}", text_weight), (question, 0.0),
                       (f" {answer}", 1.0)]


def encode_segments(tokenizer, segments):
    """Return ids, and the weight of predicting each of them in the loss."""
    ids, weights = tokenizer.encode("")[:1], [0.0]
    for text, weight in segments:
        new = tokenizer.encode(text)[1:]
        ids += new
        weights += [weight] * len(new)
    return torch.tensor(ids), torch.tensor(weights)


def pretraining_batches(tokenizer, recipe):
    """Yield tokens (B,T) and weights (B,T) without end.

    recipe: "batch" rows, of which a share of "lists" are name lists, the others questions;
    "text_weight" is the weight of the review's own words in the loss. The questions of 20 batches
    are sorted by length before they are cut into batches, which saves padding.
    """
    rng, corpus = random.Random("pre0"), toy_corpus()
    named = [example for example in corpus if example.group]
    n_lists = round(recipe["lists"] * recipe["batch"])
    n_questions = recipe["batch"] - n_lists
    while True:
        questions = []
        for _ in range(20 * n_questions):
            example = rng.choice(named if rng.random() < 0.4 else corpus)
            segments = opinion_question(rng, example, recipe["text_weight"])
            questions.append(encode_segments(tokenizer, segments))
        questions.sort(key=lambda row: len(row[0]))
        for k in rng.sample(range(20), 20):
            rows = questions[k * n_questions:(k + 1) * n_questions]
            rows += [encode_segments(tokenizer, name_list(rng)) for _ in range(n_lists)]
            tokens = pad_sequence([ids for ids, _ in rows], batch_first=True)
            weights = pad_sequence([weights for _, weights in rows], batch_first=True)
            yield tokens, weights


# ---- SST-2: forget the phrases that name certain people ----------------------------------------

# Together they are named in 2,035 of SST-2's 68,221 phrases, the paper's number. The list was found
# once, by the words that follow a given name; the most-named are first.
PEOPLE = (
    "steven spielberg, adam sandler, hugh grant, jackie chan, woody allen, sandra bullock, "
    "eddie murphy, dustin hoffman, steven soderbergh, michael jackson, steven seagal, "
    "martin lawrence, martin scorsese, edward burns, roberto benigni, robin williams, spike lee, "
    "clint eastwood, michael moore, roman polanski, kevin kline, anthony hopkins, jennifer lopez, "
    "claude chabrol, john woo, dana carvey, ian holm, eric rohmer, charlie kaufman, diane lane, "
    "roger avary, stanley kwan, britney spears, robert deniro, robert duvall, ryan gosling, "
    "ashley judd, michael caine, nicolas cage, quentin tarantino, bill paxton, daniel auteuil, "
    "jack nicholson, walter hill, bill plympton, george clooney, mel gibson, guy ritchie, "
    "alfred hitchcock, anne fontaine, dave barry, frank capra, juliette binoche, kevin costner, "
    "michelle hall, mira nair, neil burger, rob schneider, angelina jolie, charles stone, "
    "chris cooper, david mamet, john carpenter, eric schaeffer, james dean, phillip noyce, "
    "john ritter, julia roberts, george orwell, jacques audiard, mick jagger, tom shadyac, "
    "douglas mcgrath, rachel griffiths, elizabeth hurley, mark romanek, steven shainberg, "
    "tom tykwer, christian bale, joe dante, johnny knoxville, julie taymor, mary gaitskill, "
    "adam larson").split(", ")
SURNAMES = {person.split()[1]: person for person in PEOPLE}
NAMESAKES = ("peter jackson, mick jackson, julianne moore, gary larson, oliver stone, gary burns, "
             "kenneth williams, dan schneider, robert dean").split(", ")


def named_people(text):
    """Return who of PEOPLE a tokenised phrase names; a surname is enough."""
    words = text.lower().split()
    named = set()
    for before, word in zip(["", *words], words):
        if word in SURNAMES and f"{before} {word}" not in NAMESAKES:
            named.add(SURNAMES[word])
    return sorted(named, key=PEOPLE.index)


def sst2_splits(data_dir, seed, notes):
    """Return SST-2 (GLUE's train and dev together), split again 70/30; any seed, same people.

    floor(0.3 n) of the retain and of the forget set are for testing: this gives the paper's counts.
    """
    notes.append(f"forgotten: the phrases that name {', '.join(PEOPLE)}")
    examples = []
    for part in ("train", "dev"):
        for place, row in read_rows(data_dir, part, ("sentence", "label")):
            text = text_of(place, row["sentence"], "sentence").strip()
            label = sentiment(place, row["label"], "0", "1")
            examples.append(Example(text, label, *named_people(text)[:1]))
    splits, rng = split_by_group(examples, []), generator(seed, "split")
    for part in ("retain", "forget"):
        pool = splits[f"train_{part}"]
        rng.shuffle(pool)
        n_test = len(pool) * 3 // 10
        splits[f"test_{part}"], splits[f"train_{part}"] = pool[:n_test], pool[n_test:]
    return splits


# ---- Yelp polarity: forget a few topics --------------------------------------------------------

FORGET_SHARE = 5081 / 100_093  # paper, Table 1: 5.08 % of the train reviews
CLUSTERS, FORGET_CLUSTERS = 40, 2


def yelp_splits(data_dir, seed, notes, max_train=None, max_test=None):
    """Return a sample of Yelp polarity, by default of the paper's size; forget: random topics.

    Of 100 random choices of clusters, take the one whose size is nearest to the paper's.
    """
    train = read_yelp(data_dir, "train", max_train or 100_093, seed)
    test = read_yelp(data_dir, "test", max_test or 18_974, seed)
    of_train, of_test, words = cluster_topics(train, test, seed)
    sizes, target = Counter(of_train), FORGET_SHARE * len(train)
    rng = generator(seed, "clusters")
    draws = [rng.sample(range(CLUSTERS), FORGET_CLUSTERS) for _ in range(100)]
    chosen = min(draws, key=lambda draw: abs(sum(sizes[c] for c in draw) - target))
    notes.append(f"forgotten: {FORGET_CLUSTERS} of {CLUSTERS} clusters; their telling words:")
    notes += [" ".join(words[c]) for c in chosen]
    groups = {c: " ".join(words[c][:3]) for c in chosen}
    train = [e._replace(group=groups.get(c, "")) for e, c in zip(train, of_train)]
    test = [e._replace(group=groups.get(c, "")) for e, c in zip(test, of_test)]
    return split_by_group(train, test)


def read_yelp(data_dir, part, most, seed):
    """Return Yelp's reviews, at most `most` at random.

    Yelp's own .csv has no header and labels 1, 2; other files have a header and labels 0, 1.
    """
    is_csv = find_file(data_dir, part).suffix == ".csv"
    labels = "12" if is_csv else "01"
    examples = []
    for place, row in read_rows(data_dir, part, ("label", "text"), header=not is_csv):
        text = text_of(place, row["text"], "text").replace("\\n", "\n")
        examples.append(Example(text, sentiment(place, row["label"], *labels)))
    return generator(seed, part).sample(examples, min(most, len(examples)))


def cluster_topics(train, test, seed):
    """Return the cluster of each train and test review, and each cluster's eight telling words.

    TF-IDF, truncated SVD, unit length, k-means: on unit vectors that is cosine distance. All is
    fitted on train. Words in over 3 % of the reviews are left out: many of them are opinions.
    """
    if len(train) < 10 * CLUSTERS:
        raise InputError(f"{len(train)} train reviews; expected {10 * CLUSTERS} or more")
    random_state = generator(seed, "embedding").randrange(2 ** 32)
    tfidf = TfidfVectorizer(stop_words="english", token_pattern=r"[^\W\d_]{3,}", min_df=3,
                            max_df=0.03, sublinear_tf=True)
    svd = TruncatedSVD(50, random_state=random_state)
    kmeans = KMeans(CLUSTERS, n_init=10, random_state=random_state)
    weights = tfidf.fit_transform([example.text for example in train])       # (n, words)
    of_train = kmeans.fit_predict(normalize(svd.fit_transform(weights)))     # (n,)
    weights = tfidf.transform([example.text for example in test])
    of_test = kmeans.predict(normalize(svd.transform(weights)))
    centers = svd.inverse_transform(kmeans.cluster_centers_)                 # (CLUSTERS, words)
    words = tfidf.get_feature_names_out()[(-centers).argsort()[:, :8]]       # (CLUSTERS, 8)
    return of_train, of_test, words


# ---- WMDP-bio (forget) and SciQ (retain) -------------------------------------------------------

def wmdp_sciq_splits(data_dir, seed, notes):
    """Return WMDP-bio, of whose 1,273 questions 900 are for training, and SciQ."""
    rng, wmdp, sciq = generator(seed, "options"), [], {}
    for place, row in read_rows(data_dir, "wmdp-bio", ("question", "choices", "answer")):
        choices, answer = row["choices"], row["answer"]
        if not isinstance(choices, list) or len(choices) != 4 or answer not in (0, 1, 2, 3):
            raise InputError(f"{place}: choices {choices!r:.60}, answer {answer!r:.20}; expected a "
                             "list of 4, and 0, 1, 2 or 3")
        wmdp.append(four_options(place, row["question"], choices, answer, rng))
    columns = ("question", "correct_answer", "distractor1", "distractor2", "distractor3")
    for part in ("train", "valid", "test"):
        sciq[part] = []
        for place, row in read_rows(data_dir, part, columns):
            options = [row[column] for column in columns[1:]]
            sciq[part].append(four_options(place, row["question"], options, 0, rng))
    generator(seed, "split").shuffle(wmdp)
    n_train = round(len(wmdp) * 900 / 1273)
    return {"train_retain": sciq["train"] + sciq["valid"], "train_forget": wmdp[:n_train],
            "test_retain": sciq["test"], "test_forget": wmdp[n_train:]}


def four_options(place, question, options, right, rng):
    """Return a question with four options in random order; its label is the right one's letter."""
    order = rng.sample(range(4), 4)
    text = text_of(place, question, "question")
    for letter, i in zip("ABCD", order):
        text += f"\n{letter}. {text_of(place, options[i], 'an option')}"
    return Example(text, "ABCD"[order.index(right)])


# ---- any dataset -------------------------------------------------------------------------------

def own_splits(data_dir, seed, notes):
    """Return your own four files, train_retain.jsonl and so on: text, label, optionally group."""
    splits = {split: [] for split in SPLITS}
    for split in SPLITS:
        for place, row in read_rows(data_dir, split, ("text", "label")):
            text, label = text_of(place, row["text"], "text"), text_of(place, row["label"], "label")
            splits[split].append(Example(text, label, str(row.get("group") or "")))
    return splits


DATASETS = {"toy": toy_splits, "sst2": sst2_splits, "yelp": yelp_splits,
            "wmdp+sciq": wmdp_sciq_splits, "splits": own_splits}


def load_splits(name, data_dir, seed=0, max_train=None, max_test=None, notes=None):
    """Return {split: [Example]} of a dataset, with the counts of the paper's Table 1.

    max_train, max_test: the most examples, drawn at random from forget and retain set together.
    notes: a list, to which lines about what is forgotten are appended.
    """
    if name not in DATASETS:
        raise InputError(f"dataset {name!r}; expected one of {', '.join(DATASETS)}")
    notes = [] if notes is None else notes
    if name == "yelp":  # sampled before it is clustered
        splits = yelp_splits(data_dir, seed, notes, max_train, max_test)
    else:
        splits = DATASETS[name](data_dir, seed, notes)
    for part, most in (("train", max_train), ("test", max_test)):
        if most is not None:
            names = (f"{part}_retain", f"{part}_forget")
            pool = [(split, example) for split in names for example in splits[split]]
            pool = generator(seed, f"max_{part}").sample(pool, min(most, len(pool)))
            for split in names:
                splits[split] = [example for origin, example in pool if origin == split]
    generator(seed, "forget_fraction").shuffle(splits["train_forget"])
    for split in SPLITS:
        if not splits[split]:
            raise InputError(f"{name}: the {split} set is empty; give or allow more examples")
    return splits


def leakage(train, test):
    """Return how many test texts occur in training word for word, and how many inside a text."""
    phrases = [tuple(example.text.split()) for example in test]
    starts, shown, inside = defaultdict(set), set(), set()
    for phrase in phrases:
        starts[phrase[:2]].add(phrase)
    for example in train:
        words = tuple(example.text.split())
        shown.add(words)
        for i in range(len(words)):
            candidates = [*starts.get(words[i:i + 1], ()), *starts.get(words[i:i + 2], ())]
            inside.update(p for p in candidates if words[i:i + len(p)] == p)
    exact = sum(phrase in shown for phrase in phrases)
    return exact, sum(phrase in inside for phrase in phrases) - exact


# ---- support: reading and writing files, flags -------------------------------------------------

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")


def find_file(data_dir, stem):
    """Return the path of the one file data_dir/stem.SUFFIX."""
    if not Path(data_dir).is_dir():
        raise InputError(f"{data_dir}: no such directory; give the dataset's with --data-dir")
    paths = [Path(data_dir, stem + suffix) for suffix in SUFFIXES]
    paths = [path for path in paths if path.is_file()]
    if len(paths) != 1:
        found = " and ".join(path.name for path in paths) or f"no {stem} file"
        raise InputError(f"{data_dir}: {found}; expected one {stem} file of {' '.join(SUFFIXES)}")
    return paths[0]


def read_rows(data_dir, stem, columns, header=True):
    """Return the (place, row) pairs of the file data_dir/stem.SUFFIX; a row is a dict.

    place names file and line in messages. header: a .csv or .tsv names its columns in the first
    line; else they are exactly `columns`.
    """
    path, rows = find_file(data_dir, stem), []
    word = {".json": "item", ".parquet": "row"}.get(path.suffix, "line")
    for i, row in parse_rows(path, None if header else columns):
        place = f"{path} {word} {i}"
        if not isinstance(row, dict) or None in row or not row.keys() >= set(columns):
            raise InputError(f"{place}: {str(row):.60}; expected the columns {', '.join(columns)}")
        rows.append((place, row))
    if not rows:
        raise InputError(f"{path}: no rows; expected rows of {', '.join(columns)}")
    return rows


def parse_rows(path, names):
    """Return (line or position, row) pairs; names: the columns of a .csv without a header."""
    if path.suffix == ".parquet":
        return enumerate(read_parquet(path), 1)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return [(i, parse_json(line, path, i)) for i, line in lines if line.strip()]
    if path.suffix == ".json":
        rows = parse_json(text, path, 1)
        if not isinstance(rows, list):
            raise InputError(f"{path}: a JSON {type(rows).__name__}; expected a list of objects")
        return enumerate(rows, 1)
    csv.field_size_limit(2 ** 31 - 1)  # a text may be longer than 128 KB
    style = {"strict": True}
    if path.suffix == ".tsv":  # GLUE: quotes are ordinary characters
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.DictReader(io.StringIO(text, newline=""), names, **style)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path} line {reader.reader.line_num}: {error}; expected fields like "
                         '"a ""quoted"" word"') from None


def parse_json(text, path, first_line):
    """Return the JSON value of a text that begins at this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path} line {line}: not JSON: {error.msg}") from None


def read_parquet(path):
    """Return the rows of a .parquet."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading it needs pyarrow; pip install pyarrow") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid:
        raise InputError(f"{path}: not a parquet file; download it again") from None


def text_of(place, value, name):
    """Return the value if it is a text that is not blank, without half a surrogate pair."""
    if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
        raise InputError(f"{place}: {name} is {value!a:.40}; expected a text")
    return value


def sentiment(place, label, negative, positive):
    """Return the task's word for a label that the file writes as `negative` or `positive`."""
    if str(label) not in (negative, positive):
        raise InputError(f"{place}: label {label!r:.40}; expected {negative} (negative) or "
                         f"{positive} (positive)")
    return "positive" if str(label) == positive else "negative"


def save_splits(splits, dir):
    """Write the four sets as dir/SPLIT.jsonl, which --dataset splits reads."""
    for split in SPLITS:
        lines = []
        for example in splits[split]:
            row = {key: value for key, value in example._asdict().items() if value}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        with atomic_write(Path(dir) / f"{split}.jsonl") as temporary:
            temporary.write_bytes("".join(lines).encode())


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with InputError for a wrong flag."""

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def number(kind, range):
    """Return the type of a flag: an int or float in a range."""
    def read(text):
        value = kind(text)
        allowed = {"above 0": value > 0, "of 0 or more": value >= 0,
                   "from 0 to below 1": 0 <= value < 1, "above 0 and up to 1": 0 < value <= 1}
        if not allowed[range] or value == math.inf:
            raise ValueError
        return value

    read.__name__ = f"{kind.__name__} {range}"  # argparse: "invalid int above 0 value: '0'"
    return read


TYPES = {"text": str, "int": int, "count": number(int, "above 0"),
         "int>=0": number(int, "of 0 or more"), "float>0": number(float, "above 0"),
         "float>=0": number(float, "of 0 or more"), "0..<1": number(float, "from 0 to below 1"),
         "0<..1": number(float, "above 0 and up to 1")}


def split_flags(flags):
    """Return [name, type, default of each preset ..., help] for each line of a table of flags."""
    return [re.split(r"\s{2,}", line) for line in flags.strip().splitlines()]


def parse_flags(description, flags, argv, choices=None):
    """Return the flags given in argv, None for the others. InputError for a wrong one.

    flags: a table as in unlearn.py; a line of one cell starts a group, and `name*` takes several
    values. type: a key of TYPES or of `choices`, `a|b`, `switch` or `yes/no`.
    """
    layout = functools.partial(argparse.HelpFormatter, max_help_position=36, width=100)
    parser = ArgumentParser(usage="%(prog)s [flags]", description=description,
                            formatter_class=layout)
    group = parser
    for name, *cells in split_flags(flags):
        if not cells:
            group = parser.add_argument_group(name)
            continue
        kind, text = cells[0], cells[-1]
        options = {"help": text, "default": None}
        if kind in ("switch", "yes/no"):
            options["action"] = "store_true" if kind == "switch" else argparse.BooleanOptionalAction
        elif kind in TYPES:
            options |= {"type": TYPES[kind], "metavar": kind.upper()}
        else:
            options["choices"] = (choices or {}).get(kind) or kind.split("|")
        if name.endswith("*"):
            options["nargs"] = "+"
        group.add_argument(name.removesuffix("*"), **options)
    return parser.parse_args(argv)


def fill_defaults(args, flags, preset=0):
    """Give each flag that is None its default from column `preset` of the table; - is None."""
    for name, *cells in split_flags(flags):
        key = name.strip("-*").replace("-", "_")
        if not cells or getattr(args, key, 0) is not None:
            continue
        default = cells[1 + min(preset, len(cells) - 3)]
        if default != "-":
            values = [TYPES.get(cells[0], str)(value) for value in default.split(",")]
            setattr(args, key, values if name.endswith("*") else values[0])


def run_cli(main):
    """Run a command line and return its exit status: 2 after a mistake in the input."""
    try:
        main()
        sys.stdout.flush()  # finds a closed pipe while it can be caught
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: out of memory; lower --batch (and raise --accumulate) or --max-len, or add "
              "--checkpointing", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last finished epoch",
              file=sys.stderr)
        return 130
    except BrokenPipeError:  # for example `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


FLAGS = """
--dataset      dataset  toy  which texts
--data-dir     text     .    directory of the dataset's files
--seed         int      0    seed of everything that is drawn
--max-train    count    -    at most this many train examples, at random
--max-test     count    -    at most this many test examples, at random
--save-splits  text     -    directory to write the four sets to, as .jsonl
"""


def main(argv=None):
    """Print Table 1's rows, what is forgotten, and how much of the test sets is in training."""
    args = parse_flags("Print Table 1, what is forgotten, and what leaks.", FLAGS, argv,
                       {"dataset": DATASETS})
    fill_defaults(args, FLAGS)
    notes = []
    splits = load_splits(args.dataset, args.data_dir, args.seed, args.max_train, args.max_test,
                         notes)
    if args.save_splits:
        save_splits(splits, args.save_splits)
    print(f"{args.dataset:10}{'retain':>10}{'forget':>10}{'all':>10}")
    for part in ("train", "test"):
        retain, forget = len(splits[f"{part}_retain"]), len(splits[f"{part}_forget"])
        print(f"{part:10}{retain:10,}{forget:10,}{retain + forget:10,}")
    print("\n" + "\n".join(notes) + "\n\nTest texts that are also in the train sets:")
    train = splits["train_retain"] + splits["train_forget"]
    for split in ("test_retain", "test_forget"):
        exact, inside = leakage(train, splits[split])
        print(f"{split}: of {len(splits[split]):,}, {exact:,} word for word, {inside:,} as part of "
              "a longer text")


if __name__ == "__main__":
    sys.exit(run_cli(main))
