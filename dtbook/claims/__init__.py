"""The post's claims: the rules that decide them, what a model shows of each, and the scorecard."""

from dtbook.claims.rules import CLAIMS, RULES, Claim, Finding, measure

__all__ = [
    "CLAIMS",
    "RULES",
    "Claim",
    "Finding",
    "measure",
]
