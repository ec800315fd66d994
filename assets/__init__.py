"""The embedded base, the example subject, and what builds them."""
