"""A policy from outside of Convoy."""

from policies.priorities import LinearPriority
from policies.request import Request

TOKENS_PER_S = 100.0


class ShortestPromptWithAging(LinearPriority):
    """The shorter prompt first; a second of waiting outweighs 100 tokens."""

    def line(self, request: Request) -> tuple[float, float]:
        """Intercept and slope over time of the key; the smallest key goes first."""
        return request.prompt_tokens + TOKENS_PER_S * request.arrival_s, -TOKENS_PER_S
