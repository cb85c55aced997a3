"""Needles: hidden, asked by a scripted model and by a small random one, scored."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from condensate_ext import evaluate  # noqa: E402
from condensate_ext.evaluate import needles, policies, runs  # noqa: E402

from tests.testkit import tiny_lm  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

COVERING = policies.covering(640)
SMALL = {"window": 16, "anchors": 8, "topk": 64, "selector": "block"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_lm.make_tokenizer()


def test_needles_share_no_word_and_no_first_letter():
    made = evaluate.make_needles(20, seed=3)
    words = [word for needle in made for word in needle.words.split()]
    assert len(set(words)) == 40
    assert len({needle.code[0] for needle in made}) == 20
    with pytest.raises(ValueError, match="1 to 20"):
        evaluate.make_needles(21)


def test_needles_are_hidden_whole_within_the_distance(tokenizer):
    made = evaluate.make_needles(4)
    document = evaluate.hide_needles(tokenizer, "some text\n" * 500, made, 3000, 1800)
    assert len(document) == 3000
    assert document[0] == tiny_lm.BEGIN
    text = tokenizer.decode(document[1:])
    for needle in made:
        assert text.count(needle.statement) == 1
        assert text.index(needle.statement) >= 1200 - 1
    with pytest.raises(ValueError, match="longer text"):
        evaluate.hide_needles(tokenizer, "some text\n" * 100, made, 3000, 1800)
    with pytest.raises(ValueError, match=r"\d of 4 statements found no line end"):
        evaluate.hide_needles(tokenizer, "x" * 4000, made, 3000, 1800)


class NoAttention(torch.nn.Module):
    layer_idx = 0

    def __init__(self, config):
        super().__init__()
        self.config = config


class Scripted(torch.nn.Module):
    """Answers the question about some words with the text it was given for them."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.tokenizer, self.answers = tokenizer, answers
        self.config = transformers.LlamaConfig(num_hidden_layers=1, attn_implementation="sdpa")
        self.layer = NoAttention(self.config)
        self.passes = []  # (attention, rows, tokens) of every forward pass

    @property
    def base_model(self):
        return self

    @staticmethod
    def _can_set_attn_implementation():
        return True

    def forward(self, input_ids, cache, use_cache, logits_to_keep=0):
        self.passes.append((self.config._attn_implementation[:4], *input_ids.shape))
        before = getattr(cache, "read", input_ids[:, :0]).expand(len(input_ids), -1)
        cache.read = torch.cat([before, input_ids], 1)
        logits = torch.zeros(len(input_ids), 1, tiny_lm.VOCABULARY)
        for row, said in enumerate(self.tokenizer.batch_decode(cache.read)):
            question, _, answered = said.rpartition(" Answer:")
            answer = self.answers.get(question.rpartition("code for ")[2].rstrip("?"), "")
            following = f" {answer}......"[len(answered) if question else 0]
            logits[row, 0, self.tokenizer(following, add_special_tokens=False).input_ids] = 1
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    __call__ = forward


@pytest.mark.parametrize("variant", [None, SMALL, "control"], ids=["dense", "policy", "control"])
def test_needles_are_scored_by_their_first_and_all_characters(tokenizer, variant):
    made = evaluate.make_needles(4)
    right, first, last, wrong = made
    answers = {
        right.words: right.code,
        first.words: first.code[:4] + "?",
        last.words: "?" + last.code[1:],
        wrong.words: right.code,  # another needle's
    }
    scripted = Scripted(tokenizer, answers)
    document = [n % 90 for n in range(400)]
    found = evaluate.ask_needles(scripted, tokenizer, document, made, variant, 400, batch=3)
    assert [(answer.first, answer.whole) for answer in found] == [
        (True, True), (True, False), (False, False), (False, False),
    ]  # fmt: skip
    # A policy reads every prompt whole; dense attention may read what they share once.
    expected = []
    for group in (made[:3], made[3:]):
        asked = max(len(tokenizer(n.question, add_special_tokens=False).input_ids) for n in group)
        whole = [(1, 400 - asked), (len(group), asked)] if variant is None else [(len(group), 400)]
        expected += [*whole, *[(len(group), 1)] * (needles.ANSWER_TOKENS - 1)]
    name = "sdpa" if variant is None else "cond"
    assert scripted.passes == [(name, *shape) for shape in expected]


class Pairs:
    """A tokenizer of two characters a token."""

    def __init__(self, tokens):
        self.tokens = tokens

    def decode(self, numbers):
        return "".join(self.tokens[n] for n in numbers)


@pytest.mark.parametrize(
    ("said", "first", "whole"),
    [
        ([0, 1, 2, 6], True, True),
        ([3, 4, 1, 2], False, True),  # the same characters, cut otherwise
        ([0, 1, 5, 6], True, False),
        ([5, 1, 2, 6], False, False),
    ],
)
def test_an_answer_is_read_as_text(said, first, whole):
    tokenizer = Pairs([" A", "BC", "DE", " ", "A", "?", "."])
    prompt = needles._Prompt(ids=[], expected=[0, 1, 2], code="ABCDE", question=0)
    assert needles._score(tokenizer, prompt, said) == evaluate.Answer(first, whole)


def test_sharing_the_document_changes_no_dense_answer(tokenizer):
    model = tiny_lm.make_model()
    text = tiny_lm.make_text(60)
    made = evaluate.make_needles(3)
    document = evaluate.hide_needles(tokenizer, text, made, 600, 600)
    prompts = [needles._prompt(tokenizer, document, needle, 576) for needle in made]
    shared = needles._generate(model, prompts, None, runs.silent)
    whole = needles._generate(model, prompts, COVERING, runs.silent)
    assert torch.equal(shared, whole)
    assert shared.shape == (3, needles.ANSWER_TOKENS)


def test_a_prompt_ends_with_its_question(tokenizer):
    (needle,) = evaluate.make_needles(1)
    prompt = needles._prompt(tokenizer, list(range(90)) * 5, needle, 400)
    assert len(prompt.ids) == 400
    assert tokenizer.decode(prompt.ids).endswith(needle.question)
    assert tokenizer.decode(prompt.expected) == f" {needle.code}"
    with pytest.raises(ValueError, match="90 tokens, 400 are needed"):
        needles._prompt(tokenizer, range(90), needle, 400)
