"""Models of the Hugging Face hub: which commit is meant, and what of it lies in the local cache."""

from pathlib import Path

from potstill.core.errors import ModelError

__all__ = ["cached_hub_folder", "hub_commit"]


def cached_hub_folder(name: str, revision: str | None) -> Path | None:
    """The snapshot folder of a hub model in the local cache, or None; the folder's name is the commit."""
    import huggingface_hub
    from huggingface_hub import constants  # no attribute of the package until it has been imported

    cache = constants.HF_HUB_CACHE
    file = huggingface_hub.try_to_load_from_cache(name, "config.json", cache_dir=cache, revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def hub_commit(name: str, revision: str | None) -> str:
    """The commit of a hub model: what the local cache holds, else what the hub says.

    Raises ModelError when it is not cached and the hub cannot be asked or does not know it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if (cached := cached_hub_folder(name, revision)) is not None:
        return cached.name
    try:
        return str(huggingface_hub.HfApi().model_info(name, revision=revision).sha)
    except Exception as error:  # each HTTP library under the hub's client has connection errors of its own
        cause = error
    if isinstance(cause, OfflineModeIsEnabled):
        reason = "the hub is switched off (HF_HUB_OFFLINE)"
    else:
        reason = (
            f"the hub {'refuses it' if isinstance(cause, HfHubHTTPError) else 'is out of reach'} ({cause})"
        )
    raise ModelError(
        f"is no folder and not in the local hub cache, and {reason}",
        where=name if revision is None else f"{name}@{revision}",
        expected="a model folder of that path, or a hub model that is cached or can be fetched",
        mend="check the spelling; with the hub in reach, run `hf download` for it (with HF_TOKEN if it is "
        "gated) and copy the cache here; or use one that potstill brings (`potstill models list`)",
    ) from cause
