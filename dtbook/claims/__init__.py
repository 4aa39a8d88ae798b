"""The post's claims: the rules that decide them, what a model shows of each, and the scorecard."""

# the rules of claims add themselves when they are imported, in the scorecard's order
from dtbook.claims import behaviour_rules, circuit_rules, training_rules  # noqa: F401
from dtbook.claims.rules import CLAIMS, RULES, Claim, Finding, decide_claims

__all__ = ["CLAIMS", "RULES", "Claim", "Finding", "decide_claims"]
