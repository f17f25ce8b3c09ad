"""BAPO: personalise a chat model without making it forget (arXiv 2407.00693)."""

__version__ = "0.1.0"
