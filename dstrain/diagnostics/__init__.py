"""Checks the machines of a run: what each has, whether they match, and whether they reach each other.

``host`` runs on every machine and answers queries; ``remote_session`` sends them over ssh; ``diagnosis`` interprets the
answers; ``host_checks`` combines these. Only ``network_exchange`` imports torch, in processes of its own.
"""
