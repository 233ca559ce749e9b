"""Looks at the machines before a run does: what each has, whether they agree, and whether they reach each other.

``host`` runs on every machine and answers questions; ``conversation`` asks them over ssh; ``findings`` says what the
answers mean; ``examination`` puts these together. ``exchange`` alone imports torch, in processes of its own.
"""
