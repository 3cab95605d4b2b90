"""One way to save, load and share whatever xbt makes."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin

from xbt.hub.cards import MARK, CardData, CardFacts, make_card
from xbt.hub.configs import gathered_warning
from xbt.hub.files import CARD_NAME
from xbt.hub.names import LOCAL, Naming, public_name, resolved_name
from xbt.hub.transfer import fetch, require_repository, upload


class HubArtifact(ModelHubMixin, library_name="xbt"):
    """Saving, loading and pushing with one signature for projections, ensembles, encoders and backbones.

    A part writes its files (:meth:`_write`), reads them (:meth:`_read`), and tells a card about itself
    (:meth:`_facts`); the rest is here.
    """

    @abstractmethod
    def _write(self, directory: Path, naming: Naming, card: CardData) -> None:
        """Writes config and weights.

        Args:
            directory: Where to.
            naming: How models are named: with their paths for this machine, or without for others.
            card: What the owner adds; of it only ``base`` concerns the config.
        """

    @classmethod
    @abstractmethod
    def _read(cls, directory: Path, device: str | torch.device) -> Self:
        """Reads what :meth:`_write` wrote."""

    @abstractmethod
    def _facts(self, card: CardData) -> CardFacts:
        """What the card says."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        card: CardData | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_options: Any,
    ) -> CommitInfo | None:
        """Writes config, weights and card.

        Args:
            save_directory: Made if it does not exist; an earlier part in it is replaced. A ``README.md`` that
                xbt did not write is kept.
            card: What the card also says: results, licence, data sets.
            push_to_hub: Whether to push it as well; see :meth:`push_to_hub`.
            repo_id: Where to, ``org/name``.
            **push_options: Its other options.

        Returns:
            The commit, if it was pushed.

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
        """Uploads config, weights and card to the Hugging Face Hub in one commit.

        What is uploaded names models without paths of this machine.

        Args:
            repo_id: Hub repository ``org/name``, made if it does not exist.
            card: What the card also says: results, licence, data sets.
            commit_message: The commit's summary.
            private: Whether a repository that is made is private, and one that is there must be.
            token: Hub access token that may write; by default the one of ``hf auth login`` or ``HF_TOKEN``.
            revision: Branch to commit to, made if it does not exist.
            create_pr: Open a pull request instead of committing to the branch.

        Returns:
            The commit; it is a string, its URL, and has the attributes ``oid`` and ``pr_url``.

        Raises:
            SavedPartError: If the name, the token or the repository will not do, or the Hub does not
                answer.
            ConfigError: If the card's report cannot be read.

        Warns:
            UserWarning: If a model was loaded from a directory here, which others do not have.
        """
        require_repository(repo_id)
        data = card or CardData()
        with TemporaryDirectory() as folder:
            self._save(Path(folder), public_name, data, repo_id)
            message = commit_message or f"Upload {type(self).__name__} with xbt"
            return upload(
                Path(folder),
                repo_id,
                commit_message=message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Loads what was saved, strictly, from a directory or a Hub repository.

        Nothing is unpickled, and nothing is believed before it is checked: names, shapes and sizes of the
        weights are compared with the config before memory is taken.

        Args:
            pretrained_model_name_or_path: Directory, or Hub repository ``org/name``.
            device: Where the weights go.
            revision: Branch, tag or commit on the Hub.
            cache_dir: The Hub cache to use instead of the default one.
            token: Hub access token, for private repositories.
            force_download: Download again what the cache already holds.
            local_files_only: Use the cache alone; ``HF_HUB_OFFLINE=1`` does so everywhere.

        Returns:
            The part in evaluation mode.

        Raises:
            SavedPartError: If a file is missing, damaged, changed, of another kind, or does not fit its
                config.

        Warns:
            NewerConfigWarning: If a newer xbt wrote settings that this one does not know.
        """
        directory = fetch(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        with gathered_warning():
            return cls._read(directory, device)

    def generate_model_card(self, card: CardData | None = None, repo_id: str | None = None) -> ModelCard:
        """The card that is saved beside the weights; see :func:`~xbt.hub.cards.make_card`."""
        data = card or CardData()
        return make_card(self._facts(data), data, repo_id)

    def refresh_card(self, directory: Path, card: CardData | None = None) -> None:
        """Writes the card of what is saved in a directory again; one that xbt did not write is kept.

        Args:
            directory: Where it was saved.
            card: What the card also says.

        Raises:
            ConfigError, SavedPartError: If the card's report cannot be read.
        """
        _write_card(directory / CARD_NAME, self.generate_model_card(card), card)

    def _save(self, directory: Path, naming: Naming, card: CardData, repo_id: str | None) -> None:
        # First what the owner may have got wrong: a report that cannot be read leaves nothing half-saved.
        made = self.generate_model_card(card, repo_id)
        directory.mkdir(parents=True, exist_ok=True)
        self._write(directory, naming, card)
        _write_card(directory / CARD_NAME, made, card)


def _write_card(page: Path, made: ModelCard, card: CardData | None) -> None:
    if page.is_file() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
        if card not in (None, CardData()):
            warnings.warn(
                f"{page} was not written by xbt and is kept as it is, without what you added; delete it to "
                "have one made",
                stacklevel=4,
            )
        return
    made.save(page)


def warn_of_directories(names: dict[str, str], naming: Naming) -> None:
    """Says, when names are made public, which models others will have to name themselves.

    Args:
        names: Option of ``from_pretrained`` → specification of the model.
        naming: How they are written down.
    """
    for option, name in names.items():
        if naming(name) != name and naming(name).startswith(LOCAL):
            warnings.warn(
                f"the model '{naming(name).removeprefix(LOCAL)}' is a directory here and is not shared: its "
                f"path is left out, and who loads this must pass {option}=; or name its Hub repository with "
                "card=CardData(base=...)",
                stacklevel=6,
            )
