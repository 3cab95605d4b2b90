"""One interface to save, load and share projections, ensembles, encoders and backbones."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin
from torch import nn

from xbt.errors import SavedPartError, XbtError
from xbt.hub.cards import MARK, CardData, CardFacts, make_card
from xbt.hub.configs import DIGESTS_KEY, SavedConfig, combined_warning
from xbt.hub.files import (
    CARD_NAME,
    CONFIG_NAME,
    LOCAL,
    WEIGHTS_NAME,
    Naming,
    digests,
    public_name,
    resolved_name,
    write_config,
)
from xbt.hub.transfer import HubAccess, fetch_repository, require_repository, upload
from xbt.hub.weights import SPARE_BYTES, build_and_load, save_weights
from xbt.version import __version__


class HubArtifact(ModelHubMixin, library_name="xbt"):
    """Base class of everything that can be saved, loaded and pushed.

    A subclass names its format and the keys of its config, describes itself (:meth:`_config`), builds an
    instance from such a description (:meth:`_build`), and gives the facts for its model card
    (:meth:`_facts`). Its weights are the ``state_dict`` of a module. Everything else happens here: files,
    versions, digests, and the checks of names, shapes and sizes before memory is allocated.

    Attributes:
        format_name: Name of the format, which its config records.
        config_keys: Keys that its config must have, beside :data:`~xbt.hub.configs.COMMON_KEYS`.
        optional_keys: Keys that its config may have.
        spare_bytes: Bytes that building it may allocate beyond eight times the size of its weights.
    """

    format_name: ClassVar[str]
    config_keys: ClassVar[tuple[str, ...]]
    optional_keys: ClassVar[tuple[str, ...]] = ()
    spare_bytes: ClassVar[int] = SPARE_BYTES

    @abstractmethod
    def _config(self, naming: Naming, card: CardData) -> dict[str, Any]:
        """JSON-able value for each of :attr:`config_keys`; of the card, only ``base`` matters."""

    @classmethod
    def _build(cls, config: SavedConfig) -> nn.Module:
        """Build the module that :meth:`_config` described, with any weights; its errors become sentences."""
        raise NotImplementedError(f"{cls.__name__} has no weights of its own and reads its files itself")

    @abstractmethod
    def _facts(self, card: CardData) -> CardFacts:
        """Facts for the model card."""

    def _write_files(self, directory: Path, naming: Naming, card: CardData) -> list[str]:
        """Write what belongs beside the config, here the weights, and return the names of the files."""
        assert isinstance(self, nn.Module)
        save_weights(self, directory / WEIGHTS_NAME)
        return [WEIGHTS_NAME]

    def _write(self, directory: Path, naming: Naming, card: CardData) -> list[str]:
        """Write config and weights into a directory, and return the names of the files."""
        directory.mkdir(parents=True, exist_ok=True)
        names = self._write_files(directory, naming, card)
        config = {
            "format": self.format_name,
            "xbt_version": __version__,
            **self._config(naming, card),
            DIGESTS_KEY: digests(directory, names),
        }
        write_config(directory / CONFIG_NAME, config)
        return [CONFIG_NAME, *names]

    @classmethod
    def _open_config(cls, directory: Path) -> SavedConfig:
        """Read the config in a directory and check its format and keys."""
        return SavedConfig(directory / CONFIG_NAME, cls.format_name, cls.config_keys, cls.optional_keys)

    @classmethod
    def _read(cls, directory: Path, device: str | torch.device, access: HubAccess) -> Self:
        """Read what :meth:`_write` wrote; ``access`` is for models that the config only names."""
        config = cls._open_config(directory)
        try:
            artifact = build_and_load(
                directory / WEIGHTS_NAME, lambda: cls._build(config), config.file, cls.spare_bytes
            )
        except SavedPartError:
            raise
        except XbtError as error:
            raise SavedPartError(f"{config.file} cannot be used: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise SavedPartError(f"{config.file} lacks or misnames a key: {error}") from error
        if not isinstance(artifact, cls):
            raise SavedPartError(f"{directory} holds a {type(artifact).__name__}, not a {cls.__name__}")
        config.check_files()
        return artifact.to(device)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        card: CardData | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_options: Any,
    ) -> CommitInfo | None:
        """Write config, weights and card.

        Args:
            save_directory: Made if it does not exist; earlier files of xbt in it are replaced. A
                ``README.md`` that xbt did not write is kept.
            card: Further content of the card: results, licence, data sets.
            push_to_hub: Whether to push it too; see :meth:`push_to_hub`.
            repo_id: Hub repository ``org/name`` to push to.
            **push_options: Other options of :meth:`push_to_hub`.

        Returns:
            The commit if it was pushed, else ``None``.

        Raises:
            SavedPartError: If the weights hold NaN, or it cannot be pushed.
            ConfigError: If the card's report cannot be read.
        """
        if push_to_hub:
            require_repository(repo_id or "")
        elif push_options or repo_id:
            given = ", ".join([*(["repo_id"] if repo_id else []), *push_options])
            raise TypeError(f"{given} only with push_to_hub=True")
        self._save(Path(save_directory), resolved_name, card or CardData(), None)
        return self.push_to_hub(str(repo_id), card=card, **push_options) if push_to_hub else None

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        card: CardData | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload config, weights and card to the Hugging Face Hub in one commit.

        Uploaded files hold no paths of this machine.

        Args:
            repo_id: Hub repository ``org/name``, made if it does not exist.
            card: Further content of the card: results, licence, data sets.
            commit_message: The commit's summary.
            private: Whether to make a new repository private; an existing one must be private then.
            token: Hub access token with write access; by default that of ``hf auth login`` or ``HF_TOKEN``.
            revision: Branch to commit to, made if it does not exist.
            create_pr: Open a pull request instead of committing to the branch.

        Returns:
            The commit: a string (its URL) with the attributes ``oid`` and ``pr_url``.

        Raises:
            SavedPartError: If the name, the token or the repository is not accepted, or the Hub does not
                answer.
            ConfigError: If the card's report cannot be read.

        Warns:
            UserWarning: If a model was loaded from a local directory, which others do not have.
        """
        require_repository(repo_id)
        data = card or CardData()
        with TemporaryDirectory() as folder:
            self._save(Path(folder), public_name, data, repo_id)
            message = commit_message or f"Upload {type(self).__name__} with xbt"
            return upload(Path(folder), repo_id, message, private, token, revision, create_pr)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """Load a saved artifact, strictly, from a directory or a Hub repository.

        Nothing is unpickled. Names, shapes and sizes of the weights are compared with the config before
        memory is allocated.

        Args:
            pretrained_model_name_or_path: Directory, or Hub repository ``org/name``.
            device: Device of the weights.
            revision: Branch, tag or commit on the Hub.
            cache_dir: The Hub cache to use instead of the default one.
            token: Hub access token, for private repositories.
            force_download: Download again what the cache already holds.
            local_files_only: Use the cache alone; ``HF_HUB_OFFLINE=1`` does so everywhere.
            **options: Further options of the class, such as ``base`` of a
                :class:`~xbt.compatible.CompatibleEncoder`.

        Returns:
            The object in eval mode.

        Raises:
            SavedPartError: If a file is missing, damaged, changed, of another kind, or does not fit its
                config.

        Warns:
            NewerConfigWarning: If a newer xbt wrote settings that this version does not know.
        """
        access = HubAccess(revision, cache_dir, token, local_files_only)
        directory = Path(pretrained_model_name_or_path).expanduser()
        if not directory.is_dir():
            name = str(pretrained_model_name_or_path)
            directory = fetch_repository(name, access, force_download=force_download)
        with combined_warning():
            return cls._read(directory, device, access.at(None), **options)

    def generate_model_card(self, card: CardData | None = None, repo_id: str | None = None) -> ModelCard:
        """Make the card that is saved beside the weights; see :func:`~xbt.hub.cards.make_card`."""
        data = card or CardData()
        return make_card(self._facts(data), data, repo_id)

    def refresh_card(self, directory: Path, card: CardData | None = None) -> None:
        """Write the card in its directory again; a card that xbt did not write is kept."""
        _write_card(directory / CARD_NAME, self.generate_model_card(card), card)

    def _save(self, directory: Path, naming: Naming, card: CardData, repo_id: str | None) -> None:
        # The card is made first, so that a report that cannot be read leaves nothing half-saved.
        page = self.generate_model_card(card, repo_id)
        self._write(directory, naming, card)
        _write_card(directory / CARD_NAME, page, card)


def _write_card(file: Path, page: ModelCard, card: CardData | None) -> None:
    if file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        if card not in (None, CardData()):
            warnings.warn(
                f"{file} was not written by xbt and is kept as it is, without the content of card=; delete "
                "it to get a new card",
                stacklevel=4,
            )
        return
    page.save(file)


def warn_about_local_models(names: dict[str, str], naming: Naming) -> None:
    """Warn, when names are made public, about models that others must name themselves.

    ``names`` gives the specification of the model for each option of ``from_pretrained``.
    """
    for option, name in names.items():
        if naming(name) != name and naming(name).startswith(LOCAL):
            warnings.warn(
                f"the model '{naming(name).removeprefix(LOCAL)}' is a directory here and is not shared: its "
                f"path is left out, and others must pass {option}= to load this; or name its Hub repository "
                "with card=CardData(base=...)",
                stacklevel=6,
            )
