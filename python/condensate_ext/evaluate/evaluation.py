"""One evaluation: a subject, the policies, and what was measured so far."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from condensate_ext.evaluate import omission, protocols, tasks
from condensate_ext.evaluate.forms import FORMS, make_form
from condensate_ext.evaluate.omission import Audit
from condensate_ext.evaluate.policies import (
    ANCHORS,
    WINDOW,
    Policy,
    keys_per_query,
    policy,
    selector_name,
)
from condensate_ext.evaluate.protocols import Record
from condensate_ext.evaluate.runs import Advance
from condensate_ext.evaluate.subject import Subject

PROTOCOLS = ("decode", "needles", "prefill", "survival", "omitted", "steps")


@dataclass(frozen=True)
class Settings:
    """What is asked for; sizes are checked by :meth:`check`."""

    model: Path
    text: Path
    device: str
    dtype: str
    context: int | None
    documents: int
    batch: int
    selectors: tuple[str, ...]
    budgets: tuple[int, ...]
    protocols: tuple[str, ...]
    far_field: bool | None = None
    top_p: float | None = None
    shortlist: int | None = None
    decode_tokens: int = 512
    needles: int = 12
    new_tokens: int = 128
    needle_form: str = "question"
    chat: bool = False
    tasks: tuple[str, ...] = ()
    task_limit: int = 20

    def check(self) -> None:
        """Raises ValueError for counts below 1 and for names of protocols that are none."""
        for name in ("documents", "decode_tokens", "needles", "new_tokens", "batch", "task_limit"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {getattr(self, name)}: it must be at least 1.")
        if self.needle_form not in FORMS:
            raise ValueError(
                f"--needle-form {self.needle_form} is none: use {' or '.join(FORMS)}."
            )
        for name in self.protocols:
            if name not in PROTOCOLS:
                known = ", ".join(PROTOCOLS)
                raise ValueError(f"--protocols {name} is none: use some of {known}.")

    def check_room(self, context: int) -> None:
        """Raises ValueError where nothing of the context is left before what is measured."""
        for name in ("decode_tokens", "new_tokens"):
            if getattr(self, name) >= context:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} leaves nothing of "
                    f"--context {context} before it: lower it or raise --context."
                )

    def steps(self) -> tuple[str, ...]:
        """What is measured, in order."""
        return (*self.protocols, *(["tasks"] if self.tasks else []))

    def policies(self) -> list[Policy]:
        """One a selector and budget; raises ValueError for budgets that do not do."""
        return [
            policy(
                selector, keys,
                far_field=self.far_field, top_p=self.top_p, shortlist=self.shortlist,
            )
            for selector in self.selectors
            for keys in self.budgets
        ]  # fmt: skip


class Evaluation:
    """Runs protocols, and keeps their records."""

    def __init__(
        self, subject: Subject, settings: Settings, opened: dict[str, Any] | None = None
    ) -> None:
        """``opened`` are lm-eval's tasks, from :func:`tasks.open_tasks`."""
        settings.check_room(subject.context)
        self.subject, self.settings, self.opened = subject, settings, opened or {}
        self.policies = settings.policies()
        self.records: list[Record] = []
        self.audits: list[Audit] = []
        self.seconds: dict[str, float] = {}

    def run(self, name: str, advance: Advance) -> None:
        """Measures one protocol."""
        subject, policies, chosen = self.subject, self.policies, self.settings
        began = time.perf_counter()
        match name:
            case "decode":
                found = protocols.decode(subject, policies, chosen.decode_tokens, advance)
            case "prefill":
                found = protocols.prefill(subject, policies, chosen.decode_tokens, advance)
            case "needles":
                form = make_form(chosen.needle_form, subject.tokenizer, chosen.chat)
                found = protocols.needles(
                    subject, policies, chosen.needles, advance=advance, form=form
                )
            case "tasks":
                found = tasks.run(
                    subject, self.opened, policies, chosen.task_limit,
                    chat=chosen.chat, advance=advance,
                )  # fmt: skip
            case "survival":
                found = protocols.survive(subject, policies, chosen.new_tokens, advance)
            case "steps":
                found = protocols.steps(subject, policies, advance)
            case _:
                found, self.audits = protocols.omitted(subject, policies, advance)
        self.records += found
        self.seconds[name] = round(time.perf_counter() - began, 1)

    def document(self) -> dict[str, Any]:
        """Everything measured so far, as JSON takes it."""
        chosen, device = self.settings, torch.device(self.settings.device)
        return {
            "environment": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                **{name: version(name) for name in ("condensate_ext", "torch", "transformers")},
            },
            "settings": {
                "model": chosen.model.name,
                "text": chosen.text.name,
                "dtype": chosen.dtype,
                "context": self.subject.context,
                "documents": len(self.subject.windows),
                "window": WINDOW,
                "anchors": ANCHORS,
                "decode_tokens": chosen.decode_tokens,
                "needles": chosen.needles,
                "new_tokens": chosen.new_tokens,
                "needle_form": chosen.needle_form,
                "chat": chosen.chat,
                "task_limit": chosen.task_limit,
            },
            "seconds": self.seconds,
            "records": self.records,
            "omitted": [
                {
                    "selector": selector_name(policy),
                    "keys": keys_per_query(policy),
                    "layers": omission.by_layer_and_head(audit),
                }
                for policy, audit in zip(self.policies, self.audits, strict=False)
            ],
        }

    def draw(self, folder: Path) -> tuple[dict[str, Path], list[str]]:
        """Draws what was measured: pictures by caption, and a line for each that is missing."""
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return {}, ["no pictures: they need matplotlib; `pip install matplotlib` adds it"]
        from condensate_ext.evaluate import plots

        paths = {name: folder / f"{name}.png" for name in ("quality", "omitted_mass", "support")}
        pictures, missing = {}, []
        if plots.quality(self.records, paths["quality"]):
            pictures["quality against budget"] = paths["quality"]
        if self.audits:
            plots.omitted_mass(self.audits, self.policies, paths["omitted_mass"])
            pictures["omitted mass by layer and head"] = paths["omitted_mass"]
            reason = plots.support(
                self.subject, self.settings.model.name, self.audits, self.policies, paths["support"]
            )
            if reason is None:
                pictures["the head that leaves out most"] = paths["support"]
            else:
                missing.append(reason)
        return pictures, missing
