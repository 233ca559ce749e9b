"""dstrain: a configuration-driven trainer on DeepSpeed.

The rooms, in the order in which a run walks through them: ``config`` (what is wanted), ``plan``
(what will run), ``launch`` (how it starts), ``data``/``model``/``engine``/``train`` (what each rank
does), ``report`` (what happened). ``cli`` holds one file for each command.
"""

__version__ = "0.1.0"
