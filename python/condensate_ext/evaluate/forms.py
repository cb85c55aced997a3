"""How a needle is asked for: as a question or as a statement to complete, plainly or in a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from condensate_ext.evaluate.text import leading_tokens

if TYPE_CHECKING:
    from condensate_ext.evaluate.needles import Needle

FormName = Literal["question", "statement"]
FORMS: tuple[FormName, ...] = ("question", "statement")
_MARK = "CONDENSATE-PROMPT"


@dataclass(frozen=True)
class Form:
    """What stands before and behind the document of a prompt.

    Models that were not trained to answer a question often complete a statement that the text has
    in the same words.
    """

    name: FormName = "question"
    chat: tuple[str, str] | None = None  # what a template puts before and behind a user's turn

    def asked(self, needle: Needle) -> str:
        """The prompt's end, behind which the answer begins."""
        if self.chat is None:
            return needle.question if self.name == "question" else f"\n{needle.beginning}"
        turn = f"\nWhat is the secret code for {needle.words}? Answer with the code."
        return turn + self.chat[1] + (needle.beginning if self.name == "statement" else "")

    def answer(self, needle: Needle) -> str:
        """The right answer, with the space that separates it."""
        bare = self.chat is not None and self.name == "question"
        return needle.code if bare else f" {needle.code}"

    def prompt(self, tokenizer: Any, document: Sequence[int], room: int) -> list[int]:
        """``room`` tokens: what begins the prompt, and the document, shortened."""
        if self.chat is None:
            return list(document[:room])
        head = tokenizer(self.chat[0], add_special_tokens=False).input_ids
        return [*head, *document[len(leading_tokens(tokenizer)) :]][:room]


def make_form(name: str, tokenizer: Any, chat: bool = False) -> Form:
    """The form of this name.

    Raises:
        ValueError: there is none, or the tokenizer has no chat template.
    """
    if name not in FORMS:
        raise ValueError(f"--needle-form {name} is none: use {' or '.join(FORMS)}.")
    form = next(known for known in FORMS if known == name)
    if not chat:
        return Form(form)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("--chat: the tokenizer has no chat template; leave --chat out.")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, found, behind = text.partition(_MARK)
    if not found:
        raise ValueError("--chat: the chat template drops what the user says; leave --chat out.")
    return Form(form, (before, behind))
