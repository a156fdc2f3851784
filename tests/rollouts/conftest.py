"""Fixtures of the rollouts' tests."""

from tests.rollouts.episodes import an_episode

__all__ = ["an_episode"]
