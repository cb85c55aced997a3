"""Generation that gives the dense model's tokens, drafted by the same model under condensate.

Each round drafts a few tokens with condensed steps over the model's own cache, takes their keys
and values off again, and reads them in one dense pass, which decides what stays. So the cache holds
nothing but what dense passes wrote, and the tokens are those of dense decoding, up to how a pass of
several tokens rounds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condensate_ext.kvcache import MAX_QUERIES
from condensate_ext.transformers.computes import Compute, Condensed, Dense
from condensate_ext.transformers.policy import Policy
from condensate_ext.transformers.switch import open_context


@dataclass
class Acceptance:
    """How a generation went."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def mean_accepted(self) -> float:
        """Accepted drafts a round."""
        return self.accepted / max(self.rounds, 1)


class Lossless:
    """A ``custom_generate`` of transformers.

    >>> lossless = Lossless(topk=704)                                              # doctest: +SKIP
    >>> model.generate(ids, custom_generate=lossless, max_new_tokens=128)          # doctest: +SKIP
    >>> lossless.acceptance.mean_accepted                                          # doctest: +SKIP

    Greedy tokens are the dense model's. Sampled tokens have the dense model's distribution: a draft
    ``d`` stays with probability ``min(1, p(d) / q(d))``, and what is drawn in its place comes from
    the positive part of ``p - q``. Logits processors, temperature and stopping criteria are
    ``generate``'s own.

    Args:
        draft_tokens: drafts a round at most, 1 to 15: with the token before them the 16 queries of
            one pass over the cache. The length adapts to what is accepted.
        policy: of the drafts, see :class:`Policy`.

    Raises:
        TypeError, ValueError: an argument is not allowed. From ``generate``: ValueError for a batch
            of several rows, for padding, and for a cache that cannot be cropped.
    """

    def __init__(self, draft_tokens: int = 8, **policy: Any) -> None:
        if not 1 <= draft_tokens < MAX_QUERIES:
            raise ValueError(
                f"draft_tokens is {draft_tokens}, expected 1 to {MAX_QUERIES - 1}."
            )
        self.draft_tokens = draft_tokens
        self.drafter = Condensed(Policy.of("Lossless", policy))
        self.acceptance = Acceptance()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """What ``generate`` calls; returns ``[1, L + new]``."""
        if generation_config.return_dict_in_generate:
            raise ValueError(
                "return_dict_in_generate is True, but Lossless returns tokens alone; leave it out."
            )
        name, cache = _cache_of(input_ids, model_kwargs)
        read = functools.partial(model, **{name: cache})
        self.acceptance = Acceptance()
        draw = _Draw(logits_processor, generation_config.do_sample)
        turn = _Turn(self.drafter)
        with torch.no_grad(), open_context(model, turn):
            tokens = input_ids
            turn.dense = True
            held = int(cache.get_seq_length())
            logits = read(input_ids=tokens[:, held:], logits_to_keep=1).logits
            tokens = torch.cat([tokens, draw.token(tokens, logits[:, -1])[0]], 1)
            length = min(4, self.draft_tokens)
            while not _stops(stopping_criteria, tokens):
                room = generation_config.max_length - tokens.shape[1]
                turn.dense = False
                drafts = self._draft(read, tokens, draw, min(length, max(room, 1)))
                cache.crop(-len(drafts))
                turn.dense = True
                tokens, kept = self._verify(read, tokens, drafts, draw, stopping_criteria)
                cache.crop(-(len(drafts) - kept))
                full = kept == len(drafts)
                length = min(length + 2, self.draft_tokens) if full else max(kept, 1)
        return tokens

    @staticmethod
    def _draft(
        read: Any, tokens: Tensor, draw: _Draw, count: int
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Tokens with the distributions that they were drawn from."""
        drafts = []
        for _ in range(count):
            logits = read(input_ids=tokens[:, -1:]).logits[:, -1]
            drafts.append(draw.token(tokens, logits))
            tokens = torch.cat([tokens, drafts[-1][0]], 1)
        return drafts

    def _verify(
        self,
        read: Any,
        tokens: Tensor,
        drafts: list[tuple[Tensor, Tensor | None]],
        draw: _Draw,
        stopping_criteria: Any,
    ) -> tuple[Tensor, int]:
        """One dense pass over the last token and the drafts; returns the tokens and how many
        drafts stay."""
        tried = torch.cat([tokens[:, -1:], *(token for token, _ in drafts)], 1)
        logits = read(input_ids=tried).logits
        kept = 0
        for index in range(len(drafts) + 1):
            draft = drafts[index] if index < len(drafts) else None
            token, agreed = draw.decide(tokens, logits[:, index], draft)
            tokens = torch.cat([tokens, token], 1)
            kept += agreed
            if not agreed or _stops(stopping_criteria, tokens):
                break
        self.acceptance.rounds += 1
        self.acceptance.drafted += len(drafts)
        self.acceptance.accepted += kept
        return tokens, kept


class _Turn(Compute):
    """Dense and condensed passes in turn."""

    summaries = True

    def __init__(self, drafter: Compute) -> None:
        self.dense = True
        self.passes = (drafter, Dense())

    def of_layer(self, index: int) -> Compute:
        return self.passes[self.dense].of_layer(index)

    def prompt(self, *arguments: Any) -> Tensor:
        return self.passes[self.dense].prompt(*arguments)

    def step(self, *arguments: Any) -> Tensor | None:
        return self.passes[self.dense].step(*arguments)


class _Draw:
    """How a token is taken from logits."""

    def __init__(self, processors: Any, sample: bool) -> None:
        self.processors = processors
        self.sample = sample

    def scores(self, tokens: Tensor, logits: Tensor) -> Tensor:
        scores: Tensor = self.processors(tokens, logits.to(copy=True, dtype=torch.float32))
        return scores

    def token(self, tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[1, 1]``, and the distribution ``[1, V]`` where it was drawn from one."""
        scores = self.scores(tokens, logits)
        if not self.sample:
            return scores.argmax(-1, keepdim=True), None
        share = scores.softmax(-1)
        return torch.multinomial(share, 1), share

    def decide(
        self, tokens: Tensor, logits: Tensor, draft: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Tensor, bool]:
        """The next token, and whether it is the draft."""
        token, share = self.token(tokens, logits)
        if draft is None:
            return token, False
        drafted, proposed = draft
        if share is None or proposed is None:
            return token, bool(token == drafted)
        ratio = share.gather(1, drafted) / proposed.gather(1, drafted)
        if bool(torch.rand_like(ratio) < ratio):
            return drafted, True
        return torch.multinomial((share - proposed).clamp(min=0), 1), False


def _stops(criteria: Any, tokens: Tensor) -> bool:
    return bool(criteria(tokens, None).all())


def _cache_of(input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[str, Any]:
    """The cache, and the name that this release of transformers has for it."""
    mask = model_kwargs.get("attention_mask")
    if input_ids.shape[0] != 1 or (mask is not None and not bool(mask.all())):
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}, but Lossless takes one row without "
            "padding, as rows accept different numbers of drafts; generate row by row."
        )
    name = "cache" if "cache" in model_kwargs else "past_key_values"
    cache = model_kwargs.get(name)
    if cache is None or not all(getattr(layer, "is_croppable", False) for layer in cache.layers):
        raise ValueError(
            f"the cache is {type(cache).__name__}, but Lossless needs one whose layers can be "
            "cropped, such as DynamicCache of a model with full attention."
        )
    return name, cache
