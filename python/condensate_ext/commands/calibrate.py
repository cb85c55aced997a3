"""``condensate calibrate``: budgets by layer and head, from a text of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from condensate_ext.commands import console
from condensate_ext.commands.options import CONTEXT, DEVICE, DTYPE, MODEL, TEXT, check_dtype
from condensate_ext.evaluate import calibration
from condensate_ext.evaluate.policies import policy
from condensate_ext.evaluate.subject import context_of, default_dtype, load
from condensate_ext.model_checks import check_model


def command(
    model: MODEL,
    text: TEXT,
    device: DEVICE = None,
    dtype: DTYPE = None,
    context: CONTEXT = None,
    documents: Annotated[int, typer.Option(help="Texts: windows of long ones if need be.")] = 2,
    budgets: Annotated[
        list[int], typer.Option(help="Keys per query in all, to choose from.")
    ] = [512, 1024, 2048],  # noqa: B006
    target: Annotated[
        float, typer.Option(help="Softmax mass that a head may leave out on average.")
    ] = 0.1,
    output: Annotated[Path, typer.Option(help="The file.")] = Path("condensate_budgets.json"),
) -> None:
    """Chooses budgets by layer and head.

    Audits on a text what softmax mass each head of each layer leaves out, and writes for every KV
    head the smallest budget that leaves out at most --target. Load the file by
    condensate_ext.evaluate.load_layers and hand it to condensate_ext.transformers.enable.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or default_dtype(device)
    try:
        console.need("calibrate", "transformers")
        check_dtype(dtype)
        if not 0 <= target <= 1:
            raise ValueError(f"--target is {target}: it must be a share, 0 to 1.")
        policies = [policy("block", keys) for keys in sorted(set(budgets))]
        config = check_model(model, [])
        tokens = context_of(context, config, device)
        check_model(model, policies, tokens=tokens, dtype=getattr(torch, dtype))
        subject = load(
            model, text, context=context, documents=documents, batch=1, dtype=dtype, device=device
        )
    except ImportError as error:
        print(error)
        raise typer.Exit(console.FAILED) from None
    except (ValueError, NotImplementedError) as error:
        raise typer.Exit(console.refuse("calibrate", error)) from None
    with console.progress("calibrate", ["audit"]) as begin:
        masses = calibration.mass_left_out(subject, policies, begin("audit"))
    chosen = calibration.choose(masses, policies, target)
    console.write_json(output, {"model": model.name, "context": subject.context, **chosen})
    heads = [keys for layer in chosen["layers"].values() for keys in layer]
    console.say(
        console.console(),
        f"{len(heads)} KV heads: {sum(heads) / len(heads):.0f} listed keys on average; "
        f"{chosen['missed']} leave out more than {target:g} with {chosen['budgets'][-1]} keys",
        f"budgets: {output}",
    )
