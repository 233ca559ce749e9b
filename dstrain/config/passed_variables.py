"""Names of environment variables that a run hands on to other hosts: patterns, and what none of them takes along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

_PATTERN = re.compile(r"[A-Za-z_*?][A-Za-z0-9_*?]*")
# They would stand in command lines and files. TOKENIZERS_PARALLELISM is no secret.
_SECRET = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|API_?KEY|TOKEN(?!IZ)"
    r"|(?:^|_)(?:KEYS?|PASS|PWD|AUTH|BEARER|COOKIES?|JWT|PAT)(?:_|$)",
    re.IGNORECASE,
)
# Each rank or host has its own, or dstrain decides it.
_OF_LAUNCHES = re.compile(
    r"(?:LOCAL_|GROUP_|ROLE_)?(?:RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(?:ADDR|PORT)|CUDA_VISIBLE_DEVICES"
    r"|DS_ACCELERATOR|DS_ENV_FILE|(?:DSTRAIN|TORCHELASTIC|SLURM|OMPI|PMIX?)_.*"
)


def check_patterns(patterns: Iterable[str]) -> None:
    """Raises ValueError for what is no pattern of names, or names what must not be handed on."""
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(
                f"{pattern!r} is not the name of an environment variable, nor a pattern such as MY_*"
            )
        if _SECRET.search(pattern):
            raise ValueError(
                f"{pattern!r} looks like a secret, and what is handed on stands in files and in command lines that"
                " everybody can read: write it into a file on every host"
            )
        if _OF_LAUNCHES.fullmatch(pattern):
            raise ValueError(f"{pattern!r} is set on each host or rank by the launch")


def matching(environ: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    """The variables that are set and whose name matches one of the patterns."""
    patterns = list(patterns)
    return {
        name: value
        for name, value in environ.items()
        if value and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def passed(environ: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    """Those that match, but for secrets and for what launchers set."""
    return {
        name: value
        for name, value in matching(environ, patterns).items()
        if not _SECRET.search(name) and not _OF_LAUNCHES.fullmatch(name)
    }
