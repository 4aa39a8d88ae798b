"""The post's claims: the rules that decide them, what a model shows of each, and the scorecard."""

from dtbook.claims.rules import AVOIDS, CLAIMS, DOES_NOT, RULES, TABLE_1, Claim, Finding, measure

__all__ = [
    "AVOIDS",
    "CLAIMS",
    "DOES_NOT",
    "RULES",
    "TABLE_1",
    "Claim",
    "Finding",
    "measure",
]
